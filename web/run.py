"""The tab "run": the curves of a training, while it runs too, and how its answers change over the steps."""
import itertools
import time
from pathlib import Path

import ppo
import reward
import sft
from runtime.errors import as_html
from runtime.log import panels_as_html, read_lines, samples_as_html

def last_change(run: Path | None) -> list[float]:
    """When the files that this tab shows were last written to: it is drawn again only when this changes."""
    files = [run / name for name in ("metrics.jsonl", "samples.jsonl")] if run else []
    return [file.stat().st_mtime for file in files if file.exists()]

def run_as_html(run: Path | None, page: float | None) -> tuple[str, str]:
    """The curves, and a page of held-out questions with the answers to them."""
    if run is None:
        return '<p class="empty">No training is shown. Name its --out folder: python -m web --run OUT</p>', ""
    lines, name = read_lines(run / "metrics.jsonl"), as_html(str(run))
    if not lines:
        return f'<p class="empty">{name} has no measurements yet. They appear here.</p>', ""
    known = {key for line in lines for key in line}
    panels = max((sft.CURVES, reward.CURVES, ppo.CURVES),          # those of the trainer of this run
                 key=lambda panels: len(known & {*itertools.chain(*panels.values())}))
    when = time.strftime("%H:%M:%S", time.localtime(max(last_change(run), default=0)))
    return (f"<p>{name}, step {lines[-1]['step']}, written at {when}. A point is a measurement, a line their "
            f"moving mean.</p>{panels_as_html(lines, panels)}",
            samples_as_html(read_lines(run / "samples.jsonl"), page))
