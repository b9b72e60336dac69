"""What the KL term is for (Gao et al. 2022, arXiv 2210.10760). PPO optimises the score of a reward model,
once with the demo's beta and once with beta = 0, while the true reward of the answers is measured.

    python -m toy.hacking         # after `deepspeed sft.py` without flags; writes runs/toy/hacking.png

Both runs use the same reward model. It is trained for STEPS["reward"] steps only, so it has more errors for
PPO to exploit than the demo's reward model. All other flags are the demo's.
"""
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from runtime.errors import exit_with_one_line
from runtime.flags import check_toy
from toy.gold import question_of
from toy.seeds import step

STEPS = {"reward": 150, "ppo": 150}
RUNS = Path("runs/toy/hacking")
BETA = {"no KL term (beta = 0)": "0", "the demo's beta": None}

def draw(lines: dict[str, list[dict]], path: Path):
    """Draws score and true reward against KL, both runs in each panel. As in the paper, the axis spaces the
    root of KL evenly."""
    figure = Figure((10, 4), dpi=110, layout="constrained")
    most = max(p["eval_kl"] for points in lines.values() for p in points)
    for n, (key, title) in enumerate([("eval_score", "what is optimised: score (standard deviations)"),
                                      ("gold", "what is wanted: true reward (gold), 0 to 1")], 1):
        axes = figure.add_subplot(1, 2, n, title=title, xlabel="KL to the reference (nats per answer)")
        for name, points in lines.items():
            axes.plot([p["eval_kl"] for p in points], [p[key] for p in points], ".-", label=name)
        axes.set_xscale("function", functions=(lambda kl: kl.clip(0) ** 0.5, lambda root: root ** 2))
        axes.set_xticks([root ** 2 for root in range(2 + int(most ** 0.5))])
        axes.set_xlim(0, most * 1.05)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)

def most_fooling(rows: Iterable[dict], n: int = 6) -> Iterator[dict]:
    """Yields the n rows of samples.jsonl with the highest scores among those with a true reward up to 0.1. No
    two rows have the same question or the same answer."""
    chosen = {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        if row["gold"] <= 0.1 and row["prompt"] not in chosen and row["response"] not in chosen.values():
            chosen[row["prompt"]] = row["response"]
            yield row
        if len(chosen) == n:
            return

def run_ppo(name: str, beta: str | None) -> list[dict]:
    """Runs PPO with this beta (None: the demo's), prints two of its evaluations, and returns all of them."""
    more = {} if beta is None else {"kl-coef": beta}
    lines = step("ppo", 1234, RUNS, reward=RUNS / "reward", steps=STEPS["ppo"], **{"eval-every": 10}, **more)
    points = [p for p in lines if "gold" in p]
    for when, p in (("at the peak", max(points, key=lambda p: p["gold"])), ("at the end", points[-1])):
        print(f"{name:22} {when:11} step {p['step']:3}  score {p['eval_score']:5.2f}  gold {p['gold']:.2f}  "
              f"KL {p['eval_kl']:5.1f}", flush=True)
    return points

def show_fooling():
    """Prints the answers that fooled the reward model at the end of the newest run of PPO."""
    rows = [json.loads(line) for line in (RUNS / "ppo" / "samples.jsonl").read_text().splitlines()]
    if fooling := list(most_fooling(row for row in rows if row["step"] == rows[-1]["step"])):
        print("answers that fooled the reward model at the end of that run:")
    for row in fooling:
        print(f"  score {row['score']:5.2f}, gold {row['gold']:.1f}: {question_of(row['prompt'])} "
              f"-- {row['response']!r}", flush=True)

def main():
    check_toy("runs/toy/sft")
    RUNS.mkdir(parents=True, exist_ok=True)
    print("Training a poor reward model, then PPO against it twice. This takes some minutes.\n"
          "Score is in standard deviations, gold is the true reward from 0 to 1, and KL is\n"
          "in nats per answer.\n", flush=True)
    pairs = step("reward", 1234, RUNS, steps=STEPS["reward"])
    accuracy = [p["accuracy"] for p in pairs if "accuracy" in p][-1]
    print(f"reward model: ranks {accuracy:.3f} of the held-out pairs as labelled", flush=True)
    lines = {}
    for name, beta in BETA.items():
        lines[name] = run_ppo(name, beta)
        if beta == "0":
            show_fooling()
    draw(lines, "runs/toy/hacking.png")
    print("\npicture: runs/toy/hacking.png")

if __name__ == "__main__":
    exit_with_one_line(main)
