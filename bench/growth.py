"""How the time of a PPO step grows with the batch, the length of the answers and the model; and two ranks beside one.

Each point is ppo.py in a process of its own, full fine-tuning under ZeRO-2 on prompts of 64 tokens, the median of its
steps without the first. One rank has one core, two ranks have one each, and share the same global batch.

    python bench/growth.py --out growth.png            # a quarter of an hour on two quiet cores
"""
import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from common import SIZES, load_model, table, write_models
from ppo_step import B, NEW, run_ours, write_prompts

BATCHES, LENGTHS = (4, 8, 16, 32, 64), (32, 64, 128, 256)    # beside B and NEW, where another thing grows


def get_args():
    parser = argparse.ArgumentParser(description="Times a PPO step as batch, answers and model grow, and on two ranks.")
    parser.add_argument("--steps", type=int, default=4, help="steps of a process, the first of which is left out")
    parser.add_argument("--out", default="growth.png", help="the picture")
    return parser.parse_args()


def slope(points):
    """The straight line through the first and the last of [(x, seconds)], and how far the others lie above it at most,
    as a share."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    per_x = (y1 - y0) / (x1 - x0)
    return per_x, max(y / (y0 + per_x * (x - x0)) - 1 for x, y in points)


def main():
    args = get_args()
    with tempfile.TemporaryDirectory() as name:
        folders, n_weights = {}, {}
        for size in SIZES:
            folders[size] = folder = Path(name) / size
            write_models(folder, size)
            write_prompts(folder)
            n_weights[size] = sum(p.numel() for p in load_model(folder / "base").parameters()) / 1e6

        def seconds(size="15M", **flags):
            return statistics.median(run_ours(folders[size], lora=False, **{"steps": args.steps, **flags})[0])

        curves = {"answers in the batch": [(n, seconds(B=n)) for n in BATCHES],
                  "tokens per answer": [(n, seconds(B=B, new=n)) for n in LENGTHS],
                  "million weights": [(n_weights[size], seconds(size, B=B, new=NEW, steps=3)) for size in SIZES]}
        one = seconds(B=B, launch=("taskset", "--cpu-list", "0", sys.executable), OMP_NUM_THREADS="1")
        deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
        two = seconds(B=B, launch=(deepspeed, "--num_gpus", "2"), OMP_NUM_THREADS="1")

    table([f"PPO step, 15M unless said, {B} x (64 + {NEW}) unless said", "s", "s per 1 more", "above its line"],
          [(f"{what}: {', '.join(f'{x:.0f}' for x, _ in points)}", ", ".join(f"{y:.2f}" for _, y in points),
            f"{slope(points)[0]:.3f}", f"{slope(points)[1]:.0%}") for what, points in curves.items()])
    table(["ranks, one core each", "s per step", "throughput"], [("1", one, "1"), ("2", two, f"{one / two:.2f}")])

    figure = Figure((13.5, 3.4), dpi=110, layout="constrained")
    for axes, (what, points) in zip(figure.subplots(1, len(curves)), curves.items()):
        axes.plot(*zip(*points), "o-", label="measured")
        axes.plot(*zip(points[0], points[-1]), "--", color="grey", label="straight line")
        axes.set(xlabel=what, ylabel="seconds per PPO step", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
