"""The true worth of an answer in the toy world, by rule; nothing is trained on it.

1 right and friendly, 0.6 right and curt, 0.2 "I do not know", 0.1 wrong, 0 rude. An answer is a few known sentences,
each said once, with one statement at most; anything else (babble, a kind word ten times over) is worth 0.
"""
import re

from toy.world import CLOSERS, FACTS, OPENERS, UNSURE, WORTH, questions, statements

FACT_OF = {question: fact for fact in FACTS for held_out in (False, True) for question in questions(fact, held_out)}


def gold(prompt, answer):
    """From 0 to 1. The prompt is a question of the toy world, bare or rendered in the template."""
    question = prompt.rpartition("Human:")[2].rpartition("Assistant:")[0].strip() or prompt.strip()
    kind, subject, value = FACT_OF[question]
    sentences = re.split(r"(?<=[.!?]) ", answer.strip())
    stated = [s for s in sentences if s not in OPENERS + CLOSERS]
    if len(set(sentences)) < len(sentences) or len(sentences) > 3 or len(stated) != 1:
        return 0.0
    if stated[0] in statements(kind, subject, value):
        return WORTH["friendly" if len(sentences) > 1 else "curt"]
    if stated[0] in UNSURE:
        return WORTH["unsure"]
    wrong = (s for _, _, other in FACTS for s in statements(kind, subject, other))
    return WORTH["wrong"] if stated[0] in wrong else 0.0
