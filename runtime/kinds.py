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
ROLES = {"Human": ("user", "human"), "Assistant": ("assistant", "gpt", "chatgpt", "bing", "bard"),
         "System": ("system", "developer")}
WEIGHT = ("weight", "train", "training", "loss")         # of a message or row: not to be learned where false
LABEL = ("label", "kto_tag")                 # of a row: false is an answer that people did not like
FALSE = ("false", "0", "0.0", "-1", "no", "bad", "negative")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")

class Row:
    """The fields of a row or of a message. What is null, NaN or empty is absent."""

    def __init__(self, fields: dict):
        self.names = fields.keys()           # the absent ones too
        self.fields = {name: value for name, value in fields.items() if not is_absent(value)}
        self.read = set()                    # fields that somebody has asked for

    def get(self, *names: str) -> object:
        """The value of the first of these fields that the row has, or None."""
        for name in names:
            if name in self.fields:
                self.read.add(name)
                return self.fields[name]
        return None

    def text(self, *names: str) -> str:
        """The text of the first of these fields that the row has, or ""."""
        return as_text(self.get(*names) or "", next((name for name in names if name in self.fields), ""))

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
        raise BadInput(f"{name} must be a list of messages with role and content, or with from and value")
    turns = []
    for message in map(Row, messages):
        if message.get("tool_calls", "function_call"):
            raise Dropped("conversations dropped: a message calls a tool")
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
    # beside `output`, a `prompt` is often a filled template that holds the answer too
    question = row.get(*(reversed(QUESTION) if "output" in row.fields else QUESTION))
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
        turns += message_turns(messages, "messages")
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
        elif said[0][0] != "Assistant":
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
def read_pair(row: Row, tally: Counter) -> list[Example]:
    """Two answers. They are comparable only if the turns before them are the same."""
    scores = row.get("score_chosen", "chosen-rating"), row.get("score_rejected", "rejected-rating")
    if None not in scores and scores[0] == scores[1]:
        raise Dropped("pairs dropped: equal scores")
    before = turns_before(row)
    last = before[-1] if before else ("", "")
    if last[0] == "Assistant" and (last[1] == row.fields.get("chosen") or not row.has(*QUESTION)):
        before = before[:-1]                 # the messages hold the better answer too
    *turns, (_, chosen) = turns_with(row, before, "chosen")
    *other_turns, (_, rejected) = turns_with(row, before, "rejected")
    if turns != other_turns:
        raise Dropped("pairs dropped: their transcripts differ before the last answer")
    return [example(turns, chosen, rejected)]

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
    if row.says_no(*LABEL):
        raise Dropped("conversations dropped: marked as not to be learned")
    said = message_turns(row.get(*MESSAGES) or [], "messages", unlearned="unlearned")
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
    if row.says_no(*LABEL):
        raise Dropped("rows dropped: marked as not to be learned")
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
    ([QUESTION, ("score_0", "better_response_id")], read_scored),  # and response_0, response_1
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
# Parts of names by which a field that no kind knows is guessed.
GUESSES = {"prompt": "prompt|question|query|instruct|input|problem|post|context|user|human|ask",
           "chosen": "chos|better|best|good|win|positive|pref|answer|response|reply|complet|output|solution",
           "rejected": "reject|worse|worst|bad|lose|negative|dispref"}
VERDICT = re.compile("winner|preference|preferred$|better|label", re.IGNORECASE)

def suggestion(row: Row) -> str:
    """The end of an error: what to do with the fields of this row, as a guess."""
    texts = [name for name, value in row.fields.items() if isinstance(value, str) and name not in GUESSES]
    lists = {name: value[0] for name, value in row.fields.items()
             if isinstance(value, list) and isinstance(value[0], dict)}
    chats = [name for name, message in lists.items() if message.keys() & {"role", "from"}]
    if row.has("role") and row.has("content"):
        return f"; each row {ONE_MESSAGE}"
    if isinstance(row.fields.get("data"), list) or (lists and not chats and not texts):
        name = "data" if "data" in row.fields else next(iter(lists))
        return f'; if the rows lie in its field "{name}", write that list as the file'
    if len(chats) == 1:
        return f"; say which field is which, as in --columns {shlex.quote(f'messages={chats[0]}')}"
    return guess(row, texts) if not chats else ""

def guess(row: Row, texts: list[str]) -> str:
    """--columns with the fields that hold text; the worse answer only where a name tells it."""
    found = {}
    for name in ("prompt", "rejected", "chosen"):                  # "dispreferred" would fit chosen, too
        left = [text for text in texts if text not in found.values()]
        fits = [text for text in left if re.search(GUESSES[name], text.lower())]
        if name not in row.names and (fits or left and name != "rejected"):
            found[name] = (fits or left)[0]
    if "chosen" in found and "rejected" not in {*found, *row.names}:               # answer_a and answer_b
        stem = found["chosen"][:-1]
        twins = [text for text in texts if stem and text[:-1] == stem and text not in found.values()]
        verdicts = [name for name in row.names if VERDICT.search(name) and name not in found.values()]
        if twins and verdicts:
            return f'; write the answer that "{verdicts[0]}" prefers as chosen, the other one as rejected'
        found |= {"rejected": twins[0]} if twins else {}
    if len(texts) == 1 and not row.has(*GUESSES) and not re.search(GUESSES["prompt"], texts[0].lower()):
        found = {"text": texts[0]}
    named = [shlex.quote(f"{name}={found[name]}") for name in ("text", *GUESSES) if name in found]
    return f"; say which field is which, as in --columns {' '.join(named)}" if named else ""

# What other templates put around their turns; here it is ordinary text.
OTHER_TEMPLATES = re.compile(r"\[/?INST\]|</?s>|<start_of_turn>|### (?:Instruction|Response|Human|Assistant):"
                             r"|<\|(?:im_start|im_end|eot_id|start_header_id|user|assistant|system)\|>")

def other_template(example: Example) -> str | None:
    """The special token of another template that one of the texts holds, or None."""
    turns, *answers = example
    found = (OTHER_TEMPLATES.search(text or "") for text in (*(text for _, text in turns), *answers))
    return next((match[0] for match in found if match), None)

def holds_text(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, str) or any(map(holds_text, itertools.islice(values, 10)))

# ------------------------------------------------------------ files
def read_examples(path: str | Path, tally: Counter, columns: dict[str, str]) -> list[Example]:
    """The examples of all rows of a file or folder. Notes, once each, which of its texts are not read, and
    whether some hold another template's special tokens. BadInput names the line."""
    examples, read, unread = [], set(), set()
    for file in data_files(path):
        for where, fields in read_rows(file):
            try:
                row = Row(renamed(fields, columns))
                found = row_examples(row, tally)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            examples += found
            if found and not row.fields.keys() <= unread | row.read:
                read |= row.read
                texts = {str(row.fields[name]).strip() for name in row.read}
                unread |= {name for name, value in row.fields.items() if name not in row.read
                           and holds_text(value) and str(value).strip() not in texts}
    if unread := sorted(name for name in unread - read if not re.search("(^|_)id$", name)):
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
    """BadInput where --columns names what no kind of row has, or a field that the first rows do not have."""
    if unknown := [name for name in columns if name not in COLUMNS and name[-2:] not in ("_0", "_1")]:
        raise BadInput(f"--columns {unknown[0]}=...: no kind of row has the field {unknown[0]}; there are "
                       f"{', '.join(sorted(COLUMNS))}")
    found = set()
    for file in [file for path in paths for file in data_files(path)] if columns else ():
        for _, row in itertools.islice(read_rows(file), 1000):
            found |= row.keys() if isinstance(row, dict) else set()
    if missing := [theirs for theirs in columns.values() if theirs not in found]:
        raise BadInput(f"--columns: no row has the field {missing[0]}; there are {', '.join(sorted(found))}")
