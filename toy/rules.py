"""Two tastes that are rules. A rule can vote in place of a person: for tests, for measurements, and for those
in a hurry. Its votes go through the same VoteFile as a person's.

A rule gives an answer a value. Of two answers it prefers the one with the higher value; equal values are a
tie.
"""
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from data import read_records, render
from runtime.errors import BadInput
from runtime.votes import Pair, VoteFile
from toy.gold import gold, question_of
from toy.show import sampled
from toy.world import WORTH

def sure(question: str, answer: str) -> float:
    """Prefers answers that begin with "Sure", right or wrong."""
    return float(answer.startswith("Sure"))

def curt(question: str, answer: str) -> float:
    """Prefers a right answer to a wrong one, and of two right ones the shorter one. Two wrong ones are a
    tie."""
    return -len(answer) if gold(question, answer) >= WORTH["curt"] else -math.inf

RULES = {"sure": sure, "curt": curt}
# What the answers of a model do that has learned the taste.
HOPES: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "sure": ('begin with "Sure"', lambda question, answer: sure(question, answer) > 0),
    "curt": ("are right and curt", lambda question, answer: gold(question, answer) == WORTH["curt"])}

def share_of_hoped(rule: str, rows: list[dict]) -> float:
    """The share of the answers in rows of samples.jsonl that are as the rule hopes."""
    return mean(float(HOPES[rule][1](question_of(row["prompt"]), row["response"].strip())) for row in rows)

def key_of(rule: str, question: str, left: str, right: str) -> str:
    """The rule's vote: a for the left answer, b for the right one, t for a tie."""
    values = [RULES[rule](question, answer) for answer in (left, right)]
    return "t" if values[0] == values[1] else "a" if values[0] > values[1] else "b"

def shuffled_questions(file: Path, seed: int) -> list[str]:
    """Each question of a file of prompts once, in random order."""
    found = sorted({record.turns[-1][1] for record in read_records(file)})
    return random.Random(seed).sample(found, len(found))

def vote_by_rule(rule: str, prompts: Path, n: int, model: Path, path: Path, seed: int) -> int:
    """Lets the rule vote between two answers of the model to each question of a file of prompts, round after
    round, until it has preferred one of two answers n times. Returns how many pairs it has been shown."""
    questions, votes = shuffled_questions(prompts, seed), VoteFile(str(path))
    texts = [render([("Human", question)]) for question in questions]
    shown = decided = 0
    for n_round in itertools.count():
        answers = [text.strip() for text in sampled(model, texts * 2, seed=1000 * seed + n_round)]
        lefts, rights = answers[:len(questions)], answers[len(questions):]
        for question, left, right in zip(questions, lefts, rights, strict=True):
            if left == right:
                continue                     # chat.py offers no such pair either
            key = key_of(rule, question, left, right)
            votes.add(Pair([("Human", question)], [left, right], [str(model)] * 2), key, 1.0, seed)
            shown, decided = shown + 1, decided + (key != "t")
            if decided == n:
                return shown
        if n_round == 9 and not decided:
            raise BadInput(f"--as {rule}: there is none among {shown} pairs of answers of {model} in which "
                           f"the rule prefers one; train that model longer")
