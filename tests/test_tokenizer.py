"""Tokenizers: text to ids and back for all kinds, what the files say, and what transformers makes of them."""
import json
import os
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import chat
import lora
import ppo
import reward
import sft
from conftest import REAL, WORDS, real, tiny_config, tiny_llama
from data import (
    Record,
    Tokenizer,
    encode_pair,
    encode_prompt,
    encode_sft,
    open_tokenizer,
    read_records,
    render,
)
from llama import Llama
from lora import add_lora, save_adapter, save_model
from reward import RewardModel
from runtime.errors import BadInput
from runtime.tokenizer_write import copy_tokenizer, save_generation_config
from tokenizer_kinds import KINDS, SPECIAL, byte_level, corpus, make, save
from training import train

CASES = REAL.parent / "cases" / "10-decapoda-alpaca-tokenizer-out"
ASK = [("Human", "why?")]
PLAIN = ["the cat sat on a red mat", "two  spaces,   three", "line\nline\n\n- a\tb", "1234 + 5 = x", "(a) b!",
         "</s> <s> <unk> <|end|>", "Human: a", "x"]
WILD = ["né 😀 日本語 end", "👩\u200d🔬 می\u200cخواهم", "10\u00a0km\u3000wide", "\U0001f9ff"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_file):
    """{kind: a folder with a small tokenizer of that kind}"""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(kind, root / kind.replace(" ", "-"), tokenizer_file) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, folders):
    return Tokenizer(folders[kind])


def texts_of(kind):
    return PLAIN if kind == "unigram" else PLAIN + WILD            # the unigram model spells no text in bytes


def edit(file, change):
    """Rewrites a JSON file: change(content) returns the new content, or alters it and returns None."""
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------- text to ids
def test_an_answer_is_decoded_to_what_was_encoded(kind, tokenizer):
    for text in texts_of(kind):
        assert tokenizer.decode(tokenizer.encode_answer(text)) == text
        assert tokenizer.decode(tokenizer.encode_answer(f"  {text}\n")) == text


def test_prompt_and_answer_encoded_apart_are_the_ids_of_both_at_once(kind, tokenizer):
    for answer in texts_of(kind):
        ids, n_prompt = encode_sft(tokenizer, Record(ASK, answer), 10**6)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(f"{render(ASK)} {answer}"), tokenizer.eos_id]
        assert ids[:n_prompt] == encode_prompt(tokenizer, Record(ASK), 10**6)
        chosen, rejected, n = encode_pair(tokenizer, Record(ASK, answer, "no"), 10**6)
        assert chosen == ids and n == n_prompt
        assert rejected == [tokenizer.bos_id, *tokenizer.encode(f"{render(ASK)} no"), tokenizer.eos_id]


def test_only_an_answer_to_a_prompt_gets_a_space_before_it(kind, tokenizer):
    ids, _ = encode_sft(tokenizer, Record([], " the cat\n"), 10**6)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eos_id]
    assert tokenizer.puts_space == (kind not in ("byte-level", "llama 3"))
    first = tokenizer.pieces()[tokenizer.encode("the cat")[0]]
    assert first.startswith(("Ġ", "▁")) == tokenizer.puts_space


def test_no_text_is_no_ids_and_an_empty_answer_has_eos_alone(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode_answer("") == tokenizer.encode_answer(" \n") == []
    assert encode_sft(tokenizer, Record(ASK, " "), 10**6) is None


def test_a_byte_pair_model_gives_the_same_ids_from_either_file(folders):
    ours, converted = Tokenizer(folders["sentencepiece"]), Tokenizer(folders["converted"])
    assert ours.is_same(converted) and ours.vocab_size == converted.vocab_size
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices([*WORDS[:9], " ", "  ", "   ", "\n", "é", "😀", "a", "<"], k=30))
        assert ours.encode(text) == converted.encode(text)
        assert ours.decode(ours.encode(text)) == converted.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_tokenizer_json_says_of_limits_padding_and_dropout_is_not_done(tmp_path, kind, folders):
    """It may say so for training, or for another program."""
    file = folders[kind] / "tokenizer.json"
    loud = tokenizers.Tokenizer.from_file(str(file))
    loud.enable_truncation(3)
    loud.enable_padding(length=50)
    loud.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A x", pair="$A $B", special_tokens=[("x", 5)])
    if kind != "unigram":
        loud.model.dropout = 0.9
    config = json.loads((folders[kind] / "tokenizer_config.json").read_text())
    quiet = Tokenizer(folders[kind])
    for text in texts_of(kind):
        assert Tokenizer(save(tmp_path, loud, **config)).encode(text) == quiet.encode(text)
    theirs = AutoTokenizer.from_pretrained(written(tmp_path, tmp_path / "out"))
    assert theirs(PLAIN[0]).input_ids == [quiet.bos_id, *quiet.encode(PLAIN[0])]


# --------------------------------------------------------------------------------------------- special tokens
def test_no_text_of_a_user_becomes_a_special_id(kind, tokenizer):
    pieces = tokenizer.pieces()
    special = {tokenizer.bos_id, tokenizer.eos_id} | {
        pieces.index(token) for tokens in SPECIAL.values() for token in tokens if token in pieces}
    for i in special:
        token = pieces[i]
        for text in (token, f"a {token} b", f"a{token}b", token * 3, f"▁{token}"):
            assert special.isdisjoint(tokenizer.encode(text))
            assert special.isdisjoint(tokenizer.encode_answer(text))
        ids = tokenizer.encode(f"\ufdd0{i}")                       # the name by which such a token is hidden
        assert {tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(ids) and len(ids) > 1


@pytest.mark.parametrize("trick", ["not special", "not added", "merges", "whole words"])
def test_nor_where_a_file_makes_it_easy(trick, tmp_path, folders):
    """BOS and EOS that are words of the vocabulary, or added tokens that are not special."""
    edit_me = save(tmp_path, byte_level(), bos_token="<|begin|>", eos_token="<|end|>") / "tokenizer.json"

    def change(raw):
        if trick == "not special":
            for token in raw["added_tokens"]:
                token["special"] = False
        else:
            raw["added_tokens"] = []
        if trick == "merges":                # which lead to "<|end|>"
            vocab = raw["model"]["vocab"]
            for piece in ("<|", "<|e", "|>", "d|>", "nd|>"):
                vocab[piece] = len(vocab)
            raw["model"]["merges"] = [["<", "|"], ["|", ">"], ["<|", "e"], ["d", "|>"], ["n", "d|>"],
                                      ["<|e", "nd|>"]]
        raw["model"]["ignore_merges"] = trick == "whole words"
        raw["pre_tokenizer"]["use_regex"] = False
    edit(edit_me, change)
    naive = tokenizers.Tokenizer.from_file(str(edit_me))
    naive.encode_special_tokens = True
    assert trick == "not added" or 0 in naive.encode("<|end|>").ids          # without care it is EOS
    tokenizer = Tokenizer(tmp_path)
    for token in ("<|end|>", "<|begin|>"):
        ids = tokenizer.encode(token)
        assert {0, 1}.isdisjoint(ids) and tokenizer.decode(ids) == token
    assert tokenizer.pieces()[:2] == ["<|end|>", "<|begin|>"]


def test_an_added_token_that_is_not_special_is_found_in_texts_as_the_model_knows_it(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    ours = Tokenizer(save(tmp_path, tokenizer, bos_token="<|begin|>", eos_token="<|end|>"))
    ids = ours.encode("the <tool>cat")
    assert ours.vocab_size - 1 in ids and ours.pieces()[-1] == "<tool>"
    assert ids == tokenizer.encode("the <tool>cat", add_special_tokens=False).ids
    assert ours.decode(ids) == "the <tool>cat"
    # unless the folder says that it ends an answer
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ours.vocab_size - 1}))
    ours = Tokenizer(tmp_path)
    assert ours.eos_ids == [0, ours.vocab_size - 1]
    assert ours.vocab_size - 1 not in ours.encode("the <tool>cat") != ids


def test_tokenizers_are_the_same_with_the_same_pieces_bos_and_eos(folders, tmp_path):
    tokenizer = Tokenizer(folders["byte-level"])
    assert tokenizer.is_same(Tokenizer(folders["byte-level"]))
    assert not tokenizer.is_same(Tokenizer(folders["unigram"]))
    for tokens in (("<|begin|>", "<|turn|>"), ("<|turn|>", "<|end|>")):
        other = Tokenizer(save(tmp_path, byte_level(), bos_token=tokens[0], eos_token=tokens[1]))
        assert other.pieces() == tokenizer.pieces() and not tokenizer.is_same(other)


def test_special_ids_are_decoded_to_nothing(kind, tokenizer):
    ids = tokenizer.encode_answer("the cat")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "the cat"
    assert tokenizer.decode([tokenizer.eos_id]) == tokenizer.decode([]) == ""
    if kind == "byte-level":                 # the third special token, which no file names
        assert tokenizer.decode([*ids[:1], 2, *ids[1:]]) == "the cat"


# --------------------------------------------------------------------------------------------- what files say
@pytest.fixture
def base_of(tmp_path, tokenizer_file):
    """base_of(kind, files): a folder with a small tokenizer and these files, {name: content or None}."""
    def build(kind="byte-level", **files):
        folder = make(kind, tmp_path / "base", tokenizer_file)
        for name, content in files.items():
            file = folder / f"{name}.json"
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_text(json.dumps(content))
        return folder
    return build


NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
WRONG = {"bos_token": "<|turn|>", "eos_token": "<|turn|>", "bos_token_id": 2, "eos_token_id": 2}


@pytest.mark.parametrize("files", [
    {"tokenizer_config": NAMED},
    {"tokenizer_config": {key: {"content": token, "special": True} for key, token in NAMED.items()}},
    {"tokenizer_config": NAMED, "special_tokens_map": WRONG, "config": WRONG},
    {"tokenizer_config": {"bos_token": "", "eos_token": None}, "special_tokens_map": NAMED, "config": WRONG},
    {"tokenizer_config": None, "special_tokens_map": {"bos_token": {"content": "<|begin|>"},
                                                      "eos_token": "<|end|>"}},
    {"tokenizer_config": {}, "config": {"bos_token_id": 1, "eos_token_id": 0}},
    {"tokenizer_config": None, "config": {"bos_token_id": 1, "eos_token_id": [0, 2]}},
    {"tokenizer_config": {"bos_token": "<|begin|>"}, "config": {"bos_token_id": 2, "eos_token_id": [0]}},
])
def test_bos_and_eos_are_those_of_the_first_file_that_names_them(files, base_of):
    tokenizer = Tokenizer(base_of(**files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids[0]) == (1, 0, 0)


@pytest.mark.parametrize("files, words", [
    ({"tokenizer_config": {}}, "tokenizer_config.json names no bos_token"),
    ({"tokenizer_config": {"bos_token": "<|begin|>"}}, "tokenizer_config.json names no eos_token"),
    ({"tokenizer_config": None, "config": {"bos_token_id": None, "eos_token_id": None}}, "no bos_token"),
    ({"tokenizer_config": {}, "config": {"bos_token_id": 340, "eos_token_id": -1}}, "no bos_token"),
    ({"tokenizer_config": {}, "config": {"bos_token_id": 7, "eos_token_id": 9}}, "no bos_token special"),
    ({"tokenizer_config": NAMED | {"bos_token": "<s>"}}, "tokenizer_config.json bos_token '<s>' no token"),
    ({"tokenizer_config": NAMED | {"eos_token": ["<|end|>"]}}, "tokenizer_config.json eos_token no token"),
    ({"tokenizer_config": {}, "special_tokens_map": {"bos_token": "x" * 9}}, "special_tokens_map.json xxx"),
])
def test_without_bos_and_eos_a_tokenizer_is_refused(files, words, base_of):
    assert_refused(lambda: Tokenizer(base_of(**files)), words)


def assert_refused(open_it, words):
    with pytest.raises(BadInput) as caught:
        open_it()
    line = str(caught.value)
    assert all(word in line for word in words.split()) and "\n" not in line, line


@pytest.mark.parametrize("generation, config, expected", [
    (None, None, [0]),
    ({"eos_token_id": [2, 0, 7]}, None, [0, 2, 7]),
    ({"eos_token_id": 2}, {"eos_token_id": [9, 0]}, [0, 2, 9]),
    (None, {"eos_token_id": 5}, [0, 5]),
    ({"eos_token_id": [340, -1, True, "2", 2.0, None, 3]}, {"eos_token_id": {"a": 1}}, [0, 3]),
])
def test_an_answer_ends_at_every_id_that_the_folder_names(generation, config, expected, base_of):
    assert Tokenizer(base_of(generation_config=generation, config=config)).eos_ids == expected


def test_with_a_sentencepiece_model_no_other_file_counts(base_of):
    tokenizer = Tokenizer(base_of("sentencepiece", generation_config=WRONG, config={"eos_token_id": [5, 6]},
                                  tokenizer_config=NAMED, special_tokens_map=NAMED))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, [2])


def test_the_sentencepiece_model_wins_over_a_tokenizer_json_beside_it(base_of, folders):
    folder = base_of("byte-level")
    (folder / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    assert Tokenizer(folder).is_same(Tokenizer(folders["sentencepiece"]))
    assert Tokenizer(folder / "tokenizer.json").is_same(Tokenizer(folders["byte-level"]))


def test_a_tiktoken_file_is_passed_over_or_named(base_of, folders):
    folder = base_of("byte-level")
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    for path in (folder, folder / "tokenizer.model"):
        assert Tokenizer(path).is_same(Tokenizer(folders["byte-level"]))
    (folder / "tokenizer.json").unlink()
    assert_refused(lambda: Tokenizer(folder), f"{folder}/tokenizer.model tiktoken tokenizer.json beside")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_with_the_command(name, base_of):
    folder = base_of("sentencepiece" if name == "tokenizer.model" else "byte-level")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 499723\n")
    assert_refused(lambda: Tokenizer(folder), f"{folder}/{name} Git LFS `git lfs pull`")


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    assert_refused(lambda: Tokenizer(tmp_path), f"{tmp_path}/tokenizer.model tokenizer.json")
    (tmp_path / "tokenizer.json").mkdir()
    assert_refused(lambda: Tokenizer(tmp_path), f"{tmp_path}/tokenizer.json cannot be read")
    assert_refused(lambda: Tokenizer("a\0b"), "a b")


def set_in(*keys, value):
    """A change of JSON: value stands at the place that keys lead to."""
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
    return change


DAMAGE = {
    "a hole": lambda raw: raw["model"]["vocab"].pop(next(iter(raw["model"]["vocab"]))) and None,
    "an id twice": set_in("model", "vocab", "the", value=7),
    "no vocabulary": lambda raw: {**raw, "model": {"type": "BPE"}},
    "an empty vocabulary": lambda raw: {**raw, "model": {"type": "BPE", "vocab": {}}, "added_tokens": []},
    "a huge id": set_in("model", "vocab", "zzz", value=2**62),
    "an id that is no number": set_in("model", "vocab", "zzz", value="340"),
    "a list of numbers": lambda raw: {**raw, "model": {"type": "Unigram", "vocab": [1, 2, 3]}},
    "merges of what is no token": lambda raw: raw["model"]["merges"].append(["zz", "yy"]),
    "merges to what is no token": lambda raw: raw["model"]["merges"].append(["x", "q"]),
    "merges that are numbers": set_in("model", "merges", value=[1, 2]),
    "no model": lambda raw: {"model": None},
    "parts of words with a prefix": set_in("model", "continuing_subword_prefix", value="x" * 99),
    "an unknown step": set_in("pre_tokenizer", value={"type": "Sorcery"}),
    "a broken pattern": set_in("pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "(("},
                                                       "behavior": "Isolated", "invert": False}),
    "added tokens without ids": set_in("added_tokens", value=[{"content": "x"}]),
    "added tokens that are texts": set_in("added_tokens", value=["x"]),
    "an added token with another's id": set_in("added_tokens", 0, "id", value=2),
    "an added token far away": set_in("added_tokens", 0, "id", value=10**9),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_tokenizer_json_is_bad_input_that_names_the_file(what, base_of, capfd):
    folder = base_of()
    edit(folder / "tokenizer.json", DAMAGE[what])
    assert_refused(lambda: Tokenizer(folder), f"{folder}/tokenizer.json")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":' * 60_000,
                                     b'{"a":' + b"[" * 200_000, b" " * (2**26 + 1)])
def test_what_is_no_json_of_bearable_size_is_bad_input(content, base_of):
    folder = base_of()
    (folder / "tokenizer.json").write_bytes(content)
    assert_refused(lambda: Tokenizer(folder), f"{folder}/tokenizer.json")


def test_a_tokenizer_json_of_two_gigabytes_is_refused_without_reading_it(base_of):
    folder = base_of()
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(2 * 10**9)
    assert_refused(lambda: Tokenizer(folder), f"{folder}/tokenizer.json larger 64 MB")


def test_a_missing_package_is_named_with_its_command(base_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert_refused(lambda: Tokenizer(base_of()), "base/tokenizer.json pip install tokenizers")
    assert Tokenizer(base_of("sentencepiece")).eos_id == 2         # which needs none


def test_a_text_without_tokens_is_bad_input(tmp_path):
    model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = save(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>")
    assert Tokenizer(folder).encode("a b") == [2, 3]
    assert_refused(lambda: Tokenizer(folder).encode("c"), f"{folder}/tokenizer.json cannot encode")


# ------------------------------------------------------------------------------------------ a model's folder
@pytest.fixture
def model_folder(base_of):
    """model_folder(kind, **files): base_of's folder with a tiny LLaMA."""
    def build(kind="byte-level", vocab_size=352, **files):
        folder = base_of(kind, **files)
        tokenizer = Tokenizer(folder)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        given = json.loads((folder / "config.json").read_text()) if "config" in files else {}
        tiny_llama(std=0.05, vocab_size=vocab_size).save_pretrained(folder)
        edit(folder / "config.json", lambda config: {**config, **ids, **given})
        return folder
    return build


def test_a_folder_that_agrees_is_opened_without_a_note(kind, model_folder, capsys):
    folder = model_folder(kind)
    tokenizer, config, where = open_tokenizer(folder)
    assert where == folder.resolve() and capsys.readouterr() == ("", "")
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert config.pad_token_id == tokenizer.pad_id != tokenizer.eos_id
    assert config.vocab_size > tokenizer.vocab_size == len(tokenizer.pieces())


@pytest.mark.parametrize("ids, said", [({"eos_token_id": [2, 0]}, False), ({"eos_token_id": 2}, True),
                                       ({"bos_token_id": 5}, True), ({"eos_token_id": [3, 4]}, True),
                                       ({"eos_token_id": [[0], 0]}, True)])
def test_other_ids_in_config_json_are_noted(ids, said, model_folder, capsys):
    tokenizer, config, _ = open_tokenizer(model_folder(config=ids))
    assert (config.bos_token_id, config.eos_token_id) == (1, 0)
    err = capsys.readouterr().err
    assert err.count("\n") == said
    assert not said or err.startswith("note: ") and "tokenizer.json has 1, 0" in err


def test_a_tokenizer_json_larger_than_the_weights_is_bad_input(model_folder):
    assert_refused(lambda: open_tokenizer(model_folder(vocab_size=300)), "340 words 300")


def test_an_adapters_own_tokenizer_comes_first_and_its_base_may_name_more_ends(model_folder, tmp_path):
    base = model_folder(generation_config={"eos_token_id": [0, 2]})
    model = tiny_llama(std=0.05)
    add_lora(model, 2, 4, ["q_proj"])
    save_adapter(model, tmp_path / "adapter", "default", base, "CAUSAL_LM")
    assert open_tokenizer(tmp_path / "adapter")[2] == base.resolve()
    save(tmp_path / "adapter", byte_level(), bos_token="<|begin|>", eos_token="<|turn|>")
    tokenizer, _, folder = open_tokenizer(tmp_path / "adapter")
    assert folder == tmp_path / "adapter" and tokenizer.eos_ids == [2, 0]


# ------------------------------------------------------------------------------------ what transformers reads
def written(source, out, **more):
    copy_tokenizer(source, out, **more)
    return out


def assert_same_ids(folder, texts):
    """AutoTokenizer gives BOS and our ids, and its template what the trainers make of a conversation."""
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)], text
    for said, turns in CHATS:
        messages = [{"role": role, "content": text} for role, text in said]
        if messages[-1]["role"] == "user":
            found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert found == encode_prompt(ours, Record(turns), 10**6)
        else:
            found = theirs.apply_chat_template(messages, return_dict=False)
            assert found == encode_sft(ours, Record(turns[:-1], turns[-1][1]), 10**6)[0]
    assert theirs.bos_token_id == ours.bos_id and theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token_id == ours.pad_id and theirs.pad_token_id not in ours.eos_ids
    assert theirs.pad_token_id < len(theirs) == ours.vocab_size
    return ours, theirs


CHATS = [                                    # messages as (role, content), and the turns that they are
    ([("user", "why?")], ASK),
    ([("user", "  why is\n\nthe  sky blue? \n")], [("Human", "why is\n\nthe  sky blue?")]),
    ([("system", "be nice"), ("user", "why?")], [("System", "be nice"), ("Human", "why?")]),
    ([("system", " be nice "), ("system", "and so"), ("user", "why?"), ("assistant", " so "),
      ("user", "and?")],
     [("System", "be nice\n\nand so"), ("Human", "why?"), ("Assistant", "so"), ("Human", "and?")]),
    ([("user", "why?"), ("assistant", "so"), ("developer", "be nice"), ("user", "and?")],
     [("Human", "why?"), ("Assistant", "so"), ("Human", "be nice\n\nand?")]),
    ([("assistant", "hello"), ("user", "why?"), ("assistant", "so"), ("user", "and?"),
      ("assistant", "so too ")],
     [("Human", "why?"), ("Assistant", "so"), ("Human", "and?"), ("Assistant", "so too")]),
    ([("system", ""), ("user", "why?"), ("assistant", "it is so")],
     [("Human", "why?"), ("Assistant", "it is so")]),
]
TRAINED = [text for text in PLAIN if "<" not in text]    # in a text, transformers finds special tokens


def test_transformers_gives_the_ids_of_training(kind, folders, tmp_path):
    ours, _ = assert_same_ids(written(folders[kind], tmp_path / "out"),
                              [text for text in texts_of(kind) if "<" not in text])
    assert ours.is_same(Tokenizer(folders[kind]))                  # and what is written is read alike


BAD_CONFIGS = {
    "wrong tokens": {"bos_token": "</s>", "eos_token": "<unk>", "unk_token": "</s>", "pad_token": "</s>"},
    "empty tokens": {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"},
    "no BOS": {"add_bos_token": False, "add_eos_token": True, "tokenizer_class": "LlamaTokenizer"},
    "a new pad token": {"pad_token": "[PAD]", "tokenizer_class": "LlamaTokenizerFast", "legacy": False,
                        "additional_special_tokens": ["[PAD]", "the"], "mask_token": {"content": "[MASK]"},
                        "extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
    "other added tokens": {"added_tokens_decoder": {
        "5": {"content": "cat", "special": True, "lstrip": True, "rstrip": True, "single_word": False,
              "normalized": False}}},
    "another template": {"chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"},
    "other code": {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "MyTokenizer",
                   "split_special_tokens": True, "add_prefix_space": False, "from_slow": True},
}


@pytest.mark.parametrize("also", ["nothing else", "special_tokens_map", "added_tokens", "chat_template"])
@pytest.mark.parametrize("bad", BAD_CONFIGS)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "unigram"])
def test_nothing_that_the_base_brings_changes_the_ids(kind, bad, also, base_of, tmp_path):
    named = {"byte-level": NAMED, "unigram": {"bos_token": "<s>", "eos_token": "</s>"}}.get(kind, {})
    kept = {"model_max_length": 77, "padding_side": "left", "a_key_of_its_own": [1, {"a": 2}]}
    folder = base_of(kind, tokenizer_config={**BAD_CONFIGS[bad], **kept, **named})
    if also == "special_tokens_map":
        (folder / "special_tokens_map.json").write_text(json.dumps(
            {"bos_token": "</s>", "eos_token": {"content": "x"}, "pad_token": "[PAD]",
             "additional_special_tokens": ["cat"]}))
    if also == "added_tokens":
        (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 400, "the": 401}))
    if also == "chat_template":
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert_same_ids(written(folder, tmp_path / "out"), TRAINED)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert kept.items() <= config.items()


def test_a_copy_of_a_copy_is_the_same_byte_for_byte(kind, folders, tmp_path):
    first, second = written(folders[kind], tmp_path / "1"), written(tmp_path / "1", tmp_path / "2")
    files = {file.name: file.read_bytes() for file in first.iterdir()}
    assert {file.name: file.read_bytes() for file in second.iterdir()} == files
    assert {file.name: file.read_bytes() for file in written(second, second).iterdir()} == files


def test_files_of_another_run_do_not_stay(folders, tmp_path):
    out = written(folders["sentencepiece"], tmp_path)
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (out / name).write_text("{}")
    assert {file.name for file in written(folders["byte-level"], out).iterdir()} == {
        "tokenizer.json", "tokenizer_config.json"}


def test_damaged_small_files_do_not_stop_the_writing(base_of, tmp_path):
    folder = base_of("sentencepiece")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text("{")
    assert_same_ids(written(folder, tmp_path / "out"), TRAINED)


@pytest.mark.parametrize("tokens, expected", [
    ({"unk_token": "<|turn|>"}, 2), ({}, 1), ({"unk_token": "<|end|>"}, 1), ({"unk_token": "no such"}, 1),
    ({"unk_token": "<|end|>", "bos_token": "<|end|>"}, 1), ({"bos_token": "<|end|>"}, 1)])
def test_padding_is_unk_or_bos_or_another_token_but_never_eos(tokens, expected, base_of, tmp_path):
    folder = base_of(tokenizer_config={**NAMED, **tokens})
    assert Tokenizer(folder).pad_id == expected
    assert AutoTokenizer.from_pretrained(written(folder, tmp_path / "out")).pad_token_id == expected


def test_no_ordinary_word_becomes_the_pad_token(tmp_path):
    edit(save(tmp_path, byte_level(), bos_token="<|end|>", eos_token="<|end|>") / "tokenizer.json",
         lambda raw: raw.update(added_tokens=raw["added_tokens"][:1]))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 339]}')
    assert Tokenizer(tmp_path).pad_id == 0


# --------------------------------------------------------------------- SentencePiece models of other kinds
@pytest.fixture(params=["bpe", "unigram", "nfkc", "pieces of the user", "control pieces", "no space before",
                        "no bytes"])
def sentencepiece_folder(request, tmp_path):
    """A SentencePiece model that is not trained as LLaMA's was."""
    given = {"unigram": {"model_type": "unigram"}, "no space before": {"add_dummy_prefix": False},
             "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
             "pieces of the user": {"user_defined_symbols": ["<a>", "<a>x", "  ", "sat", "t on"]},
             "control pieces": {"control_symbols": ["ca", "▁m", "s▁"]},
             "no bytes": {"byte_fallback": False}}.get(request.param, {})
    (tmp_path / "text.txt").write_text("\n".join([*corpus(), "ﬁne ２ café " * 9]))
    sentencepiece.SentencePieceTrainer.train(**{
        "input": str(tmp_path / "text.txt"), "model_prefix": str(tmp_path / "tokenizer"), "model_type": "bpe",
        "vocab_size": 340, "byte_fallback": True, "character_coverage": 1.0, "unk_id": 0, "bos_id": 1,
        "eos_id": 2, "pad_id": -1, "minloglevel": 2, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, **given})
    return tmp_path


def test_any_sentencepiece_model_of_pieces_is_the_same_for_transformers(sentencepiece_folder, tmp_path):
    ours, theirs = Tokenizer(sentencepiece_folder), None
    theirs = AutoTokenizer.from_pretrained(written(sentencepiece_folder, tmp_path / "out"))
    rng = random.Random(2)
    words = [*WORDS, " ", "  ", "\n", "\n\n", "é", "ﬁne", "２", "<a>", "<a>x", "t on", "sat", "x", "?", "\t"]
    for _ in range(400):
        text = "".join(rng.choice(["", " "]) + rng.choice(words) for _ in range(rng.randrange(12)))
        ids = ours.encode(text)
        assert theirs(text).input_ids == [1, *ids], text
        if 0 not in ids:                     # transformers leaves unk out
            assert theirs.decode(ids, skip_special_tokens=True) == ours.model.decode(ids)


def test_a_model_of_whole_words_is_copied_as_it_is(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(corpus()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="word",
        vocab_size=20, hard_vocab_limit=False, minloglevel=2)
    out = written(tmp_path, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    assert Tokenizer(out).is_same(Tokenizer(tmp_path))


# --------------------------------------------------------------------------------------------- whole runs
FLAGS = ["--max-len", "64", "--batch", "8", "--micro-batch", "8", "--lr", "0.01", "--steps", "1",
         "--split", "none"]


@pytest.fixture(params=["decapoda", "alpaca"])
def old_folder(request, tmp_path):
    """A LLaMA folder as it was found, with wrong special tokens; the weights are those of stories260k."""
    stories = real("stories260k")
    if not CASES.exists():
        pytest.skip(f"no folders of others: {CASES} is not there")
    folder = tmp_path / request.param
    folder.mkdir()
    for file in [*(CASES / request.param).iterdir(), stories / "tokenizer.model"]:
        (folder / file.name).write_bytes(file.read_bytes())
    model = Llama.from_pretrained(stories)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    for layer in (model.lm_head, model.model.embed_tokens):
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight.detach(), torch.zeros(size - 512, 64)]))
    config = (folder / "config.json").read_bytes()
    model.config.vocab_size = size
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    return folder


def merge(adapter, out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora.py", str(adapter), "--out", str(out)])
    lora.main()
    return out


def test_an_old_folder_gives_the_right_ids_from_every_step(old_folder, pairs_file, tmp_path, monkeypatch, hh):
    words = ["--model", old_folder, "--data", pairs_file, *FLAGS]
    train(sft, words, tmp_path / "sft", monkeypatch)
    train(sft, [*words, "--lora-rank", "2"], tmp_path / "adapter", monkeypatch)
    merge(tmp_path / "adapter", tmp_path / "merged", monkeypatch)
    texts = [text for record in read_records(hh)[:40] for text in (record.prompt, record.chosen)]
    for name in ("sft", "adapter", "merged"):
        ours, _ = assert_same_ids(tmp_path / name, texts)
        assert (ours.bos_id, ours.eos_ids) == (1, [2])
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    config, merged = ((tmp_path / name / "config.json").read_text() for name in ("sft", "merged"))
    assert config == merged
    config = json.loads(config)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2) and "pad_token_id" not in config


def test_a_byte_level_model_is_trained_saved_merged_and_talked_to(
        model_folder, pairs_file, tmp_path, monkeypatch):
    base = model_folder(generation_config={"eos_token_id": [0, 2]})
    words = ["--model", base, "--data", pairs_file, *FLAGS]
    train(sft, words, tmp_path / "sft", monkeypatch)
    train(sft, [*words, "--lora-rank", "2"], tmp_path / "adapter", monkeypatch)
    merge(tmp_path / "adapter", tmp_path / "merged", monkeypatch)
    config, merged = ((tmp_path / name / "config.json").read_text() for name in ("sft", "merged"))
    assert config == merged
    for name in ("sft", "adapter", "merged"):
        ours, theirs = assert_same_ids(tmp_path / name, TRAINED)
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2]} and ours.eos_ids == [0, 2]
    args = chat.Namespace(max_tokens=40, temperature=0, top_p=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    speaker = chat.Speaker("", "", chat.load_network(tmp_path / "sft", None, ours), ours)
    for said, turns in CHATS[:4]:
        messages = [{"role": role, "content": text} for role, text in said]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        ids = ids[0, prompt["input_ids"].shape[1]:]
        shown = "".join(chat.answer(speaker, turns, args, torch.zeros(1, 40)))
        expected = theirs.decode(ids, skip_special_tokens=True).removeprefix(" ")
        assert shown == chat.without_controls(expected)


def test_all_steps_run_on_a_byte_level_model(model_folder, pairs_file, tmp_path, monkeypatch):
    base = model_folder(generation_config={"eos_token_id": [0, 2]})
    words = ["--data", pairs_file, "--split", "none", "--steps", "1", "--micro-batch", "8"]
    tune = ["--batch", "8", "--max-len", "64", "--lora-rank", "2"]
    train(sft, ["--model", base, *words, *tune], tmp_path / "sft", monkeypatch)
    train(reward, ["--model", base, *words, *tune], tmp_path / "rm", monkeypatch)
    train(ppo, ["--actor", tmp_path / "sft", "--reward", tmp_path / "rm", *words, "--rollout-batch", "8",
                "--mini-batch", "8", "--max-prompt", "60", "--max-new", "9", "--save-critic"],
          tmp_path / "ppo", monkeypatch)
    for name in ("rm", "ppo", "ppo/critic"):
        assert_same_ids(tmp_path / name, TRAINED)
    assert Tokenizer(tmp_path / "ppo").eos_ids == [0, 2]
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("\n\nHuman: ") for row in rows)
    assert not any(token in row["response"] for row in rows for token in SPECIAL["byte-level"])


def test_a_reward_folder_pads_with_the_pad_token_of_its_tokenizer(model_folder, tmp_path):
    """transformers pools the score at the last id that is not pad; with EOS as pad it would miss EOS."""
    folder = model_folder(tokenizer_config=NAMED | {"unk_token": "<|turn|>"})
    model = RewardModel(tiny_config())
    torch.nn.init.normal_(model.score.weight)
    tokenizer, model.config, _ = open_tokenizer(folder)
    save_model(model, tmp_path / "out", folder, folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert config["pad_token_id"] == theirs.pad_token_id == tokenizer.pad_id == 2
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert not (tmp_path / "out" / "generation_config.json").exists()
    answers = ("so", "the cat sat on a red mat")
    rows = [encode_sft(tokenizer, Record(ASK, answer), 99)[0] for answer in answers]
    batch = theirs.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(**batch).logits[:, 0]
        expected = [model(torch.tensor([row]), torch.ones(1, len(row)))[0, -1] for row in rows]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("eos_ids, written_id", [([2], 2), ([0, 5, 9], [0, 5, 9])])
def test_generation_config_ends_at_every_eos(eos_ids, written_id, tmp_path):
    save_generation_config(tmp_path, 1, eos_ids)
    expected = {"bos_token_id": 1, "eos_token_id": written_id}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected


# ------------------------------------------------------------------------------------------ real tokenizers
def test_llama_2s_tokenizer_is_the_same_for_transformers_on_real_texts(hh, tmp_path):
    records = read_records(hh)[::6]
    texts = [text for record in records for text in (record.prompt, record.chosen)]
    assert any("  " in text for text in texts)                     # two spaces, which transformers 5 divides
    assert_same_ids(written(real("llama2-tokenizer"), tmp_path), [*texts, " a", "  b  c   d", "\t", ""])


@pytest.fixture(scope="module")
def real_model():
    """A real LLaMA with a byte-level tokenizer.json, such as SmolLM2-135M-Instruct."""
    if not os.environ.get("RLHF_TEST_MODEL"):
        pytest.skip("no real model: $RLHF_TEST_MODEL names no LLaMA folder with a tokenizer.json")
    return Path(os.environ["RLHF_TEST_MODEL"])


def test_a_real_byte_level_tokenizer_is_transformers_on_real_texts(real_model, hh, tmp_path):
    ours, raw = Tokenizer(real_model), AutoTokenizer.from_pretrained(real_model)
    records = read_records(hh)[:200]
    texts = [text for record in records for text in (record.prompt, record.chosen or "so")]
    for text in texts:
        assert ours.encode(text) == raw(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode_answer(text)) == text.strip()
    for record in records:
        both = ours.encode(f"{record.prompt} {record.chosen or 'so'}")
        assert both == ours.encode(record.prompt) + ours.encode_answer(record.chosen or "so")
    assert_same_ids(written(real_model, tmp_path), texts)


def test_a_real_model_has_the_logits_and_the_greedy_text_of_transformers(real_model):
    tokenizer, config, _ = open_tokenizer(real_model)
    model, theirs = Llama.from_pretrained(real_model), AutoModelForCausalLM.from_pretrained(real_model)
    ids = torch.tensor([encode_prompt(tokenizer, Record([("Human", "What is the capital of France?")]), 512)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
    ours, _ = model.generate(ids, torch.ones_like(ids), 100, temperature=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False,
                               eos_token_id=None)[:, ids.shape[1]:]
    assert ours.shape == (1, 100) and torch.equal(ours, expected)
