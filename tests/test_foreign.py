"""Folders and files that are no model here: said for what they are, with the way on, in one line."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import Llama
from lora import add_lora, load_model, resolve, save_adapter
from reward import RewardModel, load_reward_model
from runtime.folders import find_tensors, read_json
from test_adapters import message
from test_llama import edit_config, edit_weights, to_bin

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 1170000
"""


@pytest.fixture
def folder(base, tmp_path):
    """A model's folder, for a test to change."""
    return shutil.copytree(base, tmp_path / "model")


@pytest.fixture
def adapter(base, tmp_path):
    model = Llama.from_pretrained(base)
    add_lora(model, 2, 4, ["q_proj"])
    save_adapter(model, tmp_path / "adapter", "default", base, "CAUSAL_LM")
    return tmp_path / "adapter"


# -------------------------------------------------------------------------------------- Git LFS
def shards(folder):
    to_bin(folder, shards=2)
    return "pytorch_model-00002-of-00002.bin"


def index(folder):
    to_bin(folder, shards=2)
    return "pytorch_model.bin.index.json"


def whole_bin(folder):
    to_bin(folder)
    return "pytorch_model.bin"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", whole_bin, shards, index],
                         ids=lambda name: getattr(name, "__name__", name))
@pytest.mark.parametrize("text, words", [
    (POINTER, "git lfs pull"), (POINTER.replace("spec/v1", "spec/v2"), "git lfs pull"),
    ("\n<!DOCTYPE html>\n<html>", "web page")], ids=["pointer", "later pointer", "page"])
def test_what_stands_in_place_of_a_file_is_said(folder, name, text, words):
    name = name if isinstance(name, str) else name(folder)
    (folder / name).write_text(text)
    for read in (load_model, load_reward_model):
        message(lambda read=read: read(folder), f"{folder / name}: is a ", words)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pointer_in_an_adapter_is_said(adapter, name):
    if name.endswith(".bin"):
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_text(POINTER)
    message(lambda: load_model(adapter), f"{adapter / name}: is a Git LFS pointer", "git lfs pull")


def test_a_damaged_file_is_not_called_a_pointer(folder):
    (folder / "config.json").write_text("version 2")
    assert "git lfs" not in message(lambda: read_json(folder / "config.json"), "is not JSON")
    (folder / "config.json").unlink()
    assert "git lfs" not in message(lambda: read_json(folder / "config.json"), "cannot be read")


# -------------------------------------------------------------------------------------- other formats
def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


FORMATS = {
    "Meta": (["params.json", "consolidated.00.pth", "checklist.chk"], "Meta's own format",
             "convert_llama_weights_to_hf"),
    "Meta, in parts": (["consolidated.00.pth", "consolidated.01.pth"], "Meta's", "--model_size"),
    "Meta, a folder for each size": (["7B/params.json", "7B/consolidated.00.pth"], "Meta's", "other/7B "),
    "Meta, as the hub has it": (["original/consolidated.00.pth"], "(original/consolidated.00.pth)", "Meta's"),
    "GGUF": (["llama-2-7b.Q4_K_M.gguf", "README.md"], "llama.cpp's format", "take the Hugging Face folder"),
    "Flax": (["flax_model.msgpack"], "Flax", "from_flax=True"),
    "TensorFlow": (["tf_model.h5"], "TensorFlow", "from_tf=True"),
    "DeepSpeed": (["zero_to_fp32.py", "latest", "global_step500/mp_rank_00_model_states.pt"], "DeepSpeed",
                  "zero_to_fp32.py"),
    "shards alone": (["model-00001-of-00002.safetensors"], "model.safetensors.index.json", "copy"),
    "shards of .bin alone": (["pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json", "copy"),
    "an adapter without its config": (["adapter_model.safetensors"], "adapter_config.json", "copy"),
}


@pytest.mark.parametrize("config", [False, True], ids=["without config.json", "with config.json"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_in_another_format_is_said(folder, tmp_path, kind, config):
    names, *words = FORMATS[kind]
    other = put(tmp_path / "other", *names)
    if config:                               # it is the weights alone that are in another format
        shutil.copy(folder / "config.json", other)
    for read in (load_model, Llama.from_pretrained, load_reward_model, RewardModel.from_pretrained):
        line = message(lambda read=read: read(other), str(other), *words)
        assert ("no weights" if config else "config.json") in line


def test_weights_that_are_read_come_before_other_formats(folder):
    expected = Llama.from_pretrained(folder)
    put(folder, "original/consolidated.00.pth", "llama.gguf", "tf_model.h5", "zero_to_fp32.py")
    model = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_an_unknown_folder_is_said_to_lack_config_json(tmp_path):
    message(lambda: resolve(put(tmp_path / "notes", "a.txt")), "has no config.json")
    message(lambda: find_tensors(put(tmp_path / "notes")), "no weights", "model.safetensors")


def test_links_to_what_is_not_there_are_said(folder, tmp_path):
    """A folder of the hub's cache holds links into another folder, which a plain copy loses."""
    for name, word in (("model.safetensors", "no weights"), ("config.json", "config.json")):
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0123")
        message(lambda: load_model(folder), word, f"{name} is a link", "cp -rL")


# -------------------------------------------------------------------------------------- names and files
@pytest.mark.parametrize("name", ["TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-2-7b-hf",
                                  "HuggingFaceTB/SmolLM2-135M-Instruct"])
@pytest.mark.parametrize("read", [load_model, load_reward_model, resolve])
def test_a_name_on_the_hub_gets_the_command_that_downloads(name, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message(lambda: read(name), f"{name}: there is no such folder", "nothing is downloaded",
            f"hf download {name} --local-dir", "hf auth login")


@pytest.mark.parametrize("name", ["runs/sft", "/nowhere/model", "nowhere", "../x/y", "a/b/c", "\0/y"])
def test_a_path_that_is_not_there_gets_no_such_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "hf download" not in message(lambda: resolve(name), "there is no such folder")


@pytest.mark.parametrize("named", ["meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b-bnb-4bit"])
def test_a_base_on_the_hub_gets_the_command_and_the_flag(adapter, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    message(lambda: load_model(adapter), f"hf download {named}", "--base")
    message(lambda: load_model(adapter, base="nowhere"), "nowhere: there is no such folder", "--base")


@pytest.mark.parametrize("name, words", [("model.safetensors", "is a file; give the folder"),
                                         ("config.json", "is a file"), ("a.Q4.gguf", "llama.cpp's format")])
def test_a_file_in_place_of_a_folder_is_said(folder, name, words):
    put(folder, "a.Q4.gguf")
    message(lambda: load_model(folder / name), f"{folder / name}: ", words)


# -------------------------------------------------------------------------------------- folders of folders
def cache(folder, tmp_path, commits):
    """The hub's cache with one model in these versions; the last is the one in use."""
    model = tmp_path / "huggingface" / "hub" / "models--org--name"
    for commit in commits:
        shutil.copytree(folder, model / "snapshots" / commit)
    put(model, "blobs/0123", "refs/pr/1")
    (model / "refs" / "main").write_text(commits[-1])
    return model


@pytest.mark.parametrize("commits", [["a1b2"], ["ffff", "a1b2"], ["c3", "ffff", "a1b2"]], ids=len)
@pytest.mark.parametrize("above", [0, 1, 2, "snapshots"])
def test_of_the_hubs_cache_the_version_in_use_is_named(folder, tmp_path, commits, above):
    model = cache(folder, tmp_path, commits)
    given = model / "snapshots" if above == "snapshots" else [model, *model.parents][above]
    line = message(lambda: load_model(given), "holds no model itself", str(model / "snapshots"))
    first = line.partition("give the folder inside: ")[2].split(",")[0].split(" (")[0]
    assert first == str(model / "snapshots" / "a1b2")
    assert isinstance(load_model(first), Llama)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_of_a_folder_of_checkpoints_the_latest_is_named(folder, adapter, tmp_path, kind):
    for step in (500, 1000, 1500, 90):       # by number, not by name
        shutil.copytree(folder if kind == "full" else adapter, tmp_path / "out" / f"checkpoint-{step}")
    line = message(lambda: load_model(tmp_path / "out"), "holds no model itself", "(and 1 more)")
    assert line.index("checkpoint-1500") < line.index("checkpoint-1000") < line.index("checkpoint-500")


def test_a_model_one_folder_deeper_is_named(folder, tmp_path):
    (tmp_path / "download").mkdir()
    shutil.move(folder, tmp_path / "download" / "TinyLlama")
    message(lambda: load_reward_model(tmp_path / "download"), f"inside: {tmp_path}/download/TinyLlama")


def test_an_adapter_in_place_of_a_base_is_said_with_the_command_that_merges(folder, adapter, tmp_path):
    message(lambda: load_model(adapter, base=adapter), "--base", f"{adapter}: is an adapter", "lora.py")
    shutil.copy(folder / "config.json", adapter)         # some programs leave the base's config there
    message(lambda: load_model(adapter, base=adapter), "no weights", "an adapter", "lora.py")
    message(lambda: Llama.from_pretrained(adapter), "no weights", "an adapter")


def test_a_full_folder_in_place_of_an_adapter_is_said(folder, base):
    message(lambda: load_model(folder, base=base), "is a full folder", "leave the flag out")


# -------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("names", [["v_head.summary.weight", "v_head.summary.bias"], ["v_head.weight"],
                                   ["v_head.dense.weight", "v_head.out.bias"]], ids=str)
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_value_head_is_left_out_with_a_note(folder, names, file, capsys):
    expected = Llama.from_pretrained(folder)
    head = {name: torch.ones(1, 32) for name in names}
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")
    if file == "bin":
        to_bin(folder)
    model = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert capsys.readouterr().err == (f"note: {folder}: holds a value head (v_head) beside the model, which "
                                       f"is left out\n")
    assert load_reward_model(folder).score.weight.shape == (1, 32)       # a value head is no score head


STALE = [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}, {"bits": 8}]


@pytest.mark.parametrize("stale", STALE, ids=str)
def test_a_stale_quantization_config_is_read_over_with_a_note(folder, stale, tmp_path, capsys):
    expected = Llama.from_pretrained(folder)
    edit_config(folder, quantization_config=stale)
    model = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert capsys.readouterr().err == (f"note: {folder}/config.json: has a quantization_config, but the "
                                       f"weights are plain; they are read as they are\n")
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_the_note_is_printed_once_and_on_rank_0_alone(folder, monkeypatch, capsys):
    edit_config(folder, quantization_config=STALE[0])
    monkeypatch.setenv("RANK", "1")
    load_model(folder)
    assert capsys.readouterr().err == ""
    folder = shutil.move(folder, folder.with_name("other"))
    monkeypatch.setenv("RANK", "0")
    load_model(folder)
    load_model(folder)
    assert capsys.readouterr().err.count("note: ") == 1


Q = "model.layers.0.self_attn.q_proj"
QUANTISED = {                                # what takes the place of a weight
    "bitsandbytes, 8 bits": {f"{Q}.weight": torch.ones(32, 32, dtype=torch.int8), f"{Q}.SCB": torch.ones(32),
                             f"{Q}.weight_format": torch.zeros((), dtype=torch.uint8)},
    "bitsandbytes, 4 bits": {f"{Q}.weight": torch.ones(512, 1, dtype=torch.uint8),
                             f"{Q}.weight.absmax": torch.ones(16), f"{Q}.weight.quant_map": torch.ones(16),
                             f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.ones(80, dtype=torch.uint8)},
    "GPTQ": {f"{Q}.weight": None, f"{Q}.qweight": torch.ones(4, 32, dtype=torch.int32),
             f"{Q}.qzeros": torch.ones(1, 4, dtype=torch.int32), f"{Q}.scales": torch.ones(1, 32),
             f"{Q}.g_idx": torch.ones(32, dtype=torch.int32)},
    "AWQ": {f"{Q}.weight": None, f"{Q}.qweight": torch.ones(32, 4, dtype=torch.int32),
            f"{Q}.qzeros": torch.ones(1, 4, dtype=torch.int32), f"{Q}.scales": torch.ones(1, 32)},
    "fp8 in blocks": {f"{Q}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn),
                      f"{Q}.weight_scale_inv": torch.ones(1, 1)},
    "fp8 with scales": {f"{Q}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn),
                        f"{Q}.weight_scale": torch.ones(1), f"{Q}.input_scale": torch.ones(1)},
    "compressed-tensors": {f"{Q}.weight": None, f"{Q}.weight_packed": torch.ones(32, 4, dtype=torch.int32),
                           f"{Q}.weight_scale": torch.ones(32, 1), f"{Q}.weight_shape": torch.ones(2)},
    "whole numbers alone": {f"{Q}.weight": torch.ones(32, 32, dtype=torch.int8)},
}


@pytest.mark.parametrize("config", [True, False], ids=["with its config", "without its config"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_with_the_way_on(folder, kind, config):
    if config:
        edit_config(folder, quantization_config={"quant_method": kind})
    edit_weights(folder, **{key.replace(".", "__"): tensor for key, tensor in QUANTISED[kind].items()})
    for read in (load_model, load_reward_model):
        message(lambda read=read: read(folder), str(folder), "quantised", "docs/data.md")


def test_a_float8_weight_without_scales_is_the_number_it_says(folder):
    numbers = torch.full((32, 32), 1.5).to(torch.float8_e4m3fn)
    edit_weights(folder, **{f"{Q}.weight".replace(".", "__"): numbers})
    assert (load_model(folder).get_parameter(f"{Q}.weight") == 1.5).all()


def test_a_reward_folder_read_as_a_language_model_is_said(tmp_path, base):
    RewardModel.from_pretrained(base).save_pretrained(tmp_path / "reward")
    message(lambda: load_model(tmp_path / "reward"), "lm_head.weight", "reward model")
