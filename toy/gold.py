"""The true reward (gold) of an answer in the toy world. A rule computes it, and nothing is trained on it.

An answer gets 1 if it is right and friendly, 0.6 if right and curt, 0.2 for "I do not know", 0.1 if wrong, 0
if rude. To count, an answer has one to three known sentences, each said once, and exactly one of them is more
than kind words. Any other answer, such as broken text or one sentence ten times over, gets 0.
"""
import re

from toy.world import CLOSERS, FACTS, OPENERS, UNSURE, WORTH, questions, statements

FACT_OF = {question: fact for fact in FACTS for held_out in (False, True)
           for question in questions(fact, held_out)}

def gold(prompt: str, answer: str) -> float:
    """The true reward, 0 to 1. The prompt is a question of the toy world, with or without the template."""
    kind, subject, value = FACT_OF[question_of(prompt)]
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

def question_of(prompt: str) -> str:
    """The question of a prompt, without the template."""
    return prompt.rpartition("Human:")[2].rpartition("Assistant:")[0].strip() or prompt.strip()
