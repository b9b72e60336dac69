"""The tab "data": rows of a file as the trainers see them, made by data.py's own functions."""
import functools
import itertools
import math
from collections import Counter

import data
from data import Record, Tokenizer
from runtime.errors import as_html
from web.talk import Site

Tokens = list[tuple[int | str, str]]         # (id or text, kind); {name: Tokens} is a row of a batch
ROWS = 6                                     # on a page; they are padded as one batch
PADDING = "makes the rows of a batch equally long; the mask hides it"
LEGEND = {                                   # what the kinds of tokens are, in each step
    "sft": {"prompt": "the model reads it and does not learn it: the label is \u2212100, there is no loss",
            "answer": "the model learns to write it, each token from all that stands left of it",
            "EOS": "has a label too: the model learns to stop here",
            "cut": "cut off, because the row is longer than --max-len", "padding": PADDING},
    "reward": {"same": "the same in both rows of the pair",
               "different": "from the first difference on; --loss dense compares the scores at all of these",
               "score": "the last token; the score of the whole answer is read here", "padding": PADDING},
    "ppo": {"padding": f"{PADDING}; it stands left, so that all answers begin in the same column",
            "prompt": "the actor reads it",
            "answer": "the actor writes it in training; rewards and losses are at its tokens only"}}

def rows_as_html(site: Site, step: str, max_len: float | None, page: float | None) -> str:
    """A page of rows as a batch of a step, with a legend."""
    if site.records is None:
        return '<p class="empty">No data is shown. Name a file: python -m web --data FILE</p>'
    context, n = site.speakers[0].model.config.context, len(site.records)
    if not max_len or not 1 <= max_len <= context:
        return f'<p class="empty">--max-len is not from 1 to {context}, the context of the model.</p>'
    pages = math.ceil(n / ROWS)
    page = min(max(int(page or 1), 1), pages)
    legend = "".join(f'<li><span class="t {kind}">{kind}</span> {what}</li>'
                     for kind, what in LEGEND[step].items())
    batch = batch_as_html(site.speakers[0].tokenizer, step, site.records[(page - 1) * ROWS:page * ROWS],
                          int(max_len))
    return f'<p>{n:,} rows, page {page} of {pages:,}</p><ul class="legend">{legend}</ul>{batch}'

def batch_as_html(tokenizer: Tokenizer, step: str, records: list[Record], max_len: int) -> str:
    """What becomes of each record. Those that are kept are collated as one batch."""
    encode, collate = STEPS[step]
    tallies = [Counter() for _ in records]
    rows = [encode(tokenizer, record, max_len, tally) for record, tally in zip(records, tallies, strict=True)]
    kept = [(record, row) for record, row in zip(records, rows, strict=True) if row]
    batch, html = iter(collate(tokenizer, kept) if kept else []), ""
    for record, row, tally in zip(records, rows, tallies, strict=True):
        html += '<div class="batch">' + "".join(f'<span class="t cut">{what}</span> ' for what in +tally)
        for name, tokens in next(batch).items() if row else ():
            html += f'<div class="faint">{name}</div>{tokens_as_html(tokenizer, tokens)}'
        prompt = row and (row if step == "ppo" else row[0][:row[-1]])
        html += (f"<details{'' if row else ' open'}><summary>the row as it was read</summary>"
                 f"{record_as_html(tokenizer, record, prompt)}</details></div>")
    return html

def sft_batch(tokenizer: Tokenizer, rows: list[tuple[Record, tuple]]) -> list[dict[str, Tokens]]:
    batch, tensors = [], (x.tolist() for x in data.collate_sft([row for _, row in rows]))
    for (record, (row, n_prompt)), ids, mask, labels in zip(rows, *tensors, strict=True):
        tokens = [(id, "padding" if not is_real else "prompt" if label == -100 else
                   "EOS" if t == len(row) - 1 and id == tokenizer.eos_id else "answer")
                  for t, (id, is_real, label) in enumerate(zip(ids, mask, labels, strict=True))]
        cut = data.encode_answer(tokenizer, record, record.chosen)[len(row) - n_prompt:]
        batch.append({"": tokens + [(id, "cut") for id in cut]})
    return batch

def reward_batch(tokenizer: Tokenizer, rows: list[tuple[Record, tuple]]) -> list[dict[str, Tokens]]:
    ids, mask, starts = data.collate_pairs([row for _, row in rows])

    def line(n, start):
        last = int(mask[n].sum()) - 1
        kinds = ["same"] * start + ["different"] * (last - start) + ["score"] + ["padding"] * ids.shape[1]
        return [*zip(ids[n].tolist(), kinds, strict=False)]
    return [{"chosen": line(i, start), "rejected": line(len(rows) + i, start)}
            for i, start in enumerate(starts.tolist())]

def ppo_batch(tokenizer: Tokenizer, rows: list[tuple[Record, list[int]]]) -> list[dict[str, Tokens]]:
    ids, mask = (x.tolist() for x in data.collate_prompts([row for _, row in rows]))
    kinds = [["prompt" if is_real else "padding" for is_real in row] for row in mask]
    return [{"": [*zip(*row, strict=True), ("the answer", "answer")]} for row in zip(ids, kinds, strict=True)]

STEPS = {"sft": (data.encode_sft, sft_batch), "reward": (data.encode_pair, reward_batch),
         "ppo": (data.encode_prompt, ppo_batch)}

@functools.lru_cache(maxsize=100_000)
def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as it looks inside a text; one that is no text by itself, such as a byte, as its piece."""
    if id in (tokenizer.bos_id, *tokenizer.eos_ids):
        return "BOS" if id == tokenizer.bos_id else "EOS"
    before = tokenizer.encode("a")
    text = tokenizer.decode([*before, id])[len(tokenizer.decode(before)):]
    return text if text and "\ufffd" not in text else tokenizer.pieces()[id]

def tokens_as_html(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """A box for each token, with its id and column, and one for all padding. Turns begin on a new line."""
    html, column, before = "", 0, "\n"
    for kind, run in itertools.groupby(tokens, key=lambda token: token[1]):
        run = [id for id, _ in run]
        for id in [f"padding \u00d7 {len(run)}"] if kind == "padding" else run:
            text = id if isinstance(id, str) else token_text(tokenizer, id)
            html += "<br>" * (text[:1] == "\n" != before[:1])
            shown = text if isinstance(id, str) else text.replace("\n", "\u21b5").replace(" ", "\u00b7")
            html += f'<span class="t {kind}" title="id {id}, column {column}: {kind}">{as_html(shown)}</span>'
            column, before = column + (len(run) if kind == "padding" else 1), text
    return f'<div class="tokens">{html}</div>'

def record_as_html(tokenizer: Tokenizer, record: Record, prompt: list[int] | None) -> str:
    """The turns and answers of a record. Turns that the prompt has lost are struck out."""
    n = int(bool(record.turns) and record.turns[0][0] == "System")
    system, rest = record.turns[:n], record.turns[n:]
    # the turns that give the ids of the prompt: with or without the system text, from turn `start` on
    has_system, start = next(
        ((has, start) for start in range(len(rest)) for has in (True, False) if prompt ==
         [tokenizer.bos_id, *tokenizer.encode(data.render(system * has + rest[start:]))]), (True, 0))
    lines = [(role, text, i < n + start if i >= n else not has_system)
             for i, (role, text) in enumerate(record.turns)]
    answers = {"answer" if record.rejected is None else "chosen": record.chosen, "rejected": record.rejected}
    lines += [(name, text, False) for name, text in answers.items() if text is not None]
    return "".join(f'<div class="turn"><b>{role}</b><span class="text{" struck" * is_lost}">'
                   f"{as_html(text)}</span></div>" for role, text, is_lost in lines)
