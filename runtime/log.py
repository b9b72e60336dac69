"""The record of a run: metrics.jsonl, curves.png and the progress bar."""
import gc
import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import BadInput
from runtime.ranks import say

class Log:
    """metrics.jsonl, a line per logged step, curves.png drawn from it, and the progress bar; rank 0 alone."""
    def __init__(self, args, steps, rank, curves, start=0):
        self.out, self.curves, self.drawn = Path(args.out), curves, time.perf_counter()
        self.file = None if rank else open(Path(args.out) / "metrics.jsonl", "a")
        # disable=None: the bar is only on a terminal
        self.bar = tqdm(total=steps, initial=start, disable=rank > 0 or None, dynamic_ncols=True, unit="step")
        self.every, self.steps, self.n, self.tokens = args.log_every, steps, start, 0
        self.since = self.stepped = time.perf_counter()            # of these tokens; the end of the last step
        self.warned = set()

    def step(self, tokens, **metrics):
        """After each step: tokens it took in, what it measured."""
        self.tokens += tokens
        self.n += 1
        self.stepped = time.perf_counter()
        self.bar.update()
        if self.n % self.every == 0 or self.n in (1, self.steps):
            now = time.perf_counter()
            self.line(step=self.n, **metrics, tokens_per_s=self.tokens / (now - self.since))
            self.tokens, self.since = 0, now

    def line(self, **metrics):
        if self.file is None:
            return
        try:
            if not (self.out / "metrics.jsonl").exists():          # lines would go nowhere without a word
                raise BadInput(f"{self.out}: the folder, or its metrics.jsonl, has vanished while the run was writing it")
            # JSON knows no NaN
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise BadInput(f"{self.out / 'metrics.jsonl'}: cannot be written ({error.strerror})") from None
        self.leave_out()
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
        if time.perf_counter() - self.drawn > 60:
            with suppress(OSError):
                self.draw()

    def leave_out(self):
        """What came after the last step, evaluation or a checkpoint, does not count in tokens_per_s."""
        now = time.perf_counter()
        self.since, self.stepped = self.since + now - self.stepped, now

    def warn(self, when, text):
        """Says the text once in a run, the first time that `when` is true."""
        if when and text not in self.warned:
            self.warned.add(text)
            if self.file:
                tqdm.write(f"warning: step {self.n}: {text}", file=sys.stderr)

    def draw(self):
        """curves.png: a panel for each of curves {title: metrics}, a smooth line over raw points."""
        self.drawn = time.perf_counter()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        known = {key for line in lines for key in line}
        panels = {title: shown for title, keys in self.curves.items() if (shown := [k for k in keys if k in known])}
        columns = min(3, len(panels))
        figure = Figure((4.5 * columns, 3.2 * math.ceil(len(panels) / columns)), dpi=110, layout="constrained")
        figure.suptitle(str(self.out), parse_math=False)
        for n, (title, keys) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, n, title=title, xlabel="step")
            for key in keys:
                x, y = np.array([(line["step"], line[key]) for line in lines if key in line], dtype=float).T
                window = np.ones(1 + len(y) // 12)                 # a moving mean, over fewer points at the ends
                mean = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
                line, = axes.plot(x, mean, label=key)
                axes.plot(x, y, ".", color=line.get_color(), alpha=0.35, markersize=5)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.out / "curves.png")
        del figure, axes, line
        gc.collect()                         # a figure is a knot of references, and Python would keep many of them

    def close(self):
        """After the model is saved: no picture is worth losing one."""
        self.bar.close()
        if self.file:
            self.file.close()
            try:
                self.draw()
            except OSError as error:
                say(f"no curves.png: {error.strerror}")
            if not (self.out / "curves.png").exists():
                say("no curves.png: matplotlib is not installed")
