"""Adapters as other programs write them: what changes nothing loads and answers as in PEFT, all else is
refused in one line that is true and says how to go on."""
import json
import re
import shutil
import time

import pytest
import torch
from peft import EvaConfig, PeftModel, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import REPO, tiny_llama
from llama import BadInput, Llama
from lora import load_adapter, load_model, save_adapter, use_adapter
from reward import RewardModel, load_reward_model
from runtime import patterns
from runtime.adapters import by_pattern, named_layers, plain_name
from runtime.patterns import match_names
from runtime.tokenizer_write import copy_tokenizer
from test_lora import (
    IDS,
    MASK,
    adapter,
    assert_close,
    check_foreign,
    differs,
    edit_config,
    logits,
    merge,
    peft_model,
    reward_adapter,
    stir,
)

assert adapter and reward_adapter and merge  # fixtures

PREFIX = "base_model.model."
UNSLOTH = (r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
           r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
           r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
           r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A base whose attention has biases."""
    folder = tmp_path_factory.mktemp("biased")
    tiny_llama(std=0.05, attention_bias=True).save_pretrained(folder)
    return folder


def in_peft(base, folder):
    """The answers of PEFT to the same files."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval())


def check_same(base, folder):
    """The adapter answers here as in PEFT, and not as its base."""
    ours = logits(load_model(folder, base=base).eval())
    assert differs(ours, logits(Llama.from_pretrained(base)))
    assert_close(ours, in_peft(base, folder))


def edit_tensors(folder, change):
    """Writes adapter_model.safetensors anew with what change makes of its tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def message(call, *words):
    """The one line of the BadInput that a call raises, which has these words."""
    with pytest.raises(BadInput) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


# ------------------------------------------------------------------------------- options without effect
HARMLESS = {
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "eva without its config": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"}, "random": {"init_lora_weights": False},
    "a config of eva that is not used": {"eva_config": EvaConfig(rho=3.0)},
    "velora": {"velora_config": VeloraConfig()},
    "a list of layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layer 0": {"layers_to_transform": 0}, "the last layer": {"layers_to_transform": 1},
    "layers and a full path": {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
                               "layers_to_transform": [1]},
    "excluded names": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    "an excluded pattern": {"exclude_modules": r".*\.0\..*v_proj"},
    "fan_in_fan_out": {"fan_in_fan_out": True}, "rslora": {"use_rslora": True, "r": 3},
    "biases of a base without biases": {"bias": "all"}, "biases of LoRA layers": {"bias": "lora_only"},
    "tied weights of an untied base": {"ensure_weight_tying": True},
    "unsloth": {"target_modules": UNSLOTH},
    "a pattern of alternatives": {"target_modules": r"model\.layers\.(0|1)\.(self_attn\.(q|k)|mlp\.up)_proj"},
    "a pattern with many stars": {"target_modules": r".*l.*a.*y.*e.*r.*s.*[01].*(q|v)_proj"},
    "patterns of ranks": {"rank_pattern": {r".*\.(0|2|4)\..*q_proj": 2, "v_proj": 6}},
    "patterns of alphas": {"alpha_pattern": {r"(?:.*\.)?[01]\.self_attn\.(q|o)_proj": 3, ".*": 30}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HARMLESS)
def test_options_that_change_nothing_load_and_answer_as_in_peft(base, tmp_path, kind):
    theirs = peft_model(base, **HARMLESS[kind])
    theirs.save_pretrained(tmp_path)
    check_foreign(base, theirs, tmp_path)
    assert_close(in_peft(base, tmp_path), logits(theirs))          # as it was trained, and as PEFT reads it


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_as_in_the_base_load(biased, tmp_path, bias):
    peft_model(biased, bias=bias).save_pretrained(tmp_path)
    assert any(key.endswith("bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    check_same(biased, tmp_path)


@pytest.mark.parametrize("options", [
    {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["norm"]},
    {"modules_to_save": ["input_layernorm"]}, {"modules_to_save": ["classifier"]}], ids=str)
def test_modules_that_are_saved_as_they_are_in_the_base_load(base, tmp_path, options):
    try:
        theirs = peft_model(base, **options)
    except ValueError:                       # PEFT makes none with names that match nothing, and loads them
        theirs = peft_model(base)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, **options)
    assert_close(logits(load_model(tmp_path, base=base).eval()), logits(theirs))


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_peft_saves_on_request_load(base, tmp_path):
    peft_model(base).save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    check_same(base, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings_that_peft_saves_on_request_load(tmp_path):
    tiny_llama(std=0.05, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    peft_model(tmp_path / "tied").save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    check_same(tmp_path / "tied", tmp_path / "adapter")


def test_equal_weights_load_in_bfloat16_too(base, tmp_path):
    peft_model(base, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16, base=base)
    assert model.lm_head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------- other names of tensors
def renamed(change):
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def with_name(name):
    return lambda key: re.sub(r"(lora_[AB])\.", rf"\1.{name}.", key)


NAMES = {
    "a checkpoint's": with_name("default"), "another adapter's name": with_name("sft"),
    "no prefix": lambda key: key.removeprefix(PREFIX), "wrapped twice": lambda key: PREFIX + key,
    "data parallel": lambda key: f"module.{key}", "value head": lambda key: f"pretrained_model.{key}",
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointing": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "several": lambda key: "module._orig_mod." + with_name("default")(key),
}


@pytest.mark.parametrize("kind", NAMES)
def test_tensors_under_the_names_of_a_checkpoint_or_a_wrapper_load(base, adapter, kind):
    expected = logits(load_model(adapter))
    edit_tensors(adapter, renamed(NAMES[kind]))
    assert torch.equal(logits(load_model(adapter)), expected)


@pytest.mark.parametrize("kind", ["default", "bin"])
def test_a_checkpoints_names_mean_the_same_in_peft(base, adapter, kind):
    edit_tensors(adapter, renamed(with_name("default")))
    if kind == "bin":
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    check_same(base, adapter)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_whole_state_dict_loads(base, tmp_path, modules_to_save):
    """As DeepSpeed's zero_to_fp32.py writes it: all weights of the base beside those of the adapter."""
    theirs = peft_model(base, modules_to_save=modules_to_save)
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: theirs.state_dict())
    assert len(load_file(tmp_path / "adapter_model.safetensors")) > 20
    assert_close(logits(load_model(tmp_path, base=base)), logits(theirs))


def test_of_several_adapters_the_one_called_default_is_read(base, adapter):
    expected = logits(load_model(adapter))

    def double(tensors):
        actor = {with_name("actor")(key): 2 * tensor for key, tensor in tensors.items()}
        return actor | renamed(with_name("default"))(tensors)
    edit_tensors(adapter, double)
    assert torch.equal(logits(load_model(adapter)), expected)
    edit_tensors(adapter, renamed(lambda key: key.replace("default", "other")))
    message(lambda: load_model(adapter), "several adapters", "actor", "other", "save_pretrained")


@pytest.mark.parametrize("name", ["score.weight", "score.modules_to_save.weight",
                                  "score.modules_to_save.default.weight"])
def test_a_score_head_under_the_names_of_all_versions_is_read(reward_adapter, name):
    head = load_reward_model(reward_adapter).score.weight.clone()
    edit_tensors(reward_adapter, renamed(lambda key: key.replace("score.weight", name)))
    assert torch.equal(load_reward_model(reward_adapter).score.weight, head)
    untrained = {f"{PREFIX}score.original_module.weight": torch.ones(1, 32)}
    edit_tensors(reward_adapter, lambda tensors: tensors | untrained)
    assert torch.equal(load_reward_model(reward_adapter).score.weight, head)


def test_plain_name_takes_away_wrappers_only():
    assert plain_name("module.base_model.model.model.norm.weight") == "model.norm.weight"
    assert plain_name("base_model.model.lm_head.base_layer.weight") == "lm_head.weight"
    assert plain_name("base_model.model.submodule.weight") == "submodule.weight"


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None, "CAUSAL_LM"])
def test_a_reward_adapter_is_known_by_its_head_whatever_task_is_named(reward_adapter, adapter, task_type):
    edit_config(reward_adapter, task_type=task_type)
    assert load_reward_model(reward_adapter).score.weight.shape == (1, 32)
    message(lambda: load_model(reward_adapter), "reward model's adapter")
    edit_config(adapter, task_type=task_type)
    if task_type == "SEQ_CLS":
        message(lambda: load_reward_model(adapter), "score.weight", "missing")
    else:
        message(lambda: load_reward_model(adapter), "language model's adapter")


def test_a_reward_adapter_never_becomes_a_language_models(base, reward_adapter):
    model = Llama.from_pretrained(base)
    message(lambda: load_adapter(model, reward_adapter, "actor"), "score.weight", "a language model")


def test_an_old_config_with_few_keys_loads(base, adapter):
    expected = logits(load_model(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({   # as PEFT 0.2 wrote it
        "base_model_name_or_path": str(base), "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM"}))
    assert torch.equal(logits(load_model(adapter).eval()), expected)


def test_a_value_head_in_an_adapter_is_left_out_with_a_note(adapter, capsys):
    expected = logits(load_model(adapter))
    edit_tensors(adapter, lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 32)})
    assert torch.equal(logits(load_model(adapter)), expected)
    assert capsys.readouterr().err == (f"note: {adapter}/adapter_model.safetensors: holds a value head "
                                       f"(v_head), which is left out\n")


# -------------------------------------------------------------------------------------- which layers
LINEARS = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]
LINEARS.append("lm_head")


@pytest.mark.parametrize("config, count", [
    ({"target_modules": ["q_proj"]}, 12), ({"target_modules": ["proj"]}, 0),
    ({"target_modules": ["1.mlp.up_proj"]}, 1), ({"target_modules": "all-linear"}, 24),
    ({"target_modules": r".*q_proj|lm_head"}, 13), ({"target_modules": "q_proj"}, 0),
    # a list may hold whole paths, for which layers_to_transform does not count
    ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1, 11]}, 3),
    ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": []}, 13),
    ({"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]}, 12),
    ({"target_modules": "all-linear", "exclude_modules": r".*\.(1|11)\..*"}, 20)], ids=str)
def test_the_layers_that_a_config_names(config, count):
    assert len(named_layers(config, LINEARS)) == count


def test_of_several_patterns_the_first_that_matches_counts():
    found = by_pattern({"1.mlp.up_proj": 1, r".*\.1?1\..*": 2, "q_proj": 3}, LINEARS, 4)
    assert [found[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1, 11)] == [4, 1, 2]
    assert [found[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1, 11)] == [3, 2, 2]
    assert by_pattern(None, LINEARS, 5) == dict.fromkeys(LINEARS, 5)


# a short text that takes `re` longer than anybody waits, or more memory than there is
HOSTILE = ["(.*)*x", "(){4000000000}", "x" * 10_000_000 + "*"]
SELDOM = [pytest.mark.slow, pytest.mark.faults]
MORE = ["(.?){60}!", ".?" * 60 + "!", "(.|..|...)" * 18 + "!", "(?i)" + "[\x00-\U0010ffff]" * 3000]


@pytest.mark.parametrize("pattern", [*HOSTILE, *(pytest.param(x, marks=SELDOM) for x in MORE)],
                         ids=lambda pattern: pattern[:12])
def test_a_pattern_that_would_take_forever_is_refused_in_time(pattern):
    start = time.process_time(), time.monotonic()
    with pytest.raises(ValueError, match="the pattern"):
        match_names([pattern], LINEARS)
    assert time.process_time() - start[0] < 1 and time.monotonic() - start[1] < 60


@pytest.mark.parametrize("pattern", ["q_proj", r".*\.q_proj", UNSLOTH, r"model\.layers\.\d+\.mlp.*", "(a+)+",
                                     "model.layers.1", r"model\.layers\.(1|2)"])
def test_patterns_match_as_python_says(pattern):
    expected = [name for name in LINEARS if re.fullmatch(pattern, name)]
    assert match_names([pattern, "lm_head"], LINEARS) == {pattern: expected, "lm_head": ["lm_head"]}


def test_names_are_matched_without_another_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", None)          # thousands of names, as EVA writes them
    found = match_names(LINEARS * 20, LINEARS, r"(.*\.)?({})")
    assert all(found[name] == [name] for name in LINEARS)


@pytest.mark.parametrize("option, pattern, words", [
    *[(option, "([", "unterminated") for option in ("target_modules", "exclude_modules", "rank_pattern",
                                                    "alpha_pattern")],
    ("target_modules", "(.*)*x", "takes more than"), ("alpha_pattern", "(.*)*x", "takes more than"),
    ("rank_pattern", "[z-a]", "bad character range")])
def test_a_config_with_a_bad_pattern_is_refused_by_its_file(adapter, option, pattern, words):
    edit_config(adapter, **{option: {pattern: 4} if option.endswith("pattern") else pattern})
    message(lambda: load_model(adapter), "adapter_config.json", words)


# ------------------------------------------------------------------------------- what changes the result
def add_to(part):
    """Changes the copies of modules that are trained, or weights with this in their name."""
    def train(model):
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data += 0.1
    return train


TRAINED = {
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save.", "embeddings"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save.", "head"),
    "norms": ({"modules_to_save": ["norm"]}, "modules_to_save.", "a trained weight"),
    "LoRA on the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_B", "embeddings"),
    "tokens": ({"trainable_token_indices": [5]}, "delta", "trainable_token_indices = [5]"),
    "DoRA": ({"use_dora": True}, "magnitude", "use_dora = True"),
    "pissa": ({"init_lora_weights": "pissa"}, "lora_A", "init_lora_weights = 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "lora_A", "init_lora_weights = 'olora'"),
}


def way_on(page="docs/data.md", heading="### Adapters"):
    """The lines of Python that a page shows under a heading."""
    text = (REPO / page).read_text()
    assert heading in text
    return re.search(r"```python\n(.*?)```", text[text.index(heading):], re.S)[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TRAINED)
def test_what_changes_the_result_is_refused_and_the_way_on_leads_to_pefts_answers(base, tmp_path, kind):
    options, part, word = TRAINED[kind]
    theirs = peft_model(base, **options)
    add_to(part)(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    message(lambda: load_model(tmp_path / "adapter", base=base), word, "merge the adapter", "docs/data.md")
    expected = in_peft(base, tmp_path / "adapter")
    lines = way_on().replace("BASE", str(base)).replace("ADAPTER", str(tmp_path / "adapter"))
    exec(lines.replace("MERGED", str(tmp_path / "merged")), {})
    assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-4)
    assert differs(expected, logits(Llama.from_pretrained(base)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [353, 384])
def test_a_resized_vocabulary_is_refused_with_both_sizes(base, tmp_path, rows):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "resized")
    theirs = peft_model(tmp_path / "resized")
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    message(lambda: load_model(tmp_path / "adapter", base=base), f"({rows}, 32)", "(352, 32)", "docs/data.md")
    lines = way_on().replace("# base.resize", "base.resize").replace("ROWS", str(rows))
    lines = lines.replace("BASE", str(base)).replace("ADAPTER", str(tmp_path / "adapter"))
    exec(lines.replace("MERGED", str(tmp_path / "merged")), {})
    assert_close(logits(load_model(tmp_path / "merged")), logits(theirs), atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(biased, tmp_path, bias):
    theirs = peft_model(biased, bias=bias)
    add_to("bias")(theirs)
    theirs.save_pretrained(tmp_path)
    message(lambda: load_model(tmp_path, base=biased), "trained biases", "docs/data.md")


@pytest.mark.filterwarnings("ignore")
def test_biases_of_lora_are_refused_unless_they_are_zero(base, tmp_path):
    theirs = peft_model(base, lora_bias=True)
    theirs.save_pretrained(tmp_path)
    message(lambda: load_model(tmp_path, base=base), "biases of LoRA", "lora_bias=False")
    edit_tensors(tmp_path, lambda tensors: {key: tensor * (not key.endswith("bias"))
                                            for key, tensor in tensors.items()})
    check_same(base, tmp_path)


@pytest.mark.parametrize("key, value, how", [
    ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "loftq", "docs/data.md"), ("init_lora_weights", ["eva"], "changes the base's"),
    ("layer_replication", [[0, 2], [1, 2]], "PEFT cannot merge"),
    ("alora_invocation_tokens", [5], "PEFT cannot merge"), ("use_qalora", True, "docs/data.md"),
    ("target_parameters", ["q_proj.weight"], "docs/data.md"), ("kasa_config", {"beta": 1e-4}, "docs/data.md"),
    ("megatron_config", {"a": 1}, "docs/data.md"), ("enable_lora", [True, False, True], "docs/data.md"),
    ("an_option_of_tomorrow", {"x": 1}, "docs/data.md"), ("peft_type", "ADALORA", "docs/data.md")])
def test_other_options_are_refused_by_name_with_the_way_on(adapter, key, value, how):
    edit_config(adapter, **{key: value})
    message(lambda: load_model(adapter), f"adapter_config.json: {key} = {value!r}", how)


@pytest.mark.parametrize("changes, words", [
    ({"layers_to_transform": [0]}, "does not name"), ({"exclude_modules": ["v_proj"]}, "does not name"),
    ({"target_modules": ["q_proj"]}, "does not name"), ({"target_modules": r".*q_proj"}, "does not name"),
    ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "up_proj.lora_A.weight is missing"),
    ({"target_modules": UNSLOTH}, "is missing"), ({"target_modules": "all-linear"}, "is missing"),
    ({"modules_to_save": ["lm_head"]}, "names lm_head.weight"), ({"r": 8}, "rank 8"),
    ({"rank_pattern": {"0.self_attn.q_proj": 2}}, "rank 2")], ids=str)
def test_tensors_and_config_of_different_adapters_are_refused(adapter, changes, words):
    edit_config(adapter, **changes)
    message(lambda: load_model(adapter), str(adapter), words)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", UNSLOTH],
                         ids=["list", "pattern", "unsloth"])
def test_an_adapter_of_a_base_with_fewer_layers_is_refused(base, tmp_path, targets):
    """PEFT only warns, and the added layers stay as they are in the base."""
    peft_model(base, target_modules=targets).save_pretrained(tmp_path / "adapter")
    tiny_llama(std=0.05, num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    message(lambda: load_model(tmp_path / "adapter", base=tmp_path / "deeper"), "model.layers.2.", "--base")


# -------------------------------------------------------------------------------------- shapes
def labels(n):
    return lambda tensors: tensors | {f"{PREFIX}score.weight": torch.ones(n, 32)}


def only_score(shape):
    return lambda tensors: tensors | {f"{PREFIX}score.weight": torch.ones(shape)}


@pytest.mark.parametrize("n", [2, 3, 512])
def test_a_reward_adapter_with_several_labels_is_refused(base, reward_adapter, tmp_path, merge, n):
    edit_tensors(reward_adapter, labels(n))
    copy_tokenizer(base, reward_adapter)
    for read in (load_reward_model, lambda path: merge(path, "--out", tmp_path / "merged")):
        message(lambda read=read: read(reward_adapter), "adapter_model.safetensors", "score.weight",
                f"({n}, 32)", "num_labels=1")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("n", [2, 5])
def test_a_full_reward_folder_with_several_labels_is_refused(base, tmp_path, n):
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=n).save_pretrained(tmp_path)
    message(lambda: load_reward_model(tmp_path), "model.safetensors", "score.weight", f"({n}, 32)",
            "num_labels=1")


@pytest.mark.parametrize("shape", [(32,), (1, 31), (1, 32, 1), (), (0,), (1, 0)], ids=str)
def test_a_score_head_of_another_shape_is_refused(reward_adapter, shape):
    edit_tensors(reward_adapter, only_score(shape))
    message(lambda: load_reward_model(reward_adapter), "score.weight", str(shape), "(1, 32)")


BROKEN = {
    "transposed": lambda a: a.T, "too many columns": lambda a: torch.ones(a.shape[0], a.shape[1] + 1),
    "too few rows": lambda a: a[:-1], "one dimension": lambda a: a.flatten(), "a number": lambda a: a.sum(),
    "three dimensions": lambda a: a[None], "whole numbers": lambda a: a.to(torch.int8),
    "truth values": lambda a: a > 0, "empty": lambda a: a[:0], "nothing at all": lambda a: torch.ones(0)}


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_tensor_of_another_shape_or_kind_is_refused_by_its_name(adapter, part, kind):
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.{part}.weight"
    edit_tensors(adapter, lambda tensors: tensors | {key: BROKEN[kind](tensors[key])})
    line = message(lambda: load_model(adapter), "adapter_model.safetensors", key, "rank 4")
    assert ("ZeRO-3" in line) == (kind in ("empty", "nothing at all"))


@pytest.mark.parametrize("value", [None, 3, "text", [1.0], {}], ids=str)
def test_what_is_no_tensor_in_a_bin_file_is_refused(adapter, value):
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
    torch.save({**tensors, key: value}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    message(lambda: load_model(adapter), "adapter_model.bin", key)


@pytest.mark.parametrize("tensors", [{}, {"x": torch.ones(1)}, {"lora_A.weight": torch.ones(4, 3)}], ids=list)
def test_a_file_without_lora_is_refused(adapter, tensors):
    save_file(tensors, adapter / "adapter_model.safetensors")
    message(lambda: load_model(adapter), "adapter_model.safetensors", "holds no LoRA weights")


def test_the_folder_inside_is_named_where_an_adapters_weights_are(adapter):
    (adapter / "adapter_model").mkdir()
    shutil.copy(adapter / "adapter_config.json", adapter / "adapter_model")
    (adapter / "adapter_model.safetensors").unlink()
    message(lambda: load_model(adapter), "neither adapter_model.safetensors", str(adapter / "adapter_model"))


# -------------------------------------------------------------------------------------- reward models
@pytest.mark.parametrize("options", [
    {"init_lora_weights": "orthogonal"}, {"layers_to_transform": [1]}, {"target_modules": UNSLOTH},
    {"exclude_modules": r".*0.*q_proj"}], ids=str)
def test_pefts_reward_adapters_score_here_as_there(base, tmp_path, options):
    theirs = peft_model(base, AutoModelForSequenceClassification, "SEQ_CLS", **options)
    theirs.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, base=base)
    scores = model(IDS, MASK).detach().gather(1, MASK.sum(1, keepdim=True) - 1)
    assert_close(scores, logits(theirs))


def test_two_roles_read_the_same_foreign_adapter(base, tmp_path):
    peft_model(base, target_modules=UNSLOTH).save_pretrained(tmp_path)
    model = Llama.from_pretrained(base)
    for name in ("ref", "actor"):
        load_adapter(model, tmp_path, name)
    use_adapter(model, "actor")
    assert_close(logits(model), in_peft(base, tmp_path))


def test_a_reward_adapter_on_a_reward_model_reads_the_adapters_head(base, tmp_path):
    first = RewardModel.from_pretrained(base)
    first.save_pretrained(tmp_path / "first")
    theirs = peft_model(tmp_path / "first", AutoModelForSequenceClassification, "SEQ_CLS")
    stir([p for n, p in theirs.named_parameters() if "score.modules_to_save" in n])
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_reward_model(tmp_path / "adapter", base=tmp_path / "first")
    assert differs(model.score.weight, first.score.weight)
    save_adapter(model, tmp_path / "again", "default", tmp_path / "first", "SEQ_CLS")
    assert torch.equal(load_reward_model(tmp_path / "again").score.weight, model.score.weight)
