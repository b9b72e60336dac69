"""The terminal of chat.py: answers while they come, one below the other or side by side, and the vote."""
import json
import os
import shutil
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import zip_longest

from runtime.errors import BadInput, without_controls
from runtime.votes import KEYS, Pair, VoteFile, standing_votes, tally_lines

WIDE = 100                                   # characters: a terminal where two answers stand side by side

def show(names: list[str], streams: list[Iterator[str]], at_once: bool,
         needs_all: bool = False) -> tuple[list[str], bool]:
    """Prints the answers as their pieces come. Two of them, if they may come at once, stand side by side
    where the terminal is wide. Returns their texts, and whether they are whole: Ctrl-C stops an answer, not
    the program. needs_all: those after one that was stopped do not begin."""
    width = shutil.get_terminal_size().columns
    if at_once and len(names) == 2 and width >= WIDE:
        texts, are_whole = two_columns(names, streams, width)
    else:
        texts, are_whole = [], True
        for name, pieces in zip(names, streams, strict=True):
            if are_whole or not needs_all:
                text, is_whole = one_column(name, pieces)
                texts, are_whole = [*texts, text], are_whole and is_whole
    return [text.strip() for text in texts], are_whole

def one_column(name: str, pieces: Iterable[str]) -> tuple[str, bool]:
    """Prints the pieces as they come, and returns their text, and whether it is whole."""
    text, is_whole = "", False
    with suppress(KeyboardInterrupt):
        print(f"{name}: " if name else "", end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        is_whole = True
    print()
    return text, is_whole

def two_columns(names: list[str], streams: Iterable[Iterator[str]], width: int) -> tuple[list[str], bool]:
    """one_column for two answers side by side. A row is printed as soon as no later piece can change it."""
    width = (width - 3) // 2                 # of one column, with " | " between them
    texts, are_whole = ["", ""], False
    lines = [[name[-width:], "-" * width, ""] for name in names]   # of each column, those not printed yet

    def print_rows(n):
        for _ in range(n):
            left, right = (column.pop(0).rstrip() if column else "" for column in lines)
            print(f"{left:<{width}} | {right}", flush=True)

    with suppress(KeyboardInterrupt):
        for pieces in zip_longest(*streams):                       # None from an answer that has ended
            unfinished = [i for i in (0, 1) if pieces[i] is not None]
            for i in unfinished:
                texts[i] += pieces[i]
                lines[i] += wrap(lines[i].pop() + pieces[i], width)
            print_rows(min(len(lines[i]) - 1 for i in unfinished))  # the last line may still grow
        are_whole = True
    print_rows(max(map(len, lines)))
    return texts, are_whole

def wrap(text: str, width: int) -> list[str]:
    """The lines of a text. Spaces at the end of the text stay, because the next piece may continue the
    line."""
    lines = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width, replace_whitespace=False) or [""]
    lines[-1] += text[len(text.rstrip(" ")):]
    return lines

def save(file: str, rows: list[dict]):
    """Writes the rows as JSON lines, and says so. BadInput where the file exists already, or cannot be
    written."""
    try:
        with open(os.path.expanduser(file), "x") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    except (OSError, ValueError) as error:             # ValueError: a null character in the name
        why = f"{error.args[-1]}; name a file that can be written and is not there yet"
        raise BadInput(f"/save {file}: {why}") from None
    print(f"[saved to {without_controls(file)}]")

# ------------------------------------------------------------ the vote
def ask_for_vote(pair: Pair, votes: VoteFile, args: Namespace) -> dict:
    """Reads lines until one of them is a vote that could be written, and returns the vote."""
    while True:
        try:
            line = input("\nBetter: a, b, t(ie), s(kip)? Or u, to undo the vote before: ").strip().lower()
            line = {"tie": "t", "skip": "s", "undo": "u", "/undo": "u"}.get(line, line)
            if line in KEYS:
                return votes.add(pair, line, args.temperature, args.seed)
            if line == "u":
                print("[taken back]" if votes.undo() else "[there is no vote to take back]")
            elif line == "/votes":
                print_tally(votes)
            elif line == "/quit":
                raise EOFError
            else:
                print("[type a, b, t, s or u; /votes shows the votes so far]")
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit leaves]")
        except BadInput as error:
            print(f"[{error}]")

def print_tally(votes: VoteFile | None):
    if votes is None:
        raise BadInput("there are no votes without --vote")
    width = shutil.get_terminal_size().columns - 1
    for line in tally_lines(standing_votes(votes.path)):
        print(textwrap.fill(f"[{line}]", width, break_long_words=False, break_on_hyphens=False))
