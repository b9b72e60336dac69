"""llama.py against transformers and a published text, against its own definitions, and under everything that
must not change a result: the cache, padding, other rows, checkpointing, the format of the files."""
import contextlib
import gc
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import llama
import lora
import stories260k
from conftest import REPO, WORDS, tiny_config, tiny_llama
from data import Tokenizer, open_tokenizer
from llama import BadInput, KVCache, Llama, LlamaConfig, rotate, sample
from runtime import folders, speed
from runtime.tokenizer_write import copy_tokenizer

LINEAR = {"rope_type": "linear", "factor": 4.0}
# over the 8 dimensions of a tiny head: one wave is kept, one blended, two are slowed
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
VARIANTS = {
    "grouped-query": {}, "multi-head": {"num_key_value_heads": 4}, "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True}, "head_dim": {"head_dim": 16}, "eps": {"rms_norm_eps": 0.1},
    "attention_bias": {"attention_bias": True}, "mlp_bias": {"mlp_bias": True},
    "theta": {"rope_theta": 100.0}, "linear": {"rope_scaling": LINEAR},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 20000.0},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def batch(*lengths, vocab=352, seed=0):
    """Random texts of these lengths, left-padded: ids (B,T) with 0 under the padding, mask (B,T)."""
    lengths, T = torch.tensor(lengths), max(lengths)
    mask = torch.arange(T) >= T - lengths[:, None]
    ids = torch.randint(0, vocab, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids * mask, mask


def theirs(folder, ids, mask):
    """transformers' logits for a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits


@torch.no_grad()
def check_against_transformers(folder):
    """Holds a folder's logits to transformers'. The texts are longer than LLAMA3's original context."""
    model = Llama.from_pretrained(folder)
    ids, mask = batch(130, 97, 3, vocab=model.config.vocab_size)
    assert_close(model(ids, mask)[mask], theirs(folder, ids, mask)[mask], atol=1e-5, rtol=1e-5)
    return model


def same_weights(a, b):
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


@pytest.fixture
def folder(tmp_path):
    """A folder of its own with a tiny model, for a test to spoil."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    """Changes keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, **changes):
    """Replaces tensors of model.safetensors, named with __ for the dots; None takes one out."""
    state = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file(
        {k: v for k, v in state.items() if v is not None}, folder / "model.safetensors", {"format": "pt"}
    )


# -------------------------------------------------------------------------------------- a real model
def test_greedy_text_of_a_real_model_equals_the_published_one(stories):
    ids, mask = Llama.from_pretrained(stories).generate(
        torch.tensor([[1]]), torch.ones(1, 1), 199, temperature=0
    )
    assert mask.all() and ids.shape == (1, 199)
    assert Tokenizer(stories).decode(ids[0].tolist()) == (stories / "greedy.txt").read_text()


@torch.no_grad()
def test_greedy_text_without_a_cache_equals_the_published_one(stories):
    model, ids = Llama.from_pretrained(stories), torch.tensor([[1]])
    for _ in range(199):
        ids = torch.cat([ids, model(ids, torch.ones_like(ids))[:, -1:].argmax(-1)], dim=1)
    assert Tokenizer(stories).decode(ids[0, 1:].tolist()) == (stories / "greedy.txt").read_text()


def test_logits_of_a_real_model_equal_transformers(stories):
    check_against_transformers(stories)


# -------------------------------------------------------------------------------------- the converter
def test_permuted_rows_turn_pairwise_rotation_into_rotation_by_halves():
    torch.manual_seed(0)
    H, D, C, T = 3, 8, 5, 7
    weight, x, angles = torch.randn(H * D, C), torch.randn(T, C), torch.randn(T, D // 2)
    pairs = torch.view_as_complex((x @ weight.T).reshape(T, H, D // 2, 2))
    turned = pairs * torch.polar(torch.ones(T, 1, D // 2), angles[:, None])                # as llama2.c does
    halves = (x @ stories260k.permute(weight, H).T).reshape(T, H, D).transpose(0, 1)[None]  # (1, H, T, D)
    expected = torch.cat([turned.real, turned.imag], dim=-1).transpose(0, 1)[None]
    angles = torch.cat([angles, angles], dim=-1)
    assert_close(rotate(halves, angles.cos()[None, None], angles.sin()[None, None]), expected)


def write_llama2c(model, path):
    """A tiny model with a tied head as a llama2.c checkpoint: the inverse of what the converter does."""
    c, state = model.config, model.state_dict()
    kinds = (
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
    )
    layers = [state[f"model.layers.{i}.{kind}.weight"] for kind in kinds for i in range(c.num_hidden_layers)]
    for i in range(c.num_hidden_layers, 3 * c.num_hidden_layers):  # q_proj and k_proj, rows in pairs again
        halves = layers[i].reshape(-1, 2, c.head_dim // 2, c.hidden_size)
        layers[i] = halves.transpose(1, 2).reshape(layers[i].shape)
    table = torch.zeros(c.max_position_embeddings * c.head_dim)
    header = struct.pack(
        "<7i", c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
        c.num_key_value_heads, c.vocab_size, c.max_position_embeddings,
    )
    parts = [state["model.embed_tokens.weight"], *layers, state["model.norm.weight"], table]
    path.write_bytes(header + b"".join(part.numpy().tobytes() for part in parts))


def write_tok(tokenizer, path):
    """A tokenizer as llama2.c writes it: line breaks around <s> and </s>, plain spaces."""
    pieces = [piece.replace("\u2581", " ").encode() for piece in tokenizer.pieces()]
    pieces[1:3] = [b"\n<s>\n", b"\n</s>\n"]
    path.write_bytes(
        struct.pack("<i", max(map(len, pieces)))
        + b"".join(
            struct.pack("<fi", tokenizer.model.get_score(i), len(piece)) + piece
            for i, piece in enumerate(pieces)
        )
    )


def test_converted_checkpoint_has_the_same_weights_and_the_same_words(tmp_path, tokenizer_file):
    original = Tokenizer(tokenizer_file)
    model = tiny_llama(vocab_size=original.vocab_size, tie_word_embeddings=True, rms_norm_eps=1e-5)
    write_llama2c(model, tmp_path / "a.bin")
    write_tok(original, tmp_path / "a.tok")
    stories260k.main(tmp_path / "a.bin", tmp_path / "a.tok", tmp_path / "out")

    converted, tokenizer = Llama.from_pretrained(tmp_path / "out"), Tokenizer(tmp_path / "out")
    assert asdict(converted.config) == asdict(model.config) | {"tie_word_embeddings": False}
    assert all(
        torch.equal(weight, converted.state_dict()[name]) for name, weight in model.state_dict().items()
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, original.vocab_size)
    assert tokenizer.pieces() == original.pieces()
    text = " ".join(WORDS) + " Человек 42 \n<s>  z"  # words, bytes, spaces, a control word
    assert (
        tokenizer.encode(text) == original.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    )


@pytest.mark.parametrize(
    "read", [stories260k.read_checkpoint, lambda path: stories260k.read_tokenizer(path, 340)]
)
def test_converter_refuses_a_file_of_another_length(tmp_path, tokenizer_file, read):
    file = tmp_path / "a"
    write = write_llama2c if read is stories260k.read_checkpoint else write_tok
    write(tiny_llama() if write is write_llama2c else Tokenizer(tokenizer_file), file)
    file.write_bytes(file.read_bytes() + bytes(4))
    with pytest.raises(ValueError, match="holds"):
        read(file)


# -------------------------------------------------------------------------------------- against transformers
@variants
def test_folder_saved_here_gives_transformers_logits(tmp_path, changes):
    model = tiny_llama(**changes)
    model.save_pretrained(tmp_path)
    loaded = check_against_transformers(tmp_path)
    assert same_weights(model, loaded) and loaded.config == model.config


@variants
def test_folder_saved_by_transformers_gives_its_logits_here(tmp_path, changes):
    ours = tiny_llama(**changes)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**asdict(ours.config)))
    peer.load_state_dict(ours.state_dict())                        # the keys are the same
    peer.save_pretrained(tmp_path)
    assert same_weights(ours, check_against_transformers(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("name", ["theta", "linear", "llama3", "eps"])
def test_the_texts_above_are_long_enough_for_each_key_to_matter(name):
    ids, mask = batch(130)
    changed, plain = tiny_llama(**VARIANTS[name]), tiny_llama()
    assert (changed(ids, mask)[:, -20:] - plain(ids, mask)[:, -20:]).abs().mean() > 0.05


STYLES = {
    "v4": {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float32"},
    "v4, whole numbers": {"rope_theta": 100, "rope_scaling": {"rope_type": "linear", "factor": 4}},
    "v4, both": {
        "rope_theta": 100.0,
        "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
    },
    "v5": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_config_of_transformers_4_and_5_alike(folder, style):
    edit_config(folder, **({"rope_theta": None, "torch_dtype": None} | style))
    config = LlamaConfig.from_pretrained(folder)
    assert config.rope_theta == 100 and config.rope_scaling["factor"] == 4
    check_against_transformers(folder)


@pytest.mark.parametrize("style", [
    {"rope_theta": 100.0}, {"rope_theta": 100.0, "rope_scaling": {"type": "default"}},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}])
def test_theta_is_read_where_nothing_is_scaled(folder, style):
    edit_config(folder, **style)
    config = LlamaConfig.from_pretrained(folder)
    assert (config.rope_theta, config.rope_scaling) == (100, None)


def test_keys_that_change_nothing_are_ignored_and_null_is_the_default(folder):
    before = LlamaConfig.from_pretrained(folder)
    changes = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "sliding_window": None,
               "use_cache": True, "pretraining_tp": 1, "eos_token_id": [2, 3]}
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )
    after = LlamaConfig.from_pretrained(folder)
    assert (after.num_key_value_heads, after.head_dim) == (4, 8)
    assert asdict(after) == asdict(before) | {"num_key_value_heads": 4, "eos_token_id": [2, 3]}


CONTEXTS = {                                 # keys of config.json, and the most tokens of a text
    "plain": ({}, 256),
    "the other key": ({"max_position_embeddings": None, "max_sequence_length": 512}, 512),
    "neither": ({"max_position_embeddings": None}, 2048), "both": ({"max_sequence_length": 512}, 256),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
    "linear, whole number": ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 512),
    "linear, by half": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 640),
    "linear, 5": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 1024),
    "linear, with its length": ({"rope_scaling": {"type": "linear", "factor": 4.0},
                                 "max_sequence_length": 900}, 900),
    "linear, that length alone": ({"rope_scaling": {"type": "linear", "factor": 4.0},
                                   "max_position_embeddings": None, "max_sequence_length": 900}, 900),
    "linear, factor 1": ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 256),
    "null": ({"rope_scaling": None, "rope_parameters": None}, 256),
    "default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 256),
    "no type": ({"rope_parameters": {"rope_theta": 1e4}}, 256),
    "llama3": ({"rope_scaling": LLAMA3}, 256),
    "llama3, 5": ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": None}, 256),
    "no head_dim": ({"head_dim": None}, 256), "whole rotary factor": ({"partial_rotary_factor": 1.0}, 256),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_context_of_a_model_and_of_the_folder_written_from_it(folder, tokenizer_file, kind):
    changes, context = CONTEXTS[kind]
    raw = json.loads((folder / "config.json").read_text()) | changes
    if raw["max_position_embeddings"] is None:
        del raw["max_position_embeddings"]   # transformers takes no null there
    (folder / "config.json").write_text(json.dumps(raw))
    config = LlamaConfig.from_pretrained(folder)
    assert config.context == context
    again = folder.with_name("again")
    Llama.from_pretrained(folder).save_pretrained(again)
    assert LlamaConfig.from_pretrained(again) == config
    if raw.get("max_position_embeddings"):
        assert json.loads((again / "config.json").read_text())["max_position_embeddings"] == 256
    for path in (folder, again):             # transformers reads the same
        check_against_transformers(path)
        copy_tokenizer(tokenizer_file.parent, path)
        open_tokenizer(path, longest=context)
        with pytest.raises(BadInput, match=f"{context + 1} tokens .* context is {context}$"):
            open_tokenizer(path, longest=context + 1)


@pytest.mark.parametrize("both", [{"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100.0,
                                   "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}])
def test_of_both_spellings_of_the_rotary_scaling_the_older_counts_as_in_transformers(folder, both):
    edit_config(folder, **both)
    assert LlamaConfig.from_pretrained(folder).rope_scaling["factor"] == 4
    check_against_transformers(folder)


# -------------------------------------------------------------------------------------- formats of weights
def to_bin(folder, shards=1):
    """Turns model.safetensors into pytorch_model.bin, or into shards of it with their index."""
    state = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return
    files = {f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": dict(state[i::shards]) for i in range(shards)}
    for file, part in files.items():
        torch.save(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_load(folder, shards):
    expected = Llama.from_pretrained(folder)
    to_bin(folder, shards)
    assert same_weights(expected, check_against_transformers(folder))


def test_large_models_are_saved_in_shards_below_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 60_000)
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    sizes = [sum(w.nbytes for w in load_file(file).values()) for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) <= 60_000 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_weights(model, check_against_transformers(tmp_path))


@pytest.mark.parametrize(
    "limits", [(10**9, 60_000), (60_000, 10**9)], ids=["shards over a file", "a file over shards"]
)
def test_saving_over_another_model_leaves_nothing_of_it(tmp_path, monkeypatch, limits):
    for seed, limit in enumerate(limits):
        monkeypatch.setattr(folders, "SHARD_BYTES", limit)
        model = tiny_llama(seed)
        model.save_pretrained(tmp_path)
    assert same_weights(model, check_against_transformers(tmp_path))


def test_shards_written_by_transformers_load(folder, tmp_path):
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert same_weights(Llama.from_pretrained(folder), check_against_transformers(tmp_path / "shards"))


def test_bfloat16_files_load_in_both_types(tmp_path):
    half = tiny_llama().to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert same_weights(half.float(), check_against_transformers(tmp_path))
    assert {p.dtype for p in Llama.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = Llama.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_old_folders_carry_besides_is_ignored(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
                 lm_head__weight=model.lm_head.weight.detach().clone())
    assert same_weights(model, Llama.from_pretrained(tmp_path))


@pytest.mark.parametrize("change", [lambda folder: None, to_bin], ids=["safetensors", "bin"])
def test_weights_do_not_live_in_the_file(folder, change):
    change(folder)
    expected, model = Llama.from_pretrained(folder), Llama.from_pretrained(folder)
    expected = {name: weight.clone() for name, weight in expected.state_dict().items()}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with open(file, "r+b") as opened:                          # the same file, as a copy over it would be
            opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


# -------------------------------------------------------------------------------------- what is refused
def refused(folder, *words):
    """Reading the folder is a BadInput of one line with these words in it."""
    with pytest.raises(BadInput) as caught:
        Llama.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(folder), *words)), message


@pytest.mark.parametrize(
    "key, value, word",
    [
        ("model_type", "mistral", "mistral"),
        ("model_type", None, "model_type"),
        ("hidden_act", "gelu", "gelu"),
        ("sliding_window", 4096, "sliding_window"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "yarn"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "dynamic"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}, "yarn"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("rope_parameters", {"full_attention": {"rope_theta": 100.0}}, "full_attention"),
        ("rope_parameters", {"sliding_attention": {"rope_theta": 1e6}, "rope_theta": 1.0}, "sliding_"),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0}, "factor"),
        ("max_sequence_length", "2048", "max_sequence_length"),
        ("max_sequence_length", 0, "max_sequence_length"),
        ("max_position_embeddings", -1, "max_position_embeddings"),
        ("rope_scaling", {"rope_type": "linear"}, "factor"),
        ("rope_scaling", {**LLAMA3, "low_freq_factor": None}, "low_freq_factor"),
        ("rope_scaling", {"rope_type": "linear", "factor": "4"}, "factor"),
        ("rope_scaling", "linear", "rope_scaling"),
        ("rope_theta", -1.0, "rope_theta"),
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", "32", "hidden_size"),
        ("hidden_size", 32.0, "hidden_size"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("head_dim", 7, "head_dim"),
    ],
)
def test_config_that_would_change_the_result_is_refused(folder, key, value, word):
    edit_config(folder, **{key: value})
    refused(folder, "config.json", word)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x80"])
def test_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config.json")


def no_folder(folder):
    shutil.rmtree(folder)
    return "config.json",


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "no weights",


def half_a_file(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    return "model.safetensors",


def half_a_header(folder):
    os.truncate(folder / "model.safetensors", 100)
    return "model.safetensors",


def empty_file(folder):
    os.truncate(folder / "model.safetensors", 0)
    return "model.safetensors",


def half_a_bin(folder):
    to_bin(folder)
    os.truncate(folder / "pytorch_model.bin", (folder / "pytorch_model.bin").stat().st_size // 2)
    return "pytorch_model.bin",


def text_instead_of_bin(folder):
    to_bin(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "pytorch_model.bin",


def missing_shard(folder):
    to_bin(folder, shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    return "pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"


def half_a_shard(folder):
    to_bin(folder, shards=2)
    os.truncate(folder / "pytorch_model-00002-of-00002.bin", 1000)
    return "pytorch_model-00002-of-00002.bin",


def shard_without_what_the_index_says(folder):
    edit_index(folder, "pytorch_model-00002-of-00002.bin")
    return "pytorch_model-00002-of-00002.bin", "model.norm.weight"


def shard_outside_the_folder(folder):
    edit_index(folder, "../stranger.bin")
    shutil.copy(folder / "pytorch_model-00001-of-00002.bin", folder / "../stranger.bin")
    return "pytorch_model.bin.index.json", "../stranger.bin"


def edit_index(folder, file):
    """Two shards whose index names another file for the last norm, which is in the first."""
    to_bin(folder, shards=2)
    index = folder / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert weight_map["model.norm.weight"] == "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": file}}))


def index_without_a_map(folder):
    to_bin(folder, shards=2)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return "pytorch_model.bin.index.json", "weight_map"


def missing_tensor(folder):
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=None)
    return "model.layers.1.mlp.up_proj.weight",


def missing_head(folder):
    edit_weights(folder, lm_head__weight=None)
    return "lm_head.weight",


def surplus_tensor(folder):
    edit_weights(folder, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    return "model.layers.0.self_attn.q_proj.bias",


def surplus_layer(folder):
    edit_config(folder, num_hidden_layers=1)
    return "model.layers.1.",


def other_shape(folder):
    edit_weights(folder, model__norm__weight=torch.ones(33))
    return "model.safetensors", "model.norm.weight", "(33,)", "(32,)"


def transposed(folder):
    edit_weights(folder, model__layers__0__mlp__up_proj__weight=torch.ones(32, 64))
    return "model.safetensors", "up_proj", "(32, 64)", "(64, 32)"


@pytest.mark.parametrize(
    "spoil",
    [
        no_folder, no_weights, half_a_file, half_a_header, empty_file, half_a_bin, text_instead_of_bin,
        missing_shard, half_a_shard, shard_without_what_the_index_says, shard_outside_the_folder,
        index_without_a_map, missing_tensor, missing_head, surplus_tensor, surplus_layer, other_shape,
        transposed,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_damaged_folder_is_refused(folder, spoil):
    refused(folder, *spoil(folder))


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch '{self.flag}'",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(folder, tmp_path, name, zipped):
    flag, file = tmp_path / "flag", folder / name
    to_bin(folder, shards=1 if name == "pytorch_model.bin" else 2)
    state = {"model.norm.weight": Malice(flag)}
    torch.save(state, file) if zipped else file.write_bytes(pickle.dumps(state))
    refused(folder, name)
    assert not flag.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert flag.exists()                                           # it would have


def test_adapter_folder_is_refused_with_the_function_that_reads_it(folder, tmp_path):
    model = Llama.from_pretrained(folder)
    lora.add_lora(model, 2, 4, ["q_proj"])
    lora.save_adapter(model, tmp_path / "adapter", "default", folder, "CAUSAL_LM")
    refused(tmp_path / "adapter", "lora.load_model")


# -------------------------------------------------------------------------------------- invariances
@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 20, [7, 1, 5, 1, 6], [20]])
def test_with_the_cache_logits_equal_those_of_the_whole_text(steps):
    model, (ids, mask) = tiny_llama(), batch(20, 13, 1)
    cache, pieces, end = KVCache(model.config, 3, 25, torch.float32, "cpu"), [], 0
    for step in steps:
        end += step
        pieces.append(model.lm_head(model.model(ids[:, end - step:end], mask[:, :end], cache)))
    assert cache.length == 20
    # logits of up to 10: a few units in the last place of float32, which differ from processor to processor
    assert_close(torch.cat(pieces, 1)[mask], model(ids, mask)[mask], atol=3e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}, {"attention_bias": True}])
def test_a_text_alone_equals_the_text_padded_in_a_batch(changes):
    model, (ids, mask) = tiny_llama(**changes), batch(17, 9, 1)
    together = model(ids, mask)
    answers, _ = model.generate(ids, mask, 12, temperature=0)
    for row in range(3):
        alone = ids[row][mask[row]][None]
        assert_close(model(alone, torch.ones_like(alone))[0], together[row][mask[row]], atol=1e-5, rtol=1e-5)
        assert torch.equal(
            model.generate(alone, torch.ones_like(alone), 12, temperature=0)[0][0], answers[row]
        )


@torch.no_grad()
@pytest.mark.parametrize(
    "start, end",
    [([0, 8, 16], [17, 17, 17]), ([0, 0, 0], [17, 9, 1]), ([1, 8, 3], [16, 12, 4])],
    ids=["left", "right", "both"],
)
def test_ids_under_the_padding_change_nothing_bit_for_bit(start, end):
    model, ids, columns = tiny_llama(), batch(17, 17, 17)[0], torch.arange(17)
    mask = (columns >= torch.tensor(start)[:, None]) & (columns < torch.tensor(end)[:, None])
    spoilt = ids.where(mask, batch(17, 17, 17, seed=1)[0])
    assert (ids != spoilt).any() and torch.equal(model(ids, mask)[mask], model(spoilt, mask)[mask])
    if end == [17, 17, 17]:  # prompts are padded on the left
        expected, found = (model.generate(x, mask, 8, temperature=0) for x in (ids, spoilt))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@torch.no_grad()
def test_a_later_word_changes_no_earlier_logit_and_every_later_one():
    model, (ids, mask) = tiny_llama(), batch(12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 352
    moved = (model(ids, mask) != model(changed, mask)).any(-1)[0]
    assert moved.tolist() == [False] * 6 + [True] * 6


@torch.no_grad()
def test_nothing_depends_on_the_number_of_a_word():
    model, (ids, mask) = tiny_llama(vocab_size=12), batch(17, 9, 1, vocab=12)
    expected = model(ids, mask)
    words = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[words])
    assert words[0] != 0 and (ids[mask] == 0).any()         # among them unk, which is also what padding holds
    assert torch.equal(model(words.argsort()[ids], mask)[mask], expected[mask])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_a_mask_of_numbers_means_the_same(dtype):
    model, (ids, mask) = tiny_llama(), batch(9, 4)
    assert torch.equal(model(ids, mask.to(dtype)), model(ids, mask))
    for a, b in zip(model.generate(ids, mask.to(dtype), 4, 0), model.generate(ids, mask, 4, 0), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_logits_at_some_places_are_those_of_all_in_row_major_order():
    model, (ids, mask) = tiny_llama(), batch(17, 9, 1)
    at = mask & (torch.arange(17) % 3 == 1)
    at[:, -1] = True
    logits, full = model(ids, mask, at), model(ids, mask)
    assert logits.shape == (at.sum(), 352)
    expected = torch.stack([full[b, t] for b in range(3) for t in range(17) if at[b, t]])
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.lm_head(model.model(ids, mask)), full)


def test_inputs_are_never_written_into():
    model, (ids, mask) = tiny_llama(), batch(17, 9, 1)
    uniforms, logits = torch.rand(3, 6), torch.randn(3, 9)
    inputs = (ids, mask, uniforms, logits)
    before = [tensor.clone() for tensor in inputs]
    model(ids, mask, mask)
    model.generate(ids, mask, 6, 0.7, top_k=5, top_p=0.9, eos_id=2, uniforms=uniforms)
    sample(logits, 0.7, 3, 0.9, uniforms[:, 0])
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("trained", ["everything", "adapter"])
def test_gradients_with_checkpointing_are_the_same(trained):
    model, (ids, mask) = tiny_llama(), batch(17, 9, 1)
    if trained == "adapter":
        lora.add_lora(model, 2, 4, ["q_proj", "down_proj"])
        for parameter in lora.adapter_parameters(model, "default"):
            torch.nn.init.normal_(parameter)                       # with B at zero A has no gradient
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients(checkpointing):
        calls.clear()
        model.zero_grad()
        model.model.checkpointing = checkpointing
        model(ids, mask, mask).logsumexp(-1).sum().backward()
        assert len(calls) == 1 + checkpointing                     # checkpointing runs a layer once more
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == (8 if trained == "adapter" else 21)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@torch.no_grad()
def test_rope_is_not_rounded_with_the_model():
    # quick waves and late positions: frequencies in bfloat16 would be 1 % of the logits off, angles 7 %, this
    # is 0.03 %
    changes = {"head_dim": 32, "rope_theta": 10.0, "std": 0.2}
    half, whole, (ids, mask) = tiny_llama(**changes).to(torch.bfloat16), tiny_llama(**changes), batch(250)
    whole.load_state_dict(half.state_dict())
    a, b = half(ids, mask)[0, 200:].float(), whole(ids, mask)[0, 200:]
    assert (a - b).pow(2).mean() < 0.002 * b.pow(2).mean()


# -------------------------------------------------------------------------------------- generate
@pytest.fixture(scope="module")
def talker():
    """A model of a dozen words, whose answers end (id 2) after anything from one word to many."""
    return tiny_llama(vocab_size=12, std=0.2)


def prompts(rows=16, vocab=12):
    return batch(*(1 + row % 5 for row in range(rows)), vocab=vocab)


def endless(talker):
    """Prompts, random numbers, answers of 24 words that do not stop at EOS, and the length up to EOS."""
    uniforms = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    response, real = talker.generate(*prompts(), 24, uniforms=uniforms)
    assert response.shape == (16, 24) and real.all()
    lengths = torch.tensor([row.index(2) + 1 if 2 in row else 24 for row in response.tolist()])
    assert lengths.unique().numel() > 4 and (lengths == 24).any()  # some end at once, some are cut
    return *prompts(), uniforms, response, lengths


@pytest.mark.parametrize("longest", [24, 23])
def test_an_answer_is_the_endless_one_up_to_its_eos(talker, longest):
    ids, mask, uniforms, expected, lengths = (
        tensor[endless(talker)[4] <= longest] for tensor in endless(talker)
    )
    response, real = talker.generate(ids, mask, 24, eos_id=2, uniforms=uniforms)
    R = lengths.max()                                              # ends where the last row ends
    assert torch.equal(real, torch.arange(R) < lengths[:, None])   # EOS is part of the answer
    assert torch.equal(response, expected[:, :R] * real)           # id 0 after it


@pytest.mark.parametrize("eos_ids", [[2], [2, 5], [5, 2, 11], [0, 2], (2, 5)])
def test_an_answer_ends_at_the_first_of_several_eos_ids(talker, eos_ids):
    ids, mask, uniforms, expected, _ = endless(talker)
    ends = (expected[..., None] == torch.tensor(eos_ids)).any(-1)
    lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, 24)
    response, real = talker.generate(ids, mask, 24, eos_id=eos_ids, uniforms=uniforms)
    R = lengths.max()
    assert torch.equal(real, torch.arange(R) < lengths[:, None]) and torch.equal(
        response, expected[:, :R] * real
    )
    steps = list(talker.decode(ids, mask, 24, eos_id=eos_ids, uniforms=uniforms))
    assert torch.equal(torch.stack(steps, 1), response)
    if len(eos_ids) == 1:
        one = talker.generate(ids, mask, 24, eos_id=eos_ids[0], uniforms=uniforms)
        assert torch.equal(one[0], response) and torch.equal(one[1], real)


@pytest.mark.parametrize("eos_id", [None, []])
def test_without_an_eos_id_no_answer_ends(talker, eos_id):
    ids, mask, uniforms, expected, _ = endless(talker)
    response, real = talker.generate(ids, mask, 24, eos_id=eos_id, uniforms=uniforms)
    assert torch.equal(response, expected) and real.all()


def test_decode_yields_one_step_at_a_time_and_stops_with_the_last_row(talker):
    ids, mask, uniforms, response, lengths = endless(talker)
    short = lengths < 24
    steps = list(talker.decode(ids[short], mask[short], 24, eos_id=2, uniforms=uniforms[short]))
    assert len(steps) == lengths[short].max() < 24

    calls = []
    handle = talker.model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    walk = talker.decode(ids, mask, 24, uniforms=uniforms)
    assert torch.equal(torch.stack([next(walk), next(walk)], 1), response[:, :2])
    walk.close()
    handle.remove()
    assert calls == [5, 1]                                     # the prompt once, then one word: nothing ahead


@pytest.mark.parametrize("n", [0, 1, 7])
def test_max_new_tokens_is_respected(talker, n):
    response, real = talker.generate(*prompts(), n)
    assert response.shape == real.shape == (16, n) and real.all() and response.dtype == torch.long


def test_an_answer_depends_neither_on_other_rows_nor_on_their_order(talker):
    ids, mask = prompts()
    uniforms = torch.rand(16, 10, generator=torch.Generator().manual_seed(1))
    response, real = talker.generate(ids, mask, 10, 0.8, eos_id=2, uniforms=uniforms)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    again, again_real = talker.generate(ids[order], mask[order], 10, 0.8, eos_id=2, uniforms=uniforms[order])
    assert torch.equal(response[order], again) and torch.equal(real[order], again_real)
    for row in range(16):
        alone = ids[row][mask[row]][None]
        own, _ = talker.generate(
            alone, torch.ones_like(alone), 10, 0.8, eos_id=2, uniforms=uniforms[row : row + 1]
        )
        assert own[0].tolist() == response[row][real[row]].tolist()


def test_random_numbers_come_from_torchs_generator_where_none_are_given(talker):
    def answer(seed):
        torch.manual_seed(seed)
        return talker.generate(*prompts(), 10)[0]
    assert torch.equal(answer(0), answer(0)) and not torch.equal(answer(0), answer(1))


@torch.no_grad()
def test_temperature_zero_is_greedy_and_draws_nothing(talker):
    ids, mask = prompts()
    state = torch.get_rng_state()
    response, _ = talker.generate(ids, mask, 6, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    text, real = torch.cat([ids, response], 1), torch.cat([mask, torch.ones_like(response).bool()], 1)
    assert torch.equal(talker(text, real)[:, ids.shape[1] - 1:-1].argmax(-1), response)


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_best_word_alone_is_greedy(talker, choice):
    greedy, _ = talker.generate(*prompts(), 6, temperature=0)
    assert torch.equal(talker.generate(*prompts(), 6, **choice)[0], greedy)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_words_beyond_the_tokenizer_are_never_sampled(temperature):
    model = tiny_llama(vocab_size=12)
    assert (model.generate(*prompts(), 20, temperature)[0] >= 7).any()
    model.n_words = 7
    response, _ = model.generate(*prompts(), 20, temperature)
    assert set(response.flatten().tolist()) == set(range(7)) if temperature else (response < 7).all()


def test_generated_words_come_as_often_as_the_softmax_says(talker):
    ids, mask = prompts(1)
    rows, temperature = 20_000, 0.7
    torch.manual_seed(0)
    response, _ = talker.generate(ids.expand(rows, -1), mask.expand(rows, -1), 1, temperature)
    with torch.no_grad():
        expected = rows * (talker(ids, mask)[0, -1] / temperature).softmax(-1)
    seen = response.flatten().bincount(minlength=12)
    assert (
        (seen - expected).square() / expected
    ).sum() < 38  # chi-square of 11 degrees: above 37.4 once in 10,000


# -------------------------------------------------------------------------------------- sampling
PROBS = torch.tensor([0.05, 0.5, 0.1, 0.25, 0.07, 0.03])           # in order: words 1, 3, 2, 4, 0, 5


def grid(n):
    """n numbers spread evenly over [0, 1): each word comes n times its probability, give or take one."""
    return (torch.arange(n) + 0.5) / n


@pytest.mark.parametrize("top_k, top_p, words", [
    (0, 1.0, [0, 1, 2, 3, 4, 5]), (1, 1.0, [1]), (2, 1.0, [1, 3]), (4, 1.0, [1, 2, 3, 4]),
    (99, 1.0, [0, 1, 2, 3, 4, 5]), (0, 0.3, [1]), (0, 0.49, [1]), (0, 0.51, [1, 3]), (0, 0.74, [1, 3]),
    (0, 0.76, [1, 2, 3]), (0, 0.98, [0, 1, 2, 3, 4, 5]), (0, 0.0, [1]), (1, 0.99, [1]),
    (2, 0.6, [1]), (2, 0.7, [1, 3])])                             # of the two best words the first holds 0.67
def test_top_k_and_top_p_keep_the_right_words_in_proportion(top_k, top_p, words):
    other = PROBS.flip(0)                                          # a second row, which must not matter
    logits = torch.stack([PROBS, other]).log().repeat(2000, 1)
    ids = sample(logits, 1.0, top_k, top_p, grid(2000).repeat_interleave(2))[::2]
    kept = torch.zeros(6)
    kept[words] = PROBS[words] / PROBS[words].sum()
    assert (ids.bincount(minlength=6) - 2000 * kept).abs().max() <= 1.01


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sampled_words_come_as_often_as_the_softmax_says(temperature):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    seen = sample(logits.expand(5000, -1), temperature, 0, 1.0, grid(5000)).bincount(minlength=50)
    assert (seen - 5000 * (logits / temperature).softmax(-1)).abs().max() <= 1.01


@pytest.mark.parametrize("low", [-float("inf"), -300.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (40, 1.0), (0, 0.9)])
def test_words_of_no_probability_are_never_sampled(low, top_k, top_p):
    V, edges = 32_000, torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24, 1.0])  # 1 comes of rounding
    logits = 3 * torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    logits[:, :50] = logits[:, 15_000:15_050] = logits[:, -50:] = low
    for uniform in edges:
        new = sample(logits, 1.0, top_k, top_p, uniform.expand(8))
        assert (logits.softmax(-1)[torch.arange(8), new] > 0).all()
        if top_k:
            assert all(new[row] in logits[row].topk(top_k).indices for row in range(8))


# -------------------------------------------------------------------------------------- memory
MEASURE = """
import sys
from llama import Llama

def memory(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = memory("VmRSS")
model = Llama.from_pretrained(sys.argv[1])
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_reading_takes_little_more_memory_than_the_model(tmp_path):
    # the peak of the process itself: getrusage's counts that of the parent, which made the model, too
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status, where Linux tells a process's peak")
    config = tiny_config(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                         num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").tie_weights()
    model.save_pretrained(tmp_path)                                # 110 million parameters, 440 MB
    measure = [sys.executable, "-c", MEASURE, tmp_path]
    safetensors = float(subprocess.run(measure, cwd=REPO, stdout=subprocess.PIPE, check=True).stdout)
    to_bin(tmp_path)
    pytorch = float(subprocess.run(measure, cwd=REPO, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(tmp_path)
    assert 0.9 < safetensors < 1.3 and 0.9 < pytorch < 1.3


@pytest.mark.parametrize("fewest, sizes", [(1, [8, 8, 3, 1, 1, 1]), (4, [8, 8, 3, 3, 3, 3]), (8, [8] * 6)])
def test_rows_that_have_ended_leave_the_batch_once_they_are_half(fewest, sizes, monkeypatch):
    model, B, R, eos = tiny_llama(), 8, 6, 2
    if fewest > 1:                                             # a GPU's number, but smaller
        monkeypatch.setattr(llama, "fewest_rows", lambda device: fewest)
    ids, mask = torch.randint(3, 300, (B, 5)), torch.ones(B, 5, dtype=torch.bool)
    mask[3, :2] = False
    lengths = torch.tensor([1, 6, 2, 3, 2, 2, 3, 1])           # row r says EOS as its token number lengths[r]
    uniforms = (torch.arange(R) == lengths[:, None] - 1).float()
    seen = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))

    def scripted(logits, temperature, top_k, top_p, u):   # the likeliest word but EOS, or EOS where u says so
        likely = logits.index_fill(1, torch.tensor([eos]), -1e9).argmax(-1)
        return torch.where(u > 0.5, eos, likely)

    monkeypatch.setattr(llama, "sample", scripted)
    response, response_mask = model.generate(ids, mask, R, eos_id=eos, uniforms=uniforms)
    assert seen == sizes
    assert response_mask.sum(1).tolist() == lengths.tolist()
    for r in range(B):  # the same answers as alone
        alone, alone_mask = model.generate(
            ids[r : r + 1], mask[r : r + 1], R, eos_id=eos, uniforms=uniforms[r : r + 1]
        )
        assert torch.equal(alone[0], response[r, :lengths[r]]), r


def test_a_gpu_keeps_batches_of_few_rows_and_a_cpu_none():
    assert speed.fewest_rows(torch.device("cuda", 0)) == 16 and speed.fewest_rows(torch.device("cpu")) == 1


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs: a "graph" runs the step anew each time, on the tensors that it was captured
    with. Holds the (rows, columns) of each capture."""
    captured = []

    def tensors(step):
        return step.ids, step.mask, step.cache.keys, step.cache.values, step.cache.column

    def capture(self):
        before, width = [tensor.data_ptr() for tensor in tensors(self)], self.cache.length
        captured.append(tuple(self.mask.shape))
        self.logits = torch.full_like(self.run(), float("nan"))    # a capture computes nothing

        def replay():
            assert [tensor.data_ptr() for tensor in tensors(self)] == before and self.cache.length == width
            self.logits.copy_(self.run())
        self.graph = SimpleNamespace(replay=replay)

    monkeypatch.setattr(speed.CapturedStep, "capture", capture)
    return captured


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])                     # of keys and values, for 4 of queries
def test_a_captured_step_of_fixed_shapes_gives_the_same_logits(heads, graphs):
    model, P, R = tiny_llama(num_key_value_heads=heads), 5, 14
    ids = torch.randint(3, 300, (4, P + R))
    mask = torch.ones(4, P + R, dtype=torch.bool)
    mask[1, :3] = False
    expected = model(ids, mask)
    cache = KVCache(model.config, 4, P + R, torch.float32, "cpu")
    step = speed.CapturedStep(model.next_logits, None, block=8)
    assert_close(step(ids[:, :P], mask[:, :P], cache), expected[:, P - 1], atol=1e-5, rtol=0)
    assert not graphs                        # the prompt, of another shape, is no graph
    for t in range(P, P + R):
        if t == 12:                          # half of the rows have ended
            keep = torch.tensor([1, 2])
            ids, mask, expected = ids[keep], mask[keep], expected[keep]
            cache.keep(keep)
        logits = step(ids[:, t:t + 1], mask[:, :t + 1], cache)
        assert_close(logits, expected[:, t], atol=1e-5, rtol=0)
    assert graphs == [(4, 8), (4, 16), (2, 16), (2, 19)]


@pytest.mark.parametrize("fewest, shapes", [(4, [(16, 8), (16, 16), (8, 16), (8, 24), (8, 29)]),
                                            (16, [(16, 8), (16, 16), (16, 24), (16, 29)])])
def test_answers_of_captured_steps_are_those_of_ordinary_steps(fewest, shapes, talker, graphs, monkeypatch):
    """The whole of decode, with P + R odd, as on a GPU."""
    ids, mask = prompts()
    uniforms = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    expected = talker.generate(ids, mask, 24, eos_id=2, uniforms=uniforms)
    assert not graphs
    monkeypatch.setattr(
        llama, "faster_step", lambda model, device: speed.CapturedStep(model.next_logits, None, block=8)
    )
    monkeypatch.setattr(llama, "fewest_rows", lambda device: fewest)
    found = talker.generate(ids, mask, 24, eos_id=2, uniforms=uniforms)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert graphs == shapes


class FakeGraph:
    """Notes what is asked of a CUDA graph, and whether the garbage collector is on."""
    def __init__(self):
        self.calls = []

    def capture_begin(self, capture_error_mode):
        self.calls.append(("begin", capture_error_mode))

    def capture_end(self):
        self.calls.append(("end", gc.isenabled()))


@pytest.mark.parametrize("free, emptied", [(speed.ROOM - 1, 1), (speed.ROOM, 0)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_is_quiet_and_always_ends(free, emptied, fails, monkeypatch):
    stream, runs, empties = SimpleNamespace(wait_stream=lambda other: None), [], []
    for name, fake in {"CUDAGraph": FakeGraph, "current_stream": lambda: stream,
                       "stream": lambda stream: contextlib.nullcontext(),
                       "mem_get_info": lambda: (free, 80 * 2**30),
                       "empty_cache": lambda: empties.append(len(runs))}.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(ids, mask, cache):
        runs.append(gc.isenabled())
        if fails and len(runs) == 2:
            raise torch.OutOfMemoryError("no room")
        return "logits"

    captured = speed.CapturedStep(step, stream)
    captured.ids = captured.mask = None
    with pytest.raises(torch.OutOfMemoryError) if fails else contextlib.nullcontext():
        captured.capture()
        assert captured.logits == "logits"
    assert runs == [True, False] and gc.isenabled()              # once to warm up, once to capture
    assert empties == [1] * emptied                              # in between, as no capture may
    assert captured.graph.calls == [("begin", "thread_local"), ("end", False)]


# -------------------------------------------------------------------------------------- attention and norms
def test_attention_bias_is_made_of_aligned_rows():
    for S, T, G in ((1, 3, 4), (7, 3, 4), (8, 3, 1), (19, 3, 4), (37, 1, 1), (37, 1, 4), (37, 4, 1)):
        allowed = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(S)) > 0.5
        bias = speed.attention_bias(allowed, G, torch.bfloat16)
        assert bias.shape == (2, 1, G * T, S) and bias.dtype == torch.bfloat16
        expected = torch.where(allowed, 0.0, -torch.inf).bfloat16().repeat(1, 1, G, 1)
        assert torch.equal(bias, expected)
        # what PyTorch's attention on a GPU asks of a mask, so that it makes no copy (aligned_tensor)
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1


def spread(grouped):
    """The same network with as many heads of keys and values as of queries, without groups."""
    config = grouped.config
    plain = Llama(replace(config, num_key_value_heads=config.num_attention_heads))
    state = grouped.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        heads = state[name].unflatten(0, (config.num_key_value_heads, config.head_dim))
        repeats = config.num_attention_heads // config.num_key_value_heads
        state[name] = heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_grouped_queries_are_queries_with_repeated_keys(heads, checkpointing):
    grouped, (ids, mask) = tiny_llama(num_key_value_heads=heads, head_dim=16), batch(17, 9, 1)
    plain, found = spread(grouped), []
    for model in (grouped, plain):
        model.model.checkpointing = checkpointing
        logits = model(ids, mask)[mask]
        logits.logsumexp(-1).sum().backward()
        found.append([logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad,
                      model.model.embed_tokens.weight.grad])
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 0
        assert_close(a, b, atol=3e-5, rtol=1e-5)
    answers = [model.generate(ids, mask, 12, temperature=0)[0] for model in (grouped, plain)]
    assert torch.equal(*answers)


def test_no_model_uses_cudnns_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        tiny_llama()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_norm_of_a_gpu_is_the_norm(dtype, tolerance, monkeypatch):
    taken, rms_norm = [], torch.nn.functional.rms_norm
    monkeypatch.setattr(llama.F, "rms_norm", lambda *args, **more: taken.append(1) or rms_norm(*args, **more))
    norm = llama.RMSNorm(64, 0.01).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(5, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = norm(x)
    assert not taken
    found = norm(x.as_subclass(OnGpu)).as_subclass(torch.Tensor)
    assert taken and found.dtype == dtype
    assert_close(found, expected, atol=tolerance, rtol=tolerance)


# -------------------------------------------------------------------------------------- decoding on a CPU
def test_the_steps_on_a_cpu_read_the_head_in_columns_unless_it_has_an_adapter(monkeypatch):
    """An adapter on the head is no part of its weight, so a copy of the weight would leave it out."""
    taken, product = [], speed.thin_product
    monkeypatch.setattr(speed, "thin_product", lambda *args: taken.append(args) or product(*args))
    model = tiny_llama()
    plain, _ = model.generate(*batch(9, 4), 5, temperature=0)
    assert [columns.shape for _, columns in taken] == [(32, 352)] * 5
    lora.add_lora(model, 2, 64, ["lm_head"])
    for parameter in lora.adapter_parameters(model, "default"):
        torch.nn.init.normal_(parameter)
    adapted, _ = model.generate(*batch(9, 4), 5, temperature=0)
    assert len(taken) == 5 and not torch.equal(plain, adapted)
    text, real = torch.cat([batch(9, 4)[0], adapted], 1), torch.cat([batch(9, 4)[1], adapted >= 0], 1)
    with torch.no_grad():
        assert torch.equal(model(text, real)[:, 8:-1].argmax(-1), adapted)


@pytest.mark.parametrize("bits, found", [(torch.float32, True), (torch.bfloat16, False)])
def test_a_product_tells_whether_onednn_keeps_float32(bits, found, monkeypatch):
    """The product is rounded by hand, so that the test means the same on processors with bfloat16 units and
    without."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        speed.F,
        "linear",
        lambda a, b: (
            linear(a.to(bits).double(), b.to(bits).double()).to(a.dtype)
            if a.dtype == torch.float32
            else linear(a, b)
        ),
    )
    speed.onednn_is_float32.cache_clear()
    before = torch.get_float32_matmul_precision()
    assert speed.onednn_is_float32() is found and torch.get_float32_matmul_precision() == before
    speed.onednn_is_float32.cache_clear()


@pytest.mark.parametrize("is_float32, precision", [(True, "medium"), (False, "highest")])
def test_the_thin_product_is_by_onednn_only_where_that_is_float32(is_float32, precision, monkeypatch):
    monkeypatch.setattr(speed, "onednn_is_float32", lambda: is_float32)
    taken = []

    class Watched(torch.Tensor):
        def __matmul__(self, other):
            taken.append(torch.get_float32_matmul_precision())
            return torch.Tensor.__matmul__(self, other)

    torch.set_float32_matmul_precision("highest")      # threads of another test may have left "medium"
    before = torch.get_float32_matmul_precision()
    x, columns = (
        torch.randint(-8, 8, (4, 32)).float(),
        torch.randint(-8, 8, (32, 9)).float(),
    )  # exact in bfloat16 too
    product = speed.thin_product(x.as_subclass(Watched), columns).as_subclass(torch.Tensor)
    assert torch.equal(product, x @ columns)
    assert taken == [precision] and torch.get_float32_matmul_precision() == before


def test_the_root_mean_square_is_taken_in_float32_whatever_the_dtype():
    norm = llama.RMSNorm(64, 1e-6)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm.bfloat16()(x), llama.RMSNorm(64, 1e-6)(x.float()).bfloat16())
