"""From text to batches: the tokenizer, the one template, the file formats, the split, the masks, the sampler.

1. read_records turns any file into records {"prompt", "chosen", "rejected"}, the prompt rendered in the template
2. split_records gives each of the three steps its own conversations, by a hash of the first question
3. encode_* turns a record into ids that fit; what does not fit is cut or dropped by rule, and counted
4. batches groups rows of like length, in another order every epoch; collate_* pads them into tensors

How a padded batch looks ("_" is padding: id 0 under mask 0; b BOS, e EOS, p prompt, r response):

    SFT and reward, padded right          PPO, prompts padded left, so every response starts at column P
    ids     b p p p r r e _ _             ids     _ _ b p p p | r r e _        column t of the logits predicts
    mask    1 1 1 1 1 1 1 0 0             mask    0 0 1 1 1 1 | 1 1 1 0        token t + 1, so logits[:, P-1:T-1]
    labels  . . . . r r e . .             column  0 1 2 3 4 5 | P ...          predict the response
            (. is -100: no loss there)
"""
import gzip
import hashlib
import itertools
import json
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import sentencepiece
import torch

from llama import BadInput, LlamaConfig
from lora import resolve
from runtime.ranks import say

# ------------------------------------------------------------------------------------------------ tokenizer
class Tokenizer:
    """A SentencePiece tokenizer.model, from a file or the folder that holds it. Special ids are read from it."""
    def __init__(self, path):
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            if file.stat().st_size > 2**28:
                raise OSError
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
            self.vocab_size = len(self.model)
            self.pieces()                    # raises where they are not UTF-8
        except (OSError, RuntimeError, ValueError):                # ValueError: a null character in the name
            found = "is not a SentencePiece model" if file.exists() else "there is no such file"
            raise BadInput(f"{file}: {found}; a LLaMA folder brings its tokenizer.model") from None
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise BadInput(f"{file}: has no BOS or no EOS; a LLaMA tokenizer has both")

    def encode(self, text):
        """Ids of a text, without BOS and EOS; the same call for every text of every stage."""
        return self.model.encode(text.encode("utf-8", "replace").decode())       # half a surrogate is no text

    def decode(self, ids):
        return self.model.decode(ids)

    def pieces(self):
        """All words, in the order of their ids: two tokenizers are the same if these are."""
        return self.model.id_to_piece(list(range(self.vocab_size)))

def open_tokenizer(path, base=None, longest=0):
    """(tokenizer, config, its folder) of a model folder, an adapter's own tokenizer first. BadInput where it has
    more words than the network, or the context is below `longest`. Its BOS and EOS win over config.json's."""
    full, adapter = resolve(path, base)
    folder = adapter if adapter is not None and (adapter / "tokenizer.model").exists() else full
    tokenizer, config = Tokenizer(folder), LlamaConfig.from_pretrained(full)
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {tokenizer.vocab_size} words, the weights in {full} only "
                       f"{config.vocab_size}; they do not belong together")
    if longest > config.max_position_embeddings:
        raise BadInput(f"{full}: {longest} tokens are asked for (--max-len, --max-prompt + --max-new, or "
                       f"--max-tokens), the model's context is {config.max_position_embeddings}")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if (bos, eos) != (config.bos_token_id, config.eos_token_id):
        print(f"note: {full}/config.json has BOS, EOS {config.bos_token_id}, {config.eos_token_id}; "
              f"tokenizer.model has {bos}, {eos}, which are used", file=sys.stderr)
    config.bos_token_id, config.eos_token_id = bos, eos
    return tokenizer, config, folder

# ------------------------------------------------------------------------------------------------ template
def parse_turns(text, before=r"(?:^|\n\n)"):
    """A transcript as [(role, text)]; what precedes the first turn is a system text, no Human turn a question."""
    head, *parts = re.split(before + r"\s*(Human|Assistant):", text)
    if "Human" not in parts[::2]:
        return [("Human", text.strip())]
    return clean_turns([("System", head), *zip(parts[::2], parts[1::2])])

def clean_turns(turns):
    """Strips texts, puts a system text before the next question with a blank line, drops answers to nothing."""
    cleaned, system = [], ""
    for role, text in turns:
        if role == "System":
            system += text.strip() + "\n\n" if text.strip() else ""
        elif role == "Human":
            cleaned.append((role, system + text.strip()))
            system = ""
        elif cleaned:
            cleaned.append((role, text.strip()))
    return cleaned

def render(turns):
    """The one template: turns (role, text) as the prompt that asks for the next answer."""
    turns = turns[:-1] if turns[-1] == ("Assistant", "") else turns
    return "".join(f"\n\n{role}: {text}" for role, text in turns) + "\n\nAssistant:"

# ------------------------------------------------------------------------------------------------ file formats
def read_records(path, tally=None):
    """All records of a file: JSON array, JSON lines (both perhaps gzipped) or parquet, of the rows in row_records.
    tally, a Counter, counts what was dropped. BadInput names file and line of what cannot be read."""
    tally = Counter() if tally is None else tally
    records = []
    for where, row in read_rows(Path(path)):
        try:
            records += row_records(row, tally)
        except BadInput as error:
            raise BadInput(f"{path}:{where}: {error}") from None
    if not records:
        raise BadInput(f"{path}: holds no usable rows")
    return records

MOST_TEXT, MOST_LINE, MOST_ARRAY = 2**22, 2**25, 2**29             # characters of a text; bytes of a line, of an array

def read_rows(path):
    """Yields (line or row number, row) of a file; the content decides, not the ending."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if head == b"PAR1":
                yield from read_parquet(path)
                return
            file.seek(0)
            yield from read_json_rows(path, gzip.open(file) if head[:2] == b"\x1f\x8b" else file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

def read_json_rows(path, file):
    """The rows of a JSON array, or of JSON lines; piece by piece, for a small compressed file can be a very large one."""
    start = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip() if hasattr(file, "peek") else b""
    array = start[:1] == b"["
    pieces = iter([file.read(MOST_ARRAY + 1)]) if array else iter(lambda: file.readline(MOST_LINE + 1), b"")
    for number, piece in enumerate(pieces, 1):
        where = f"{path}{'' if array else f':{number}'}"
        if len(piece) > (MOST_ARRAY if array else MOST_LINE):
            raise BadInput(f"{where}: is longer than {(MOST_ARRAY if array else MOST_LINE) >> 20} MB; it should hold a row per "
                           f"line")
        try:
            text = piece.decode("utf-8-sig" if number == 1 else "utf-8")
            value = json.loads(text) if text.strip() else []
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: is not UTF-8 text (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: is not JSON ({error})") from None
        if text.strip():
            yield from enumerate(value, 1) if array else [(number, value)]

def read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except ImportError:
        raise BadInput(f"{path}: is a parquet file; to read it: pip install pyarrow") from None
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BadInput(f"{path}: is a damaged parquet file ({str(error).splitlines()[0]})") from None

def row_records(row, tally):
    """The records of one row; its keys tell its kind, in this order, and other keys are ignored."""
    if not isinstance(row, dict):
        raise BadInput(f"is a {type(row).__name__}, expected an object with named fields")
    has = row.keys().__ge__
    if has({"chosen", "rejected", "prompt"}):                                        # rm-static
        return [record(parse_turns(text(row, "prompt")), text(row, "chosen"), text(row, "rejected"))]
    if has({"chosen", "rejected"}):                                                  # hh-rlhf: whole transcripts
        (*chosen, answer), (*rejected, other) = (parse_turns(text(row, key)) for key in ("chosen", "rejected"))
        if answer[0] != "Assistant" or other[0] != "Assistant":
            raise BadInput('chosen and rejected stand without a prompt, so each must be a transcript of "Human:" '
                           'and "Assistant:" turns that ends with an answer')
        tally["pairs whose transcripts differ before the last answer"] += chosen != rejected
        return [record(chosen, answer[1], other[1])] if chosen == rejected else []
    if has({"messages"}):
        return conversation(row, "messages", "role", "content", tally)
    if has({"conversations"}):                                                       # ShareGPT
        return conversation(row, "conversations", "from", "value", tally)
    if has({"history", "human_ref_A", "human_ref_B", "labels"}):                     # SHP: label 1 prefers A
        if row["labels"] not in (0, 1):
            raise BadInput(f"labels is {row['labels']!r}, expected 0 or 1")
        better, worse = ("human_ref_A", "human_ref_B")[::1 if row["labels"] else -1]
        return [record(parse_turns(text(row, "history")), text(row, better), text(row, worse))]
    if has({"instruction", "output"}):                                               # Alpaca
        question, extra = text(row, "instruction").strip(), text(row, "input").strip() if row.get("input") else ""
        if question.startswith("Human:"):                                            # multi-turn Alpaca
            return [record(parse_turns(question, before=r"(?:^|\s)"), text(row, "output"))]
        return [record([("Human", f"{question}\n{extra}".strip())], text(row, "output"))]
    if has({"prompt"}):
        return [record(parse_turns(text(row, "prompt")), text(row, "chosen") if has({"chosen"}) else None)]
    if has({"text"}):                                                                # pre-training: no template
        return [{"prompt": "", "chosen": text(row, "text").strip(), "rejected": None}]
    raise BadInput(f"has the fields {sorted(row)}, no kind of row that is known (README, data)")

def record(turns, chosen, rejected=None):
    chosen, rejected = chosen and chosen.strip(), rejected and rejected.strip()
    return {"prompt": render(turns), "chosen": chosen, "rejected": rejected}

def text(row, key):
    if not isinstance(row[key], str):
        raise BadInput(f"{key} is a {type(row[key]).__name__}, expected text")
    if len(row[key]) > MOST_TEXT:
        raise BadInput(f"{key} has {len(row[key]):,} characters, too many to be one text")
    return row[key]

def conversation(row, key, role_key, text_key, tally):
    """One record per assistant turn, each with what stands before it as its prompt."""
    roles = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
    said, needed = row[key], {role_key, text_key}
    if not isinstance(said, list) or not all(isinstance(m, dict) and m.keys() >= needed for m in said):
        raise BadInput(f"{key} must be a list of objects with {role_key} and {text_key}")
    if unknown := [m[role_key] for m in said if m[role_key] not in list(roles)]:
        raise BadInput(f"{key}: {role_key} {unknown[0]!r} is none of {', '.join(roles)}")
    turns = clean_turns([(roles[m[role_key]], text(m, text_key)) for m in said])
    records = [record(turns[:i], answer) for i, (role, answer) in enumerate(turns) if role == "Assistant"]
    tally["conversations without an answer"] += not records
    return records

# ------------------------------------------------------------------------------------------------ split
def split_records(records, weights, phase, seed):
    """The records of one phase, whose shares are the weights. A conversation's side is a hash of its first
    question: no question stands on two sides, and every step and rank sees the same division."""
    low, high, whole = sum(weights[:phase]), sum(weights[:phase + 1]), sum(weights)

    def place(row):
        question = next((t for role, t in parse_turns(row["prompt"]) if role == "Human"), "") or row["chosen"] or ""
        digest = hashlib.sha256(f"{seed}:{question}".encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 * whole

    return [row for row in records if low <= place(row) < high]

def load_records(files, phase, split, seed, eval_files, eval_share, tally):
    """(training, held-out) records of a phase. split, such as (4, 4, 2), divides only files of pairs, which all
    three steps can use; None gives everything. Without eval_files a share of the conversations is held out."""
    records = []
    for file in files:
        rows = read_records(file, tally)
        pairs = any(row["rejected"] is not None for row in rows)
        records += split_records(rows, split, phase, seed) if split and pairs else rows
    if eval_files:
        return records, [row for file in eval_files for row in read_records(file, tally)]
    sides = (1 - eval_share, eval_share)
    return tuple(split_records(records, sides, side, f"{seed} held out") for side in (0, 1))

def load_rows(args, phase, encode, tokenizer, max_len, batch, tally):
    """(training, held-out) rows that encode makes of this phase's records; says what was read, cut and dropped."""
    parts = load_records(args.data, phase, args.split, args.split_seed, args.eval_data, args.eval_share, tally)
    train, held_out = ([row for r in part if (row := encode(tokenizer, r, max_len, tally))] for part in parts)
    say(f"data: {len(train):,} rows to train on, {len(held_out):,} held out"
        + "".join(f"; {n:,} {what}" for what, n in tally.items() if n))
    if len(train) < batch:
        raise BadInput(f"--data: {len(train)} usable rows in this phase, fewer than one batch of {batch} "
                       f"(see --split, --max-len and the batch)")
    if not held_out:
        raise BadInput("--eval-data, --eval-share: no usable held-out rows; name a file or raise the share")
    return train, held_out

# ------------------------------------------------------------------------------------------------ ids that fit
def fit_prompt(tokenizer, prompt, room):
    """(ids, lost): the prompt with BOS, and whether it lost turns: the oldest go until it fits into `room` ids,
    but never the last question, which is returned even where it does not fit."""
    if not prompt:
        return [tokenizer.bos_id], False
    turns = parse_turns(prompt)
    for start in (i for i, (role, _) in enumerate(turns) if role == "Human"):
        ids = [tokenizer.bos_id] + tokenizer.encode(render(turns[start:]) if start else prompt)
        if len(ids) <= room:
            break
    return ids, start > 0

def encode_prompt(tokenizer, record, max_len, tally=None):
    """Ids of the prompt with BOS, at most max_len, or None where the last question alone does not fit."""
    tally = Counter() if tally is None else tally
    ids, lost = fit_prompt(tokenizer, record["prompt"], max_len)
    if not record["prompt"] or len(ids) > max_len:
        tally["rows dropped: " + ("the last question does not fit" if record["prompt"] else "no prompt")] += 1
        return None
    tally["prompts that lost their oldest turns"] += lost
    return ids

def encode_sft(tokenizer, record, max_len, tally=None):
    """(ids, n_prompt), BOS prompt answer EOS in at most max_len, or None. Old turns go before the answer does; one
    still too long is cut, and gets no EOS: nobody should learn to stop in mid-sentence."""
    tally = Counter() if tally is None else tally
    answer = tokenizer.encode((record["chosen"] or "").strip()) + [tokenizer.eos_id]
    prompt, lost = fit_prompt(tokenizer, record["prompt"], max_len - len(answer))
    if len(answer) == 1 or len(prompt) >= max_len:
        tally["rows dropped: " + ("no answer" if len(answer) == 1 else "the last question does not fit")] += 1
        return None
    tally["prompts that lost their oldest turns"] += lost
    tally["answers cut"] += len(prompt) + len(answer) > max_len
    return (prompt + answer)[:max_len], len(prompt)

def encode_pair(tokenizer, record, max_len, tally=None):
    """(chosen_ids, rejected_ids, n_prompt) with one prompt, or None: no answer is ever cut."""
    tally = Counter() if tally is None else tally
    chosen, rejected = (tokenizer.encode((record[key] or "").strip()) + [tokenizer.eos_id]
                        for key in ("chosen", "rejected"))
    room = max_len - max(len(chosen), len(rejected))
    prompt, lost = fit_prompt(tokenizer, record["prompt"], room)
    empty, same = min(len(chosen), len(rejected)) == 1, chosen == rejected
    if empty or same or len(prompt) > room:
        tally["pairs dropped: " + ("an answer is empty" if empty else "identical" if same else "too long")] += 1
        return None
    tally["prompts that lost their oldest turns"] += lost
    return prompt + chosen, prompt + rejected, len(prompt)

# ------------------------------------------------------------------------------------------------ batches
def batches(lengths, batch, seed, epoch):
    """Lists of `batch` row numbers, of like length within a list (little padding), in another order every epoch.
    The rows left over sit this epoch out; which ones changes with the epoch."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order = order[:len(order) // batch * batch]
    pool = 50 * batch                        # sort within pools of rows: like lengths, yet random company
    order = [i for at in range(0, len(order), pool) for i in sorted(order[at:at + pool], key=lambda i: lengths[i])]
    groups = [order[at:at + batch] for at in range(0, len(order), batch)]
    rng.shuffle(groups)
    return groups

def stream(lengths, batch, seed, start=0):
    """Yields (epoch, row numbers) of batch after batch, epoch after epoch, from the start-th batch on."""
    per_epoch = len(lengths) // batch
    for epoch in itertools.count(start // per_epoch):
        yield from ((epoch, rows) for rows in batches(lengths, batch, seed, epoch)[start % per_epoch:])
        start = 0

def deal(rows, rank, world, micro):
    """This rank's share of a global batch, in micro-batches; dealt like cards: ranks get like lengths."""
    mine = rows[rank::world]
    return [mine[at:at + micro] for at in range(0, len(mine), micro)]

def pad(rows, left=False):
    """ids and mask (B,T) of lists of ids of different lengths, padded on the right or left."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(T - len(row), T) if left else slice(len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), True
    return ids, mask

def collate_sft(rows):
    """[(ids, n_prompt)] -> ids, mask, labels (B,T); labels are the ids of the response and EOS, -100 elsewhere."""
    ids, mask = pad([row for row, _ in rows])
    n_prompt = torch.tensor([n for _, n in rows])[:, None]
    return ids, mask, ids.masked_fill(~mask | (torch.arange(ids.shape[1]) < n_prompt), -100)

def collate_pairs(rows):
    """[(chosen_ids, rejected_ids, n_prompt)] -> ids, mask (2B,T), chosen first; starts (B,), where they part."""
    ids, mask = pad([chosen for chosen, _, _ in rows] + [rejected for _, rejected, _ in rows])
    starts = [next(t for t, (a, b) in enumerate(zip(chosen, rejected)) if a != b) for chosen, rejected, _ in rows]
    return ids, mask, torch.tensor(starts)

def collate_prompts(rows):
    """[ids] -> ids, mask (B,P), padded on the left, so that every response starts at column P."""
    return pad(rows, left=True)
