"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, of any version.

An adapter is read where it then answers as it does in PEFT. The tensors must be those of the layers that the
config names. What would change the result is BadInput.
"""
import math
import operator
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import BadInput, note
from runtime.folders import check_tensor, read_json, read_tensor, tensor_names
from runtime.foreign import models_inside
from runtime.patterns import match_names

PREFIX = "base_model.model."                 # of every tensor's name in adapter_model.safetensors
MERGE = "merge the adapter into its base with PEFT first (docs/data.md, Adapters)"
CONVERT = ("save it as plain LoRA where it was trained (save_pretrained with "
           "path_initial_model_for_weight_conversion)")
OTHER_BASE = "the file is damaged, or belongs to another base, which --base names"

# ------------------------------------------------------------ adapter_config.json
# Options that are read here, or that change nothing once an adapter is trained. Others may not be set.
KNOWN_OPTIONS = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "rank_pattern",
    "alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "init_lora_weights",
    # what these train beside A and B stands in the file as tensors, which are looked at
    "modules_to_save", "bias", "lora_bias",
    # how training began, or how the program that trained was set up
    "eva_config", "loftq_config", "corda_config", "lora_ga_config", "velora_config", "inference_mode",
    "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config",
    "merge_weights", "ensure_weight_tying", "fan_in_fan_out"}      # the last one is off for nn.Linear in PEFT

# Values of init_lora_weights that only choose where A and B begin. The others change the base's weights too:
# these, in a way that PEFT can repeat; pissa_niter_*, corda and lora_ga in one that it cannot.
HARMLESS_STARTS = {"none", "true", "false", "gaussian", "eva", "orthogonal", "mica"}
REPEATED_STARTS = {"pissa", "olora", "loftq"}

# Options that even PEFT cannot merge into the weights.
NEVER_MERGED = {"layer_replication", "alora_invocation_tokens", "arrow_config"}

def read_adapter_config(path: str | Path) -> dict:
    """adapter_config.json of a folder. BadInput where it asks for what would change the result here, or where
    its numbers make no sense."""
    file = Path(path) / "adapter_config.json"
    config = {"peft_type": None, **read_json(file)}
    for key, value in config.items():
        found = f"{file}: {key} = {value!r:.200}"
        if key == "init_lora_weights" and (start := str(value).lower()) not in HARMLESS_STARTS:
            raise BadInput(f"{found} changes the base's weights too: A and B alone do not give the result; "
                           f"{MERGE if start in REPEATED_STARTS else CONVERT}")
        if key == "peft_type" and value != "LORA":
            raise BadInput(f"{found}: only LORA is read here; where PEFT can, {MERGE}")
        is_unset = value is False or value in (None, {}, [], "")
        if not is_unset and key not in KNOWN_OPTIONS:
            how = "use a plain LoRA: PEFT cannot merge this" if key in NEVER_MERGED else MERGE
            raise BadInput(f"{found} is not supported, and may change the result; {how}")
    try:
        check_values(config)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"{file}: is not a LoRA config that makes sense ({why})") from None
    return config

def base_of_each(folders: list[str], base: str | None) -> list[str | None]:
    """--base for every folder that is an adapter, None for the others. Where no folder is an adapter, all get
    it, and lora.resolve refuses it."""
    is_adapter = [(Path(folder) / "adapter_config.json").exists() for folder in folders]
    return [base if adapter or not any(is_adapter) else None for adapter in is_adapter]

def check_values(config: dict):
    """Raises an error, of one of many types, where a rank, alpha, dropout or list of names is wrong."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    total = sum([config["lora_alpha"], config.get("lora_dropout") or 0, *ranks.values(), *alphas.values()])
    smallest_rank = min(operator.index(rank) for rank in [config["r"], *ranks.values()])   # index: no floats
    if not math.isfinite(total) or smallest_rank < 1 or not config.get("target_modules"):
        raise ValueError(f"r {config['r']}, target_modules {config.get('target_modules')}")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key) or []
        is_pattern = isinstance(names, str) and key != "modules_to_save"
        if not is_pattern and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"{key} {names!r}")

def matches(path: str, targets: list[str]) -> bool:
    """PEFT's rule for a list of modules: it holds the ends of their paths."""
    return any(path == target or path.endswith("." + target) for target in targets)

def named_layers(config: dict, linears: list[str]) -> set[str]:
    """Those of the layers `linears` that have LoRA by PEFT's rules: target_modules without exclude_modules,
    and only at the numbers in layers_to_transform. A list holds ends of paths, a string is a regular
    expression for whole paths."""
    def chosen(targets):
        if isinstance(targets, str):
            return set(match_names([targets], linears)[targets])
        return {path for path in linears if matches(path, targets)}

    def number(path):
        return next(map(int, re.findall(r"\.(\d+)\.", path)), None)

    targets, layers = config["target_modules"], config.get("layers_to_transform")
    # "all-linear" is PEFT's word for all layers but the head
    named = {*linears} - {"lm_head"} if targets == "all-linear" else chosen(targets)
    if layers not in (None, []):             # 0 is a layer
        layers = layers if isinstance(layers, list) else [layers]
        named = {path for path in named if path in targets or number(path) in layers}
    return named - chosen(config.get("exclude_modules") or []) - chosen(config.get("modules_to_save") or [])

def by_pattern(patterns: dict | None, paths: list[str], default: float) -> dict[str, float]:
    """PEFT's rank_pattern and alpha_pattern: for each path the value of the first key that matches its
    end."""
    values, patterns = dict.fromkeys(paths, default), patterns or {}
    found = match_names(patterns, paths, r"(.*\.)?({})")
    for pattern in reversed(patterns):       # the first key has the last word
        values |= dict.fromkeys(found[pattern], patterns[pattern])
    return values

# ------------------------------------------------------------ adapter_model.safetensors
# What programs that wrap a model put between the names of its parts.
WRAPPERS = re.compile(r"(?<![^.])(module|pretrained_model|_orig_mod|_fsdp_wrapped_module"
                      r"|_checkpoint_wrapped_module)\.")
LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.([^.]+))?\.weight")       # a checkpoint's have the adapter's name
# Tensors that change no answer: modules before training, rotary tables, what VeLoRA's backward pass needs.
UNUSED = re.compile(r"\.original_module\.|\.rotary_emb\.|\.lora_velora_embed")

# What an adapter may hold beside A and B: a part of the tensor's name, and what the tensor then is.
TRAINED = {"lora_magnitude_vector": "the magnitudes of DoRA", "bias": "trained biases",
           "embed_tokens": "trained embeddings", "lm_head": "a trained head"}

def plain_name(key: str) -> str:
    """A tensor's name without what PEFT and other wrappers put into it: the weight's name in the base, or the
    layer's path and .lora_A.weight."""
    name = WRAPPERS.sub("", key)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)", "", name).replace(".base_layer.", ".")

def weight_file(path: str | Path) -> Path:
    """The file with an adapter's weights. BadInput where there is none."""
    files = [Path(path) / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    there = [file for file in files if file.exists()]
    if not there:
        inside = "".join(f"; give the folder inside: {folder}" for folder in models_inside(Path(path))[:1])
        raise BadInput(f"{path}: has adapter_config.json, and neither adapter_model.safetensors nor "
                       f"adapter_model.bin{inside}")
    return there[0]

def sort_tensors(file: Path) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """The names in an adapter's file: {(layer's path, "A" or "B"): name}, and of all other tensors {name in
    the base: name}. BadInput where the file holds several adapters and none is called default."""
    adapters, others = {}, {}
    for key in tensor_names(file):
        name = plain_name(str(key))
        if lora := LORA.fullmatch(name):
            adapters.setdefault(lora[3], {})[lora[1], lora[2]] = key
        elif not UNUSED.search(name):
            others[name] = key
    if len(adapters) > 1 and "default" not in adapters:
        raise BadInput(f"{file}: holds several adapters ({', '.join(map(str, adapters))}); save the one that "
                       f"is meant with PEFT's save_pretrained")
    return adapters.get("default") or next(iter(adapters.values()), {}), others

def is_reward_adapter(path: str | Path) -> bool:
    """Whether an adapter folder is a reward model's: by its task_type, which may be missing, or by its score
    head."""
    is_named_so = read_adapter_config(path).get("task_type") == "SEQ_CLS"
    return is_named_so or "score.weight" in sort_tensors(weight_file(path))[1]

@dataclass
class Pair:
    """LoRA's two matrices for one layer, A (rank,in) and B (out,rank), and its alpha."""
    A: Tensor
    B: Tensor
    alpha: float

def read_adapter(path: str | Path, linears: list[str], weights: dict[str, Tensor]
                 ) -> tuple[dict, dict[str, Pair], Tensor | None]:
    """(config, {layer's path: its pair}, the score head where the model has one) of an adapter folder.
    linears: the paths of the layers that can have LoRA; weights: all weights of the model by name. BadInput
    where the files are damaged, belong to another base, or hold what would change the result."""
    config, file = read_adapter_config(path), weight_file(path)
    lora, others = sort_tensors(file)
    try:
        named = named_layers(config, linears)
        ranks = by_pattern(config.get("rank_pattern"), linears, config["r"])
        alphas = by_pattern(config.get("alpha_pattern"), linears, config["lora_alpha"])
    except (TypeError, ValueError) as error:
        raise BadInput(f"{Path(path) / 'adapter_config.json'}: {error}") from None
    check_layers(file, lora, named, linears)
    check_others(file, others, config, weights)

    def tensor(key, shape, asker):
        found = read_tensor(file, key)
        check_tensor(found, file, key, shape, asker)
        return found

    pairs = {}
    for layer in [layer for layer in linears if layer in named]:
        (rows, columns), rank = weights[f"{layer}.weight"].shape, ranks[layer]
        asker = f"rank {rank} on this base"
        pairs[layer] = Pair(tensor(lora[layer, "A"], (rank, columns), asker),
                            tensor(lora[layer, "B"], (rows, rank), asker), alphas[layer])
    has_score = "score.weight" in others
    if has_score != ("score.weight" in weights):       # scores of a random head would mean nothing
        raise BadInput(f"{file}: {PREFIX}score.weight, the score head of a reward model, is "
                       f"{'in it, and a language model is asked for' if has_score else 'missing'}")
    if not has_score:
        return config, pairs, None
    return config, pairs, tensor(others["score.weight"], weights["score.weight"].shape, "a reward model")

def check_layers(file: Path, lora: dict[tuple[str, str], str], named: set[str], linears: list[str]):
    """BadInput unless the file has A and B of all layers that the config names, and of no others. PEFT only
    warns where a layer's tensors are missing, and leaves that layer as it is in the base. Here it is an
    error: the file is damaged, or the base has more layers than the one that was trained."""
    if not lora:
        raise BadInput(f"{file}: holds no LoRA weights (lora_A, lora_B); the program that trained it saved "
                       f"none")
    for (layer, _), key in lora.items():
        if layer not in linears:
            raise BadInput(f"{file}: {key} is for no layer of the base that can have LoRA; {OTHER_BASE}")
        if layer not in named:
            raise BadInput(f"{file}: {key} is for a layer that adapter_config.json does not name; the two "
                           f"files are not of one adapter, copy both again")
    for layer, part in [(layer, part) for layer in sorted(named) for part in "AB"]:
        if (layer, part) not in lora:
            raise BadInput(f"{file}: {PREFIX}{layer}.lora_{part}.weight is missing, and adapter_config.json "
                           f"names its layer; {OTHER_BASE}")

def check_others(file: Path, others: dict[str, str], config: dict, weights: dict[str, Tensor]):
    """BadInput where a tensor beside A and B would change the result: one that is not equal to the base's
    own. PEFT saves the embeddings, trained or not, where the vocabulary was resized or its caller asks."""
    for module in config.get("modules_to_save") or []:
        if lost := [n for n in weights if matches(n.rpartition(".")[0], [module]) and n not in others]:
            raise BadInput(f"{file.parent / 'adapter_config.json'}: modules_to_save = "
                           f"{config['modules_to_save']} names {lost[0]}, which {file.name} lacks; that file "
                           f"is damaged, or belongs to another base")
    for name, key in others.items():
        if name.startswith("v_head."):
            note(f"{file}: holds a value head (v_head), which is left out")
        elif name != "score.weight":
            refuse_trained(file, key, read_tensor(file, key), weights.get(name))

def refuse_trained(file: Path, key: str, tensor: object, own: Tensor | None):
    """BadInput unless a tensor has the same numbers as the base's own weight, in that weight's dtype."""
    if is_bias_of_lora := ".lora_B." in key and isinstance(tensor, Tensor):
        own = torch.zeros_like(tensor)
    shape, own_shape = (tuple(getattr(x, "shape", ())) for x in (tensor, own))
    if own is not None and shape == own_shape and torch.equal(tensor.to(own), own):
        return
    if is_bias_of_lora:                      # PEFT merges it only where the base has biases
        raise BadInput(f"{file}: also holds biases of LoRA ({key}), which are not read; train it with "
                       f"lora_bias=False")
    what = next((words for part, words in TRAINED.items() if part in key), None)
    if what is None and own is None:
        raise BadInput(f"{file}: {key} is no weight of the base; {OTHER_BASE}")
    resized = f" {shape}, the base has {own_shape}" if own is not None and shape != own_shape else ""
    raise BadInput(f"{file}: also holds {what or 'a trained weight'} ({key}{resized}), which would change "
                   f"the result and is not read; {MERGE}")
