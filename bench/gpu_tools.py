"""What the checks of gpu.py share: what a check is and what it finds, networks with random weights, folders
with everything but weights, and clocks that wait for the GPU."""
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from common import ROOT, write_tokenizer
from torch import Tensor, nn

import llama
import reward
from llama import Llama, LlamaConfig
from lora import add_lora, lora_layers, save_adapter
from runtime.ranks import cores
from runtime.tokenizer_write import copy_tokenizer

# What a launcher sets for its processes.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT"}


# ------------------------------------------------------------------------------------------------ checks
@dataclass
class Finding:
    """A figure of a check. ok is None where there is nothing to compare the figure with."""
    what: str
    measured: float | str
    unit: str = ""
    expected: str = ""
    ok: bool | None = None
    details: dict | None = None              # for the file alone


def at_most(what: str, measured: float, bound: float, unit: str = "") -> Finding:
    """A figure that must not exceed the bound. NaN fails."""
    return Finding(what, measured, unit, f"at most {bound:g}", bool(measured <= bound))


def within(what: str, measured: float, low: float, high: float, unit: str = "") -> Finding:
    """A figure that must lie between two bounds."""
    return Finding(what, measured, unit, f"{low:.3g} to {high:.3g}", bool(low <= measured <= high))


@dataclass
class Place:
    """Where a check runs. folder holds what the check "prepare" has made, and what the checks write. small:
    at toy size, with --cpu."""
    folder: Path
    device: torch.device
    small: bool


@dataclass(frozen=True)
class Check:
    """A check runs in a process of its own, for at most `limit` seconds. cpu: its process sees no GPU.
    needs: checks that must have run before."""
    name: str
    run: Callable[[Place], Iterator[Finding]]
    limit: float = 60.0
    cpu: bool = False
    needs: tuple[str, ...] = ("prepare",)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """The norm of the difference, as a share of the reference's norm, in float64."""
    x, reference = x.detach().double(), reference.detach().double().to(x.device)
    return float((x - reference).norm() / reference.norm())


def worst(numbers: Iterable[float]) -> float:
    """The largest number; NaN where there is one, which Python's max may overlook."""
    return max(numbers, key=lambda x: (math.isnan(x), x))


def check_machine(place: Place) -> Iterator[Finding]:
    """What the numbers were measured on, and what would spoil them."""
    import deepspeed
    import transformers
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}",
                f"deepspeed {deepspeed.__version__}", f"transformers {transformers.__version__}",
                f"Python {sys.version.split()[0]}", f"{cores()} cores"]
    yield Finding("versions", ", ".join(versions))
    if place.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        yield Finding("GPU", f"{name}, sm_{capability[0]}{capability[1]}, {total / 2**30:.1f} GiB")
        yield at_most("its memory that is in use, with this process", (total - free) / 2**30, 2, "GiB")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("bfloat16", "yes" if bf16 else "no", "", "yes", bf16)


MACHINE = Check("machine", check_machine, needs=())


# ------------------------------------------------------------------------------------------------ clocks
def synchronize(device: torch.device):
    """Waits until the GPU has done what it was given: Python does not wait by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The fewest seconds that work takes in some rounds, after one that warms up."""
    def once():
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(rounds))


# ------------------------------------------------------------------------------------------------ networks
@torch.no_grad()
def draw_weights(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu", optional: list[str] | tuple = ()) -> nn.Module:
    """Takes the place of runtime.folders.load_weights: it draws the weights on the device, the same ones each
    time, and reads no file. A 7B then is there in a second, and needs no 13 GB of disk."""
    module.to(dtype).to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    rng = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02, generator=rng)
    return module


def draw_instead_of_reading():
    """From now on, every network of this process has drawn weights."""
    llama.load_weights = reward.load_weights = draw_weights


def write_llama(folder: Path, config: LlamaConfig):
    """A Hugging Face folder of 32,000 words that has everything but the numbers: its only shard is empty."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        names = [name for name, _ in Llama(config).named_parameters()]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "empty.safetensors").touch()
    index = {"weight_map": dict.fromkeys(names, "empty.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    copy_tokenizer(folder, folder)


def write_adapter(folder: Path, base: Path, task: str, rank: int, targets: list[str]):
    """An adapter of the base with random numbers, of a language model (CAUSAL_LM) or a reward model
    (SEQ_CLS)."""
    config = LlamaConfig.from_pretrained(base)
    with torch.device("meta"):
        model = Llama(config)
        add_lora(model, rank, 16.0, targets)
    for _, layer in lora_layers(model):
        for matrices in (layer.lora_A, layer.lora_B):
            nn.init.normal_(matrices["default"].to_empty(device="cpu").weight, std=0.02)
    if task == "SEQ_CLS":
        model.score = nn.Linear(config.hidden_size, 1, bias=False)
    save_adapter(model, folder, "default", base, task)
    copy_tokenizer(base, folder)


def write_rows(file: Path, n: int, prompt: int, answer: int):
    """n preference pairs as JSON lines, each of about so many tokens. Every step of the recipe can use
    them."""
    rng = random.Random(0)

    def words(n):
        return " ".join(f"w{rng.randrange(31_000)}" for _ in range(n))

    rows = [{"prompt": words(prompt - 2), "chosen": words(answer - 2), "rejected": words(answer - 2)}
            for _ in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ trainers
def train(script: str, words: list):
    """Runs a trainer in this process, as `python script words` does, up to its last line."""
    os.chdir(ROOT)                           # the paths in toy/*.args begin there
    sys.argv = [f"{script}.py", *map(str, words)]
    import_module(script).main()


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
