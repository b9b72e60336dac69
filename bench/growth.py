"""How the time of a PPO step grows with batch, answer length and model size, and what two processes gain on two cores.

Full fine-tuning of ppo.py itself; what is not varied is 16 prompts of 64 tokens, 64 new tokens, 15M parameters. The two
processes run on a core each, the one beside them on one core. Writes a picture.

    python bench/growth.py --out growth.png
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from common import SIZES, table, write_models
from ppo_step import run_ours, write_prompts

BATCHES, LENGTHS = (4, 8, 16, 32, 64), (32, 64, 128, 256)


def get_args():
    parser = argparse.ArgumentParser(description="Times PPO steps of several sizes.")
    parser.add_argument("--out", default="growth.png", help="the picture")
    return parser.parse_args()


def draw(panels, path):
    """Seconds per step against each of panels {what: {value: seconds}}, with the line through 0 and the largest."""
    figure = Figure((4.2 * len(panels), 3.4), dpi=110, layout="constrained")
    for n, (what, seconds) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), n, xlabel=what, ylabel="seconds per PPO step")
        most = max(seconds)
        axes.plot([0, most], [0, seconds[most]], "--", color="gray", label="proportional")
        axes.plot(list(seconds), list(seconds.values()), "o-", label="measured")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main():
    args = get_args()
    with tempfile.TemporaryDirectory() as name:
        folders = {size: Path(name) / size for size in SIZES}
        for size, folder in folders.items():
            write_models(folder, size)
            write_prompts(folder)
        def seconds(size="15M", **more):
            return statistics.median(run_ours(folders[size], False, steps=4, **more)[0])

        panels = {"prompts per step": {B: seconds(B=B) for B in BATCHES},
                  "tokens per answer": {new: seconds(new=new) for new in LENGTHS},
                  "million parameters": {float(size[:-1]): seconds(size) for size in SIZES}}
        pinned = ["taskset", "-c", "0", sys.executable]
        one = seconds(B=32, launch=pinned, OMP_NUM_THREADS="1")
        two = seconds(B=32, launch=["deepspeed", "--num_gpus", "2"], OMP_NUM_THREADS="1")
    table(["PPO step, full, CPU", "s", "s per unit, of the first"],
          [(f"{value:g} {what}", s, f"{s / value / (next(iter(points.values())) / next(iter(points))):.2f}")
           for what, points in panels.items() for value, s in points.items()])
    table(["32 prompts", "s", "throughput"], [("one process on one core", one, "1.00"), ("two processes", two, f"{one / two:.2f}")])
    draw(panels, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
