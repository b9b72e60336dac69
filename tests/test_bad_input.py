"""Wrong input: one line that says what is wrong, exit status 2, nothing written, on every rank."""
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from conftest import REPO, run_script, tiny_config
from llama import Llama
from lora import add_lora, save_adapter
from reward import RewardModel
from runtime.adapters import PREFIX
from runtime.tokenizer_write import copy_tokenizer

pytestmark = pytest.mark.slow
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

# Imports once what takes seconds, then forks for each case and runs the script as `python script flags` does.
FORKS = """
import json, os, runpy, signal, sys
import deepspeed, reward
for line in sys.stdin:
    script, flags, out, err = json.loads(line)
    if os.fork() == 0:
        signal.alarm(60)
        for stream, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        sys.argv, status = [script, *flags], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        os._exit(status)                     # tearing torch down would take longer than the case
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_fast(tmp_path_factory):
    """A function (script, flags) -> (exit status, stdout, stderr) that takes a fraction of a second."""
    logs = [str(tmp_path_factory.mktemp("logs") / name) for name in ("out", "err")]
    process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=REPO, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, **ON_CPU})

    def run(script, flags):
        process.stdin.write(json.dumps([script, list(map(str, flags)), *logs]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), *(open(log).read() for log in logs)
    yield run
    process.stdin.close()
    process.wait(timeout=60)


# --------------------------------------------------------------------------------------- good and bad folders
@pytest.fixture(scope="module")
def paths(tmp_path_factory, base, pairs_file):
    """Folders and files by name: what a run needs, and each damaged in one way."""
    root = tmp_path_factory.mktemp("paths")
    names = ("adapter", "reward", "reward_adapter", "no_stats", "other_words", "large_tokenizer", "truncated",
             "mismatching", "no_weights", "run", "two_labels", "two_labels_adapter", "pointer")
    paths = {"base": base, "pairs": pairs_file, "root": root, "nowhere": root / "nowhere"}
    paths |= {name: root / name for name in names}

    model = Llama.from_pretrained(base)
    add_lora(model, 2, 16, ["q_proj"])
    save_adapter(model, paths["adapter"], "default", base, "CAUSAL_LM")
    model = RewardModel.from_pretrained(base)
    add_lora(model, 2, 16, ["q_proj"])
    save_adapter(model, paths["reward_adapter"], "default", base, "SEQ_CLS")
    copy_tokenizer(base, paths["reward_adapter"])
    for name in ("reward", "no_stats", "other_words"):
        RewardModel(tiny_config()).save_pretrained(paths[name])
        copy_tokenizer(base, paths[name])
        (paths[name] / "reward_stats.json").write_text('{"mean": 0.0, "std": 1.0}')
    (paths["no_stats"] / "reward_stats.json").unlink()
    (root / "words.txt").write_text("quite other words\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "words.txt"), model_prefix=str(paths["other_words"] / "tokenizer"), model_type="bpe",
        vocab_size=290, byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2, hard_vocab_limit=False)

    for name in ("large_tokenizer", "truncated", "mismatching", "no_weights", "pointer"):
        shutil.copytree(base, paths[name])
    config = json.loads((base / "config.json").read_text())
    (paths["large_tokenizer"] / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    (paths["mismatching"] / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    weights = paths["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (paths["no_weights"] / "model.safetensors").unlink()
    (paths["pointer"] / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, file, key in (("two_labels", "model.safetensors", "score.weight"),
                            ("two_labels_adapter", "adapter_model.safetensors", f"{PREFIX}score.weight")):
        shutil.copytree(paths["reward_adapter" if "adapter" in name else "reward"], paths[name])
        save_file(load_file(paths[name] / file) | {key: torch.ones(2, 32)}, paths[name] / file)
    paths["run"].mkdir()
    (paths["run"] / "args.json").write_text("{}")
    (paths["run"] / "metrics.jsonl").write_text("what took days\n")

    row = '{"prompt": "why?", "chosen": "so"}\n'
    for name, text in {"broken": row + '{"prompt": \n', "empty": "", "unknown": '{"question": "why?"}\n',
                       "few": row}.items():
        paths[name] = root / f"{name}.jsonl"
        paths[name].write_text(text)
    return paths


GOOD = {
    "lora.py": {},
    "sft.py": {"--model": "{base}", "--data": "{pairs}", "--max-len": 128, "--batch": 4, "--micro-batch": 2,
               "--split": "none"},
    "reward.py": {"--model": "{base}", "--data": "{pairs}", "--max-len": 128, "--batch": 4,
                  "--micro-batch": 2, "--split": "none"},
    "ppo.py": {"--actor": "{base}", "--reward": "{reward}", "--data": "{pairs}", "--max-prompt": 60,
               "--max-new": 8, "--rollout-batch": 4, "--mini-batch": 4, "--micro-batch": 2,
               "--split": "none"}}


def flags(script, changes, paths, out):
    """The flags of a good run with some changed, or left out where None."""
    asked = {"--out": out, **GOOD[script], **changes}
    given = [(flag, value) for flag, value in asked.items() if value is not None]
    return [str(word).format(**paths) for pair in given for word in pair if word != ""]


def one_line(err):
    """The only line there is, which has to be an error's."""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


# ------------------------------------------------------------------------------------------------ one process
# what is changed in a good run, and what the line has to say: what was found where, and what to do
CASES = [
    ("sft.py", {"--model": None}, "--model must be given"),
    ("sft.py", {"--data": None, "--out": None}, "--data, --out must be given"),
    ("reward.py", {"--data": None}, "--data must be given"),
    ("ppo.py", {"--actor": None, "--reward": None}, "--actor, --reward must be given"),
    ("sft.py", {"--learning-rate": 1}, "--learning-rate"),
    ("ppo.py", {"--steps": "many"}, "--steps many whole"),
    ("sft.py", {"--batch": 2.5}, "--batch 2.5 whole"),
    ("sft.py", {"--batch": 0}, "--batch 0 1"),
    ("sft.py", {"--lora-rank": -1}, "--lora-rank -1"),
    ("sft.py", {"--lora-rank": 2, "--lora-dropout": 2}, "--lora-dropout 2"),
    ("reward.py", {"--lr": "nan"}, "--lr nan"),
    ("reward.py", {"--loss": "first"}, "--loss 'first' last dense"),
    ("sft.py", {"--split": "4,4"}, "--split 4,4 4,4,2 none"),
    ("sft.py", {"--split": "a,b,c"}, "--split a,b,c"),
    ("reward.py", {"--split": "0,0,0"}, "--split 0,0,0"),
    ("ppo.py", {"--split": "4,-4,2"}, "--split 4,-4,2"),
    ("sft.py", {"--dtype": "fp16"}, "--dtype fp16 GPU fp32 bf16"),
    ("ppo.py", {"--temperature": 0}, "--temperature 0"),
    ("ppo.py", {"--temperature": "nan"}, "--temperature nan"),
    ("sft.py", {"--model": "{nowhere}"}, "{nowhere} no such folder"),
    ("sft.py", {"--data": "{nowhere}"}, "{nowhere} cannot be read"),
    ("reward.py", {"--eval-data": "{nowhere}"}, "{nowhere} cannot be read"),
    ("ppo.py", {"--reward": "{nowhere}"}, "{nowhere} no such folder"),
    ("ppo.py", {"--gold": "{nowhere}"}, "--gold {nowhere}"),
    ("sft.py", {"--data": "{broken}"}, "{broken}:2 JSON"),
    ("reward.py", {"--data": "{empty}"}, "{empty} no usable rows"),
    ("ppo.py", {"--data": "{unknown}"}, "{unknown}:1 question"),
    ("sft.py", {"--data": "{few}"}, "--data batch 4"),
    ("reward.py", {"--data": "{few}"}, "--data 0 batch 4"),
    ("sft.py", {"--eval-share": 0}, "--eval-data --eval-share"),
    ("sft.py", {"--model": "{large_tokenizer}"}, "{large_tokenizer} tokenizer 300"),
    ("sft.py", {"--model": "{truncated}"}, "{truncated}/model.safetensors damaged"),
    ("reward.py", {"--model": "{mismatching}"}, "{mismatching}/model.safetensors (64, 32) (80, 32)"),
    ("sft.py", {"--model": "{no_weights}"}, "{no_weights} no weights"),
    ("sft.py", {"--lora-rank": 4, "--lora-targets": "query_key_value"},
     "--lora-targets 'query_key_value' q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("ppo.py", {"--lora-rank": 4, "--lora-targets": "q_proj,attn"}, "--lora-targets 'attn' q_proj"),
    ("sft.py", {"--lora-rank": 4, "--model": "{adapter}"}, "--lora-rank {adapter} adapter already"),
    ("reward.py", {"--lora-rank": 4, "--model": "{reward_adapter}"},
     "--lora-rank {reward_adapter} adapter already"),
    ("ppo.py", {"--lora-rank": 4, "--actor": "{adapter}", "--reward": "{reward_adapter}"},
     "--lora-rank {adapter} {reward_adapter} adapters already"),
    ("reward.py", {"--model": "{adapter}"}, "{adapter} not a reward model"),
    ("sft.py", {"--model": "{reward}"}, "{reward} lm_head reward model"),
    ("sft.py", {"--batch": 5}, "--batch 5 --micro-batch 2"),
    ("ppo.py", {"--mini-batch": 3}, "--mini-batch 3 --micro-batch 2"),
    ("ppo.py", {"--rollout-batch": 6}, "--rollout-batch 6 --mini-batch 4"),
    ("ppo.py", {"--reward": "{other_words}"}, "--reward {other_words} tokenizer --actor {base}"),
    ("ppo.py", {"--reward": "{no_stats}"}, "{no_stats}/reward_stats.json --reward-norm"),
    ("ppo.py", {"--reward": "{base}"}, "--reward {base} language model reward.py"),
    ("ppo.py", {"--reward": "{base}", "--reward-norm": "none"}, "--reward {base} language model reward.py"),
    ("reward.py", {"--model": "{two_labels}"}, "{two_labels}/model.safetensors score.weight num_labels=1"),
    ("ppo.py", {"--reward": "{two_labels}"}, "{two_labels}/model.safetensors score.weight num_labels=1"),
    ("reward.py", {"--model": "{two_labels_adapter}"},
     "{two_labels_adapter} score.weight (2, 32) num_labels=1"),
    ("ppo.py", {"--reward": "{two_labels_adapter}", "--reward-norm": "none"},
     "{two_labels_adapter} score.weight (2, 32) num_labels=1"),
    ("lora.py", {"{two_labels_adapter}": ""}, "{two_labels_adapter} score.weight (2, 32) num_labels=1"),
    ("lora.py", {"{base}": ""}, "{base} adapter_config.json nothing to merge"),
    ("sft.py", {"--model": "{pointer}"}, "{pointer}/model.safetensors git lfs pull"),
    ("sft.py", {"--model": "org/name"}, "org/name no such folder hf download"),
    ("ppo.py", {"--actor": "{reward_adapter}"}, "{reward_adapter} score.weight language model"),
    ("ppo.py", {"--max-prompt": 250}, "{base} 258 --max-prompt --max-new 256"),
    ("sft.py", {"--max-len": 257}, "{base} 257 --max-len 256"),
    ("sft.py", {"--out": "{run}"}, "--out {run} --overwrite"),
    ("reward.py", {"--out": "{pairs}"}, "--out {pairs} cannot be written"),
]


def name_of(case):
    script, changes, _ = case
    return " ".join([script, *(f"{flag}={value}" for flag, value in changes.items())])


@pytest.mark.parametrize("script, changes, says", CASES, ids=map(name_of, CASES))
def test_wrong_input_gets_one_line_and_status_2_and_writes_nothing(script, changes, says, paths, run_fast,
                                                                   tmp_path):
    before = sorted(paths["root"].rglob("*"))
    status, out, err = run_fast(script, flags(script, changes, paths, tmp_path / "out"))
    line = one_line(err)
    for words in says.format(**paths).split():
        assert words in line
    assert status == 2 and "Traceback" not in out
    assert list(tmp_path.iterdir()) == [] and sorted(paths["root"].rglob("*")) == before


@pytest.mark.parametrize("changes", [{"--data": "{broken}"}, {"--model": "{truncated}"}, {"--batch": 5}],
                         ids=lambda changes: next(iter(changes)))
def test_a_refused_run_leaves_the_run_that_it_was_to_overwrite(changes, paths, run_fast):
    status, _, err = run_fast("sft.py", flags("sft.py", {**changes, "--overwrite": ""}, paths, paths["run"]))
    assert status == 2 and one_line(err)
    assert (paths["run"] / "metrics.jsonl").read_text() == "what took days\n"


def test_a_model_is_not_overwritten_by_what_is_trained_on_it(paths, run_fast, tmp_path):
    # an adapter written over its own base would leave neither
    shutil.copytree(paths["base"], tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    changes = {"--model": tmp_path / "model", "--overwrite": "", "--lora-rank": 2, "--steps": 1}
    status, _, err = run_fast("sft.py", flags("sft.py", changes, paths, tmp_path / "model"))
    assert status == 2 and "--out" in one_line(err)
    assert (tmp_path / "model" / "config.json").read_text() == before


# ---------------------------------------------------------------------------------------------- on every rank
@pytest.mark.parametrize("script, changes, says", [
    ("reward.py", {"--out": "{run}"}, "--overwrite"),              # rank 0 finds it, the others must not wait
    pytest.param("sft.py", {"--no-such-flag": 1}, "--no-such-flag", marks=pytest.mark.faults),
    pytest.param("ppo.py", {"--rollout-batch": 6, "--mini-batch": 6}, "2 processes",
                 marks=pytest.mark.faults),
], ids=["rank 0 alone", "before they meet", "all of them"])
def test_two_ranks_print_one_line_and_leave_without_a_hang(script, changes, says, paths, tmp_path):
    words = flags(script, changes, paths, tmp_path / "out")
    done = run_script(script, *words, ranks=2, timeout=60, env=ON_CPU)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert (paths["run"] / "metrics.jsonl").read_text() == "what took days\n"


def test_a_port_in_use_is_named_and_how_to_choose_another(paths, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(busy.getsockname()[1])}
        words = flags("sft.py", {}, paths, tmp_path / "out")
        done = run_script("sft.py", *words, timeout=60, env=ON_CPU | launched)
    assert done.returncode == 2 and "--master_port" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()
