"""LoRA by hand: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685), many on one base.

1. add_lora puts two matrices, A (rank,in) and B (out,rank), beside each chosen Linear W (out,in); B is zero
2. use_adapter chooses a pair by name: y = W x + (alpha / rank) B A x; None chooses the base alone, y = W x
3. merge_lora adds (alpha / rank) B A to W, in float32
4. save_adapter and load_adapter read and write PEFT's own format

As W is frozen, one base can carry many adapters. That is how PPO's four roles (actor, reference, critic,
reward) share one LLaMA in memory: a role is the base with the adapter of its name switched on.

    python lora.py runs/sft --out runs/sft-merged      # an adapter folder to a full one
"""
import argparse
import json
import shutil
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llama import Linear, Llama, LlamaConfig
from runtime.adapters import PREFIX, is_reward_adapter, matches, read_adapter, read_adapter_config
from runtime.errors import BadInput, exit_with_one_line
from runtime.flags import Flags, number
from runtime.folders import load_weights
from runtime.foreign import what_instead
from runtime.tokenizer_read import choose_tokenizer, read_tokenizer
from runtime.tokenizer_write import copy_tokenizer, save_generation_config

def add_lora_flags(flags: Flags, dropout: bool = False):
    """Adds the flags of a new adapter. dropout: --lora-dropout is one of them."""
    add = flags.group("adapter")
    add("--lora-rank", type=number(0, kind=int), default=0, help="rank of a new adapter; 0 adds none")
    add("--lora-alpha", type=number(0), default=16.0, needs="--lora-rank",
        help="the adapter's output is scaled by alpha / rank")
    add("--lora-targets", type=lambda text: text.split(","), default="q_proj,k_proj", needs="--lora-rank",
        help="layers that get an adapter, by the ends of their names, with commas between; or all-linear")
    if dropout:
        add("--lora-dropout", type=number(0, 1), default=0.0, needs="--lora-rank",
            help="share of the adapter's inputs that is dropped in training")

class LoRALinear(nn.Linear):
    """A Linear with named adapters beside its weight. `active` is the name of the adapter in use, or None."""

    def __init__(self, linear: nn.Linear):
        """Takes over the weight and bias of an existing Linear; nothing is copied."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        # modules, not bare parameters: ZeRO-3 gathers weights when their module is called
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scale, self.dropout, self.active = {}, {}, None

    def reset_parameters(self):
        pass                                 # nn.Linear's constructor calls it, and the weight is not new

    def add(self, name: str, rank: int, scale: float, dropout: float = 0.0):
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False, **like)
        self.lora_B[name] = nn.Linear(rank, self.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B[name].weight)                   # a new adapter changes nothing
        self.scale[name], self.dropout[name] = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.active is None:
            return y
        x = F.dropout(x, self.dropout[self.active], self.training)
        return y + self.lora_B[self.active](self.lora_A[self.active](x) * self.scale[self.active])

# ------------------------------------------------------------ on a model
def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of every layer with adapters."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALinear)]

def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in a fixed order."""
    layers = [layer for _, layer in lora_layers(model) if name in layer.lora_A]
    return [matrix.weight for layer in layers for matrix in (layer.lora_A[name], layer.lora_B[name])]

def attach(model: nn.Module, path: str, name: str, rank: int, scale: float, dropout: float) -> LoRALinear:
    """Adds an adapter beside one Linear, and freezes all but adapters and a reward model's score head."""
    layer = model.get_submodule(path)
    if path == "lm_head" and model.config.tie_word_embeddings:
        raise BadInput("an adapter on lm_head: this model's head is its embedding, which has no place for "
                       "one")
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        model.set_submodule(path, layer)
    layer.add(name, rank, scale, dropout)
    for key, parameter in model.named_parameters():
        if ".lora_" not in key and not key.startswith("score."):
            parameter.requires_grad_(False)
    return layer

def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the layers that can get an adapter."""
    return [path for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in path and path != "score"]

def add_lora(model: nn.Module, rank: int, alpha: float, targets: list[str], dropout: float = 0.0,
             name: str = "default"):
    """Adds an adapter beside every Linear whose path ends in one of targets, freezes the other weights, and
    switches the adapter on. ["all-linear"] means every Linear but the head. BadInput where a target matches
    no layer: a misspelt one would be ignored silently."""
    linears = linear_paths(model)
    if targets == ["all-linear"]:
        targets = [path for path in linears if path != "lm_head"]
    for target in targets:
        if not any(matches(path, [target]) for path in linears):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise BadInput(f"--lora-targets: {target!r} matches no layer; there are {known}")
    for path in linears:
        if matches(path, targets):
            attach(model, path, name, rank, alpha / rank, dropout)
    use_adapter(model, name)

def trainable(model: nn.Module, args: Namespace) -> dict[str, nn.Parameter]:
    """The weights that sft.py and reward.py train, {name: parameter}: of a full folder all weights, or with
    --lora-rank a new adapter, which is added here; of an adapter folder its adapter. A reward model's score
    head is trained in all three cases."""
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

def refuse_second_adapter(args: Namespace, adapter: Path | None):
    """BadInput where --lora-rank asks for a new adapter and the model is an adapter folder already."""
    if args.lora_rank and adapter:
        raise BadInput(f"--lora-rank: {adapter} is an adapter already, which is trained further; leave the "
                       f"flag out")

def use_adapter(model: nn.Module, name: str | None):
    """Switches the model to the adapter of that name, or with None to the base alone. Never call it between a
    forward pass and its backward pass: gradient checkpointing computes layers again in the backward pass,
    would then use the other adapter, and the gradients would be wrong without an error."""
    layers = lora_layers(model)
    if name is not None and not any(name in layer.lora_A for _, layer in layers):
        raise ValueError(f"the model has no adapter {name!r}")
    for _, layer in layers:
        layer.active = name if name in layer.lora_A else None

@torch.no_grad()
def merge_lora(model: nn.Module, name: str) -> nn.Module:
    """Adds the adapter to the weights, and turns every LoRALinear back into a Linear."""
    for path, layer in lora_layers(model):
        if name in layer.lora_A:
            # in float32: in half precision small changes would be rounded away
            delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scale[name]
            layer.weight.copy_(layer.weight.float() + delta)
        plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(path, plain)
    return model

# ------------------------------------------------------------ PEFT's files
def save_adapter(model: nn.Module, path: str | Path, name: str, base: str | Path, task_type: str):
    """Writes an adapter of the base folder as PEFT does. task_type: CAUSAL_LM, or SEQ_CLS (reward model)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    layers = {layer_path: layer for layer_path, layer in lora_layers(model) if name in layer.lora_A}
    tensors = {f"{PREFIX}{layer_path}.{part}.weight": getattr(layer, part)[name].weight
               for layer_path, layer in layers.items() for part in ("lora_A", "lora_B")}
    if task_type == "SEQ_CLS":
        tensors[f"{PREFIX}score.weight"] = model.score.weight
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})

    # r and lora_alpha are those of the first layer, and the patterns name the layers that have others
    ranks = {layer_path: layer.lora_A[name].out_features for layer_path, layer in layers.items()}
    alphas = {layer_path: layer.scale[name] * ranks[layer_path] for layer_path, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    targets = sorted({layer_path.rpartition(".")[2] for layer_path in layers})
    if set(layers) != {linear for linear in linear_paths(model) if matches(linear, targets)}:
        targets = sorted(layers)             # the last names would match other layers too: write whole paths
    config = {"peft_type": "LORA", "task_type": task_type,
              "base_model_name_or_path": str(Path(base).resolve()), "r": rank, "lora_alpha": alpha,
              "rank_pattern": {layer_path: r for layer_path, r in ranks.items() if r != rank},
              "alpha_pattern": {layer_path: a for layer_path, a in alphas.items() if a != alpha},
              "target_modules": targets,
              "lora_dropout": max(layer.dropout[name] for layer in layers.values()), "bias": "none",
              "modules_to_save": ["score"] if task_type == "SEQ_CLS" else None, "inference_mode": True}
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path, name: str):
    """Attaches the adapter of a PEFT folder under this name, and does not switch it on. A reward model gets
    the adapter's score head too. BadInput where the files are damaged, belong to another base, or hold what
    would change the result."""
    weights = dict(model.named_parameters(remove_duplicate=False))       # with a tied head, too
    config, pairs, score = read_adapter(path, linear_paths(model), weights)
    for layer_path, pair in pairs.items():
        rank, alpha = len(pair.A), pair.alpha
        scale = alpha / rank ** 0.5 if config.get("use_rslora") else alpha / rank
        layer = attach(model, layer_path, name, rank, scale, config.get("lora_dropout") or 0.0)
        layer.lora_A[name].weight.copy_(pair.A)
        layer.lora_B[name].weight.copy_(pair.B)
    if score is not None:
        model.score.weight.copy_(score)

# ------------------------------------------------------------ any folder
def resolve(path: str | Path, base: str | Path | None = None,
            flag: str = "--base") -> tuple[Path, Path | None]:
    """(the full folder, the adapter folder or None) that a path stands for. The base of an adapter folder is
    `base`, the value of flag, where it is given, else the folder that the adapter's config names, as it
    stands or relative to the adapter's folder. BadInput where a folder is missing, or where `base` is given
    for a full folder."""
    path = Path(path)
    if not (path / "adapter_config.json").exists():
        if not (path / "config.json").exists():
            raise BadInput(what_instead(path))
        if base:
            raise BadInput(f"{flag} {base}: {path} is a full folder, which has no base; leave the flag out")
        return path.resolve(), None
    named = str(base or read_adapter_config(path).get("base_model_name_or_path") or "")
    for candidate in (Path(named), path / named):
        with suppress(OSError, ValueError):                        # the text cannot be a file's name
            if named and (candidate / "config.json").exists():
                return candidate.resolve(), path
    why = what_instead(Path(named)) if named else "adapter_config.json names none"
    raise BadInput(f"{path}: its base model cannot be read ({why}); name its folder with {flag}")

def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
               base: str | Path | None = None) -> Llama:
    """A Llama from any folder: a full one, or an adapter's, whose base is read and whose adapter is attached
    as "default" and in use."""
    full, adapter = resolve(path, base)
    if adapter is not None and is_reward_adapter(adapter):
        raise BadInput(f"{path}: is a reward model's adapter, not a language model's")
    model = Llama.from_pretrained(full, dtype, device)
    if adapter is not None:
        load_adapter(model, adapter, "default")
        use_adapter(model, "default")
    return model

def save_model(model: nn.Module, out: str | Path, tokenizer_folder: str | Path, base: str | Path,
               adapter: str | None = None):
    """Writes a folder that transformers or PEFT loads: the whole model, or only the adapter of this name, for
    the base folder; the tokenizer's files; and for a language model generation_config.json."""
    is_reward_model = hasattr(model, "score")
    files = copy_tokenizer(tokenizer_folder, out, base)
    model.config.pad_token_id = files.pad_id
    if adapter:
        save_adapter(model, out, adapter, base, "SEQ_CLS" if is_reward_model else "CAUSAL_LM")
    else:
        model.save_pretrained(out)
    if not is_reward_model:
        ids = [model.config.eos_token_id, *files.eos_ids[1:]]
        save_generation_config(out, model.config.bos_token_id, ids)

# ------------------------------------------------------------ python lora.py
def read_merged(full: Path, adapter: Path) -> Llama:
    """The model of a full folder with the adapter merged in."""
    if is_reward_adapter(adapter):           # reward.py: a score head instead of the vocabulary head
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_pretrained(full))
            model.lm_head, model.score = None, Linear(model.config.hidden_size, 1, bias=False)
        model.architecture = "LlamaForSequenceClassification"
        load_weights(model, full, optional=["score.weight"])       # the adapter brings the score head
    else:
        model = Llama.from_pretrained(full)
    load_adapter(model, adapter, "default")
    return merge_lora(model, "default")

def main():
    parser = argparse.ArgumentParser(description="Merge an adapter into a full folder, in float32.")
    parser.add_argument("adapter", help="the folder with adapter_config.json")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--base", help="base model of the adapter, if not where its config says")
    args = parser.parse_args()
    full, adapter = resolve(args.adapter, args.base)
    if adapter is None:
        raise BadInput(f"{args.adapter}: has no adapter_config.json; there is nothing to merge")
    if Path(args.out).resolve() in (full, adapter.resolve()):
        raise BadInput(f"--out {args.out}: is a folder that is read; choose another")
    tokenizer_folder, model = choose_tokenizer(full, adapter), read_merged(full, adapter)
    files = read_tokenizer(tokenizer_folder, full)
    model.config.bos_token_id, model.config.eos_token_id = files.bos_id, files.eos_ids[0]
    save_model(model, args.out, tokenizer_folder, full)
    if (adapter / "reward_stats.json").exists():
        shutil.copy(adapter / "reward_stats.json", args.out)
    print(f"merged {adapter} and {full} into {args.out}")

if __name__ == "__main__":
    exit_with_one_line(main)
