"""Conversations on the page: what chat.py does in a terminal, for several browsers at once."""
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from chat import Speaker, read_setting, start_answers
from data import Record
from runtime.errors import BadInput, as_html
from runtime.votes import Conversation, Pair, VoteFile, check_vote, hidden, winner

SECONDS_BETWEEN_UPDATES = 0.05               # of an answer that is being written

@dataclass
class Site:
    """What all browsers share. `lock` is held for a whole answer, and for both answers of a pair."""
    args: Namespace
    speakers: list[Speaker]
    votes: VoteFile | None
    run: Path | None
    records: list[Record] | None             # of --data
    lock: threading.Lock = field(default_factory=threading.Lock)

@dataclass
class Talk(Conversation):
    """The conversation of one browser. While is_busy, answers to `question` are written into `texts`."""
    question: str = ""                       # "" where nothing is being answered or waits for a vote
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    pair: Pair | None = None                 # waits for a vote
    temperature: float = 0.0                 # of these answers
    is_again: bool = False                   # they take the place of the last ones
    is_busy: bool = False
    is_stopped: bool = False
    message: str = ""

    def check_idle(self):
        if self.is_busy:
            raise BadInput("wait until the answer has ended, or stop it")

    def begin(self, question: str | None = None):
        """Takes in a question, or the last one again. BadInput where another answer comes first."""
        self.check_idle()
        if self.pair:
            raise BadInput("say first which of the two answers is better, or skip them")
        if question is None and not self.history:
            raise BadInput("nothing has been said yet")
        self.is_again, self.is_stopped, self.message = question is None, False, ""
        self.question = self.history[-1][0] if self.is_again else question.strip()
        self.names, self.texts, self.is_busy = [], [], bool(self.question)

    def answer(self, site: Site, args: Namespace) -> Iterator[None]:
        """Writes the answers, and yields now and then, so that they can be shown. The network is free again
        when this has ended, or is closed because the browser has gone."""
        speakers = hidden(site.speakers) if self.votes else site.speakers
        turns = [self.turns(i, self.question, self.is_again) for i in range(len(speakers))]
        self.names, self.texts = [speaker.name for speaker in speakers], [""] * len(speakers)
        self.temperature, shown = args.temperature, 0.0
        try:
            with site.lock:
                streams, at_once = start_answers(speakers, turns, args, self.tell)
                for pieces in zip_longest(*streams, fillvalue="") if at_once else in_turn(streams):
                    if self.is_stopped:
                        break
                    self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
                    if time.monotonic() - shown > SECONDS_BETWEEN_UPDATES:
                        yield
                        shown = time.monotonic()
            self.end(Pair(turns[0], self.texts, [speaker.folder for speaker in speakers]), args.seed)
        finally:
            self.is_busy, self.question = False, self.question if self.pair else ""

    def end(self, pair: Pair, seed: int | None):
        """With a vote, decides as chat.vote_on does. Without one, each speaker goes on with its answer."""
        self.texts = pair.texts = [text.strip() for text in self.texts]
        self.is_busy = False
        if self.votes and self.is_stopped:
            self.tell("stopped: there is no vote")
        elif self.votes and self.texts[0] != self.texts[1]:
            self.pair = pair
        else:
            if self.votes:
                self.tell("both answers are the same: this counts as a skip")
            vote = self.votes and self.votes.add(pair, "s", self.temperature, seed)
            self.go_on(self.question, self.texts, vote, self.is_again, self.as_html())

    def tell(self, line: str):
        self.message = f"{self.message}. {line.strip('[]')}".removeprefix(". ")

    def vote(self, key: str, seed: int | None):
        """Writes the vote. BadInput where it cannot be written; the two answers then wait for another try."""
        if not self.pair:
            raise BadInput("there are no two answers to vote on")
        vote = self.votes.add(self.pair, key, self.temperature, seed)
        self.message, self.names = self.pair.names(), self.pair.models
        answers = None if key == "s" else [winner(vote)] * 2
        self.go_on(self.question, answers, vote, self.is_again, self.as_html("ab".find(key)))
        self.pair, self.question = None, ""

    def undo(self):
        """While two answers wait, takes the vote before back. Else goes back to before the last answer."""
        self.check_idle()
        if self.pair:
            self.message = "the last vote is taken back" if self.votes.undo() else "there is no vote yet"
        else:
            self.message = super().undo()

    def clear(self):
        """Begins a new conversation. Two answers that wait get no vote."""
        self.check_idle()
        super().clear()
        self.pair, self.question, self.message = None, "", ""

    def as_html(self, chosen: int = -1) -> str:
        """The question and the answers as they are now. chosen: which one has won the vote, 0 or 1."""
        answers = ""
        for i, (name, text) in enumerate(zip(self.names, self.texts, strict=True)):
            kind = "running" if self.is_busy else "won" if i == chosen else "lost" if chosen >= 0 else ""
            text = as_html(text) or ("" if self.is_busy else '<i class="faint">an empty answer</i>')
            answers += (f'<div class="reply {kind}"><div class="faint">{as_html(name)}</div>'
                        f'<div class="text">{text}</div></div>')
        return f'<div class="question">{as_html(self.question)}</div><div class="replies">{answers}</div>'

def in_turn(streams: list[Iterator[str]]) -> Iterator[list[str]]:
    """The pieces of streams that must be read one after the other."""
    for i, stream in enumerate(streams):
        yield from ([piece if j == i else "" for j in range(len(streams))] for piece in stream)

def settings(site: Site, **values: float) -> Namespace:
    """The program's flags with what a browser has set. BadInput where a value makes no sense."""
    read = {name: read_setting(name, str(x).removesuffix(".0"), site.speakers) for name, x in values.items()}
    args = Namespace(**vars(site.args) | read)
    check_vote(args)
    return args
