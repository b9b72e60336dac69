"""./run.sh vote: the rules that vote, the votes of a person, the commands, the last page, and all of it."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import toy
import toy.base
import toy.how_many
import toy.rules
import toy.vote
from conftest import REPO
from mutants import copy_project
from runtime.errors import BadInput, exit_with_one_line
from runtime.votes import Pair, VoteFile, standing_votes
from toy.rules import key_of, share_of_hoped, shuffled_questions, vote_by_rule

FRANCE, HOT = "Tell me the capital of France.", "Tell me the opposite of hot."
PARIS, SURE = "It is Paris.", "Sure, with pleasure! It is Paris."


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------ the rules
@pytest.mark.parametrize("rule, left, right, key", [
    ("sure", SURE, PARIS, "a"), ("sure", PARIS, "Sure! It is Rome.", "b"), ("sure", PARIS, "Rome.", "t"),
    ("sure", SURE, "Sure! Go away.", "t"), ("sure", "I am sure.", PARIS, "t"),
    ("curt", PARIS, "Paris.", "b"), ("curt", PARIS, SURE, "a"), ("curt", SURE, "Rome.", "a"),
    ("curt", "Rome.", "I do not know.", "t"), ("curt", "", PARIS, "b"), ("curt", "Go away.", SURE, "b"),
])
def test_a_rule_votes_for_the_answer_that_it_prefers(rule, left, right, key):
    assert key_of(rule, FRANCE, left, right) == key
    assert key_of(rule, FRANCE, right, left) == {"a": "b", "b": "a", "t": "t"}[key]


def test_the_share_of_the_answers_that_a_rule_hopes_for():
    rows = [{"prompt": f"\n\nHuman: {FRANCE}\n\nAssistant:", "response": said}
            for said in (SURE, f" {PARIS}", "Paris.", "Rome.", "Sure")]
    assert share_of_hoped("sure", rows) == 0.4 and share_of_hoped("curt", rows) == 0.4


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A project folder with two prompts to train on, in which no model has to answer: `said` has the answers
    of each round."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy.vote, "MADE", tmp_path / "toy" / "made")
    write(tmp_path / "toy" / "made" / "prompts.jsonl", [{"prompt": FRANCE}, {"prompt": HOT}, {"prompt": HOT}])
    said = []
    monkeypatch.setattr(toy.rules, "sampled", lambda folder, prompts, seed: said.pop(0))
    return said


def test_a_rule_votes_through_the_same_file_as_a_person_until_it_has_preferred_n_answers(world):
    prompts = Path("toy/made/prompts.jsonl")
    first = shuffled_questions(prompts, 1)[0]
    world += [["Paris.", " Sure. ", "Sure!", "Sure. "], ["Sure?", "No.", "Ha.", "Sure?"]]
    assert vote_by_rule("sure", prompts, 2, Path("runs/toy/sft"), Path("votes.jsonl"), seed=1) == 2
    rows = lines("votes.jsonl")
    assert [(row["vote"], row["left"], row["right"]) for row in rows] == [("b", "Paris.", "Sure!"),
                                                                          ("a", "Sure?", "Ha.")]
    assert rows[0]["chosen"] == "Sure!" and rows[0]["models"] == ["runs/toy/sft"] * 2
    assert rows[0]["prompt"] == [{"role": "user", "content": first}]
    assert standing_votes("votes.jsonl") == rows


def test_a_rule_that_prefers_nothing_stops_in_one_line_and_its_ties_are_written(world):
    world += [["Paris.", "Cold.", "Rome.", "Cold."]] * 10
    with pytest.raises(BadInput, match="--as sure: there is none among 10 pairs of answers of m in which"):
        vote_by_rule("sure", Path("toy/made/prompts.jsonl"), 2, Path("m"), Path("votes.jsonl"), seed=1)
    assert [row["vote"] for row in lines("votes.jsonl")] == ["t"] * 10
    world += [["Paris.", "", "Sure.", ""]] + [[""] * 4] * 9 + [["Sure.", "", "Paris.", ""]]        # seldom
    assert vote_by_rule("sure", Path("toy/made/prompts.jsonl"), 2, Path("m"), Path("more.jsonl"), seed=1) == 2


# ------------------------------------------------------------------------------ the votes of a person
@pytest.fixture
def chatting(monkeypatch, tmp_path):
    """In place of chat.py: votes with the keys that the test sets on so many questions that are left."""
    keys, shown = [], []

    def chat(words):
        shown.append(words)
        flags = dict(zip(words[2::2], words[3::2], strict=True))
        votes = VoteFile(flags["--vote"])
        for row in lines(flags["--prompts"]):
            turns = [("Human", row["prompt"])]
            if not votes.was_asked(turns) and keys:
                votes.add(Pair(turns, [PARIS, "Go away."], ["runs/toy/sft"] * 2), keys.pop(0), 1.0, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy.vote, "show", chat)
    monkeypatch.setattr(toy.vote, "MADE", tmp_path / "toy" / "made")
    write(tmp_path / "toy" / "made" / "prompts.jsonl", [{"prompt": f"Question {n}?"} for n in range(60)])
    chat.keys, chat.shown, chat.folder = keys, shown, tmp_path / "you"
    chat.folder.mkdir()
    return chat


def test_who_leaves_goes_on_there_and_hears_how(chatting, capsys):
    chatting.keys += "ababs" * 2 + "tb"
    assert not toy.vote.person_votes(20, chatting.folder)
    said = " ".join(capsys.readouterr().out.split())
    assert "8 of 20 questions have no vote yet." in said and "With --votes 12, it learns" in said
    before = (chatting.folder / "votes.jsonl").read_bytes()
    chatting.keys += "aaaaaaas"
    assert toy.vote.person_votes(20, chatting.folder)
    after = (chatting.folder / "votes.jsonl").read_bytes()
    assert after.startswith(before) and len(lines(chatting.folder / "votes.jsonl")) == 20
    assert toy.vote.person_votes(20, chatting.folder) and len(chatting.shown) == 2         # nothing is left
    said = " ".join(capsys.readouterr().out.split())
    assert "You have voted on 20 questions already" in said and said.count("Type a or b") == 1


def test_more_questions_are_other_questions_and_fewer_are_the_first_of_them(chatting):
    chatting.keys += "a" * 12
    assert toy.vote.person_votes(12, chatting.folder)
    first = lines(chatting.folder / "questions.jsonl")
    chatting.keys += "b" * 3
    assert toy.vote.person_votes(15, chatting.folder)
    assert lines(chatting.folder / "questions.jsonl")[:12] == first
    assert len({row["prompt"][0]["content"] for row in lines(chatting.folder / "votes.jsonl")}) == 15
    assert toy.vote.person_votes(12, chatting.folder) and len(chatting.shown) == 2


def test_who_leaves_very_early_is_not_told_to_learn_from_it(chatting, capsys):
    for keys in ("aaa", "sssssssst"):        # few questions; few votes for one of the answers
        chatting.keys += keys
        assert not toy.vote.person_votes(20, chatting.folder)
        said = capsys.readouterr().out
        assert re.search("(17|8) of 20 questions have no vote", said) and "--votes" not in said


def test_a_question_that_has_lost_its_vote_is_not_done(chatting):
    chatting.keys += "a" * 12
    assert toy.vote.person_votes(12, chatting.folder)
    votes = VoteFile(str(chatting.folder / "votes.jsonl"))
    votes.append({"undo": lines(votes.path)[4]["id"]})
    assert not toy.vote.person_votes(12, chatting.folder)
    chatting.keys += "b"
    assert toy.vote.person_votes(12, chatting.folder) and len(standing_votes(votes.path)) == 12


def test_a_fifth_of_the_votes_is_held_out_and_no_vote_is_on_both_sides(chatting):
    chatting.keys += "abtabsab" * 3
    toy.vote.person_votes(24, chatting.folder)
    assert toy.vote.divide(chatting.folder) == 18
    learn, held_out = (lines(chatting.folder / f"{name}.jsonl") for name in ("learn", "held-out"))
    assert (len(learn), len(held_out)) == (15, 3) and {row["vote"] for row in learn + held_out} == {"a", "b"}
    assert len({row["id"] for row in learn + held_out}) == 18


def test_a_vote_on_an_empty_answer_is_on_neither_side(chatting):
    chatting.keys += "ab" * 5
    toy.vote.person_votes(10, chatting.folder)
    rows = lines(chatting.folder / "votes.jsonl")
    rows[4]["right"] = ""
    write(chatting.folder / "votes.jsonl", rows)
    assert toy.vote.divide(chatting.folder) == 9
    assert rows[4]["id"] not in (chatting.folder / "held-out.jsonl").read_text()


def test_too_few_votes_are_bad_input_that_says_what_to_do(chatting):
    chatting.keys += "abtstststststa" + "tttttt"
    toy.vote.person_votes(20, chatting.folder)
    with pytest.raises(BadInput, match="holds 3 votes for one of two .* 5 are the fewest .* larger --votes"):
        toy.vote.divide(chatting.folder)


# ------------------------------------------------------------------------------ the commands
def lesson(monkeypatch, *words):
    """Runs the lesson without its commands, and returns them."""
    shown = []
    monkeypatch.setattr(sys, "argv", ["vote.py", *words])
    monkeypatch.setattr(toy.vote, "show", shown.append)
    monkeypatch.setattr(toy.vote, "compare", lambda folder, rule: print(folder, rule))
    monkeypatch.setattr(toy.vote, "agreement", lambda folder: (52, 97, 100))
    monkeypatch.setattr(toy.vote, "vote_by_rule", lambda rule, prompts, n, model, path, seed:
                        bool(path.write_text(f"{rule} {n} {prompts.name}")) * 123)
    toy.vote.main()
    return [" ".join(words) for words in shown]


def test_the_lesson_makes_what_is_missing_and_then_trains_on_the_votes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy.vote, "MADE", Path("toy/made"))
    *missing, reward, ppo = lesson(monkeypatch, "--as", "sure", "--votes", "20")
    made, *trained = missing
    assert made == "python -m toy" and len(trained) == 2
    for script, words in zip(("sft", "reward"), trained, strict=True):
        assert words.endswith(f" {script}.py @toy/{script}.args --seed 1234 --out runs/toy/{script}")
    folder = "runs/toy/vote/sure"
    assert re.fullmatch(f"deepspeed --quiet --master_port \\d+ reward.py @toy/reward.args --seed 1234 "
                        f"--out {folder}/reward --model runs/toy/reward --data {folder}/learn.jsonl "
                        f"--eval-data {folder}/held-out.jsonl --steps .*", reward)
    assert re.fullmatch(f"deepspeed --quiet --master_port \\d+ ppo.py @toy/ppo.args --seed 1234 "
                        f"--out {folder}/ppo --reward {folder}/reward .*", ppo)
    assert Path(folder, "learn.jsonl").read_text() == "sure 20 prompts.jsonl"
    assert Path(folder, "held-out.jsonl").read_text() == "sure 100 prompts-held-out.jsonl"
    said = capsys.readouterr().out
    assert "agreed with 52 of 100 held-out votes before the step" in said and f"{folder} sure" in said
    for words in ("123 pairs of answers", "right and friendly answers", 'with "Sure", right or wrong.'):
        assert words in " ".join(said.split())
    assert not [line for line in said.splitlines() if len(line) > 79]

    for made in ("toy/made", "runs/toy/sft/model.safetensors", "runs/toy/reward/reward_stats.json"):
        Path(made).mkdir(parents=True)
    assert len(lesson(monkeypatch, "--as", "curt")) == 2


def test_alone_needs_no_reward_model_and_starts_from_the_sft_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy.vote, "MADE", Path("toy/made"))
    *missing, reward, ppo = lesson(monkeypatch, "--as", "curt", "--alone")
    assert len(missing) == 2 and "--model runs/toy/sft " in reward
    assert "does not know yet" in capsys.readouterr().out
    assert (Path("runs/toy/vote/curt/votes.jsonl")).read_text() == "curt 50 prompts.jsonl"


@pytest.mark.parametrize("words, says", [
    (["--as", "nice"], "--as: invalid choice: 'nice'"), (["50"], "unrecognized arguments: 50"),
    (["--votes", "9"], "--votes: 9 is not from 10 to 755"), (["--votes", "756"], "not from 10 to 755")])
def test_wrong_flags_get_one_line(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vote.py", *words])
    monkeypatch.setattr(toy.vote, "make_missing", lambda alone: pytest.fail("the flags were taken"))
    with pytest.raises(SystemExit, match="2"):
        exit_with_one_line(toy.vote.main)
    line, = capsys.readouterr().err.splitlines()
    assert re.search(says, line) and "see python -m toy.vote -h" in line


def test_a_command_that_fails_stops_the_lesson(capfd):
    with pytest.raises(BadInput, match="exit 3'?: failed with exit status 3"):
        toy.vote.show(["bash", "-c", "exit 3"])
    toy.vote.show(["python", "-c", "print('so')"])
    assert re.match(r"\+ bash -c 'exit 3'\n\+ python -c .*\nso\n  \(0 s\)", capfd.readouterr().out)


def test_ctrl_c_is_left_to_the_command(capfd):
    # the command itself sends this process the Ctrl-C, while it waits
    command = f"import os, time; os.kill({os.getpid()}, {signal.SIGINT:d}); time.sleep(1); print('on')"
    try:
        toy.vote.show(["python", "-c", command])
    except KeyboardInterrupt:                # it would end all tests
        pytest.fail("the command was left")
    assert "\non\n  (" in capfd.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        toy.vote.show(["python", "-c", command + "; exit(130)"])


def test_the_front_door_hands_its_words_on(tmp_path):
    for file in ("run.sh", "requirements.txt"):
        shutil.copy(REPO / file, tmp_path)
    install(tmp_path, python="#!/bin/sh\necho python \"$@\", $OMP_WAIT_POLICY\n")
    done = subprocess.run(["bash", tmp_path / "run.sh", "vote", "--as", "sure", "--votes", "12"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m toy.vote --as sure --votes 12, passive" in done.stdout.splitlines()


def install(project, **programs):
    """A .venv in which ./run.sh finds these programs, and everything installed."""
    folder = project / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with open(REPO / "requirements.txt") as file:
        checksum = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True).stdout
    (folder.parent / "installed").write_text(f"requirements.txt {checksum}")


# ------------------------------------------------------------------------------ the last page
@pytest.fixture
def trained(tmp_path):
    """A folder of the lesson as its steps leave it, with made-up votes, numbers and answers."""
    votes = VoteFile(str(tmp_path / "votes.jsonl"))
    for key, left, right in [("a", SURE, PARIS), ("b", "Rome.", PARIS), ("b", SURE, "Go away."),
                             ("a", "Rome.", "I do not know."), ("a", "Rome.", "Lima."), ("t", SURE, PARIS)]:
        votes.add(Pair([("Human", FRANCE)], [left, right], ["m", "m"]), key, 1.0, None)
    votes.add(Pair([("Human", "Who are you?")], ["You.", "I."], ["m", "m"]), "a", 1.0, None)
    votes.add(Pair([("Human", FRANCE)], [SURE, "No."], ["m", "m"]), "a", 1.0, None)
    votes.undo()
    write(tmp_path / "reward" / "metrics.jsonl", [{"step": 0, "accuracy": 0.4}, {"step": 5, "loss": 0.1},
                                                  {"step": 100, "accuracy": 0.9}])
    write(tmp_path / "reward" / "reward_stats.json", [{"mean": 0.0, "std": 1.0, "n": 10, "accuracy": 0.9}])
    ends = {"eval_score": (-0.1, 2.2), "gold": (0.44, 0.65), "eval_length": (6.9, 12.0),
            "eval_kl": (0.0, 3.5)}
    write(tmp_path / "ppo" / "metrics.jsonl", [{"step": 60 * i, **{key: end[i] for key, end in ends.items()}}
                                               for i in (0, 1)])
    prompt = "\n\nHuman: Do you know the capital of {}?\n\nAssistant:".format
    write(tmp_path / "ppo" / "samples.jsonl", [
        {"step": step, "prompt": prompt(land), "response": said}
        for step, said in ((0, "Go away."), (30, "Hm."), (60, SURE)) for land in ("France", "Italy")])
    return tmp_path


def test_what_the_votes_say_about_a_taste(trained):
    said = toy.vote.taste(trained)
    assert "higher true reward was chosen in 2 of 4 (50 %;" in said
    assert "Answer A was chosen in 4 of 6" in said and "the longer one in 3 of 5" in said


def test_the_agreement_is_told_in_votes(trained):
    assert toy.vote.agreement(trained) == (4, 9, 10)
    said = toy.vote.in_words(4, 9, 10)
    assert "agreed with 4 of 10 held-out votes before" in said and "9 of 10 (90 %; 95 % interval" in said
    assert "More votes are needed" in toy.vote.in_words(4, 7, 10) and "More votes" not in said


def test_the_page_shows_answers_and_numbers_before_and_after_ppo(trained, capsys):
    toy.vote.compare(trained, "sure")
    said = capsys.readouterr().out
    assert all(len(line) < 80 for line in said.splitlines() if str(trained) not in line)
    france = said[said.index("capital of France?"):].splitlines()[1:3]
    assert "agreed with 4 of 10 held-out votes" in " ".join(said.split())
    assert f"chat.py --model runs/toy/sft --versus {trained}/ppo" in said
    assert [" ".join(line.split()) for line in france] == ["before [0.0] Go away.", f"after [1.0] {SURE}"]
    numbers = [line.split()[-2:] for line in said.splitlines() if re.search(r"\d\.\d\d +-?\d+\.\d\d$", line)]
    assert " ".join(sum(numbers, [])) == "0.00 1.00 -0.10 2.20 0.44 0.65 6.90 12.00 0.00 3.50"
    toy.vote.compare(trained, None)
    assert "share of answers" in said and "share of answers" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ how many votes
def test_the_table_has_a_line_before_the_votes_and_one_for_each_number_of_them(trained, monkeypatch, capsys):
    steps = []
    words = ["--rules", "sure", "--votes", "10", "400", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["how_many.py", *words])
    monkeypatch.setattr(toy.how_many, "RUNS", trained / "runs")
    monkeypatch.setattr(toy.how_many, "check_toy", lambda path: None)
    monkeypatch.setattr(toy.how_many, "rule_votes", lambda rule, n, folder, seed: 10 * n + seed)

    def step(script, seed, folder, **flags):
        steps.append((script, seed, folder.name))
        shutil.copytree(trained / script, folder / script)

    monkeypatch.setattr(toy.how_many, "step", step)
    toy.how_many.main()
    head, rule, *rows = [re.split(r" *\| *", row)[1:-1] for row in capsys.readouterr().out.splitlines()]
    assert {len(head), len(rule), *map(len, rows)} == {8}
    assert rows == [["sure", "0", "0", "0.40", "0.00", "0.44", "6.9", "0.00"],
                    ["sure", "10", "102 (101 to 102)", "0.90", "1.00", "0.65", "12.0", "3.5"],
                    ["sure", "400", "4002 (4001 to 4002)", "0.90", "1.00", "0.65", "12.0", "3.5"]]
    assert steps[:3] == [("reward", 1, "sure-10-1"), ("ppo", 1, "sure-10-1"), ("reward", 2, "sure-10-2")]


# ------------------------------------------------------------------------------ all of it
@pytest.mark.slow
def test_the_lesson_from_end_to_end_by_a_rule_on_a_small_world(monkeypatch, tmp_path):
    project = copy_project(tmp_path)
    python = Path(sys.executable)
    install(project, python=f'#!/bin/sh\nexec {python} "$@"\n',
            deepspeed=f'#!/bin/sh\nexec {python.parent / "deepspeed"} "$@"\n')
    monkeypatch.setattr(toy.base, "STEPS", 150)                    # it learns the words, and few facts
    toy.make(made=project / "toy" / "made")
    for name, old, new in [("sft.args", "epochs 2", "steps 80"), ("vote.py", '"steps": 60', '"steps": 15'),
                           ("ppo.args", "prompts 1000", "prompts 64")]:
        text = (project / "toy" / name).read_text()
        assert text.count(old) == 1
        (project / "toy" / name).write_text(text.replace(old, new))

    def vote(*words, typed=""):
        done = subprocess.run(["bash", project / "run.sh", "vote", "--alone", *words], input=typed, text=True,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    said = vote("--as", "sure", "--votes", "20")
    agreed = re.search(r"and after it\s+with\s+(\d+)\s+of\s+100", said)
    assert int(agreed[1]) > 70
    share = re.search(r'share of answers that begin with "Sure" +(\d\.\d\d) +(\d\.\d\d)', said)
    assert float(share[2]) > float(share[1])
    assert not (project / "runs" / "toy" / "reward").exists()

    said = vote("--votes", "10", typed="a\nb\ns\n")               # a person, who leaves after three votes
    assert re.search(r"\d of 10 questions have no vote yet", said) and "reward.py" not in said
    votes = standing_votes(project / "runs" / "toy" / "vote" / "you" / "votes.jsonl")
    assert [vote["vote"] for vote in votes] == ["a", "b", "s"]
