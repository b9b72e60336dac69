"""The tab "run": the curves of a training, while it runs too, and how its answers change over the steps."""
import itertools
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import ppo
import reward
import sft
from runtime.errors import as_html
from runtime.log import panels_as_html, read_lines

ROWS, COLUMNS = 12, 6                        # of the table: questions on a page, and steps at most
NUMBERS = ("score", "gold", "kl")            # below each answer

def last_change(run: Path | None) -> list[float]:
    """When the files that this tab shows were last written to: it is drawn again only when this changes."""
    files = [run / name for name in ("metrics.jsonl", "samples.jsonl")] if run else []
    return [file.stat().st_mtime for file in files if file.exists()]

def curves_as_html(run: Path | None) -> str:
    if run is None:
        return '<p class="empty">No training is shown. Name its --out folder: python -m web --run OUT</p>'
    lines = read_lines(run / "metrics.jsonl")
    if not lines:
        return f'<p class="empty">{as_html(str(run))} has no measurements yet. They appear here.</p>'
    known = {key for line in lines for key in line}
    # the trainer whose metrics these are
    curves = max((sft.CURVES, reward.CURVES, ppo.CURVES),
                 key=lambda curves: len(known & {*itertools.chain(*curves.values())}))
    when = time.strftime("%H:%M:%S", time.localtime(max(last_change(run), default=0)))
    return (f"<p>{as_html(str(run))}, step {lines[-1]['step']}, written at {when}. A point is a measurement, "
            f"a line their moving mean.</p>{panels_as_html(lines, curves)}")

def samples_as_html(run: Path | None, page: float | None) -> str:
    """A table: a row for each held-out question, a column for some of the steps."""
    answers = defaultdict(list)              # {step: samples}; the questions come in the same order each time
    for line in read_lines(run / "samples.jsonl") if run else []:
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
    best, before, cells = max(sample.get("score") or -math.inf for sample in samples), None, ""
    for sample in samples:
        text = str(sample.get("response"))
        kind = "same " * (text == before) + "best" * (sample.get("score") == best)
        numbers = [f"{key} {sample[key]:.2f}" for key in NUMBERS if isinstance(sample.get(key), int | float)]
        cells += (f'<td class="{kind}" data-step="step {sample["step"]}"><div class="text">{as_html(text)}'
                  f'</div><div class="faint">{"  ".join(numbers)}</div></td>')
        before = text
    return f'<tr><th scope="row" class="text">{as_html(question)}</th>{cells}</tr>'
