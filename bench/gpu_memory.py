"""Part b of gpu.py: what a run really takes on a GPU, beside what bench/memory.py computes.

A LLaMA-7B with LoRA goes through sft.py, reward.py and ppo.py by the commands of docs/clusters.md for one
card of 24 GB. A larger card is made to behave like one: PyTorch may take no more, and says that no more is
free. Then a 1.1B is trained in full. The weights are random, and drawn on the GPU instead of read; all else
is the trainers' own code. On a CPU the networks are small, and the bytes of live tensors are counted.
"""
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path

import memory
import torch
from gpu_tools import (
    MACHINE,
    ROOT,
    Check,
    Finding,
    Place,
    at_most,
    draw_instead_of_reading,
    train,
    within,
    write_adapter,
    write_llama,
    write_rows,
)
from live_bytes import LiveBytes

import ppo
from llama import Llama, LlamaConfig

CARD = 24e9                                  # bytes
GB = 1e9
# The share of what is computed that is measured. What is computed must not be too little. For generation it
# is the room that ppo.py leaves for answers, of which rows that end together need less.
CLOSE, CLOSE_IN = (0.85, 1.05), {"generating": (0.6, 1.05)}


# ------------------------------------------------------------------------------------------------ measuring
class Peaks:
    """The most bytes that tensors take in each phase of a run: inside a call of the functions that are
    named, and outside of them. reserved: the most that PyTorch has taken from a GPU."""

    def __init__(self, device: torch.device):
        self.live = LiveBytes() if device.type == "cpu" else None
        self.most, self.stack, self.reserved = {}, ["the rest"], 0

    def end(self):
        """Notes the peak since the last call, and starts anew."""
        if self.live:
            peak, self.live.peak = self.live.peak, self.live.now
        else:
            peak = torch.cuda.max_memory_allocated()
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()                   # of both
        self.most[self.stack[-1]] = max(peak, self.most.get(self.stack[-1], 0))

    def inside(self, owner: object, name: str, phase: str):
        """From now on, a call of owner.name is of this phase."""
        function = getattr(owner, name)

        @wraps(function)
        def in_phase(*inputs, **named):
            self.end()
            self.stack.append(phase)
            try:
                return function(*inputs, **named)
            finally:
                self.end()
                self.stack.pop()

        setattr(owner, name, in_phase)


def behave_like_a_card_of(n_bytes: float):
    """Lets PyTorch take what such a card has beside the CUDA context, and say that no more is free."""
    room = int(n_bytes - memory.CONTEXT)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    torch.cuda.mem_get_info = lambda device=None: (room - torch.cuda.memory_reserved(), int(n_bytes))


# ------------------------------------------------------------------------------------------------ the runs
SECTION = "### LLaMA-7B with LoRA on one card of 24 GB"
PATHS = {"--model", "--actor", "--reward", "--data", "--out"}


def documented(step: str) -> list[str]:
    """The flags of a command in that section of docs/clusters.md, but for those of paths."""
    section = (ROOT / "docs" / "clusters.md").read_text().partition(SECTION)[2].partition("\n#")[0]
    line = next(line for line in section.splitlines() if f" {step}.py " in line)
    words, flags = iter(shlex.split(line.partition(f" {step}.py ")[2], comments=True)), []
    for word in words:
        if word in PATHS:
            next(words)
        else:
            flags.append(word)
    return flags


@dataclass(frozen=True)
class Job:
    """A run of a trainer. words: its flags, but for paths; those of docs/clusters.md where there are none.
    card: bytes, or None for the whole GPU."""
    name: str
    step: str
    size: str
    words: str | None = None
    card: float | None = None

    def flags(self, small: bool) -> list[str]:
        words = documented(self.step) if self.words is None else self.words.split()
        return words + (["--eval-prompts", "8"] if self.step == "ppo" else []) + (
            SMALL_WORDS[self.step].split() if small else [])

    def command(self, folder: Path, small: bool) -> list:
        """The whole command line, with few steps and few held-out rows."""
        models = ["--model", folder / self.size]
        if self.step == "ppo":
            models = ["--actor", folder / "actor-lora", "--reward", folder / "reward-lora",
                      "--reward-norm", "none"]
        rows, held_out = (folder / f"{self.step}-{part}.jsonl" for part in ("rows", "held-out"))
        return [*self.flags(small), *models, "--data", rows, "--eval-data", held_out, "--split", "none",
                "--out", folder / self.name, "--steps", 1 if self.step == "ppo" else 2]


JOBS = [*[Job(f"{step}-lora-24GB", step, "7B", card=CARD) for step in ("sft", "reward", "ppo")],
        Job("sft-full-zero2", "sft", "1B", ""), Job("sft-full-offload", "sft", "1B", "--offload"),
        Job("sft-full-zero3", "sft", "1B", "--zero-stage 3 --checkpointing")]
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {"7B": LlamaConfig(**SHAPE), "1B": LlamaConfig(**SHAPE, num_key_value_heads=2)}
SMALL_WORDS = {"sft": "--dtype bf16 --max-len 48 --batch 8 --micro-batch 4",
               "reward": "--dtype bf16 --max-len 48 --batch 8 --micro-batch 4",
               "ppo": "--dtype bf16 --max-prompt 24 --max-new 24 --rollout-batch 16 --mini-batch 16 "
                      "--micro-batch 16"}


def check_prepare(place: Place) -> Iterator[Finding]:
    """Writes folders that have everything but weights, adapters, and rows of full length. In those of SFT
    nearly all is answer, as the calculator assumes: each of its tokens has logits."""
    shapes = SMALL if place.small else memory.MODELS
    for size in ("7B", "1B"):
        write_llama(place.folder / size, shapes[size])
    for role, task in (("actor", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        write_adapter(place.folder / f"{role}-lora", place.folder / "7B", task, 8, ["q_proj", "k_proj"])
    half = 24 if place.small else 256
    for step, prompt, answer in (("sft", 4, 2 * half), ("reward", half, half), ("ppo", half, half)):
        for name, n in (("rows", 256), ("held-out", 8)):
            write_rows(place.folder / f"{step}-{name}.jsonl", n, prompt, answer)
    yield Finding("folders", ", ".join(sorted(path.name for path in place.folder.iterdir() if path.is_dir())))


def measured(job: Job, place: Place) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the job. The peak of each phase, and with a GPU what PyTorch took from it and what is taken
    besides, in bytes."""
    peaks, free_memory, script = Peaks(place.device), torch.cuda.mem_get_info, import_module(job.step)
    setup = script.setup

    def setup_and_limit(args):               # only now, because setup tells PyTorch how to allocate
        ranks = setup(args)
        if job.card and place.device.type == "cuda":
            behave_like_a_card_of(job.card)
        return ranks

    script.setup = setup_and_limit
    draw_instead_of_reading()
    Llama.save_pretrained = lambda model, path: None     # its bytes would go to the disk, not to the GPU
    for owner, name, phase in ((Llama, "generate", "generating"), (ppo, "rollout", "scoring"),
                               (ppo, "update_actor", "actor"), (ppo, "update_critic", "critic")):
        peaks.inside(owner, name, phase)
    with peaks.live or nullcontext():
        train(job.step, job.command(place.folder, place.small))
    peaks.end()
    if peaks.live:
        return peaks.most, {}
    free, total = free_memory()
    besides = total - free - torch.cuda.memory_reserved()          # if nobody else uses the GPU
    return peaks.most, {"reserved": peaks.reserved, "besides": besides}


PHASES = ("generating", "scoring", "actor", "critic")


def computed(job: Job, place: Place) -> dict[str, float]:
    """{phase: bytes of tensors} as bench/memory.py computes them, without the CUDA context."""
    words = job.flags(place.small)
    if job.step == "ppo":                    # there --lora-rank stands for adapters of any origin
        words += ["--lora-rank", "8"]
    run = memory.make_job(job.step, str(place.folder / job.size), words, card=room(job, place) / GB,
                          on_gpu=not place.small)
    found = {}
    for name, parts in memory.phases(run).items():
        phase = name.partition(":")[0]
        phase = phase if phase in PHASES else "the rest"
        found[phase] = max(found.get(phase, 0), sum(parts.values()) - parts.get("CUDA and NCCL", 0))
    if place.small:                          # there --offload moves nothing
        found["the rest"] += memory.ram(run)
    return found


def room(job: Job, place: Place) -> float:
    """Bytes of the card that the job runs on, or behaves as if it ran on."""
    return job.card or (80 * GB if place.small else torch.cuda.get_device_properties(0).total_memory)


def check_job(job: Job, place: Place) -> Iterator[Finding]:
    found, taken = measured(job, place)
    expected = computed(job, place)
    for phase in found:
        low, high = (share * expected[phase] / GB for share in CLOSE_IN.get(phase, CLOSE))
        yield within(f"tensors at the peak, {phase}", found[phase] / GB, low, high, "GB")
    if taken:
        yield at_most("taken by PyTorch, with pieces that are free", taken["reserved"] / GB,
                      (room(job, place) - memory.CONTEXT) / GB, "GB")
        yield at_most("taken by CUDA and NCCL besides", taken["besides"] / GB, memory.CONTEXT / GB, "GB")


PREPARE = Check("prepare", check_prepare, cpu=True)
GROUPS = [[MACHINE, PREPARE], *[[Check(job.name, partial(check_job, job), 90)] for job in JOBS]]
