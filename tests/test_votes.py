"""Votes: the file, the tally, the models in order, chat.py --vote, and reward.py's reading of it."""
import gzip
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import chat
import reward
from conftest import REPO
from data import Tokenizer, encode_pair, load_records, load_rows, read_records
from llama import BadInput
from runtime import votes
from runtime.votes import Pair, VoteFile
from test_chat import CTRL_C, adapter, adapter_folder, parrots, talk, terminal, type_in  # noqa: F401

QUESTION = [("Human", "Why?")]


def pair(left="so", right="because", models=("runs/a", "runs/b"), turns=QUESTION):
    return Pair(list(turns), [left, right], list(models))


@pytest.fixture
def ballot(tmp_path):
    return VoteFile(str(tmp_path / "votes.jsonl"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("key, chosen, rejected", [("a", "so", "because"), ("b", "because", "so"),
                                                   ("t", None, None), ("s", None, None)])
def test_a_vote_is_one_line_that_says_all(key, chosen, rejected, ballot):
    turns = [("System", "Be kind."), ("Human", "Why?"), ("Assistant", "So."), ("Human", "日本?")]
    ballot.add(pair(turns=turns), key, 0.7, 3)
    row, = lines(ballot.path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row.pop("time")) and len(row.pop("id")) == 16
    assert 0 <= row.pop("seconds") < 60
    assert row == {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"},
                              {"role": "assistant", "content": "So."}, {"role": "user", "content": "日本?"}],
                   "chosen": chosen, "rejected": rejected, "vote": key, "left": "so", "right": "because",
                   "models": ["runs/a", "runs/b"], "temperature": 0.7, "seed": 3}


def test_a_vote_that_is_taken_back_stays_in_the_file_and_does_not_count(ballot):
    ballot.add(pair(), "a", 1.0, None)
    second = ballot.add(pair(), "b", 1.0, None)
    assert ballot.undo()["id"] == second["id"] and ballot.was_asked(QUESTION)
    assert [row.get("undo", row.get("vote")) for row in lines(ballot.path)] == ["a", "b", second["id"]]
    assert [vote["vote"] for vote in votes.standing_votes(ballot.path)] == ["a"]
    assert ballot.undo()["vote"] == "a" and ballot.undo() is None and len(lines(ballot.path)) == 4
    assert not ballot.was_asked(QUESTION) and not VoteFile(str(ballot.path)).was_asked(QUESTION)


def test_an_undo_may_be_of_an_earlier_vote(ballot):
    first, second = (ballot.add(pair(left=left), "a", 1.0, None) for left in ("so", "as"))
    assert ballot.undo(first) is first and ballot.undo(first) is None
    assert votes.standing_votes(ballot.path) == [second] and ballot.undo() is second


def test_an_existing_file_is_continued_and_what_it_asked_is_known(ballot):
    ballot.add(pair(), "a", 1.0, None)
    before = ballot.path.read_bytes()
    again = VoteFile(str(ballot.path))
    assert again.was_asked(QUESTION) and not again.was_asked([("Human", "Who?")])
    assert again.undo() is None                                    # another program's vote
    again.add(pair(), "b", 1.0, None)
    assert ballot.path.read_bytes().startswith(before) and len(lines(ballot.path)) == 2


def test_folders_above_the_file_are_made(tmp_path):
    VoteFile(str(tmp_path / "a" / "b" / "votes.jsonl")).add(pair(), "a", 1.0, None)
    assert len(lines(tmp_path / "a" / "b" / "votes.jsonl")) == 1


@pytest.mark.parametrize("text", ['{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "no JSON\n", "[1]\n",
                                  '{"undo": "a", "more": 1}\n', '{"undo": ["a"]}\n'])
def test_a_file_that_holds_something_else_is_refused_and_stays_as_it_is(text, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(BadInput, match="data.jsonl"):
        VoteFile(str(tmp_path / "data.jsonl"))
    assert (tmp_path / "data.jsonl").read_text() == text


def test_votes_to_which_no_line_can_be_added_are_refused_and_stay_as_they_are(ballot):
    row = ballot.add(pair(), "a", 1.0, None)
    for content in (gzip.compress(ballot.path.read_bytes()), json.dumps([row]).encode()):
        ballot.path.write_bytes(content)
        with pytest.raises(BadInput, match="JSON lines"):
            VoteFile(str(ballot.path))
        assert ballot.path.read_bytes() == content and len(read_records(ballot.path)) == 1


@pytest.mark.parametrize("change", [{"vote": "x"}, {"vote": ["a"]}, {"models": ["one"]}, {"models": "ab"},
                                    {"id": 1}])
def test_a_damaged_vote_is_refused(change, ballot):
    row = ballot.add(pair(), "a", 1.0, None)
    ballot.path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(BadInput, match="votes.jsonl:1 is no vote"):
        VoteFile(str(ballot.path))


@pytest.mark.parametrize("path", ["", ".", "a\0b", "/proc/votes.jsonl", "/dev/null"])
def test_a_file_that_cannot_be_written_is_refused_at_once(path):
    with pytest.raises(BadInput, match="--vote"):
        VoteFile(path)


def test_two_writers_lose_nothing(ballot):
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
            "from runtime.votes import Pair, VoteFile\n"
            f"votes = VoteFile({str(ballot.path)!r})\n"
            "for i in range(150):\n"
            "    turns = [('Human', f'{sys.argv[1]} {i} ' * 500)]\n"
            "    votes.add(Pair(turns, ['a', 'b'], ['x', 'y']), 'a', 1, 0)\n")
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("one", "two", "three")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = Counter(row["prompt"][0]["content"][:3] for row in lines(ballot.path))
    assert found == {"one": 150, "two": 150, "thr": 150}


def test_a_full_disk_is_said_the_file_stays_whole_and_the_vote_can_be_repeated(ballot):
    ballot.add(pair(), "a", 1.0, None)
    before = ballot.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 50):                                           # no room at all; room for part of a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
        try:
            with pytest.raises(BadInput, match="votes.jsonl: the vote is not saved"):
                ballot.add(pair(), "b", 1.0, None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ballot.path.read_bytes() == before and len(ballot.given) == 1
    ballot.add(pair(), "b", 1.0, None)
    assert [vote["vote"] for vote in votes.standing_votes(ballot.path)] == ["a", "b"]


def test_a_vanished_folder_is_said_and_the_vote_can_be_repeated(tmp_path):
    ballot = VoteFile(str(tmp_path / "folder" / "votes.jsonl"))
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="the vote is not saved"):
        ballot.add(pair(), "b", 1.0, None)
    (tmp_path / "elsewhere").rename(tmp_path / "folder")
    ballot.add(pair(), "b", 1.0, None)
    assert len(lines(ballot.path)) == 1


def test_a_vanished_file_is_begun_anew_and_that_is_said(ballot, capsys):
    ballot.path.unlink()
    ballot.add(pair(), "b", 1.0, None)
    assert "has vanished" in capsys.readouterr().err and len(lines(ballot.path)) == 1


def test_a_torn_last_line_stays_a_line_of_its_own(ballot):
    ballot.path.write_text('{"id": "torn')
    ballot.add(pair(), "b", 1.0, None)
    torn, whole = ballot.path.read_text().splitlines()
    assert torn == '{"id": "torn' and json.loads(whole)["vote"] == "b"


def test_sides_are_drawn_by_lot():
    drawn = Counter(tuple(votes.draw_sides()) for _ in range(400))
    assert drawn.keys() == {(0, 1), (1, 0)} and 120 < drawn[0, 1] < 280      # 8 standard deviations


# -------------------------------------------------------------------------------------- conversations
def test_a_conversation_holds_the_answers_of_each_speaker_and_the_last_ones_again():
    talk = votes.Conversation()
    for answers, is_again in ((["a", "b"], False), (["c", "d"], False), (["e", "f"], True)):
        talk.go_on("why" if is_again or answers[0] == "c" else "who", answers, None, is_again)
    who, why = ("Human", "who"), ("Human", "why")
    assert talk.turns(1, "and") == [who, ("Assistant", "b"), why, ("Assistant", "f"), ("Human", "and")]
    assert talk.turns(0, "why", is_again=True) == [who, ("Assistant", "a"), why]
    assert talk.undo() == "forgotten" and talk.turns(1) == [who, ("Assistant", "b"), why, ("Assistant", "d")]
    talk.clear()
    assert talk.turns(0) == [] and talk.past == []


# -------------------------------------------------------------------------------------- as data
def test_votes_are_pairs_and_what_decides_nothing_is_left_out_and_counted(ballot, capsys):
    for key in "aabtss":
        ballot.add(pair(left=f"so {key}"), key, 1.0, None)
    ballot.add(pair(), "b", 1.0, None)
    ballot.undo()
    tally = Counter()
    records = read_records(ballot.path, tally)
    assert [(record.turns, record.chosen, record.rejected) for record in records] == [
        (QUESTION, "so a", "because"), (QUESTION, "so a", "because"), (QUESTION, "because", "so b")]
    assert tally == {"votes left out: ties": 1, "votes left out: skips": 2, "votes left out: taken back": 1}
    assert not capsys.readouterr().err                             # no field is named as one that is not read


def test_votes_beside_other_rows_and_given_twice_count_once(ballot, tmp_path):
    ballot.add(pair(), "a", 1.0, None)
    ballot.add(pair(), "t", 1.0, None)
    row = json.dumps({"prompt": "Who?", "chosen": "I", "rejected": "you"}) + "\n"
    (tmp_path / "all.jsonl").write_text(row + 2 * ballot.path.read_text())
    assert [record.turns[0][1] for record in read_records(tmp_path / "all.jsonl")] == ["Who?", "Why?"]


def test_a_file_of_votes_is_used_whole_whatever_the_split(ballot, tmp_path):
    for n in range(40):
        ballot.add(pair(turns=[("Human", f"Why {n}?")]), "a", 1.0, None)
    rows = [json.dumps({"prompt": f"Who {n}?", "chosen": "I", "rejected": "you"}) for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    files = [str(ballot.path), str(tmp_path / "pairs.jsonl")]
    for phase in range(3):
        train, held_out = load_records(files, phase, (4, 4, 2), 1, None, 0.2, Counter())
        firsts = Counter(record.turns[0][1][:3] for record in train + held_out)
        assert firsts["Why"] == 40 and 2 < firsts["Who"] < 30 and held_out


@pytest.mark.parametrize("n, flags, words", [(12, [], "--batch 32 has to be smaller"),
                                             (40, ["--eval-share", "0.001"], "--eval-share: .* as in 0.2")])
def test_too_few_votes_are_refused_by_one_line_that_names_the_flag(n, flags, words, ballot, base, tmp_path,
                                                                   monkeypatch):
    for i in range(n):
        ballot.add(pair(turns=[("Human", f"why {i}")]), "a", 1.0, None)
    given = ["--model", base, "--data", ballot.path, "--out", tmp_path / "out", *flags]
    monkeypatch.setattr(sys, "argv", ["reward.py", *map(str, given)])
    monkeypatch.setattr("data.say", print)
    args = reward.get_args()
    with pytest.raises(BadInput, match=words):
        load_rows(args, 1, encode_pair, Tokenizer(base), args.max_len, args.batch)


# -------------------------------------------------------------------------------------- the tally
def test_wilson_is_as_published():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for wins, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                               (1, 29, 0.0061, 0.1718)):
        assert votes.wilson(wins, n) == pytest.approx((low, high), abs=6e-5)
    assert votes.wilson(0, 6)[0] == 0 and votes.wilson(7, 7)[1] == 1


def test_the_tally_says_who_won_and_what_the_voter_is_prone_to(ballot):
    assert votes.tally_lines([]) == ["no votes yet"]
    for key, swapped in (("a", False), ("a", True), ("b", True), ("b", True), ("t", False), ("s", True)):
        models = ("runs/b", "runs/a") if swapped else ("runs/a", "runs/b")
        ballot.add(pair("longer", "short", models=models), key, 1.0, None)
    ballot.add(pair("one", "two", models=("runs/a", "runs/a")), "a", 1.0, None)
    first, second, habits = votes.tally_lines(votes.standing_votes(ballot.path))
    assert first == ("runs/a was better than runs/b in 3 of 4 (75 %; 95 % interval: 30 to 95 %); ties: 1, "
                     "skips: 1")
    assert second == "1 vote between two answers of runs/a; ties: 0, skips: 0"
    assert habits.startswith("answer A was chosen in 3 of 5 (60 %") and "in 2 of 4 (50 %" in habits


# -------------------------------------------------------------------------------------- the order
def drawn_votes(strengths, n, seed):
    """Votes of somebody who follows these strengths."""
    rng, names, rows = np.random.default_rng(seed), sorted(strengths), []
    for _ in range(n):
        left, right = rng.choice(names, 2, replace=False)
        wins = rng.random() < 1 / (1 + np.exp(strengths[right] - strengths[left]))
        rows.append({"vote": "a" if wins else "b", "models": [str(left), str(right)]})
    return rows


def test_bradley_terry_is_where_the_penalised_likelihood_is_highest():
    wins = np.random.default_rng(0).integers(0, 9, (4, 4)) * (1 - np.eye(4))
    x = votes.bradley_terry(wins)

    def likelihood(x):
        beats = -np.logaddexp(0, x[None, :] - x[:, None])          # log of the chance that row beats column
        return (wins * beats).sum() - (np.logaddexp(0, x) + np.logaddexp(0, -x)).sum()
    best = likelihood(x)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 1e-1, 1):
        for step in rng.normal(size=(200, 4)) * size:
            assert likelihood(x + step) <= best + 1e-9


def test_the_ranking_finds_the_order_and_its_intervals_hold_the_truth():
    truth = {"strong": 1.0, "middle": 0.0, "weak": -1.0}
    inside, runs = 0, 20
    for seed in range(runs):
        ranks = votes.ranking(drawn_votes(truth, 400, seed), resamples=200)
        assert [row[0] for row in ranks] == ["strong", "middle", "weak"]
        inside += sum(low <= votes.POINTS * truth[model] <= high for model, _, low, high, _ in ranks)
    assert inside >= 0.85 * 3 * runs


def test_ties_are_half_a_win_skips_nothing_and_who_never_lost_is_not_infinite():
    ties = [{"vote": "t", "models": ["a", "b"]}] * 5 + [{"vote": "s", "models": ["a", "c"]}] * 5
    assert {row[0]: round(row[1], 6) for row in votes.ranking(ties)} == {"a": 0, "b": 0}
    won = votes.ranking([{"vote": "a", "models": ["a", "b"]}] * 9)
    assert won[0][0] == "a" and 100 < won[0][1] < 1000 and won[0][4] == 9
    assert votes.ranking([]) == votes.ranking([{"vote": "a", "models": ["a", "a"]}]) == []


def test_the_program_prints_tally_and_order(ballot):
    for vote in drawn_votes({"m1": 1, "m2": 0, "m3\x1b[31m": -1}, 60, 0):
        ballot.add(pair(models=vote["models"]), vote["vote"], 1.0, None)
    done = subprocess.run([sys.executable, "-m", "runtime.votes", str(ballot.path)], cwd=REPO, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    assert re.findall(r"\)  (m\d)", done.stdout) == ["m1", "m2", "m3"]
    for words in ([], ["nowhere.jsonl"], ["-h"]):
        done = subprocess.run([sys.executable, "-m", "runtime.votes", *words], cwd=REPO, text=True,
                              capture_output=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------- in the chat
SAMPLED = ("--max-tokens", "12", "--temperature", "1", "--seed", "1")


@pytest.fixture
def vote(talk, base, adapter, tmp_path, monkeypatch):
    """A function that votes in chat.py on answers of base and adapter; returns what is printed. Base stands
    left, unless order is [1, 0]."""
    def run(typed, *flags, order=(0, 1), other=adapter):
        monkeypatch.setattr(votes, "draw_sides", lambda: list(order))
        return talk("--model", base, "--versus", other, "--vote", run.file, *SAMPLED, *flags, typed=typed)
    run.file = tmp_path / "votes.jsonl"
    return run


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("key", ["a", "b", "t"])
def test_a_vote_is_blind_and_the_better_answer_continues_both_conversations(order, key, vote, talk, base,
                                                                           adapter):
    shown = vote(f"why\n{key.upper()} \nand\na\n", order=order)
    folders = [str((base, adapter)[i]) for i in order]
    first, second = lines(vote.file)
    assert first["models"] == folders and [first["left"], first["right"]] == talk.said[0]
    assert first["chosen"] == {"a": first["left"], "b": first["right"], "t": None}[key]
    said = first["right" if key == "b" else "left"]
    assert second["prompt"] == [{"role": "user", "content": "why"}, {"role": "assistant", "content": said},
                                {"role": "user", "content": "and"}]
    assert talk.prompts[2] == talk.prompts[3]                      # both models are asked the same
    before, after = shown.split("Better:")[:2]
    assert not any(folder in before for folder in folders)
    assert f"[A was {folders[0]}, B was {folders[1]}]" in after


def test_each_side_draws_its_own_random_numbers_in_a_vote(vote, talk, base):
    vote("why\ns\n", other=base)
    assert talk.said[0][0] != talk.said[0][1]


def test_a_skipped_question_is_forgotten(vote, talk):
    vote("why\ns\nand\na\n")
    assert [row["vote"] for row in lines(vote.file)] == ["s", "a"]
    assert lines(vote.file)[1]["prompt"] == [{"role": "user", "content": "and"}]


def test_the_same_answers_are_not_offered(vote, talk, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    shown = vote("why\nand\n", "--temperature", 0, other=copy)
    assert shown.count("counts as a skip]") == 2 and "Better:" not in shown
    assert [row["vote"] for row in lines(vote.file)] == ["s", "s"]
    assert len(talk.prompts[2]) > len(talk.prompts[0])             # the conversation goes on


def test_a_stopped_answer_is_not_offered(vote, monkeypatch):
    def stopped(*args):
        yield "so"
        raise KeyboardInterrupt
    monkeypatch.setattr(chat, "answer", stopped)
    shown = vote("why\n")
    assert "[stopped: there is no vote" in shown and not vote.file.read_text()
    assert "A: so" in shown and "B: so" not in shown                # the other answer does not begin


def test_undo_takes_the_vote_back_at_the_next_vote_and_between_questions(vote, talk):
    shown = vote("why\na\nand\nu\nu\nb\n/undo\nu\nwho\na\n")
    ids = [row.get("id") or row["undo"] for row in lines(vote.file)]
    assert ids[1] == ids[0] and ids[3] == ids[2] and len(ids) == 5
    assert shown.count("taken back") == 2 and "[forgotten]" in shown
    assert "[there is no vote to take back]" in shown
    assert lines(vote.file)[-1]["prompt"] == [{"role": "user", "content": "who"}]      # both are forgotten


def test_undo_after_a_skip_takes_the_skip_back_and_nothing_else(vote):
    shown = vote("why\na\nand\ns\nU\nthen\na\n")
    assert [row.get("vote") for row in lines(vote.file)] == ["a", "s", None, "a"]
    assert len(lines(vote.file)[3]["prompt"]) == 3                 # "why" is still in the conversation
    assert "[the skip is taken back]" in shown


def test_undo_of_a_retry_brings_the_answer_before_it_back(vote):
    shown = vote("why\na\n/retry\nb\nu\nand\nt\n/undo\n/undo\nundo\n")
    rows = lines(vote.file)
    assert [row.get("vote") for row in rows] == ["a", "b", None, "t", None, None]
    assert rows[3]["prompt"][1]["content"] == rows[0]["chosen"]
    assert rows[5]["undo"] == rows[0]["id"] and shown.count("[the vote is taken back]") == 3
    assert "[nothing has been said yet]" in shown


def test_undo_does_not_reach_into_the_conversation_before(vote):
    shown = vote("why\na\n/clear\nwhy\nb\nu\nu\n")
    assert [row["vote"] for row in votes.standing_votes(vote.file)] == ["a"]
    assert shown.rstrip().endswith("[nothing has been said yet]\n\nHuman:")


@pytest.mark.parametrize("seed", range(8))
def test_undo_goes_back_through_all_that_was_done(seed, ballot):
    rng, talk, states, early = random.Random(seed), votes.Conversation(ballot), [], set()
    def standing():
        return {row["id"] for row in votes.standing_votes(ballot.path)}
    for n in range(80):
        act = rng.choice(["ask", "ask", "again", "undo", "undo early", "clear"] if n < 60 else ["undo"])
        if act == "undo" and states:
            history, ids = states.pop()
            talk.undo()
            assert talk.history == history and standing() == ids - early
        elif act == "clear" and rng.random() < 0.2:
            talk.clear()
            states = []
        elif act == "undo early" and (vote := ballot.undo()):      # at the next vote; the answer stays
            early.add(vote["id"])
        elif act == "ask" or act == "again" and talk.history:
            states.append(([*talk.history], standing()))
            is_again = act == "again"
            question = talk.history[-1][0] if is_again else f"question {rng.randrange(3)}"
            turns = talk.turns(0, question, is_again)
            vote = ballot.add(pair(left=f"answer {n}", turns=turns), rng.choice("abts"), 1.0, None)
            better = votes.winner(vote)
            talk.go_on(question, None if better is None else [better] * 2, vote, is_again)
    assert not states and talk.history == []


def test_the_name_of_a_model_that_answered_twice_is_not_said(vote, base):
    assert "A was" not in vote("why\na\n", other=base)


def test_a_retry_is_voted_on_too(vote):
    vote("why\na\n/retry\nb\n")
    assert [row["prompt"][0]["content"] for row in lines(vote.file)] == ["why", "why"]


def test_what_is_no_key_is_asked_again_and_the_tally_is_at_hand(vote):
    shown = vote("why\nab\n\n/retry\n/votes\nc\nb\n/votes\nand\n/quit\nnever asked\n")
    assert [row["vote"] for row in lines(vote.file)] == ["b"] and shown.count("[type a, b, t, s or u") == 4
    assert "[no votes yet]" in shown and "was better than" in shown and shown.count("Better:") == 7


def test_a_vote_that_cannot_be_saved_is_repeated(vote, monkeypatch):
    write, failed = VoteFile.append, []

    def append(self, row):
        if not failed:
            failed.append(row)
            raise BadInput("the disk is full")
        write(self, row)
    monkeypatch.setattr(VoteFile, "append", append)
    shown = vote("why\na\nb\n")
    assert "[the disk is full]" in shown and [row["vote"] for row in lines(vote.file)] == ["b"]


def test_the_questions_of_a_file_are_asked_once_each(vote, talk, tmp_path):
    rows = [{"prompt": "why"}, {"prompt": "who", "chosen": "a", "rejected": "b"}, {"prompt": "why"},
            {"messages": [{"role": "user", "content": "and"}, {"role": "assistant", "content": "so"},
                          {"role": "user", "content": "then"}]}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--prompts", tmp_path / "questions.jsonl"
    shown = vote("a\n", *flags)                                    # the input ends before the second vote
    assert "[4 of 4 questions are left" in shown and "[2 of 4]  Human: who" in shown
    shown = vote("b\ns\na\n", *flags)
    assert "[3 of 4 questions are left" in shown and re.search("Human: and\\s+Assistant: so\\s+Human", shown)
    assert [row.get("vote") for row in lines(vote.file)] == ["a", "b", "s", "a"]
    assert [len(row["prompt"]) for row in lines(vote.file) if "prompt" in row] == [1, 1, 1, 3]
    assert "[0 of 4 questions are left" in vote("", *flags) and "was better than" in shown


def test_a_question_of_the_file_whose_vote_is_taken_back_comes_again(vote, tmp_path):
    rows = [{"prompt": word} for word in ("why", "who", "and")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--prompts", tmp_path / "questions.jsonl"
    shown = vote("a\nu\nb\nt\n", *flags)                           # two questions, and the first one again
    assert re.findall(r"\n\[(\d) of 3\]  Human: (\w+)", shown) == [
        ("1", "why"), ("2", "who"), ("2", "why"), ("3", "and")]
    assert "[1 of 3 questions are left" in (shown := vote("u\na\n", *flags)) and "no vote to take" in shown
    assert [vote["vote"] for vote in votes.standing_votes(vote.file)] == ["b", "t", "a"]


def test_a_question_of_the_file_that_does_not_fit_is_passed_over(vote, tmp_path):
    rows = [{"prompt": "blue " * 400}, {"prompt": "why"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert vote("a\n", "--prompts", tmp_path / "questions.jsonl").count("[the question is too long") == 1
    assert len(lines(vote.file)) == 1


@pytest.mark.parametrize("flags, words", [
    (["--vote", "v", "--versus", None], "--versus"),
    (["--vote", "v", "--versus", "base", "--prompt", "why"], "--prompt"),
    (["--vote", "v", "--versus", "base", "--temperature", "0"], "--temperature 0"),
    (["--prompts", "questions.jsonl", "--versus", "base"], "--vote"),
    (["--vote", "v", "--versus", "base", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
])
def test_flags_that_do_not_go_together_are_refused_before_anything_loads(flags, words, talk, base, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(chat, "load_model", None)
    there = {"v": tmp_path / "v.jsonl", "base": base}
    pairs = list(zip(flags[::2], flags[1::2], strict=True))
    given = [word for flag, value in pairs if value for word in (flag, there.get(value, value))]
    with pytest.raises(BadInput, match=words):
        talk("--model", base, *given)


# -------------------------------------------------------------------------------------- in a terminal
@pytest.mark.slow
def test_votes_in_a_terminal(terminal, parrots, tmp_path):
    file = tmp_path / "votes.jsonl"
    ours, process = terminal("--model", parrots["long"], "--versus", parrots["accent"], "--vote", file,
                             "--temperature", 0, width=120)
    type_in(ours, "", "Human: $")
    shown = type_in(ours, "tell me\n", "before: $")
    names = [str(parrots[name]) for name in ("long", "accent")]
    assert re.search(r"A +\| B", shown) and not any(name in shown for name in names)
    shown = type_in(ours, "x\n", "before: $")                      # no key: asked again
    assert "/quit" in type_in(ours, CTRL_C, "before: $")
    shown = type_in(ours, "b\n", "Human: $")
    row, = lines(file)
    assert all(name in shown for name in names) and row["models"][1] in shown.split("B was ")[1]
    assert row["chosen"] == row["right"] and {row["left"], row["right"]} >= {"\u00e9"}
    assert "1 of 1" in type_in(ours, "/votes\n", "Human: $")
    type_in(ours, "again\n", "before: $")
    os.write(ours, b"\x04")                                        # Ctrl-D at the vote leaves without one
    assert process.wait(20) == 0 and len(lines(file)) == 1
