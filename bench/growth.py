"""How the time of a PPO step grows with batch, length of answers and model; and two ranks beside one.

Each point is ppo.py in a process of its own, full fine-tuning under ZeRO-2 on prompts of 64 tokens, the
median of its steps without the first. One rank has one core. Two ranks have one core each, and share the
same global batch. docs/speed.md has the results.

    python bench/growth.py --out growth.png            # a quarter of an hour on two quiet cores
"""
import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from common import SIZES, table, write_models
from matplotlib.figure import Figure
from ppo_step import NEW, B, run_ours, write_prompts

from lora import load_model

BATCHES, LENGTHS = (4, 8, 16, 32, 64), (32, 64, 128, 256)    # B and NEW stay, where another quantity grows


def get_args():
    parser = argparse.ArgumentParser(
        description="Times a PPO step as batch, answers and model grow, and on two ranks.")
    parser.add_argument("--steps", type=int, default=4,
                        help="steps of a process, the first of which is left out")
    parser.add_argument("--out", default="growth.png", help="the picture")
    return parser.parse_args()


def slope(points):
    """The slope of the straight line through the first and the last of [(x, seconds)], and how far the
    other points lie above this line at most, as a share."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    per_x = (y1 - y0) / (x1 - x0)
    return per_x, max(y / (y0 + per_x * (x - x0)) - 1 for x, y in points)


def measure(root, steps):
    """({what grows: [(how much, seconds per step)]}, seconds on one rank with one core, seconds on two
    ranks)."""
    folders, n_weights = {}, {}
    for size in SIZES:
        folders[size] = folder = root / size
        write_models(folder, size)
        write_prompts(folder)
        n_weights[size] = sum(p.numel() for p in load_model(folder / "base").parameters()) / 1e6

    def seconds(size="15M", **flags):
        return statistics.median(run_ours(folders[size], lora=False, **{"steps": steps, **flags})[0])

    curves = {"answers in the batch": [(n, seconds(B=n)) for n in BATCHES],
              "tokens per answer": [(n, seconds(B=B, new=n)) for n in LENGTHS],
              "million weights": [(n_weights[size], seconds(size, B=B, new=NEW, steps=3)) for size in SIZES]}
    one = seconds(B=B, launch=("taskset", "--cpu-list", "0", sys.executable), OMP_NUM_THREADS="1")
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    two = seconds(B=B, launch=(deepspeed, "--num_gpus", "2"), OMP_NUM_THREADS="1")
    return curves, one, two


def draw(curves, out):
    figure = Figure((13.5, 3.4), dpi=110, layout="constrained")
    for axes, (what, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), "o-", label="measured")
        axes.plot(*zip(points[0], points[-1], strict=True), "--", color="grey", label="straight line")
        axes.set(xlabel=what, ylabel="seconds per PPO step", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out)
    print(f"wrote {out}")


def main():
    args = get_args()
    with tempfile.TemporaryDirectory() as root:
        curves, one, two = measure(Path(root), args.steps)
    rows = []
    for what, points in curves.items():
        per_x, above = slope(points)
        amounts = ", ".join(f"{x:.0f}" for x, _ in points)
        seconds = ", ".join(f"{y:.2f}" for _, y in points)
        rows.append((f"{what}: {amounts}", seconds, f"{per_x:.3f}", f"{above:.0%}"))
    title = f"PPO step, 15M unless said, {B} x (64 + {NEW}) unless said"
    table([title, "s", "s per 1 more", "above its line"], rows)
    table(["ranks, one core each", "s per step", "throughput"],
          [("1", one, "1"), ("2", two, f"{one / two:.2f}")])
    draw(curves, args.out)


if __name__ == "__main__":
    main()
