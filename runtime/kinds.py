"""Kinds of rows: what the fields of a data file's row mean, as turns of a conversation and answers.

Every reader here makes examples (turns, chosen, rejected) of a row. turns is a list of (role, text) before
the answer, with the roles System (only as the first), Human and Assistant; then come the answer and the worse
answer, or None. docs/data.md shows a row of each kind.
"""
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from runtime.errors import BadInput, note
from runtime.rows import data_files, read_rows
from runtime.votes import only_decided

Turns = list[tuple[str, str]]
Example = tuple[Turns, str | None, str | None]
MAX_TEXT_CHARACTERS = 2**22                  # one text: the tokenizer takes many times its size

# ------------------------------------------------------------ texts to turns
def clean_turns(turns: Turns) -> Turns:
    """Strips the texts, and drops answers before the first question. System texts before the first question
    become the one System turn. A later system text is joined, with a blank line between, to the next
    question. If an answer comes before that question, it is joined to the question before."""
    cleaned, system = [], ""
    for role, text in turns:
        text = text.strip()
        if role == "System":
            system = "\n\n".join(filter(None, (system, text))) if text != system else text
        elif role == "Human":
            if system and not cleaned:
                cleaned.append(("System", system))
            elif system:
                text = f"{system}\n\n{text}"
            cleaned.append(("Human", text))
            system = ""
        elif cleaned:
            if system and cleaned[-1][0] == "Human":
                cleaned[-1], system = ("Human", f"{cleaned[-1][1]}\n\n{system}"), ""
            cleaned.append((role, text))
    return cleaned

def parse_turns(text: str, gap: str = "\n\n") -> Turns:
    """The turns of a transcript such as "\\n\\nHuman: why?\\n\\nAssistant: so". Text before the first turn is
    the system text. A text without any Human turn is one question. gap is what the space before a turn must
    contain."""
    text = text.replace("\r\n", "\n")
    marks = []                               # (begin of the space before a turn, begin of its text, role)
    for mark in re.finditer("(Human|Assistant):", text):
        start = mark.start()
        while start and text[start - 1].isspace():
            start -= 1
        if start == 0 or gap in text[start:mark.start()] and start < mark.start():
            marks.append((start, mark.end(), mark[1]))
    if "Human" not in [role for _, _, role in marks]:
        return [("Human", text.strip())]
    ends = [start for start, _, _ in marks[1:]] + [len(text)]
    said = [(role, text[begin:end]) for (_, begin, role), end in zip(marks, ends, strict=True)]
    return clean_turns([("System", text[:marks[0][0]]), *said])

def parse_prompt(text: str, always: bool = False) -> Turns:
    """The turns of a prompt. It may also be a transcript with a line per turn, or on one line: "Human: why?
    Assistant: so Human: and? Assistant:". Such a one must end with "Assistant:", unless `always`. A text that
    ends with an answer is one question, which may be about a dialogue."""
    text = text.strip()
    if text.startswith("Human:") and (always or text.endswith("Assistant:")):
        for gap in ("\n\n", "\n", ""):
            turns = parse_turns(text, gap)
            if len(turns) > 1:
                return turns
    turns = parse_turns(text)
    return [("Human", text)] if turns[-1][0] == "Assistant" and turns[-1][1] else turns

# ------------------------------------------------------------ rows
# Names under which files keep the same thing; the first one that a row has is read.
QUESTION = ("prompt", "question", "instruction")
BELOW = ("input", "context")                 # goes on a line below the question
SYSTEM = ("system", "system_prompt")
MESSAGES = ("messages", "conversations", "conversation")
ANSWER = ("chosen", "completion", "output", "response", "answer")
ROLES = {"Human": ("user", "human", "prompter"), "Assistant": ("assistant", "gpt", "chatgpt", "bing", "bard"),
         "System": ("system", "developer")}
WEIGHT = ("weight", "train", "training", "loss")         # of a message or row: not to be learned where false
LABEL = ("label", "kto_tag")                 # of a row: false is an answer that people did not like
FALSE = ("false", "0", "0.0", "no")
SCORED = ("score_0", "better_response_id")   # which of two answers is the better one
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# How good the two answers of a pair are: (chosen_score, rejected_score), (score_chosen, score_rejected), ...
SCORES = [tuple(form.format(side, word) for side in ("chosen", "rejected"))
          for word in ("score", "rating", "avg_rating") for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}")]

class Row:
    """The fields of a row or of a message. What is null, NaN or empty is absent."""

    def __init__(self, fields: dict, columns: dict[str, str] | None = None):
        self.names = fields.keys()           # the absent ones too
        self.fields = {name: value for name, value in fields.items() if not is_absent(value)}
        self.columns = columns or {}         # what --columns has named
        self.read = set()                    # fields that somebody has asked for
        self.unused = set()                  # those of them that turned out not to be part of the example

    def first(self, *names: str) -> str:
        """The first of these names that the row has as a field, or ""."""
        return next((name for name in names if name in self.fields), "")

    def get(self, *names: str) -> object:
        """The value of the first of these fields that the row has, or None."""
        for name in names:
            if name in self.fields:
                self.read.add(name)
                return self.fields[name]
        return None

    def text(self, *names: str) -> str:
        """The text of the first of these fields that the row has, or ""."""
        return as_text(self.get(*names) or "", self.first(*names))

    def has(self, *names: str) -> bool:
        """Whether the row has one of these fields, even if its value is empty."""
        return any(name in self.names for name in names)

    def says_no(self, *names: str) -> bool:
        """Whether the first of these fields that the row has is false, in any form that files have."""
        return str(self.get(*names)).strip().lower() in FALSE

def is_absent(value: object) -> bool:
    return value is None or value != value or value == [] or isinstance(value, str) and not value.strip()

class Dropped(Exception):
    """A row that is not used; the message is the reason, under which it is counted."""

def as_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name} has the type {type(value).__name__}, expected text")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise BadInput(f"{name} has {len(value):,} characters, too many to be one text")
    return value

def message_text(content: object) -> str:
    """The text of a message, which may be a list of parts such as {"type": "text", "text": "why?"}."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if content is not None and not isinstance(content, str):
        raise Dropped("conversations dropped: a message holds something else than text")
    return as_text(content or "", "content")

def message_turns(messages: object, name: str, unlearned: str = "Assistant") -> Turns:
    """The turns of a message, or of a list: {"role": "user", "content": "why?"}, or with from and value.
    unlearned is the role of answers that are marked as not to be learned."""
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadInput(f"{name} must be a list of messages with role and content, or with from and value"
                       f"{not_messages(messages, name)}")
    turns = []
    for message in map(Row, messages):
        if message.get("tool_calls", "function_call"):
            raise Dropped("conversations dropped: a message calls a tool")
        if message.has("replies"):
            raise BadInput(f"{name} is a tree of messages: write each of its threads as one row of messages "
                           f"(docs/data.md)")
        if not message.has("role", "from") or not message.has("content", "value"):
            raise BadInput(f"{name}: a message has the fields {sorted(message.names)}, expected role and "
                           f"content, or from and value")
        theirs = str(message.get("role", "from")).strip()
        role = next((ours for ours, names in ROLES.items() if theirs.lower() in names), None)
        text = message_text(message.get("content", "value"))
        if role is None:
            found = f" ({theirs})" if re.fullmatch(r"\w{1,20}", theirs) else ""
            raise Dropped(f"conversations dropped: a role{found} is none of user, assistant, system")
        if not text and role != "System":
            raise Dropped("conversations dropped: a message is empty")
        turns.append((unlearned if role == "Assistant" and message.says_no(*WEIGHT) else role, text.strip()))
    return turns

def not_messages(value: object, name: str) -> str:
    """The end of an error: what stands in place of a list of messages, and what to do with it."""
    if isinstance(value, str):
        return "; it is a text: write the list that it holds, if it is JSON"
    if not isinstance(value, list):
        return f"; it has the type {type(value).__name__}"
    if not all(isinstance(text, str) for text in value):
        return "; it is a list of other things"
    if name in (*ANSWER, "rejected"):
        return "; it is a list of texts: write one of them as a text"
    return "; it is a list of texts: write each with its role, such as user and assistant in turn"

def turns_before(row: Row) -> Turns:
    """The turns before a row's answer: the system text, earlier questions and answers, the question."""
    turns = [("System", row.text(*SYSTEM))]
    if isinstance(row.fields.get("history"), list):
        for pair in row.get("history"):
            if isinstance(pair, list) and len(pair) == 2:
                if any(map(is_absent, pair)):
                    raise Dropped("conversations dropped: a message is empty")
                turns += [("Human", as_text(pair[0], "history")), ("Assistant", as_text(pair[1], "history"))]
            elif isinstance(pair, dict):     # a message
                turns += message_turns(pair, "history")
            else:
                raise BadInput("history must be a list of [question, answer]")
    # beside `instruction` and `output`, a `prompt` is often a filled template that holds the answer too
    question = row.get(*["instruction"] * ("output" in row.fields), *QUESTION)
    question = question.get("full_text", question) if isinstance(question, dict) else question
    below = row.text(*(name for name in BELOW if isinstance(row.fields.get(name), str))).strip()
    if isinstance(question, list | dict):
        turns += message_turns(question, "prompt")
    elif question is not None or below:
        *asked, last = parse_prompt(as_text(question or "", "prompt"), always="instruction" in row.read)
        if last == ("Assistant", "") and asked:          # the "Assistant:" with which many prompts end
            *asked, last = asked
        turns += [*asked, (last[0], f"{last[1]}\n{below}".strip())]
    elif messages := row.get(*MESSAGES):
        turns += message_turns(messages, row.first(*MESSAGES))
    return clean_turns(turns)

def turns_with(row: Row, turns: Turns, name: str) -> Turns:
    """The turns before a row's answer, and then the answer, which is the field `name`: a text, or messages.
    It may also be a whole transcript, which stands in place of the turns before."""
    value = row.get(name)
    system = [("System", row.text(*SYSTEM))] if not turns else [turn for turn in turns if turn[0] == "System"]
    if isinstance(value, list | dict):
        said = message_turns(value, name, unlearned="unlearned")
        if said[-1][0] == "unlearned":
            raise Dropped("rows dropped: marked as not to be learned")
        if turns and said[0] == turns[-1]:   # it begins with the last question
            turns = turns[:-1]
        elif said[0][0] != "Assistant":      # it is the whole conversation
            if not all(any(text in theirs for _, theirs in said) for _, text in turns[len(system):]):
                row.unused |= row.read & {*QUESTION, *BELOW, *MESSAGES, "history"}
            turns = system
        turns = clean_turns(turns + [("Assistant" if role == "unlearned" else role, text)
                                     for role, text in said])
    else:
        text, prompt = as_text(value or "", name).strip(), str(row.fields.get("prompt", "")).strip()
        said = parse_turns(text) if not turns or text.startswith("Human:") else []
        if not turns:
            turns = clean_turns(system + said)
        elif said[:-1] == turns[len(system):]:                     # the transcript repeats the prompt
            turns = turns + said[-1:]
        else:
            if prompt.endswith("Assistant:"):
                text = text.removeprefix(prompt).strip()
            turns = [*turns, ("Assistant", text.removeprefix("Assistant:"))]
    if not turns or turns[-1][0] != "Assistant":
        if value is None or len(turns) > 1 or row.has(*QUESTION):
            raise Dropped("rows dropped: no prompt, or no answer")
        raise BadInput(f'{name} stands without a prompt, so it must be a transcript of "Human:" and '
                       f'"Assistant:" turns that ends with an answer{suggestion(row)}')
    return turns

def example(turns: Turns, chosen: str | None = None, rejected: str | None = None) -> Example:
    """Strips the answers. An empty Assistant turn at the end is the "Assistant:" with which the prompts of
    many files end; it is dropped, because the template adds its own."""
    if turns and turns[-1] == ("Assistant", ""):
        turns = turns[:-1]
    if not turns or not turns[-1][1]:
        raise Dropped("rows dropped: no question")
    if turns[-1][0] == "Assistant":
        raise Dropped("rows dropped: the prompt ends with an answer")
    return turns, chosen and chosen.strip(), rejected and rejected.strip()

# ------------------------------------------------------------ kinds
def refuse_disliked(row: Row, tally: Counter):
    """Dropped where the label is false; beside `completion`, as in TRL's rows, also where it is 0. Elsewhere
    a number or another word may be that of a class."""
    label, is_trl = str(row.get(*LABEL)).strip().lower(), row.has("completion")
    if label in (FALSE if is_trl else FALSE[:1]):
        raise Dropped("rows dropped: marked as not to be learned")
    if label not in ("true", "none") and not (is_trl and label in ("1", "1.0", "yes")):
        tally["rows whose label is neither true nor false, which is not looked at"] += 1

def pair_scores(row: Row) -> list:
    """How good the chosen and the rejected answer are, or [] where the row does not say it."""
    both = ([row.get(name) for name in names] for names in SCORES)
    return next((scores for scores in both if None not in scores), [])

def read_pair(row: Row, tally: Counter) -> list[Example]:
    """Two answers. They are comparable only if the turns before them are the same."""
    scores = pair_scores(row)
    if scores and scores[0] == scores[1]:
        raise Dropped("pairs dropped: equal scores")
    before = turns_before(row)
    last = before[-1] if before else ("", "")
    if last[0] == "Assistant" and (last[1] == row.fields.get("chosen") or not row.has(*QUESTION)):
        before = before[:-1]                 # the messages hold the better answer too
    *turns, (_, chosen) = turns_with(row, before, "chosen")
    *other_turns, (_, rejected) = turns_with(row, before, "rejected")
    if turns != other_turns:
        raise Dropped("pairs dropped: their transcripts differ before the last answer")
    pair = example(turns, chosen, rejected)
    if scores and all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:
        tally["pairs kept although their rejected answer has the higher score"] += 1
    return [pair]

def read_scored(row: Row, tally: Counter) -> list[Example]:
    """Two answers such as response_0 and response_1. score_0 and score_1 say how good each is, or
    better_response_id is the number of the better one."""
    names = [name[:-1] for name in row.names if name.endswith("_0") and name[:-1] + "1" in row.names]
    texts = [name for name in names if name != "score_"
             and any(isinstance(row.fields.get(name + end), str) for end in "01")]
    texts = [name for name in texts if name[:-1] in ANSWER] or texts
    if len(texts) != 1:
        raise BadInput(f"has {' and '.join(texts) or 'no answers'} with the ends 0 and 1, expected two "
                       f"answers such as response_0 and response_1")
    answers = [row.text(texts[0] + end) for end in "01"]
    scores, better = (row.get("score_0"), row.get("score_1")), row.get("better_response_id")
    if better is None and None in scores:
        raise Dropped("pairs dropped: no scores")
    if better is None:
        if not all(isinstance(score, int | float) for score in scores):
            raise BadInput(f"score_0 and score_1 are {scores[0]!r} and {scores[1]!r}, expected numbers")
        if scores[0] == scores[1]:
            raise Dropped("pairs dropped: equal scores")
        better = scores[1] > scores[0]
    if better not in (0, 1):
        raise BadInput(f"better_response_id is {better!r}, expected 0 or 1")
    return [example(turns_before(row), answers[int(better)], answers[1 - int(better)])]

def read_shp(row: Row, tally: Counter) -> list[Example]:
    """Two answers, A and B, of which people preferred one: label 1 prefers A, label 0 prefers B."""
    label = row.get("labels")
    if label is None:
        raise Dropped("pairs dropped: no label")
    if label not in (0, 1):
        raise BadInput(f"labels is {label!r}, expected 0 or 1")
    better, worse = ("human_ref_A", "human_ref_B") if label else ("human_ref_B", "human_ref_A")
    return [example([("Human", row.text("history").strip())], row.text(better), row.text(worse))]

def read_conversation(row: Row, tally: Counter) -> list[Example]:
    """One example per answer, with the turns before the answer as its prompt. A question at the end makes a
    prompt too. An answer that is marked as not to be learned is only a turn of later prompts."""
    refuse_disliked(row, tally)
    said = message_turns(row.get(*MESSAGES) or [], row.first(*MESSAGES), unlearned="unlearned")
    turns = clean_turns([("System", row.text(*SYSTEM)), *said])
    prompts = [("Assistant" if role == "unlearned" else role, text) for role, text in turns]
    examples = [(prompts[:i], text, None) for i, (role, text) in enumerate(turns) if role == "Assistant"]
    if turns and turns[-1][0] == "Human":
        examples.append(example(turns))
    if not examples:
        raise Dropped("conversations dropped: no answer to learn, and no question at the end")
    n_said, n_kept = (sum(role not in ("System", "Human") for role, _ in some) for some in (said, turns))
    n_context = sum(role == "unlearned" for role, _ in turns)
    tally["answers before the first question, left out"] += n_said - n_kept
    tally["answers marked as not to be learned, only context"] += n_context
    return examples

def read_demonstration(row: Row, tally: Counter) -> list[Example]:
    """A question and its answer. Without the answer it is a prompt."""
    refuse_disliked(row, tally)
    name = next((name for name in ANSWER if name in row.fields), None)
    if name is None:
        return read_prompt(row, tally)
    *turns, (_, answer) = turns_with(row, turns_before(row), name)
    return [example(turns, answer)]

def read_prompt(row: Row, tally: Counter) -> list[Example]:
    return [example(turns_before(row))]

def read_plain_text(row: Row, tally: Counter) -> list[Example]:
    if row.has("parent_id"):
        raise BadInput(ONE_MESSAGE)
    if not (text := row.text("text").strip()):
        raise Dropped("rows dropped: no text")
    return [([], text, None)]

# A row is read as the first kind of which it has a field of every group. A new kind is one reader above and
# one line here.
KINDS: list[tuple[list[tuple[str, ...]], Callable[[Row, Counter], list[Example]]]] = [
    ([("chosen",), ("rejected",)], read_pair),                     # with a prompt, or whole transcripts
    ([QUESTION, SCORED], read_scored),                             # and response_0, response_1
    ([("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)], read_shp),
    ([MESSAGES], read_conversation),
    ([QUESTION, ANSWER], read_demonstration),
    ([("prompt",)], read_prompt),
    ([("text",)], read_plain_text),
]
# What --columns can name, besides names that end with _0 and _1.
COLUMNS = {*QUESTION, *BELOW, *SYSTEM, *MESSAGES, *ANSWER, *WEIGHT, *LABEL, "rejected", "history", "text",
           "better_response_id", "human_ref_A", "human_ref_B", "labels"}

def row_examples(row: Row, tally: Counter) -> list[Example]:
    """The examples of one row: one, none where the row is dropped, or one per answer of a conversation."""
    if row.fields and all(isinstance(value, dict) and "0" in value for value in row.fields.values()):
        raise BadInput("is a table by columns: write it with pandas' to_json(orient='records', lines=True)")
    # an absent field decides only where no other does
    read = find_reader(row.fields.keys()) or find_reader(row.names)
    try:
        if read:
            refuse_unusable(row)
            return read(row, tally)
        if row.names and not row.fields:
            raise Dropped("rows dropped: all fields are empty")
    except Dropped as reason:
        tally[str(reason)] += 1
        return []
    names = ", ".join(sorted(row.names))
    raise BadInput(f"its fields {names} match no known kind of row{suggestion(row)} (docs/data.md)")

def find_reader(names: Collection[str]) -> Callable[[Row, Counter], list[Example]] | None:
    """The reader of the first kind of which each group has a field among these names."""
    return next((read for groups, read in KINDS
                 if all(any(name in names for name in group) for group in groups)), None)

def refuse_unusable(row: Row):
    """Dropped where no kind of row may use this one."""
    pair = {"chosen", "rejected"}
    if row.says_no(*WEIGHT):
        raise Dropped("rows dropped: marked as not to be learned")
    if pair <= row.names and len(row.fields.keys() & pair) == 1:
        raise Dropped("pairs dropped: an answer is empty")
    if row.get(*MEDIA):
        raise Dropped("rows dropped: they come with images, videos or sound")

# ------------------------------------------------------------ hints
ONE_MESSAGE = "is one message, not a conversation: join the messages of each thread into one row of messages"
# Words in the names of fields that no kind knows, the surest first, by which their places are guessed.
GUESSES = {"prompt": "prompt query question instruct input problem dialog post document article context user "
                     "human ask",
           "rejected": "reject worse worst bad lose negative dispref",
           "chosen": "chos better best good win positive preferred accept select edited answer response "
                     "reply complet output target solution summar demonstration assistant"}
# Words in the names of fields that hold neither a prompt nor an answer, but something about them.
ASIDE = re.compile("(?:id|idx|uuid|hash|sha|source|model|date|time|timestamp|created|url|uri|link|path|file|"
                   "lang|language|categor(?:y|ie)|type|format|split|subset|num|number|count|len|length|token|"
                   "name|dataset|task|topic|domain|worker|annotator|author|title|tag|score|rating|rank|reward|"
                   "level|status|version|batch|country|meta|metadata|seed|audience|winner|preference|label|"
                   "choice)s?")
PLACES = ("messages", "text", "prompt", "chosen", "rejected")      # in the order in which they are named
VERDICT = re.compile("winner|preference|preferred$|^pref$|better|label|choice", re.IGNORECASE)

def fits(name: str, place: str) -> bool:
    """Whether a field's name has one of the words of a place."""
    return any(word in name.lower() for word in GUESSES[place].split())

def is_aside(name: str) -> bool:
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)      # userId and user_ids have the words user and id
    return not name or any(ASIDE.fullmatch(word.lower()) for word in words)

def may_be_text(name: str, value: object) -> bool:
    """Whether a field may hold a prompt or an answer, and not a number, a date, an address or a name."""
    return (isinstance(value, str) and not is_aside(name) and not re.fullmatch(r"[\d\s.,:/TZ+-]*", value)
            and (len(value.split(maxsplit=1)) > 1 or not re.search(r"[\d_/@]", value)))

def suggestion(row: Row) -> str:
    """The end of an error: what to do with the fields of this row, as a guess."""
    if row.has("role") and row.has("content"):
        return f"; each row {ONE_MESSAGE}"
    firsts = {name: value[0] for name, value in row.fields.items() if isinstance(value, list)}
    chats = [name for name, first in firsts.items()
             if isinstance(first, dict) and first.keys() & {"role", "from"}]
    for name in [name for name in firsts if name not in chats]:
        first = firsts[name]
        if isinstance(first, str) and re.search("dialog|conversation|^turns?$|^chat|^data$", name.lower()):
            return f'; its field "{name}" is a list of texts: write each as a message with its role'
        if isinstance(first, dict) and not row.has(*QUESTION) and (
                name in ("data", "examples", "instances", "rows")
                or find_reader(first.keys()) not in (None, read_plain_text)):
            return f'; if the rows lie in its field "{name}", write that list as the file'
    return guess(row, chats) if len(chats) < 2 else ""

def guess(row: Row, chats: list[str]) -> str:
    """What to do with the fields that hold text: --columns, if the places of some can be told."""
    texts = [name for name, value in row.fields.items()
             if may_be_text(name, value) and name not in (*GUESSES, *row.columns, *row.read)]
    found = by_words(row, texts)
    has_answer = "chosen" in found or row.has("chosen", *SCORED, *({*ANSWER} & row.columns.keys()))
    if chats:
        if not row.has("prompt") and (has_answer or chats[0] not in MESSAGES):
            found["prompt" if has_answer else "messages"] = chats[0]
        return as_flag(row, found)
    left = [name for name in texts if name not in found.values()]
    if left and len(texts) == 1 and not row.has(*GUESSES):
        return as_flag(row, {"text": texts[0]})
    if left and "prompt" not in {*found, *row.names}:
        found["prompt"] = left.pop(0)
    if not has_answer:
        left = [name for name in left if not fits(name, "prompt")]
        deep = [name for name, value in row.fields.items() if isinstance(value, list | dict)
                and holds_text(value) and name not in row.read and not is_aside(name)]
        if deep and not left or any(fits(name, "chosen") for name in deep):
            return f"; what lies inside {', '.join(deep)} has to be written as fields of the row first"
        found |= longest(row, left)
    return as_flag(row, found)

def longest(row: Row, left: list[str]) -> dict[str, str]:
    """The field with the longest text as the answer. One word beside sentences is rather a name: no answer
    then; FIELD, where the row must have one to be of any kind."""
    n_words = {name: len(value.split()) for name, value in row.fields.items() if isinstance(value, str)}
    best = max(left, key=lambda name: len(row.fields[name]), default=None)
    if best and n_words[best] == 1 < max(n_words.values()):
        return {} if row.read else {"chosen": "FIELD"}
    return {"chosen": best} if best else {}

def by_words(row: Row, texts: list[str]) -> dict[str, str]:
    """{place: field} for the places that a row lacks, by the words in the fields' names. Beside answer_a as
    the better answer, answer_b is the worse one."""
    found = {}
    for place, words in GUESSES.items():
        left = [name for name in texts if name not in found.values()]
        best = [name for word in words.split() for name in left if word in name.lower()]
        if best and place not in row.names and (place == "prompt" or not row.has(*SCORED)):
            found[place] = best[0]
    if "chosen" in found and "rejected" not in {*found, *row.names}:
        stem, others = found["chosen"][:-1], [name for name in texts if name not in found.values()]
        if twins := [name for name in others if stem and name[:-1] == stem]:
            found["rejected"] = twins[0]
    return found

def as_flag(row: Row, found: dict[str, str]) -> str:
    """The flag --columns with these fields. Where another field says which of two answers is better, the row
    has to be written anew."""
    chosen, rejected, has = found.get("chosen", ""), found.get("rejected", ""), {*found, *row.names}
    verdict = next((name for name in row.names if VERDICT.search(name) and name not in found.values()), "")
    if verdict and rejected and chosen[:-1] == rejected[:-1] != "":
        prompt = f'"{found["prompt"]}" as prompt, ' if "prompt" in found else ""
        return f'; write {prompt}the answer that "{verdict}" prefers as chosen, the other one as rejected'
    if "rejected" in has and "chosen" not in has:
        found["chosen"] = "FIELD"
    if "chosen" in found and has.isdisjoint(("prompt", *QUESTION, *MESSAGES)):
        found["prompt"] = "FIELD"
    named = [*row.columns.items(), *((place, found[place]) for place in PLACES if place in found)]
    words = " ".join(shlex.quote(f"{place}={name}") for place, name in named)
    return f"; say which field is which, as in --columns {words}" if found else ""

# What other templates put around their turns; here it is ordinary text.
OTHER_TEMPLATES = re.compile(r"\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<extra_id_\d>|"
                             r"<[|｜][\w▁]{1,40}[|｜]>|### (?:Instruction|Response|Human|Assistant):")

def other_template(example: Example) -> str | None:
    """The special token of another template that one of the texts holds, or None."""
    turns, *answers = example
    found = (OTHER_TEMPLATES.search(text or "") for text in (*(text for _, text in turns), *answers))
    return next((match[0] for match in found if match), None)

def holds_text(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, str) or any(map(holds_text, itertools.islice(values, 10)))

# Fields that are not read, and of which nothing is said: ids, and the model that wrote the answers.
SILENT = re.compile(r"(^|[_.])id$|^model$")
OF_MESSAGE = {"role", "from", "content", "value", "name", *WEIGHT}

def unread_fields(row: Row, found: list[Example], known: set[str]) -> set[str]:
    """The fields of a row and of its messages, such as messages.thinking, that hold a text which is not part
    of the row's examples; without those that are known already."""
    read = row.read - row.unused
    names = {name for name, value in row.fields.items() if name not in read | known and holds_text(value)}
    if names:                                # a copy of what is read is not worth a word
        texts = {text for turns, *answers in found for text in (*(text for _, text in turns), *answers)}
        texts |= {str(row.fields[name]).strip() for name in read}
        names = {name for name in names if str(row.fields[name]).strip() not in texts}
    for name in row.read:
        value = row.fields[name]
        for message in value if isinstance(value, list) else [value]:
            if isinstance(message, dict) and message.keys() & {"role", "from"}:
                names |= {f"{name}.{key}" for key, inner in message.items()
                          if key not in OF_MESSAGE and not is_absent(inner) and holds_text(inner)}
    return {name for name in names - known if not SILENT.search(name)}

# ------------------------------------------------------------ files
def read_examples(path: str | Path, tally: Counter, columns: dict[str, str]) -> list[Example]:
    """The examples of all rows of a file or folder. Notes, once each, which of its texts are not read, and
    whether some hold another template's special tokens. BadInput names the line."""
    examples, read, unused, unread, hint = [], set(), set(), set(), ""
    for file in data_files(path):
        for where, fields in only_decided(read_rows(file), tally):
            try:
                row = Row(renamed(fields, columns), columns)
                found = row_examples(row, tally)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            examples += found
            read |= row.read
            if found and (new := unread_fields(row, found, unread)):
                unread |= new
                unused |= row.unused
                hint = hint or (suggestion(row) if found[-1][1] is None else "")
    if hint:
        n = sum(chosen is None for _, chosen, _ in examples)
        tally[f"prompts of {path} have no answer{hint} (docs/data.md)"] += n
    if unread := sorted(unread - read | unread & unused):
        note(f"{path}: fields that hold text and are not read: {', '.join(unread)}")
    if foreign := next(filter(None, map(other_template, examples)), None):
        note(f"{path}: some texts hold {foreign}, which belongs to another template; here it is ordinary "
             f"text")
    return examples

def renamed(fields: object, columns: dict[str, str]) -> dict:
    """The fields of a row under the names that --columns gives them."""
    if not isinstance(fields, dict):
        raise BadInput(f"is a {type(fields).__name__}, expected an object with named fields")
    new = {name: fields[theirs] for name, theirs in columns.items() if theirs in fields}
    return {name: value for name, value in fields.items() if name not in columns.values()} | new

def check_columns(columns: dict[str, str], paths: list[str]):
    """BadInput where --columns names what no kind of row has, or a field that the first rows of none of the
    paths have."""
    if unknown := [name for name in columns if name not in COLUMNS and name[-2:] not in ("_0", "_1")]:
        raise BadInput(f"--columns {unknown[0]}=...: no kind of row has the field {unknown[0]}; there are "
                       f"{', '.join(sorted(COLUMNS))}")
    found = set()
    for file in [file for path in paths for file in data_files(path)] if columns else ():
        for _, row in itertools.islice(read_rows(file), 1000):
            found |= row.keys() if isinstance(row, dict) else set()
    if missing := [theirs for theirs in columns.values() if theirs not in found]:
        raise BadInput(f"--columns: no row has the field {missing[0]}; there are {', '.join(sorted(found))}")
