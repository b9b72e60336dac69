"""The web page: its conversations, votes, curves and rows as functions, and the page through its API."""
import html
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import chat
import data
from conftest import REPO, sentence
from data import Record, Tokenizer, collate_pairs, collate_prompts, collate_sft
from runtime.errors import BadInput, as_html
from runtime.log import panels_as_html, read_lines, samples_as_html
from runtime.votes import standing_votes
from web import __main__ as program
from web import rows, run
from web.page import ChatTab
from web.talk import Talk, settings
from web_page import answers, made_up_site, served, wait_for

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://evil.example/x.png)",
           "[x](javascript:alert(1))", "$$\\frac{1}{2}$$ \\(x\\)",
           "${alert(1)} {{value}} {{#each x}} @children", "\x1b[31mred\x1b[0m", "a \u202e b",
           "</div></div><style>*{display:none}</style>", "&lt;b&gt; `x`"]


def say(folder, question):
    return f"{folder} says {question}"


@pytest.fixture
def site(tokenizer_file, tmp_path, monkeypatch):
    """Two models with made-up answers, and a file of votes."""
    answers(monkeypatch, say)
    return made_up_site(tokenizer_file, tmp_path / "votes.jsonl")


@pytest.fixture
def plain_site(tokenizer_file, monkeypatch):
    """The same without votes."""
    answers(monkeypatch, say)
    return made_up_site(tokenizer_file)


def asked(talk, site, question=None):
    """Asks a question to the end, and returns what was shown on the way."""
    talk.begin(question)
    return [[*talk.texts] for _ in talk.answer(site, site.args)]


# -------------------------------------------------------------------------------------- conversations
def test_both_models_answer_and_the_conversation_goes_on_with_each_ones_own(plain_site, monkeypatch):
    talk, seen = Talk(None), []
    asked(talk, plain_site, " why ")
    start = chat.start_answers
    monkeypatch.setattr("web.talk.start_answers", lambda *args: seen.append(args[1]) or start(*args))
    asked(talk, plain_site, "and")
    assert talk.history == [("why", ["runs/ppo says why", "runs/sft says why"]),
                            ("and", ["runs/ppo says and", "runs/sft says and"])]
    assert seen == [[[("Human", "why"), ("Assistant", f"{folder} says why"), ("Human", "and")]
                     for folder in ("runs/ppo", "runs/sft")]]
    assert not talk.question and len(talk.past) == 2 and "runs/sft says and" in talk.past[1]
    asked(talk, plain_site)                  # once more: the models do not see their last answer
    assert seen[1] == seen[0] and len(talk.history) == 2


def test_the_answers_are_those_of_chat_py(base, monkeypatch, capsys):
    args = Namespace(model=str(base), versus=str(base), base=None, vote=None, prompt=None, max_tokens=12,
                     temperature=0.8, top_p=0.9, seed=1)
    speakers, talk = chat.load_speakers(args), Talk(None)
    torch.manual_seed(1)
    expected, _ = chat.ask(speakers, [[("Human", "why")]] * 2, args)
    torch.manual_seed(1)
    asked(talk, program.Site(args, speakers, None, None, None), "why")
    assert talk.history == [("why", expected)] and expected[0]


def test_two_models_answer_at_once_and_one_model_one_after_the_other(plain_site, monkeypatch):
    talk = Talk(None)
    monkeypatch.setattr("web.talk.SECONDS_BETWEEN_UPDATES", -1)
    shown = asked(talk, plain_site, "why")
    assert all(texts[1] for texts in shown) and len(shown) == 3
    plain_site.speakers[1].model = plain_site.speakers[0].model
    shown = asked(talk, plain_site, "why")
    assert [bool(texts[1]) for texts in shown] == [False] * 3 + [True] * 3
    assert talk.history[0] == talk.history[1]


def test_an_answer_is_shown_now_and_then_and_not_word_by_word(plain_site, monkeypatch):
    answers(monkeypatch, lambda *_: "word " * 5000)
    start = time.monotonic()
    shown = asked(Talk(None), plain_site, "why")
    assert 1 <= len(shown) <= 2 + (time.monotonic() - start) / 0.05


@pytest.mark.parametrize("key, winner, chosen", [("a", 0, 0), ("b", 1, 1), ("t", 0, -1), ("s", None, -1)])
def test_after_a_vote_the_chosen_answer_continues_for_both(key, winner, chosen, site):
    talk = Talk(site.votes)
    asked(talk, site, "why")
    assert talk.pair and talk.names == ["A", "B"] and not talk.history and "runs/" not in talk.message
    left, right = talk.texts
    talk.vote(key, 5)
    expected = [] if winner is None else [("why", [(left, right)[winner]] * 2)]
    assert talk.history == expected and talk.pair is None and talk.question == ""
    vote, = standing_votes(site.votes.path)
    assert (vote["vote"], vote["left"], vote["right"], vote["seed"], vote["temperature"]) == (
        key, left, right, 5, 0.7)
    assert [f"{model} says why" for model in vote["models"]] == [left, right]
    assert talk.message == f"A was {vote['models'][0]}, B was {vote['models'][1]}"
    if winner is not None:
        shown = re.findall(r'class="reply (\w*)"><div class="faint">(.*?)<', talk.past[0])
        kinds = ["won" if i == chosen else "lost" if chosen >= 0 else "" for i in (0, 1)]
        assert shown == list(zip(kinds, vote["models"], strict=True))


def test_the_sides_are_shuffled(site):
    sides = set()
    for _ in range(40):
        talk = Talk(site.votes)
        asked(talk, site, "why")
        sides.add(talk.pair.models[0])
    assert sides == {"runs/ppo", "runs/sft"}


def test_identical_answers_are_not_offered(site, monkeypatch):
    answers(monkeypatch, lambda *_: "the same ")
    talk = Talk(site.votes)
    asked(talk, site, "why")
    assert talk.pair is None and "same" in talk.message and talk.history == [("why", ["the same"] * 2)]
    with pytest.raises(BadInput, match="no two answers"):
        talk.vote("a", None)
    row, = map(json.loads, site.votes.path.read_text().splitlines())
    assert (row["vote"], row["left"], row["right"], row["seed"]) == ("s", "the same", "the same", 5)
    talk.undo()
    assert not standing_votes(site.votes.path) and talk.history == talk.past == []


def test_undo_after_a_skip_takes_the_skip_back_and_nothing_else(site):
    talk = Talk(site.votes)
    for question, key in (("one", "a"), ("two", "s")):
        asked(talk, site, question)
        talk.vote(key, None)
    talk.undo()
    assert [vote["vote"] for vote in standing_votes(site.votes.path)] == ["a"]
    assert len(talk.history) == len(talk.past) == 1
    talk.undo()
    assert not standing_votes(site.votes.path) and talk.history == talk.past == []


def test_a_stopped_answer_is_kept_without_votes_and_not_offered_with_them(site, plain_site):
    for here in (plain_site, site):
        talk = Talk(here.votes)
        talk.begin("why")
        for _ in talk.answer(here, here.args):
            talk.is_stopped = True
        assert not talk.is_busy and talk.pair is None
        if here.votes:
            assert "no vote" in talk.message and talk.history == []
        else:
            assert talk.history == [("why", ["runs/ppo", "runs/sft"])] and len(talk.past) == 1


def test_stop_before_the_first_word_stops(site):
    talk = Talk(site.votes)
    talk.begin("why")
    talk.is_stopped = True                   # while another browser's answer is being written
    assert list(talk.answer(site, site.args)) == [] and talk.pair is None and not talk.is_busy


def test_a_vote_that_cannot_be_written_can_be_repeated(site, tmp_path):
    talk, folder = Talk(site.votes), tmp_path / "gone"
    asked(talk, site, "why")
    site.votes.path = folder / "votes.jsonl"
    with pytest.raises(BadInput, match="not saved"):
        talk.vote("a", None)
    assert talk.pair and not talk.history
    folder.mkdir()
    talk.vote("a", None)
    assert len(standing_votes(site.votes.path)) == 1 and talk.history and talk.pair is None


def test_undo_takes_the_vote_before_back_or_forgets_the_last_question(site):
    talk = Talk(site.votes)
    with pytest.raises(BadInput, match="nothing"):
        talk.undo()
    asked(talk, site, "one")
    talk.undo()
    assert talk.pair and "no vote" in talk.message
    talk.vote("a", None)
    asked(talk, site, "two")
    talk.undo()                              # that of question one
    assert talk.pair and not standing_votes(site.votes.path) and len(talk.history) == 1
    talk.vote("b", None)
    talk.undo()                              # question two, and its vote
    assert not standing_votes(site.votes.path) and [question for question, _ in talk.history] == ["one"]
    assert len(talk.past) == 1 and "taken back" in talk.message
    talk.undo()
    assert (talk.history, talk.past, talk.message) == ([], [], "forgotten")


def test_undo_of_one_browser_does_not_take_back_the_vote_of_another(site):
    # as gradio.State does for every browser
    one, two = deepcopy(Talk(site.votes)), deepcopy(Talk(site.votes))
    for talk in (one, two):
        asked(talk, site, "why")
        talk.vote("a", None)
    asked(two, site, "and")
    asked(one, site, "and")
    two.undo()
    two.undo()
    assert "no vote" in two.message and len(standing_votes(site.votes.path)) == 1
    assert one.history and one.pair


def test_retry_answers_the_last_question_again_and_keeps_the_old_answer_after_a_skip(site):
    talk = Talk(site.votes)
    with pytest.raises(BadInput, match="nothing"):
        talk.begin()
    asked(talk, site, "one")
    talk.vote("a", None)
    before = [*talk.history]
    asked(talk, site)
    talk.vote("s", None)
    assert talk.history == before and len(talk.past) == 1
    asked(talk, site)
    talk.vote("b", None)
    assert len(talk.history) == len(talk.past) == 1 and talk.history[0][0] == "one"
    assert len(standing_votes(site.votes.path)) == 3


def test_a_question_waits_for_the_answer_and_for_the_vote(site):
    talk = Talk(site.votes)
    talk.begin("why")
    for act in (lambda: talk.begin("and"), talk.undo, talk.clear):
        with pytest.raises(BadInput, match="wait until"):
            act()
    assert list(talk.answer(site, site.args)) and talk.pair
    with pytest.raises(BadInput, match="first"):
        talk.begin("and")
    talk.clear()
    assert talk.pair is None and not talk.question
    talk.begin("  ")
    assert not talk.is_busy                  # an empty question is none


def test_a_question_that_is_too_long_is_one_line_and_nothing_is_lost(base, tmp_path):
    args = Namespace(model=str(base), versus=None, base=None, vote=None, prompt=None, max_tokens=12,
                     temperature=0.0, top_p=0.9, seed=1)
    site = program.Site(args, chat.load_speakers(args), None, None, None)
    talk = Talk(None)
    asked(talk, site, "why")
    talk.begin("the cat sat " * 300)
    with pytest.raises(BadInput, match="too long.*256.*12"):
        next(talk.answer(site, args))
    assert not site.lock.locked() and not talk.is_busy and len(talk.history) == 1
    for i in range(12):                      # a long conversation loses its oldest turns, and says so
        asked(talk, site, f"why {i}, my friend, is the sky so blue today")
    assert "oldest turns are left out" in talk.message and "[" not in talk.message


def test_what_is_said_of_an_answer_is_sentences():
    talk = Talk(None)
    for line in ("[the oldest turns are left out]", "stopped"):
        talk.tell(line)
    assert talk.message == "the oldest turns are left out. stopped"


def test_the_network_is_held_for_both_answers_and_free_when_a_browser_has_gone(plain_site, monkeypatch):
    answers(monkeypatch, say, pause=0.06)
    first, second = Talk(None), Talk(None)
    first.begin("one")
    work = first.answer(plain_site, plain_site.args)
    next(work)
    second.begin("two")
    thread = threading.Thread(target=lambda: list(second.answer(plain_site, plain_site.args)))
    thread.start()
    next(work)
    assert plain_site.lock.locked() and second.texts == ["", ""]
    work.close()                             # Gradio closes the generator of a browser that has gone
    thread.join(20)
    assert not plain_site.lock.locked() and not first.is_busy and not first.history
    assert second.history == [("two", ["runs/ppo says two", "runs/sft says two"])]


@pytest.mark.parametrize("values, wrong", [({"temperature": -1}, "temperature"), ({"top_p": 1.5}, "top_p"),
                                           ({"max_tokens": 256}, "max_tokens"),
                                           ({"max_tokens": 2.5}, "max_tokens"),
                                           ({"temperature": float("nan")}, "temperature"),
                                           ({"top_p": None}, "top_p")])
def test_settings_out_of_range_are_refused(values, wrong, site):
    with pytest.raises(BadInput, match=wrong):
        settings(site, **values)


def test_a_question_that_was_refused_is_not_answered_and_changes_nothing_on_the_page(site):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    talk, tab = Talk(site.votes), SimpleNamespace(site=site)
    assert list(ChatTab.answer(tab, talk, 0.7, 0.9, 40)) == [gradio.skip()]    # nothing was asked
    asked(talk, site, "why")
    pair = talk.pair
    assert list(ChatTab.answer(tab, talk, 0.7, 0.9, 40)) == [gradio.skip()] and talk.pair is pair


def test_settings_of_one_browser_are_not_those_of_another(site):
    mine = settings(site, temperature=0.1, top_p=1, max_tokens=7.0)
    assert (mine.temperature, mine.top_p, mine.max_tokens, mine.vote) == (0.1, 1.0, 7, site.args.vote)
    assert site.args.temperature == 0.7
    site.args.versus = site.args.model
    with pytest.raises(BadInput, match="same answer twice"):
        settings(site, temperature=0)


# -------------------------------------------------------------------------------------- text, not markup
@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_model_never_becomes_markup(text, plain_site, monkeypatch):
    answers(monkeypatch, lambda *_: text)
    shown = as_html(text)
    assert not set(shown) & set("<>{}$`@\\\"'\x1b\u202e")
    assert html.unescape(shown) == chat.without_controls(text)
    talk = Talk(None)
    asked(talk, plain_site, text)
    tags = set(re.findall(r"<(\w+)", talk.past[0]))
    assert tags <= {"div"} and talk.past[0].count(shown.split(" ")[0]) >= 3


def test_text_in_a_run_and_in_data_never_becomes_markup(plain_site):
    bad = " ".join(HOSTILE)
    table = samples_as_html([{"step": 0, "prompt": bad, "response": bad, "score": 1.0}], 1)
    plain_site.records = [Record([("System", bad), ("Human", bad)], bad, bad + "!")]
    plain_site.args.data = "x"
    pages = [rows.rows_as_html(plain_site, step, length, 1) for step in rows.STEPS for length in (8, 256)]
    for page in (table, *pages):
        assert not {"script", "img", "style"} & set(re.findall(r"<(\w+)", page))
        assert not set(page) & set("{}$`@\x1b")


# -------------------------------------------------------------------------------------- run
def a_run(folder, steps=40, null=False):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            value = None if null and step % 3 == 0 else step / steps
            print(json.dumps({"step": step, "score": value, "kl": step * 0.1, "lr": 1.0}), file=file)
    with open(folder / "samples.jsonl", "w") as file:
        for step in range(0, steps + 1, 2):
            for i in range(30):
                sample = {"step": step, "prompt": f"\n\nHuman: q{i}?\n\nAssistant:", "kl": 0.5,
                          "response": f"answer {min(step, 6)} to {i}", "score": step / 10}
                print(json.dumps(sample), file=file)
    return folder


def test_the_curves_are_the_numbers_of_the_run(tmp_path):
    lines = read_lines(a_run(tmp_path / "run") / "metrics.jsonl")
    page = panels_as_html(lines, {"score": ["score", "eval_score"], "KL": ["kl"], "none": ["gold"]})
    assert page.count("<figure>") == 2 and "gold" not in page and "score 1<" in page and "kl 4<" in page
    at = [float(y) for y in re.findall(r'<circle class="c0" cx="[\d.]+" cy="([\d.]+)"', page)[:40]]
    np.testing.assert_allclose(at, 150 * (1 - (np.arange(1, 41) / 40 - 1 / 40) / (1 - 1 / 40)), atol=0.06)


@pytest.mark.parametrize("ending", [b"", b'{"step": 41, "sco', b"\xff\xfe\n[1]\n7\nnull\n{}\n",
                                    b'{"step": "x"}\n'])
def test_a_line_that_is_being_written_and_numbers_that_were_not_finite_do_no_harm(ending, tmp_path):
    folder = a_run(tmp_path / "run", null=True)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(ending)
    page = run.run_as_html(folder, 1)[0]
    assert "step 40" in page and "nan" not in page and page.count("<figure>") == 2


def test_a_curve_that_never_changes_has_one_number_at_its_axis():
    for last, n in ((1.0, 1), (2.0, 2)):
        page = panels_as_html([{"step": 0, "loss": 1.0}, {"step": 1, "loss": last}], {"loss": ["loss"]})
        assert re.search(r'class="axis">(.*?)</div>', page)[1].count("<span>") == n


def test_a_curve_of_a_long_run_has_few_points(tmp_path):
    lines = [{"step": n, "loss": n % 7} for n in range(50_000)]
    assert 150 <= panels_as_html(lines, {"loss": ["loss"]}).count("<circle") <= 330
    assert panels_as_html([{"step": 0, "loss": 2.0}], {"loss": ["loss"]}).count("<circle") == 1


def test_the_panels_are_those_of_the_trainer_that_wrote_the_run(tmp_path):
    for line, title in (({"loss": 1.0, "eval_ppl": 2.0}, "perplexity"),
                        ({"loss": 1.0, "accuracy": 0.5}, "per pair"),
                        ({"score": 1.0, "eval_kl": 0.5}, "KL to the reference")):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **line}) + "\n")
        assert title in run.run_as_html(tmp_path, 1)[0]


def test_a_run_without_measurements_says_so(tmp_path):
    assert "--run OUT" in run.run_as_html(None, 1)[0]
    assert "no measurements yet" in run.run_as_html(tmp_path, 1)[0] and "none yet" in samples_as_html([], 1)
    assert run.last_change(None) == run.last_change(tmp_path) == []


def test_the_samples_are_a_row_per_question_and_a_column_per_step(tmp_path):
    page = run.run_as_html(a_run(tmp_path / "run"), 3)[1]
    assert re.findall(r"<th>step (\d+)", page) == ["0", "8", "16", "24", "32", "40"]
    table = [re.findall(r'<th scope="row" class="text">(.*?)</th>', page),
             re.findall(r'<div class="text">(.*?)</div>', page)]
    assert table[0] == [f"q{i}?" for i in range(24, 30)]
    assert table[1][:6] == ["answer 0 to 24", *["answer 6 to 24"] * 5]
    assert re.findall(r'td class="(.*?)"', page)[:6] == ["", "", "same ", "same ", "same ", "same best"]
    assert "page 3 of 3" in page and run.run_as_html(tmp_path / "run", 99)[1] == page
    first = run.run_as_html(tmp_path / "run", None)[1]
    assert "page 1 of 3" in first and re.findall(r'"row" class="text">(.*?)<', first) == [
        f"q{i}?" for i in range(12)]


# -------------------------------------------------------------------------------------- data
@pytest.fixture
def with_data(plain_site, tmp_path):
    """A function that puts rows into the site, and reads a page of them as {name: [(text, kind)]} per row."""
    def read(records, step, max_len=64):
        plain_site.records = records
        page = rows.rows_as_html(plain_site, step, max_len, 1)
        found = []
        for row in page.split('<div class="batch">')[1:]:
            names = re.findall(r'<div class="faint">(.*?)</div><div class="tokens">(.*?)</div>', row)
            found.append({name: re.findall(r'<span class="t (\w+)" title="id (.*?), column (\d+)', tokens)
                          for name, tokens in names})
        return page, found
    return read


@pytest.fixture
def rng():
    return random.Random(3)


def records_of(rng, n=6):
    return [Record([("Human", sentence(rng, rng.randint(3, 9)))], sentence(rng, rng.randint(2, 9)),
                   sentence(rng, rng.randint(2, 9))) for _ in range(n)]


def without_padding(tokens):
    return [(kind, int(id), int(column)) for kind, id, column in tokens if kind != "padding"]


def test_sft_rows_show_what_collate_sft_masks_and_what_has_a_label(with_data, rng, tokenizer_file):
    records, tokenizer = records_of(rng), Tokenizer(tokenizer_file)
    _, found = with_data(records, "sft")
    ids, mask, labels = collate_sft([data.encode_sft(tokenizer, record, 64) for record in records])
    for i, row in enumerate(found):
        shown = without_padding(row[""])
        assert [id for _, id, _ in shown] == ids[i][mask[i]].tolist()
        assert [column for *_, column in shown] == mask[i].nonzero().flatten().tolist()
        has_label = [kind in ("answer", "EOS") for kind, *_ in shown]
        assert has_label == (labels[i] != -100)[mask[i]].tolist() and shown[-1][0] == "EOS"
        padding = [text for kind, text, _ in row[""] if kind == "padding"]
        assert padding == [f"padding \u00d7 {n}" for n in [int((~mask[i]).sum())] if n]


def test_reward_rows_show_the_first_difference_and_the_token_of_the_score(with_data, rng, tokenizer_file):
    records, tokenizer = records_of(rng), Tokenizer(tokenizer_file)
    _, found = with_data(records, "reward")
    ids, mask, starts = collate_pairs([data.encode_pair(tokenizer, record, 64) for record in records])
    for i, row in enumerate(found):
        for j, name in ((i, "chosen"), (i + len(records), "rejected")):
            shown = without_padding(row[name])
            assert [id for _, id, _ in shown] == ids[j][mask[j]].tolist()
            assert [kind for kind, *_ in shown] == [
                "same" if t < starts[i] else "different" if t < len(shown) - 1 else "score"
                for t in range(len(shown))]


def test_ppo_rows_are_padded_left_and_end_where_the_answer_begins(with_data, rng, tokenizer_file):
    records, tokenizer = records_of(rng), Tokenizer(tokenizer_file)
    _, found = with_data(records, "ppo")
    ids, mask = collate_prompts([data.encode_prompt(tokenizer, record, 64) for record in records])
    for i, row in enumerate(found):
        *shown, end = [token for token in row[""] if token[0] != "padding"]
        assert [(int(id), int(column)) for _, id, column in shown] == [
            (int(ids[i, t]), t) for t in mask[i].nonzero().flatten().tolist()]
        assert end == ("answer", "the answer", str(ids.shape[1]))


def test_what_is_cut_is_struck_out_and_a_cut_answer_has_no_eos(with_data, rng, tokenizer_file):
    record = Record([("Human", "why")], sentence(rng, 30))
    page, (row,) = with_data([record], "sft", 24)
    kinds = [kind for kind, *_ in row[""]]
    whole = data.encode_sft(Tokenizer(tokenizer_file), record, 10**6)[0]
    assert "answers cut" in page and "EOS" not in kinds and kinds.count("cut") == len(whole) - 24
    assert [int(id) for _, id, _ in row[""]] == whole


@pytest.mark.parametrize("step", rows.STEPS)
def test_turns_that_a_prompt_has_lost_are_struck_out(step, with_data, rng, tokenizer_file):
    turns = [("System", "the sky"), ("Human", "one " + sentence(rng)), ("Assistant", "two " + sentence(rng)),
             ("Human", "why")]
    tokenizer, record = Tokenizer(tokenizer_file), Record(turns, "red", "red")
    room = len(data.encode_prompt(tokenizer, Record([turns[0], turns[-1]]), 10**6))
    room += 0 if step == "ppo" else len(data.encode_answer(tokenizer, record, "red"))
    record.rejected = "a"
    for length, lost in ((room, [1, 2]), (room - 1, [0, 1, 2]), (200, [])):
        page, _ = with_data([record], step, length)
        struck = re.findall(r'<b>(\w+)</b><span class="text struck">(.*?)</span>', page)
        assert struck == [turns[i] for i in lost]
        assert ("lost their oldest turns" in page, "lost their system text" in page) == (1 in lost, 0 in lost)


@pytest.mark.parametrize("step, record, why", [
    ("sft", Record([("Human", "why")], " "), "no answer"),
    ("sft", Record([("Human", "why " * 90)], "so"), "not fit"),
    ("reward", Record([("Human", "why")], "so"), "not a pair"),
    ("reward", Record([("Human", "w")], "so", "so"), "identical"),
    ("ppo", Record([("Human", "why " * 90)], "so"), "dropped")])
def test_a_row_that_is_dropped_says_why_and_is_still_shown(step, record, why, with_data):
    page, found = with_data([record, Record([("Human", "why")], "so", "not so")], step, 40)
    assert why in page.split("legend")[1] and found[0] == {} and found[1] and "<details open>" in page


def test_the_legend_names_every_kind_that_is_shown(with_data, rng):
    for step in rows.STEPS:
        long = Record([("Human", "why")], sentence(rng, 40), "no")
        page, found = with_data([*records_of(rng, 5), long], step)
        kinds = {kind for row in found for tokens in row.values() for kind, *_ in tokens}
        assert kinds <= set(re.findall(r'<li><span class="t (\w+)">', page)) == {*rows.LEGEND[step]}
        css = (REPO / "web" / "page.css").read_text()
        assert all(f".{kind}" in css for kind in kinds)


def test_tokens_read_as_the_text_and_bytes_as_their_pieces(tokenizer_file, with_data):
    page, _ = with_data([Record([("Human", "so\tblue")], "the cat \U0001f9ff é")], "sft", 200)
    text = re.search(r'<div class="tokens">(.*?)</div>', page)[1].replace("<br>", "")
    shown = [html.unescape(token) for token in re.findall(r">(.*?)</span>", text)]
    assert (shown[0], shown[-1]) == ("BOS", "EOS") and "\u21b5" in shown and "<0xF0>" in shown
    assert "".join(shown[1:]).startswith(
        "\u00b7\u21b5\u21b5Human:\u00b7so\tblue\u21b5\u21b5Assistant:\u00b7the\u00b7cat")


def test_a_length_out_of_range_is_refused_and_pages_are_kept_in_range(plain_site, rng):
    assert "--data FILE" in rows.rows_as_html(plain_site, "sft", 64, 1)
    plain_site.records = records_of(rng, 20)
    for length in (0, None, 257, -3):
        page = rows.rows_as_html(plain_site, "sft", length, 1)
        assert "--max-len is not from 1 to 256" in page and "tokens" not in page
    assert "page 4 of 4" in rows.rows_as_html(plain_site, "sft", 64, 99)
    assert "page 1 of 4" in rows.rows_as_html(plain_site, "sft", 64, None)


# -------------------------------------------------------------------------------------- the command line
@pytest.fixture
def start(monkeypatch, base):
    """Runs main() with these flags. No weights may load, and no server may start."""
    def no_weights(*args):
        raise AssertionError("weights were loaded")

    def run_main(*flags):
        monkeypatch.setattr(sys, "argv", ["python -m web", *map(str, flags)])
        monkeypatch.setattr(chat, "load_model", no_weights)
        program.main()
    return run_main


@pytest.mark.parametrize("flags, wrong", [
    ((), "toy/made|runs/toy|--model"), (("--model", "nowhere"), "nowhere"), (("--port", "70000"), "--port"),
    (("--model", "BASE", "--vote", "votes.jsonl"), "--vote needs --versus"),
    (("--model", "BASE", "--versus", "BASE", "--vote", "v", "--temperature", "0"), "same answer twice"),
    (("--model", "BASE", "--run", "EMPTY"), "--run.*args.json"),
    (("--model", "BASE", "--data", "no.jsonl"), "no.jsonl"),
    (("--model", "BASE", "--max-len", "9"), "--max-len has no effect without --data"),
    (("--model", "BASE", "--password", ""), "--password"),
    (("--model", "BASE", "--share"), "unknown.*--share"),
    (("--model", "BASE", "--host", "256.1.1.1"), "--host"),
    (("--model", "BASE", "--max-tokens", "256"), "context"),
    (("--model", "BASE", "--versus", "nowhere", "--max-tokens", "9"), "nowhere")])
def test_wrong_flags_fail_in_one_line_before_weights_load(flags, wrong, start, base, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.flags.PROJECT", tmp_path)         # no toy lies here
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "web.args").write_text((REPO / "toy" / "web.args").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "check_gradio", lambda: None)
    if "256.1.1.1" not in flags:
        monkeypatch.setattr(program, "listen", lambda args: None)
    words = [{"BASE": base, "EMPTY": tmp_path}.get(flag, flag) for flag in flags]
    with pytest.raises(BadInput, match=wrong) as caught:
        start(*words)
    assert "\n" not in str(caught.value)


def test_a_busy_port_is_one_line(start, base):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(BadInput, match=f"--port {port}.*in use"):
            start("--model", base, "--port", port)


@pytest.mark.parametrize("version", [None, "5.49.1", "6.19.0"])
def test_without_gradio_or_with_an_old_one_a_line_says_how_to_install_it(version, monkeypatch):
    module = version and type(sys)("gradio")
    if module:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "gradio", module)
    with pytest.raises(BadInput, match="pip install -r web/requirements.txt"):
        program.check_gradio()


def test_other_machines_are_warned_about_once_and_not_where_there_is_a_password(capsys):
    for host, password, warns in (("127.0.0.1", None, False), ("0.0.0.0", "x", False),
                                  ("0.0.0.0", None, True)):
        program.listen(Namespace(host=host, port=0, password=password)).close()
        assert ("everyone" in capsys.readouterr().err) == warns


def test_the_run_tab_takes_the_run_that_was_named_then_the_model_then_the_toys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, model, toy = (tmp_path / name for name in ("named", "model", "runs/toy/ppo"))
    for folder in (named, model, toy):
        folder.mkdir(parents=True)
    assert program.run_folder(Namespace(run=None, model=str(model))) is None
    (toy / "args.json").write_text("{}")
    assert str(program.run_folder(Namespace(run=None, model=str(model)))) == "runs/toy/ppo"
    (model / "metrics.jsonl").write_text("")
    assert program.run_folder(Namespace(run=None, model=str(model))) == model
    (named / "args.json").write_text("{}")
    assert program.run_folder(Namespace(run=str(named), model=str(model))) == named


def test_a_public_tunnel_is_never_asked_for():
    for file in sorted((REPO / "web").glob("*.py")):
        assert "share=" not in file.read_text() and "launch(" not in file.read_text()


def test_the_page_is_small():
    lines = sum(len(file.read_text().splitlines()) for file in (REPO / "web").iterdir() if file.is_file())
    assert lines < 600


# -------------------------------------------------------------------------------------- through the API
@pytest.fixture
def client_of(monkeypatch):
    """A function that makes a client of a page, as a browser is one."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -r web/requirements.txt")
    from gradio_client import Client
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")        # the client would ask its maker's host
    clients = []

    def connect(address, **options):
        clients.append(Client(address, verbose=False, httpx_kwargs={"timeout": 60}, **options))
        return clients[-1]
    yield connect
    for client in clients:
        client.close()


def texts_in(shown):
    return [html.unescape(text) for text in re.findall(r'<div class="text">(.*?)</div>', shown)]


def ask(client, question):
    """Asks through the API; returns (past, now, message) as they are shown at the end."""
    client.predict(question, api_name="/ask")
    return client.predict(0.7, 0.9, 40, api_name="/answer_ask")[:3]


def test_a_question_a_vote_and_undo_through_the_api(site, client_of):
    with served(site) as address:
        client = client_of(address)
        past, now, message = ask(client, "why")
        assert sorted(texts_in(now)) == ["runs/ppo says why", "runs/sft says why"] and not texts_in(past)
        past, now, message, *_ = client.predict(api_name="/vote_b")
        vote, = standing_votes(site.votes.path)
        assert texts_in(past) == [vote["left"], vote["right"]] and vote["vote"] == "b" and not now
        assert message == f"A was {vote['models'][0]}, B was {vote['models'][1]}"
        tally = client.predict(api_name="/undo")[3]
        assert not standing_votes(site.votes.path) and "no votes yet" in tally


def test_answers_stream_through_the_api_and_stop_stops_them(plain_site, client_of, monkeypatch):
    answers(monkeypatch, lambda folder, question: "word " * 200, pause=0.03)
    with served(plain_site) as address:
        client = client_of(address)
        client.predict("why", api_name="/ask")
        job = client.submit(0.7, 0.9, 40, api_name="/answer_ask")
        wait_for(lambda: len(job.outputs()) > 4)
        assert "wait until" in client.predict("and", api_name="/ask")[2]
        client.predict(api_name="/stop")
        past = job.result(timeout=20)[0]
        lengths = [len(" ".join(texts_in(output[1]))) for output in job.outputs()[:4]]
        assert lengths == sorted(set(lengths)) and len(texts_in(past)) == 2
        assert 10 < len(texts_in(past)[0]) < 800 and not plain_site.lock.locked()


def test_a_client_that_goes_away_stops_its_answer_and_frees_the_network(plain_site, client_of, monkeypatch):
    answers(monkeypatch, lambda *_: "word " * 4000, pause=0.02)
    with served(plain_site) as address:
        code = (f"import os, time; from gradio_client import Client; c = Client({address!r}, verbose=False); "
                "c.predict('why', api_name='/ask'); job = c.submit(0.7, 0.9, 40, api_name='/answer_ask')\n"
                "while len(job.outputs()) < 3: time.sleep(0.05)\nos._exit(0)")
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
        wait_for(lambda: not plain_site.lock.locked(), 30)
        answers(monkeypatch, say)
        assert texts_in(ask(client_of(address), "and")[0]) == ["runs/ppo says and", "runs/sft says and"]


def test_files_of_the_machine_are_not_served_and_the_policy_names_no_other_host(site, client_of):
    import httpx
    with served(site) as address:
        page = httpx.get(address)
        assert page.headers["content-security-policy"] == program.POLICY and "http" not in program.POLICY
        loads = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", page.text)
        assert page.status_code == 200 and loads
        assert not [url for url in loads if "//" in url and not url.startswith(f"{address}/")]
        for path in ("/etc/hostname", site.votes.path, REPO / "README.md"):
            assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)
        upload = httpx.post(f"{address}/gradio_api/upload", files={"files": ("x.txt", b"more than a byte")})
        assert upload.status_code == 413


def test_the_server_asks_no_other_host_for_anything(site, client_of, monkeypatch):
    import httpx
    asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", lambda own, to: asked.append(to[0]) or connect(own, to))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **more: asked.append(host) or look_up(
        host, *args, **more))
    site.records = [Record([("Human", "why")], "so")]
    with served(site) as address:
        call = f"{address}/gradio_api/call/rows"
        event = httpx.post(call, json={"data": ["sft", 64, 1]}).json()["event_id"]
        assert "BOS" in httpx.get(f"{call}/{event}", timeout=60).text
        assert httpx.get(address).status_code == 200
    assert {str(host) for host in asked} == {"127.0.0.1"}


def test_a_password_is_asked_for(tokenizer_file, client_of, monkeypatch):
    import httpx
    answers(monkeypatch, say)
    with served(made_up_site(tokenizer_file, password="sesam")) as address:
        assert httpx.post(f"{address}/gradio_api/queue/join", json={}).status_code == 401
        assert httpx.post(f"{address}/login", data={"username": "x", "password": "wrong"}).status_code == 400
        assert texts_in(ask(client_of(address, auth=("x", "sesam")), "why")[0])


@pytest.mark.slow
def test_twenty_clients_at_once_mix_and_lose_nothing_and_memory_stays(tokenizer_file, client_of):
    server = subprocess.Popen([sys.executable, REPO / "tests" / "web_page.py", tokenizer_file], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(REPO)})
    with server:
        address = server.stdout.readline().strip()
        clients = [client_of(address) for _ in range(20)]

        def ask_once(i, k):
            past = ask(clients[i], f"question {i} {k}")[0]
            assert texts_in(past) == [f"{folder} says question {i} {j}" for j in range(k + 1)
                                      for folder in ("runs/ppo", "runs/sft")]
        memory = []
        with ThreadPoolExecutor(20) as pool:
            for k in range(2):
                list(pool.map(ask_once, range(20), [k] * 20))
                memory.append(psutil.Process(server.pid).memory_info().rss)
        assert memory[1] - memory[0] < 40e6
        server.stdin.close()


@pytest.mark.slow
def test_the_program_prints_one_line_serves_the_page_and_ends_by_ctrl_c(base, pairs_file, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -r web/requirements.txt")
    import httpx
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    flags = ["--model", base, "--max-tokens", 9, "--run", tmp_path, "--data", pairs_file, "--port", port]
    process = subprocess.Popen([sys.executable, "-m", "web", *map(str, flags)], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == f"The page: http://127.0.0.1:{port}  (Ctrl-C ends it)\n"
        assert "alpaca-rlhf" in httpx.get(f"http://127.0.0.1:{port}", timeout=60).text
        process.send_signal(2)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("", "", 130)


def test_help_names_every_flag(start, capsys):
    with pytest.raises(SystemExit):
        start("-h")
    shown = capsys.readouterr().out
    assert all(f"--{flag}" in shown for flag in ("model", "versus", "vote", "run", "data", "max-len", "host"))
    assert "--share" not in shown
