"""Where the time of a PPO step goes, by phase, and the time of a generated token, by kind of work.

The step is that of ppo_step.py, the token that of generate.py. Timers around calls measure it, because
PyTorch's profiler slows what it watches, large products most of all. The part of a PPO step that no timer
covers is counted with the forward passes: rewards, GAE, the log. Under ZeRO the backward pass also copies
the gradients. The roofline is the time of the matrix products at the machine's best rate; for a token it is
the time of reading the weights and the cache, where that takes longer. docs/speed.md has the results.

    python bench/where.py                     # a minute on two quiet cores; --lora for PPO with LoRA
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import generate
import ppo_step
import torch
import torch.nn.functional as F
from common import CPU, table, write_models
from ppo_step import NEW, B, P

import llama
import ppo
import runtime.speed
from lora import load_model
from runtime.log import Log

KINDS = ["layers", "head", "attention", "choice of a word", "the rest"]
PHASES = {"answers": "answers", "passes": "passes of the four networks over them",
          "forward": "update: forward passes, losses", "backward": "update: backward passes",
          "optimisers": "update: optimisers"}
spent = Counter()                            # {label: seconds} of the calls that are timed


def get_args():
    parser = argparse.ArgumentParser(
        description="Times the phases of a PPO step and the parts of a generated token.")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="PPO steps, the first of which is left out")
    return parser.parse_args()


def timed(owner, name, label):
    """From now on the seconds spent in owner.name are counted under this label."""
    function = getattr(owner, name)

    def wrapped(*args, **more):
        start = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            spent[label] += time.perf_counter() - start
    setattr(owner, name, wrapped)


def ppo_steps(folder, lora, steps):
    """[{phase: seconds}] of each step of ppo.py but the first, run in this process."""
    os.environ.update(CPU)
    import deepspeed
    timed(llama.Llama, "generate", "answers")
    timed(deepspeed.DeepSpeedEngine, "backward", "backward")
    timed(deepspeed.DeepSpeedEngine, "step", "optimisers")
    found, start, rollout, log_step = [], 0.0, ppo.rollout, Log.step

    def first_phase(*args):
        nonlocal start
        spent.clear()
        start = time.perf_counter()
        batch = rollout(*args)
        spent["passes"] = time.perf_counter() - start - spent["answers"]
        return batch

    def last_phase(*args, **metrics):
        log_step(*args, **metrics)
        found.append({**spent, "forward": time.perf_counter() - start - sum(spent.values())})

    ppo.rollout, Log.step = first_phase, last_phase
    sys.argv = ppo_step.words_of_ours(folder, lora, B, NEW, steps)
    ppo.main()
    return found[1:]


def token(base, batch):
    """{kind of work: milliseconds per step} of a generation, after one that warms up."""
    model, ids = load_model(base), torch.randint(3, 31_990, (batch, generate.P))
    for _ in range(2):
        steps = model.decode(ids, torch.ones_like(ids), generate.NEW + 1)
        next(steps)                          # the prompts
        spent.clear()
        start = time.perf_counter()
        for _ in steps:
            pass
        spent["the rest"] = time.perf_counter() - start - sum(spent.values())
    return {kind: spent[kind] * 1e3 / generate.NEW for kind in KINDS}


def main():
    args = get_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "models"
        write_models(folder, args.size)
        ppo_step.write_prompts(folder)
        steps = ppo_steps(folder, args.lora, args.steps)
        timed(F, "linear", "layers")
        timed(runtime.speed, "thin_product", "head")
        timed(F, "scaled_dot_product_attention", "attention")
        timed(llama, "sample", "choice of a word")
        tokens = {batch: token(folder / "base", batch) for batch in (1, 16, 64)}

    roofline = ppo_step.roofline(args.size, args.lora)
    rows = [(what, statistics.median(step[phase] for step in steps), roofline.get(phase, 0.0))
            for phase, what in PHASES.items()]
    rows.append(("all", statistics.median(sum(step.values()) for step in steps), sum(roofline.values())))
    kind = "LoRA" if args.lora else "full"
    table([f"PPO step, {args.size}, {kind}, {B} x ({P} + {NEW})", "s", "roofline"], rows)
    rows = []
    for batch, ms in tokens.items():
        _, step = generate.roofline(args.size, batch, generate.NEW, "cpu", torch.float32)
        rows.append((f"B = {batch}", *ms.values(), sum(ms.values()), 1e3 * step))
    table([f"generate, {args.size}: ms per step", *KINDS, "all", "roofline"], rows)


if __name__ == "__main__":
    main()
