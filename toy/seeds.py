"""Is the demo's result luck? The whole recipe once per seed: its own world, base model, SFT, reward model and PPO.

    python -m toy.seeds 1 2 3 4 5        # all weights; prints a line of the README's table per seed
    python -m toy.seeds --lora 1 2 3     # the same with adapters: one base in memory plays all four roles
"""
import json
import socket
import subprocess
import sys
from pathlib import Path

import toy
from llama import BadInput

ADAPTER = "--lora-rank 64 --lora-alpha 64 --lora-targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
LORA = {"sft": f"{ADAPTER} --lr 1e-3", "ppo": f"{ADAPTER} --actor-lr 1e-3",
        "reward": f"{ADAPTER} --lr 1e-3 --weight-decay 0 --epochs 10"}       # the frozen embeddings make it slow
RUNS = Path("runs/seeds")
HEADER = ("seed", "weights", "SFT gold", "reward accuracy", "RLHF gold", "KL, nats")


def step(script, seed, runs, **flags):
    """Runs one script with the toy's flags and these; its output goes to a log beside its folder."""
    with socket.socket() as free:            # a port of its own, so that two of these run side by side
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = ["deepspeed", "--master_port", str(port), f"{script}.py", f"@toy/{script}.args", "--seed", str(seed),
             "--out", str(runs / script), *(x for name, value in flags.items() for x in (f"--{name}", str(value)))]
    with open(runs / f"{script}.log", "w") as log:
        status = subprocess.run(words + (LORA[script].split() if runs.name == "lora" else []), stdout=log, stderr=log)
    if status.returncode:
        raise BadInput(f"{' '.join(words)}: failed, see {log.name}")
    return [json.loads(line) for line in (runs / script / "metrics.jsonl").read_text().splitlines()]


def recipe(seed, lora):
    """(SFT gold, reward accuracy, RLHF gold, KL), each on held-out questions."""
    world = RUNS / str(seed)
    runs = world / ("lora" if lora else "full")
    runs.mkdir(parents=True, exist_ok=True)
    toy.make(seed, world / "made")
    made = world / "made"

    def files(name):
        return {"data": made / f"{name}.jsonl", "eval-data": made / f"{name}-held-out.jsonl"}

    step("sft", seed, runs, model=made / "base", **files("demonstrations"))
    learned = runs / "sft"
    if lora:                                 # merged, it is the one base of the reward model's adapter and PPO's
        learned = runs / "merged"
        subprocess.run([sys.executable, "lora.py", runs / "sft", "--out", learned], check=True, stdout=subprocess.DEVNULL)
    pairs = step("reward", seed, runs, model=learned, **files("preferences"))
    answers = step("ppo", seed, runs, actor=learned, reward=runs / "reward", **files("prompts"))
    asked = [line for line in answers if "gold" in line]
    accuracy = [line["accuracy"] for line in pairs if "accuracy" in line][-1]
    return asked[0]["gold"], accuracy, asked[-1]["gold"], asked[-1]["eval_kl"]


def main():
    words = sys.argv[1:]
    lora, seeds = "--lora" in words, [int(word) for word in words if word != "--lora"]
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for seed in seeds:
        print(f"| {seed} | {'LoRA' if lora else 'all'} | " + " | ".join(f"{x:.3f}" for x in recipe(seed, lora)) + " |",
              flush=True)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
