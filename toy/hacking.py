"""The lesson of the KL term (Gao et al. 2022, arXiv 2210.10760): what happens to the true worth of answers while a
reward model is optimised, with the demo's beta and with none.

    python -m toy.hacking         # after `deepspeed sft.py` without flags; writes runs/toy/hacking.png

Both runs use one and the same reward model, poorer than the demo's: it is trained for STEPS steps only, so that there
is more in it to exploit. All else is the demo's.
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

import toy
from llama import BadInput
from toy.seeds import step

STEPS = {"reward": 150, "ppo": 150}
RUNS = Path("runs/toy/hacking")
BETA = {"no KL term (beta = 0)": "0", "the demo's beta": None}


def draw(lines, path):
    """Score and gold against KL (its root is what the axis spaces evenly, as in the paper), both runs in each panel."""
    figure = Figure((10, 4), dpi=110, layout="constrained")
    most = max(p["eval_kl"] for points in lines.values() for p in points)
    for n, (key, title) in enumerate([("eval_score", "what is optimised: score (standard deviations)"),
                                      ("gold", "what is wanted: gold (true worth, 0 to 1)")], 1):
        axes = figure.add_subplot(1, 2, n, title=title, xlabel="KL to the reference (nats per answer)")
        for name, points in lines.items():
            axes.plot([p["eval_kl"] for p in points], [p[key] for p in points], ".-", label=name)
        axes.set_xscale("function", functions=(lambda kl: kl.clip(0) ** 0.5, lambda root: root ** 2))
        axes.set_xticks([root ** 2 for root in range(2 + int(most ** 0.5))])
        axes.set_xlim(0, most * 1.05)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def most_fooling(rows, n=6):
    """The n rows of samples.jsonl that are worth nothing and score highest, no two of them to one question or alike."""
    chosen = {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        if row["gold"] <= 0.1 and row["prompt"] not in chosen and row["response"] not in chosen.values():
            chosen[row["prompt"]] = row["response"]
            yield row
        if len(chosen) == n:
            return


def main():
    toy.prepare(None, "runs/toy/sft")
    RUNS.mkdir(parents=True, exist_ok=True)
    print("a poorer reward model, and two runs of PPO against it (a few minutes)", flush=True)
    pairs = step("reward", 1234, RUNS, steps=STEPS["reward"])
    print(f"reward model: {[p['accuracy'] for p in pairs if 'accuracy' in p][-1]:.3f} of held-out pairs ranked as the "
          f"labels say", flush=True)
    lines, fooled = {}, []
    for name, beta in BETA.items():
        more = {} if beta is None else {"kl-coef": beta}
        points = step("ppo", 1234, RUNS, reward=RUNS / "reward", steps=STEPS["ppo"], **{"eval-every": 10}, **more)
        lines[name] = points = [p for p in points if "gold" in p]
        best, last = max(points, key=lambda p: p["gold"]), points[-1]
        for when, p in (("at gold's peak", best), ("at the end", last)):
            print(f"{name:24} {when:15} step {p['step']:4}  score {p['eval_score']:6.2f}  gold {p['gold']:5.2f}  "
                  f"KL {p['eval_kl']:6.1f} nats", flush=True)
        if beta:
            rows = [json.loads(line) for line in (RUNS / "ppo" / "samples.jsonl").read_text().splitlines()]
            fooled = list(most_fooling(row for row in rows if row["step"] == last["step"]))
    if fooled:
        print("\nanswers that fooled the reward model, at the end of the run without the KL term:")
    for row in fooled:
        question = row["prompt"].rpartition("Human:")[2].rpartition("Assistant:")[0].strip()
        print(f"  score {row['score']:5.2f}, gold {row['gold']:.1f}: {question} -- {row['response']!r}")
    draw(lines, "runs/toy/hacking.png")
    print("\npicture: runs/toy/hacking.png")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
