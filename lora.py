"""LoRA by hand: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685), many on one base.

1. add_lora puts beside each chosen Linear W (out,in) two small matrices A (rank,in) and B (out,rank), B zero
2. use_adapter chooses by name which pair counts: y = W x + (alpha / rank) B A x; with None, the base alone
3. merge_lora adds (alpha / rank) B A to W, in float32
4. save_adapter and load_adapter read and write PEFT's own format

As W is frozen, one base can carry many adapters. That is how PPO's four roles (actor, reference, critic, reward)
share one LLaMA in memory: a role is the base with the adapter of its name switched on.

    python lora.py runs/sft --out runs/sft-merged      # an adapter folder to a full one
"""
import argparse
import json
import math
import operator
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from llama import BadInput, Linear, Llama, LlamaConfig
from runtime.engine import gathered
from runtime.folders import copy_tokenizer, load_weights, read_json, read_tensor, save_weights, writing
from runtime.ranks import fail_together, say

class LoRALinear(nn.Linear):
    """A Linear whose weight is another's, with named adapters beside it; `active` is the one in use, or None."""
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        # modules, not bare parameters: ZeRO-3 gathers weights when their module is called
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scale, self.dropout, self.active = {}, {}, None

    def reset_parameters(self):
        pass                                                       # the weight is the other's

    def add(self, name, rank, scale, dropout=0.0):
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False, **like)
        self.lora_B[name] = nn.Linear(rank, self.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B[name].weight)                   # the adapter starts as no change
        self.scale[name], self.dropout[name] = scale, dropout

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.active is None:
            return y
        x = F.dropout(x, self.dropout[self.active], self.training)
        return y + self.lora_B[self.active](self.lora_A[self.active](x) * self.scale[self.active])

# ------------------------------------------------------------------------------------------------ on a model
def lora_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]

def adapter_parameters(model, name):
    """The parameters of one adapter, in a fixed order."""
    return [p for _, layer in lora_layers(model) if name in layer.lora_A
            for p in (layer.lora_A[name].weight, layer.lora_B[name].weight)]

def attach(model, path, name, rank, scale, dropout):
    """Adds an adapter beside one Linear, and freezes all but adapters and a reward model's score head."""
    layer = model.get_submodule(path)
    if path == "lm_head" and model.config.tie_word_embeddings:
        raise BadInput("an adapter on lm_head: this model's head is its embedding, which has no place for one")
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        model.set_submodule(path, layer)
    layer.add(name, rank, scale, dropout)
    for p, parameter in model.named_parameters():
        if ".lora_" not in p and not p.startswith("score."):
            parameter.requires_grad_(False)
    return layer

def linear_paths(model):
    """Paths of the layers that an adapter can stand beside."""
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in p and p != "score"]

def matches(path, targets):
    """PEFT's rule: a list names the ends of module paths, a string is a regular expression for the whole path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith("." + target) for target in targets)

def add_lora(model, rank, alpha, targets, dropout=0.0, name="default"):
    """Adds an adapter beside every Linear whose path ends in one of targets, freezes the rest, switches it on.
    BadInput where one of the targets matches no layer: nothing would be trained there, silently."""
    linears = linear_paths(model)
    for target in targets:
        if not any(matches(path, [target]) for path in linears):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise BadInput(f"--lora-targets: {target!r} matches no layer; there are {known}")
    for path in linears:
        if matches(path, targets):
            attach(model, path, name, rank, alpha / rank, dropout)
    use_adapter(model, name)

def use_adapter(model, name):
    """Switches the model to the adapter of that name, or with None to the base alone. Never between a forward pass
    and its backward: gradient checkpointing recomputes under whatever is active then, silently wrong."""
    layers = lora_layers(model)
    if name is not None and not any(name in layer.lora_A for _, layer in layers):
        raise ValueError(f"the model has no adapter {name!r}")
    for _, layer in layers:
        layer.active = name if name in layer.lora_A else None

@torch.no_grad()
def merge_lora(model, name):
    """Adds the adapter to the weights, and turns every LoRALinear back into a Linear."""
    for path, layer in lora_layers(model):
        if name in layer.lora_A:
            # in float32: in half precision small changes would vanish
            delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scale[name]
            layer.weight.copy_(layer.weight.float() + delta)
        plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(path, plain)
    return model

# ------------------------------------------------------------------------------------------------ PEFT's files
PREFIX = "base_model.model."
# keys of adapter_config.json that change nothing here or that load_adapter honours; any other is an error if set
KNOWN = """peft_type task_type base_model_name_or_path revision inference_mode r lora_alpha lora_dropout bias
    target_modules rank_pattern alpha_pattern use_rslora modules_to_save init_lora_weights auto_mapping
    peft_version megatron_core qalora_group_size""".split()

def save_adapter(model, path, name, base, task_type):
    """Writes a folder as PEFT does, for a base folder; task_type is CAUSAL_LM or, with the score head, SEQ_CLS."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    layers = {p: layer for p, layer in lora_layers(model) if name in layer.lora_A}
    tensors = {f"{PREFIX}{p}.{part}.weight": getattr(layer, part)[name].weight
               for p, layer in layers.items() for part in ("lora_A", "lora_B")}
    if task_type == "SEQ_CLS":
        tensors[f"{PREFIX}score.weight"] = model.score.weight
    ranks = {p: layer.lora_A[name].out_features for p, layer in layers.items()}
    alphas = {p: layer.scale[name] * ranks[p] for p, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    targets = sorted({p.rpartition(".")[2] for p in layers})
    if set(layers) != {p for p in linear_paths(model) if matches(p, targets)}:
        targets = sorted(layers)                                   # only some layers of a kind: name each
    config = {"peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": str(Path(base).resolve()),
              "r": rank, "lora_alpha": alpha, "rank_pattern": {p: r for p, r in ranks.items() if r != rank},
              "alpha_pattern": {p: a for p, a in alphas.items() if a != alpha}, "target_modules": targets,
              "lora_dropout": max(layer.dropout[name] for layer in layers.values()), "bias": "none",
              "modules_to_save": ["score"] if task_type == "SEQ_CLS" else None, "inference_mode": True}
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

def read_adapter_config(path):
    """adapter_config.json; BadInput where it asks for what would change the result here, or makes no sense."""
    where = Path(path) / "adapter_config.json"
    config = {"peft_type": None, **read_json(where)}
    allowed = {"peft_type": ["LORA"], "bias": ["none", None],      # pissa, olora and others change the base itself
               "init_lora_weights": [True, False, None, "gaussian"]}
    for key, value in config.items():
        unknown = key not in KNOWN and value is not False and value not in (None, {}, [], "")
        elsewhere = key == "modules_to_save" and value and (
            not isinstance(value, list) or set(map(str, value)) - {"score", "classifier"})
        if unknown or elsewhere or value not in allowed.get(key, [value]):
            raise BadInput(f"{where}: {key} = {value!r} is not supported; it would change the result")
    try:
        targets = config.get("target_modules") or []
        ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
        for pattern in [*ranks, *alphas, *([targets] if isinstance(targets, str) else targets)]:
            re.compile(pattern)
            if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
                raise ValueError(f"the pattern {pattern!r} repeats so much that it could take forever")
        numbers = [config["lora_alpha"], config.get("lora_dropout") or 0, *ranks.values(), *alphas.values()]
        if not math.isfinite(sum(numbers)) or min(map(operator.index, [config["r"], *ranks.values()])) < 1 or not targets:
            raise ValueError(f"r {config['r']}, target_modules {targets}")
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"{where}: is not a LoRA config that makes sense ({why})") from None
    return config

def by_pattern(patterns, path, default):
    """PEFT's rank_pattern and alpha_pattern: the first key that the end of the path matches."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)

@torch.no_grad()
def load_adapter(model, path, name):
    """Attaches a PEFT folder's adapter under this name, not yet in use; a reward model takes its score too."""
    config, linears = read_adapter_config(path), linear_paths(model)
    file = Path(path) / "adapter_model.safetensors"
    file = file.with_suffix(".bin") if file.with_suffix(".bin").exists() and not file.exists() else file
    everything = config["target_modules"] == "all-linear"          # PEFT leaves the head out of it
    wanted = [p for p in linears if (p != "lm_head" if everything else matches(p, config["target_modules"]))]
    keys = {f"{PREFIX}{p}.{part}.weight" for p in wanted for part in ("lora_A", "lora_B")}
    if hasattr(model, "score"):              # without its head, a reward model's scores would be noise
        keys.add(f"{PREFIX}score.weight")
    found = {key.replace(".modules_to_save.", "."): key for key in read_tensor(file)}
    odd = sorted(key for key in keys ^ set(found) if key in keys or not key.startswith(f"{PREFIX}score."))
    if odd:
        what = "missing" if odd[0] in keys else "no layer of the base that is named"
        raise BadInput(f"{file}: {odd[0]} is {what}; the file is damaged, or belongs to another base")
    tensors = {key: read_tensor(file, found[key]) for key in keys}
    for p in wanted:
        a, b = (tensors[f"{PREFIX}{p}.{part}.weight"] for part in ("lora_A", "lora_B"))
        linear, rank = model.get_submodule(p), by_pattern(config.get("rank_pattern"), p, config["r"])
        if a.shape != (rank, linear.in_features) or b.shape != (linear.out_features, rank):
            raise BadInput(f"{file}: {p} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected rank {rank} for "
                           f"a weight of {linear.out_features} x {linear.in_features}")
        alpha = by_pattern(config.get("alpha_pattern"), p, config["lora_alpha"])
        scale = alpha / rank ** 0.5 if config.get("use_rslora") else alpha / rank
        layer = attach(model, p, name, rank, scale, config.get("lora_dropout") or 0.0)
        layer.lora_A[name].weight.copy_(a)
        layer.lora_B[name].weight.copy_(b)
    if hasattr(model, "score"):
        model.score.weight.copy_(tensors[f"{PREFIX}score.weight"])

def resolve(path, base=None):
    """(the full folder, the adapter folder or None) that a path stands for. An adapter's base is looked for where
    its config says, then relative to the adapter's folder; base overrides. BadInput where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: there is no such folder")
    if not (path / "adapter_config.json").exists():
        return path.resolve(), None
    named = str(base or read_adapter_config(path).get("base_model_name_or_path") or "")
    for candidate in (Path(named), path / named):
        with suppress(OSError, ValueError):  # a name that is none
            if named and (candidate / "config.json").exists():
                return candidate.resolve(), path
    raise BadInput(f"{path}: its base model {named!r} is not there; name its folder with --base")

def load_model(path, dtype=torch.float32, device="cpu", base=None):
    """A Llama from any folder: a full one, or an adapter's with its base, attached as "default" and in use."""
    full, adapter = resolve(path, base)
    model = Llama.from_pretrained(full, dtype, device)
    if adapter is not None:
        if read_adapter_config(adapter).get("task_type") == "SEQ_CLS":
            raise BadInput(f"{path}: is a reward model's adapter, not a language model's")
        load_adapter(model, adapter, "default")
        use_adapter(model, "default")
    return model

def save(model, out, rank, tokenizer_folder, adapter, base, average=()):
    """Writes the model, or only the adapter of this name, and its tokenizer, as transformers or PEFT load them.
    average: pairs (parameter, its moving average), which takes the parameter's place for good."""
    needed = sum(p.nbytes for p in model.parameters() if p.requires_grad or not adapter)
    with gathered(model.parameters()), fail_together(), writing(out, needed):
        for parameter, mean in average:
            parameter.data.copy_(mean)
        if rank == 0:
            task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
            if adapter:
                save_adapter(model, out, adapter, base, task)
            else:
                model.save_pretrained(out)
            copy_tokenizer(tokenizer_folder, out)
            if task == "CAUSAL_LM":
                ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
                (Path(out) / "generation_config.json").write_text(json.dumps(ids) + "\n")
    say(f"wrote {out}")

def main():
    parser = argparse.ArgumentParser(description="Merge an adapter into a full Hugging Face folder, in float32.")
    parser.add_argument("adapter", help="the folder with adapter_config.json")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--base", help="the base model's folder, where it is not where the adapter's config says")
    args = parser.parse_args()
    full, adapter = resolve(args.adapter, args.base)
    if adapter is None:
        raise BadInput(f"{args.adapter}: has no adapter_config.json; there is nothing to merge")
    if Path(args.out).resolve() in (full, adapter.resolve()):
        raise BadInput(f"--out {args.out}: is a folder that is read; choose another")
    if read_adapter_config(adapter).get("task_type") == "SEQ_CLS":  # a reward model: the score in the head's place
        architecture = "LlamaForSequenceClassification"
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_pretrained(full))
            model.lm_head, model.score = None, Linear(model.config.hidden_size, 1, bias=False)
        load_weights(model, full, optional=["score.weight"])
    else:
        architecture, model = "LlamaForCausalLM", Llama.from_pretrained(full)
    load_adapter(model, adapter, "default")
    save_weights(merge_lora(model, "default"), args.out, model.config.to_dict(architecture))
    copy_tokenizer(adapter if (adapter / "tokenizer.model").exists() else full, args.out)
    for name in ("generation_config.json", "reward_stats.json"):
        if (adapter / name).exists():
            shutil.copy(adapter / name, args.out)
    print(f"merged {adapter} and {full} into {args.out}")

if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
