"""Where the time goes: of a PPO step (as in ppo_step.py) by phase, and of a token (as in generate.py) by kind of work.

By timers around calls: PyTorch's profiler slows what it looks at, large products most of all. What no timer sees in a PPO
step is counted with the forward passes: rewards, GAE, the log. ZeRO copies gradients in the backward pass. The floor is
what the products would take at the machine's best rate, for a token also what reading the weights and the cache would.

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

import torch
import torch.nn.functional as F

from common import CPU, load_model, table, write_models
import generate
import llama
import ppo
import ppo_step
from runtime.log import Log
from ppo_step import B, NEW, P

spent = Counter()                            # seconds by name, of what is timed


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


def token(base, batch):
    """{kind of work: milliseconds per step}, after one generation that warms up."""
    model, ids = load_model(base), torch.randint(3, 31_990, (batch, generate.P))
    for _ in range(2):
        steps = model.decode(ids, torch.ones_like(ids), generate.NEW + 1)
        next(steps)                          # the prompts
        spent.clear()
        start = time.perf_counter()
        for _ in steps:
            pass
        spent["the rest"] = time.perf_counter() - start - sum(spent.values())
    return {label: seconds * 1e3 / generate.NEW for label, seconds in spent.items()}


def ppo_steps(folder, lora, steps):
    """[{phase: seconds}] of each step of ppo.py, run in this process, but the first."""
    os.environ.update(CPU)
    import deepspeed
    timed(llama.Llama, "generate", "answers")
    timed(deepspeed.DeepSpeedEngine, "backward", "backward")
    timed(deepspeed.DeepSpeedEngine, "step", "optimisers")
    found, rollout, log_step = [], ppo.rollout, Log.step

    def first_phase(*args):
        spent.clear()
        started.append(time.perf_counter())
        batch = rollout(*args)
        spent["passes"] = time.perf_counter() - started[-1] - spent["answers"]
        return batch

    def last_phase(*args, **metrics):
        log_step(*args, **metrics)
        found.append({**spent, "forward": time.perf_counter() - started[-1] - sum(spent.values())})

    started, ppo.rollout, Log.step = [], first_phase, last_phase
    sys.argv = ppo_step.words_of_ours(folder, lora, B, NEW, steps)
    ppo.main()
    return found[1:]


def main():
    parser = argparse.ArgumentParser(description="Times the phases of a PPO step and the parts of a generated token.")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="PPO steps, the first of which is left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "models"
        write_models(folder, args.size)
        ppo_step.write_prompts(folder)
        found = ppo_steps(folder, args.lora, args.steps)
        timed(F, "linear", "layers")
        timed(llama, "thin_product", "head")
        timed(F, "scaled_dot_product_attention", "attention")
        timed(llama, "sample", "choice of a word")
        tokens = {batch: token(folder / "base", batch) for batch in (1, 16, 64)}

    floors = ppo_step.floors(args.size, args.lora)
    phases = {"answers": "answers", "passes": "passes of the four networks over them",
              "forward": "update: forward passes, losses", "backward": "update: backward passes",
              "optimisers": "update: optimisers"}
    rows = [(what, statistics.median(step[phase] for step in found), floors.get(phase, 0.0))
            for phase, what in phases.items()]
    rows.append(("all", statistics.median(sum(step.values()) for step in found), sum(floors.values())))
    table([f"PPO step, {args.size}, {'LoRA' if args.lora else 'full'}, {B} x ({P} + {NEW})", "s", "its floor"], rows)
    kinds = ["layers", "head", "attention", "choice of a word", "the rest"]
    rows = [(f"B = {batch}", *(ms[kind] for kind in kinds), sum(ms.values()),
             1e3 * generate.floor(args.size, batch, generate.NEW, "cpu", torch.float32)[1]) for batch, ms in tokens.items()]
    table([f"generate, {args.size}: ms per step", *kinds, "all", "its floor"], rows)


if __name__ == "__main__":
    main()
