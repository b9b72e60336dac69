"""From text to batches: the tokenizer, the one template, the file formats, the split, the masks, the sampler.

1. read_records turns any file into Records: the turns of a conversation, then an answer, perhaps a worse one
2. split_records gives each of the three steps its own conversations, by a hash of the first question
3. encode_* turns a Record into ids that fit; what does not fit is cut or dropped by rule, and counted
4. batches groups rows of like length, in another order every epoch; collate_* pads them into tensors

How a padded batch looks ("_" is padding: id 0 under mask 0; b BOS, e EOS, p prompt, r response):

    SFT and reward, padded right        PPO, prompts padded left, so every response starts at column P
    ids     b p p p r r e _ _           ids     _ _ b p p p | r r e _       column t of the logits predicts
    mask    1 1 1 1 1 1 1 0 0           mask    0 0 1 1 1 1 | 1 1 1 0       token t + 1, so logits[:, P-1:T-1]
    labels  . . . . r r e . .           column  0 1 2 3 4 5 | P ...         predict the response
            (. is -100: no loss there)
"""
import hashlib
import itertools
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama import LlamaConfig
from lora import resolve
from runtime.errors import BadInput, note
from runtime.folders import read_json
from runtime.kinds import Turns, check_columns, read_examples
from runtime.ranks import say
from runtime.rows import data_sizes
from runtime.tokenizer_read import JsonTokenizer, choose_tokenizer, read_tokenizer
from runtime.votes import are_votes

# ------------------------------------------------------------ tokenizer
class Tokenizer:
    """The tokenizer of a model's folder, or of a file: SentencePiece's tokenizer.model where there is one,
    else tokenizer.json. In training eos_id ends an answer; a sampled answer ends at any of eos_ids.
    model_folder: the base of an adapter that brings the tokenizer; it may name further eos_ids."""

    def __init__(self, path: str | Path, model_folder: str | Path | None = None):
        files = read_tokenizer(path, model_folder)
        self.model = JsonTokenizer(files) if isinstance(files.model, dict) else files.model
        self.file, self.vocab_size = files.file, len(files.pieces)
        self.bos_id, self.eos_id, self.pad_id = files.bos_id, files.eos_ids[0], files.pad_id
        self.eos_ids = files.eos_ids
        # SentencePiece puts a space before every text and takes it away in decode; byte-level BPE does
        # neither
        self.puts_space = self.encode("a") + self.encode("b") == self.encode("a b")
        self.keeps_space = self.model.decode(self.encode_answer("a")) == " a"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. Special tokens that are written in the text are plain text."""
        # JSON can hold half of a surrogate pair, which is not a character; "?" takes its place
        return self.model.encode(text.encode("utf-8", "replace").decode())

    def encode_answer(self, text: str) -> list[int]:
        """Ids of the answer to a prompt. The space between them belongs to the answer's first token. That is
        why the template has none after "Assistant:", and why prompt and answer encoded apart are the ids of
        "prompt answer" encoded at once."""
        text = text.strip()
        return self.encode(text if self.puts_space or not text else f" {text}")

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without the space before an answer. Special ids give nothing."""
        text = self.model.decode(ids)
        return text.removeprefix(" ") if self.keeps_space else text

    def pieces(self) -> list[str]:
        """All tokens as text, in the order of their ids."""
        return self.model.id_to_piece(list(range(self.vocab_size)))

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether both have the same pieces, BOS and EOS, so that ids mean the same to their models."""
        return (self.bos_id, self.eos_id, self.pieces()) == (other.bos_id, other.eos_id, other.pieces())

def open_tokenizer(path: str | Path, base: str | None = None,
                   longest: int = 0) -> tuple[Tokenizer, LlamaConfig, Path]:
    """(tokenizer, config, the tokenizer's folder) of a model folder. An adapter's own tokenizer comes before
    that of its base. The config returned has the tokenizer's BOS, EOS and pad. BadInput where the tokenizer
    has more tokens than the network, or the network's context is below `longest` tokens."""
    full, adapter = resolve(path, base)
    folder = choose_tokenizer(full, adapter)
    tokenizer, config = Tokenizer(folder, full), LlamaConfig.from_pretrained(full)
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {tokenizer.vocab_size} words, the weights in {full} "
                       f"only {config.vocab_size}; they do not belong together")
    if longest > config.context:
        raise BadInput(f"{full}: {longest} tokens are asked for (--max-len, --max-prompt + --max-new, or "
                       f"--max-tokens), the model's context is {config.context}")
    bos, eos, ends = tokenizer.bos_id, tokenizer.eos_id, config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if bos != config.bos_token_id or eos not in ends or any(end not in tokenizer.eos_ids for end in ends):
        more = f"; an answer ends at each of {tokenizer.eos_ids}" if len(tokenizer.eos_ids) > 1 else ""
        note(f"{full}/config.json has BOS, EOS {config.bos_token_id}, {config.eos_token_id}; "
             f"{tokenizer.file.name} has {bos}, {eos}, which are used{more}")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = bos, eos, tokenizer.pad_id
    return tokenizer, config, folder

# ------------------------------------------------------------ template
@dataclass
class Record:
    """What the reader of every file format makes: the turns before the answer, the answer, and the worse
    answer of a pair. turns is a list of (role, text): perhaps one System, then Human, and between the Humans
    Assistants. A plain text has no turns; the text is `chosen`."""
    turns: Turns
    chosen: str | None = None
    rejected: str | None = None

    @property
    def prompt(self) -> str:
        """The turns in the template, or "" where there are none."""
        return render(self.turns)

STOP = "\n\nHuman:"                          # where a model writes this, its answer has ended

def render(turns: Turns) -> str:
    """The one template: "\\n\\nHuman: why?\\n\\nAssistant:" asks for the answer that follows the turns."""
    if not turns:
        return ""
    return "".join(f"\n\n{role}: {text}" for role, text in join_system(turns)) + "\n\nAssistant:"

def join_system(turns: Turns) -> Turns:
    """The same turns, but the system text stands before the first question, with a blank line between."""
    if turns[0][0] != "System":
        return turns
    (_, system), (role, question), *rest = turns
    return [(role, f"{system}\n\n{question}"), *rest]

# ------------------------------------------------------------ files
def read_records(path: str | Path, tally: Counter | None = None,
                 columns: dict[str, str] | None = None) -> list[Record]:
    """All records of a file, or of a folder of files (runtime/rows.py), with rows of any known kind
    (runtime/kinds.py). tally counts what is dropped. columns, such as {"prompt": "question"}, gives the
    file's field for a field that is known; a row may lack it (load_rows checks that the files have it).
    BadInput names the file and the line of what cannot be read."""
    tally = Counter() if tally is None else tally
    before = Counter(tally)
    records = [Record(*example) for example in read_examples(path, tally, columns or {})]
    if not records:
        raise BadInput(f"{path}: holds no usable rows{in_words(tally - before)}")
    return records

def in_words(tally: Counter) -> str:
    """; 3 answers cut; 2 pairs dropped: identical"""
    return "".join(f"; {n:,} {what}" for what, n in tally.items() if n)

# ------------------------------------------------------------ split
def split_records(records: list[Record], weights: Sequence[float], phase: int,
                  seed: int | str) -> list[Record]:
    """The records of one phase; weights are the shares of the phases. A hash of the first question decides,
    so no question is in two phases, and every step and rank sees the same division."""
    low, high, whole = sum(weights[:phase]), sum(weights[:phase + 1]), sum(weights)

    def place(record):                       # from 0 to whole
        digest = hashlib.sha256(f"{seed}:{first_question(record)}".encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 * whole

    return [record for record in records if low <= place(record) < high]

def first_question(record: Record) -> str:
    """The first question with the system text before it; of a plain text, the text."""
    question = join_system(record.turns)[0][1].strip() if record.turns else ""
    return question or record.chosen or ""

def is_for_all_steps(file: str, records: list[Record]) -> bool:
    """Whether the three steps divide the file: it holds pairs, and not a person's votes, which are few."""
    return any(record.rejected is not None for record in records) and not are_votes(file)

def load_records(files: Iterable[str], phase: int, split: Sequence[float] | None, seed: int,
                 eval_files: Iterable[str] | None, eval_share: float, tally: Counter,
                 columns: dict[str, str] | None = None) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records of a phase. split, such as (4, 4, 2), divides files or folders with pairs,
    which all three steps can use; None divides nothing. Without eval_files, eval_share of the conversations
    is held out."""
    records = []
    for file in files:
        of_file = read_records(file, tally, columns)
        is_divided = bool(split) and is_for_all_steps(file, of_file)
        is_one_side = len(of_file) > 1 and len({first_question(record) for record in of_file}) == 1
        if is_one_side and (is_divided or not eval_files):
            tally[f"rows of {file} all begin with the same question, which decides the split: name held-out "
                  f"files by --eval-data"] = len(of_file)
        records += split_records(of_file, split, phase, seed) if is_divided else of_file
    if eval_files:
        return records, [record for file in eval_files for record in read_records(file, tally, columns)]
    # Another seed than the split's: with the same one, the held-out questions would be those with the highest
    # hashes. All of these lie in the last phase, and the other phases would have none.
    sides, other_seed = (1 - eval_share, eval_share), f"{seed} held out"
    return split_records(records, sides, 0, other_seed), split_records(records, sides, 1, other_seed)

def check_split(args: Namespace, folders: Iterable[str | Path]) -> None:
    """BadInput where a folder that this run starts from was trained on one of this run's files of pairs under
    another --split or --split-seed: the steps would then share rows that should be apart. The folder's
    args.json, which every run writes, has its flags and the names and sizes of its files."""
    def named(split, seed):
        shares = [str(share).removesuffix(".0") for share in split] if isinstance(split, list) else ["none"]
        return f"{','.join(shares)} with seed {seed}"

    def division(split, seed):               # 8,8,4 divides as 4,4,2 does
        numbers = isinstance(split, list) and all(isinstance(share, int | float) for share in split)
        return [share / sum(split) for share in split] if numbers and sum(split) else None, seed

    for folder in folders:
        earlier = {}
        with suppress(BadInput):             # no args.json, or another program's
            earlier = read_json(Path(folder) / "args.json")
        sizes, theirs = earlier.get("data_sizes"), (earlier.get("split"), earlier.get("split_seed"))
        ours = args.split, args.split_seed
        if not isinstance(sizes, dict) or division(*theirs) == division(*ours):
            continue
        for path in args.data:
            known = [name for name, size in data_sizes([path]).items() if sizes.get(name) == size]
            if known and is_for_all_steps(path, read_records(path, columns=args.columns)):
                raise BadInput(f"--split, --split-seed: {folder} was trained on {known[0]} divided by "
                               f"{named(*theirs)}, this run divides it by {named(*ours)}; rows would "
                               f"be seen by two steps")

def load_rows(args: Namespace, phase: int, encode: Callable, tokenizer: Tokenizer, max_len: int, batch: int,
              folders: Iterable[str | Path] = (), tally: Counter | None = None) -> tuple[list, list]:
    """(training, held-out) rows that encode makes of this phase's records: 0 for sft.py, 1 for reward.py, 2
    for ppo.py. Rank 0 prints how many there are and what was cut and dropped. args: the flags of
    add_trainer_flags and --data. folders are those that this run starts from (see check_split)."""
    tally = Counter() if tally is None else tally
    check_columns(args.columns or {}, args.data)
    sides = load_records(args.data, phase, args.split, args.split_seed, args.eval_data, args.eval_share,
                         tally, args.columns)
    check_split(args, folders)
    train, held_out = ([row for record in records if (row := encode(tokenizer, record, max_len, tally))]
                       for records in sides)
    say(f"data: {len(train):,} rows to train on, {len(held_out):,} held out"
        + in_words(tally))
    lost = sum(n for what, n in tally.items() if "dropped" in what or "same question" in what)
    flag = "--rollout-batch" if hasattr(args, "rollout_batch") else "--batch"
    # where most rows were lost, the tally says why; else the flags may be the reason
    why = ("" if lost > len(train) else " (see --split and --max-len)") + in_words(tally)
    if len(train) < batch:
        raise BadInput(f"--data: {len(train)} usable rows in this phase, fewer than one batch: {flag} "
                       f"{batch} has to be smaller, or the rows more{why}")
    if not held_out:
        raise BadInput(f"--eval-data, --eval-share: no usable held-out rows"
                       f"{in_words(tally) if lost else '; name a file, or raise the share, as in 0.2'}")
    return train, held_out

# ------------------------------------------------------------ ids that fit
def fit_prompt(tokenizer: Tokenizer, turns: Turns, room: int) -> tuple[list[int], list[str]]:
    """(ids, lost): the prompt with BOS, shortened until it fits into `room` ids, and the keys of a tally that
    name what it lost. The oldest turns are removed first. The system text is removed only if it does not fit
    beside the last question. The last question is never removed, even if it is too long."""
    if not turns:
        return [tokenizer.bos_id], []
    questions = [i for i, (role, _) in enumerate(turns) if role == "Human"]
    system = turns[:questions[0]]            # the System turn, or nothing
    attempts = [system + turns[start:] for start in questions]     # ever fewer turns
    attempts += [turns[start:] for start in questions] if system else []
    for kept in attempts:
        ids = [tokenizer.bos_id] + tokenizer.encode(render(kept))
        if len(ids) <= room:
            break
    lost_system = bool(system) and kept[0] != system[0]
    lost_turns = len(kept) + lost_system < len(turns)
    return ids, (["prompts that lost their oldest turns"] if lost_turns else []) + (
        ["prompts that lost their system text"] if lost_system else [])

def encode_answer(tokenizer: Tokenizer, record: Record, answer: str | None) -> list[int]:
    """Ids of an answer of the record and EOS; EOS alone where there is none. A text without a prompt gets no
    space before it."""
    answer = (answer or "").strip()
    ids = tokenizer.encode_answer(answer) if record.turns else tokenizer.encode(answer)
    return ids + [tokenizer.eos_id]

def encode_prompt(tokenizer: Tokenizer, record: Record, max_len: int,
                  tally: Counter | None = None) -> list[int] | None:
    """Ids of the prompt with BOS, at most max_len, or None where the last question alone does not fit."""
    tally = Counter() if tally is None else tally
    ids, lost = fit_prompt(tokenizer, record.turns, max_len)
    if not record.turns or len(ids) > max_len:
        why = "the last question does not fit" if record.turns else "no prompt"
        tally[f"rows dropped: {why}"] += 1
        return None
    tally.update(lost)
    return ids

def encode_sft(tokenizer: Tokenizer, record: Record, max_len: int,
               tally: Counter | None = None) -> tuple[list[int], int] | None:
    """(ids, n_prompt): BOS, prompt, answer and EOS in at most max_len ids, or None. The prompt is shortened
    before the answer is. An answer that is still too long is cut and gets no EOS: the model must not learn to
    stop in mid-sentence."""
    tally = Counter() if tally is None else tally
    answer = encode_answer(tokenizer, record, record.chosen)
    prompt, lost = fit_prompt(tokenizer, record.turns, max_len - len(answer))
    if len(answer) == 1 or len(prompt) >= max_len:
        why = "no answer" if len(answer) == 1 else "the last question does not fit"
        tally[f"rows dropped: {why}"] += 1
        return None
    tally.update(lost)
    tally["answers cut"] += len(prompt) + len(answer) > max_len
    return (prompt + answer)[:max_len], len(prompt)

def encode_pair(tokenizer: Tokenizer, record: Record, max_len: int,
                tally: Counter | None = None) -> tuple[list[int], list[int], int] | None:
    """(chosen_ids, rejected_ids, n_prompt), or None. Both have the same prompt of n_prompt ids, shortened for
    the longer answer. No answer is cut: the reward model must judge whole answers. (Its loss needs no
    n_prompt: collate_pairs finds where the two texts differ.)"""
    tally = Counter() if tally is None else tally
    chosen, rejected = (encode_answer(tokenizer, record, answer)
                        for answer in (record.chosen, record.rejected))
    room = max_len - max(len(chosen), len(rejected))
    prompt, lost = fit_prompt(tokenizer, record.turns, room)
    empty, same = min(len(chosen), len(rejected)) == 1, chosen == rejected
    if empty or same or len(prompt) > room:
        why = "pairs dropped: an answer is empty" if empty else "pairs dropped: identical" if same else (
            "pairs dropped: too long")
        tally["rows dropped: not a pair of answers" if record.rejected is None else why] += 1
        return None
    tally.update(lost)
    return prompt + chosen, prompt + rejected, len(prompt)

# ------------------------------------------------------------ batches
def batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Lists of `batch` row numbers. The rows of one list have like lengths, so that little is padding. The
    order is another one in every epoch. The rows that fill no batch are left out of the epoch; the next
    leaves out others."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order = order[:len(order) // batch * batch]
    pool = 50 * batch                        # sorted in random pools, so every epoch has other batches
    for at in range(0, len(order), pool):
        order[at:at + pool] = sorted(order[at:at + pool], key=lambda row: lengths[row])
    groups = [order[at:at + batch] for at in range(0, len(order), batch)]
    rng.shuffle(groups)
    return groups

def stream(lengths: Sequence[int], batch: int, seed: int, done: int = 0,
           steps: int | None = None) -> Iterator[tuple[int, int, list[int]]]:
    """Yields (step, epoch, row numbers) for the steps done + 1, done + 2, ... up to `steps`, or without end.
    A resumed run gets the batches that it would have got without the stop."""
    per_epoch = len(lengths) // batch
    for step in itertools.count(done + 1) if steps is None else range(done + 1, steps + 1):
        epoch, at = divmod(step - 1, per_epoch)
        if at == 0 or step == done + 1:
            groups = batches(lengths, batch, seed, epoch)
        yield step, epoch, groups[at]

def micro_batches(rows: list, rank: int, world: int, micro: int) -> list[list]:
    """This rank's share of a global batch, in lists of `micro` rows. A rank takes every world-th row, not a
    run of them: the rows come sorted by length, and all ranks should have as much to do."""
    mine = rows[rank::world]
    return [mine[at:at + micro] for at in range(0, len(mine), micro)]

def pad(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """ids and mask (B,T) of lists of ids of different lengths, padded on the right or left."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(T - len(row), T) if left else slice(len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), True
    return ids, mask

def collate_sft(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """[(ids, n_prompt)] -> ids, mask, labels (B,T); labels are the ids of the response and EOS, -100
    elsewhere."""
    ids, mask = pad([row for row, _ in rows])
    n_prompt = torch.tensor([n for _, n in rows])[:, None]         # (B, 1)
    labels = ids.masked_fill(~mask | (torch.arange(ids.shape[1]) < n_prompt), -100)
    assert (labels[:, 0] == -100).all()      # column 0 is BOS: no column of the logits predicts it
    return ids, mask, labels

def collate_pairs(rows: list[tuple[list[int], list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """[(chosen_ids, rejected_ids, n_prompt)] -> ids, mask (2B,T), the chosen answers first, and starts (B,):
    the first column in which the two texts of a pair differ."""
    ids, mask = pad([chosen for chosen, _, _ in rows] + [rejected for _, rejected, _ in rows])
    starts = [next(t for t, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
              for chosen, rejected, _ in rows]
    return ids, mask, torch.tensor(starts)

def collate_prompts(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[ids] -> ids, mask (B,P), padded on the left, so that every response starts at column P."""
    ids, mask = pad(rows, left=True)
    assert mask[:, -1].all()                 # the last token of every prompt is at column P - 1
    return ids, mask
