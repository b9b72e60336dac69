"""The reward model: where a score is read, the losses against their definitions, folders, evaluation."""
import json
import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

import reward
from conftest import tiny_config, tiny_llama
from data import collate_pairs, pad, stream
from llama import Llama
from lora import adapter_parameters, add_lora, lora_layers, save_adapter, use_adapter
from reward import RewardModel, batch_loss, evaluate, last_scores, load_reward_model, pairwise_loss
from runtime.errors import BadInput
from runtime.tokenizer_write import copy_tokenizer
from training import on_ranks, spy, train

KINDS = pytest.mark.parametrize("kind", ["last", "dense"])


def tiny_reward(seed=0, **changes):
    """A random reward model, with weights large enough for scores that differ."""
    model = RewardModel(tiny_config(**changes), tiny_llama(seed, std=0.1, **changes).model)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model.eval()


def made_up_pairs(count=6, seed=0, low=3):
    """[(chosen_ids, rejected_ids, n_prompt)] of all lengths, some answers beginning alike, all ending with
    EOS."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        prompt, alike, chosen, rejected = (
            [rng.randrange(low, 340) for _ in range(n)]
            for n in (rng.randint(1, 6), i % 3, rng.randint(1, 7), rng.randint(1, 7)))
        rejected[0] = chosen[0] % 300 + 4    # and not the same
        chosen_ids, rejected_ids = ([1, *prompt, *alike, *answer, 2] for answer in (chosen, rejected))
        rows.append((chosen_ids, rejected_ids, 1 + len(prompt)))
    return rows


def alone(model, ids):
    """Scores of one text by itself, without a batch and without padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]


# ------------------------------------------------------------------------------------------------ scores
def test_there_is_one_score_per_token():
    ids, mask = pad([[1, 5, 6], [1, 7, 8, 9, 2]])
    scores = tiny_reward()(ids, mask)
    assert scores.shape == (2, 5) and scores.dtype == torch.float32


@pytest.mark.parametrize("left", [False, True])
def test_last_scores_are_those_of_the_last_real_tokens(left):
    lengths = [1, 4, 6, 2]
    _, mask = pad([[5] * n for n in lengths], left)
    scores = torch.arange(24.0).view(4, 6)
    expected = [row[5 if left else n - 1] for row, n in zip(scores.tolist(), lengths, strict=True)]
    assert last_scores(scores, mask).tolist() == expected
    assert last_scores(scores, mask.long()).tolist() == expected


@pytest.mark.parametrize("left", [False, True])
def test_a_text_scores_the_same_alone_and_padded(left):
    model, rows = tiny_reward(), [[1, 5, 6], [1, 7, 8, 9, 10, 2], [1, 2]]
    ids, mask = pad(rows, left)
    with torch.no_grad():
        scores = last_scores(model(ids, mask), mask)
    expected = torch.stack([alone(model, row)[-1] for row in rows])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [[1, 0, 5, 6, 2], [1, 5, 0, 0, 2], [1, 5, 6, 7, 0], [0, 0, 0]])
@pytest.mark.parametrize("left", [False, True])
def test_a_genuine_unk_changes_nothing_about_where_the_score_is_read(text, left):
    model = tiny_reward()
    ids, mask = pad([text, [1, 9, 8, 7, 6, 5, 4, 2]], left)
    columns = torch.arange(8.0).expand(2, 8)
    assert last_scores(columns, mask).tolist() == [7.0 if left else len(text) - 1.0, 7.0]
    with torch.no_grad():
        score = last_scores(model(ids, mask), mask)[0]
    assert score == pytest.approx(float(alone(model, text)[-1]), abs=1e-5)


def test_the_score_is_taken_in_float32_whatever_the_networks_dtype():
    model = tiny_reward().bfloat16()
    ids, mask = pad([row for pair in made_up_pairs() for row in pair[:2]])
    with torch.no_grad():
        scores, hidden = model(ids, mask), model.model(ids, mask)
    assert model.score.weight.dtype == hidden.dtype == torch.bfloat16 and scores.dtype == torch.float32
    expected = (hidden.double() * model.score.weight.double()[0]).sum(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
    assert (scores != scores.bfloat16()).float().mean() > 0.5      # in bfloat16 most of them would be others


# ------------------------------------------------------------------------------------------------ losses
@pytest.mark.parametrize("shape", [(1,), (4,), (4, 3)])
@pytest.mark.parametrize("score", [0.0, -3.5, 1e4])
def test_ties_cost_log_two(shape, score):
    scores = torch.full(shape, score)
    assert pairwise_loss(scores, scores).item() == pytest.approx(math.log(2), rel=1e-6)


def test_pairwise_loss_equals_its_definition():
    torch.manual_seed(0)
    chosen, rejected = 3 * torch.randn(50), 3 * torch.randn(50)
    pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
    expected = sum(-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in pairs) / 50
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)
    assert pairwise_loss(chosen, rejected, total=7).item() == pytest.approx(expected * 50 / 7, rel=1e-6)


@pytest.mark.parametrize("total", [None, 3])
def test_pairwise_loss_over_a_mask_is_the_mean_of_each_pairs_mean(total):
    torch.manual_seed(0)
    chosen, rejected, mask = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5) < 0.6
    mask[:, 2] = True
    losses = (1 + (rejected - chosen).double().exp()).log()
    per_pair = [float(losses[i, mask[i]].mean()) for i in range(4)]
    expected = pytest.approx(sum(per_pair) / (total or 4), rel=1e-6)
    assert pairwise_loss(chosen, rejected, mask, total).item() == expected


@pytest.mark.parametrize("difference, loss, slope", [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_pairwise_loss_is_stable_far_out(difference, loss, slope):
    chosen = torch.tensor([difference], requires_grad=True)
    value = pairwise_loss(chosen, torch.zeros(1))
    value.backward()
    assert (value.item(), chosen.grad.item()) == (loss, slope)


def test_half_precision_scores_lose_nothing_in_the_loss():
    chosen, rejected = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0078125, 1.5]).bfloat16()
    assert pairwise_loss(chosen, rejected) == pairwise_loss(chosen.float(), rejected.float())
    assert pairwise_loss(chosen, rejected).dtype == torch.float32


def test_the_losses_never_write_into_their_arguments():
    ids, mask, starts = collate_pairs(made_up_pairs())
    scores = torch.randn(ids.shape)
    before = scores.clone(), mask.clone(), starts.clone()
    for kind in ("last", "dense"):
        batch_loss(scores, mask, starts, kind, 6)
    assert all(map(torch.equal, (scores, mask, starts), before))


def slow_dense_loss(pairs):
    """The definition, pair by pair and token by token: [(chosen scores, rejected scores, first
    difference)]."""
    means = []
    for chosen, rejected, start in pairs:
        terms = []
        for t in range(start, max(len(chosen), len(rejected))):
            c = chosen[t] if t < len(chosen) else chosen[-1]
            r = rejected[t] if t < len(rejected) else rejected[-1]
            terms.append(math.log1p(math.exp(-(c - r))))
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


PREFIX = [([1, 5, 6, 2], [1, 5, 6, 7, 8, 2], 2), ([1, 5, 6, 7, 2], [1, 5, 2], 2), ([1, 9, 2], [1, 8, 2], 1)]


@pytest.mark.parametrize("rows", [made_up_pairs(), made_up_pairs(1), made_up_pairs(9, seed=1, low=0), PREFIX],
                         ids=["mixed", "one", "with <unk>", "one the beginning of the other"])
def test_dense_loss_equals_a_slow_loop_over_its_definition(rows):
    ids, mask, starts = collate_pairs(rows)
    torch.manual_seed(0)
    scores = 2 * torch.randn(ids.shape)
    texts = [row[real].tolist() for row, real in zip(scores, mask, strict=True)]
    firsts = [[a != b for a, b in zip(*pair[:2], strict=False)].index(True) for pair in rows]
    expected = slow_dense_loss(list(zip(texts[:len(rows)], texts[len(rows):], firsts, strict=True)))
    assert batch_loss(scores, mask, starts, "dense", len(rows)).item() == pytest.approx(expected, rel=1e-6)


def test_last_loss_compares_the_last_scores_alone():
    rows, model = made_up_pairs(), tiny_reward()
    ids, mask, starts = collate_pairs(rows)
    expected = sum(math.log1p(math.exp(float(alone(model, rejected)[-1] - alone(model, chosen)[-1])))
                   for chosen, rejected, _ in rows) / len(rows)
    with torch.no_grad():
        loss = batch_loss(model(ids, mask), mask, starts, "last", len(rows))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@KINDS
def test_each_pair_weighs_alike_in_a_batch(kind):
    """The sum over batches of one, over the total, is the loss of the whole batch: 1 x 8 is 8 x 1."""
    rows, model = made_up_pairs(), tiny_reward()

    def loss(rows):
        ids, mask, starts = collate_pairs(rows)
        with torch.no_grad():
            return batch_loss(model(ids, mask), mask, starts, kind, 6).item()

    assert sum(loss([row]) for row in rows) == pytest.approx(loss(rows), rel=1e-5)


@KINDS
def test_garbage_in_the_padding_changes_neither_loss_nor_gradient(kind):
    ids, mask, starts = collate_pairs(made_up_pairs())
    torch.manual_seed(0)
    garbage = torch.where(mask, ids, torch.randint(0, 352, ids.shape))
    assert (garbage != ids).sum() > 10
    results = []
    for batch in (ids, garbage):
        model = tiny_reward()
        loss = batch_loss(model(batch, mask), mask, starts, kind, 6)
        loss.backward()
        deepest = model.model.layers[0].self_attn.q_proj.weight
        results.append((loss.detach(), model.score.weight.grad, deepest.grad))
    assert all(map(torch.equal, *results))


@KINDS
@pytest.mark.parametrize("extra", [1, 9])
def test_more_padding_changes_no_loss(kind, extra):
    ids, mask, starts = collate_pairs(made_up_pairs())
    model = tiny_reward()
    with torch.no_grad():
        narrow = batch_loss(model(ids, mask), mask, starts, kind, 6)
        ids, mask = F.pad(ids, (0, extra), value=7), F.pad(mask, (0, extra))
        wide = batch_loss(model(ids, mask), mask, starts, kind, 6)
    assert wide.item() == pytest.approx(narrow.item(), rel=1e-5)


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_finite_and_reach_all_that_is_trained(kind, checkpointing, lora):
    model = tiny_reward()
    model.model.checkpointing = checkpointing
    if lora:
        add_lora(model, 2, 4, ["q_proj", "k_proj"])
        for parameter in adapter_parameters(model, "default"):
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask, starts = collate_pairs(made_up_pairs())
    batch_loss(1e3 * model(ids, mask), mask, starts, kind, 6).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (9 if lora else len(list(model.parameters()))) and "score.weight" in trained
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained.values())


def test_only_the_last_real_tokens_score_gets_a_gradient_from_the_last_loss():
    ids, mask, starts = collate_pairs(made_up_pairs())
    scores = torch.randn(ids.shape, requires_grad=True)
    batch_loss(scores, mask, starts, "last", 6).backward()
    assert torch.equal(scores.grad != 0, torch.arange(ids.shape[1]) == mask.sum(1, keepdim=True) - 1)


def test_no_token_before_the_difference_or_in_the_padding_gets_a_gradient_from_the_dense_loss():
    ids, mask, starts = collate_pairs(made_up_pairs())
    scores = torch.randn(ids.shape, requires_grad=True)
    batch_loss(scores, mask, starts, "dense", 6).backward()
    assert torch.equal(scores.grad != 0, mask & (torch.arange(ids.shape[1]) >= starts.repeat(2)[:, None]))


# ------------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True},
                                     {"num_key_value_heads": 4, "attention_bias": True}])
def test_transformers_reads_the_folder_with_equal_scores(tmp_path, changes):
    model = tiny_reward(**changes)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.pad_token_id) == (1, 0)
    assert config.architectures == ["LlamaForSequenceClassification"]
    ids, mask = pad([row for pair in made_up_pairs() for row in pair[:2]])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        scores = last_scores(model(ids, mask), mask)
        logits = theirs(input_ids=ids, attention_mask=mask.long()).logits
    assert logits.shape == (12, 1) and scores.std() > 0.1
    torch.testing.assert_close(logits[:, 0], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_folder_is_the_same_after_save_and_load(tmp_path, dtype):
    model = tiny_reward().to(dtype)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    for again in (RewardModel.from_pretrained(tmp_path, dtype), load_reward_model(tmp_path, dtype)):
        ours, its = model.state_dict(), again.state_dict()
        assert ours.keys() == its.keys()
        assert all(torch.equal(ours[n], its[n]) and its[n].dtype == dtype for n in ours)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_gets_a_new_head_on_the_same_transformer(tmp_path, tied):
    language = tiny_llama(tie_word_embeddings=tied)
    language.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, other = RewardModel.from_pretrained(tmp_path), RewardModel.from_pretrained(tmp_path)
    expected = language.model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.model.state_dict().items())
    assert {n for n, _ in model.named_parameters() if not n.startswith("model.")} == {"score.weight"}
    assert not torch.equal(model.score.weight, other.score.weight)
    assert 0.5 < model.score.weight.std() * 33 ** 0.5 < 2          # 1 / sqrt(C + 1), C = 32


def reward_adapter(base, folder, task="SEQ_CLS"):
    """A folder with a stirred adapter on the base; returns the model it was saved from."""
    torch.manual_seed(3)
    model = RewardModel.from_pretrained(base) if task == "SEQ_CLS" else Llama.from_pretrained(base)
    add_lora(model, 4, 8, ["q_proj", "v_proj"])
    for parameter in adapter_parameters(model, "default"):
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, folder, "default", base, task)
    return model


@pytest.mark.parametrize("named_base", [False, True])
def test_an_adapter_is_read_with_its_base_and_head(base, tmp_path, named_base):
    model = reward_adapter(base, tmp_path)
    again = load_reward_model(tmp_path, base=base if named_base else None)
    assert torch.equal(again.score.weight, model.score.weight)
    ids, mask = pad([row[0] for row in made_up_pairs()])
    with torch.no_grad():
        assert torch.equal(again(ids, mask), model(ids, mask))
        use_adapter(model, None)
        assert (again(ids, mask) - model(ids, mask)).abs().max() > 1e-2


def test_an_adapter_can_share_the_transformer_of_another_model(base, tmp_path):
    reward_adapter(base, tmp_path)
    language = Llama.from_pretrained(base)
    weights = {n: p.data_ptr() for n, p in language.model.named_parameters()}
    ids, mask = pad([row[0] for row in made_up_pairs()])
    with torch.no_grad():
        before = language(ids, mask)
    model = load_reward_model(tmp_path, share=language.model, name="reward")
    critic = load_reward_model(tmp_path, share=language.model, name="critic")
    assert model.model is critic.model is language.model
    assert {n: p.data_ptr() for n, p in model.model.named_parameters() if ".lora_" not in n} == weights
    assert model.score.weight.data_ptr() != critic.score.weight.data_ptr()         # each role owns its head
    assert {tuple(layer.lora_A) for _, layer in lora_layers(model)} == {("reward", "critic")}
    with torch.no_grad():
        use_adapter(model, "reward")
        assert torch.equal(model(ids, mask), load_reward_model(tmp_path)(ids, mask))
        use_adapter(language, None)
        assert torch.equal(language(ids, mask), before)


def test_a_shared_head_has_the_networks_dtype(base, tmp_path):
    reward_adapter(base, tmp_path)
    model = load_reward_model(tmp_path, share=Llama.from_pretrained(base, torch.bfloat16).model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_language_models_adapter_is_refused(base, tmp_path):
    reward_adapter(base, tmp_path, "CAUSAL_LM")
    with pytest.raises(BadInput, match="not a reward model.*lora.py"):
        load_reward_model(tmp_path)


# ------------------------------------------------------------------------------------------------ evaluation
@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def direct(model, rows):
    """accuracy, margin, mean and std from the texts one by one."""
    chosen, rejected = ([float(alone(model, row[side])[-1]) for row in rows] for side in (0, 1))
    mean = sum(chosen) / len(rows)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return {"accuracy": sum(margin > 0 for margin in margins) / len(rows),
            "margin": sum(margins) / len(rows), "mean": mean,
            "std": math.sqrt(sum((c - mean) ** 2 for c in chosen) / len(rows))}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 16])
def test_evaluate_equals_a_direct_computation_whatever_the_micro_batch(process_group, micro_batch):
    model, rows = tiny_reward(), made_up_pairs(7)
    expected = direct(model, rows)
    assert 0 < expected["accuracy"] < 1 and expected["std"] > 0.1
    assert evaluate(model, rows, micro_batch, torch.device("cpu")) == pytest.approx(expected, rel=1e-4)


def test_evaluate_takes_a_bfloat16_models_scores_in_float32(process_group):
    model, rows = tiny_reward().bfloat16(), made_up_pairs(7)
    expected = direct(model, rows)
    assert evaluate(model, rows, 1, torch.device("cpu")) == pytest.approx(expected, rel=1e-6)
    rounded = [float(alone(model, row[0])[-1].bfloat16()) for row in rows]
    assert sum(rounded) / 7 != pytest.approx(expected["mean"], rel=1e-6)


def test_evaluate_is_without_dropout_and_gradient(process_group):
    model, rows = tiny_reward(), made_up_pairs(7)
    add_lora(model, 4, 8, ["q_proj", "v_proj"], dropout=0.5)
    for parameter in adapter_parameters(model, "default"):
        torch.nn.init.normal_(parameter, std=0.3)
    expected = direct(model.eval(), rows)
    found = evaluate(model.train(), rows, 3, torch.device("cpu"))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_ties_count_as_wrong(process_group):
    model = tiny_reward()
    torch.nn.init.zeros_(model.score.weight)
    stats = evaluate(model, made_up_pairs(5), 2, torch.device("cpu"))
    assert stats == {"accuracy": 0, "margin": 0, "mean": 0, "std": 0}


# ------------------------------------------------------------------------------------- ranks and the loop
@pytest.mark.parametrize("world, micro", [(2, 1), (2, 3), (3, 2)])
def test_evaluate_on_several_ranks_counts_every_pair_once(world, micro, monkeypatch):
    model, rows = tiny_reward(), made_up_pairs(7)
    found = on_ranks(world, lambda rank: evaluate(model, rows, micro, torch.device("cpu")), monkeypatch)
    assert found == [pytest.approx(direct(model, rows), rel=1e-4)] * world


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 2), (2, 2)])
@KINDS
def test_a_step_has_the_loss_and_the_gradient_of_its_whole_batch(
        kind, world, micro, base, pairs_file, tokenizer_file, tmp_path, monkeypatch):
    start = tmp_path / "start"               # a reward model: a new head would be another one in each run
    tiny_reward().save_pretrained(start)
    copy_tokenizer(tokenizer_file.parent, start)
    loaded = spy(reward, "load_rows", monkeypatch)
    words = (f"--model {start} --data {pairs_file} --batch 8 --micro-batch {micro} --loss {kind} "
             "--max-len 64 --lr 0.01 --steps 3 --log-every 1 --eval-every 2")
    run = train(reward, words.split(), tmp_path / "out", monkeypatch, world)
    (args, phase, *_), _, (rows, held_out) = loaded[0]
    assert phase == 1 and run.engines[0].updates == 3                # the second share of the pairs
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected, _ in rows]
    ids, mask, starts = collate_pairs([rows[i] for i in next(stream(lengths, 8, args.seed))[2]])
    model = load_reward_model(start)
    loss = batch_loss(model(ids, mask), mask, starts, kind, 8)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (run.engines[0].gradients[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    before, step, *_ = run.lines
    means = direct(model, held_out)
    assert before == {"step": 0, **{name: pytest.approx(x, rel=1e-4) for name, x in means.items()}}
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5) and step["lr"] == 0.01
    stats = {"n": len(held_out), **{name: run.lines[-1][name] for name in ("mean", "std", "accuracy")}}
    assert json.loads((run.out / "reward_stats.json").read_text()) == stats
