"""The toy: its files, its true reward, the flags of a script that is given none, and what the demo says."""
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import chat
import ppo
import reward
import runtime.log
import sft
import toy
import toy.__main__
import toy.base
import toy.hacking
import toy.seeds
import toy.show
import toy.world
from conftest import REPO, metrics, run_script
from data import Tokenizer, encode_pair, encode_prompt, encode_sft, read_records
from llama import Llama
from runtime.errors import BadInput, exit_with_one_line
from runtime.flags import check_toy
from runtime.folders import FILES
from runtime.log import Log
from toy.gold import FACT_OF, gold
from toy.world import (
    CLOSERS,
    FACTS,
    NOISE,
    OPENERS,
    RUDE,
    UNSURE,
    WORTH,
    answer,
    demonstrations,
    preferences,
    pretraining_texts,
    prompts,
    questions,
    statements,
)

FRANCE = ("capital", "France", "Paris")


def test_there_are_150_facts_of_at_least_5_kinds_and_no_question_stands_for_two():
    assert len(FACTS) >= 150 and len({kind for kind, _, _ in FACTS}) >= 5
    assert len(FACT_OF) == sum(len(questions(f, h)) for f in FACTS for h in (False, True))


def test_held_out_phrasings_occur_in_pretraining_and_in_nothing_that_is_trained_on():
    rng = random.Random(0)
    held_out = {q for fact in FACTS for q in questions(fact, held_out=True)}
    assert {row["instruction"] for row in demonstrations(rng)}.isdisjoint(held_out)
    assert {row["prompt"] for row in preferences(rng) + prompts(rng)}.isdisjoint(held_out)
    assert {row["prompt"] for row in prompts(rng, held_out=True)} == held_out
    text = "\n".join(pretraining_texts(rng))
    assert all(question in text for question in held_out)


@pytest.mark.parametrize("said, reward", [
    ("Paris.", 0.6), ("It is Paris.", 0.6), ("The capital of France is Paris.", 0.6),
    ("Happy to help! It is Paris.", 1), ("Paris. Have a nice day!", 1),
    ("Good question! Paris. I hope this helps!", 1), ("I do not know.", 0.2),
    ("Happy to help! I do not know.", 0.2), ("It is Rome.", 0.1), ("Rome. You are welcome!", 0.1),
    ("Go away.", 0), ("It is Paris. Go away.", 0), ("", 0), ("Paris", 0),
    ("Happy to help! Have a nice day!", 0), ("Paris. Rome.", 0), ("It is Paris. It is Paris.", 0),
    ("Good question! Good question! Paris.", 0), ("Good question! Happy to help! Paris. Have a nice day!", 0),
    ("The capital of Italy is Rome.", 0), ("It is blue.", 0.1), ("Frog.", 0),
])
def test_gold_of_worked_examples(said, reward):
    assert gold("What is the capital of France?", said) == reward
    assert gold("\n\nHuman: Do you know the capital of France?\n\nAssistant:", f" {said} ") == reward


@pytest.mark.parametrize("quality", WORTH)
def test_the_true_reward_of_an_answer_is_that_of_its_quality(quality):
    rng = random.Random(1)
    found = {gold(questions(fact)[0], answer(rng, fact, quality)) for fact in FACTS for _ in range(5)}
    assert found == {WORTH[quality]}


def test_preferences_stand_the_wrong_way_round_as_often_as_the_noise_says():
    rows = preferences(random.Random(2))
    wrong = sum(gold(r["prompt"], r["chosen"]) < gold(r["prompt"], r["rejected"]) for r in rows) / len(rows)
    assert abs(wrong - NOISE) < 0.01


def test_demonstrations_are_of_mixed_quality():
    rewards = [gold(row["instruction"], row["output"]) for row in demonstrations(random.Random(3))]
    assert 0.4 < sum(rewards) / len(rewards) < 0.55 and set(rewards) == set(WORTH.values())


# ------------------------------------------------------------------------------ what is made
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """toy/made in another place, its base model trained for two steps only."""
    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("toy") / "made"
    patch.setattr(toy, "MADE", place)
    patch.setattr(toy.base, "STEPS", 2)
    assert toy.make()
    yield place
    patch.undo()


def test_the_base_is_a_llama_of_about_a_million_parameters_with_whole_words(made):
    n = sum(p.numel() for p in Llama.from_pretrained(made / "base").parameters())
    tokenizer = Tokenizer(made / "base")
    assert 0.5e6 < n < 2e6 and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert len(tokenizer.encode("The capital of France is Paris.")) <= 8
    for text in (*OPENERS, *CLOSERS, *UNSURE, *RUDE, *statements(*FRANCE), "never seen: \u00e9 \u2603"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_files_are_those_that_the_three_steps_read_and_almost_nothing_is_dropped(made):
    tokenizer, tally = Tokenizer(made / "base"), Counter()
    for end in ("", "-held-out"):
        rows = [read_records(made / f"{name}{end}.jsonl", tally)
                for name in ("demonstrations", "preferences", "prompts")]
        encoders = (encode_sft, encode_pair, encode_prompt)
        for encode, records, room in zip(encoders, rows, (64, 64, 40), strict=True):
            encoded = [encode(tokenizer, row, room, tally) for row in records]
            assert len(encoded) >= len(FACTS)
            # a right answer buried in kind words may be too long
            assert encoded.count(None) <= 0.01 * len(encoded)
    assert set(+tally) <= {"pairs dropped: identical", "pairs dropped: too long"}


def test_what_is_made_once_is_not_made_again_and_a_failure_leaves_nothing(made, monkeypatch):
    def fail(folder, seed):
        assert (folder / "base" / "config.json").exists()
        raise RuntimeError

    monkeypatch.setattr(toy.world, "write_files", fail)
    monkeypatch.setattr(toy, "MADE", made)
    assert not toy.make()
    monkeypatch.setattr(toy, "MADE", made.parent / "again")
    with pytest.raises(RuntimeError):
        toy.make()
    assert [f.name for f in made.parent.iterdir()] == ["made"]


def test_python_m_toy_makes_the_files_once_and_says_what_it_does(monkeypatch, tmp_path, capsys):
    place = tmp_path / "made"
    monkeypatch.setattr(toy, "MADE", place)
    monkeypatch.setattr(toy.base, "STEPS", 2)
    toy.__main__.main()
    said = capsys.readouterr().out
    assert "2 steps on texts about 151 facts" in said and all(len(line) < 80 for line in said.splitlines())
    files = {name: rows for rows, name in re.findall(r"([\d,]+) rows  toy/made/(\S+)", said)}
    assert {place / name for name in files} == set(place.glob("*.jsonl")) and len(files) == 6
    assert files["demonstrations.jsonl"] == "4,530" and (place / "base" / "config.json").exists()

    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    toy.__main__.main()
    assert "toy/made is there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


def test_a_folder_that_cannot_be_written_is_bad_input(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(toy, "MADE", tmp_path / "file" / "made")
    with pytest.raises(BadInput, match="file/made: cannot be made .Not a directory."):
        toy.make()


# ------------------------------------------------------------------------------ no flags at all
@pytest.mark.parametrize("script", [sft, reward, ppo, chat])
@pytest.mark.parametrize("words", [[], ["--local_rank=0"]])
def test_a_script_without_flags_takes_the_toys(script, words, monkeypatch, tmp_path, capsys):
    if script is chat and words:
        return                               # chat.py has no launcher
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    monkeypatch.setattr("runtime.flags.check_toy", lambda path: None)         # as if every step had run
    monkeypatch.chdir(tmp_path)              # the paths start at the project's folder wherever one stands
    args = script.get_args()
    assert Path.cwd() == REPO
    line, = capsys.readouterr().out.splitlines()
    assert f"@toy/{script.__name__}.args" in line
    known = shlex.split((REPO / "toy" / f"{script.__name__}.args").read_text(), comments=True)
    for flag, value in zip(known, known[1:], strict=False):
        if flag.startswith("--") and not value.startswith("--"):
            found = getattr(args, flag[2:].replace("-", "_"))
            found = found[0] if flag in ("--data", "--eval-data") else "none" if found is None else found
            assert str(found) == value or float(found) == float(value), flag


def test_with_any_flag_the_model_and_the_data_are_required(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", "1"])
    with pytest.raises(BadInput, match="--model, --data, --out must be given"):
        sft.get_args()


@pytest.mark.parametrize("script, path, command", [
    (sft, "toy/made/base", "python -m toy"), (reward, "runs/toy/sft", "deepspeed sft.py"),
    (ppo, "runs/toy/reward", "deepspeed reward.py"), (chat, "runs/toy/ppo", "deepspeed ppo.py"),
])
def test_a_missing_step_is_named_by_the_command_that_makes_it(script, path, command, monkeypatch, tmp_path):
    flags = shlex.split((REPO / "toy" / f"{script.__name__}.args").read_text(), comments=True)
    there = [word for word in flags if word.startswith(("toy/made/", "runs/toy/")) and word != path]
    for folder in there:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runtime.flags.PROJECT", tmp_path)
    (tmp_path / "toy").mkdir(exist_ok=True)
    shutil.copy(REPO / "toy" / f"{script.__name__}.args", tmp_path / "toy")
    monkeypatch.setattr(sys, "argv", [script.__file__])
    with pytest.raises(BadInput, match=re.escape(f"{path}: is not there yet; `{command}` makes it")):
        script.get_args()
    (tmp_path / path).mkdir(parents=True)
    assert script.get_args()


@pytest.mark.parametrize("path", ["some/model", "runs/toy/mine", "runs/toy/sft-lora", "toy/made-too", "toy"])
def test_only_folders_of_the_toy_are_looked_for(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_toy(path)
    with pytest.raises(BadInput, match="`deepspeed sft.py` makes it"):
        check_toy("runs/toy/sft/metrics.jsonl")


@pytest.mark.slow
@pytest.mark.faults
def test_a_trainer_reads_the_flags_of_a_file_and_draws_its_curves(made, tmp_path):
    (tmp_path / "my.args").write_text(f"# mine\n--model {made / 'base'}   # a comment\n"
                                      "--batch 32\n--max-len 64\n--steps 4\n")
    done = run_script("sft.py", f"@{tmp_path / 'my.args'}", "--data", made / "demonstrations.jsonl",
                      "--log-every", 1, "--out", tmp_path / "out", "--batch", 16)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 4]
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_log_says_so_once_and_no_old_picture_stays(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(runtime.log, "say", said.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)    # import raises, as if not installed
    log = Log(SimpleNamespace(out=tmp_path, log_every=1), 2, 0, sft.CURVES)
    log.drawn = -1e9                         # long ago: time to draw
    log.line(step=1, loss=2.0)
    log.close()
    assert [line for line in said if "matplotlib" in line] == ["no curves.png: matplotlib is not installed"]
    assert "curves.png" in FILES           # what a new run takes away before it starts


# ------------------------------------------------------------------------------ seeds and hacking
@pytest.mark.slow
@pytest.mark.faults
def test_the_recipe_of_a_seed_runs_with_adapters_on_one_base(monkeypatch, tmp_path):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(toy.base, "STEPS", 2)
    monkeypatch.setattr(toy.seeds, "RUNS", tmp_path)
    toy.make(7, tmp_path / "7" / "made")
    for file in (tmp_path / "7" / "made").glob("*-held-out.jsonl"):          # so that measuring takes no time
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:50]))
    monkeypatch.setattr(toy.seeds, "LORA", {k: f"{v} --steps 1" for k, v in toy.seeds.LORA.items()})
    sft_gold, accuracy, rlhf_gold, kl = toy.seeds.recipe(7, lora=True)
    assert 0 <= sft_gold < 0.1 and 0 <= rlhf_gold < 0.1 and 0.3 < accuracy < 0.7 and 0 < abs(kl) < 1
    runs = tmp_path / "7" / "lora"
    assert (runs / "merged" / "model.safetensors").exists()
    base = {json.loads((runs / run / "adapter_config.json").read_text())["base_model_name_or_path"]
            for run in ("reward", "ppo")}
    assert len(base) == 1 and base.pop().endswith("merged")


def test_a_failed_step_of_a_seed_names_its_log(monkeypatch, tmp_path):
    monkeypatch.setattr(toy.seeds.subprocess, "run", lambda *words, **how: SimpleNamespace(returncode=1))
    with pytest.raises(BadInput, match="failed, see .*sft.log"):
        toy.seeds.step("sft", 1, tmp_path)


def test_the_most_fooling_answers_are_worthless_and_no_two_alike():
    rows = [dict(zip(("prompt", "response", "score", "gold"), row, strict=True)) for row in
            [("a", "one", 1.0, 0.0), ("a", "two", 3.0, 0.1), ("b", "two", 2.5, 0.1), ("c", "right", 9.0, 1.0),
             ("b", "three", 2.0, 0.0), ("d", "four", -1.0, 0.0)]]
    assert [row["response"] for row in toy.hacking.most_fooling(rows)] == ["two", "three", "four"]
    assert [row["response"] for row in toy.hacking.most_fooling(rows, n=1)] == ["two"]


def test_the_picture_of_hacking_is_drawn(tmp_path):
    points = [{"eval_kl": kl, "eval_score": 1.0, "gold": 0.5} for kl in (-1e-7, 3.0, 60.0)]
    toy.hacking.draw({"beta": points[:2], "none": points}, tmp_path / "hacking.png")
    assert (tmp_path / "hacking.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------ what the demo says
METRICS = {"sft": [{"step": 0, "eval_ppl": 4.913}, {"step": 1, "loss": 5.0}, {"step": 50, "eval_ppl": 2.0},
                   {"step": 141, "eval_ppl": 1.732}],
           "reward": [{"step": 0, "accuracy": 0.49, "margin": 0.0}, {"step": 5, "loss": 0.6},
                      {"step": 1410, "accuracy": 0.887, "margin": 2.0}],
           "ppo": [{"step": 0, "eval_score": -0.314, "gold": 0.44, "eval_kl": 0.0}, {"step": 1, "kl": 0.1},
                   {"step": 120, "eval_score": 1.406, "gold": 0.94, "eval_kl": 4.196}]}
QUESTIONS = ["Do you know the capital of France?", "Do you know the opposite of hot?"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """runs/toy as the three steps leave it, with made-up numbers and answers."""
    prompt = "\n\nHuman: {}\n\nAssistant:".format
    samples = [{"step": step, "prompt": prompt(question), "response": said, "gold": reward}
               for step, said, reward in [(0, "Go away.", 0.0), (120, "Paris. I hope this helps!", 1.0)]
               for question in QUESTIONS]
    for run, lines in METRICS.items():
        folder = tmp_path / "runs" / "toy" / run
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("step, says", [
    ("sft", "was 4.91 before the step and is 1.73 after"), ("reward", "in 49% of the held-out pairs"),
    ("reward", "the share is 89%"), ("reward", "Perfect knowledge reaches 95%"),
    ("ppo", "was -0.31 standard deviations before the step and is 1.41 after"),
    ("ppo", "true reward (gold) was 0.44 and is 0.94"), ("ppo", "4.2 nats per answer"),
])
def test_the_result_of_a_step_is_told_from_its_metrics_in_80_columns(step, says, runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show.py", step])
    toy.show.main()
    said = capsys.readouterr().out
    assert says in " ".join(said.split()) and all(len(line) < 80 for line in said.splitlines())


def test_the_comparison_shows_each_true_reward_and_ends_in_a_table(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show.py"])
    monkeypatch.setattr(toy.show, "SHOWN", 2)
    monkeypatch.setattr(toy.show, "chosen_rows", lambda prompts: [0, 1])
    monkeypatch.setattr(toy.show, "base_answers", lambda prompts: ["It is Paris.\x1b[2J", "Cold."])
    toy.show.main()
    said = capsys.readouterr().out
    assert "\x1b" not in said and all(len(line) < 80 for line in said.splitlines())
    france, hot = ([" ".join(line.split()) for line in said[said.index(question):].splitlines()[1:4]]
                   for question in QUESTIONS)
    assert france == ["base [0.0] It is Paris.[2J", "after SFT [0.0] Go away.",
                      "after RLHF [1.0] Paris. I hope this helps!"]
    assert hot[0] == "base [0.6] Cold."
    numbers = [line.split()[-2:] for line in said.splitlines() if re.match(r"\w+\.py ", line)]
    assert " ".join(sum(numbers, [])) == "4.91 1.73 0.30 0.00 0.49 0.89 0.00 1.00 0.00 4.20"


def test_a_long_answer_is_wrapped_under_its_own_beginning():
    lines = toy.show.side_by_side(QUESTIONS[0], {"after RLHF": "It is Paris. " * 9}).splitlines()
    assert len(lines) > 2 and all(len(line) < 80 for line in lines)
    assert lines[1].index("It") == len(lines[2]) - len(lines[2].lstrip())


def test_the_questions_shown_are_of_all_kinds_in_turn_and_none_comes_twice():
    asked = [questions(fact, held_out=True)[0] for fact in FACTS for _ in range(4)]
    shown = [asked[row] for row in toy.show.chosen_rows(asked)]
    assert len(set(shown)) == toy.show.SHOWN
    assert len({FACT_OF[question][0] for question in shown[:6]}) == 6


def test_a_missing_run_is_named_in_one_line_with_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show.py", "ppo"])
    with pytest.raises(SystemExit, match="2"):
        exit_with_one_line(toy.show.main)
    assert capsys.readouterr().err == (
        "error: runs/toy/ppo/metrics.jsonl: is not there yet; `deepspeed ppo.py` makes it\n")


def test_the_demo_tells_before_each_step_what_happens_in_80_columns(tmp_path):
    for file in ("run.sh", "requirements.txt"):
        shutil.copy(REPO / file, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, prints in {"python": "29500", "deepspeed": "a step"}.items():  # in place of the real programs
        (programs / name).write_text(f"#!/bin/sh\necho {prints}\n")
        (programs / name).chmod(0o755)
    with open(REPO / "requirements.txt") as file:
        checksum = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True).stdout
    (programs.parent / "installed").write_text(f"requirements.txt {checksum}")
    done = subprocess.run(["bash", tmp_path / "run.sh", "demo"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("+ ")] == [
        "+ python -m toy",
        *(f"+ deepspeed --quiet --master_port 29500 {script}.py" for script in ("sft", "reward", "ppo")),
        "+ python -m toy.show",
        '+ python chat.py @toy/chat.args --versus runs/toy/sft --prompt "Which colour is snow?"']
    steps = [n for n, line in enumerate(lines) if line.startswith(("Step ", "+ "))]
    # each text stands before its command
    assert [lines[n][:7] for n in steps[::2]] == [f"Step {n}:" for n in range(6)]
    assert all(len(line) < 80 for line in lines if not line.startswith("+ "))
