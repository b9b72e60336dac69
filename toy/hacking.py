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
    """Score and gold against KL, both runs in each panel; the steps go along the lines."""
    figure = Figure((10, 4), dpi=110, layout="constrained")
    for n, (key, title) in enumerate([("eval_score", "what is optimised: score (standard deviations)"),
                                      ("gold", "what is wanted: gold (true worth, 0 to 1)")], 1):
        axes = figure.add_subplot(1, 2, n, title=title, xlabel="KL to the reference (nats per answer)")
        for name, points in lines.items():
            axes.plot([p["eval_kl"] for p in points], [p[key] for p in points], ".-", label=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


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
            rows = [row for row in rows if row["step"] == last["step"] and row["gold"] <= 0.1]
            fooled = sorted(rows, key=lambda row: -row["score"])[:6]
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
