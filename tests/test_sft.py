"""sft.py: its loss against the definition, the perplexity, and the training loop on one rank and on two."""
import math

import pytest
import torch
import torch.nn.functional as F

import sft
from conftest import tiny_llama
from data import collate_sft, stream
from sft import label_logits, n_labels, perplexity, rows_loss, sft_loss
from training import on_ranks, save_talker, spy, train

ROWS = [([1, 50, 60, 70, 80, 2], 3), ([1, 51, 61, 2], 2), ([1, 52, 62, 72, 82, 92, 102, 2], 5),
        ([1, 53, 2], 2), ([1, 54, 64, 74, 84, 94], 1), ([1, 55, 65, 75, 85, 95, 2], 4),
        ([1, 56, 66, 76, 2], 2)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def talker(tmp_path_factory, tokenizer_file):
    return save_talker(tmp_path_factory.mktemp("talker"), tokenizer_file)


def by_hand(model, rows):
    """The negative log-likelihood of all response tokens, each row alone, and the number of these tokens."""
    nll = n = 0
    for ids, n_prompt in rows:
        with torch.no_grad():
            logps = model(torch.tensor([ids]), torch.ones(1, len(ids)))[0].log_softmax(-1)
        nll -= sum(logps[t - 1, ids[t]].item() for t in range(n_prompt, len(ids)))
        n += len(ids) - n_prompt
    return nll, n


def test_sft_loss_is_the_mean_over_the_labels_or_the_sum_over_a_total():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7), torch.tensor([3, -100, 0, 6, -100])
    expected = -sum(logits.log_softmax(-1)[i, label].item() for i, label in enumerate(labels) if label >= 0)
    assert sft_loss(logits, labels).item() == pytest.approx(expected / 3)
    assert sft_loss(logits, labels, 7).item() == pytest.approx(expected / 7)
    assert sft_loss(logits, torch.full((5,), -100)) == 0
    assert sft_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_the_loss_is_that_of_response_tokens_and_eos_each_predicted_from_the_column_before():
    model = tiny_llama()
    nll, n = by_hand(model, ROWS)
    assert n == n_labels(ROWS) == 20
    assert rows_loss(model, ROWS, 3.0, CPU).item() == pytest.approx(nll / 3, rel=1e-5)


def test_labels_and_logits_stand_in_one_order():
    model, (ids, mask, labels) = tiny_llama(), collate_sft(ROWS)
    logits, found = label_logits(model, ids, mask, labels)
    every = F.cross_entropy(model(ids, mask)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert found.tolist() == [token for row, n_prompt in ROWS for token in row[n_prompt:]]
    assert sft_loss(logits, found, 1).item() == pytest.approx(every.item(), rel=1e-5)


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 3), (1, 16), (2, 1), (2, 2), (3, 4)])
def test_the_perplexity_is_that_of_all_response_tokens_in_any_division(world, micro, monkeypatch):
    model = tiny_llama(std=0.1)
    nll, n = by_hand(model, ROWS)
    found = on_ranks(world, lambda rank: perplexity(model, ROWS, micro, CPU), monkeypatch)
    assert found == pytest.approx([math.exp(nll / n)] * world, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the loop
FLAGS = "--max-len 64 --batch 8 --lr 0.01 --steps 3 --log-every 1 --eval-every 2"


@pytest.fixture(scope="module")
def words(talker, pairs_file):
    return ["--model", talker, "--data", pairs_file, *FLAGS.split()]


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 2), (2, 2)])
def test_a_step_has_the_loss_and_the_gradient_of_its_whole_batch(
        world, micro, words, talker, tmp_path, monkeypatch):
    loaded = spy(sft, "load_rows", monkeypatch)
    run = train(sft, [*words, "--micro-batch", micro], tmp_path / "out", monkeypatch, world)
    (args, phase, *_), _, (rows, held_out) = loaded[0]
    assert phase == 0 and run.engines[0].updates == 3                # the first share of the pairs
    numbers = next(stream([len(ids) for ids, _ in rows], 8, args.seed))[2]
    batch, model = [rows[i] for i in numbers], sft.load_model(talker)
    loss = rows_loss(model, batch, n_labels(batch), CPU)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (run.engines[0].gradients[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    before, step, *_ = run.lines
    nll, n = by_hand(model, held_out)
    assert before == {"step": 0, "eval_ppl": pytest.approx(math.exp(nll / n))}
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5) and step["step"] == 1 and step["lr"] == 0.01
    assert [line["step"] for line in run.lines if "eval_ppl" in line] == [0, 2, 3]
