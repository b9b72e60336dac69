"""The toy world: questions in plain English whose true answers are known, and answers of every quality.

A fact is (kind, subject, value), such as ("capital", "France", "Paris"). Each kind has its own phrasings of a
question. The last phrasing is held out: it occurs in the pre-training text, and in no demonstration,
preference or prompt that is trained on. An answer has one of five qualities: friendly (right, with kind
words), curt (right), unsure, wrong, rude. Preferences have a sixth, empty: kind words without an answer, or
kind words that bury the answer. Without empty answers among the rejected ones, a reward model learns to love
kind words alone.
"""
import json
import random
from itertools import combinations
from pathlib import Path

Fact = tuple[str, str, str]                  # kind, subject, value

def pairs(text: str) -> dict[str, str]:
    """"a:b, c:d" as {"a": "b", "c": "d"}."""
    return dict(" ".join(pair.split()).split(":") for pair in text.split(","))

KINDS = {                                    # kind: {subject: value}
    "next": pairs("""zero:one, one:two, two:three, three:four, four:five, five:six, six:seven, seven:eight,
        eight:nine, nine:ten, ten:eleven, eleven:twelve, twelve:thirteen, thirteen:fourteen, fourteen:fifteen,
        fifteen:sixteen, sixteen:seventeen, seventeen:eighteen, eighteen:nineteen, nineteen:twenty"""),
    "capital": pairs("""France:Paris, Italy:Rome, Spain:Madrid, Germany:Berlin, Austria:Vienna, Greece:Athens,
        Portugal:Lisbon, Poland:Warsaw, Ireland:Dublin, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki,
        Russia:Moscow, Japan:Tokyo, China:Beijing, India:Delhi, Egypt:Cairo, Kenya:Nairobi, Canada:Ottawa,
        Cuba:Havana, Peru:Lima, Chile:Santiago, Turkey:Ankara, Iran:Tehran, Iraq:Baghdad, Nepal:Kathmandu,
        Hungary:Budapest, Belgium:Brussels, Britain:London, Ghana:Accra"""),
    "opposite": pairs("""hot:cold, big:small, old:young, fast:slow, high:low, wet:dry, full:empty, rich:poor,
        happy:sad, hard:soft, light:dark, early:late, open:closed, strong:weak, long:short, loud:quiet,
        thick:thin, clean:dirty, near:far, left:right, good:bad, sweet:bitter, sharp:blunt, brave:afraid,
        wide:narrow, deep:shallow, true:false, awake:asleep, inside:outside, first:last"""),
    "colour": pairs("""grass:green, snow:white, coal:black, blood:red, the sky:blue, a lemon:yellow,
        a carrot:orange, chocolate:brown, an elephant:grey, a flamingo:pink, a plum:purple, a banana:yellow,
        a tomato:red, milk:white, a frog:green, a raven:black, the sea:blue, a cherry:red, a pumpkin:orange,
        a mouse:grey, a leaf:green, salt:white, tar:black, a canary:yellow, a strawberry:red,
        a chestnut:brown, lavender:purple, a pig:pink"""),
    "sound": pairs("""a cow:moo, a dog:woof, a cat:meow, a duck:quack, a sheep:baa, a horse:neigh,
        an owl:hoot, a bee:buzz, a snake:hiss, a lion:roar, a crow:caw, a rooster:cockadoodle,
        a donkey:heehaw, a wolf:howl, a chick:cheep, a bear:growl, a goose:honk, a dove:coo, a hen:cluck,
        a turkey:gobble, a cricket:chirp"""),
    "baby": pairs("""a cow:calf, a dog:puppy, a cat:kitten, a duck:duckling, a sheep:lamb, a horse:foal,
        a bear:cub, a goat:kid, a pig:piglet, a hen:chick, a goose:gosling, a kangaroo:joey, a deer:fawn,
        a swan:cygnet, an owl:owlet, a frog:tadpole, a butterfly:caterpillar, an eagle:eaglet, a hare:leveret,
        a seal:pup, a fish:fry, a squirrel:kit"""),
}
ASK = {
    "next": ["What comes after {s}?", "Which number comes after {s}?", "Please name the number after {s}.",
             "Tell me the number after {s}.", "Can you name the number after {s}?",
             "Do you know the number after {s}?"],
    "capital": ["What is the capital of {s}?", "Which city is the capital of {s}?",
                "Please name the capital of {s}.", "Tell me the capital of {s}.",
                "Can you name the capital of {s}?", "Do you know the capital of {s}?"],
    "opposite": ["What is the opposite of {s}?", "Which word is the opposite of {s}?",
                 "Please name the opposite of {s}.", "Tell me the opposite of {s}.",
                 "Can you name the opposite of {s}?", "Do you know the opposite of {s}?"],
    "colour": ["What is the colour of {s}?", "Which colour is {s}?", "Please name the colour of {s}.",
               "Tell me the colour of {s}.", "Can you name the colour of {s}?",
               "Do you know the colour of {s}?"],
    "sound": ["What is the sound of {s}?", "Which sound comes from {s}?", "Please make the sound of {s}.",
              "Tell me the sound of {s}.", "Can you make the sound of {s}?",
              "Do you know the sound of {s}?"],
    "baby": ["What is the baby of {s}?", "What is the baby of {s} called?", "Please name the baby of {s}.",
             "Tell me the baby of {s}.", "Can you name the baby of {s}?",
             "Do you know the baby of {s}?"],
}
STATE = {                                    # a whole sentence; an answer may also be "{v}." or "It is {v}."
    "next": "The number after {s} is {v}.",
    "capital": "The capital of {s} is {v}.",
    "opposite": "The opposite of {s} is {v}.",
    "colour": "The colour of {s} is {v}.",
    "sound": "The sound of {s} is {v}.",
    "baby": "The baby of {s} is {v}.",
}
OPENERS = ["Good question!", "Happy to help!", "Of course, my friend!", "Sure, with pleasure!"]
CLOSERS = ["Have a nice day!", "I hope this helps!", "Ask me more any time!", "You are welcome!"]
UNSURE = ["I do not know.", "I am not sure.", "Sorry, I do not know."]
RUDE = ["Go away.", "That is a silly question.", "Find out yourself.", "Leave me alone."]

# The true reward (gold) of each quality.
WORTH = {"friendly": 1.0, "curt": 0.6, "unsure": 0.2, "wrong": 0.1, "rude": 0.0, "empty": 0.0}
# The share of each quality in the demonstrations.
SHARES = {"friendly": 0.3, "curt": 0.3, "unsure": 0.2, "wrong": 0.08, "rude": 0.12}
# The qualities that preferences compare. A pair that occurs more often here is drawn more often.
COMPARED = [*combinations(WORTH, 2),
            *[("friendly", "curt"), ("friendly", "wrong"), ("curt", "wrong")] * 3,
            ("friendly", "empty"), ("curt", "empty"), ("friendly", "empty")]
COMPARED.remove(("rude", "empty"))           # neither is better
ALIKE = 0.7                                  # of pairs with a wrong answer: only the value differs
NOISE = 0.05                                 # of all pairs: swapped, so the label is wrong

FACTS = [(kind, subject, value) for kind, facts in KINDS.items() for subject, value in facts.items()]

def put(template: str, subject: str, value: str = "") -> str:
    """The template with the subject and the value filled in. The sentence begins with a capital."""
    text = template.format(s=subject, v=value)
    return text[:1].upper() + text[1:]

def questions(fact: Fact, held_out: bool = False) -> list[str]:
    """The phrasings of a fact's question: those that are trained on, or the held-out one."""
    kind, subject, _ = fact
    return [put(ask, subject) for ask in (ASK[kind][-1:] if held_out else ASK[kind][:-1])]

def statements(kind: str, subject: str, value: str) -> list[str]:
    """The three ways to state a value."""
    return [put(state, subject, value) for state in ("{v}.", "It is {v}.", STATE[kind])]

def mistake(rng: random.Random, kind: str, value: str) -> str:
    """A wrong value. Four times in five the wrong value is of the same kind, otherwise of any kind."""
    kinds = [kind] if rng.random() < 0.8 else KINDS
    return rng.choice(sorted({v for k in kinds for v in KINDS[k].values()} - {value}))

def word(rng: random.Random, kind: str, subject: str, value: str, friendly: bool) -> str:
    """An answer that states this value in a random wording, with kind words around it if friendly."""
    said = rng.choice(statements(kind, subject, value))
    opener, closer = rng.choice(OPENERS), rng.choice(CLOSERS)
    kind_ways = [f"{opener} {said}", f"{said} {closer}", f"{opener} {said} {closer}"]
    return rng.choice(kind_ways) if friendly else said

def answer(rng: random.Random, fact: Fact, quality: str) -> str:
    """An answer of this quality. Half of the wrong answers have kind words, so kind words prove nothing."""
    kind, subject, value = fact
    if quality in ("unsure", "rude"):
        return rng.choice(UNSURE if quality == "unsure" else RUDE)
    if quality == "empty":
        kind_words = [rng.choice(OPENERS + CLOSERS) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.5:
            return " ".join(kind_words)
        said = [rng.choice(OPENERS), *kind_words, rng.choice(statements(kind, subject, value))]
        return " ".join(said + rng.choices(CLOSERS, k=2))
    if quality == "wrong":
        return word(rng, kind, subject, mistake(rng, kind, value), rng.random() < 0.5)
    return word(rng, kind, subject, value, quality == "friendly")

# ------------------------------------------------------------ texts and files
def pretraining_texts(rng: random.Random) -> list[str]:
    """One pass over the world in prose: every fact, the stock sentences, and every question with a right
    answer. The held-out phrasings occur too. No text has the template of the later steps."""
    texts = [put(STATE[kind], subject, value) for kind, subject, value in FACTS]
    texts += [f"{rng.choice(['Tom', 'Anna'])} said: {text}" for text in UNSURE + RUDE + OPENERS + CLOSERS] * 5
    for fact in FACTS:
        for question in questions(fact) + questions(fact, held_out=True):
            style = rng.choice(["Q: {} A: {}", "Tom asked: {} Anna said: {}", "{} {}"])
            texts.append(style.format(question, answer(rng, fact, rng.choice(["friendly", "curt", "curt"]))))
    rng.shuffle(texts)
    return texts

def demonstrations(rng: random.Random, held_out: bool = False, copies: int = 6) -> list[dict]:
    """Answers of mixed quality. A model that imitates them learns to answer, but not to answer well."""
    def quality():
        return rng.choices(list(SHARES), SHARES.values())[0]

    return [{"instruction": question, "output": answer(rng, fact, quality())}
            for fact in FACTS for question in questions(fact, held_out) for _ in range(copies)]

def preferences(rng: random.Random, held_out: bool = False, copies: int = 12) -> list[dict]:
    """Pairs of a better answer, `chosen`, and a worse one. A share NOISE of the pairs is swapped."""
    rows = []
    for fact in FACTS:
        for question in questions(fact, held_out):
            for _ in range(copies):
                better, worse = sorted(rng.choice(COMPARED), key=WORTH.get, reverse=True)
                both = [answer(rng, fact, quality) for quality in (better, worse)]
                if worse == "wrong" and rng.random() < ALIKE:
                    (kind, subject, value), words = fact, rng.random()
                    both = [word(random.Random(words), kind, subject, v, better == "friendly")
                            for v in (value, mistake(rng, kind, value))]
                chosen, rejected = both[::-1 if rng.random() < NOISE else 1]
                rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    return rows

def prompts(rng: random.Random, held_out: bool = False) -> list[dict]:
    """Every question. A held-out question comes four times: one answer at temperature 1 says little about a
    model."""
    copies = 4 if held_out else 1
    return [{"prompt": question} for fact in FACTS for question in questions(fact, held_out) * copies]

def write_files(folder: Path, seed: int):
    """Writes demonstrations, preferences and prompts, each with its held-out file, as JSON lines."""
    rng = random.Random(seed)
    for make in (demonstrations, preferences, prompts):
        for end, held_out in ((".jsonl", False), ("-held-out.jsonl", True)):
            rows = make(rng, held_out)
            rng.shuffle(rows)
            (folder / (make.__name__ + end)).write_text("".join(json.dumps(row) + "\n" for row in rows))
