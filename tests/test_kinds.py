"""Rows, files and folders as people have them: what each is read as, what is dropped, and what is said."""
import gzip
import json
import re
import time
from collections import Counter

import pytest

from conftest import CASES, REPO
from data import Record, load_rows, read_records
from runtime.errors import BadInput, note
from runtime.flags import Flags, add_trainer_flags
from runtime.rows import data_files, data_sizes

ASK = [("Human", "why?")]
ASK_KINDLY = [("System", "Be kind."), ("Human", "why?")]
ASK_TWICE = [("Human", "why?"), ("Assistant", "so"), ("Human", "and?")]
PAIR, ANSWER = [Record(ASK, "so", "no")], [Record(ASK, "so")]
WHY, SO, NO = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}, {
    "role": "assistant", "content": "no"}
AND = {"role": "user", "content": "and?"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, **columns):
    """(records, tally) of a file with these rows."""
    tally = Counter()
    return read_records(write(tmp_path / "rows.jsonl", *rows), tally, columns), +tally


@pytest.fixture
def notes(capsys):
    """Reads the notes on standard error since the start of the test."""
    note.cache_clear()
    return lambda: capsys.readouterr().err


# ------------------------------------------------------------ kinds of rows
KINDS = {
    # pairs: the prompt under several names, answers as texts or messages, the head of an answer
    "question and system": ({"system": "Be kind.", "question": "why?", "chosen": "so", "rejected": "no"},
                            [Record(ASK_KINDLY, "so", "no")]),
    "instruction and input": ({"instruction": "why", "input": "?", "chosen": "so", "rejected": "no"},
                              [Record([("Human", "why\n?")], "so", "no")]),
    "history of a pair": (
        {"instruction": "and?", "history": [["why?", "so"]], "chosen": "yes", "rejected": "no"},
        [Record(ASK_TWICE, "yes", "no")]),
    "answers that begin with Assistant:": (
        {"prompt": "\n\nHuman: why?\n\n", "chosen": "Assistant: so", "rejected": " Assistant:no"}, PAIR),
    "whole lists of messages beside the prompt": (
        {"prompt": "why?", "chosen": [WHY, SO], "rejected": [WHY, NO], "messages": [WHY, SO]}, PAIR),
    "whole lists of messages alone": ({"chosen": [WHY, SO], "rejected": [WHY, NO]}, PAIR),
    "whole lists with a system text": (
        {"chosen": [{"role": "system", "content": "Be kind."}, WHY, SO],
         "rejected": [{"role": "system", "content": "Be kind."}, WHY, NO]}, [Record(ASK_KINDLY, "so", "no")]),
    "lists that hold only the answer": ({"prompt": [WHY], "chosen": [SO], "rejected": [NO]}, PAIR),
    "a system field beside lists": ({"system": "Be kind.", "prompt": [WHY], "chosen": [SO], "rejected": [NO]},
                                    [Record(ASK_KINDLY, "so", "no")]),
    "one message each after conversations": (
        {"conversations": [{"from": "human", "value": "why?"}], "chosen": {"from": "gpt", "value": "so"},
         "rejected": {"from": "gpt", "value": "no"}}, PAIR),
    "one message each after messages": ({"messages": [WHY], "chosen": SO, "rejected": NO}, PAIR),
    "transcripts that repeat the prompt": (
        {"prompt": "why?", "chosen": "Human: why?\n\nAssistant: so",
         "rejected": "Human: why?\n\nAssistant: no"}, PAIR),
    "answers that are dialogues": (
        {"prompt": "Write one.", "chosen": "Human: a\n\nAssistant: b", "rejected": "no"},
        [Record([("Human", "Write one.")], "Human: a\n\nAssistant: b", "no")]),
    # scored answers
    "scores": ({"prompt": "why?", "response_0": "no", "response_1": "so", "score_0": 0.5, "score_1": 1},
               PAIR),
    "better_response_id": ({"prompt": "why?", "response_0": "so", "response_1": "no", "better_response_id": 0,
                            "safer_response_id": 1, "is_response_0_safe": False}, PAIR),
    "a question with full_text, quotes beside the answers": (
        {"question": {"id": "q", "full_text": "why?"}, "quotes_0": {"title": []}, "answer_0": "so",
         "quotes_1": {"title": []}, "answer_1": "no", "score_0": 1.0, "score_1": -1.0}, PAIR),
    # conversations
    "from in messages": ({"messages": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
                         ANSWER),
    "role in conversations": ({"conversations": [WHY, SO]}, ANSWER),
    "other names of the assistant": (
        {"conversations": [{"from": "user", "value": "why?"}, {"from": "bing", "value": "so"},
                           {"from": "Human", "value": "and?"}, {"from": "ChatGPT", "value": "yes"}]},
        [Record(ASK, "so"), Record(ASK_TWICE, "yes")]),
    "developer, and parts of text": (
        {"messages": [{"role": "developer", "content": "Be kind."},
                      {"role": "user", "content": [{"type": "text", "text": "wh"},
                                                   {"type": "text", "text": "y?"}]}, SO]},
        [Record(ASK_KINDLY, "so")]),
    "a system field": ({"system": "Be kind.", "conversations": [WHY, SO]}, [Record(ASK_KINDLY, "so")]),
    "an answer of weight 0 is context": (
        {"messages": [WHY, {**SO, "weight": 0}, {"role": "user", "content": "and?"},
                      {"role": "assistant", "content": "yes", "weight": 1}]}, [Record(ASK_TWICE, "yes")]),
    "an answer that is not trained on is context": (
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so", "train": False},
                           {"from": "human", "value": "and?"},
                           {"from": "gpt", "value": "yes", "weight": None}]},
        [Record(ASK_TWICE, "yes")]),
    "a greeting before the first question, weights beside the others": (
        {"messages": [{**SO, "weight": 1}, WHY, {**SO, "weight": 0},
                      {"role": "user", "content": "and?"}, NO]},
        [Record(ASK_TWICE, "no")]),
    # demonstrations
    "prompt and completion": ({"prompt": "why?", "completion": " so"}, ANSWER),
    "prompt and response": ({"prompt": "why?", "response": "so"}, ANSWER),
    "question and answer": ({"question": "why?", "answer": "so"}, ANSWER),
    "instruction, context and response": ({"instruction": "why", "context": "?", "response": "so"},
                                          [Record([("Human", "why\n?")], "so")]),
    "system_prompt": ({"system_prompt": "Be kind.", "question": "why?", "response": "so"},
                      [Record(ASK_KINDLY, "so")]),
    "prompt and completion as messages": ({"prompt": [WHY], "completion": [SO], "label": True}, ANSWER),
    "history and system of Alpaca": (
        {"instruction": "and?", "input": "", "output": "yes", "system": "Be kind.",
         "history": [["why?", "so"]]},
        [Record([*ASK_KINDLY, *ASK_TWICE[1:]], "yes")]),
    "NaN as input": ({"instruction": "why?", "input": float("nan"), "output": "so"}, ANSWER),
    "null as output": ({"instruction": "why?", "output": None}, [Record(ASK)]),
    "columns of other kinds that are null": (
        {"messages": None, "text": None, "instruction": "why?", "input": None, "output": "so"}, ANSWER),
    # prompts
    "messages as a prompt": ({"prompt": [WHY]}, [Record(ASK)]),
    "one line": ({"prompt": "Human: why? Assistant:"}, [Record(ASK)]),
    "one line, several turns": ({"prompt": " Human: why? Assistant: so Human: and? Assistant:"},
                                [Record(ASK_TWICE)]),
    "a line per turn": ({"prompt": "Human: why?\nAssistant: so\nHuman: and?\nAssistant:"},
                        [Record(ASK_TWICE)]),
    "one line that does not end with Assistant:": (
        {"prompt": "Human: what does Assistant: mean?"}, [Record([("Human", "what does Assistant: mean?")])]),
    "Assistant: in a turn of its own": (
        {"prompt": "Human: is it Human: or Assistant:?\n\nAssistant:"},
        [Record([("Human", "is it Human: or Assistant:?")])]),
    "Human: on a line within a turn": (
        {"prompt": "Human: is this\nHuman: right?\n\nAssistant:"},
        [Record([("Human", "is this\nHuman: right?")])]),
    "an instruction on one line": ({"instruction": "Human: why? Assistant: so Human: and?", "output": "yes"},
                                   [Record(ASK_TWICE, "yes")]),
}


KINDS |= {
    "a system text beside whole lists": ({"system": "Be kind.", "chosen": [WHY, SO], "rejected": [WHY, NO]},
                                         [Record(ASK_KINDLY, "so", "no")]),
    "a system text beside transcripts": (
        {"system": "Be kind.", "chosen": "\n\nHuman: why?\n\nAssistant: so",
         "rejected": "\n\nHuman: why?\n\nAssistant: no"}, [Record(ASK_KINDLY, "so", "no")]),
    "the same system text twice": (
        {"system": "Be kind.", "messages": [{"role": "system", "content": "Be kind."}, WHY, SO]},
        [Record(ASK_KINDLY, "so")]),
    "a system text after the question": ({"messages": [WHY, {"role": "system", "content": "Sky: blue."}, SO]},
                                         [Record([("Human", "why?\n\nSky: blue.")], "so")]),
    "other pairs of names beside the answers": (
        {"prompt": "why?", "model_0": "a", "model_1": "b", "response_0": "so", "response_1": "no",
         "score_0": 2, "score_1": 1}, PAIR),
    "a number of the better answer as parquet has it": (
        {"prompt": "why?", "response_0": "no", "response_1": "so", "better_response_id": 1.0}, PAIR),
    "a prompt that holds the filled template, answer and all": (
        {"instruction": "why?", "input": "", "output": "so", "prompt": "# Ask: why? # Output: so"}, ANSWER),
    "a question about a dialogue": (
        {"prompt": "Summarise.\n\nHuman: hi\n\nAssistant: yo", "response": "so"},
        [Record([("Human", "Summarise.\n\nHuman: hi\n\nAssistant: yo")], "so")]),
    "messages that end with the better answer": ({"messages": [WHY, SO], "chosen": SO, "rejected": NO}, PAIR),
    "answers that begin with the last question": (
        {"prompt": [WHY, SO, AND], "chosen": [AND, SO], "rejected": [AND, NO]},
        [Record(ASK_TWICE, "so", "no")]),
    "answers that repeat a one-line prompt": (
        {"prompt": "Human: why? Assistant:", "chosen": "Human: why? Assistant: so",
         "rejected": "Human: why? Assistant: no"}, PAIR),
    "Windows lines": ({"chosen": "\r\n\r\nHuman: why?\r\n\r\nAssistant: so",
                       "rejected": "\r\n\r\nHuman: why?\r\n\r\nAssistant: no"}, PAIR),
    "input below a transcript": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: why\n\nAssistant:", "input": "?",
         "response": "so"}, [Record([("Human", "a"), ("Assistant", "b"), ("Human", "why\n?")], "so")]),
    "a list that begins with the prompt's last question, with a space": (
        {"prompt": [WHY, SO, {"role": "user", "content": "and? "}], "chosen": [AND, SO],
         "rejected": [AND, NO]}, [Record(ASK_TWICE, "so", "no")]),
    "a prompt list that ends with the better answer": (
        {"prompt": [WHY, SO], "chosen": "so", "rejected": "no"}, PAIR),
    "the question in input": ({"instruction": "", "input": "why?", "output": "so"}, ANSWER),
    "a post that looks like a dialogue": (
        {"history": "Human: hi\n\nAssistant: yo", "human_ref_A": "so", "human_ref_B": "no", "labels": 1},
        [Record([("Human", "Human: hi\n\nAssistant: yo")], "so", "no")]),
    "a conversation in the singular": ({"conversation": [WHY, SO], "language": 3}, ANSWER),
    "the role of OASST's questions": ({"messages": [{"role": "prompter", "content": "why?"}, SO]}, ANSWER),
    "prompt before question": ({"prompt": "why?", "question": "who?", "output": "so"}, ANSWER),
    "question before instruction": ({"question": "why?", "instruction": "who?", "answer": "so"}, ANSWER),
    "instruction first beside output": (
        {"prompt": "what?", "question": "who?", "instruction": "why?", "output": "so"}, ANSWER),
    "the number of a class is no judgement": ({"instruction": "why?", "output": "so", "label": 0}, ANSWER),
    "the name of a class is no judgement": ({"messages": [WHY, SO], "label": "negative"}, ANSWER),
    "a label that is true": ({"prompt": "why?", "completion": "so", "kto_tag": True}, ANSWER),
    "scores of which one is absent": (
        {"prompt": "why?", "chosen": "so", "rejected": "no", "score_chosen": 1, "rating_rejected": 1}, PAIR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_read_as_the_kind_that_its_fields_tell(kind, tmp_path):
    row, expected = KINDS[kind]
    assert read(tmp_path, row)[0] == expected


DROPPED = {
    "equal scores": {"prompt": "why?", "response_0": "so", "response_1": "no", "score_0": 1, "score_1": 1.0},
    "no scores": {"prompt": "why?", "response_0": "so", "response_1": "no", "score_0": 1, "score_1": None},
    "no label": {"history": "why?", "human_ref_A": "so", "human_ref_B": "no", "labels": None},
    "role": {"messages": [WHY, SO, {"role": "tool", "content": "42"}]},
    "a role ": {"conversations": [{"from": "human", "value": "why?"}, {"from": ["gpt"], "value": "so"}]},
    "a message is empty": {"messages": [WHY, {"role": "assistant", "content": None}]},
    "calls a tool": {"messages": [WHY, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
    "a message calls": {"messages": [WHY, {"role": "assistant", "tool_calls": [{"id": 1}]}]},
    "(observation)": {"conversations": [WHY, SO, {"from": "observation", "value": "42"}]},
    "with images": {"messages": [WHY, SO], "images": ["a.png"]},
    "no question": {"history": None, "human_ref_A": "so", "human_ref_B": "no", "labels": 1},
    "dropped: no question": {"prompt": "\n\nHuman: \n\nAssistant:", "chosen": "so", "rejected": "no"},
    "no question at the end": {"messages": [SO]},
    "equal ": {"prompt": "why?", "chosen": "so", "rejected": "no", "score_chosen": 3, "score_rejected": 3.0},
    "pairs dropped: no scores": {"prompt": "why?", "a_0": "so", "a_1": "no", "score_0": 1,
                                 "score_1": float("nan")},
    "rows dropped: marked": {"prompt": "why?", "chosen": "so", "rejected": "no", "weight": "0"},
    "as not to be": {"text": "why?", "train": False},
    "marked as not": {"prompt": "why?", "completion": "no", "label": "False"},
    "rows dropped: marked as": {"prompt": [WHY], "completion": [{**SO, "loss": False}]},
    "all fields are empty": {"a": None, "b": ""},
    "else than text": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SO]},
    "something else": {"messages": [{"role": "user", "content": 3}, SO]},
    "no answer to learn": {"messages": [WHY, {**SO, "weight": 0}]},
    "not to be learned": {"prompt": "why?", "completion": "no", "label": False},
    "marked": {"conversations": [WHY, SO], "kto_tag": False},
    "marked as": {"instruction": "why?", "output": "so", "weight": 0},
    "transcripts differ": {"chosen": [WHY, SO], "rejected": [{"role": "user", "content": "why not?"}, NO]},
    "rows dropped: no question": {"prompt": None},
    "no prompt, or": {"prompt": " ", "chosen": "so", "rejected": "no"},
    "an answer is empty": {"chosen": None, "rejected": "\n\nHuman: why?\n\nAssistant: so"},
    "an answer is ": {"prompt": "why?", "chosen": "so", "rejected": ""},
    "ends with an answer": {"prompt": [WHY, SO]},
    "prompt ends with": {"prompt": [WHY, SO], "chosen": "yes", "rejected": "no"},
    "message is empty": {"instruction": "and?", "output": "so", "history": [["why?", None]]},
    "no text": {"text": "\n"},
    **{f"{' ' * i}equal scores": {"prompt": "why?", "chosen": "so", "rejected": "no", **{
        form.replace("@", side): 5 for side in ("chosen", "rejected")}} for i, form in enumerate((
            "@_score", "@-score", "rating_@", "@_rating", "@-rating", "@_avg_rating"), 1)},
    "       equal": {"prompt": "why?", "chosen": "so", "rejected": "no", "score_chosen": 1,
                     "chosen_rating": 5, "rejected_rating": 5},
}


@pytest.mark.parametrize("reason", DROPPED)
def test_a_row_that_is_not_used_is_dropped_alone_and_counted_with_its_reason(reason, tmp_path):
    records, tally = read(tmp_path, DROPPED[reason], {"prompt": "why?"})
    assert records == [Record(ASK)]
    (what, n), = tally.items()
    assert n == 1 and "dropped" in what and reason.strip() in what


def test_a_file_whose_rows_are_all_dropped_is_an_error_with_the_reasons(tmp_path):
    why = "no usable rows; 1 conversations dropped: a role .*; 2 pairs dropped: equal"
    with pytest.raises(BadInput, match=why):
        read(tmp_path, DROPPED["role"], DROPPED["equal scores"], DROPPED["equal scores"])


def test_a_pair_whose_scores_contradict_it_is_kept_and_counted(tmp_path):
    row = {"prompt": "why?", "chosen": "so", "rejected": "no", "chosen_rating": 1, "rejected_rating": 5}
    records, tally = read(tmp_path, row, {**row, "chosen_rating": 6}, row)
    assert records == PAIR * 3
    assert tally == {"pairs kept although their rejected answer has the higher score": 2}


def test_a_label_that_is_not_looked_at_is_counted(tmp_path):
    rows = [{"prompt": "why?", "output": "so", "label": label} for label in (0, 1, 2, "bad", True, None)]
    records, tally = read(tmp_path, *rows, {**rows[0], "label": False})
    assert records == ANSWER * 6
    assert tally == {"rows whose label is neither true nor false, which is not looked at": 4,
                     "rows dropped: marked as not to be learned": 1}


def test_the_label_of_a_completion_is_false_where_it_is_0(tmp_path):
    rows = [{"prompt": "why?", "completion": "so", "label": label} for label in (0, 1, 0.0, 1.0, "no", True)]
    records, tally = read(tmp_path, *rows)
    assert records == ANSWER * 3 and tally == {"rows dropped: marked as not to be learned": 3}


def test_answers_of_weight_0_are_counted(tmp_path):
    _, tally = read(tmp_path, {"messages": [WHY, {**SO, "weight": 0}, WHY, SO]})
    assert tally == {"answers marked as not to be learned, only context": 1}
    _, tally = read(tmp_path, {"messages": [SO, WHY, SO]})
    assert tally == {"answers before the first question, left out": 1}


# ------------------------------------------------------------ what is said
@pytest.mark.parametrize("row, said", [
    ({"query": "why?", "good": "so", "bad": "no"}, "--columns prompt=query chosen=good rejected=bad"),
    ({"question": "why?", "worst": "no", "best": "so"},
     "--columns prompt=question chosen=best rejected=worst"),
    ({"a": "why?", "b": "so"}, r"--columns prompt=a chosen=b \("), ({"q": "why?", "a": "so"}, r"chosen=a \("),
    ({"content": "why?"}, "--columns text=content"),
    ({"the question": "why?", "reply": "so", "n": 3}, "--columns 'prompt=the question' chosen=reply"),
    ({"dialog": [{"role": "user", "content": "why?"}], "id": "7"}, "--columns messages=dialog"),
    ({"post": "why?", "chosen": "so", "rejected": "no"}, "--columns prompt=post"),
    ({"version": "1", "data": [{"prompt": "why?"}]}, 'lie in its field "data", write that list as the file'),
    ({"examples": [{"prompt": "why?"}]}, 'rows lie in its field "examples"'),
    ({"text": "why?", "role": "prompter", "parent_id": None, "message_tree_id": "a"}, "join the messages"),
    ({"role": "user", "content": "why?"}, "join the messages"),
    ({"conversation_a": [WHY], "conversation_b": [WHY], "winner": "a"}, r"no known kind of row \(docs"),
    ({"problem": "why?", "level": "1", "type": "x", "solution": "so"}, r"prompt=problem chosen=solution \("),
    ({"q": "why?", "answer_a": "so", "answer_b": "no"}, "prompt=q chosen=answer_a rejected=answer_b"),
    ({"q": "why?", "answer_a": "so", "answer_b": "no", "winner": 1}, '"winner" prefers as chosen'),
    ({"prompt": {"0": "why?"}, "n": {"0": 1}}, "orient='records'"),
    ({"question": "why?"}, "--columns prompt=question"),
    ({"n": 3}, "its fields n match no known kind of row "),
    # which texts may be a prompt or an answer
    ({"id": "13818513", "dialogue": "Amanda: hi", "summary": "Amanda greets."},
     r"prompt=dialogue chosen=summary \("),
    ({"task_name": "task1", "id": "task1-a", "definition": "Add them.", "inputs": "1 and 1",
      "targets": "It is 2"}, r"prompt=inputs chosen=targets \("),
    ({"question": "why?", "source": "flan_v2_cot", "date": "2016/01/01", "userId": "a b", "language": "en"},
     r"prompt=question \("),
    ({"query": "why so?", "about": "https://a.b/c", "when": "2023-02-05 14:23", "nr": "52", "by": "gpt-4"},
     r"prompt=query \("),
    ({"q": "why is it so?", "speaker": "Anna"}, r"prompt=q chosen=FIELD \("),
    ({"num_params": "52B", "transcript": "Human: a, b", "task_description": "of a worker"},
     r"--columns text=transcript \("),
    ({"input": "why?", "accepted": "so", "rejected": "no"}, r"prompt=input chosen=accepted \("),
    ({"x": "why so?", "rejected": "no"}, r"prompt=x chosen=FIELD \("),
    ({"target": "Good day.", "source": "Guten Tag."}, r"prompt=FIELD chosen=target \("),
    ({"q": "why?", "notes": "a b", "y": "so it is", "refs": ["a"]}, r"prompt=q chosen=y \("),
    # what has to be written anew
    ({"question": "why?", "context": "The sky.", "answers": {"text": ["so"], "answer_start": [3]}},
     "; what lies inside answers has to be written as fields of the row first"),
    ({"instruction": "why?", "source": "a b", "models": ["a"], "completions": [{"response": "so"}]},
     "what lies inside completions has"),
    ({"info": {"post": "why?"}, "summaries": [{"text": "so"}, {"text": "no"}], "choice": 0, "worker": "ab"},
     "what lies inside info, summaries has"),
    ({"chat": {"turn_1": {"Human": "why?"}}, "num_turns": 1, "meta_instruction": "Be kind."},
     "what lies inside chat has"),
    ({"summary1": "so", "summary2": "no", "pref": 0}, '; write the answer that "pref" prefers as chosen, '),
    ({"context": [WHY], "response1": "so", "response2": "no", "overall_preference": -2},
     '; write "context" as prompt, the answer that "overall_preference" prefers as chosen, the other one'),
    ({"context": [WHY], "response_0": "so", "response_1": "no", "better_response_id": 0},
     r"--columns prompt=context \("),
    ({"trajectory": [WHY], "chosen": "so", "rejected": "no"}, "--columns prompt=trajectory"),
    # lists that are not what their name says
    ({"id": "0", "data": ["why?", "so"]}, 'field "data" is a list of texts: write each as a message with'),
    ({"data": [WHY, SO]}, "--columns messages=data"),
    ({"conversations": ["why?", "so"]}, "conversations must be a list of messages .*; it is a list of texts: "
                                        "write each with its role"),
    ({"messages": json.dumps([WHY, SO])}, "messages must be .*; it is a text: write the list that it holds"),
    ({"messages": [WHY, 3]}, "messages must be .*; it is a list of other things"),
    ({"messages": 3}, "messages must be .*; it has the type int"),
    ({"prompt": "why?", "chosen": ["so"], "rejected": ["no"]}, "chosen must be .*: write one of them"),
    ({"prompt": {"text": "why?", "role": "prompter", "replies": []}}, "prompt is a tree of messages: .*thre"),
])
def test_a_row_of_no_known_kind_gets_a_hint_filled_in_with_its_own_fields(row, said, tmp_path):
    with pytest.raises(BadInput, match=f"rows.jsonl:1: .*{said}"):
        read(tmp_path, row)


def test_the_columns_that_an_error_shows_make_the_file_readable(tmp_path):
    row = {"query": "why?", "good": "so", "bad": "no", "prompt": "another", "language": "en"}
    assert read(tmp_path, row, prompt="query", chosen="good", rejected="bad")[0] == PAIR


def test_a_hint_repeats_what_columns_names_already(tmp_path):
    row = {"query": "why is it?", "good one": "so it is", "z": "no it is not"}
    with pytest.raises(BadInput, match=r"as in --columns completion=z prompt=query 'chosen=good one' \("):
        read(tmp_path, row, completion="z")
    with pytest.raises(BadInput, match=r"as in --columns input=z prompt=query \("):
        read(tmp_path, {"query": "why?", "z": "so"}, input="z")


PROMPTS = [
    ({"prompt": "why?", "selected": "so", "rejected": "no"}, "--columns chosen=selected (docs"),
    ({"prompt": "why?", "rejected": "no"}, "--columns chosen=FIELD (docs"),
    ({"prompt": "why?", "text": "so it is"}, "--columns chosen=text (docs"),
    ({"prompt": "why?", "answer_a": "so", "answer_b": "no", "winner": "model_a"}, 'that "winner" prefers as'),
    ({"prompt": "why?", "answers": [{"answer": "so", "rank": 1}]}, "what lies inside answers has to be"),
    ({"messages": [WHY], "completion": "so"}, "--columns prompt=messages chosen=completion (docs"),
]


@pytest.mark.parametrize("row, hint", PROMPTS)
def test_prompts_beside_what_may_be_their_answers_are_counted_with_a_hint(row, hint, tmp_path, notes):
    records, tally = read(tmp_path, row, {**row, "n": 3})
    (what, n), = tally.items()
    assert records == [Record(ASK)] * 2 and n == 2 and hint in what and "not read: " in notes()
    assert what.startswith(f"prompts of {tmp_path}/rows.jsonl have no answer; ")


@pytest.mark.parametrize("row", [
    {"prompt": "why?"}, {"prompt": "why is it?", "source": "a b", "persona": "Ann"},
    {"messages": [WHY], "language": "en"}, {"messages": [WHY, SO], "text": "a b"},
    {"prompt": "why?", "response": "so", "reason": "a b"}])
def test_other_rows_get_no_such_hint(row, tmp_path):
    assert read(tmp_path, row)[1] == {}


def test_the_error_of_a_step_without_rows_shows_how_the_answers_are_found(tmp_path, rows_of):
    rows = [{"prompt": f"why {i}?", "selected": "so", "rejected": "no"} for i in range(9)]
    write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(BadInput, match="0 usable rows.*9 prompts of .* no answer; .*columns chosen=selected"):
        rows_of()
    assert len(rows_of("--columns", "chosen=selected", "--split", "none", "--eval-data",
                       tmp_path / "rows.jsonl")[0]) == 9


# ------------------------------------------------------------ what is not read
def test_a_prompt_that_the_whole_conversations_beside_it_do_not_hold_is_named(tmp_path, notes):
    pair = {"chosen": [WHY, SO], "rejected": [WHY, NO]}
    same = [{**pair, "prompt": " why?"}, {**pair, "prompt": "\n\nHuman: why?\n\nAssistant:"}, pair]
    assert read(tmp_path, *same)[0] == PAIR * 3 and notes() == ""
    assert read(tmp_path, *same, {**pair, "prompt": "You are a pirate."})[0] == PAIR * 4
    assert notes().endswith("fields that hold text and are not read: prompt\n")
    note.cache_clear()
    read(tmp_path, {**pair, "prompt": [WHY, SO, AND]})             # the pair holds its first question only
    assert notes().endswith("fields that hold text and are not read: prompt\n")


def test_fields_of_messages_that_hold_text_and_are_not_read_are_named_once(tmp_path, notes):
    silent = {"name": "Ann", "id": "a", "message_id": "b", "weight": 1, "empty": "", "n": 3}
    messages = [WHY | silent, SO | silent | {"thinking": "Hm."}]
    read(tmp_path, {"messages": [WHY, SO]}, {"messages": messages}, {"messages": messages})
    said = notes()
    assert said.count("note:") == 1 and said.endswith("text and are not read: messages.thinking\n")
    note.cache_clear()
    read(tmp_path, {"prompt": [WHY], "chosen": SO | {"reasoning_content": "Hm."}, "rejected": NO})
    assert notes().endswith("not read: chosen.reasoning_content\n")


def test_a_field_that_some_rows_read_is_not_named(tmp_path, notes):
    read(tmp_path, {"prompt": "why?", "completion": "so", "response": "no"},
         {"prompt": "why?", "response": "so"}, {"prompt": "why?", "completion": "so"})
    assert notes() == ""


def test_copies_of_what_is_read_are_not_named(tmp_path, notes):
    read(tmp_path, {"messages": [WHY, SO], "prompt": "why?", "reply": " so", "model": "runs/ppo"})
    read(tmp_path, {"messages": [WHY, SO], "prompt": "what?"})
    assert notes().count("note:") == 1 and notes() == ""


def test_fields_that_hold_text_and_are_not_read_are_named_once(tmp_path, notes):
    row = {"prompt": "why?", "answer_key": "so", "score": 3, "id": "a1", "prompt_id": "b2", "empty": ""}
    row |= {"choices": ["a", "b"], "copy": " why?", "n": [1]}
    read(tmp_path, row, row, {**row, "more": "text"})
    names = "fields that hold text and are not read: answer_key, choices, more"
    assert notes() == f"note: {tmp_path}/rows.jsonl: {names}\n"


@pytest.mark.parametrize("text", [
    "[INST] why? [/INST]", "<|im_start|>user\nwhy?", "<s>why?", "a<|eot_id|>b", "why?\n<extra_id_1>User\n",
    "<start_of_turn>user", "<|start_header_id|>user", "<|User|>why?", "<｜User｜>why?", "<|prompter|>why?",
    "<｜begin▁of▁sentence｜>why?"])
def test_text_with_another_templates_special_tokens_gets_a_note(text, tmp_path, notes):
    read(tmp_path, {"text": text}, {"text": text})
    assert notes().count("note:") == 1
    note.cache_clear()
    read(tmp_path, {"prompt": "why?", "chosen": text})
    assert "belongs to another template" in notes()


def test_ordinary_text_gets_no_note(tmp_path, notes):
    read(tmp_path, {"text": "a [link], a < b, x|y, <b>bold</b>, [INSTRUCTION], f <| x |> g, <||>"})
    assert notes() == ""


# ------------------------------------------------------------ the flags and the errors of a run
@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """The rows that a trainer makes of its data, here the records themselves."""
    def rows_of(*flags, data=tmp_path / "rows.jsonl"):
        monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
        monkeypatch.setattr("sys.argv", ["sft.py", "--seed", "1", *map(str, flags)])
        parser = Flags("test")
        add_trainer_flags(parser)
        args = parser.parse()
        args.data = [str(data)]
        encode = lambda tokenizer, record, max_len, tally: record.chosen and record         # noqa: E731
        return load_rows(args, 0, encode, None, 64, 2)
    return rows_of


def questions(n, **fields):
    return [{"question": f"why {i}?", **fields} for i in range(n)]


def test_columns_are_renamed_for_training_and_held_out_files(tmp_path, rows_of):
    write(tmp_path / "rows.jsonl", *[{"q": f"why {i}?", "best": "so", "worst": "no"} for i in range(9)])
    train, held_out = rows_of("--columns", "prompt=q", "chosen=best", "rejected=worst", "--split", "none",
                              "--eval-data", tmp_path / "rows.jsonl")
    assert len(train) == len(held_out) == 9 and train[3] == Record([("Human", "why 3?")], "so", "no")


@pytest.mark.parametrize("columns, said", [
    (["prompt=nowhere"], "--columns: no row has the field nowhere; there are answer, question"),
    (["promt=question"], "--columns promt=...: no kind of row has the field promt; there are .*prompt"),
])
def test_columns_that_name_nothing_are_refused(columns, said, tmp_path, rows_of):
    write(tmp_path / "rows.jsonl", *questions(9, answer="so"))
    with pytest.raises(BadInput, match=said):
        rows_of("--columns", *columns)


def test_columns_without_an_equals_sign_are_refused():
    parser = Flags("test")
    add_trainer_flags(parser)
    for words, said in ((["prompt"], "prompt is not NAME=FIELD"), (["prompt=a", "prompt=b"], "twice")):
        with pytest.raises(BadInput, match=f"--columns: .*{said}"):
            parser.parse_args(["--columns", *words])
    args = parser.parse_args(["--columns", "prompt=a", "--columns", "chosen=b"])
    assert args.columns == {"prompt": "a", "chosen": "b"}


def test_where_more_is_dropped_than_kept_the_error_says_why_and_not_split(tmp_path, rows_of):
    write(tmp_path / "rows.jsonl", *[DROPPED["role"]] * 9, {"messages": [WHY, SO]})
    with pytest.raises(BadInput, match="or the rows more; 9 conversations dropped: a role") as caught:
        rows_of("--eval-share", 0)
    assert "--split" not in str(caught.value)


def test_conversations_that_all_begin_alike_are_said_in_the_error(tmp_path, rows_of):
    write(tmp_path / "rows.jsonl", *[{"messages": [WHY, SO, {"role": "user", "content": f"{i}?"}, NO]}
                                     for i in range(9)])
    for share in (0.05, 0.5, 0.95):
        with pytest.raises(BadInput, match="18 rows of .*rows.jsonl all begin with the same question.*"
                                           "--eval-data"):
            rows_of("--eval-share", share)


# ------------------------------------------------------------ files and folders
def test_a_folder_stands_for_its_data_files_in_order(tmp_path):
    shards = tmp_path / "set" / "data"
    shards.mkdir(parents=True)
    write(shards / "train-00001-of-00002.jsonl", {"prompt": "b"})
    (shards / "train-00000-of-00002.json.gz").write_bytes(gzip.compress(b'[{"prompt": "a"}]'))
    (tmp_path / "set" / "README.md").write_text("about")
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    (tmp_path / "set" / ".cache").mkdir()
    write(tmp_path / "set" / ".cache" / "x.jsonl", {"prompt": "c"})
    assert [record.turns[0][1] for record in read_records(tmp_path / "set")] == ["a", "b"]
    names = {"set/data/train-00000-of-00002.json.gz", "set/data/train-00001-of-00002.jsonl"}
    assert data_sizes([tmp_path / "set"]).keys() == names


def test_a_folder_of_parquet_shards_is_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("b", "a"):
        table = pyarrow.Table.from_pylist([{"chosen": [WHY, SO], "rejected": [WHY, NO], "prompt": name}])
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert read_records(tmp_path) == PAIR * 2
    assert [file.name for file in data_files(tmp_path)] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("names, what", [
    (["train.jsonl", "test.jsonl"], "several splits, such as .*train.jsonl"),
    (["hh_train.json", "hh_eval.json"], "splits"), (["train.jsonl", "held-out.jsonl"], "splits"),
    (["train1.json", "test1.json"], "splits"),
    (["train/a.jsonl", "validation/a.jsonl"], "splits"), (["a.json", "a.jsonl.gz"], "same file in several"),
    (["snapshots/1/a.json", "snapshots/2/b.json"], "several snapshots, such as [12] and [12]"),
    (["train.jsonl", "holdout.jsonl"], "splits"),
    *[(names, "several formats, which may be the same rows twice, such as .*; name those that you mean")
      for names in (["train.jsonl", "train-00000-of-00001.parquet"], ["train.jsonl", "data/train.parquet"],
                    ["a.json.gz", "b/c.PARQUET"], ["a.parquet", "b.jsonl"],
                    ["data/train-00000-of-00001.parquet", "default/train/0000.parquet"])]])
def test_a_folder_whose_rows_would_be_mixed_is_refused(names, what, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, {"prompt": name})
    with pytest.raises(BadInput, match=what):
        read_records(tmp_path)


@pytest.mark.parametrize("names", [["train-0.jsonl", "train-1.jsonl"], ["train/evaluations.jsonl"],
                                   ["testimony.jsonl", "devices.jsonl", "train.JSONL"],
                                   ["a.json", "b.jsonl", "c.json.gz"], ["holder.jsonl"]])
def test_a_folder_of_one_split_is_read(names, tmp_path):
    (tmp_path / "train").mkdir()
    for name in names:
        write(tmp_path / name, {"prompt": name})
    assert len(read_records(tmp_path)) == len(names)


def test_what_is_missing_or_left_out_of_a_folder_is_said(tmp_path, notes):
    write(tmp_path / "a.jsonl", {"prompt": "why?"})
    (tmp_path / "b.csv").write_text("prompt\nwhy?\n")
    assert read_records(tmp_path) == [Record(ASK)] and "files that are not read: b.csv" in notes()
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="c.jsonl: cannot be read: there is no such file"):
        read_records(tmp_path)


@pytest.mark.parametrize("content, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"), (b"PK\x03\x04 and", "zip archive"),
    (b"\xff\xfe{\x00", "UTF-16"), (b"ARROW1\0\0", "to_parquet"), (b"\xff" * 4 + b"\x10\0", "to_parquet"),
    (b"prompt,chosen\nwhy?,so\n", "should be a JSON object; pandas' read_csv and to_json")])
def test_a_file_of_another_format_is_named(content, said, tmp_path):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"rows.json.*{said}"):
        read_records(tmp_path / "rows.json")


@pytest.mark.parametrize("name, said", [("a.csv", "pandas' read_csv"), ("a.TSV", "pandas' read_csv"),
                                        ("train/data.arrow", "to_parquet"), ("README.md", r"parquet\)$")])
def test_a_folder_of_another_format_is_refused_with_what_to_do(name, said, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / name).write_text("prompt\nwhy?\n")
    with pytest.raises(BadInput, match=f"a folder without data files .*{said}"):
        read_records(tmp_path)


def test_runs_of_line_ends_take_no_longer_than_other_text(tmp_path):
    start = time.process_time()
    read(tmp_path, {"prompt": "why?" + "\n" * 200_000 + "x", "completion": "so"})
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name, said", [
    ("Dahoas/rm-static", "nothing is downloaded.*hf download Dahoas/rm-static --repo-type dataset "
                         "--local-dir rm-static.*--data rm-static"),
    ("nowhere.jsonl", "there is no such file$"), ("data/nowhere.jsonl", "there is no such file$"),
    ("a/b/c", "there is no such file$")])
def test_a_name_of_the_hub_is_told_from_a_missing_file(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=said):
        read_records(name)


def test_an_error_names_the_row_of_an_array_and_the_line_of_lines(tmp_path):
    for text, place in (('[{"prompt": "a"},\n\n{"n": 1}]', ", row 2: "),
                        ('{"prompt": "a"}\n\n{"n": 1}', ":3: ")):
        (tmp_path / "rows").write_text(text)
        with pytest.raises(BadInput, match=f"rows{place}"):
            read_records(tmp_path / "rows")


def test_one_object_over_many_lines_is_one_row(tmp_path):
    for before in ("", "\n", " \n\n"):
        text = before + json.dumps({"prompt": "why?", "chosen": "so"}, indent=2)
        (tmp_path / "rows.json").write_text(text)
        assert read_records(tmp_path / "rows.json") == ANSWER
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"prompt": "why?"}]}, indent=2))
    with pytest.raises(BadInput, match='field "data"'):
        read_records(tmp_path / "rows.json")


# ------------------------------------------------------------ files as they were found
FOUND = {
    "01-deepspeed-chat-local-json/train.json": [
        Record([("Human", "Name a colour.")], "Blue.", "No."),
        Record([("Human", "Hi."), ("Assistant", "Hello."), ("Human", "Name a fish.")], "Cod.", "No.")],
    "02-rlhf-reward-datasets-prefix/rows.jsonl": [
        Record([("Human", "Name a colour.")], "Blue is one.", "No.")],
    "04-llamafactory-history-system/rows.json": [
        Record([("System", "Answer in one word."), ("Human", "Name a country in Europe."),
                ("Assistant", "France."), ("Human", "And its capital?")], "Paris.")],
    "06-message-weight-0/rows.jsonl": [
        Record([("Human", "Name a colour."), ("Assistant", "Seven."), ("Human", "That is no colour.")],
               "Blue.")],
    "07-ultrafeedback-message-lists/uf.jsonl": [Record([("Human", "Name a colour.")], "Blue.", "No.")],
    "07-ultrafeedback-message-lists/implicit.jsonl": [Record([("Human", "Name a colour.")], "Blue.", "No.")],
    "07-ultrafeedback-message-lists/prompts.jsonl": [Record([("Human", "Name a colour.")])],
    "08-prompt-completion/completion.jsonl": [Record([("Human", f"Say {i}.")], f"{i}.") for i in range(4)],
    "08-prompt-completion/response.jsonl": [Record([("Human", f"Say {i}.")], f"{i}.") for i in range(4)],
    "09-sharegpt-other-roles/sharegpt.json": [Record([("Human", "Name a colour.")], "Blue."),
                                              Record([("Human", "Name a fish.")], "Cod.")],
    "09-sharegpt-other-roles/nullcontent.jsonl": [Record([("Human", "Name a fish.")], "Cod.")],
    "15-pairs-with-question-or-instruction/instruction.json": [
        Record([("Human", "Name a colour.")], "Blue.", "No.")],
    "15-pairs-with-question-or-instruction/orca.jsonl": [
        Record([("System", "Be brief."), ("Human", "Name a colour.")], "Blue.", "No.")],
    "22-alpaca-nan-null/nan.json": [Record([("Human", "Name a colour.")], "Blue.")],
    "22-alpaca-nan-null/null.json": [Record([("Human", "Name a colour.")]),
                                     Record([("Human", "Name a fish.")], "Cod.")],
}


@pytest.mark.parametrize("file", FOUND)
def test_a_file_as_it_was_found_is_read_right(file):
    if not (CASES / file).exists():
        pytest.skip(f"{CASES / file} is not there")
    assert read_records(CASES / file) == FOUND[file]


def test_flat_messages_of_a_tree_are_refused_with_a_hint():
    file = CASES / "05-oasst1-flat" / "rows.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    with pytest.raises(BadInput, match="join the messages of each thread"):
        read_records(file)


def test_conversations_that_all_begin_with_hello_are_said(rows_of):
    file = CASES / "20-all-begin-with-hello" / "rows.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    with pytest.raises(BadInput, match="all begin with the same question"):
        rows_of(data=file)


def test_every_row_that_the_documentation_shows_is_read(tmp_path, notes):
    text = (REPO / "docs" / "data.md").read_text()
    *blocks, others = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) >= 16
    for row in rows:
        records, tally = read(tmp_path, row)
        assert len(records) == 1 and not tally
    columns = dict(pair.split("=") for pair in re.search(r"`--columns (prompt=.*?)`", text)[1].split())
    assert read(tmp_path, json.loads(others), **columns)[0][0].rejected == "No."
    assert notes() == ""


def test_the_conversion_that_the_documentation_shows_makes_pairs(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = (REPO / "docs" / "data.md").read_text()
    code, = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    answers = [{"answer": "no", "rank": 3.0}, {"answer": "so", "rank": 1.0}, {"answer": "well", "rank": 2.0}]
    rows = [{"prompt": "why?", "answers": answers}, {"prompt": "who?", "answers": answers[:1] * 2},
            {"prompt": "what?", "answers": answers[:1]}]
    monkeypatch.chdir(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist(rows), "train.parquet")
    exec(compile(code, "data.md", "exec"), {})
    assert read_records("pairs.jsonl") == PAIR


def test_other_names_that_the_documentation_shows_are_read(tmp_path):
    text = (REPO / "docs" / "data.md").read_text()
    columns = dict(re.findall(r"(\w+)=(\w+)", re.search(r"`--columns (prompt=context .*?)`", text)[1]))
    row = {"context": [WHY], "response1": "so", "response2": "no", "overall_preference": -2}
    scores = {"score_0": -row["overall_preference"], "score_1": 0}
    assert read(tmp_path, row | scores, **columns)[0] == PAIR
    assert '"score_0": -preference, "score_1": 0' in text
