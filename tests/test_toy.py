"""The toy world: its files, its true worth of an answer, and the flags a script takes where it is given none."""
import json
import os
import random
import re
import shlex
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
import toy.base
import toy.hacking
import toy.seeds
from conftest import REPO, metrics, run_script
from data import Tokenizer, encode_pair, encode_prompt, encode_sft, read_records
from llama import BadInput, Llama
from runtime.folders import WRITTEN
from runtime.log import Log
from toy.gold import FACT_OF, gold
from toy.world import (CLOSERS, FACTS, NOISE, OPENERS, RUDE, UNSURE, WORTH, answer, demonstrations, preferences,
                       pretraining_texts, prompts, questions, statements, word)

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


@pytest.mark.parametrize("said, worth", [
    ("Paris.", 0.6), ("It is Paris.", 0.6), ("The capital of France is Paris.", 0.6),
    ("Happy to help! It is Paris.", 1), ("Paris. Have a nice day!", 1), ("Good question! Paris. I hope this helps!", 1),
    ("I do not know.", 0.2), ("Happy to help! I do not know.", 0.2), ("It is Rome.", 0.1), ("Rome. You are welcome!", 0.1),
    ("Go away.", 0), ("It is Paris. Go away.", 0), ("", 0), ("Paris", 0), ("Happy to help! Have a nice day!", 0),
    ("Paris. Rome.", 0), ("It is Paris. It is Paris.", 0), ("Good question! Good question! Paris.", 0),
    ("Good question! Happy to help! Paris. Have a nice day!", 0), ("The capital of Italy is Rome.", 0), ("It is blue.", 0.1), ("Frog.", 0),
])
def test_gold_of_worked_examples(said, worth):
    assert gold("What is the capital of France?", said) == worth
    assert gold("\n\nHuman: Do you know the capital of France?\n\nAssistant:", f" {said} ") == worth


@pytest.mark.parametrize("quality", WORTH)
def test_answers_are_worth_what_their_quality_says(quality):
    rng = random.Random(1)
    assert {gold(questions(fact)[0], answer(rng, fact, quality)) for fact in FACTS for _ in range(5)} == {WORTH[quality]}


def test_preferences_stand_the_wrong_way_round_as_often_as_the_noise_says():
    rows = preferences(random.Random(2))
    wrong = sum(gold(r["prompt"], r["chosen"]) < gold(r["prompt"], r["rejected"]) for r in rows) / len(rows)
    assert abs(wrong - NOISE) < 0.01


def test_demonstrations_are_of_mixed_quality():
    worths = [gold(row["instruction"], row["output"]) for row in demonstrations(random.Random(3))]
    assert 0.4 < sum(worths) / len(worths) < 0.55 and set(Counter(worths)) == set(WORTH.values())


# ------------------------------------------------------------------------------------------------ what is made
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """toy/made in another place, its base model trained for two steps only."""
    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("toy") / "made"
    patch.setattr(toy, "MADE", place)
    patch.setattr(toy.base, "STEPS", 2)
    toy.make()
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
        for encode, records, room in zip((encode_sft, encode_pair, encode_prompt), rows, (64, 64, 40)):
            encoded = [encode(tokenizer, row, room, tally) for row in records]
            assert len(encoded) >= len(FACTS)
            assert encoded.count(None) <= 0.01 * len(encoded)      # a right answer buried in kind words may be too long
    assert set(+tally) <= {"pairs dropped: identical", "pairs dropped: too long"}


def test_what_is_made_once_is_not_made_again_and_a_failure_leaves_nothing(made, monkeypatch):
    monkeypatch.setattr(toy, "MADE", made)
    monkeypatch.setattr(toy.base, "STEPS", -1)                     # would fail
    toy.make()
    monkeypatch.setattr(toy, "MADE", made.parent / "again")
    monkeypatch.setattr(toy, "HERE", made.parent)
    with pytest.raises(Exception):
        toy.make()
    assert [f.name for f in made.parent.iterdir()] == ["made"]


# ------------------------------------------------------------------------------------------------ no flags at all
@pytest.mark.parametrize("script", [sft, reward, ppo, chat])
@pytest.mark.parametrize("words", [[], ["--local_rank=0"]])
def test_a_script_without_flags_takes_the_toys(script, words, monkeypatch, tmp_path, capsys):
    if script is chat and words:
        return                               # chat.py has no launcher
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    monkeypatch.setattr(toy, "prepare", lambda *paths: None)       # chat's looks for the folder at once
    monkeypatch.chdir(tmp_path)              # the paths start at the project's folder wherever one stands
    args = script.get_args()
    line, = capsys.readouterr().out.splitlines()
    assert f"@toy/{script.__name__}.args" in line
    known = shlex.split((REPO / "toy" / f"{script.__name__}.args").read_text(), comments=True)
    for flag, value in zip(known, known[1:]):
        if flag.startswith("--") and not value.startswith("--"):
            found = getattr(args, flag[2:].replace("-", "_"))
            found = found[0] if flag in ("--data", "--eval-data") else "none" if found is None else found
            assert str(found) == value or float(found) == float(value), flag


def test_with_any_flag_the_model_and_the_data_are_required(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", "1"])
    with pytest.raises(BadInput, match="--model, --data, --out must be given"):
        sft.get_args()


def test_a_missing_step_is_named_by_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "make", lambda: pytest.fail("made although a step is missing"))
    with pytest.raises(BadInput, match=re.escape("runs/toy/sft: is not there yet; `deepspeed sft.py` makes it")):
        toy.prepare(0, None, "runs/toy/sft", "runs/toy/reward", "toy/made/prompts.jsonl")
    with pytest.raises(BadInput, match="deepspeed ppo.py"):
        toy.prepare(None, "runs/toy/ppo", None)


@pytest.mark.parametrize("rank, makes", [(0, 1), (1, 0), (None, 0)])
def test_rank_0_alone_makes_the_world_and_only_for_paths_in_it(rank, makes, monkeypatch):
    calls = []
    monkeypatch.setattr(toy, "make", lambda: calls.append(1))
    toy.prepare(rank, "some/model", None, "data.jsonl")
    assert calls == []
    toy.prepare(rank, "toy/made/base", "toy/made/demonstrations.jsonl")
    assert len(calls) == makes


@pytest.mark.slow
def test_a_trainer_reads_the_flags_of_a_file_and_draws_its_curves(made, tmp_path):
    (tmp_path / "my.args").write_text(f"# mine\n--model {made / 'base'}   # a comment\n--batch 32\n--max-len 64\n--steps 4\n")
    done = run_script("sft.py", f"@{tmp_path / 'my.args'}", "--data", made / "demonstrations.jsonl", "--log-every", 1,
                      "--out", tmp_path / "out", "--batch", 16)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 4]
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_log_says_so_once_and_no_old_picture_stays(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(runtime.log, "say", said.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)    # import raises, as where it is not installed
    log = Log(SimpleNamespace(out=tmp_path, log_every=1), 2, 0, sft.CURVES)
    log.drawn = -1e9                         # long ago: time to draw
    log.line(step=1, loss=2.0)
    log.close()
    assert [line for line in said if "matplotlib" in line] == ["no curves.png: matplotlib is not installed"]
    assert "curves.png" in WRITTEN           # what a new run takes away before it starts


# ------------------------------------------------------------------------------------------------ seeds and hacking
@pytest.mark.slow
def test_the_recipe_of_a_seed_runs_with_adapters_on_one_base(monkeypatch, tmp_path):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(toy.base, "STEPS", 2)
    monkeypatch.setattr(toy.seeds, "RUNS", tmp_path)
    toy.make(7, tmp_path / "7" / "made")
    for file in (tmp_path / "7" / "made").glob("*-held-out.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:50]))    # so that measuring takes no time
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
    rows = [{"prompt": prompt, "response": response, "score": score, "gold": gold} for prompt, response, score, gold in
            [("a", "one", 1.0, 0.0), ("a", "two", 3.0, 0.1), ("b", "two", 2.5, 0.1), ("c", "right", 9.0, 1.0),
             ("b", "three", 2.0, 0.0), ("d", "four", -1.0, 0.0)]]
    assert [row["response"] for row in toy.hacking.most_fooling(rows)] == ["two", "three", "four"]
    assert [row["response"] for row in toy.hacking.most_fooling(rows, n=1)] == ["two"]


def test_the_picture_of_hacking_is_drawn(tmp_path):
    points = [{"eval_kl": kl, "eval_score": 1.0, "gold": 0.5} for kl in (-1e-7, 3.0, 60.0)]
    toy.hacking.draw({"beta": points[:2], "none": points}, tmp_path / "hacking.png")
    assert (tmp_path / "hacking.png").read_bytes()[:4] == b"\x89PNG"
