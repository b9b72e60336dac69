"""Votes of people between two answers: the file, the conversations that they are given in, the tally, and
the models in order of strength.

A file of votes has one JSON object per line. It is only ever appended to, each line in one write, so several
programs can write to the same file. {"undo": id} takes the vote with that id back. chat.py and the web page
write such files, and reward.py reads them as preference pairs.

    python -m runtime.votes FILE             # what chat.py shows at /votes, and the strength of each model
"""
import fcntl
import json
import math
import os
import random
import sys
import time
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from runtime.errors import BadInput, exit_with_one_line, note, without_controls
from runtime.rows import data_files, read_rows

KEYS = ("a", "b", "t", "s")                  # left is better, right is better, a tie, skipped
ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
FIELDS = {"id", "prompt", "chosen", "rejected", "vote", "left", "right", "models"}
POINTS = 400 / math.log(10)                  # Elo's scale: 400 points are odds of 10 to 1

@dataclass
class Pair:
    """Two answers to one question, as they are shown; which model stands left is drawn by lot."""
    turns: list[tuple[str, str]]             # (role, text), up to the question
    texts: list[str]                         # of the left answer and of the right one
    models: list[str]                        # the folders, in the same order
    shown: float = field(default_factory=time.monotonic)

    def names(self) -> str:
        """What is said after the vote; "" where one model has answered twice."""
        left, right = map(without_controls, self.models)
        return "" if left == right else f"A was {left}, B was {right}"

def open_votes(args: Namespace) -> "VoteFile | None":
    """The file of --vote. BadInput where the other flags do not go with it."""
    if args.prompts and not args.vote:
        raise BadInput("--prompts has the questions of a vote; give --vote FILE too")
    check_vote(args)
    return VoteFile(args.vote) if args.vote else None

def check_vote(args: Namespace):
    """BadInput where there would be no two answers to vote on."""
    if not args.vote:
        return
    if not args.versus or args.prompt is not None:
        raise BadInput("--vote needs --versus, a second model or the same one again, and no --prompt")
    if args.temperature == 0 and Path(args.model).resolve() == Path(args.versus).resolve():
        raise BadInput("--vote: at --temperature 0 a model gives the same answer twice")

def draw_sides() -> list[int]:
    """[0, 1] or [1, 0]: which of two models answers left, and which right."""
    return random.SystemRandom().sample([0, 1], 2)

def hidden(speakers: list) -> list:
    """Two speakers of a chat under the names A and B, in an order that is drawn by lot."""
    return [replace(speakers[i], name=side) for i, side in zip(draw_sides(), "AB", strict=True)]

def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": text} for role, text in turns]

# ------------------------------------------------------------ the file
class VoteFile:
    """The file that the votes go to. An existing one is continued; BadInput where it holds something else, or
    cannot be written."""

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self.given = []                      # votes of this program, those taken back left out
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is no ordinary file")
            self.path.open("a").close()
            if self.path.open("rb").read(1) not in (b"", b"{"):
                raise OSError("it does not hold JSON lines, to which a line can be added")
        except (OSError, ValueError) as error:         # ValueError: a null character in the name
            raise BadInput(f"--vote {path}: cannot be written ({error.args[-1]})") from None
        self.asked = Counter(json.dumps(vote["prompt"]) for vote in standing_votes(self.path))

    def was_asked(self, turns: list[tuple[str, str]]) -> bool:
        """Whether somebody has voted on this prompt, or has skipped it."""
        return self.asked[json.dumps(as_messages(turns))] > 0

    def add(self, pair: Pair, key: str, temperature: float, seed: int | None) -> dict:
        """Writes the vote: a key of KEYS. BadInput where it cannot be written; it can then be repeated."""
        chosen = {"a": 0, "b": 1}.get(key)
        better, worse = (None, None) if chosen is None else (pair.texts[chosen], pair.texts[1 - chosen])
        vote = {"id": uuid.uuid4().hex[:16], "prompt": as_messages(pair.turns), "chosen": better,
                "rejected": worse, "vote": key, "left": pair.texts[0], "right": pair.texts[1],
                "models": pair.models, "temperature": temperature, "seed": seed,
                "seconds": round(time.monotonic() - pair.shown, 1),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.append(vote)
        self.asked[json.dumps(vote["prompt"])] += 1
        self.given.append(vote)
        return vote

    def undo(self, vote: dict | None = None) -> dict | None:
        """Takes a vote of this program back, by default the last one, and returns it; None where there is
        none, or where it has been taken back already."""
        vote = self.given[-1] if vote is None and self.given else vote
        if vote not in self.given:
            return None
        self.append({"undo": vote["id"]})
        self.asked[json.dumps(vote["prompt"])] -= 1
        self.given.remove(vote)
        return vote

    def append(self, row: dict):
        """Adds a line in one write, whole or not at all. A line that another program has left torn stays a
        line of its own."""
        line = json.dumps(row).encode() + b"\n"
        try:
            if not self.path.exists():
                note(f"{self.path} has vanished; a new one is begun")
            with open(self.path, "ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)       # until the file is closed
                size = os.fstat(file.fileno()).st_size
                line = b"\n" * (not ends_with_newline(self.path, size)) + line
                try:
                    if file.write(line) < len(line):
                        raise OSError("no space left on the device")
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise BadInput(f"{self.path}: the vote is not saved ({error.strerror or error}); try again when "
                           f"it can be written") from None

def ends_with_newline(path: Path, size: int) -> bool:
    if not size:
        return True
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"

# ------------------------------------------------------------ conversations
# For each question, the answers of all speakers.
History = list[tuple[str, list[str]]]

def winner(vote: dict) -> str | None:
    """The answer with which a conversation goes on after a vote: at a tie the left one. None after a skip,
    except where both answers are the same."""
    if vote["vote"] == "s" and vote["left"] != vote["right"]:
        return None
    return vote["right" if vote["vote"] == "b" else "left"]

@dataclass
class Conversation:
    """A conversation with one model or with two, in which every answer can be undone."""
    votes: VoteFile | None = None
    history: History = field(default_factory=list)
    past: list[str] = field(default_factory=list)                  # the same as the page shows it
    before: list[tuple[History, list[str], dict | None]] = field(default_factory=list)     # see go_on

    def turns(self, i: int, question: str = "", is_again: bool = False) -> list[tuple[str, str]]:
        """The turns (role, text) of the human and speaker i, up to a question where there is one. is_again:
        it is the last one once more."""
        turns = []
        for asked, answers in self.history[:-1] if is_again else self.history:
            turns += [("Human", asked), ("Assistant", answers[i])]
        return [*turns, ("Human", question)] if question else turns

    def go_on(self, question: str, answers: list[str] | None, vote: dict | None = None,
              is_again: bool = False, shown: str = ""):
        """Adds a question and its answers, which take the place of the last ones where is_again. None: the
        question was skipped. `before` gets the conversation as it was, and the vote."""
        self.before.append(([*self.history], [*self.past], vote))
        if answers is not None:
            at = slice(len(self.history) - is_again, None)
            self.history[at], self.past[at] = [(question, answers)], [shown]

    def undo(self) -> str:
        """Goes back to the conversation before the last answer or skip, and takes the vote on it back.
        Returns what was done; BadInput where there is nothing to undo."""
        if not self.before:
            raise BadInput("nothing has been said yet")
        vote = self.before[-1][2]
        is_undone = vote and self.votes.undo(vote)         # BadInput on a full disk: nothing has changed
        self.history, self.past, _ = self.before.pop()
        return f"the {'skip' if vote['vote'] == 's' else 'vote'} is taken back" if is_undone else "forgotten"

    def clear(self):
        self.history, self.past, self.before = [], [], []

# ------------------------------------------------------------ reading
def is_vote(row: object) -> bool:
    return (isinstance(row, dict) and row.keys() >= FIELDS and isinstance(row["id"], str)
            and row["vote"] in KEYS and isinstance(row["models"], list) and len(row["models"]) == 2)

def is_undo(row: object) -> bool:
    return isinstance(row, dict) and row.keys() == {"undo"} and isinstance(row["undo"], str)

def read_lines(path: Path) -> list[dict]:
    """The lines of a file of votes; one that is empty, or has vanished, has none. BadInput where a line is
    something else."""
    rows = list(read_rows(path)) if path.exists() and path.stat().st_size else []
    for where, row in rows:
        if not is_vote(row) and not is_undo(row):
            raise BadInput(f"--vote: {where} is no vote; name another file, or one that is not there yet")
    return [row for _, row in rows]

def standing_votes(path: str | Path) -> list[dict]:
    """The votes of a file without those that were taken back."""
    lines = read_lines(Path(path))
    undone = {line["undo"] for line in lines if "undo" in line}
    return list({line["id"]: line for line in lines if "id" in line and line["id"] not in undone}.values())

def only_decided(rows: Iterator[tuple[str, object]], tally: Counter) -> Iterator[tuple[str, object]]:
    """Passes (where, row) on. Votes come after the other rows, as pairs. Ties, skips and votes that were
    taken back are left out and counted."""
    votes, undone = {}, set()
    for where, row in rows:
        if is_vote(row):
            votes[row["id"]] = where, row
        elif is_undo(row):
            undone.add(row["undo"])
        else:
            yield where, row
    for name, (where, row) in votes.items():
        if name in undone:
            tally["votes left out: taken back"] += 1
        elif row["vote"] in ("a", "b"):
            yield where, {name: row[name] for name in ("prompt", "chosen", "rejected")}
        else:
            tally[f"votes left out: {'ties' if row['vote'] == 't' else 'skips'}"] += 1

def are_votes(path: str | Path) -> bool:
    """Whether a data file or folder begins with a vote."""
    first = next(read_rows(data_files(path)[0]), (None, None))
    return is_vote(first[1])

# ------------------------------------------------------------ the tally
def wilson(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927)."""
    z, share = 1.96, wins / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)        # rounding may leave [0, 1]

def in_share(wins: float, n: int) -> str:
    """31 of 50 (62 %; 95 % interval: 48 to 74 %)"""
    if not n:
        return "0 of 0"
    low, high = wilson(wins, n)
    return f"{wins} of {n} ({100 * wins / n:.0f} %; 95 % interval: {100 * low:.0f} to {100 * high:.0f} %)"

def tally_lines(votes: list[dict]) -> list[str]:
    """Lines that say who won: for each two models, and then for answer A (left) and the longer answer."""
    if not votes:
        return ["no votes yet"]
    lines = []
    for models in dict.fromkeys(tuple(sorted(vote["models"])) for vote in votes):
        theirs = [vote for vote in votes if tuple(sorted(vote["models"])) == models]
        kinds = Counter(vote["vote"] for vote in theirs)
        won = Counter(vote["models"]["ab".index(vote["vote"])] for vote in theirs if vote["vote"] in "ab")
        first, second = sorted(models, key=lambda model: -won[model])
        n = kinds["a"] + kinds["b"]
        line = (f"{n} vote{'s' * (n != 1)} between two answers of {first}" if first == second else
                f"{first} was better than {second} in {in_share(won[first], n)}")
        lines.append(f"{line}; ties: {kinds['t']}, skips: {kinds['s']}")
    left, longer = habits(votes)
    lines.append(f"answer A was chosen in {in_share(*left)}, the longer answer in {in_share(*longer)}")
    return [without_controls(line) for line in lines]

def habits(votes: list[dict]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(times, of so many) that the left answer was chosen, and the longer one where the lengths differ."""
    decided = [vote for vote in votes if vote["vote"] in ("a", "b")]
    unequal = [vote for vote in decided if len(vote["left"]) != len(vote["right"])]
    longer = sum(len(vote["chosen"]) > len(vote["rejected"]) for vote in unequal)
    return (sum(vote["vote"] == "a" for vote in decided), len(decided)), (longer, len(unequal))

# ------------------------------------------------------------ the models in order
def bradley_terry(wins: np.ndarray, steps: int = 500) -> np.ndarray:
    """Strengths (..., M) of M models; wins (..., M, M) says how often the row's model was better than the
    column's. The chance that i beats j is the sigmoid of strength i minus strength j (Bradley and Terry,
    1952), found by Hunter's algorithm (2004). Each model also gets one win and one defeat against a model of
    strength 0: without them, one that has never lost would be infinitely strong."""
    games, odds = wins + wins.swapaxes(-1, -2), np.ones(wins.shape[:-1])     # odds against strength 0
    for _ in range(steps):
        met = (games / (odds[..., :, None] + odds[..., None, :])).sum(-1) + 2 / (odds + 1)
        odds = (wins.sum(-1) + 1) / met
    return np.log(odds)

def ranking(votes: list[dict], resamples: int = 1000) -> list[tuple[str, float, float, float, int]]:
    """(model, points, low, high, votes) from the strongest to the weakest. A tie counts as half a win of
    each; the 95 % interval is that of a bootstrap over the votes."""
    votes = [vote for vote in votes if vote["vote"] != "s" and len(set(vote["models"])) == 2]
    models = sorted({model for vote in votes for model in vote["models"]})
    table = np.zeros((len(votes), len(models), len(models)))
    for row, vote in zip(table, votes, strict=True):
        left, right = map(models.index, vote["models"])
        row[left, right], row[right, left] = {"a": (1, 0), "b": (0, 1), "t": (0.5, 0.5)}[vote["vote"]]
    if not votes:
        return []
    drawn = np.random.default_rng(0).multinomial(len(votes), np.full(len(votes), 1 / len(votes)), resamples)
    points = POINTS * bradley_terry(table.sum(0))
    spread = POINTS * bradley_terry(np.einsum("rv,vij->rij", drawn, table))
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    n = (table + table.swapaxes(1, 2)).sum((0, 2))
    order = np.argsort(-points)
    return [(models[i], *map(float, (points[i], low[i], high[i])), round(n[i])) for i in order]

def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise BadInput("usage: python -m runtime.votes FILE")
    if not Path(sys.argv[1]).exists():
        raise BadInput(f"{sys.argv[1]}: there is no such file")
    votes = standing_votes(sys.argv[1])
    print("\n".join(tally_lines(votes)))
    ranks = ranking(votes)
    if len(ranks) > 2:                       # of two models the tally has said it all
        print("\nstrength in points (100 more: better in 64 % of the votes), with its 95 % interval")
        for model, points, low, high, n in ranks:
            print(f"{points:6.0f}  ({low:.0f} to {high:.0f})  {without_controls(model)}, {n} votes")

if __name__ == "__main__":
    exit_with_one_line(main)
