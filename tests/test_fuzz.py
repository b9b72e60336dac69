"""Damaged inputs by the thousand over all readers: each raises BadInput or gives what the file really says;
no other exception, no hang, no wrong success. A few of them, drawn at random, as real commands."""
import copy
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ppo
from conftest import REPO, tiny_config
from data import Tokenizer, open_tokenizer, read_records
from llama import Llama, LlamaConfig
from lora import add_lora, load_model, save_adapter
from reward import RewardModel, load_reward_model
from runtime import folders
from runtime.checkpoint import Run
from runtime.errors import BadInput
from runtime.tokenizer_write import copy_tokenizer
from tokenizer_kinds import make

MAKE_ROW = {
    "rm-static": lambda i: {"prompt": f"\n\nHuman: why {i}?\n\nAssistant:", "chosen": f" so {i}",
                            "rejected": " no"},
    "hh": lambda i: {"chosen": f"\n\nHuman: why {i}?\n\nAssistant: so",
                     "rejected": f"\n\nHuman: why {i}?\n\nAssistant: no"},
    "messages": lambda i: {"messages": [{"role": "system", "content": "be kind"},
                                        {"role": "user", "content": f"why {i}?"},
                                        {"role": "assistant", "content": "so"}]},
    "conversations": lambda i: {"conversations": [{"from": "human", "value": f"why {i}?"},
                                                  {"from": "gpt", "value": "so"}]},
    "shp": lambda i: {"history": f"why {i}?", "human_ref_A": "so", "human_ref_B": "no", "labels": i % 2},
    "alpaca": lambda i: {"instruction": f"why {i}?", "input": "x", "output": "so"},
    "lists": lambda i: {"prompt": [{"role": "user", "content": [{"type": "text", "text": f"why {i}?"}]}],
                        "chosen": [{"role": "assistant", "content": "so"}],
                        "rejected": {"role": "assistant", "content": "no"}},
    "whole": lambda i: {"chosen": [{"from": "human", "value": f"why {i}?"}, {"from": "bing", "value": "so"}],
                        "rejected": [{"from": "user", "value": f"why {i}?"}, {"from": "gpt", "value": "no"}]},
    "scored": lambda i: {"question": f"why {i}?", "answer_0": "so", "answer_1": "no",
                         "score_0": 1, "score_1": 0},
    "chosen_id": lambda i: {"prompt": f"why {i}?", "response_0": "so", "response_1": "no",
                            "better_response_id": i % 2},
    "history": lambda i: {"instruction": f"why {i}?", "history": [["why?", "so"]], "system": "be kind",
                          "context": "x", "response": "so"},
    "weights": lambda i: {"messages": [{"role": "user", "content": f"why {i}?"},
                                       {"role": "assistant", "content": "no", "weight": 0},
                                       {"role": "user", "content": "why?"},
                                       {"role": "assistant", "content": "so", "weight": 1}]},
    "completion": lambda i: {"prompt": f"Human: why {i}? Assistant:", "completion": "so", "label": True},
    "columns": lambda i: {"query": f"why {i}?", "best": "so", "worst": "no"},
    "prompts": lambda i: {"prompt": f"why {i}?"},
    "text": lambda i: {"text": f"the sky is blue {i}"},
}
ROWS = {kind: [make(i) for i in range(4)] for kind, make in MAKE_ROW.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, monkeypatch_module):
    """A folder of sound inputs: models whole, in shards and as .bin, an adapter, a reward model, data of
    every kind, and a checkpoint's manifest."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(base, root / "model")
    model = Llama.from_pretrained(base)
    monkeypatch_module.setattr(folders, "SHARD_BYTES", 40_000)
    model.save_pretrained(root / "shards")
    monkeypatch_module.undo()
    copy_tokenizer(base, root / "shards")
    shutil.copytree(base, root / "bin")
    (root / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), root / "bin" / "pytorch_model.bin")
    add_lora(model, 2, 16, ["q_proj"])
    save_adapter(model, root / "adapter", "default", root / "model", "CAUSAL_LM")
    RewardModel(tiny_config()).save_pretrained(root / "reward")
    copy_tokenizer(base, root / "reward")
    (root / "reward" / "reward_stats.json").write_text('{"mean": 0.5, "std": 1.5}')
    for kind in ("byte-level", "unigram"):
        shutil.copytree(base, root / kind, ignore=shutil.ignore_patterns("tokenizer*"))
        make(kind, root / kind, None)
        (root / kind / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (root / "data").mkdir()
    for kind, rows in ROWS.items():
        (root / "data" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data" / "array.json").write_text(json.dumps(ROWS["alpaca"], indent=1))
    (root / "data" / "lines.jsonl.gz").write_bytes(gzip.compress((root / "data" / "hh.jsonl").read_bytes()))
    step = root / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    for name in ("weights.safetensors", "run.json", "rank-0.pt"):
        (step / name).write_bytes(name.encode() * 100)
    (step / "manifest.json").write_text(json.dumps({p.name: folders.fingerprint(p) for p in step.iterdir()}))
    return root


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


# ------------------------------------------------------------------------------------------------ damage
def damage_bytes(rng, content):
    """A copy with one random injury."""
    data, n = bytearray(content), len(content)
    at, length = rng.randrange(n), rng.choice([1, 2, 8, 100, n])
    kind = rng.randrange(8)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at + length] = rng.choice([b"\0", b"\xff"]) * len(data[at:at + length])
    elif kind == 3:
        del data[at:at + length]
    elif kind == 4:
        data[at:at] = data[at:at + length]
    elif kind == 5:
        data[at:at] = rng.randbytes(length % 1000)
    elif kind == 6:
        for _ in range(20):
            data[rng.randrange(n)] = rng.randrange(256)
    else:
        data = bytearray(rng.randbytes(min(n, 1000)))
    return bytes(data)


ODD = [None, True, False, 0, 1, -1, 2, 10**9, 2**63, -2**63, 10**30, 0.5, 1e308, -0.0, float("nan"),
       float("inf"), "", "x", "../../etc/passwd", "\0", "x" * 10_000, "\x1b[31m", "((a+)+)+", "(.*)*x", [],
       {}, [[]], [None] * 100, {"a": 1}, "7", "-1"]


def damage_json(rng, value):
    """A copy with one random value replaced, gone, or doubled, somewhere in the tree."""
    value = copy.deepcopy(value)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])
    walk(value)
    if not places or rng.random() < 0.05:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(["", "x", "type", str(key).upper(), "labels", "text"])] = node.pop(key)
    elif kind == 2:
        node[key] = [node[key]] * 2
    else:
        node[key] = rng.choice(ODD)
    return value


def damage(rng, content, name):
    """The damaged content of a file: of JSON in half of the cases by its structure, with a bomb now and
    then; of safetensors in half of the cases in its header."""
    if rng.random() < 0.5:
        return damage_bytes(rng, content)
    if name.endswith((".json", ".jsonl")):
        if rng.random() < 0.03:
            return rng.choice([b"[" * 200_000, b'{"a":' * 100_000, b'{"text": "' + b"x" * 5_000_000 + b'"}',
                               b"1" * 6000])
        if name.endswith(".json"):
            return json.dumps(damage_json(rng, json.loads(content))).encode()
        lines = content.decode().splitlines()
        n = rng.randrange(len(lines))
        lines[n] = json.dumps(damage_json(rng, json.loads(lines[n])))
        return "\n".join(lines).encode()
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(damage_json(rng, json.loads(content[8:8 + length]))).encode()
        told = rng.choice([len(header)] * 4 + [len(header) - 1, 2**40, 0, 2**63])
        return told.to_bytes(8, "little") + header + content[8 + length:]
    return damage_bytes(rng, content)


# ---------------------------------------------------------------------------------- readers and what is right
def read_model(folder):
    """A language model; right if its weights are those that safetensors or torch reads, and its config the
    file's."""
    model = load_model(folder)
    raw = json.loads((folder / "config.json").read_text())
    for key in LlamaConfig.__dataclass_fields__.keys() - {"rope_scaling", "rope_theta"}:
        value = getattr(model.config, key)
        if raw.get(key) is not None:
            assert value == raw[key] and type(value) is type(raw[key]), (key, value, raw[key])
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True, mmap=True)
    for name, p in model.named_parameters():
        assert same(p, tensors[name]), name


def same(a, b):
    return torch.equal(a.nan_to_num(7.5), b.to(a.dtype).nan_to_num(7.5))


def read_adapter(folder):
    model = load_model(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert same(model.get_parameter(path), tensor)
    layer = model.model.layers[0].self_attn.q_proj
    if not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora")):
        assert layer.scale["default"] == config["lora_alpha"] / config["r"]


def read_reward(folder):
    model = load_reward_model(folder)
    tensors = load_file(folder / "model.safetensors")
    # a language model's folder has no score, and gets a new one; a reward model's must have it
    assert same(model.model.norm.weight, tensors["model.norm.weight"])
    stats = ppo.read_stats(SimpleNamespace(reward=folder, reward_norm="stats"))
    assert stats == json.loads((folder / "reward_stats.json").read_text()) and 0 < stats["std"] < float("inf")


def read_tokenizer(folder):
    tokenizer, config, _ = open_tokenizer(folder)
    ids = tokenizer.encode("Human: why is the sky blue?")
    assert all(0 <= i < tokenizer.vocab_size <= config.vocab_size for i in ids)
    assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.pieces()) == tokenizer.vocab_size
    ends, pieces = {tokenizer.bos_id, tokenizer.eos_id}, tokenizer.pieces()
    assert all(0 <= i < tokenizer.vocab_size for i in {tokenizer.pad_id, *ends, *tokenizer.eos_ids})
    assert ends.isdisjoint(tokenizer.encode("why" + "".join(pieces[i] for i in ends)))
    copy_tokenizer(folder, folder / "out")   # what could be read can be written, and is read alike
    again = Tokenizer(folder / "out", folder)
    assert again.is_same(tokenizer) and again.encode("why is the sky blue?") == tokenizer.encode(
        "why is the sky blue?")


def read_data(file):
    names = {"prompt": "query", "chosen": "best", "rejected": "worst"} if file.stem == "columns" else {}
    records = read_records(file, columns=names)
    raw = file.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    lines = [line for line in text.split("\n") if line.strip()]
    rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in lines]
    for record in records:
        assert all(answer is None or isinstance(answer, str) for answer in (record.chosen, record.rejected))
        assert record.prompt.endswith("\n\nAssistant:") or record.prompt == ""
    most = (row.get("messages", row.get("conversations")) for row in rows)
    assert len(records) <= sum(len(messages) if isinstance(messages, list) else 1 for messages in most)


def read_manifest(folder):
    """Run's check of a checkpoint; right if all files are what they were."""
    state = SimpleNamespace(folder=folder.parent, rank=0)
    if Run.verify(state, 3):
        for name in ("weights.safetensors", "run.json", "rank-0.pt"):
            manifest = json.loads((folder / "manifest.json").read_text())
            assert (folder / name).read_bytes() == name.encode() * 100 or name not in manifest


READERS = [  # (what is damaged, in which folder, how it is read)
    ("config.json", "model", read_model), ("model.safetensors", "model", read_model),
    ("model.safetensors.index.json", "shards", read_model),
    ("model-00001-of-*.safetensors", "shards", read_model),
    ("pytorch_model.bin", "bin", read_model), ("adapter_config.json", "adapter", read_adapter),
    ("adapter_model.safetensors", "adapter", read_adapter), ("tokenizer.model", "model", read_tokenizer),
    ("config.json", "model", read_tokenizer), ("model.safetensors", "reward", read_reward),
    *[("tokenizer.json", kind, read_tokenizer) for kind in ("byte-level", "unigram")],
    *[(name, "byte-level", read_tokenizer) for name in ("tokenizer_config.json", "generation_config.json")],
    ("reward_stats.json", "reward", read_reward), ("manifest.json", "checkpoints/step-3", read_manifest),
    ("rank-0.pt", "checkpoints/step-3", read_manifest),
    *[(f"{kind}.jsonl", "data", read_data) for kind in ROWS], ("array.json", "data", read_data),
    ("lines.jsonl.gz", "data", read_data)]


def injured(whole, to, rng, n):
    """(the file damaged, its folder, the reader) of a copy of one of the folders."""
    name, part, reader = READERS[n % len(READERS)]
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(whole / part, to / part)
    (file,) = (to / part).glob(name)
    content = damage(rng, file.read_bytes(), file.name)
    file.unlink()
    file.write_bytes(content)
    return file, to / part, reader


def test_what_is_not_damaged_is_read(whole):
    for name, part, reader in READERS:
        (file,) = (whole / part).glob(name)
        reader(file if reader is read_data else whole / part)
    assert Run.verify(SimpleNamespace(folder=whole / "checkpoints", rank=0), 3)


def too_long(*_):
    raise TimeoutError("this input takes forever")


def test_damaged_inputs_raise_BadInput_or_give_what_the_file_says(whole, tmp_path, full, capsys):
    cases, seed = (4000, random.randrange(10**6)) if full else (400, 0)
    refused, wrong = {}, []
    signal.signal(signal.SIGPROF, too_long)           # seconds of the processor: others may hold it
    for n in range(cases):
        rng = random.Random(f"{seed} {n}")
        file, folder, reader = injured(whole, tmp_path / "case", rng, n)
        signal.setitimer(signal.ITIMER_PROF, 10)
        try:
            reader(file if reader is read_data else folder)
        except BadInput as error:
            assert "\n" not in str(error) and "\x1b" not in str(error)
            refused[file.name] = refused.get(file.name, 0) + 1
        except BaseException as error:
            what = f"{str(error)[:300]!r} ({type(error).__name__})"
            wrong.append(f"case {n}: {file.name} read by {reader.__name__}: {what}")
        signal.setitimer(signal.ITIMER_PROF, 0)
    capsys.readouterr()
    assert not wrong, f"seed {seed}:\n" + "\n".join(wrong)
    print(f"seed {seed}: {cases} cases, refused {sum(refused.values())}")
    assert sum(refused.values()) > cases / 4


# ------------------------------------------------------------------------------------------- as real commands
SFT = "sft.py --max-len 128 --split none --batch 2 --micro-batch 1 --eval-data {whole}/data/hh.jsonl"
COMMANDS = {"data": SFT + " --model {whole}/model --data {file}",
            "reward": "ppo.py --max-prompt 60 --max-new 8 --split none --rollout-batch 2 --mini-batch 2 "
                      "--micro-batch 1 --actor {whole}/model --reward {folder} --data {whole}/data/hh.jsonl "
                      "--eval-data {whole}/data/hh.jsonl",
            None: SFT + " --model {folder} --data {whole}/data/hh.jsonl"}


def run_limited(words, logs):
    """(status, stdout, stderr, seconds, MB at its peak) of a command."""
    start = time.monotonic()
    with open(logs / "stdout", "w+") as out, open(logs / "stderr", "w+") as err:
        child = subprocess.Popen([sys.executable, *map(str, words)], cwd=REPO, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = 0                 # it is waited for already
    texts = [(logs / name).read_text(errors="backslashreplace") for name in ("stdout", "stderr")]
    return os.waitstatus_to_exitcode(status), *texts, time.monotonic() - start, usage.ru_maxrss / 1024


@pytest.mark.slow
def test_damaged_inputs_as_real_commands_get_one_line_and_status_2(whole, tmp_path, full):
    most, seen, n, seed, wanted = (0, 0), 0, 0, random.randrange(10**6) if full else 1, 100 if full else 4
    while seen < wanted:
        rng, n = random.Random(f"{seed} command {n}"), n + 1
        file, folder, reader = injured(whole, tmp_path / "case", rng, rng.randrange(10_000))
        if reader is read_manifest:
            continue
        try:                                 # only what is refused is a case: the rest would train
            reader(file if reader is read_data else folder)
            continue
        except BadInput:
            seen += 1
        command = COMMANDS.get(folder.name, COMMANDS[None])
        words = command.format(whole=whole, file=file, folder=folder).split()
        status, out, err, seconds, memory = run_limited([*words, "--out", tmp_path / "out"], tmp_path)
        assert status == 2 and "Traceback" not in out + err, (seed, n, words, err)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and str(folder) in lines[0], (seed, n, words, err)
        assert "\x1b" not in err and not (tmp_path / "out").exists(), (seed, n, words, err)
        assert seconds < 15 and memory < 2000, (seed, n, words, seconds, memory)
        most = max(most[0], seconds), max(most[1], memory)
    print(f"{seen} commands, seed {seed}: at most {most[0]:.1f} s and {most[1]:.0f} MB")


class Runs:
    def __reduce__(self):
        import os
        return os.system, ("touch code-of-a-pickle-has-run",)


def bombs(folder, whole):
    """Inputs made to hurt, by name, each with the words that its line must have."""
    (folder / "line.jsonl").write_text('{"text": "' + "x" * 100_000_000 + '"}\n')
    (folder / "deep.json").write_bytes(b"[" * 50_000_000)
    (folder / "utf8.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    (folder / "nul.jsonl").write_bytes(b"\0" * 1000)
    with gzip.open(folder / "bomb.json.gz", "wb", compresslevel=1) as file:
        file.write(b"[")
        for _ in range(60):
            file.write(b" " * 10_000_000)
    for name in ("pickle", "absurd", "escape", "words"):
        shutil.copytree(whole / "model", folder / name)
    (folder / "pickle" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs()}, folder / "pickle" / "pytorch_model.bin")
    config = json.loads((folder / "absurd" / "config.json").read_text())
    config |= {"vocab_size": 10**7, "hidden_size": 10**5}
    (folder / "absurd" / "config.json").write_text(json.dumps(config))
    (folder / "escape" / "model.safetensors").unlink()
    (folder / "escape" / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "../model/model.safetensors"}}))
    (folder / "words" / "tokenizer.model").write_text("the\nwords\n")
    return {"line.jsonl": "longer than", "deep.json": "JSON", "utf8.jsonl": "UTF-8", "nul.jsonl": "JSON",
            "bomb.json.gz": "longer than", "pickle": "would run code", "absurd": "config.json asks",
            "escape": "../model", "words": "SentencePiece"}


@pytest.mark.slow
def test_inputs_made_to_hurt_get_one_line_within_2_GB_and_15_s(whole, tmp_path):
    for name, words in bombs(tmp_path, whole).items():
        is_model = (tmp_path / name).is_dir()
        model = tmp_path / name if is_model else whole / "model"
        data = whole / "data" / "hh.jsonl" if is_model else tmp_path / name
        command = SFT.format(whole=whole).split() + ["--model", model, "--data", data]
        status, out, err, seconds, memory = run_limited([*command, "--out", tmp_path / "out"], tmp_path)
        (line,) = err.splitlines()
        assert status == 2 and line.startswith("error: ") and words in line, err
        assert str(tmp_path / name) in line, err
        assert not (REPO / "code-of-a-pickle-has-run").exists()
        print(f"{name}: {seconds:.1f} s, {memory:.0f} MB")
        assert seconds < 15 and memory < 2000, (name, seconds, memory)
