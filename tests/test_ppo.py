"""PPO's mathematics against its definitions, the rollout, and the four roles."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ppo
from conftest import tiny_llama
from data import Tokenizer, collate_prompts, encode_prompt, read_records
from llama import BadInput, Llama
from lora import add_lora, load_model, save_adapter, use_adapter
from ppo import (build_roles, explained_variance, gae, policy_loss, policy_measures, random_numbers, response_logps,
                 rollout, shape_rewards, token_logps, trained_parameters, trim, value_loss, whiten)
from reward import RewardModel, load_reward_model
from runtime.folders import copy_tokenizer
from runtime.log import Log
from runtime.ranks import say


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged(lengths, width=None):
    """mask (B,R) of answers of these lengths."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


MASK = ragged([3, 6, 1, 5], 6)


# ------------------------------------------------------------------------------------------------ log-probabilities
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
    for r, v, advantage, n in zip(rewards.tolist(), values.tolist(), advantages, lengths):
        v = [*v[:n], 0.0]                    # after the last token nothing is worth anything
        for t in range(n):
            by_hand = math.fsum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(n - t))
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
    dirty = gae(rewards.where(MASK, torch.tensor(1e6)), values.where(MASK, torch.tensor(-1e6)), MASK, 0.99, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


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
    assert torch.equal(whiten(torch.full((1, 3), 2.0), ragged([3])), torch.zeros(1, 3))          # no variance, no NaN


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
    assert result.item() == pytest.approx(loss, rel=1e-5) and new.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize("new, returns, loss, gradient", [
    (1.1, 2.0, 0.5 * 0.9 ** 2, -0.9),        # within the clip of the old value 1
    (1.5, 2.0, 0.5 * 0.8 ** 2, 0.0),         # towards the return, beyond the clip: the clipped error is larger
    (1.5, 0.0, 0.5 * 1.5 ** 2, 1.5),         # away from the return: the true error is larger
    (0.5, 0.0, 0.5 * 0.8 ** 2, 0.0),
    (0.5, 2.0, 0.5 * 1.5 ** 2, -1.5),
])
def test_value_loss_takes_the_larger_error(new, returns, loss, gradient):
    new = torch.tensor([[new]], requires_grad=True)
    result = value_loss(new, torch.tensor([[1.0]]), torch.tensor([[returns]]), torch.ones(1, 1), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-5) and new.grad.item() == pytest.approx(gradient, rel=1e-5)


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
            **dict(zip(("advantages", "returns"), gae(x[0], x[1], mask, 0.9, 0.9))),
            "policy_loss": policy_loss(*x, mask, 0.2), "value_loss": value_loss(*x, mask, 0.2),
            "measures": torch.stack(policy_measures(x[0], logits, x[1], mask, 0.2, 1.0, mask.sum()))}


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_a_mask_of_any_type_means_the_same(dtype):
    expected, found = call_all(MASK), call_all(MASK.to(dtype))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tensors_of_tokens_are_zero_outside_the_mask():
    results = call_all(MASK)
    for key in ("rewards", "whiten", "advantages", "returns"):
        assert results[key][~MASK].abs().max() == 0 and results[key][MASK].abs().min() > 0, key


def test_no_function_writes_into_its_arguments():
    x, mask, logits = [some(4, 6, seed=i) for i in range(3)], MASK.clone(), some(15, 7)
    before = [t.clone() for t in (*x, mask, logits)]
    call_all(mask, x, logits)
    token_logps(logits, torch.zeros(15, dtype=torch.long), 0.5)
    explained_variance(x[0], x[1], mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (*x, mask, logits)))


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
    measures = policy_measures(old + ratio.log(), logits, old, mask, 0.2, temperature=2.0, total=4)
    kl = sum(r - 1 - math.log(r) for r in (1.5, 0.9, 0.5)) / 4
    entropy = (3 * math.log(4) + 0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 4    # at temperature 2: 3/4 and 1/4
    assert [float(m) for m in measures] == pytest.approx([(1.5 + 0.9 + 0.5 + 1) / 4, 0.5, kl, entropy], rel=1e-5)


def test_random_numbers_depend_on_seed_and_step_alone():
    def draw(*key):
        return tuple(torch.rand(4, generator=random_numbers(*key)).tolist())
    torch.manual_seed(1)
    first = draw(7, 3)
    torch.manual_seed(2)
    assert draw(7, 3) == first
    assert len({draw(seed, step) for seed in (0, 1, 7) for step in (-1, 0, 1, 2)}) == 12


# ------------------------------------------------------------------------------------------------ folders and roles
@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of this process alone: what ranks do together, it does with itself. On one thread, since on a
    busy machine tiny matrices wait for the other threads far longer than they take."""
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
    """Folders of actors and reward models by name: full ones, adapters on the base, and an adapter on another base."""
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
        flags = ["--actor", folders[actor], "--reward", folders[reward], "--data", "none", "--out", "none", *flags]
        monkeypatch.setattr("sys.argv", ["ppo.py", *map(str, flags)])
        args = ppo.get_args()
        return build_roles(args, torch.float32, "cpu"), args
    return build


LORA = ("--lora-rank", "2", "--lora-targets", "q_proj,o_proj")
CASES = {  # actor folder, reward folder, flags, networks in memory, adapters of actor, ref, critic, reward
    "all weights": ("full", "reward", (), 4, (None, None, None, None)),
    "all weights, reward adapter on the same base": ("full", "reward-adapter", (), 3, (None, None, "critic", "reward")),
    "new adapters": ("full", "reward", LORA, 2, ("actor", None, "critic", None)),
    "new adapter, reward adapter on the same base": (
        "full", "reward-adapter", LORA, 1, ("actor", None, "critic", "reward")),
    "adapters on one base": ("adapter", "reward-adapter", (), 1, ("actor", "ref", "critic", "reward")),
    "adapters on two bases": ("adapter", "reward-other", (), 2, ("actor", "ref", "critic", "reward")),
    "actor adapter, full reward model": ("adapter", "reward", (), 3, ("actor", "ref", None, None)),
}
FIXED = torch.tensor([[1, 300, 20, 3, 7, 44]])
EVERYWHERE = torch.ones_like(FIXED, dtype=torch.bool)
ROLES = ("actor", "ref", "critic", "reward")


def outputs(roles):
    """What each role says of a fixed text."""
    said = {}
    for role in ROLES:
        use_adapter(*roles[role])
        said[role] = roles[role][0](FIXED, EVERYWHERE)
    return said


def storages(roles):
    """data_ptr -> number of entries of the distinct parameters of all roles."""
    return {p.data_ptr(): p.numel() for model, _ in roles.values() for p in model.parameters()}


@pytest.mark.parametrize("case", CASES)
def test_roles_share_networks_where_they_can(case, roles_of):
    actor, reward, flags, networks, adapters = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    assert tuple(roles) == ROLES and tuple(name for _, name in roles.values()) == adapters
    assert len({model.model.layers[0].mlp.up_proj.weight.data_ptr() for model, _ in roles.values()}) == networks
    assert len({model.model.embed_tokens.weight.data_ptr() for model, _ in roles.values()}) == networks


@pytest.mark.parametrize("case", ["adapters on one base", "new adapter, reward adapter on the same base"])
def test_four_roles_on_one_base_take_the_memory_of_about_one(case, roles_of, base):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    one = sum(p.numel() for p in Llama.from_pretrained(base).parameters())
    in_memory = storages(roles)
    for name, parameter in Llama.from_pretrained(base).named_parameters():
        for model, _ in roles.values():
            if hasattr(model, "lm_head") or name != "lm_head.weight":
                shared = model.get_parameter(name)
                assert shared.data_ptr() == roles["actor"][0].get_parameter(name).data_ptr()
                assert torch.equal(shared, parameter)
    assert one < sum(in_memory.values()) < 1.2 * one


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_each_role_says_what_its_folder_says_alone(case, roles_of, folders):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    logits, scores = (m(FIXED, EVERYWHERE) for m in (load_model(folders[actor]), load_reward_model(folders[reward])))
    said = outputs(roles)
    assert torch.equal(said["actor"], said["ref"]) and torch.equal(said["critic"], said["reward"])
    assert torch.allclose(said["actor"], logits, atol=1e-5) and torch.allclose(said["reward"], scores, atol=1e-5)
    if actor == "adapter":                   # and an adapter says something else than its base
        assert (said["actor"] - load_model(folders["full"])(FIXED, EVERYWHERE)).abs().max() > 0.01


def test_a_new_adapter_beside_an_adapter_is_refused(roles_of):
    with pytest.raises(BadInput, match="--lora-rank"):
        roles_of("adapter", "reward-adapter", *LORA)


def test_a_temperature_of_zero_is_refused(roles_of):
    with pytest.raises(BadInput, match="--temperature"):
        roles_of("full", "reward", "--temperature", "0")


@pytest.mark.parametrize("case", CASES)
def test_only_adapters_or_all_weights_and_the_critics_score_are_trained(case, roles_of):
    actor, reward, flags, _, adapters = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    trained = trained_parameters(roles)
    for role, name in zip(ROLES, adapters):
        if role in trained:
            model = roles[role][0]
            expected = {id(p) for path, p in model.named_parameters()
                        if name is None or path.endswith(f".{name}.weight") or path == "score.weight"}
            assert expected == {id(p) for p in trained[role]} and len(expected) == len(trained[role])
    kept = {id(p) for parameters in trained.values() for p in parameters}
    assert all(p.requires_grad == (id(p) in kept) for model, _ in roles.values() for p in model.parameters())
    assert not any(module.training for model, _ in roles.values() for module in model.modules())
    mine, theirs = roles["critic"][0].score.weight, roles["reward"][0].score.weight
    assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert mine.requires_grad and not theirs.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_actor_and_the_critic_and_neither_of_the_frozen_roles(case, roles_of):
    actor, reward, flags, *_ = CASES[case]
    roles, _ = roles_of(actor, reward, *flags)
    trained = trained_parameters(roles)
    with torch.no_grad():
        before = outputs(roles)
    for role, other in (("actor", "critic"), ("critic", "actor")):
        use_adapter(*roles[role])
        roles[role][0](FIXED, EVERYWHERE).square().mean().backward()
        assert all(p.grad is None for p in trained[other])
        optimizer = torch.optim.SGD(trained[role], lr=0.1)
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
    """rolled(case) -> (roles, args, uniforms, batch); the rows of even number have small random numbers, so that ids of
    low number are drawn, and EOS is id 2. moved: after actor and critic have left what they started from."""
    def roll(case, moved=False):
        actor, reward, flags, *_ = CASES[case]
        flags = (*flags, "--temperature", "0.8", "--micro-batch", "3", "--max-new", NEW)
        roles, args = roles_of(actor, reward, *flags)
        trained = trained_parameters(roles)
        for parameter in (p for parameters in trained.values() for p in parameters if moved):
            parameter.data += 0.02 * some(*parameter.shape)
        roles["actor"][0].n_words = tokenizer.vocab_size
        uniforms = torch.rand(N, NEW, generator=random_numbers(0, 0))
        uniforms[::2] *= 0.02
        return roles, args, uniforms, rollout(roles, prompts, uniforms, args, tokenizer)
    return roll


ONE, FOUR = "adapters on one base", "all weights"


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_a_rollout_is_one_batch_of_left_padded_prompts_and_right_padded_answers(case, rolled, prompts):
    *_, batch = rolled(case)
    mask, P = batch["response_mask"], max(map(len, prompts))
    R = mask.shape[1]
    assert 1 < R <= NEW and batch["ids"].shape == batch["mask"].shape == (N, P + R)
    assert all(batch[key].shape == (N, R) for key in ("old_logp", "ref_logp", "values"))
    assert batch["score"].shape == batch["ended"].shape == (N,) and batch["score"].dtype == torch.float32
    assert torch.equal(batch["ids"][:, :P], collate_prompts(prompts)[0])
    assert torch.equal(batch["mask"], torch.cat([collate_prompts(prompts)[1], mask], 1))
    assert all((batch[key] == 0).equal(~mask) for key in ("old_logp", "ref_logp", "values"))
    assert batch["ids"][~batch["mask"]].eq(0).all()


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_an_answer_is_what_the_actor_generates_for_its_prompt_alone(case, rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(case)
    use_adapter(*roles["actor"])
    R = batch["response_mask"].shape[1]
    for i, prompt in enumerate(prompts):
        ids, mask = roles["actor"][0].generate(*collate_prompts([prompt]), NEW, args.temperature,
                                               eos_id=tokenizer.eos_id, uniforms=uniforms[i:i + 1])
        assert ids[0, mask[0]].tolist() == batch["ids"][i, -R:][batch["response_mask"][i]].tolist()
        assert batch["ended"][i] == (ids[0, -1] == tokenizer.eos_id)
    assert batch["ended"].any() and not batch["ended"].all()


def test_an_answer_whose_eos_is_the_last_token_there_is_room_for_has_ended(rolled, prompts, tokenizer):
    roles, args, uniforms, batch = rolled(ONE)
    lengths = batch["response_mask"].sum(1)
    args.max_new = int(lengths[batch["ended"]].max())
    cut = rollout(roles, prompts, uniforms[:, :args.max_new], args, tokenizer)
    assert torch.equal(cut["ended"], batch["ended"]) and args.max_new < NEW
    assert torch.equal(cut["response_mask"].sum(1), lengths.clamp(max=args.max_new))


@torch.no_grad()
@pytest.mark.parametrize("case", [ONE, FOUR])
def test_every_role_judges_an_answer_as_it_would_the_text_alone(case, rolled, prompts, tokenizer):
    roles, args, _, batch = rolled(case, moved=True)
    assert (batch["old_logp"] - batch["ref_logp"]).abs().max() > 1e-3
    for i, prompt in enumerate(prompts):
        text, n = batch["ids"][i:i + 1][batch["mask"][i:i + 1]][None], batch["response_mask"][i].sum()
        everywhere = torch.ones_like(text, dtype=torch.bool)
        for key, role in (("old_logp", "actor"), ("ref_logp", "ref")):
            use_adapter(*roles[role])
            logits = roles[role][0](text, everywhere)[0, len(prompt) - 1:-1, :tokenizer.vocab_size].double()
            expected = (logits / args.temperature).log_softmax(-1).gather(1, text[0, len(prompt):, None])[:, 0]
            assert (batch[key][i, :n] - expected).abs().max() < 1e-5
        use_adapter(*roles["critic"])
        before = roles["critic"][0](text, everywhere)[0, len(prompt) - 1:-1]         # what it says before each token
        assert torch.allclose(batch["values"][i, :n], before, atol=1e-5)
        use_adapter(*roles["reward"])
        assert torch.allclose(batch["score"][i], roles["reward"][0](text, everywhere)[0, -1], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_before_training_the_divergence_from_the_reference_is_exactly_zero(case, rolled):
    *_, batch = rolled(case)
    assert torch.equal(batch["old_logp"], batch["ref_logp"])


@torch.no_grad()
@pytest.mark.parametrize("case", [ONE, FOUR])
def test_the_first_ratio_is_one_in_micro_batches_of_any_company(case, rolled, tokenizer):
    roles, args, _, batch = rolled(case)
    use_adapter(*roles["actor"])
    for rows in torch.randperm(N, generator=random_numbers(0, 1)).split(2):
        logp, logits = response_logps(roles["actor"][0], batch["ids"][rows], batch["mask"][rows],
                                      batch["response_mask"][rows], args.temperature, tokenizer.vocab_size)
        assert ((logp - batch["old_logp"][rows]).exp() - 1).abs().max() < 1e-5
        assert logits.shape == (batch["response_mask"][rows].sum(), tokenizer.vocab_size)


@pytest.mark.parametrize("case", [ONE, FOUR])
def test_garbage_under_the_padding_of_prompts_changes_nothing(case, rolled, prompts, tokenizer, monkeypatch):
    roles, args, uniforms, clean = rolled(case)

    def collate_garbage(rows):
        ids, mask = collate_prompts(rows)
        return ids.where(mask, torch.randint_like(ids, 3, 300)), mask
    monkeypatch.setattr(ppo, "collate_prompts", collate_garbage)
    dirty = rollout(roles, prompts, uniforms, args, tokenizer)
    assert not torch.equal(clean.pop("ids"), dirty.pop("ids"))
    assert all(torch.equal(clean[key], dirty[key]) for key in clean)


def test_trim_leaves_rows_whole_and_takes_only_columns_that_are_padding_in_all_of_them():
    prompts, answers, P, R = [3, 5, 2], [4, 1, 2], 5, 4
    mask = torch.zeros(3, P + R, dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        mask[row, P - p:P + a] = True
    batch = {"ids": torch.arange(1, 28).view(3, 9) * mask, "mask": mask, "response_mask": mask[:, P:],
             "values": some(3, R) * mask[:, P:], "score": some(3)}
    for rows, start, longest in (([0, 1, 2], 5, 4), ([1, 2], 5, 2), ([2], 2, 2), ([2, 0], 3, 4)):
        cut, at = trim(batch, rows)
        assert at == start and cut["ids"].shape == cut["mask"].shape == (len(rows), start + longest)
        assert torch.equal(cut["score"], batch["score"][rows])
        for key in ("ids", "values"):        # nothing is lost, and a response still starts at `start`
            assert torch.equal(cut[key][cut[key] != 0], batch[key][rows][batch[key][rows] != 0])
        assert torch.equal(cut["response_mask"], cut["mask"][:, at:])


def test_what_goes_astray_is_said_once_with_its_cause_and_the_flag_to_turn(capsys, tmp_path):
    sane = {"kl": 3.0, "first_ratio": 1.0, "approx_kl": 0.01, "length": 20.0, "eos_share": 0.9}
    log = Log(SimpleNamespace(out=tmp_path, log_every=1), 9, 0, ppo.CURVES)
    ppo.warn(log, sane, constant=False)
    assert capsys.readouterr().err == ""
    for name, value, flag in (("kl", 60.0, "--kl-coef"), ("first_ratio", 1.3, "--dtype"), ("approx_kl", 0.7, "--actor-lr"),
                              ("length", 1.0, "samples.jsonl"), ("eos_share", 0.0, "--max-new")):
        for _ in range(3):
            ppo.warn(log, {**sane, name: value}, constant=False)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: step 0: ") and name in line and flag in line
    ppo.warn(log, sane, constant=True)
    assert "same score" in capsys.readouterr().err
    ppo.warn(log, {**sane, "kl": float("nan")}, constant=False)    # a number that is none is for the count of skipped updates
    assert capsys.readouterr().err == ""
    log.file.close()


def test_no_text_of_a_file_or_a_model_can_take_over_the_terminal(monkeypatch, capsys):
    hostile = "a\x1b[2Jb\x9b31mc\u202ed\x07e"
    assert str(BadInput(f"{hostile}\nsecond")) == "a[2Jb31mcde second"
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    say(hostile)
    assert capsys.readouterr().out == "a[2Jb31mcde\n"
