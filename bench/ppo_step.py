"""A PPO step beside TRL's: 16 prompts of 64 tokens, answers of 64 tokens, two passes of one mini-batch.

Ours is ppo.py itself, and TRL's is its PPO trainer (trl_ppo.py), each in a process of its own, in turn. The
first step of each process is left out. Peak memory is the process's. One more row is ours with answers that
end by themselves. The last row is the roofline: the seconds that the matrix products of a step would take
at the machine's best rate. docs/speed.md has the results.

    python bench/ppo_step.py                  # some minutes on two quiet cores
"""
import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common import flops, matrix_rate, process, table, write_models

P, B, NEW, PASSES = 64, 16, 64, 2


def get_args():
    parser = argparse.ArgumentParser(description="Times a PPO step beside TRL's.")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each, in turn")
    parser.add_argument("--steps", type=int, default=4,
                        help="steps of a process, the first of which is left out")
    parser.add_argument("--size", default="15M")
    return parser.parse_args()


def write_prompts(folder: Path, n: int = 512):
    """Writes folder/prompts.jsonl. Each prompt is 64 tokens in the template: BOS, 61 words, and two unknown
    words that hold the roles' names."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(31_000)}" for _ in range(P - 2)) for _ in range(n)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def words_of_ours(folder: Path, lora: bool, B: int, new: int, steps: int) -> list[str]:
    """The command line of ppo.py."""
    kind = "-lora" if lora else ""
    words = ["ppo.py", "--actor", folder / f"base{kind}", "--reward", folder / f"reward{kind}",
             "--data", folder / "prompts.jsonl", "--eval-data", folder / "prompts.jsonl", "--eval-prompts", 1,
             "--out", folder / "run", "--overwrite", "--reward-norm", "none", "--max-prompt", P,
             "--max-new", new, "--rollout-batch", B, "--mini-batch", B, "--micro-batch", 8,
             "--ppo-epochs", PASSES, "--steps", steps, "--actor-lr", 1e-6]
    return [str(word) for word in words]


def run_ours(folder: Path, lora: bool, B: int = B, new: int = NEW, steps: int = 4,
             launch: Sequence[str] = (sys.executable,),
             **environment: str) -> tuple[list[float], float, float]:
    """(seconds of each step but the first, peak memory in MB, mean length of the answers) of ppo.py."""
    command = [*launch, *words_of_ours(folder, lora, B, new, steps)]
    _, peak = process(command, folder / "ppo.log", **environment)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_s" in line][1:]
    seconds = [B * (P + line["length"]) / line["tokens_per_s"] for line in lines]
    return seconds, peak, statistics.mean(line["length"] for line in lines)


def run_trl(folder, lora, tuned, steps):
    """The same of TRL's trainer, whose answers all have the full length."""
    switches = [*["--lora"] * lora, *["--tuned"] * tuned]
    words = [sys.executable, "bench/trl_ppo.py", folder, "--steps", steps, *switches]
    out, peak = process(words, folder / "trl.log")
    return json.loads(out)[1:], peak, float(NEW)


def roofline(size: str, lora: bool) -> dict[str, float]:
    """{phase: the seconds of its matrix products alone}. The phases are an answer to each prompt; a pass of
    each of the four networks over prompts and answers, of which two give the answers' logits; and the
    forward and backward passes that train actor and critic."""
    body, head = flops(size, B * (P + NEW), P + NEW, 0), flops(size, 0, 0, B * NEW)
    training = PASSES * (2 * body + head)
    needed = {"answers": body + head, "passes": 4 * body + 2 * head,
              "forward": training, "backward": (1 if lora else 2) * training}
    rate = matrix_rate(size)
    return {phase: n / rate for phase, n in needed.items()}


def compare(folder, short, lora, args):
    """Rows of the table: ours, ours on models whose answers are short, TRL, TRL tuned, the roofline."""
    runs = {"ours": partial(run_ours, folder, lora, steps=args.steps),
            "ours, answers end": partial(run_ours, short, lora, steps=args.steps),
            "TRL": partial(run_trl, folder, lora, False, args.steps),
            "TRL, tuned": partial(run_trl, folder, lora, True, args.steps)}
    measured = {what: [] for what in runs}
    for _ in range(args.rounds):
        for what, run in runs.items():
            measured[what].append(run())
    kind, rows, ours = "LoRA" if lora else "full", [], None
    for what, results in measured.items():
        seconds = statistics.median(s for result in results for s in result[0])
        peak = max(result[1] for result in results)
        length = statistics.mean(result[2] for result in results)
        ours = ours or (seconds, peak)
        rows.append((f"{what}, {kind}", f"{length:.0f}", seconds, f"{seconds / ours[0]:.2f}",
                     peak, f"{peak / ours[1]:.2f}"))
    seconds = sum(roofline(args.size, lora).values())
    return [*rows, (f"the roofline, {kind}", f"{NEW}", seconds, f"{seconds / ours[0]:.2f}", "", "")]


def main():
    args = get_args()
    with tempfile.TemporaryDirectory() as root:
        folder, short = Path(root) / "models", Path(root) / "short"
        for models, ends in ((folder, 0.0), (short, 0.08)):
            write_models(models, args.size, ends)
            write_prompts(models)
        rows = [row for lora in (False, True) for row in compare(folder, short, lora, args)]
    table([f"PPO step, {args.size}, {B} x ({P} + {NEW})", "tokens per answer", "s", "time / ours", "peak MB",
           "memory / ours"], rows)


if __name__ == "__main__":
    main()
