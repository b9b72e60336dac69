"""Is the demo's result luck? This runs the whole recipe once per seed, each time in another world.

    python -m toy.seeds 1 2 3 4 5        # trains all weights; prints one line of a table per seed
    python -m toy.seeds --lora 1 2 3     # trains adapters: one base in memory plays all four roles of PPO
"""
import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path

import toy
from runtime.errors import BadInput, exit_with_one_line

ADAPTER = ("--lora-rank 64 --lora-alpha 64 "
           "--lora-targets all-linear")
LORA = {"sft": f"{ADAPTER} --lr 1e-3",
        "reward": f"{ADAPTER} --lr 1e-3 --weight-decay 0 --epochs 10",       # slow, for embeddings are frozen
        "ppo": f"{ADAPTER} --actor-lr 1e-3"}
RUNS = Path("runs/seeds")
HEADER = ("seed", "weights", "SFT gold", "reward accuracy", "RLHF gold", "KL, nats")

def command(script: str, seed: int, runs: Path, **flags) -> list[str]:
    """The words that start a script with the toy's flags and these. It writes to runs/SCRIPT."""
    with socket.socket() as free:            # a port of its own, so that two of these run side by side
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = ["deepspeed", "--quiet", "--master_port", str(port), f"{script}.py", f"@toy/{script}.args",
             "--seed", str(seed), "--out", str(runs / script)]
    return words + [x for name, value in flags.items() for x in (f"--{name}", str(value))]

def step(script: str, seed: int, runs: Path, **flags) -> list[dict]:
    """Runs a script with the toy's flags and these, and returns the lines of its metrics.jsonl. The output
    goes to runs/SCRIPT.log. BadInput where the script fails."""
    words = command(script, seed, runs, **flags)
    words += LORA[script].split() if runs.name == "lora" else []
    with open(runs / f"{script}.log", "w") as log:
        status = subprocess.run(words, stdout=log, stderr=log)
    if status.returncode:
        raise BadInput(f"{' '.join(words)}: failed, see {log.name}")
    return [json.loads(line) for line in (runs / script / "metrics.jsonl").read_text().splitlines()]

def recipe(seed: int, lora: bool) -> tuple[float, float, float, float]:
    """On held-out questions: gold after SFT, accuracy of the reward model, gold after PPO, and KL."""
    world = RUNS / str(seed)
    runs = world / ("lora" if lora else "full")
    runs.mkdir(parents=True, exist_ok=True)
    made = world / "made"
    toy.make(seed, made)

    def files(name):
        return {"data": made / f"{name}.jsonl", "eval-data": made / f"{name}-held-out.jsonl"}

    step("sft", seed, runs, model=made / "base", **files("demonstrations"))
    learned = runs / "sft"
    if lora:                                 # merged, to be the one base of all later adapters
        learned = runs / "merged"
        subprocess.run([sys.executable, "lora.py", runs / "sft", "--out", learned], check=True,
                       stdout=subprocess.DEVNULL)
    pairs = step("reward", seed, runs, model=learned, **files("preferences"))
    answers = step("ppo", seed, runs, actor=learned, reward=runs / "reward", **files("prompts"))
    accuracy = [line["accuracy"] for line in pairs if "accuracy" in line]
    measured = [line for line in answers if "gold" in line]
    return measured[0]["gold"], accuracy[-1], measured[-1]["gold"], measured[-1]["eval_kl"]

def main():
    parser = argparse.ArgumentParser(prog="python -m toy.seeds", description="The recipe for several seeds.")
    parser.add_argument("seeds", nargs="+", type=int, help="a line of the table for each")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    args = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for seed in args.seeds:
        cells = [str(seed), "LoRA" if args.lora else "all", *(f"{x:.3f}" for x in recipe(seed, args.lora))]
        print(f"| {' | '.join(cells)} |", flush=True)

if __name__ == "__main__":
    exit_with_one_line(main)
