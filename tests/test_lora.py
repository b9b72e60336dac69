"""LoRA: against its definition, against PEFT in both directions, and what is refused."""
import json
import re
import shutil
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora
from conftest import run_script, tiny_llama
from llama import BadInput, Llama
from lora import (
    LoRALinear,
    adapter_parameters,
    add_lora,
    attach,
    load_adapter,
    load_model,
    lora_layers,
    merge_lora,
    resolve,
    save_adapter,
    save_model,
    trainable,
    use_adapter,
)
from reward import RewardModel, load_reward_model
from runtime.errors import exit_with_one_line
from runtime.tokenizer_write import copy_tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = {"actor": ["q_proj", "k_proj"], "ref": ["q_proj", "k_proj"], "critic": ["v_proj", "down_proj"],
         "reward": LINEARS}
IDS = torch.randint(3, 340, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
IDS = IDS * MASK                             # transformers finds the last token by the pad id, 0


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stir(parameters, std=0.2):
    """Random numbers in place of an adapter's zeros, so that it changes the answers."""
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=std)


def with_adapter(model, rank=4, alpha=8, targets=("q_proj", "v_proj"), name="default", dropout=0.0):
    add_lora(model, rank, alpha, list(targets), dropout, name)
    stir(adapter_parameters(model, name))
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    """Answers of a model of ours, or of transformers or PEFT, to the same ids."""
    return (
        model(ids, torch.ones_like(ids))
        if isinstance(model, (Llama, RewardModel))
        else model(input_ids=ids).logits
    )


def assert_close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def differs(a, b):
    return (a - b).abs().max() > 1e-2


def peft_model(base, auto=AutoModelForCausalLM, task="CAUSAL_LM", **options):
    """PEFT's own adapter on the base folder, with random weights."""
    head = {"num_labels": 1, "pad_token_id": 0} if task == "SEQ_CLS" else {}
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(auto.from_pretrained(base, **head), LoraConfig(task_type=task, **options)).eval()
    stir([p for n, p in model.named_parameters() if ".lora_" in n])
    return model


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def adapter(base, tmp_path):
    """A folder with an adapter that answers otherwise than its base."""
    model = with_adapter(Llama.from_pretrained(base))
    save_adapter(model, tmp_path / "adapter", "default", base, "CAUSAL_LM")
    copy_tokenizer(base, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def reward_adapter(base, tmp_path):
    save_adapter(
        with_adapter(RewardModel.from_pretrained(base)), tmp_path / "reward", "default", base, "SEQ_CLS"
    )
    return tmp_path / "reward"


# -------------------------------------------------------------------------------------- on a model
@pytest.mark.parametrize(
    "rank, alpha, targets", [(1, 1, ["q_proj"]), (4, 16, ["q_proj", "k_proj"]), (6, 4, LINEARS)]
)
def test_forward_equals_pefts(base, rank, alpha, targets):
    ours = with_adapter(Llama.from_pretrained(base), rank, alpha, targets)
    theirs = peft_model(base, r=rank, lora_alpha=alpha, target_modules=targets)
    for path, layer in lora_layers(ours):
        twin = theirs.base_model.model.get_submodule(path)
        for part in ("lora_A", "lora_B"):
            getattr(twin, part)["default"].weight.data.copy_(getattr(layer, part)["default"].weight)
    assert differs(logits(ours), logits(Llama.from_pretrained(base)))
    assert_close(logits(ours), logits(theirs))


def test_an_adapter_starts_as_no_change():
    model = tiny_llama()
    before = logits(model)
    add_lora(model, 4, 16, LINEARS)
    assert torch.equal(logits(model), before)
    # with both factors zero neither would ever get a gradient
    assert all(layer.lora_A["default"].weight.std() > 0 for _, layer in lora_layers(model))


@pytest.mark.parametrize("rank, alpha", [(2, 2), (2, 16), (8, 16), (3, 1.5)])
def test_the_adapter_counts_alpha_over_rank_times(rank, alpha):
    model = with_adapter(tiny_llama(), rank, alpha, ["up_proj"])
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(5, 32)
    A, B = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
    assert A.shape == (rank, 32) and B.shape == (64, rank)
    expected = x.double() @ (layer.weight.double() + alpha / rank * B @ A).T
    assert_close(layer(x).double(), expected)


def test_a_layer_with_a_bias_keeps_it():
    model = tiny_llama(attention_bias=True)
    bias, before = model.model.layers[0].self_attn.q_proj.bias, logits(model)
    add_lora(model, 2, 4, ["q_proj"])
    assert torch.equal(logits(model), before)
    stir(adapter_parameters(model, "default"))
    adapted = logits(model)
    assert differs(adapted, before)
    merge_lora(model, "default")
    assert model.model.layers[0].self_attn.q_proj.bias is bias
    assert_close(logits(model), adapted)


@pytest.mark.parametrize("targets", [["query_key_value"], ["q_proj", "attn.c_attn"], ["proj"]])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(targets):
    with pytest.raises(BadInput, match="--lora-targets.*" + re.escape(targets[-1])) as error:
        add_lora(tiny_llama(), 4, 8, targets)
    assert all(name in str(error.value) for name in [*LINEARS, "lm_head"])


def test_a_refused_target_leaves_the_model_as_it_was():
    model = tiny_llama()
    with pytest.raises(BadInput):
        add_lora(model, 4, 8, ["q_proj", "nothing"])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_only_the_adapter_is_trained():
    model = with_adapter(tiny_llama())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapter_parameters(model, "default")}
    assert len(trained) == 2 * 2 * 2         # layers, targets, A and B
    logits_at = model(IDS, MASK)[MASK]
    logits_at.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_reward_models_score_stays_trained():
    model = with_adapter(RewardModel(tiny_llama().config))
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert others == ["score.weight"]


@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_trainable_is_a_new_adapter_or_all_weights_and_the_score(kind, lora_rank):
    model = tiny_llama() if kind == "language model" else RewardModel(tiny_llama().config)
    weights = dict(model.named_parameters())
    args = Namespace(lora_rank=lora_rank, lora_alpha=6.0, lora_targets=["v_proj"], lora_dropout=0.25)
    found = trainable(model, args)
    score = {"score.weight"} if kind == "reward model" else set()
    if lora_rank == 0:
        assert not lora_layers(model) and {n: id(p) for n, p in found.items()} == {
            n: id(p) for n, p in weights.items()
        }
        return
    layers = dict(lora_layers(model))
    assert set(layers) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert all((layer.active, layer.scale, layer.dropout) == ("default", {"default": 2.0}, {"default": 0.25})
               for layer in layers.values())
    adapter = {f"{path}.lora_{part}.default.weight": layer for path, layer in layers.items() for part in "AB"}
    assert set(found) == set(adapter) | score
    assert all(found[name] is model.get_parameter(name) and found[name].requires_grad for name in found)
    assert {found[name].shape for name in adapter} == {(3, 32), (16, 3)}


def test_trainable_goes_on_with_the_adapter_of_a_folder(adapter, reward_adapter):
    args = Namespace(lora_rank=0)
    model = load_model(adapter)
    assert {id(p) for p in trainable(model, args).values()} == {
        id(p) for p in adapter_parameters(model, "default")
    }
    model = load_reward_model(reward_adapter)
    parts = [*adapter_parameters(model, "default"), model.score.weight]
    assert {id(p) for p in trainable(model, args).values()} == set(map(id, parts))


def test_dropout_acts_in_train_mode_only():
    model = with_adapter(tiny_llama(), dropout=0.5)
    still = logits(model.eval())
    assert torch.equal(logits(model), still)
    model.train()
    assert differs(logits(model), still) and differs(logits(model), logits(model))
    use_adapter(model, None)                 # the base's own inputs are never dropped
    assert torch.equal(logits(model), logits(model.eval()))


def test_dropout_keeps_the_mean():
    layer = with_adapter(tiny_llama(), targets=["up_proj"], dropout=0.5).model.layers[0].mlp.up_proj
    x = torch.randn(1, 32)
    assert_close(layer.train()(x.expand(20000, 32)).mean(0), layer.eval()(x)[0], atol=0.2)


# -------------------------------------------------------------------------------------- several adapters
def four_roles():
    model = tiny_llama(std=0.1)
    for name, targets in ROLES.items():
        with_adapter(model, targets=targets, name=name)
    return model


def alone(shared, name):
    """The network of one role by itself: an own base, and this one adapter."""
    model = with_adapter(tiny_llama(std=0.1), targets=ROLES[name])
    for mine, its in zip(adapter_parameters(model, "default"), adapter_parameters(shared, name), strict=True):
        mine.data.copy_(its)
    return model


def test_use_adapter_switches_between_names_and_the_base():
    model, plain = four_roles(), tiny_llama(std=0.1)
    answers = {name: logits(alone(model, name)) for name in ROLES} | {None: logits(plain)}
    names = list(answers)
    assert all(differs(answers[a], answers[b]) for a in names for b in names if a != b)
    for name in ["critic", None, "actor", "reward", "ref", "actor", None]:
        use_adapter(model, name)
        assert torch.equal(logits(model), answers[name])


def test_add_lora_switches_the_new_adapter_on():
    model = with_adapter(tiny_llama(), name="first")
    first = logits(model)
    add_lora(model, 2, 4, ["q_proj"], name="second")
    assert torch.equal(logits(model), logits(tiny_llama()))        # the second is still no change
    use_adapter(model, "first")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("model", [tiny_llama, four_roles])
def test_an_unknown_adapter_is_refused(model):
    with pytest.raises(ValueError, match="'nobody'"):
        use_adapter(model(), "nobody")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_base_with_four_adapters_has_the_gradients_of_four_networks(checkpointing):
    shared = four_roles()
    shared.model.checkpointing = checkpointing
    labels = IDS.roll(-1, 1)
    expected = {}
    for name in ROLES:
        network = alone(shared, name)
        for model in (shared, network):
            if model is shared:
                use_adapter(shared, name)
            F.cross_entropy(model(IDS, MASK)[MASK], labels[MASK]).backward()
        expected[name] = [p.grad for p in adapter_parameters(network, "default")]
    for name in ROLES:                       # after all four: none has added to another's
        for parameter, gradient in zip(adapter_parameters(shared, name), expected[name], strict=True):
            assert gradient.abs().max() > 1e-4
            assert_close(parameter.grad, gradient, atol=1e-6)
    assert all(p.grad is None for n, p in shared.named_parameters() if ".lora_" not in n)


def test_adapters_hold_no_second_copy_of_the_base():
    model = tiny_llama()
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    for name in ROLES:
        add_lora(model, 2, 4, ROLES[name], name=name)
    assert {n: p.data_ptr() for n, p in model.named_parameters() if ".lora_" not in n} == weights


# -------------------------------------------------------------------------------------- merging
@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_the_merged_model_answers_as_the_adapter_did(config, tmp_path):
    model = with_adapter(tiny_llama(std=0.1, **config), targets=LINEARS)
    names, before = set(tiny_llama(**config).state_dict()), logits(model)
    merged = merge_lora(model, "default")
    assert differs(before, logits(tiny_llama(std=0.1, **config)))
    assert_close(logits(merged), before)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules()) and set(merged.state_dict()) == names
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(Llama.from_pretrained(tmp_path)), logits(merged))


def test_merging_one_of_several_takes_that_one():
    model = four_roles()
    use_adapter(model, "critic")
    critic = logits(model)
    use_adapter(model, "actor")              # what is in use does not matter
    merge_lora(model, "critic")
    assert_close(logits(model), critic)
    assert not lora_layers(model)


def test_merging_keeps_a_tied_head_tied():
    model = merge_lora(with_adapter(tiny_llama(tie_word_embeddings=True)), "default")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_on_a_tied_head_is_refused(base, tmp_path):
    """Merging it would change the embedding too."""
    tied = {"tie_word_embeddings": True}
    with pytest.raises(BadInput, match="lm_head"):
        add_lora(tiny_llama(**tied), 4, 8, ["lm_head"])
    untied = with_adapter(Llama.from_pretrained(base), targets=["lm_head"])
    save_adapter(untied, tmp_path / "adapter", "default", base, "CAUSAL_LM")
    tiny_llama(**tied).save_pretrained(tmp_path / "tied")
    with pytest.raises(BadInput, match="lm_head"):
        load_model(tmp_path / "adapter", base=tmp_path / "tied")


@pytest.mark.parametrize("std", [0.3, 3e-4])
def test_a_merge_into_bfloat16_rounds_once(std):
    model = tiny_llama().bfloat16()
    add_lora(model, 4, 8, LINEARS)
    stir(adapter_parameters(model, "default"), std ** 0.5)
    exact = {}
    for path, layer in lora_layers(model):
        A, B = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
        exact[path] = layer.weight.double() + 2 * B @ A
    merge_lora(model, "default")
    for path, target in exact.items():
        weight = model.get_submodule(path).weight
        half_a_unit = 2 ** (target.abs().log2().floor() - 8)       # bfloat16 has 8 bits
        assert weight.dtype == torch.bfloat16
        assert ((weight.double() - target).abs() <= half_a_unit * 1.001 + 1e-7).all()


# -------------------------------------------------------------------------------------- our files in PEFT
@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], LINEARS, ["layers.1.self_attn.q_proj"],
                                     ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
                                     ["k_proj", "1.mlp.up_proj"]])
def test_peft_reads_what_save_adapter_writes(base, tmp_path, targets):
    model = with_adapter(Llama.from_pretrained(base), 3, 10, targets)
    save_adapter(model, tmp_path, "default", base, "CAUSAL_LM")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert differs(logits(model), logits(Llama.from_pretrained(base)))
    assert_close(logits(theirs), logits(model))


def test_peft_reads_the_adapter_of_a_reward_model_with_its_head(base, tmp_path):
    model = with_adapter(RewardModel.from_pretrained(base))
    save_adapter(model, tmp_path, "default", base, "SEQ_CLS")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.score.weight"], model.score.weight)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    scores = model(IDS, MASK).detach().gather(1, MASK.sum(1, keepdim=True) - 1)
    assert_close(logits(theirs), scores)


def test_one_of_several_adapters_is_saved_alone(base, tmp_path):
    model = Llama.from_pretrained(base)
    for name, targets in ROLES.items():
        with_adapter(model, targets=targets, name=name)
    use_adapter(model, "critic")
    save_adapter(model, tmp_path, "critic", base, "CAUSAL_LM")
    again = load_model(tmp_path)
    assert {p.rpartition(".")[2] for p, _ in lora_layers(again)} == set(ROLES["critic"])
    assert torch.equal(logits(again), logits(model))


# -------------------------------------------------------------------------------------- round trips here
def uneven(config):
    """A model whose adapter has another rank and another alpha at every layer, and is missing at some."""
    model = tiny_llama(std=0.05, **config)
    paths = [n for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "up_proj"))]
    for i, path in enumerate(paths):
        if i % 7 != 3:
            attach(model, path, "default", rank=1 + i % 5, scale=(1 + i % 3) / (1 + i % 5), dropout=0.0)
    stir(adapter_parameters(model, "default"))
    use_adapter(model, "default")
    return model


@pytest.mark.parametrize("layers", [2, 12])  # 12: layer 1 and layer 11 must not be confused
def test_uneven_ranks_and_alphas_survive_save_and_load(tmp_path, layers):
    config = {"num_hidden_layers": layers}
    model = uneven(config)
    tiny_llama(std=0.05, **config).save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", "default", tmp_path / "base", "CAUSAL_LM")
    again = load_model(tmp_path / "adapter")
    assert [p for p, _ in lora_layers(again)] == [p for p, _ in lora_layers(model)]
    for (_, old), (_, new) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(old.lora_A["default"].weight, new.lora_A["default"].weight)
        assert torch.equal(old.lora_B["default"].weight, new.lora_B["default"].weight)
        assert new.scale["default"] == pytest.approx(old.scale["default"], rel=1e-12)
    assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert_close(logits(theirs), logits(model))


@pytest.mark.parametrize("rank, alpha, targets", [
    (1, 16, ["q_proj"]), (3, 10, LINEARS), (7, 0.3, ["q_proj", "lm_head"]),
    (4, 8, ["layers.1.self_attn.q_proj", "0.mlp.down_proj"])])
def test_an_adapter_is_the_same_after_save_and_load(base, tmp_path, rank, alpha, targets):
    model = with_adapter(Llama.from_pretrained(base), rank, alpha, targets, dropout=0.25)
    save_adapter(model, tmp_path, "default", base, "CAUSAL_LM")
    again = load_model(tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    for (path, _), (twin, new) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert path == twin and new.dropout == {"default": 0.25}
    trained = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)         # a loaded adapter is trained further


def test_a_bfloat16_adapter_is_the_same_after_save_and_load(base, tmp_path):
    model = with_adapter(Llama.from_pretrained(base, torch.bfloat16))
    save_adapter(model, tmp_path, "default", base, "CAUSAL_LM")
    again = load_model(tmp_path, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in again.parameters())
    assert torch.equal(logits(again), logits(model))


def test_loading_a_second_adapter_leaves_the_one_in_use(base, adapter):
    model = with_adapter(Llama.from_pretrained(base), name="actor")
    before = logits(model)
    load_adapter(model, adapter, "ref")
    assert torch.equal(logits(model), before)
    use_adapter(model, "ref")
    assert torch.equal(logits(model), logits(load_model(adapter)))
    assert differs(logits(model), before)


@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("name", [None, "critic"])
def test_save_model_writes_a_folder_that_loads(base, tmp_path, kind, name):
    is_reward = kind == "reward model"
    model = (RewardModel if is_reward else Llama).from_pretrained(base)
    model.config.eos_token_id = 7            # the tokenizer's, where config.json has another
    if name:
        with_adapter(model, name=name)
    save_model(model, tmp_path / "out", base, base, name)
    loaded = (load_reward_model if is_reward else load_model)(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    files = {file.name for file in (tmp_path / "out").iterdir()}
    weights = (
        {"adapter_config.json", "adapter_model.safetensors"} if name else {"config.json", "model.safetensors"}
    )
    assert files == weights | {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} | (
        set() if is_reward else {"generation_config.json"})
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    if name:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["task_type"] == ("SEQ_CLS" if is_reward else "CAUSAL_LM")
        assert config["base_model_name_or_path"] == str(base.resolve())
    if not is_reward:
        ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert ids == {"bos_token_id": 1, "eos_token_id": 7}


# -------------------------------------------------------------------------------------- PEFT's files here
MIXED = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
         "alpha_pattern": {"up_proj": 3, "0.self_attn.q_proj": 5}}
FOREIGN = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "model.layers.1.self_attn.v_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32, "layers.0.self_attn.q_proj": 1}},
    "anchored pattern": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}},
    "patterns that match no whole end of a path": {"rank_pattern": {"proj": 3, "layers.1": 2}},
    "both patterns": {"target_modules": LINEARS, **MIXED},
    "rslora": {"use_rslora": True},
    "rslora and both patterns": {"use_rslora": True, "target_modules": LINEARS, **MIXED},
    "regular expression, for whole paths": {"target_modules": r".*\.layers\.1\..*\.(q|up)_proj|gate_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.1},
}


def check_foreign(base, theirs, folder):
    """The adapter in folder answers here as in PEFT, and still does when it was written again from here."""
    model = load_model(folder, base=base).eval()
    assert differs(logits(model), logits(Llama.from_pretrained(base)))
    assert_close(logits(model), logits(theirs))
    save_adapter(model, folder / "again", "default", base, "CAUSAL_LM")
    assert torch.equal(logits(load_model(folder / "again").eval()), logits(model))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "again").eval()
    assert_close(logits(again), logits(theirs))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("kind", FOREIGN)
def test_pefts_adapters_answer_here_as_there(base, tmp_path, kind):
    theirs = peft_model(base, **FOREIGN[kind])
    theirs.save_pretrained(tmp_path)
    check_foreign(base, theirs, tmp_path)


def test_all_linear_as_a_word_means_all_but_the_head(base, tmp_path):
    theirs = peft_model(base, target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules="all-linear")             # PEFT itself writes the names
    check_foreign(base, theirs, tmp_path)


def test_an_adapter_in_a_bin_file_loads(base, tmp_path):
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    check_foreign(base, theirs, tmp_path)


def test_an_adapter_on_the_head_loads(base, tmp_path):
    theirs = peft_model(base, target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    check_foreign(base, theirs, tmp_path)


def test_an_adapter_that_brings_weights_of_the_base_is_refused_by_their_name(base, tmp_path):
    peft_model(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.base_layer.weight": torch.ones(352, 32)}, file)
    with pytest.raises(BadInput, match="lm_head.base_layer.weight"):
        load_model(tmp_path, base=base)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["score"]}, {"target_modules": "all-linear"}])
def test_pefts_reward_adapter_scores_here_as_there(base, tmp_path, options):
    theirs = peft_model(base, AutoModelForSequenceClassification, "SEQ_CLS", **options)
    theirs.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, base=base)
    scores = model(IDS, MASK).detach().gather(1, MASK.sum(1, keepdim=True) - 1)
    assert_close(scores, logits(theirs))


# -------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "changes",
    [
        {"r": "8"},
        {"r": None},
        {"r": 0},
        {"lora_alpha": "x"},
        {"target_modules": None},
        {"target_modules": "("},
        {"target_modules": [7]},
        {"target_modules": "nothing"},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": ["q_proj"]},
        {"lora_dropout": "x"},
        {"rank_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {"q_proj": "4"}},
        {"modules_to_save": "score"},
        {"lora_alpha": 10**400},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(adapter, changes):
    edit_config(adapter, **changes)
    with pytest.raises(BadInput):
        load_model(adapter)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_config_that_is_no_json_object_is_refused(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        load_model(adapter)


@pytest.mark.parametrize("other", [{"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3},
                                   {"num_key_value_heads": 4}])
def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, other):
    tiny_llama(**other).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="adapter_model.safetensors"):
        load_model(adapter, base=tmp_path / "other")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("share", [0, 0.002, 0.5, 0.99])
def test_a_truncated_adapter_file_is_refused(base, tmp_path, safe, share):
    peft_model(base).save_pretrained(tmp_path, safe_serialization=safe)
    file = tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(BadInput, match=file.name):
        load_model(tmp_path, base=base)


def drop(tensors):
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]


def add(tensors):
    tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"] = torch.ones(32, 4)


def shorten(tensors):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors[key][:3].clone()


@pytest.mark.parametrize("change, layer", [(drop, "1.self_attn.q_proj"), (add, "o_proj"),
                                           (shorten, "1.self_attn.q_proj")])
def test_tensors_missing_too_many_or_of_another_shape_are_refused(adapter, change, layer):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(BadInput, match=rf"adapter_model\.safetensors.*{layer}"):
        load_model(adapter)


def test_a_folder_without_the_adapters_weights_is_refused(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"adapter_model\."):
        load_model(adapter)


def test_a_reward_adapters_head_is_read_whatever_its_config_says_of_it(reward_adapter):
    edit_config(reward_adapter, modules_to_save=None)
    head = load_file(reward_adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_reward_model(reward_adapter).score.weight, head)


@pytest.mark.parametrize("modules_to_save", [["score"], None])
def test_a_reward_adapter_without_its_head_is_refused(reward_adapter, modules_to_save):
    """Its base is a language model, so its scores would be those of a random head."""
    tensors = load_file(reward_adapter / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    save_file(tensors, reward_adapter / "adapter_model.safetensors")
    edit_config(reward_adapter, modules_to_save=modules_to_save)
    with pytest.raises(BadInput):
        load_reward_model(reward_adapter)


# -------------------------------------------------------------------------------------- any folder
def test_load_model_reads_a_full_folder(base):
    model = load_model(base)
    assert not lora_layers(model) and torch.equal(logits(model), logits(Llama.from_pretrained(base)))


def test_load_model_finds_the_base_at_its_absolute_path(base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base.resolve()
    )
    model = load_model("adapter")
    assert {layer.active for _, layer in lora_layers(model)} == {"default"}
    assert differs(logits(model), logits(load_model(base)))


@pytest.mark.parametrize("named", ["../base", "base"])
def test_load_model_finds_the_base_relative_to_the_adapters_folder(adapter, tmp_path, named):
    expected = logits(load_model(adapter))
    tiny_llama(std=0.05).save_pretrained(adapter / named)          # the same as the fixture's
    edit_config(adapter, base_model_name_or_path=named)
    assert torch.equal(logits(load_model(adapter)), expected)


def test_load_model_finds_the_base_relative_to_the_working_folder(adapter, tmp_path, monkeypatch):
    expected = logits(load_model(adapter))
    tiny_llama(std=0.05).save_pretrained(tmp_path / "work" / "models" / "base")
    edit_config(adapter, base_model_name_or_path="models/base")
    monkeypatch.chdir(tmp_path / "work")
    assert torch.equal(logits(load_model(adapter)), expected)


def test_base_overrides_the_configs(adapter, tmp_path):
    other = tiny_llama(seed=5, std=0.05)
    other.save_pretrained(tmp_path / "other")
    load_adapter(other, adapter, "x")
    use_adapter(other, "x")
    assert torch.equal(logits(load_model(adapter, base=tmp_path / "other")), logits(other))
    assert differs(logits(other), logits(load_model(adapter)))


@pytest.mark.parametrize("named", ["meta-llama/Llama-2-7b-hf", "/nowhere/base", None, ""])
def test_a_missing_base_is_refused_and_the_flag_named(adapter, named):
    edit_config(adapter, base_model_name_or_path=named)
    with pytest.raises(BadInput, match="--base"):
        load_model(adapter)


def test_a_base_given_that_is_not_there_is_refused(adapter, tmp_path):
    with pytest.raises(BadInput, match="--base"):
        load_model(adapter, base=tmp_path / "nowhere")


def test_a_base_given_for_a_full_folder_is_refused(base, adapter):
    assert resolve(base) == (base.resolve(), None) and resolve(adapter, base) == (base.resolve(), adapter)
    message = f"^--base .*: {re.escape(str(base))} is a full folder, which has no base"
    for read in (resolve, load_reward_model, lambda path, base: load_model(path, base=base)):
        with pytest.raises(BadInput, match=message):
            read(base, base=base)


def test_no_folder_at_all_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        load_model(tmp_path / "nowhere")


def test_the_llama_class_refuses_an_adapter_and_names_load_model(adapter):
    with pytest.raises(BadInput, match="lora.load_model"):
        Llama.from_pretrained(adapter)


def test_load_model_refuses_a_reward_models_adapter(reward_adapter):
    with pytest.raises(BadInput, match="reward model"):
        load_model(reward_adapter)


# -------------------------------------------------------------------------------------- python lora.py
def test_lora_py_merges_into_a_folder_that_transformers_loads(adapter, tmp_path):
    result = run_script("lora.py", adapter, "--out", tmp_path / "merged")
    assert result.returncode == 0 and str(tmp_path / "merged") in result.stdout, result.stderr
    expected = logits(load_model(adapter))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.dtype == torch.float32
    assert_close(logits(theirs), expected, atol=1e-4)
    assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-4)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (adapter / name).read_bytes()
    ids = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def merge(monkeypatch):
    """lora.py's main with these arguments, without a new process."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, args)])
        lora.main()
    return call


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["language model", "reward model"])
def test_lora_py_merges_a_reward_models_adapter(base, tmp_path, merge, kind, tied):
    """Whichever kind of model it stands on: reward.py starts from both."""
    start = tmp_path / "start"
    tiny_llama(std=0.05, tie_word_embeddings=tied).save_pretrained(start)
    if kind == "reward model":
        RewardModel.from_pretrained(start).save_pretrained(tmp_path / "first")
        start = tmp_path / "first"
    copy_tokenizer(base, start)
    model = with_adapter(RewardModel.from_pretrained(start))
    save_adapter(model, tmp_path / "reward", "default", start, "SEQ_CLS")
    (tmp_path / "reward" / "reward_stats.json").write_text('{"mean": 1.5}\n')
    merge(tmp_path / "reward", "--out", tmp_path / "merged")
    scores = model(IDS, MASK).detach()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_close(logits(theirs), scores.gather(1, MASK.sum(1, keepdim=True) - 1), atol=1e-4)
    assert_close(
        RewardModel.from_pretrained(tmp_path / "merged")(IDS, MASK).detach()[MASK], scores[MASK], atol=1e-4
    )
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert json.loads((tmp_path / "merged" / "reward_stats.json").read_text()) == {"mean": 1.5}


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
                                     {"max_position_embeddings": None, "max_sequence_length": 512},
                                     {"quantization_config": {"bits": 4}, "pretraining_tp": 1}], ids=str)
@pytest.mark.parametrize("kind", ["language model", "reward model"])
def test_lora_py_writes_the_config_that_the_trainers_write(base, tmp_path, merge, kind, changes):
    """For the same base: merging an adapter, and training all weights."""
    start = shutil.copytree(base, tmp_path / "start")
    raw = json.loads((start / "config.json").read_text()) | changes
    (start / "config.json").write_text(json.dumps({key: x for key, x in raw.items() if x is not None}))
    model_class, load, task = ((Llama, load_model, "CAUSAL_LM") if kind == "language model" else
                               (RewardModel, load_reward_model, "SEQ_CLS"))
    save_model(model_class.from_pretrained(start), tmp_path / "trained", start, start)
    save_adapter(with_adapter(load(start)), tmp_path / "adapter", "default", start, task)
    merge(tmp_path / "adapter", "--out", tmp_path / "merged")
    files = {name: {file.name for file in (tmp_path / name).iterdir()} for name in ("trained", "merged")}
    assert files["trained"] == files["merged"] >= {"config.json", "model.safetensors", "tokenizer.model"}
    for name in files["trained"] - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes(), name


def test_lora_py_writes_the_ids_of_the_tokenizer_where_the_config_has_others(base, tmp_path, merge):
    start = shutil.copytree(base, tmp_path / "start")
    raw = json.loads((start / "config.json").read_text()) | {"bos_token_id": 5, "eos_token_id": 7}
    (start / "config.json").write_text(json.dumps(raw))
    save_adapter(with_adapter(load_model(start)), tmp_path / "adapter", "default", start, "CAUSAL_LM")
    merge(tmp_path / "adapter", "--out", tmp_path / "merged")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "merged" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)


def test_lora_py_takes_the_base_by_flag(base, adapter, tmp_path, merge):
    expected = logits(load_model(adapter))
    edit_config(adapter, base_model_name_or_path="gone")
    with pytest.raises(BadInput, match="--base"):
        merge(adapter, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(adapter, "--base", base, "--out", tmp_path / "merged")
    assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-4)


def test_lora_py_refuses_a_full_folder_in_one_line_and_writes_nothing(base, tmp_path):
    result = run_script("lora.py", base, "--out", tmp_path / "merged")
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and str(base) in result.stderr
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("error, status, line", [
    (None, None, ""), (KeyboardInterrupt(), 130, ""), (BadInput("a.json: is\nnot \x1b[1mJSON"), 2,
                                                       "error: a.json: is not [1mJSON\n")])
def test_a_program_ends_with_one_line_and_its_status(error, status, line, capsys):
    def main():
        if error:
            raise error
    if status is None:
        exit_with_one_line(main)
    else:
        with pytest.raises(SystemExit) as caught:
            exit_with_one_line(main)
        assert caught.value.code == status
    assert capsys.readouterr() == ("", line)


def test_an_error_of_the_program_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_with_one_line(lambda: 1 / 0)


def test_all_linear_as_a_target_means_every_linear_but_the_head():
    model = tiny_llama()
    add_lora(model, 2, 4, ["all-linear"])
    ends = {path.rpartition(".")[2] for path, _ in lora_layers(model)}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(lora_layers(model)) == 7 * model.config.num_hidden_layers
