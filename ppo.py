"""Step 3: reinforcement learning from human feedback, with PPO (arXiv 1707.06347; InstructGPT: 2203.02155). The
actor answers, the reference is the actor before training, the reward model scores, the critic predicts the score:

1. rollout    the actor samples an answer to each prompt of a global batch
2. score      the reward model scores the answers; the score is normalised
3. rewards    minus beta times the log-ratio to the reference at each token, plus the score at the last one
4. advantages by GAE (arXiv 1506.02438), whitened over the batch
5. update     some passes over mini-batches: clipped policy loss for the actor, clipped value loss for the critic
6. log, now and then answer held-out prompts; at the end save

Chosen here: one temperature for sampling and all log-probabilities; EOS ends an answer; value 0 after the last
token; token means over the whole mini-batch. Left out: reward models on another tokenizer, asynchronous rollouts.

    deepspeed ppo.py --actor runs/sft --reward runs/rm --data prompts.jsonl --out runs/ppo
    deepspeed ppo.py                                                          # the toy: flags of toy/ppo.args
"""
import argparse
import importlib.util
import json
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (collate_prompts, collate_sft, deal, encode_prompt, encode_sft, load_records, load_rows, open_tokenizer,
                  stream)
from llama import BadInput, Llama
from lora import adapter_parameters, add_lora, load_adapter, resolve, save, use_adapter
from reward import RewardModel, last_scores, load_reward_model
from runtime.checkpoint import RunState
from runtime.engine import descend, engine_metrics, gathered, make_engine
from runtime.flags import accumulate, add_engine_flags, number, parse, positive
from runtime.folders import check_folders, find_tensors, read_json, writing
from runtime.log import Log
from runtime.ranks import fail_together, gather, run, say, setup, sum_over_ranks
from sft import n_labels, response_logits, sft_loss

def get_args():
    parser = argparse.ArgumentParser(description="Step 3 of RLHF: PPO against the reward model.")
    add = parser.add_argument_group("models").add_argument
    add("--actor", help="folder of sft.py, full or adapter, or any LLaMA's; the reference is this model as it is")
    add("--reward", help="folder of reward.py, full or adapter; the critic starts from it")
    add("--base", help="base model of an actor that is an adapter, where it is not where its config says")
    add("--reward-base", help="the same for the reward model")
    add("--lora-rank", type=number(0, kind=int), default=0, help="rank of new adapters; 0 trains all weights")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="files of prompts, or any others, of which the prompts are taken (README, data)")
    add("--eval-prompts", type=positive, default=64, help="held-out prompts that are answered, at most")
    add("--max-prompt", type=positive, default=256, help="tokens of a prompt; the oldest turns go first")
    add("--max-new", type=positive, default=256, help="tokens of an answer")
    add("--gold", help="Python file with gold(prompt, answer) -> number, measured on held-out answers only")
    add = parser.add_argument_group("rollout and reward").add_argument
    add("--rollout-batch", type=positive, default=64, help="prompts per step, over all ranks")
    add("--temperature", type=number(0.001), default=1.0, help="of sampling and of all log-probabilities")
    add("--kl-coef", type=number(0), default=0.02, help="beta: what a nat of log-ratio to the reference costs")
    add("--kl-target", type=number(0), help="nats per answer that beta is steered towards (arXiv 1909.08593)")
    add("--kl-gain", type=number(0), default=0.1, help="how fast: beta changes by at most 0.2 times this per step")
    add("--reward-norm", default="stats", choices=["stats", "rollout", "none"],
        help="mean and deviation of scores: reward_stats.json's, or of the reference's answers before step 1")
    add("--norm-prompts", type=positive, default=256, help="prompts that --reward-norm rollout answers")
    add("--score-clip", type=number(0), default=5.0, help="normalised scores are clamped to plus or minus this")
    add("--missing-eos-penalty", type=number(0), default=0.0, help="taken off the score of an answer without EOS")
    add = parser.add_argument_group("PPO").add_argument
    add("--gamma", type=number(0, 1), default=1.0, help="discount per token")
    add("--lam", type=number(0, 1), default=0.95, help="lambda of GAE")
    add("--clip", type=number(0), default=0.2, help="the probability ratio counts within 1 plus or minus this")
    add("--value-clip", type=number(0), default=0.2, help="a new value counts only within this of the rollout's value")
    add("--ppo-epochs", type=positive, default=1, help="passes over each rollout batch")
    add("--mini-batch", type=positive, default=32, help="answers per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="answers per rank and forward pass")
    add("--ptx-data", nargs="+", help="files of text or answers for a pre-training loss beside the policy's")
    add("--ptx-coef", type=number(0), default=27.8, help="weight of the pre-training loss")
    add("--save-critic", action="store_true", help="write the critic too, to OUT/critic")
    add("--ema", type=number(0, 1), nargs="?", const=0.992, help="keep a moving average of the actor, in OUT/ema")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=1, help="passes over the prompts")
    add("--steps", type=positive, help="rollouts, instead of --epochs")
    add("--actor-lr", type=number(0), default=9.65e-6, help="highest learning rate of the actor")
    add("--critic-lr", type=number(0), default=5e-6, help="highest learning rate of the critic")
    add("--eval-every", type=positive, default=20, help="steps between answers to held-out prompts")
    add("--log-every", type=positive, default=1, help="steps between lines of metrics.jsonl")
    add_engine_flags(parser)
    return parse(parser, "actor", "reward", "data", "out")

CURVES = {"score (standard deviations)": ["score", "eval_score"], "gold (true worth of held-out answers)": ["gold"],
          "KL to the reference (nats per answer)": ["kl", "eval_kl"],
          "length (tokens per answer)": ["length", "eval_length"],
          "answers that end (share)": ["eos_share", "eval_eos_share"], "entropy (nats per token)": ["entropy"]}

# ------------------------------------------------------------------------------------------------ the mathematics
def at_temperature(logits, temperature):
    """Float32 logits divided by the temperature; at 1 without a pass over them."""
    return logits.float() if temperature == 1 else logits.float() / temperature

def token_logps(logits, ids, temperature):
    """log p of each id (...) under logits (...,V) at the sampling temperature, in float32. The cross-entropy is one
    pass forwards and one backwards; gather and logsumexp would take three times as long."""
    logits = at_temperature(logits, temperature).flatten(0, -2)
    return -F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape)

def shape_rewards(score, logp, ref_logp, mask, kl_coef, clip, penalty=0.0):
    """Rewards (B,R): -kl_coef (logp - ref_logp) at every token; at the last one also the clamped score (B,) less
    penalty. The score judges the whole answer, so it comes where the answer is whole: at EOS, or where it was cut.
    logp - ref_logp estimates the KL divergence (k1); for k2 or k3 change it here and in the two lines `kl = ...`."""
    rewards = -kl_coef * (logp - ref_logp) * mask
    last = torch.zeros_like(rewards).scatter(1, (mask.long().sum(1, keepdim=True) - 1).clamp(min=0), 1.0) * mask
    return rewards + last * (score.clamp(-clip, clip) - penalty)[:, None]

def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns (B,R): delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, and A
    + V. values[:, t] is that of the state before token t; after the last token it is 0: nothing comes any more."""
    rewards, values = rewards * mask, values * mask
    deltas = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    advantages, after = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = after = (deltas[:, t] + gamma * lam * after) * mask[:, t]
    return advantages, advantages + values

def whiten(x, mask):
    """(x - mean) / standard deviation over the mask, 0 outside it."""
    n = mask.sum().clamp(min=1)
    x = (x - (x * mask).sum() / n) * mask
    return x * torch.rsqrt((x**2).sum() / n + 1e-8)

def policy_loss(new_logp, old_logp, adv, mask, clip, total=None):
    """PPO's clipped loss (equation 7), the sum over the tokens divided by total (by default their number)."""
    ratio = ((new_logp - old_logp) * mask).exp()
    losses = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)) * mask
    return losses.sum() / (mask.sum().clamp(min=1) if total is None else total)

def value_loss(new, old, returns, mask, clip, total=None):
    """Half the larger squared error of new values, as they are and clipped to within clip of the old ones."""
    clipped = old + (new - old).clamp(-clip, clip)
    losses = 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2) * mask
    return losses.sum() / (mask.sum().clamp(min=1) if total is None else total)

def policy_measures(new_logp, logits, old_logp, mask, clip, temperature, total):
    """Sums over the tokens divided by total: probability ratio, share beyond the clip, KL divergence of the new
    policy from the old (k3), entropy in nats; of new_logp, old_logp, mask (B,R) and logits (N,V)."""
    log_ratio = (new_logp.detach() - old_logp) * mask
    ratio = log_ratio.exp()
    # 64 places at a time: a copy of all the logits would be the step's peak of memory
    logps = (at_temperature(some, temperature).log_softmax(-1) for some in logits.detach().split(64))     # each (64,V)
    entropy = sum(-(logp.exp() * logp).sum() for logp in logps)
    sums = (ratio * mask, ((ratio - 1).abs() > clip) * mask, ratio - 1 - log_ratio, entropy)
    return [x.sum() / total for x in sums]

def explained_variance(values, returns, mask):
    """Share of the returns' variance that the values foresaw: 1 is all, 0 as good as their mean."""
    x, y = (returns - values)[mask].double(), returns[mask].double()
    return float(1 - x.var(correction=0) / y.var(correction=0).clamp(min=1e-8))

# ------------------------------------------------------------------------------------------------ the four roles
def build_roles(args, dtype, device):
    """{role: (model, name of its adapter or None)}; `use_adapter(*roles["actor"])` makes a network play the actor.
    With LoRA the reference is the same network with another adapter or none, and costs no memory; and where the
    reward model is an adapter on the actor's base, one base carries all four roles."""
    full, adapter = resolve(args.actor, args.base)
    reward_full, reward_adapter = resolve(args.reward, args.reward_base)
    if adapter and args.lora_rank:
        raise BadInput(f"--lora-rank: {args.actor} is an adapter already, a copy is trained; leave the flag out")

    if not reward_adapter and "score.weight" not in find_tensors(reward_full):
        raise BadInput(f"--reward {args.reward}: is a language model, its scores would be noise; reward.py makes one")

    # the actor, and the reference: what the actor is now
    actor = Llama.from_pretrained(full, dtype, device)
    if adapter:                              # a copy of the adapter is trained, the original is the reference
        load_adapter(actor, adapter, "ref")
        load_adapter(actor, adapter, "actor")
        roles = {"actor": (actor, "actor"), "ref": (actor, "ref")}
    elif args.lora_rank:                     # a new adapter is trained, the base alone is the reference
        add_lora(actor, args.lora_rank, args.lora_alpha, args.lora_targets, name="actor")
        roles = {"actor": (actor, "actor"), "ref": (actor, None)}
    else:                                    # all weights are trained: the reference is a second network
        roles = {"actor": (actor, None), "ref": (Llama.from_pretrained(full, dtype, device), None)}

    # the critic, and the reward model that it starts from; each has a score head of its own
    share = actor.model if reward_adapter and roles["actor"][1] and reward_full == full else None
    critic = load_reward_model(args.reward, dtype, device, args.reward_base, "critic", share)
    if reward_adapter:
        reward = RewardModel(critic.config, critic.model)
        load_adapter(reward, reward_adapter, "reward")
        roles |= {"critic": (critic, "critic"), "reward": (reward, "reward")}
    elif args.lora_rank:
        add_lora(critic, args.lora_rank, args.lora_alpha, args.lora_targets, name="critic")
        reward = RewardModel(critic.config, critic.model)
        reward.score.load_state_dict(critic.score.state_dict())
        roles |= {"critic": (critic, "critic"), "reward": (reward, None)}
    else:
        roles |= {"critic": (critic, None), "reward": (load_reward_model(args.reward, dtype, device), None)}

    n = len({id(model.model) for model, _ in roles.values()})
    played = (f"{role} = {f'adapter {name}' if name else 'all weights'}" for role, (_, name) in roles.items())
    say(f"four roles on {n} network{'s' * (n > 1)} in memory: " + ", ".join(played))
    return roles

def trained_parameters(roles):
    """What is trained, {"actor": parameters, "critic": parameters (with its score head)}; freezes the rest."""
    trained = {role: adapter_parameters(model, name) if name else list(model.parameters())
               for role, (model, name) in roles.items() if role in ("actor", "critic")}
    if roles["critic"][1]:
        trained["critic"].append(roles["critic"][0].score.weight)
    kept = {id(p) for parameters in trained.values() for p in parameters}
    for model, _ in roles.values():
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
        model.eval()                         # no dropout anywhere in PPO: the first ratio must be 1
    return trained

# ------------------------------------------------------------------------------------------------ the rollout
def response_logps(model, ids, mask, response_mask, temperature, n_words):
    """log p (B,R) of the responses, the last R columns of ids (B,T), and the logits (N,n_words) they come from."""
    P = ids.shape[1] - response_mask.shape[1]
    logits = model(ids, mask, F.pad(response_mask, (P - 1, 1)))[:, :n_words]            # column t predicts t + 1
    logps = token_logps(logits, ids[:, P:][response_mask], temperature)                 # (N,)
    return torch.zeros(response_mask.shape, device=ids.device).masked_scatter(response_mask, logps), logits

@torch.no_grad()
def rollout(roles, prompts, uniforms, args, tokenizer):
    """Samples an answer to each prompt (a list of ids) and lets every role see it; uniforms (n, max_new) are each
    row's random numbers, so an answer depends on no other row nor on the number of ranks. Each rank does a share,
    all get the whole: ids, mask (n,T), response_mask, old_logp, ref_logp, values (n,R), score, ended (n,)."""
    world = dist.get_world_size()
    filler = -len(prompts) % world                                 # equal shares: ranks wait for each other
    ids, mask = collate_prompts(prompts + prompts[:1] * filler)    # one P for all ranks
    uniforms = torch.cat([uniforms, uniforms[:1].expand(filler, -1)])
    share = len(ids) // world
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    actor, P, eos_id = roles["actor"][0], ids.shape[1], tokenizer.eos_id
    ids, mask, uniforms = (x[mine].to(actor.lm_head.weight.device) for x in (ids, mask, uniforms))

    use_adapter(*roles["actor"])
    response, response_mask = actor.generate(ids, mask, args.max_new, args.temperature, eos_id=eos_id,
                                             uniforms=uniforms, together=args.zero_stage == 3)
    longest = torch.tensor(response.shape[1], device=ids.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    grow = (0, int(longest) - response.shape[1])
    response, response_mask = F.pad(response, grow), F.pad(response_mask, grow)         # (B, R), R of all ranks
    ids, mask = torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1)      # (B, T)

    batch = {"ids": ids, "mask": mask, "response_mask": response_mask}
    batch |= {key: torch.zeros(response_mask.shape, device=ids.device) for key in ("old_logp", "ref_logp", "values")}
    batch["score"] = torch.zeros(share, device=ids.device)
    for rows in mask.sum(1).argsort().split(args.micro_batch):     # texts of like length, so that little is padding
        mb, start = trim(batch, rows)
        x, mb_mask = (mb["ids"], mb["mask"]), mb["response_mask"]
        R = mb_mask.shape[1]
        for key, role in (("old_logp", "actor"), ("ref_logp", "ref")):
            use_adapter(*roles[role])
            batch[key][rows, :R] = response_logps(roles[role][0], *x, mb_mask, args.temperature, tokenizer.vocab_size)[0]
        use_adapter(*roles["critic"])
        batch["values"][rows, :R] = roles["critic"][0](*x)[:, start - 1:-1] * mb_mask
        use_adapter(*roles["reward"])
        batch["score"][rows] = last_scores(roles["reward"][0](*x), x[1])
    batch = {k: gather(v)[:len(prompts)] for k, v in batch.items()}
    batch["ended"] = ((batch["ids"][:, P:] == eos_id) & batch["response_mask"]).any(1)
    return batch

def trim(batch, rows):
    """These rows of a batch's tensors (n,T), (n,R) and (n,), less the columns that are padding in all of them; and the
    column where their responses start now."""
    some = {key: x[rows] for key, x in batch.items()}
    T, R = some["mask"].shape[1], some["response_mask"].shape[1]
    first, longest = int(some["mask"].any(0).int().argmax()), int(some["response_mask"].sum(1).max())
    kept = {T: slice(first, T - R + longest), R: slice(longest)}
    return {key: x if x.ndim == 1 else x[:, kept[x.shape[1]]] for key, x in some.items()}, T - R - first

def random_numbers(seed, step):
    """A generator that depends on the seed and the step alone, the same on every rank."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)

def answer_held_out(roles, prompts, args, tokenizer, stats, gold, step, log):
    """Answers held-out prompts, with the same random numbers each time; writes samples.jsonl, logs the means."""
    uniforms = torch.rand(len(prompts), args.max_new, generator=random_numbers(args.seed, 0))
    batch = rollout(roles, prompts, uniforms, args, tokenizer)
    mask, score = batch["response_mask"], (batch["score"] - stats["mean"]) / stats["std"]
    kl = ((batch["old_logp"] - batch["ref_logp"]) * mask).sum(1)
    answers = [ids[keep].tolist() for ids, keep in zip(batch["ids"][:, -mask.shape[1]:], mask)]
    rows = [{"step": step, "prompt": tokenizer.decode(p), "response": tokenizer.decode(a), "score": s, "kl": k}
            for p, a, s, k in zip(prompts, answers, score.tolist(), kl.tolist())]
    means = {"eval_score": score, "eval_kl": kl, "eval_length": mask.sum(1).double(),
             "eval_eos_share": batch["ended"].double()}
    means = {name: float(x.mean()) for name, x in means.items()}
    if gold:
        rows = [{**row, "gold": float(gold(row["prompt"], row["response"]))} for row in rows]
        means["gold"] = sum(row["gold"] for row in rows) / len(rows)
    if dist.get_rank() == 0:
        with writing(args.out), open(Path(args.out) / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    say(f"{rows[0]['prompt']} {rows[0]['response']}\n[score {rows[0]['score']:.2f}, kl {rows[0]['kl']:.2f}]")
    log.line(step=step, **means)

# what a run that goes astray looks like: (metric, whether it is so, its usual cause and what to turn)
WARNINGS = [
    ("kl", lambda x: x > 50, "so far from the reference the score means little; raise --kl-coef, lower --actor-lr"),
    ("kl", lambda x: x < -1, "a KL below 0 is too few or too short answers, or half precision; raise --rollout-batch"),
    ("first_ratio", lambda x: abs(x - 1) > 0.1, "before any update it should be 1: rollout and update disagree, which "
        "half precision can do; try --dtype fp32"),
    ("approx_kl", lambda x: x > 0.5, "one step moves the policy too far; lower --actor-lr or --ppo-epochs"),
    ("length", lambda x: x < 1.5, "answers are next to nothing: the reward model may like that best, see samples.jsonl"),
    ("eos_share", lambda x: x == 0, "no answer ends by itself; raise --max-new, or --missing-eos-penalty"),
]

def warn(log, metrics, constant):
    """Says once each what is wrong with a step; constant: all its answers have one score."""
    log.warn(constant, "all answers have the same score, from which nothing can be learned; is --score-clip or the reward "
             "model the reason?")
    for name, wrong, cause in WARNINGS:
        log.warn(wrong(metrics[name]), f"{name} has left its bounds: {cause}")

# ------------------------------------------------------------------------------------------------ checks, loading
def read_stats(args):
    """Mean and standard deviation by which scores are normalised, where they are known beforehand."""
    if args.reward_norm != "stats":
        return {"mean": 0.0, "std": 1.0}
    file = Path(args.reward) / "reward_stats.json"
    if not file.exists():
        raise BadInput(f"{file}: there is none; --reward-norm rollout measures scores, none takes them raw")
    stats = read_json(file)
    if not all(type(stats.get(k)) in (int, float) and abs(stats[k]) < 1e12 for k in ("mean", "std")) or stats["std"] <= 0:
        raise BadInput(f"{file}: mean and std are {stats.get('mean')!r} and {stats.get('std')!r}")
    return stats

def load_gold(path):
    """The function gold of a Python file of the user's."""
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("gold", path)
    if spec is None or not Path(path).exists():
        raise BadInput(f"--gold {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "gold"):
        raise BadInput(f"--gold {path}: has no function gold(prompt, answer)")
    return module.gold

def read_inputs(args, world):
    """All that needs no weights, checked: (accumulation, tokenizer, its folder, the two configs, statistics of
    scores, gold, and in ids the training prompts, held-out prompts, rows of the pre-training mix)."""
    accumulation = accumulate(args, "--mini-batch", args.mini_batch, world)
    if args.rollout_batch % args.mini_batch:
        raise BadInput(f"--rollout-batch {args.rollout_batch} does not divide by --mini-batch {args.mini_batch}")
    (full, adapter), reward_folders = resolve(args.actor, args.base), resolve(args.reward, args.reward_base)
    check_folders(args, adapter, full, *reward_folders)
    longest = args.max_prompt + args.max_new
    tokenizer, config, folder = open_tokenizer(args.actor, args.base, longest)
    theirs, reward_config, _ = open_tokenizer(args.reward, args.reward_base, longest)
    if theirs.pieces() != tokenizer.pieces():
        raise BadInput(f"--reward {args.reward}: its tokenizer is not that of --actor {args.actor}; use one base")
    tally = Counter()
    mix, _ = load_records(args.ptx_data or [], 2, None, args.split_seed, None, args.eval_share, tally)
    ptx = [row for r in mix if (row := encode_sft(tokenizer, r, longest, tally))]       # nothing held out is in it
    train, held_out = load_rows(args, 2, encode_prompt, tokenizer, args.max_prompt, args.rollout_batch, tally)
    if args.ptx_data and len(ptx) < args.mini_batch:
        raise BadInput(f"--ptx-data: {len(ptx)} usable rows, fewer than one mini-batch of {args.mini_batch}")
    return (accumulation, tokenizer, folder, config, reward_config, read_stats(args), load_gold(args.gold),
            train, held_out[:args.eval_prompts], ptx)

def main():
    args = get_args()
    rank, world, device, dtype = setup(args)
    with fail_together():
        (accumulation, tokenizer, folder, config, reward_config, stats, gold,
         train, held_out, ptx) = read_inputs(args, world)
    with fail_together():
        roles = build_roles(args, dtype, device)
    lengths = [len(prompt) for prompt in train]
    state = RunState(args, lengths)
    (actor, actor_name), (critic, critic_name) = roles["actor"], roles["critic"]
    actor.config, critic.config, actor.n_words = config, reward_config, tokenizer.vocab_size
    actor.model.checkpointing = critic.model.checkpointing = args.checkpointing
    trained = trained_parameters(roles)
    state.track_weights({f"{role}.{name}": p for role, some in trained.items()
                         for name, p in roles[role][0].named_parameters() if any(p is q for q in some)})
    steps = args.steps or args.epochs * (len(train) // args.rollout_batch)
    n_updates = args.ppo_epochs * args.rollout_batch // args.mini_batch                 # per step
    actor_engine, critic_engine = (
        make_engine(args, model, trained[role], lr, steps * n_updates, args.micro_batch, accumulation, dtype)
        for model, role, lr in ((actor, "actor", args.actor_lr), (critic, "critic", args.critic_lr)))
    state.track_engines(actor=actor_engine, critic=critic_engine)
    with gathered(trained["actor"]):
        average = [(p, p.detach().float().clone()) for p in trained["actor"]] if args.ema else []
    state.track_weights({f"ema.{i}": mean for i, (_, mean) in enumerate(average)})
    if state.step:
        stats = state.own["stats"]
    elif args.reward_norm == "rollout":      # the scores of the reference's own answers
        prompts = train[:args.norm_prompts]
        uniforms = torch.rand(len(prompts), args.max_new, generator=random_numbers(args.seed, -1))
        parts = [slice(at, at + args.rollout_batch) for at in range(0, len(prompts), args.rollout_batch)]
        score = torch.cat([rollout(roles, prompts[p], uniforms[p], args, tokenizer)["score"] for p in parts])
        stats = {"mean": float(score.mean()), "std": max(float(score.std(correction=0)), 1e-6)}
    beta, log = state.own.get("beta", args.kl_coef), Log(args, steps, rank, CURVES, state.step)
    ptx_stream = stream([len(ids) for ids, _ in ptx], args.mini_batch, args.seed, state.step * n_updates) if ptx else None
    if not state.step:
        answer_held_out(roles, held_out, args, tokenizer, stats, gold, 0, log)

    for step, (epoch, rows) in zip(range(state.step + 1, steps + 1),
                                   stream(lengths, args.rollout_batch, args.seed, state.step)):
        # 1. rollout: one global batch in a fixed order, its random numbers drawn from (seed, step) alone
        rng = random_numbers(args.seed, step)
        uniforms = torch.rand(args.rollout_batch, args.max_new, generator=rng)
        batch = rollout(roles, [train[i] for i in rows], uniforms, args, tokenizer)
        mask, old_logp, ref_logp = batch["response_mask"], batch["old_logp"], batch["ref_logp"]     # (B, R)

        # 2. score: in units of the standard deviation of scores
        score = (batch["score"] - stats["mean"]) / stats["std"]                         # (B,)

        # 3. rewards: the KL penalty at every token, the score at the last
        penalty = args.missing_eos_penalty * ~batch["ended"]
        rewards = shape_rewards(score, old_logp, ref_logp, mask, beta, args.score_clip, penalty)

        # 4. advantages, of the whole batch on every rank
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, args.gamma, args.lam)
        batch["adv"] = whiten(advantages, mask)

        # 5. update: each rank trains its share of every mini-batch
        measured, lr = [], actor_engine.get_lr()[0]
        passes = [torch.randperm(args.rollout_batch, generator=rng) for _ in range(args.ppo_epochs)]
        text_length = batch["mask"].sum(1).tolist()
        for mini in torch.cat(passes).view(-1, args.mini_batch).tolist():
            total = mask[mini].sum() / (world * accumulation)      # all ranks' tokens; the engines divide by both
            mini.sort(key=lambda row: text_length[row])            # like lengths in a micro-batch: little padding
            micros = [trim(batch, rows) for rows in deal(mini, rank, world, args.micro_batch)]
            mixed = [ptx[i] for i in next(ptx_stream)[1]] if ptx else []
            ptx_total = n_labels(mixed) / (world * accumulation)
            ptx_micros = deal(mixed, rank, world, args.micro_batch)
            actor_losses, critic_losses = [], []

            use_adapter(*roles["actor"])                           # and no other until its last backward is done
            for n, (mb, _) in enumerate(micros):
                mb_mask = mb["response_mask"]
                new_logp, logits = response_logps(actor_engine, mb["ids"], mb["mask"], mb_mask, args.temperature,
                                                  tokenizer.vocab_size)
                actor_loss = policy_loss(new_logp, mb["old_logp"], mb["adv"], mb_mask, args.clip, total)
                measures = policy_measures(new_logp, logits, mb["old_logp"], mb_mask, args.clip,
                                           args.temperature, total)
                del logits                                         # (N,V), not needed in the backward pass
                ptx_loss = torch.zeros_like(actor_loss)
                if ptx:
                    ids, ids_mask, labels = (x.to(device) for x in collate_sft(ptx_micros[n]))
                    ptx_loss = sft_loss(*response_logits(actor_engine, ids, ids_mask, labels), ptx_total)
                descend(actor_engine, actor_loss + args.ptx_coef * ptx_loss)
                actor_losses.append(torch.stack([actor_loss, ptx_loss, *measures]).detach())

            use_adapter(*roles["critic"])
            for mb, start in micros:
                new_values = critic_engine(mb["ids"], mb["mask"])[:, start - 1:-1]
                critic_loss = value_loss(new_values, mb["values"], mb["returns"], mb["response_mask"],
                                         args.value_clip, total)
                descend(critic_engine, critic_loss)
                critic_losses.append(critic_loss.detach()[None])
            measured += [torch.cat(losses) for losses in zip(critic_losses, actor_losses)]
            with gathered(trained["actor"]):
                for p, mean in average:
                    mean.lerp_(p.detach().float(), 1 - args.ema)

        # 6. log, now and then answer held-out prompts
        # token means, once summed over micro-batches and ranks; the ratio of the first mini-batch alone
        value, policy, ptx_loss, ratio, clipped, approx_kl, entropy = torch.stack(measured, 1) / (world * accumulation)
        means = [x.sum() / n_updates for x in (value, policy, ptx_loss, clipped, approx_kl, entropy)]
        value, policy, ptx_loss, clipped, approx_kl, entropy, first_ratio = sum_over_ranks(
            *torch.stack([*means, ratio[:accumulation].sum()]).tolist())
        kl = float(((old_logp - ref_logp) * mask).sum(1).mean())
        metrics = dict(score=float(score.mean()), kl=kl, length=float(mask.sum(1).double().mean()),
                       eos_share=float(batch["ended"].double().mean()), policy_loss=policy, value_loss=value,
                       **({"ptx_loss": ptx_loss} if ptx else {}), approx_kl=approx_kl, first_ratio=first_ratio,
                       clip_frac=clipped, entropy=entropy, beta=beta, lr=lr,
                       explained_var=explained_variance(batch["values"], batch["returns"], mask))
        log.step(int(batch["mask"].sum()), epoch=epoch, **metrics, **engine_metrics(actor_engine))
        warn(log, metrics, bool(score.std(correction=0) < 1e-6))
        if args.kl_target:
            beta *= 1 + args.kl_gain * max(-0.2, min(0.2, kl / args.kl_target - 1))
        if step % args.eval_every == 0 or step == steps:
            answer_held_out(roles, held_out, args, tokenizer, stats, gold, step, log)
        if step < steps:
            state.after(step, rows, log, beta=beta, stats=stats)

    base, reward_base = resolve(args.actor, args.base)[0], resolve(args.reward, args.reward_base)[0]
    save(actor, args.out, rank, folder, actor_name, base)
    if args.save_critic:
        save(critic, Path(args.out) / "critic", rank, folder, critic_name, reward_base)
    if args.ema:
        save(actor, Path(args.out) / "ema", rank, folder, actor_name, base, average)
    state.finish(log)

if __name__ == "__main__":
    run(main)
