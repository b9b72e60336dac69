"""The record of a run: metrics.jsonl, samples.jsonl, curves.png, and what a person sees while it runs; rank 0
alone.

On a terminal there are a progress bar with the live numbers and a line per evaluation; elsewhere a line per
logged step.
"""
import gc
import json
import math
import shutil
import sys
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import BadInput, as_html
from runtime.folders import writing
from runtime.ranks import say
from runtime.trackers import Tracker

SECONDS_BETWEEN_CURVES = 60
# The web page: size of a panel, points of a curve; questions on a page, steps, and what is said of an answer.
WIDTH, HEIGHT, POINTS = 320, 150, 300
ROWS, COLUMNS, NUMBERS = 12, 6, ("score", "gold", "kl")

class Log:
    """curves: {title of a panel: the metrics in it}. start: the steps that a resumed run has behind it."""

    def __init__(self, args: Namespace, steps: int, rank: int, curves: dict[str, list[str]], start: int = 0):
        self.out, self.curves, self.every = Path(args.out), curves, args.log_every
        self.steps, self.n = steps, start
        self.file = None if rank else (self.out / "metrics.jsonl").open("a")
        # disable=None: the bar is only on a terminal
        self.bar = tqdm(total=steps, initial=start, disable=rank > 0 or None, dynamic_ncols=True, unit="step")
        self.tracker = Tracker(args, rank, start)
        self.tokens, self.seconds, self.warned = 0, 0.0, set()
        self.drawn = time.perf_counter()
        self.restart_clock()

    def restart_clock(self):
        """What came before, an evaluation or a checkpoint, does not count in tokens_per_s."""
        self.clock = time.perf_counter()

    def step(self, tokens: int, **metrics: float):
        """Counts a training step that took in so many tokens, and records its metrics every --log-every
        steps."""
        self.n += 1
        self.tokens += tokens
        self.seconds += time.perf_counter() - self.clock
        self.bar.update()
        if self.n % self.every == 0 or self.n in (1, self.steps):
            metrics = {"step": self.n, **metrics, "tokens_per_s": self.tokens / self.seconds}
            self.tokens, self.seconds = 0, 0.0
            self.write(metrics)
            if self.bar.disable:
                say(in_lines(metrics))
            else:
                shown = [key for keys in self.curves.values() for key in keys if key in metrics][:3]
                self.bar.set_postfix_str(in_words({key: metrics[key] for key in shown}))
        self.restart_clock()

    def line(self, **metrics: float):
        """Records and prints the metrics of an evaluation."""
        self.write(metrics)
        say(in_lines(metrics))
        self.restart_clock()

    def samples(self, step: int, samples: list[dict]):
        """Appends what the model has answered to held-out prompts to samples.jsonl, and prints the first."""
        if self.file:
            with writing(self.out), open(self.out / "samples.jsonl", "a") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
            self.tracker.samples(step, samples)
        first = samples[0]
        say(f"{first['prompt']} {first['response']}\n[score {first['score']:.2f}, kl {first['kl']:.2f}]")

    def write(self, metrics):
        """Appends a line to metrics.jsonl; BadInput on a full disk, or where the folder has vanished."""
        if self.file is None:
            return
        try:
            if not (self.out / "metrics.jsonl").exists():          # lines would go to a file without a name
                raise BadInput(f"{self.out}: the folder, or its metrics.jsonl, has vanished while the run "
                               f"was writing it")
            # JSON has no NaN
            finite = {key: x if math.isfinite(x) else None for key, x in metrics.items()}
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise BadInput(f"{self.out / 'metrics.jsonl'}: cannot be written ({error.strerror})") from None
        self.tracker.metrics(metrics)
        if time.perf_counter() - self.drawn > SECONDS_BETWEEN_CURVES:
            with suppress(OSError, ImportError):
                self.draw()

    def warn(self, condition: bool, text: str):
        """Prints a warning, the first time in a run that the condition is true."""
        if condition and text not in self.warned:
            self.warned.add(text)
            if self.file:
                tqdm.write(f"warning: step {self.n}: {text}", file=sys.stderr)

    def draw(self):
        """Draws curves.png: a panel for each of `curves`, a moving mean over the raw points."""
        from matplotlib.figure import Figure
        self.drawn = time.perf_counter()
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        known = {key for line in lines for key in line}
        panels = {title: [key for key in keys if key in known] for title, keys in self.curves.items()}
        panels = {title: keys for title, keys in panels.items() if keys}
        if not panels:                       # stopped before anything was measured
            return
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure((4.5 * columns, 3.2 * rows), dpi=110, layout="constrained")
        figure.suptitle(str(self.out), parse_math=False)
        for n, (title, keys) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, n, title=title, xlabel="step")
            for key in keys:
                x, y = np.array([(line["step"], line[key]) for line in lines if key in line], dtype=float).T
                curve, = axes.plot(x, moving_mean(y), label=key)
                axes.plot(x, y, ".", color=curve.get_color(), alpha=0.35, markersize=5)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.out / "curves.png")
        del figure, axes, curve
        gc.collect()                         # figures are reference cycles; collect them now or they pile up

    def close(self):
        """The last act of a run. A full disk or a missing matplotlib costs the picture, not the run."""
        self.bar.close()
        self.tracker.close()
        if self.file:
            self.file.close()
            try:
                self.draw()
            except OSError as error:
                say(f"no curves.png: {error.strerror}")
            except ImportError:
                say("no curves.png: matplotlib is not installed")

def in_words(metrics: dict[str, float]) -> str:
    """step 5  loss 0.4938"""
    return "  ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in metrics.items())

def in_lines(metrics: dict[str, float]) -> str:
    """in_words, in several lines where the terminal is narrow."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    lines = []
    for words in in_words(metrics).split("  "):
        if lines and len(f"{lines[-1]}  {words}") < width:
            lines[-1] += f"  {words}"
        else:
            lines.append(f"  {words}" if lines else words)
    return "\n".join(lines)

def moving_mean(y: np.ndarray) -> np.ndarray:
    """The mean over a twelfth of the points around each, over fewer at the ends."""
    window = np.ones(1 + len(y) // 12)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")

# ------------------------------------------------------------ for the web page
def read_lines(file: Path) -> list[dict]:
    """The lines of metrics.jsonl or samples.jsonl, of which a run may be writing the last."""
    lines = []
    with suppress(OSError):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]

def panels_as_html(lines: list[dict], curves: dict[str, list[str]]) -> str:
    """The panels of curves.png as SVG, in the colours of the page. The classes are in web/page.css."""
    panels = ""
    for title, keys in curves.items():
        series = {key: points for key in keys if len(points := points_of(lines, key))}
        if series:
            panels += panel_as_html(title, series)
    return f'<div class="panels">{panels}</div>'

def points_of(lines: list[dict], key: str) -> np.ndarray:
    """(N,3): step, value and moving mean. What was not finite is null in the file."""
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    x, y = np.array(found, dtype=float).reshape(-1, 2).T
    return np.stack([x, y, moving_mean(y)] if found else [x, y, y], axis=1)[::1 + len(x) // POINTS]

def panel_as_html(title: str, series: dict[str, np.ndarray]) -> str:
    together = np.concatenate([*series.values()])
    last, low, high = together[:, 0].max(), together[:, 1].min(), together[:, 1].max()
    drawn, names = "", ""
    for n, (key, points) in enumerate(series.items()):
        x = WIDTH * points[:, 0] / (last or 1)
        dots, line = (HEIGHT * (high - points[:, i]) / ((high - low) or 1) for i in (1, 2))
        drawn += "".join(f'<circle class="c{n}" cx="{a:.1f}" cy="{b:.1f}" r="1.6"/>'
                         for a, b in zip(x, dots, strict=True))
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, line, strict=True))
        drawn += f'<polyline class="c{n}" points="{way}"/>'
        names += f'<b class="c{n}">{key} {points[-1, 1]:.4g}</b>'
    return (f'<figure><figcaption>{as_html(title)}<div>{names}</div></figcaption><div class="axis">'
            f'<span>{high:.3g}</span>{"" if low == high else f"<span>{low:.3g}</span>"}</div><svg role="img" '
            f'aria-label="{as_html(title)}" viewBox="-4 -4 {WIDTH + 8} {HEIGHT + 8}">{drawn}</svg>'
            f'<div class="steps"><span>step 0</span><span>{last:.0f}</span></div></figure>')

def samples_as_html(lines: list[dict], page: float | None) -> str:
    """A table of samples.jsonl: a row for each held-out question, a column for some of the steps."""
    answers = defaultdict(list)              # {step: samples}; the questions come in the same order each time
    for line in lines:
        answers[line["step"]].append(line)
    if not answers:
        return '<p class="empty">ppo.py writes answers to held-out questions. This run has none yet.</p>'
    steps = [[*answers][round(i)] for i in np.linspace(0, len(answers) - 1, min(COLUMNS, len(answers)))]
    n = len(answers[steps[0]])
    pages = math.ceil(n / ROWS)
    page = min(max(int(page or 1), 1), pages)
    rows = "".join(sample_row([answers[step][i] for step in steps if i < len(answers[step])])
                   for i in range(n)[(page - 1) * ROWS:page * ROWS])
    heads = "".join(f"<th>step {step}</th>" for step in steps)
    return (f"<p>{n:,} held-out questions, page {page} of {pages:,}. Green marks the best score of a row. A "
            f'pale answer repeats the one before.</p><table class="samples"><thead><tr><th>question</th>'
            f"{heads}</tr></thead><tbody>{rows}</tbody></table>")

def sample_row(samples: list[dict]) -> str:
    question = str(samples[0].get("prompt")).strip().removeprefix("Human:").removesuffix("Assistant:").strip()
    best, before, cells = max(score_of(sample) for sample in samples), None, ""
    for sample in samples:
        text = str(sample.get("response"))
        kind = "same " * (text == before) + "best" * (score_of(sample) == best)
        numbers = "  ".join(f"{key}\u00a0{sample[key]:.2f}" for key in NUMBERS
                            if isinstance(sample.get(key), int | float))
        cells += (f'<td class="{kind}" data-step="step {sample["step"]}"><div class="text">{as_html(text)}'
                  f'</div><div class="faint">{numbers}</div></td>')
        before = text
    return f'<tr><th scope="row" class="text">{as_html(question)}</th>{cells}</tr>'

def score_of(sample: dict) -> float:
    """The score as it is shown; the same answer scores a little differently in another batch."""
    score = sample.get("score")
    return round(score, 2) if isinstance(score, int | float) else -math.inf
