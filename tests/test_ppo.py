"""PPO's mathematics against its definitions, the rollout, the four roles, and the loop."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ppo
from conftest import tiny_llama
from data import Tokenizer, collate_prompts, encode_prompt, read_records
from llama import Llama
from lora import add_lora, load_model, save_adapter
from ppo import (
    Measures,
    Rollout,
    advantages,
    answer_logps,
    build_roles,
    entropy,
    explained_variance,
    freeze_untrained,
    gae,
    kl_per_token,
    my_micro_batches,
    policy_loss,
    policy_measures,
    random_numbers,
    read_inputs,
    response_values,
    rollout,
    shape_rewards,
    start_average,
    steered,
    token_logps,
    token_rewards,
    update_actor,
    update_average,
    update_critic,
    value_loss,
    whiten,
)
from reward import RewardModel, load_reward_model
from runtime.errors import BadInput
from runtime.log import Log
from runtime.tokenizer_write import copy_tokenizer
from sft import n_labels, rows_loss
from training import PlainEngine, on_ranks, save_talker, spy, train

def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged(lengths, width=None):
    """mask (B,R) of answers of these lengths."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


MASK = ragged([3, 6, 1, 5], 6)


# ------------------------------------------------------------------------------------------ log-probabilities
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_token_logps_are_a_log_softmax_at_the_temperature(temperature):
    logits, ids = 4 * some(3, 5, 11), torch.randint(11, (3, 5), generator=random_numbers(1, 1))
    expected = (logits.double() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert (token_logps(logits, ids, temperature) - expected).abs().max() < 1e-5


def test_token_logps_of_half_precision_are_computed_in_float32():
    logits, ids = (8 * some(6, 400)).bfloat16(), torch.arange(6)
    logps = token_logps(logits, ids, 0.7)
    assert logps.dtype == torch.float32 and torch.equal(logps, token_logps(logits.float(), ids, 0.7))
    assert (logps - (logits.double() / 0.7).log_softmax(-1)[ids, ids]).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------ rewards
def test_rewards_of_a_worked_example():
    score = torch.tensor([2.0, -9.0])
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 7.0]])
    ref_logp = torch.tensor([[-2.0, -2.0, -1.0], [-3.0, -0.5, 9.0]])
    rewards = shape_rewards(score, logp, ref_logp, ragged([3, 2]), kl_coef=0.1, clip=5.0)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 0.0, 0.2 + 2.0], [-0.2, 0.05 - 5.0, 0.0]]))


def test_the_score_is_clamped_and_comes_once_at_the_last_token():
    zeros = torch.zeros(MASK.shape)
    rewards = shape_rewards(torch.tensor([1.5, 7.0, -7.0, -1.5]), zeros, zeros, MASK, kl_coef=1.0, clip=3.0)
    expected = torch.zeros(MASK.shape)
    expected[[0, 1, 2, 3], [2, 5, 0, 4]] = torch.tensor([1.5, 3.0, -3.0, -1.5])
    assert torch.equal(rewards, expected)


def test_the_penalty_is_taken_off_after_clamping_and_only_where_it_is_given():
    zeros = torch.zeros(MASK.shape)
    penalty = 2.0 * torch.tensor([True, False, True, False])
    rewards = shape_rewards(torch.tensor([9.0, 9.0, -9.0, 0.5]), zeros, zeros, MASK, 1.0, 5.0, penalty)
    assert rewards.sum(1).tolist() == [3.0, 5.0, -7.0, 0.5]


def test_an_answer_of_no_tokens_gets_no_reward():
    assert not shape_rewards(torch.ones(1), some(1, 4), some(1, 4, seed=1), ragged([0], 4), 1.0, 5.0).any()


# ------------------------------------------------------------------------------------------------ advantages
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (0.97, 0.0)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    rng = random_numbers(2, int(100 * lam))
    lengths = torch.randint(1, 18, (40,), generator=rng).tolist()
    rewards, values = (torch.randn(40, 17, generator=rng, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values, ragged(lengths, 17), gamma, lam)
    for r, v, advantage, n in zip(rewards.tolist(), values.tolist(), advantages, lengths, strict=True):
        v = [*v[:n], 0.0]                    # after the last token nothing is worth anything
        for t in range(n):
            by_hand = math.fsum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k])
                                for k in range(n - t))
            assert abs(advantage[t].item() - by_hand) < 1e-12
    assert torch.allclose(returns, (advantages + values) * ragged(lengths, 17), rtol=0, atol=1e-15)


def test_gae_at_lambda_one_is_what_was_earned_less_what_was_expected():
    rewards, values, mask = some(4, 6, seed=1), some(4, 6, seed=2), MASK
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, (to_come - values) * mask, atol=1e-6)
    assert torch.allclose(returns, to_come * mask, atol=1e-6)


def test_nothing_outside_the_mask_reaches_an_advantage():
    rewards, values = some(4, 6, seed=1), some(4, 6, seed=2)
    clean = gae(rewards, values, MASK, 0.99, 0.95)
    rewards, values = rewards.where(MASK, torch.tensor(1e6)), values.where(MASK, torch.tensor(-1e6))
    assert all(map(torch.equal, clean, gae(rewards, values, MASK, 0.99, 0.95)))


def test_an_answer_has_the_same_advantages_alone_and_beside_longer_ones():
    rewards, values = some(4, 6, seed=1), some(4, 6, seed=2)
    together = gae(rewards, values, MASK, 0.99, 0.95)[0]
    alone = gae(rewards[:1, :3], values[:1, :3], MASK[:1, :3], 0.99, 0.95)[0]
    assert torch.equal(together[:1, :3], alone)


def test_whitened_numbers_have_mean_zero_and_variance_one_over_the_mask():
    x = 7 + 3 * some(4, 6, dtype=torch.float64)
    white = whiten(x, MASK)
    assert abs(white[MASK].mean()) < 1e-12 and abs(white[MASK].var(correction=0) - 1) < 1e-6
    assert torch.equal(white, whiten(x.where(MASK, torch.tensor(1e4).double()), MASK))
    assert torch.equal(whiten(torch.full((1, 3), 2.0), ragged([3])), torch.zeros(1, 3))  # no variance, no NaN


# ------------------------------------------------------------------------------------------------ losses
def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage():
    logp, adv = some(4, 6), some(4, 6, seed=1)
    assert policy_loss(logp, logp, adv, MASK, 0.2).item() == pytest.approx(-adv[MASK].mean().item(), abs=1e-6)


@pytest.mark.parametrize("ratio, adv, loss, gradient", [
    (1.1, 2.0, -2.2, -2.2),                  # within the clip: -adv ratio, whose gradient by log p is itself
    (1.5, 2.0, -2.4, 0.0),                   # a good token has become likely enough
    (0.5, 2.0, -1.0, -1.0),                  # a good token has become unlikely: pull it back
    (0.9, -2.0, 1.8, 1.8),
    (0.5, -2.0, 1.6, 0.0),                   # a bad token has become unlikely enough
    (1.5, -2.0, 3.0, 3.0),                   # a bad token has become likely: push it down
])
def test_policy_loss_clips_only_what_goes_too_far(ratio, adv, loss, gradient):
    new = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    result = policy_loss(new, torch.tensor([[-1.0]]), torch.tensor([[adv]]), torch.ones(1, 1), 0.2)
    result.backward()
    assert (result.item(), new.grad.item()) == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize("new, returns, loss, gradient", [
    (1.1, 2.0, 0.5 * 0.9 ** 2, -0.9),        # within the clip of the old value 1
    (1.5, 2.0, 0.5 * 0.8 ** 2, 0.0),         # towards the return, past the clip: the clipped error is larger
    (1.5, 0.0, 0.5 * 1.5 ** 2, 1.5),         # away from the return: the true error is larger
    (0.5, 0.0, 0.5 * 0.8 ** 2, 0.0),
    (0.5, 2.0, 0.5 * 1.5 ** 2, -1.5),
])
def test_value_loss_takes_the_larger_error(new, returns, loss, gradient):
    new = torch.tensor([[new]], requires_grad=True)
    result = value_loss(new, torch.tensor([[1.0]]), torch.tensor([[returns]]), torch.ones(1, 1), 0.2)
    result.backward()
    assert (result.item(), new.grad.item()) == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_losses_of_micro_batches_add_up_to_that_of_the_whole(loss):
    x = [some(4, 6, seed=i) for i in range(3)]
    parts = [loss(*(t[rows] for t in (*x, MASK)), 0.2, total=MASK.sum()) for rows in ([2], [0, 3], [1])]
    assert sum(parts).item() == pytest.approx(loss(*x, MASK, 0.2).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_nothing_outside_the_mask_reaches_a_loss_or_its_gradient(loss):
    x = [some(4, 6, seed=i) for i in range(3)]
    dirty = [t.where(MASK, torch.tensor(1e4 * (-1) ** i)).requires_grad_() for i, t in enumerate(x)]
    result = loss(*dirty, MASK, 0.2)
    assert torch.equal(result, loss(*x, MASK, 0.2))
    result.backward()
    assert dirty[0].grad[~MASK].abs().max() == 0 and dirty[0].grad[MASK].abs().max() > 0


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_a_loss_over_nothing_is_zero(loss):
    assert loss(*(some(2, 3, seed=i) for i in range(3)), ragged([0, 0], 3), 0.2) == 0


# ------------------------------------------------------------------------------------------------ all of them
def call_all(mask, x=None, logits=None):
    x = [some(4, 6, seed=i) for i in range(3)] if x is None else x
    logits = some(15, 7) if logits is None else logits
    return {"rewards": shape_rewards(x[0][:, 0], x[1], x[2], mask, 0.1, 1.0), "whiten": whiten(x[0], mask),
            **dict(zip(("advantages", "returns"), gae(x[0], x[1], mask, 0.9, 0.9), strict=True)),
            "policy_loss": policy_loss(*x, mask, 0.2), "value_loss": value_loss(*x, mask, 0.2),
            "kl": kl_per_token(x[0], x[1], mask), "entropy": entropy(logits, 1.0),
            **policy_measures(x[0], x[1], mask, 0.2, mask.sum()),
            **dict(zip(("whitened", "targets"), advantages(*x[:2], mask, 0.9, 0.9), strict=True))}


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_a_mask_of_any_type_means_the_same(dtype):
    expected, found = call_all(MASK), call_all(MASK.to(dtype))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tensors_of_tokens_are_zero_outside_the_mask():
    results = call_all(MASK)
    for key in ("rewards", "whiten", "advantages", "returns", "kl", "whitened", "targets"):
        assert results[key][~MASK].abs().max() == 0 and results[key][MASK].abs().min() > 0, key


def test_no_function_writes_into_its_arguments():
    x, mask, logits = [some(4, 6, seed=i) for i in range(3)], MASK.clone(), some(15, 7)
    before = [t.clone() for t in (*x, mask, logits)]
    call_all(mask, x, logits)
    token_logps(logits, torch.zeros(15, dtype=torch.long), 0.5)
    explained_variance(x[0], x[1], mask)
    assert all(map(torch.equal, before, (*x, mask, logits)))


# ------------------------------------------------------------------------------------------------ measures
def test_explained_variance_of_perfect_constant_and_wrong_values():
    returns = some(4, 6)
    dirty = returns.where(MASK, torch.tensor(1e6))
    assert explained_variance(dirty, returns, MASK) == 1
    assert explained_variance(torch.full((4, 6), 3.0), returns, MASK) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert math.isfinite(explained_variance(returns, torch.ones(4, 6), MASK))


def test_policy_measures_by_hand():
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 5.0, 5.0]])
    ratio = torch.tensor([[1.5, 0.9, 0.5], [1.0, 9.0, 9.0]])
    mask = ragged([3, 1])
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]] * 3 + [[2 * math.log(3.0), 0.0, -1e4, -1e4]])
    measures = policy_measures(old + ratio.log(), old, mask, 0.2, total=4)
    assert {name: float(x) for name, x in measures.items()} == pytest.approx({
        "ratio": (1.5 + 0.9 + 0.5 + 1) / 4, "clip_frac": 0.5,
        "approx_kl": sum(r - 1 - math.log(r) for r in (1.5, 0.9, 0.5)) / 4}, rel=1e-5)
    # the probabilities are 1/4 each in three rows, and 3/4 and 1/4 in the last one
    at_temperature_2 = 3 * math.log(4) + 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy(logits, 2.0).item() == pytest.approx(at_temperature_2, rel=1e-5)
    assert entropy(logits.repeat(40, 1), 2.0).item() == pytest.approx(40 * at_temperature_2, rel=1e-5)


def test_measures_are_means_over_micro_batches_and_a_measure_may_be_of_some_only():
    measures = Measures()
    measures.add(loss=torch.tensor(1.0, requires_grad=True), ratio=torch.tensor(1.0))
    measures.add(loss=torch.tensor(4.0, requires_grad=True))
    assert measures.means() == {"loss": 2.5, "ratio": 1.0}


def test_random_numbers_depend_on_seed_and_step_alone():
    def draw(*key):
        return tuple(torch.rand(4, generator=random_numbers(*key)).tolist())
    torch.manual_seed(1)
    first = draw(7, 3)
    torch.manual_seed(2)
    assert draw(7, 3) == first
    assert len({draw(seed, step) for seed in (0, 1, 7) for step in (-1, 0, 1, 2)}) == 12


# ------------------------------------------------------------------------------------------ folders and roles
@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of this process alone: what ranks do together, it does with itself. On one thread,
    since on a busy machine tiny matrices wait for the other threads far longer than they take."""
    store, threads = tmp_path_factory.mktemp("group") / "store", torch.get_num_threads()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    dist.destroy_process_group()


def randomize(model, seed):
    """An adapter's B is zero when new: such an adapter would hide any mistake in switching."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name or name == "score.weight":
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def folders(base, tokenizer_file, tmp_path_factory):
    """Folders of actors and reward models by name: full ones, adapters on the base, and an adapter on
    another base."""
    root = tmp_path_factory.mktemp("folders")
    names = ["other", "adapter", "reward", "reward-adapter", "reward-other"]
    made = {"full": base, **{name: root / name for name in names}}
    tiny_llama(seed=5, std=0.05).save_pretrained(made["other"])
    actor = Llama.from_pretrained(base)
    add_lora(actor, 2, 8, ["q_proj", "down_proj"])
    randomize(actor, 1)
    save_adapter(actor, made["adapter"], "default", base, "CAUSAL_LM")
    reward = RewardModel.from_pretrained(base)
    randomize(reward, 2)
    reward.save_pretrained(made["reward"])
    for name, on in (("reward-adapter", "full"), ("reward-other", "other")):
        reward = RewardModel.from_pretrained(made[on])
        add_lora(reward, 3, 6, ["q_proj", "v_proj"])
        randomize(reward, 3)
        save_adapter(reward, made[name], "default", made[on], "SEQ_CLS")
    for name in names:
        copy_tokenizer(tokenizer_file.parent, made[name])
    return made


@pytest.fixture
def roles_of(folders, monkeypatch):
    """roles_of(actor, reward, *flags) -> (roles, args)"""
    def build(actor, reward, *flags):
        words = ["ppo.py", "--actor", folders[actor], "--reward", folders[reward], "--data", "none",
                 "--out", "none", *flags]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        args = ppo.get_args()
        return build_roles(args, torch.float32, "cpu"), args
    return build


LORA = ("--lora-rank", "2", "--lora-targets", "q_proj,o_proj")
CASES = {  # actor folder, reward folder, flags, networks in memory, adapters of actor, ref, critic, reward
    "all weights": ("full", "reward", (), 4, (None, None, None, None)),
    "all weights, reward adapter on the same base": (
        "full", "reward-adapter", (), 3, (None, None, "critic", "reward")),
    "new adapters": ("full", "reward", LORA, 2, ("actor", None, "critic", None)),
    "new adapter, reward adapter on the same base": (
        "full", "reward-adapter", LORA, 1, ("actor", None, "critic", "reward")),
    "adapters on one base": ("adapter", "reward-adapter", (), 1, ("actor", "ref", "critic", "reward")),
    "adapters on two bases": ("adapter", "reward-other", (), 2, ("actor", "ref", "critic", "reward")),
    "actor adapter, full reward model": ("adapter", "reward", (), 3, ("actor", "ref", None, None)),
    "actor adapter, new adapter for the critic": (
        "adapter", "reward", LORA, 2, ("actor", "ref", "critic", None)),
}
FIXED = torch.tensor([[1, 300, 20, 3, 7, 44]])
EVERYWHERE = torch.ones_like(FIXED, dtype=torch.bool)
ROLES = ("actor", "ref", "critic", "reward")


def outputs(roles):
    """What each role says of a fixed text."""
    said = {}
    for role in ROLES:
        said[role] = roles[role].activate()(FIXED, EVERYWHERE)
    return said


def storages(roles):
    """data_ptr -> number of entries of the distinct parameters of all roles."""
    return {p.data_ptr(): p.numel() for role in roles.values() for p in role.network.parameters()}


@pytest.mark.parametrize("case", CASES)
def test_roles_share_networks_where_they_can(case, roles_of):
    actor, reward, flags, networks, adapters = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    assert tuple(roles) == ROLES and tuple(role.adapter for role in roles.values()) == adapters
    transformers = [role.network.model for role in roles.values()]
    assert len({network.layers[0].mlp.up_proj.weight.data_ptr() for network in transformers}) == networks
    assert len({network.embed_tokens.weight.data_ptr() for network in transformers}) == networks


@pytest.mark.parametrize("case", ["adapters on one base", "new adapter, reward adapter on the same base"])
def test_four_roles_on_one_base_take_the_memory_of_about_one(case, roles_of, base):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    one = sum(p.numel() for p in Llama.from_pretrained(base).parameters())
    in_memory = storages(roles)
    for name, parameter in Llama.from_pretrained(base).named_parameters():
        for role in roles.values():
            if hasattr(role.network, "lm_head") or name != "lm_head.weight":
                shared = role.network.get_parameter(name)
                assert shared.data_ptr() == roles["actor"].network.get_parameter(name).data_ptr()
                assert torch.equal(shared, parameter)
    assert one < sum(in_memory.values()) < 1.2 * one


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_each_role_says_what_its_folder_says_alone(case, roles_of, folders):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    logits = load_model(folders[actor])(FIXED, EVERYWHERE)
    scores = load_reward_model(folders[reward])(FIXED, EVERYWHERE)
    said = outputs(roles)
    assert torch.equal(said["actor"], said["ref"]) and torch.equal(said["critic"], said["reward"])
    assert torch.allclose(said["actor"], logits, atol=1e-5)
    assert torch.allclose(said["reward"], scores, atol=1e-5)
    if actor == "adapter":                   # and an adapter says something else than its base
        assert (said["actor"] - load_model(folders["full"])(FIXED, EVERYWHERE)).abs().max() > 0.01


def test_a_rank_is_refused_only_where_no_network_takes_a_new_adapter(roles_of, tmp_path):
    _, args = roles_of("adapter", "reward-adapter")
    args.lora_rank, args.out = 2, str(tmp_path / "out")
    with pytest.raises(BadInput, match="--lora-rank.*adapters already"):
        read_inputs(args, 1)


def test_a_temperature_of_zero_is_refused(roles_of):
    with pytest.raises(BadInput, match="--temperature"):
        roles_of("full", "reward", "--temperature", "0")


@pytest.mark.parametrize("case", CASES)
def test_only_adapters_or_all_weights_and_the_critics_score_are_trained(case, roles_of):
    actor, reward, flags, _, adapters = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    trained = freeze_untrained(roles)
    for role, name in zip(ROLES, adapters, strict=True):
        if role in trained:
            model = roles[role].network
            expected = {path: id(p) for path, p in model.named_parameters()
                        if name is None or path.endswith(f".{name}.weight") or path == "score.weight"}
            assert expected == {path: id(p) for path, p in trained[role].items()} and expected
    kept = {id(p) for weights in trained.values() for p in weights.values()}
    networks = [role.network for role in roles.values()]
    assert all(p.requires_grad == (id(p) in kept) for network in networks for p in network.parameters())
    assert not any(module.training for role in roles.values() for module in role.network.modules())
    mine, theirs = roles["critic"].network.score.weight, roles["reward"].network.score.weight
    assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert mine.requires_grad and not theirs.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_actor_and_the_critic_and_neither_of_the_frozen_roles(case, roles_of):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    trained = freeze_untrained(roles)
    with torch.no_grad():
        before = outputs(roles)
    for role, other in (("actor", "critic"), ("critic", "actor")):
        roles[role].activate()(FIXED, EVERYWHERE).square().mean().backward()
        assert all(p.grad is None for p in trained[other].values())
        optimizer = torch.optim.SGD(trained[role].values(), lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = outputs(roles)
        assert not torch.equal(after[role], before[role])
        assert torch.equal(after["ref"], before["ref"]) and torch.equal(after["reward"], before["reward"])


# ------------------------------------------------------------------------------------------------ the rollout
N, NEW = 7, 9                                                      # 7 does not divide into micro-batches of 3


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer(base)


@pytest.fixture(scope="module")
def prompts(tokenizer, pairs_file):
    rows = [encode_prompt(tokenizer, record, 100) for record in read_records(pairs_file)[:N]]
    assert len({len(row) for row in rows}) > 2
    return rows


@pytest.fixture
def rolled(roles_of, tokenizer, prompts):
    """rolled(case) -> (roles, args, uniforms, batch); the rows of even number have small random numbers, so
    that ids of low number are drawn, and EOS is id 2. moved: after actor and critic have left what they
    started from."""
    def roll(case, moved=False):
        actor, reward, flags, *_ = CASES[case]
        flags = (*flags, "--temperature", "0.8", "--micro-batch", "3", "--max-new", NEW)
        roles, args = roles_of(actor, reward, *flags)
        trained = freeze_untrained(roles)
        for parameter in (p for weights in trained.values() for p in weights.values() if moved):
            parameter.data += 0.02 * some(*parameter.shape)
        roles["actor"].network.n_words = tokenizer.vocab_size
        uniforms = torch.rand(N, NEW, generator=random_numbers(0, 0))
        uniforms[::2] *= 0.02
        return roles, args, uniforms, rollout(roles, prompts, uniforms, args, tokenizer)
    return roll


ONE, FOUR = "adapters on one base", "all weights"
TOKENS = ("old_logp", "ref_logp", "values")


@pytest.mark.parametrize("case", [ONE, FOUR])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_answers_in_pieces_are_the_answers_at_once(case, at_once, rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(case)
    args.gen_batch = at_once
    pieces = rollout(roles, prompts, uniforms, args, tokenizer)
    assert torch.equal(pieces.ids, batch.ids) and torch.equal(pieces.response_mask, batch.response_mask)
    assert torch.equal(pieces.ended, batch.ended) and len(set(batch.response_mask.sum(1).tolist())) > 2
    assert (pieces.old_logp - batch.old_logp).abs().max() < 1e-5


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_a_rollout_is_one_batch_of_left_padded_prompts_and_right_padded_answers(case, rolled, prompts):
    *_, batch = rolled(case)
    mask, P = batch.response_mask, max(map(len, prompts))
    R = mask.shape[1]
    assert 1 < R <= NEW and batch.ids.shape == batch.mask.shape == (N, P + R)
    assert all(getattr(batch, key).shape == (N, R) for key in TOKENS)
    assert batch.raw_score.shape == batch.ended.shape == (N,) and batch.raw_score.dtype == torch.float32
    assert torch.equal(batch.ids[:, :P], collate_prompts(prompts)[0])
    assert torch.equal(batch.mask, torch.cat([collate_prompts(prompts)[1], mask], 1))
    assert all((getattr(batch, key) == 0).equal(~mask) for key in TOKENS)
    assert batch.ids[~batch.mask].eq(0).all()


def test_a_batch_is_as_wide_as_its_longest_answer(rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(ONE)
    ended = batch.ended & (batch.response_mask.sum(1) < NEW)
    some = [prompt for prompt, has_ended in zip(prompts, ended, strict=True) if has_ended]
    batch = rollout(roles, some, uniforms[ended], args, tokenizer)
    assert batch.response_mask.shape[1] == batch.response_mask.sum(1).max() < NEW


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_an_answer_is_what_the_actor_generates_for_its_prompt_alone(case, rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(case, moved=True)
    actor, R = roles["actor"].activate(), batch.response_mask.shape[1]
    for i, prompt in enumerate(prompts):
        ids, mask = actor.generate(*collate_prompts([prompt]), NEW, args.temperature,
                                   eos_id=tokenizer.eos_id, uniforms=uniforms[i:i + 1])
        assert ids[0, mask[0]].tolist() == batch.ids[i, -R:][batch.response_mask[i]].tolist()
        assert batch.ended[i] == (ids[0, -1] == tokenizer.eos_id)
    assert batch.ended.any() and not batch.ended.all()


def test_an_answer_whose_eos_is_the_last_token_there_is_room_for_has_ended(rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(ONE)
    lengths = batch.response_mask.sum(1)
    args.max_new = int(lengths[batch.ended].max())
    cut = rollout(roles, prompts, uniforms[:, :args.max_new], args, tokenizer)
    assert torch.equal(cut.ended, batch.ended) and args.max_new < NEW
    assert torch.equal(cut.response_mask.sum(1), lengths.clamp(max=args.max_new))


def test_an_answer_ends_at_any_of_the_ids_that_end_one(rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(ONE)
    answers = [ids[real].tolist() for ids, real in zip(batch.ids[:, batch.start:], batch.response_mask,
                                                       strict=True)]
    other = next(ids[0] for ids in answers if len(ids) > 2)
    several = copy.copy(tokenizer)
    several.eos_ids = [2, other]
    again = rollout(roles, prompts, uniforms, args, several)
    for i, ids in enumerate(answers):
        n = next((t + 1 for t, token in enumerate(ids) if token in (2, other)), len(ids))
        assert again.response_mask[i].sum() == n and again.ended[i] == (ids[n - 1] in (2, other))
    assert again.ended.sum() > batch.ended.sum()


@torch.no_grad()
@pytest.mark.parametrize("case", [ONE, FOUR])
def test_every_role_judges_an_answer_as_it_would_the_text_alone(case, rolled, prompts, tokenizer):
    roles, args, _, batch = rolled(case, moved=True)
    assert (batch.old_logp - batch.ref_logp).abs().max() > 1e-3
    for i, prompt in enumerate(prompts):
        text, n = batch.ids[i:i + 1][batch.mask[i:i + 1]][None], batch.response_mask[i].sum()
        everywhere = torch.ones_like(text, dtype=torch.bool)
        for key, role in (("old_logp", "actor"), ("ref_logp", "ref")):
            logits = roles[role].activate()(text, everywhere)[0, len(prompt) - 1:-1, :tokenizer.vocab_size]
            logps = (logits.double() / args.temperature).log_softmax(-1)
            expected = logps.gather(1, text[0, len(prompt):, None])[:, 0]
            assert (getattr(batch, key)[i, :n] - expected).abs().max() < 1e-5
        before = roles["critic"].activate()(text, everywhere)[0, len(prompt) - 1:-1]     # before each token
        assert torch.allclose(batch.values[i, :n], before, atol=1e-5)
        score = roles["reward"].activate()(text, everywhere)[0, -1]
        assert torch.allclose(batch.raw_score[i], score, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_before_training_the_divergence_from_the_reference_is_exactly_zero(case, rolled):
    *_, batch = rolled(case)
    assert torch.equal(batch.old_logp, batch.ref_logp)


@torch.no_grad()
@pytest.mark.parametrize("case", [ONE, FOUR])
def test_the_first_ratio_is_one_in_micro_batches_of_any_company(case, rolled, tokenizer):
    roles, args, _, batch = rolled(case)
    actor = roles["actor"].activate()
    for rows in torch.randperm(N, generator=random_numbers(0, 1)).split(2):
        mb = batch.select(rows)
        logp, logits = answer_logps(actor, mb, args.temperature, tokenizer.vocab_size)
        assert ((logp - mb.old_logp).exp() - 1).abs().max() < 1e-5
        assert logits.shape == (mb.response_mask.sum(), tokenizer.vocab_size)


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_garbage_under_the_padding_of_prompts_changes_nothing(case, rolled, prompts, tokenizer, monkeypatch):
    roles, args, uniforms, clean = rolled(case)

    def collate_garbage(rows):
        ids, mask = collate_prompts(rows)
        return ids.where(mask, torch.randint_like(ids, 3, 300)), mask
    monkeypatch.setattr(ppo, "collate_prompts", collate_garbage)
    dirty = rollout(roles, prompts, uniforms, args, tokenizer)
    assert not torch.equal(clean.ids, dirty.ids)
    tensors = {name for name, x in vars(clean).items() if isinstance(x, torch.Tensor)} - {"ids"}
    assert len(tensors) == 7
    assert all(torch.equal(getattr(clean, name), getattr(dirty, name)) for name in tensors)


def made_up(prompts, answers, adv=True):
    """A Rollout of prompts and answers of these lengths, its numbers all different and 0 outside the
    masks."""
    P, R, n = max(prompts), max(answers), len(prompts)
    mask = torch.zeros(n, P + R, dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        mask[row, P - p:P + a] = True
    tokens = [some(n, R, seed=i) * mask[:, P:] for i in range(5)]
    return Rollout(torch.arange(1, mask.numel() + 1).view_as(mask) * mask, mask, mask[:, P:], P,
                   torch.arange(n) % 2 == 0, some(n), *tokens[:5 if adv else 3])


@pytest.mark.parametrize("adv", [False, True])
def test_rows_of_a_rollout_lose_only_columns_that_are_padding_in_all_of_them(adv):
    batch = made_up([3, 5, 2], [4, 1, 2], adv)
    for rows, start, longest in (([0, 1, 2], 5, 4), ([1, 2], 5, 2), ([2], 2, 2), ([2, 0], 3, 4)):
        cut = batch.select(rows)
        assert cut.start == start and cut.ids.shape == cut.mask.shape == (len(rows), start + longest)
        assert torch.equal(cut.raw_score, batch.raw_score[rows]) and torch.equal(cut.ended, batch.ended[rows])
        for name in ("ids", *TOKENS, *(("adv", "returns") if adv else ())):      # nothing is lost
            x, whole = getattr(cut, name), getattr(batch, name)[rows]
            assert torch.equal(x[x != 0], whole[whole != 0]) and len(x) == len(rows)
        assert torch.equal(cut.response_mask, cut.mask[:, start:])       # a response still starts at `start`
    assert adv or batch.select([0]).adv is None


def test_the_micro_batches_of_all_ranks_are_the_mini_batch_and_like_lengths_stand_together(monkeypatch):
    batch = made_up([3] * 12, [5, 1, 4, 2, 6, 3, 1, 2, 3, 4, 5, 6])
    rows, world = torch.tensor([11, 0, 1, 4, 2, 3, 6, 9]), 2
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        micros = my_micro_batches(batch, rows, 2)
        assert [len(mb.raw_score) for mb in micros] == [2, 2]
        lengths = [mb.response_mask.sum(1).tolist() for mb in micros]
        assert sum(lengths, []) == sorted(sum(lengths, []))
        seen += [score for mb in micros for score in mb.raw_score.tolist()]
    assert sorted(seen) == sorted(batch.raw_score[rows].tolist())


# ------------------------------------------------------------------------------------------ what main adds up
def test_an_answer_without_eos_pays_the_penalty_and_one_with_eos_does_not():
    batch = made_up([2, 2, 2], [3, 1, 2])
    args = SimpleNamespace(missing_eos_penalty=0.5, score_clip=1.0)
    batch.ref_logp = batch.old_logp          # no KL: what remains is the score's reward
    rewards = token_rewards(batch, torch.tensor([0.25, 3.0, -0.5]), 0.1, args)
    assert batch.ended.tolist() == [True, False, True]
    assert rewards.sum(1).tolist() == pytest.approx([0.25, 1.0 - 0.5, -0.5])
    assert rewards[[0, 1, 2], [2, 0, 1]].tolist() == pytest.approx([0.25, 0.5, -0.5])


def test_rewards_of_a_batch_pay_beta_for_the_kl_to_the_reference():
    batch, args = made_up([2, 2], [3, 2]), SimpleNamespace(missing_eos_penalty=0.0, score_clip=5.0)
    rewards = token_rewards(batch, torch.zeros(2), 0.3, args)
    assert torch.allclose(rewards, -0.3 * (batch.old_logp - batch.ref_logp) * batch.response_mask)


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02),
                                        (5.4, 0.99), (0.0, 0.98), (-9.0, 0.98)])
def test_beta_is_steered_by_at_most_a_fifth_of_the_gain(kl, factor):
    assert steered(0.5, kl, 6.0, 0.1) == pytest.approx(0.5 * factor)


def test_advantages_are_whitened_and_returns_are_not():
    rewards, values = some(4, 6), some(4, 6, seed=1)
    adv, returns = advantages(rewards, values, MASK, 0.99, 0.95)
    raw, expected = gae(rewards, values, MASK, 0.99, 0.95)
    assert torch.equal(adv, whiten(raw, MASK)) and torch.equal(returns, expected)


def kl_gradient(logits, ref, through_rewards):
    """The exact expectation, over a bandit's arms, of the gradient by the logits of the KL term: as PPO
    passes it through rewards, GAE and the policy loss, or as the k1 estimate itself put into the loss."""
    policy, gradient = logits.softmax(-1), torch.zeros_like(logits)
    for arm in range(len(logits)):           # each arm is a batch of one answer of one token
        x = logits.clone().requires_grad_()
        new_logp = x.log_softmax(-1)[arm].view(1, 1)
        old_logp, ref_logp, mask = new_logp.detach(), ref.log_softmax(-1)[arm].view(1, 1), torch.ones(1, 1)
        if through_rewards:
            no_score = torch.zeros(1, dtype=x.dtype)
            rewards = shape_rewards(no_score, old_logp, ref_logp, mask, kl_coef=1.0, clip=5.0)
            adv, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
            loss = policy_loss(new_logp, old_logp, adv, mask, 0.2)
        else:
            loss = kl_per_token(new_logp, ref_logp, mask).sum()
        loss.backward()
        gradient += policy[arm] * x.grad
    return gradient


def test_the_kl_term_in_the_reward_has_the_gradient_of_the_kl_divergence_and_in_the_loss_none():
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits, ref = (torch.randn(8, generator=rng, dtype=torch.float64) for _ in range(2))
        x = logits.clone().requires_grad_()
        (x.softmax(-1) * (x.log_softmax(-1) - ref.log_softmax(-1))).sum().backward()
        true = x.grad
        for through_rewards, expected in ((True, 1), (False, 0)):
            found = kl_gradient(logits, ref, through_rewards)
            assert abs((found @ true) / (true @ true) - expected) < 1e-6


SCORES = torch.arange(4.0)


def test_what_goes_astray_is_said_once_with_its_cause_and_the_flag_to_turn(capsys, tmp_path):
    sane = {"kl": 3.0, "first_ratio": 1.0, "approx_kl": 0.01, "length": 20.0, "eos_share": 0.9}
    log = Log(SimpleNamespace(out=tmp_path, log_every=1), 9, 0, ppo.CURVES)
    ppo.warn(log, sane, SCORES)
    assert capsys.readouterr().err == ""
    for name, value, flag in (("kl", 60.0, "--kl-coef"), ("first_ratio", 1.3, "--dtype"),
                              ("approx_kl", 0.7, "--actor-lr"), ("length", 1.0, "samples.jsonl"),
                              ("eos_share", 0.0, "--max-new")):
        for _ in range(3):
            ppo.warn(log, {**sane, name: value}, SCORES)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: step 0: ") and name in line and flag in line
    ppo.warn(log, sane, torch.ones(4))
    assert "same score" in capsys.readouterr().err
    ppo.warn(log, {**sane, "kl": float("nan")}, SCORES)    # of NaN, the count of skipped updates tells
    assert capsys.readouterr().err == ""
    log.file.close()


# ------------------------------------------------------------------------------------------ ranks
@pytest.fixture(scope="module")
def talkers(tokenizer_file, tmp_path_factory):
    """Folders of a model whose answers have many lengths, of an actor's and a reward model's adapter on it,
    and of a full reward model."""
    root = tmp_path_factory.mktemp("talkers")
    talker = save_talker(root / "talker", tokenizer_file)
    for name, kind, task in (("actor", Llama, "CAUSAL_LM"), ("reward", RewardModel, "SEQ_CLS")):
        model = kind.from_pretrained(talker)
        add_lora(model, 2, 4, ["q_proj", "down_proj"])
        randomize(model, 6)
        save_adapter(model, root / name, "default", talker, task)
    reward = RewardModel.from_pretrained(talker)
    randomize(reward, 2)
    reward.save_pretrained(root / "full-reward")
    copy_tokenizer(tokenizer_file.parent, root / "full-reward")
    for name in ("reward", "full-reward"):
        (root / name / "reward_stats.json").write_text('{"mean": 0.5, "std": 2.0}')
    return root


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_rollout_of_several_ranks_is_that_of_one_with_its_rows_in_order(
        world, roles_of, talkers, prompts, tokenizer, monkeypatch):
    _, args = roles_of("full", "reward", "--micro-batch", "3", "--max-new", NEW)
    args.actor, args.reward = str(talkers / "talker"), str(talkers / "full-reward")
    roles = build_roles(args, torch.float32, "cpu")
    roles["actor"].network.n_words = tokenizer.vocab_size
    uniforms = torch.rand(N, NEW, generator=random_numbers(0, 0))  # 7 prompts: they do not divide by ranks
    uniforms[:4] = 1e-9                      # these rows answer with EOS alone: some ranks have short answers
    expected = rollout(roles, prompts, uniforms, args, tokenizer)
    lengths = expected.response_mask.sum(1).tolist()
    assert lengths[:4] == [1] * 4 and len(set(lengths)) > 2
    work = lambda rank: rollout(roles, prompts, uniforms, args, tokenizer)  # noqa: E731
    for found in on_ranks(world, work, monkeypatch):
        assert found.start == expected.start
        for name, x in vars(expected).items():
            assert not isinstance(x, torch.Tensor) or torch.allclose(getattr(found, name), x, atol=1e-5), name


def test_measures_are_means_over_ranks(monkeypatch):
    def work(rank):
        measures = Measures()
        for x in (1.0, 2.0):
            measures.add(loss=torch.tensor(x + 10 * rank))
        return measures.means()
    assert on_ranks(2, work, monkeypatch) == [{"loss": 6.5}] * 2


# ------------------------------------------------------------------------------------------ updates
def test_the_moving_average_keeps_its_decay_and_takes_the_rest_of_the_weights():
    weights = {"a": torch.nn.Parameter(torch.tensor([1.0, 3.0]).bfloat16())}
    average = start_average(weights)
    weights["a"].data += 8
    assert average["a"].tolist() == [1.0, 3.0] and average["a"].dtype == torch.float32
    update_average(average, weights, 0.75)
    assert average["a"].tolist() == [3.0, 5.0]


TEXTS = [([1, 50, 60, 70, 80, 2], 3), ([1, 51, 61, 2], 2), ([1, 52, 62, 72, 82, 2], 1), ([1, 53, 2], 2)] * 2


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 2), (2, 2)])
@pytest.mark.parametrize("texts", [[], TEXTS])
def test_an_update_has_the_gradients_of_the_losses_over_its_whole_mini_batch(
        texts, world, micro, roles_of, tokenizer, pairs_file, monkeypatch):
    flags = "--temperature 0.8 --ptx-data x --ptx-coef 0.7 --clip 0.02 --value-clip 0.005 --micro-batch"
    roles, args = roles_of("adapter", "reward-adapter", *flags.split(), micro)
    freeze_untrained(roles)
    roles["actor"].network.n_words = tokenizer.vocab_size
    batch = made_up([3, 5, 2, 4, 1, 3, 2, 6], [4, 1, 2, 6, 3, 5, 2, 1])
    batch.ids = batch.ids * 7 % 300
    mask, rows, whole = batch.response_mask, torch.randperm(8), batch.select(list(range(8)))
    with torch.no_grad():                    # near the networks' own numbers: some are clipped, some are not
        logps, _ = answer_logps(roles["actor"].activate(), whole, 0.8, tokenizer.vocab_size)
        batch.old_logp = logps + 0.02 * batch.old_logp
        batch.values = (response_values(roles["critic"].activate(), whole) + 0.01 * batch.values) * mask

    def update(rank):
        mine = build_roles(args, torch.float32, "cpu")
        trained = freeze_untrained(mine)
        mine["actor"].network.n_words = tokenizer.vocab_size
        measures = Measures()
        my_micros = my_micro_batches(batch, rows, micro)
        total = mask[rows].sum() / (world * len(my_micros))
        for role, weights in trained.items():
            mine[role].engine = PlainEngine(args, mine[role].network, [*weights.values()], 0.0, 1,
                                            len(my_micros), None)
        update_actor(mine["actor"], my_micros, total, args, tokenizer.vocab_size, measures, is_first=True,
                     texts=texts)
        update_critic(mine["critic"], my_micros, total, args, measures)
        return [mine[role].engine.gradients for role in trained], measures.means()

    (actors, critics), measures = on_ranks(world, update, monkeypatch)[0]
    trained, whole = freeze_untrained(roles), batch.select(list(range(8)))
    new_logp, logits = answer_logps(roles["actor"].activate(), whole, 0.8, tokenizer.vocab_size)
    loss = policy_loss(new_logp, whole.old_logp, whole.adv, mask, 0.02)
    moved = policy_measures(new_logp, whole.old_logp, mask, 0.02, mask.sum())
    expected = {"policy_loss": loss, "entropy": entropy(logits, 0.8) / mask.sum(), **moved}
    expected["first_ratio"] = expected.pop("ratio")
    assert 0.1 < moved["clip_frac"] < 0.9
    if texts:
        expected["ptx_loss"] = rows_loss(roles["actor"].network, texts, n_labels(texts), "cpu")
        loss = loss + 0.7 * expected["ptx_loss"]
    actor_gradient = gradient_of(loss, trained["actor"])
    values = response_values(roles["critic"].activate(), whole)
    expected["value_loss"] = value_loss(values, whole.values, whole.returns, mask, 0.005)
    critic_gradient = gradient_of(expected["value_loss"], trained["critic"])
    for found, gradient in ((actors, actor_gradient), (critics, critic_gradient)):
        assert len(found) == 1 and (found[0] - gradient).abs().max() < 1e-4 * gradient.abs().max()
    assert measures == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-4)


def gradient_of(loss, weights):
    loss.backward()
    return torch.cat([p.grad.flatten() for p in weights.values()])


# ------------------------------------------------------------------------------------------ the loop
LOOP = ("--max-prompt 32 --max-new 8 --rollout-batch 8 --mini-batch 4 --ppo-epochs 2 --steps 3 "
        "--eval-every 2 --eval-prompts 5 --temperature 0.7 --kl-coef 0.05 --score-clip 3 "
        "--missing-eos-penalty 0.5 --gamma 0.97 --lam 0.9 --clip 0.15 --value-clip 0.25 "
        "--actor-lr 0.01 --critic-lr 0.001 --ema 0.9")
MORE = "--kl-target 0.01 --kl-gain 0.5 --reward-norm rollout --norm-prompts 11 --ptx-coef 0.5 --actor-lr 1"


@pytest.fixture(scope="module")
def jobs(talkers, pairs_file, tmp_path_factory):
    """The command lines of PPO on one base with every option, and of PPO that trains all weights."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"the sky is blue {'so ' * (i % 5)}"} for i in range(20)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = {"one base": f"--actor {talkers}/actor --reward {talkers}/reward {LOOP} {MORE} --ptx-data {text}",
            "all weights": f"--actor {talkers}/talker --reward {talkers}/full-reward {LOOP}"}
    return {name: [*words.split(), "--data", pairs_file] for name, words in jobs.items()}


@pytest.fixture(scope="module")
def reference(jobs, tmp_path_factory):
    """reference(job): a run of it on one rank, and the calls of the functions that main uses."""
    done = {}

    def run(job):
        if job not in done:
            names = ("load_rows", "rollout", "normalise", "token_rewards", "advantages", "policy_loss",
                     "value_loss", "steered", "measure_stats", "my_micro_batches")
            with pytest.MonkeyPatch.context() as patches:
                calls = {name: spy(ppo, name, patches) for name in names}
                out = tmp_path_factory.mktemp("ppo") / "out"
                done[job] = train(ppo, [*jobs[job], "--micro-batch", "2"], out, patches), calls
        return done[job]
    return run


KEYS = "step", "prompt", "response"


@pytest.mark.parametrize("job, world, micro", [("one base", 2, 1), ("one base", 1, 4), ("all weights", 2, 2)])
def test_ranks_and_micro_batches_change_nothing(job, world, micro, jobs, reference, tmp_path, monkeypatch):
    expected, _ = reference(job)
    found = train(ppo, [*jobs[job], "--micro-batch", micro], tmp_path / "out", monkeypatch, world)
    assert [line.keys() for line in found.lines] == [line.keys() for line in expected.lines]
    for line, other in zip(found.lines, expected.lines, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    for engine, other in zip(found.engines, expected.engines, strict=True):
        for gradient, its in zip(engine.gradients, other.gradients, strict=True):
            assert (gradient - its).abs().max() <= 1e-3 * its.abs().max()
        assert engine.gradients[0].abs().max() > 0
    samples = [(run.out / "samples.jsonl").read_text().splitlines() for run in (found, expected)]
    for row, other in zip(*(map(json.loads, rows) for rows in samples), strict=True):
        assert [row[key] for key in KEYS] == [other[key] for key in KEYS]


@pytest.mark.parametrize("job", ["one base", "all weights"])
def test_every_number_of_the_algorithm_reaches_the_function_it_belongs_to(job, reference):
    run, calls = reference(job)
    steps = [line for line in run.lines if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [engine.updates for engine in run.engines] == [12, 12]
    assert calls["load_rows"][0][0][1] == 2         # the third share of the pairs
    assert all(call[0][3:] == (0.97, 0.9) for call in calls["advantages"])
    assert all(call[0][4] == 0.15 for call in calls["policy_loss"])
    assert all(call[0][4] == 0.25 for call in calls["value_loss"])
    rollouts = [call[2] for call in calls["rollout"] if len(call[0]) == 5 and len(call[0][1]) == 8][-3:]
    for line, batch, (arguments, _, _) in zip(steps, rollouts, calls["token_rewards"], strict=True):
        assert arguments[0] is batch and arguments[2] == line["beta"]
        kl = kl_per_token(batch.old_logp, batch.ref_logp, batch.response_mask)
        assert line["kl"] == pytest.approx(kl.sum().item() / 8)
        assert line["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert line["length"] == batch.response_mask.sum() / 8 and line["score"] == arguments[1].mean()
    assert steps[0]["kl"] == 0 != steps[1]["kl"]
    if job == "all weights":                 # reward_stats.json, and no target of the KL
        assert torch.equal(calls["token_rewards"][0][0][1], (rollouts[0].raw_score - 0.5) / 2)
        assert not calls["steered"] and all(line["beta"] == 0.05 for line in steps)
    else:
        assert [call[0][2:] for call in calls["steered"]] == [(0.01, 0.5)] * 3
        assert [line["beta"] for line in steps[1:]] == [call[2] for call in calls["steered"][:2]]
        assert 0.05 == steps[0]["beta"] != steps[1]["beta"]


def test_scores_normalised_by_the_references_own_have_mean_zero_and_variance_one(reference):
    _, calls = reference("one base")
    stats = calls["measure_stats"][0][2]
    score = torch.cat([call[2].raw_score for call in calls["rollout"][:2]])        # of 8 prompts, and of 3
    normal = ppo.normalise(score, stats)
    assert len(score) == 11 and score.std() > 0
    assert abs(normal.mean()) < 1e-4 and normal.var(correction=0) == pytest.approx(1, abs=1e-3)


def test_each_step_has_random_numbers_of_its_own_and_each_pass_its_own_mini_batches(reference):
    run, calls = reference("all weights")
    uniforms = [call[0][2] for call in calls["rollout"]]
    held_out, steps = [x for x in uniforms if len(x) != 8], [x for x in uniforms if len(x) == 8]
    assert len(held_out) == len(steps) == 3  # held-out ones before step 1, after 2 and after 3
    assert all(torch.equal(held_out[0], x) for x in held_out[1:])
    assert not any(torch.equal(steps[i], steps[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    for step, x in enumerate(steps, 1):
        assert torch.equal(x, torch.rand(8, 8, generator=random_numbers(1234, step)))
    rows = [call[0][1].tolist() for call in calls["my_micro_batches"]]
    passes = [rows[i] + rows[i + 1] for i in range(0, 12, 2)]      # 3 steps of 2 passes of 2 mini-batches
    assert all(sorted(order) == [*range(8)] for order in passes) and len(set(map(tuple, passes))) == 6
