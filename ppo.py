"""Step 3: reinforcement learning from human feedback, with PPO (arXiv 1707.06347; InstructGPT: 2203.02155).

The actor answers. The reference is the actor before PPO, frozen. The reward model scores whole answers. The
critic predicts, before each token, the reward that is still to come.

1. rollout      the actor samples an answer to each prompt of a global batch
2. score        the reward model scores each answer; scores are normalised
3. rewards      at each token -beta times the KL estimate to the reference; at the last token also the score
4. advantages   by GAE (arXiv 1506.02438), whitened over the batch
5. update       passes over mini-batches: clipped policy loss for the actor, clipped value loss for the critic
6. log          now and then answer held-out prompts; at the end save

Design choices: one temperature for sampling and for all log-probabilities; an answer ends with EOS; every
loss is a mean over the tokens of the whole mini-batch. Not included: another tokenizer for the reward model,
asynchronous rollouts.

    deepspeed ppo.py --actor runs/sft --reward runs/rm --data prompts.jsonl --out runs/ppo
    deepspeed ppo.py                                                          # the toy: flags of toy/ppo.args
"""
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    Tokenizer,
    collate_prompts,
    encode_prompt,
    encode_sft,
    load_records,
    load_rows,
    micro_batches,
    open_tokenizer,
    stream,
)
from llama import Llama, LlamaConfig, is_eos
from lora import add_lora, add_lora_flags, load_adapter, resolve, save_model, use_adapter
from reward import RewardModel, last_scores, load_reward_model
from runtime.checkpoint import Run, stoppable
from runtime.engine import (
    backward_and_step,
    divide_frozen,
    engine_metrics,
    gathered,
    made_whole,
    make_engine,
    room_for_answers,
    save_whole,
)
from runtime.errors import BadInput
from runtime.flags import Flags, accumulation_steps, add_trainer_flags, load_function, number, positive
from runtime.folders import check_out, find_tensors, read_json
from runtime.log import Log
from runtime.ranks import fail_together, gather, max_over_ranks, run, say, setup, sum_over_ranks
from sft import n_labels, rows_loss

def get_args():
    flags = Flags("Step 3 of RLHF: PPO against the reward model.")
    add = flags.group("models")
    add("--actor", help="folder that sft.py wrote, or any LLaMA folder; it is also the reference")
    add("--reward", help="folder that reward.py wrote; the critic starts from it too")
    add("--base", help="base model of an actor that is an adapter, if not at the path in its config")
    add("--reward-base", help="the same for the reward model")
    add = flags.group("data")
    add("--data", nargs="+", help="files of prompts, or any others, whose prompts are taken (docs/data.md)")
    add("--eval-prompts", type=positive, default=64, help="at most so many held-out prompts are answered")
    add("--max-prompt", type=positive, default=256, help="tokens of a prompt; the oldest turns are dropped")
    add("--max-new", type=positive, default=256, help="tokens of an answer")
    add("--gold", help="Python file with gold(prompt, answer) -> number, measured on held-out answers only")
    add = flags.group("rollout and reward")
    add("--rollout-batch", type=positive, default=64, help="prompts per step, over all ranks")
    add("--gen-batch", type=positive,
        help="answers per rank generated at a time; by default as many as a GPU has room for, on a CPU all")
    add("--temperature", type=number(low=0.001), default=1.0, help="of sampling and of all log-probabilities")
    add("--kl-coef", type=number(0), default=0.02, help="beta: what a nat of KL to the reference costs")
    add("--kl-target", type=number(low=0.001),
        help="nats per answer that beta is steered towards (arXiv 1909.08593)")
    add("--kl-gain", type=number(0), default=0.1, needs="--kl-target",
        help="speed of the steering: a step multiplies beta by a factor within 1 +- 0.2 x this")
    add("--reward-norm", default="stats", choices=["stats", "rollout", "none"],
        help="stats: by reward_stats.json; rollout: as measured on the reference's answers; none: raw scores")
    add("--norm-prompts", type=positive, default=256, needs="--reward-norm rollout",
        help="prompts that --reward-norm rollout answers")
    add("--score-clip", type=number(0), default=5.0, help="normalised scores are clamped to +- this")
    add("--missing-eos-penalty", type=number(0), default=0.0,
        help="subtracted, after the clamp, from the score of an answer without EOS")
    add = flags.group("PPO")
    add("--gamma", type=number(0, 1), default=1.0, help="discount per token")
    add("--lam", type=number(0, 1), default=0.95, help="lambda of GAE")
    add("--clip", type=number(0), default=0.2, help="the probability ratio counts within 1 +- this")
    add("--value-clip", type=number(0), default=0.2,
        help="a new value is held within this of the rollout's, in units of the normalised score")
    add("--ppo-epochs", type=positive, default=1, help="passes over each rollout batch")
    add("--mini-batch", type=positive, default=32, help="answers per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="answers per rank and forward pass")
    add("--ptx-data", nargs="+", help="files of text or answers for a pre-training loss beside the policy's")
    add("--ptx-coef", type=number(0), default=27.8, needs="--ptx-data", help="weight of that loss")
    add("--save-critic", action="store_true", help="write the critic too, to OUT/critic")
    add("--ema", type=number(0, 1), nargs="?", const=0.992,
        help="decay of a moving average of the actor, which is kept in OUT/ema")
    add = flags.group("training")
    add("--epochs", type=positive, default=1, help="passes over the prompts")
    add("--steps", type=positive, help="rollouts, instead of --epochs")
    add("--actor-lr", type=number(0), default=9.65e-6, help="highest learning rate of the actor")
    add("--critic-lr", type=number(0), default=5e-6, help="highest learning rate of the critic")
    add("--eval-every", type=positive, default=20, help="steps between answers to held-out prompts")
    add("--log-every", type=positive, default=1, help="steps between lines of metrics.jsonl")
    add_lora_flags(flags)
    add_trainer_flags(flags)                 # --out, --split, --eval-data, --seed, --zero-stage, ...
    return flags.parse("actor", "reward", "data", "out")

# the panels of curves.png: {title: metrics}
CURVES = {"score (standard deviations)": ["score", "eval_score"],
          "gold (true reward of held-out answers)": ["gold"],
          "KL to the reference (nats per answer)": ["kl", "eval_kl"],
          "length (tokens per answer)": ["length", "eval_length"],
          "answers that end (share)": ["eos_share", "eval_eos_share"],
          "entropy (nats per token)": ["entropy"]}

# ------------------------------------------------------------ the mathematics
def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The logits in float32, divided by the temperature."""
    return logits.float() if temperature == 1 else logits.float() / temperature

def token_logps(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log p of ids (N,), or of any other shape, under logits (N,V) at the sampling temperature, in
    float32."""
    logits = at_temperature(logits, temperature).flatten(0, -2)
    # cross-entropy takes one pass over the logits; gather and logsumexp would take three
    return -F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape)

def kl_per_token(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """The estimate (B,R) of KL(actor || reference) at each sampled token, 0 outside the mask: the log-ratio,
    called k1 (http://joschu.net/blog/kl-approx.html). Rewards and logs both call this function, so another
    estimator is a change here: with d the log-ratio, k2 is d**2 / 2 and k3 is exp(-d) - 1 + d. Both are never
    negative and vary less, but as rewards they do not give the gradient of the KL divergence."""
    return (logp - ref_logp) * mask

def shape_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float, clip: float,
                  penalty: float | Tensor = 0.0) -> Tensor:
    """Rewards (B,R): the KL penalty at every token. The last token also gets the clamped score (B,) minus the
    penalty, a number or (B,). The score judges the whole answer, so it comes where the answer is whole: at
    EOS, or where it was cut."""
    rewards = -kl_coef * kl_per_token(logp, ref_logp, mask)
    rows = torch.arange(len(mask), device=mask.device)
    last = mask.long().sum(1) - 1            # (B,), because the mask of an answer is ones, then zeros
    rewards[rows, last] += score.clamp(-clip, clip) - penalty
    return rewards * mask                    # for an answer without tokens, which rollout never makes

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages A and returns A + V, both (B,R), 0 outside the mask.
        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
    values[:, t] is the value of the state before token t. After the last token the value is 0, also where an
    answer was cut: no reward comes any more."""
    rewards, values = rewards * mask, values * mask
    next_values = F.pad(values, (0, 1))[:, 1:]
    deltas = rewards + gamma * next_values - values
    adv, next_adv = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        adv[:, t] = next_adv = (deltas[:, t] + gamma * lam * next_adv) * mask[:, t]
    return adv, adv + values

def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / standard deviation over the mask, 0 outside it."""
    n = mask.sum().clamp(min=1)
    x = (x - (x * mask).sum() / n) * mask
    return x * torch.rsqrt((x**2).sum() / n + 1e-8)

def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
               lam: float) -> tuple[Tensor, Tensor]:
    """Advantages for the policy, whitened, and returns for the critic, not whitened; both (B,R). Another
    baseline than the critic goes here."""
    adv, returns = gae(rewards, values, mask, gamma, lam)
    return whiten(adv, mask), returns

def policy_loss(new_logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, clip: float,
                total: float | Tensor | None = None) -> Tensor:
    """PPO's clipped loss (equation 7): the sum over the tokens (B,R) divided by total, by default their
    number. main passes the mean number of tokens per micro-batch, over all ranks."""
    ratio = ((new_logp - old_logp) * mask).exp()         # masked first: exp(0) in the padding, never inf * 0
    losses = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)) * mask
    return losses.sum() / (mask.sum().clamp(min=1) if total is None else total)

def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float,
               total: float | Tensor | None = None) -> Tensor:
    """Half the larger of two squared errors (B,R): of the new values, and of the new values held within clip
    of the old ones. It is the sum over the tokens divided by total, by default their number."""
    clipped = old + (new - old).clamp(-clip, clip)
    losses = 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2) * mask
    return losses.sum() / (mask.sum().clamp(min=1) if total is None else total)

# ------------------------------------------------------------ what is measured
def entropy(logits: Tensor, temperature: float) -> Tensor:
    """The entropy in nats, summed over the rows of logits (N,V)."""
    # 64 rows at a time: a copy of all the logits would be the step's peak of memory
    logps = (at_temperature(rows, temperature).log_softmax(-1) for rows in logits.detach().split(64))
    return sum(-(logp.exp() * logp).sum() for logp in logps)

def policy_measures(new_logp: Tensor, old_logp: Tensor, mask: Tensor, clip: float,
                    total: float | Tensor) -> dict[str, Tensor]:
    """How far the update has moved the policy; sums over the tokens (B,R) divided by total. approx_kl is
    Schulman's k3 estimate of KL(old || new)."""
    log_ratio = (new_logp.detach() - old_logp) * mask
    ratio = log_ratio.exp()
    return {"ratio": (ratio * mask).sum() / total,
            "clip_frac": (((ratio - 1).abs() > clip) * mask).sum() / total,
            "approx_kl": (ratio - 1 - log_ratio).sum() / total}

def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """The share of the returns' variance that the values predict: 1 is all, 0 is no better than a
    constant."""
    errors, targets = (returns - values)[mask].double(), returns[mask].double()
    return float(1 - errors.var(correction=0) / targets.var(correction=0).clamp(min=1e-8))

class Measures:
    """Named numbers of each micro-batch. Each is a sum over tokens divided by the total of its loss, so its
    mean over the micro-batches of all ranks is the mean over the tokens of the mini-batch. Of several
    mini-batches, the mean of their means is taken."""
    def __init__(self):
        self.numbers = defaultdict(list)

    def add(self, **numbers: Tensor):
        for name, x in numbers.items():
            self.numbers[name].append(x.detach())

    def means(self) -> dict[str, float]:
        sums = sum_over_ranks(*(float(torch.stack(x).mean()) for x in self.numbers.values()))
        return {name: x / dist.get_world_size() for name, x in zip(self.numbers, sums, strict=True)}

# ------------------------------------------------------------ the four roles
@dataclass
class Role:
    """A network and the adapter that makes it play this role; None is the network without an adapter. Actor
    and critic have a DeepSpeed engine, which trains them."""
    network: Llama | RewardModel
    adapter: str | None = None
    engine: object | None = None

    def activate(self) -> Llama | RewardModel:
        """Switches the network to this role. Other roles may share it, so never between a forward and its
        backward."""
        use_adapter(self.network, self.adapter)
        return self.network

    def weights(self) -> dict[str, nn.Parameter]:
        """What training this role changes: its adapter (and score head), or all weights."""
        def mine(name):                      # such as layers.0.self_attn.q_proj.lora_A.actor.weight
            return name == "score.weight" or (".lora_" in name and name.endswith(f".{self.adapter}.weight"))

        named = self.network.named_parameters()
        return {name: p for name, p in named if self.adapter is None or mine(name)}

def build_roles(args: Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Role]:
    """The four roles, on as few networks as possible. The left half is for --actor's folder, the right half
    for --reward's:

    folder              the actor trains          reference         the critic trains         reward model
    an adapter          a copy of the adapter     the adapter       a copy of the adapter     the adapter
    full, --lora-rank   a new adapter             no adapter        a new adapter             no adapter
    full                all weights               a second network  all weights               a second network

    If the actor has an adapter and --reward is an adapter on the same base, all four roles share one network.
    At first the critic predicts raw scores; it takes some steps to learn the normalised scale."""
    base, adapter = resolve(args.actor, args.base)
    reward_base, reward_adapter = resolve(args.reward, args.reward_base)
    lora = args.lora_rank, args.lora_alpha, args.lora_targets

    actor = Llama.from_pretrained(base, dtype, device)
    if adapter:
        load_adapter(actor, adapter, "ref")
        load_adapter(actor, adapter, "actor")
        roles = {"actor": Role(actor, "actor"), "ref": Role(actor, "ref")}
    elif args.lora_rank:
        add_lora(actor, *lora, name="actor")
        roles = {"actor": Role(actor, "actor"), "ref": Role(actor)}
    else:
        # frozen: under ZeRO-3 each rank keeps a piece, else no change
        ref = divide_frozen(Llama.from_pretrained(base, dtype, device), args, dtype)
        roles = {"actor": Role(actor), "ref": Role(ref)}

    shared = actor.model if roles["actor"].adapter and reward_adapter and reward_base == base else None
    reward = load_reward_model(args.reward, dtype, device, args.reward_base, name="reward", share=shared)
    if reward_adapter:
        critic = RewardModel(reward.config, reward.model)          # one transformer, two score heads
        load_adapter(critic, reward_adapter, "critic")
        roles |= {"critic": Role(critic, "critic"), "reward": Role(reward, "reward")}
    elif args.lora_rank:
        critic = RewardModel(reward.config, reward.model)
        critic.score.load_state_dict(reward.score.state_dict())
        add_lora(critic, *lora, name="critic")
        roles |= {"critic": Role(critic, "critic"), "reward": Role(reward)}
    else:
        reward = divide_frozen(reward, args, dtype)    # now, so that the critic has room to load
        roles |= {"critic": Role(load_reward_model(args.reward, dtype, device)), "reward": Role(reward)}

    n = len({id(role.network.model) for role in roles.values()})
    adapters = ", ".join(role.adapter for role in roles.values() if role.adapter) or "none"
    say(f"four roles on {n} network{'s' * (n > 1)} in memory; adapters: {adapters}")
    return roles

def freeze_untrained(roles: dict[str, Role]) -> dict[str, dict[str, nn.Parameter]]:
    """Freezes all weights but those that actor and critic train, which it returns as {role: {name: weight}}.
    Switches dropout off everywhere: with dropout the first ratio would not be 1."""
    trained = {name: roles[name].weights() for name in ("actor", "critic")}
    kept = {id(p) for weights in trained.values() for p in weights.values()}
    for role in roles.values():
        role.network.eval()
        for p in role.network.parameters():
            p.requires_grad_(id(p) in kept)
    return trained

def add_engines(args: Namespace, roles: dict[str, Role], trained: dict[str, dict[str, nn.Parameter]],
                updates: int, accumulation: int, dtype: torch.dtype):
    """Gives actor and critic the DeepSpeed engines that train them. Both may stand on one transformer: each
    engine has only its own role's weights in its optimiser."""
    shares = roles["actor"].network.model is roles["critic"].network.model
    for name, lr in (("actor", args.actor_lr), ("critic", args.critic_lr)):
        weights = [*trained[name].values()]
        roles[name].engine = make_engine(args, roles[name].network, weights, lr, updates, accumulation, dtype,
                                         shares)

# ------------------------------------------------------------ 1. rollout, 2. score
@dataclass
class Rollout:
    """A batch of prompts and answers. Prompts are padded on the left, so every response starts at column
    `start` (P)."""
    ids: Tensor                              # (B,T), T = P + R
    mask: Tensor                             # (B,T)
    response_mask: Tensor                    # (B,R)
    start: int
    ended: Tensor                            # (B,) whether the answer has an EOS
    raw_score: Tensor                        # (B,) as it comes from the reward model
    old_logp: Tensor                         # (B,R), like the next four: log p under the actor that sampled
    ref_logp: Tensor                         # log p under the reference
    values: Tensor                           # the critic's, before each token of the response
    adv: Tensor | None = None                # advantages
    returns: Tensor | None = None

    def select(self, rows: list[int] | Tensor) -> "Rollout":
        """These rows, without the columns that are padding in all of them."""
        first = int(self.mask[rows].any(0).int().argmax())         # the first column with a token
        longest = int(self.response_mask[rows].sum(1).max())
        text, response = slice(first, self.start + longest), slice(longest)
        part = Rollout(self.ids[rows, text], self.mask[rows, text], self.response_mask[rows, response],
                       self.start - first, self.ended[rows], self.raw_score[rows],
                       self.old_logp[rows, response], self.ref_logp[rows, response],
                       self.values[rows, response])
        if self.adv is not None:
            part.adv, part.returns = self.adv[rows, response], self.returns[rows, response]
        return part

    @property
    def kl(self) -> Tensor:
        """The KL estimate (B,) of each answer, in nats."""
        return kl_per_token(self.old_logp, self.ref_logp, self.response_mask).sum(1)

    def of_all_ranks(self, n: int) -> "Rollout":
        """All ranks' rows, in the order of the ranks. Only the first n: the last ranks may have copies of a
        row besides, so that all ranks have equally many (my_share)."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: gather(x)[:n] for name, x in tensors.items()})

def answer_logps(model, mb: Rollout, temperature: float, n_words: int) -> tuple[Tensor, Tensor]:
    """log p (B,R) of the responses of a micro-batch, 0 outside the mask, and the logits (N,n_words) of the N
    response tokens. model: the language model, or the DeepSpeed engine around it. n_words: the tokenizer's
    size; larger ids are never sampled."""
    predicts = F.pad(mb.response_mask, (mb.start - 1, 1))          # (B,T): column t predicts token t + 1
    logits = model(mb.ids, mb.mask, at=predicts)[:, :n_words]      # (N,n_words), row by row
    logps = token_logps(logits, mb.ids[:, mb.start:][mb.response_mask], temperature)    # (N,), as the logits
    return torch.zeros_like(mb.old_logp).masked_scatter(mb.response_mask, logps), logits

def response_values(model, mb: Rollout) -> Tensor:
    """The critic's values (B,R): column j is the value before response token j, which the critic gives at the
    token before, column start - 1 + j of the text. model: the critic, or the DeepSpeed engine around it."""
    return model(mb.ids, mb.mask)[:, mb.start - 1:-1]

def score_answers(roles: dict[str, Role], mb: Rollout, tokenizer: Tokenizer) -> Tensor:
    """The raw score (B,) of each answer, from the reward model. To score by a rule instead, change this
    function, in which answer i is tokenizer.decode(mb.ids[i, mb.start:][mb.response_mask[i]].tolist()), and
    pass --reward-norm none."""
    return last_scores(roles["reward"].activate()(mb.ids, mb.mask), mb.mask)

def normalise(score: Tensor, stats: dict[str, float]) -> Tensor:
    """Raw scores in standard deviations from the mean: by default those of the scores of held-out chosen
    answers, which reward.py has saved in reward_stats.json (--reward-norm)."""
    return (score - stats["mean"]) / stats["std"]

@torch.no_grad()
def rollout(roles: dict[str, Role], prompts: list[list[int]], uniforms: Tensor, args: Namespace,
            tokenizer: Tokenizer, watch: Callable = iter) -> Rollout:
    """Samples an answer to each prompt (ids with BOS), and computes log-probabilities, values and scores.
    Each rank does a share of the rows, all ranks get the whole. uniforms (n,max_new) are the random numbers
    of each row, so an answer depends neither on the other rows nor on the number of ranks, up to rounding.
    watch wraps the loops over tokens and micro-batches, so that a signal can stop an evaluation. iter does
    nothing: in training, a signal lets the step finish."""
    ids, mask, uniforms = my_share(prompts, uniforms, roles["actor"].network.lm_head.weight.device)
    response, response_mask = answers(roles, ids, mask, uniforms, args, tokenizer, watch)          # (B,R)
    per_token = torch.zeros(3, *response.shape, device=ids.device)
    mine = Rollout(torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1), response_mask,
                   start=ids.shape[1], ended=(is_eos(response, tokenizer.eos_ids) & response_mask).any(1),
                   raw_score=torch.zeros(len(ids), device=ids.device), old_logp=per_token[0],
                   ref_logp=per_token[1], values=per_token[2])
    for rows in watch(mine.mask.sum(1).argsort().split(args.micro_batch)):     # like lengths: little padding
        mb = mine.select(rows)
        columns = slice(mb.response_mask.shape[1])
        for name, logp in (("actor", mine.old_logp), ("ref", mine.ref_logp)):          # writes rows of mine
            model = roles[name].activate()
            logp[rows, columns] = answer_logps(model, mb, args.temperature, tokenizer.vocab_size)[0]
        values = response_values(roles["critic"].activate(), mb)
        mine.values[rows, columns] = values * mb.response_mask
        mine.raw_score[rows] = score_answers(roles, mb, tokenizer)
    return mine.of_all_ranks(len(prompts))

def my_share(prompts: list[list[int]], uniforms: Tensor,
             device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of ids, mask (B,P) and uniforms (B,max_new). All ranks get equally many, because they
    wait for each other: copies of the first prompt fill up the last ranks, and their answers are dropped."""
    rank, world = dist.get_rank(), dist.get_world_size()
    fillers = -len(prompts) % world
    ids, mask = collate_prompts(prompts + prompts[:1] * fillers)   # padded together, so P is one on all ranks
    uniforms = torch.cat([uniforms, uniforms[:1].expand(fillers, -1)])
    share = len(ids) // world
    return tuple(x[rank * share:(rank + 1) * share].to(device) for x in (ids, mask, uniforms))

def answers(roles: dict[str, Role], ids: Tensor, mask: Tensor, uniforms: Tensor, args: Namespace,
            tokenizer: Tokenizer, watch: Callable) -> tuple[Tensor, Tensor]:
    """The actor's answers to this rank's prompts ids, mask (B,P), --gen-batch of them at a time: response
    ids and mask (B,R). R is the length of the longest answer of any rank."""
    actor, at_once = roles["actor"].activate(), args.gen_batch or len(ids)
    pieces = zip(ids.split(at_once), mask.split(at_once), uniforms.split(at_once), strict=True)
    responses, masks = [], []
    # ZeRO-3: the actor whole, without the hooks that either engine put on it
    with made_whole(actor, [role.engine for role in roles.values() if role.engine]):
        for piece_ids, piece_mask, piece_uniforms in pieces:
            response, response_mask = actor.generate(
                piece_ids, piece_mask, args.max_new, args.temperature, eos_id=tokenizer.eos_ids,
                uniforms=piece_uniforms, watch=watch)
            missing = (0, args.max_new - response.shape[1])        # columns on the right
            responses.append(F.pad(response, missing))
            masks.append(F.pad(response_mask, missing))
    response, response_mask = torch.cat(responses), torch.cat(masks)
    longest = int(max_over_ranks(int(response_mask.any(0).sum()))[0])
    return response[:, :longest], response_mask[:, :longest]

def random_numbers(seed: int, step: int) -> torch.Generator:
    """A generator that depends on the seed and the step alone, so it is the same on every rank."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)

HELD_OUT, NORM = 0, -1                       # in place of a step, for answers that belong to no training step

# ------------------------------------------------------------ 3. rewards
def token_rewards(batch: Rollout, score: Tensor, beta: float, args: Namespace) -> Tensor:
    """Rewards (B,R) of a batch with normalised scores (B,). An answer without EOS may cost
    --missing-eos-penalty."""
    penalty = torch.where(batch.ended, 0.0, args.missing_eos_penalty)
    return shape_rewards(score, batch.old_logp, batch.ref_logp, batch.response_mask, beta, args.score_clip,
                         penalty)

def steered(beta: float, kl: float, target: float, gain: float) -> float:
    """beta after a step with this KL: larger where the KL is above the target, smaller below it (arXiv
    1909.08593)."""
    return beta * (1 + gain * max(-0.2, min(0.2, kl / target - 1)))

# ------------------------------------------------------------ 5. update
def my_micro_batches(batch: Rollout, rows: Tensor, micro_batch: int) -> list[Rollout]:
    """This rank's micro-batches of a mini-batch, which is given by its row numbers."""
    lengths = batch.mask.sum(1).tolist()
    by_length = sorted(rows.tolist(), key=lambda row: lengths[row])            # like lengths: little padding
    mine = micro_batches(by_length, dist.get_rank(), dist.get_world_size(), micro_batch)
    return [batch.select(some) for some in mine]

def update_actor(role: Role, my_micros: list[Rollout], total: Tensor, args: Namespace, n_words: int,
                 measures: Measures, is_first: bool, texts: list):
    """One optimiser step of the actor on a mini-batch, of which my_micros is this rank's part. The engine
    counts the backward passes and updates after the last of them. total: what the loss of a micro-batch is
    divided by, the mean number of tokens per micro-batch. texts: rows of the pre-training mix, as many as
    the mini-batch has answers; their loss is added (InstructGPT's PPO-ptx)."""
    role.activate()                          # no other role on its network until the last backward is done
    world = dist.get_world_size()
    text_micros = micro_batches(texts, dist.get_rank(), world, args.micro_batch)
    for i, mb in enumerate(my_micros):
        new_logp, logits = answer_logps(role.engine, mb, args.temperature, n_words)
        loss = policy_loss(new_logp, mb.old_logp, mb.adv, mb.response_mask, args.clip, total)
        moved = policy_measures(new_logp, mb.old_logp, mb.response_mask, args.clip, total)
        measures.add(policy_loss=loss, entropy=entropy(logits, args.temperature) / total,
                     clip_frac=moved["clip_frac"], approx_kl=moved["approx_kl"])
        if is_first:
            measures.add(first_ratio=moved["ratio"])
        del logits                           # (N,V), which the backward pass does not need
        if texts:
            ptx_total = n_labels(texts) / (world * len(my_micros))
            ptx_loss = rows_loss(role.engine, text_micros[i], ptx_total, new_logp.device)
            measures.add(ptx_loss=ptx_loss)
            loss = loss + args.ptx_coef * ptx_loss
        backward_and_step(role.engine, loss)

def update_critic(role: Role, my_micros: list[Rollout], total: Tensor, args: Namespace, measures: Measures):
    """One optimiser step of the critic on the same micro-batches."""
    role.activate()
    for mb in my_micros:
        new_values = response_values(role.engine, mb)
        loss = value_loss(new_values, mb.values, mb.returns, mb.response_mask, args.value_clip, total)
        measures.add(value_loss=loss)
        backward_and_step(role.engine, loss)

def start_average(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the weights in float32, the moving average before the first update. Rank 0 alone has one, in
    the CPU's memory: that of full training takes 27 GB for a 7B."""
    average = {}
    for name, p in weights.items():
        with gathered([p]):
            if dist.get_rank() == 0:
                average[name] = p.detach().to("cpu", torch.float32, copy=True)
    return average

def update_average(average: dict[str, Tensor], weights: dict[str, nn.Parameter], decay: float):
    """Moves rank 0's average towards the weights."""
    for name, p in weights.items():
        with gathered([p]):
            if name in average:              # on rank 0
                average[name].lerp_(p.detach().to("cpu", torch.float32), 1 - decay)

# ------------------------------------------------------------ 6. log
def summary(batch: Rollout, score: Tensor) -> dict[str, float]:
    """Means over the answers of a batch with normalised scores (B,)."""
    return {"score": float(score.mean()), "kl": float(batch.kl.mean()),
            "length": float(batch.response_mask.sum(1).double().mean()),
            "eos_share": float(batch.ended.double().mean())}

def answer_held_out(roles: dict[str, Role], prompts: list[list[int]], args: Namespace, tokenizer: Tokenizer,
                    stats: dict[str, float], gold: Callable | None) -> tuple[list[dict], dict[str, float]]:
    """(samples, means): a row for samples.jsonl with an answer to each held-out prompt, and the means over
    these rows. The random numbers are the same each time."""
    uniforms = torch.rand(len(prompts), args.max_new, generator=random_numbers(args.seed, HELD_OUT))
    watch = partial(stoppable, label="held-out answers")
    batch = rollout(roles, prompts, uniforms, args, tokenizer, watch)
    score, responses = normalise(batch.raw_score, stats), batch.ids[:, batch.start:]
    answer_ids = [ids[keep].tolist() for ids, keep in zip(responses, batch.response_mask, strict=True)]
    rows = zip(prompts, answer_ids, score.tolist(), batch.kl.tolist(), strict=True)
    samples = [{"prompt": tokenizer.decode(prompt), "response": tokenizer.decode(answer), "score": s, "kl": k}
               for prompt, answer, s, k in rows]
    means = {f"eval_{name}": mean for name, mean in summary(batch, score).items()}
    if gold:
        for sample in samples:
            sample["gold"] = float(gold(sample["prompt"], sample["response"]))
        means["gold"] = sum(sample["gold"] for sample in samples) / len(samples)
    return samples, means

def save_models(args: Namespace, roles: dict[str, Role], tokenizer_folder: Path, average: dict[str, Tensor],
                weights: dict[str, nn.Parameter]):
    """Writes the actor to OUT, and if asked for, the critic to OUT/critic and the average to OUT/ema."""
    out, (actor, critic) = Path(args.out), (roles["actor"], roles["critic"])
    base, reward_base = resolve(args.actor, args.base)[0], resolve(args.reward, args.reward_base)[0]

    # save_whole makes a model's weights whole; then rank 0 calls the function that it is given, with the rest
    def save_average(model, *more):
        for name, mean in average.items():   # it overwrites the weights: nothing is trained after this
            weights[name].data.copy_(mean)
        save_model(model, *more)

    save_whole(actor.network, out, save_model, tokenizer_folder, base, actor.adapter)
    if args.save_critic:
        save_whole(critic.network, out / "critic", save_model, tokenizer_folder, reward_base, critic.adapter)
    if args.ema is not None:
        save_whole(actor.network, out / "ema", save_average, tokenizer_folder, base, actor.adapter)

# (metric, test, usual cause and the flag to turn)
WARNINGS = [
    ("kl", lambda x: x > 50,
     "so far from the reference the score means little; raise --kl-coef, lower --actor-lr"),
    ("kl", lambda x: x < -1,
     "a KL below 0 comes from few or short answers, or half precision; raise --rollout-batch"),
    ("first_ratio", lambda x: abs(x - 1) > 0.1,
     "before any update the ratio should be 1; half precision can keep it from that, try --dtype fp32"),
    ("approx_kl", lambda x: x > 0.5, "one step moves the policy too far; lower --actor-lr or --ppo-epochs"),
    ("length", lambda x: x < 1.5,
     "answers are nearly empty: the reward model may like that best, see samples.jsonl"),
    ("eos_share", lambda x: x == 0, "no answer ends by itself; raise --max-new, or --missing-eos-penalty"),
]

def warn(log: Log, metrics: dict[str, float], score: Tensor):
    """Prints, once each, what is wrong with a step; score (B,) of its answers, clamped."""
    log.warn(bool(score.std(correction=0) < 1e-6),
             "all answers have the same score, from which nothing can be learned; is --score-clip or the "
             "reward model the reason, or does no answer earn anything yet?")
    for name, is_wrong, cause in WARNINGS:
        log.warn(is_wrong(metrics[name]), f"{name} has left its bounds: {cause}")

# ------------------------------------------------------------ what is read
PHASE = 2                                    # of --split: the shares 0 and 1 are for sft.py and reward.py

@dataclass
class Inputs:
    """All that the run reads and that needs no weights."""
    accumulation: int                        # micro-batches per rank and optimiser step
    tokenizer: Tokenizer
    tokenizer_folder: Path
    config: LlamaConfig                      # of the actor
    reward_config: LlamaConfig
    stats: dict[str, float] | None           # mean and std of scores; None: they are measured before step 1
    gold: Callable | None                    # (prompt, answer) -> true reward
    train: list[list[int]]                   # prompts, ids with BOS
    held_out: list[list[int]]
    texts: list                              # the pre-training mix: (ids, n_prompt)

def read_inputs(args: Namespace, world: int) -> Inputs:
    """Reads and checks; BadInput where something is wrong, before any weights load."""
    # refuses a mini-batch that does not divide, so all ranks have equally many micro-batches; lowers
    # args.micro_batch to what one rank has of a mini-batch
    accumulation = accumulation_steps(args, "--mini-batch", args.mini_batch, world)
    if args.rollout_batch % args.mini_batch:
        raise BadInput(f"--rollout-batch {args.rollout_batch} does not divide by --mini-batch "
                       f"{args.mini_batch}")
    full, adapter = resolve(args.actor, args.base)
    reward_full, reward_adapter = resolve(args.reward, args.reward_base, "--reward-base")
    check_out(args, full, adapter, reward_full, reward_adapter)
    if args.lora_rank and adapter and reward_adapter:
        raise BadInput(f"--lora-rank: {args.actor} and {args.reward} are adapters already, and copies of "
                       f"them are trained; leave the flag out")
    if not reward_adapter and "score.weight" not in find_tensors(reward_full):
        raise BadInput(f"--reward {args.reward}: is a language model, its scores would be noise; reward.py "
                       f"makes a reward model")
    longest = args.max_prompt + args.max_new
    tokenizer, config, tokenizer_folder = open_tokenizer(args.actor, args.base, longest)
    reward_tokenizer, reward_config, _ = open_tokenizer(args.reward, args.reward_base, longest)
    if not tokenizer.is_same(reward_tokenizer):
        raise BadInput(f"--reward {args.reward}: its tokenizer is not that of --actor {args.actor}; use one "
                       f"base")
    tally = Counter()
    # A question that --data holds out must not be among these texts. The same hash with the same share finds
    # it. With --eval-data nothing is held out of --data.
    records, _ = load_records(args.ptx_data or [], PHASE, split=None, seed=args.split_seed, eval_files=None,
                          eval_share=0 if args.eval_data else args.eval_share, tally=tally)
    texts = [row for record in records if (row := encode_sft(tokenizer, record, longest, tally))]
    if args.ptx_data and len(texts) < args.mini_batch:
        raise BadInput(f"--ptx-data: {len(texts)} usable rows, fewer than one mini-batch of "
                       f"{args.mini_batch}")
    train, held_out = load_rows(args, PHASE, encode_prompt, tokenizer, args.max_prompt, args.rollout_batch,
                                [args.actor, args.reward], tally)
    return Inputs(accumulation, tokenizer, tokenizer_folder, config, reward_config, read_stats(args),
                  load_function(args.gold, "gold", "--gold"), train, held_out[:args.eval_prompts], texts)

def read_stats(args: Namespace) -> dict[str, float] | None:
    """Mean and standard deviation by which scores are normalised; None with --reward-norm rollout."""
    if args.reward_norm != "stats":
        return {"mean": 0.0, "std": 1.0} if args.reward_norm == "none" else None
    file = Path(args.reward) / "reward_stats.json"
    if not file.exists():
        raise BadInput(f"{file}: is missing; --reward-norm rollout measures the scores, --reward-norm none "
                       f"takes them as they are")
    stats = read_json(file)
    mean, std = stats.get("mean"), stats.get("std")
    if not all(type(x) in (int, float) and abs(x) < 1e12 for x in (mean, std)) or std <= 0:
        raise BadInput(f"{file}: mean and std are {mean!r} and {std!r}")
    return stats

def measure_stats(roles: dict[str, Role], prompts: list[list[int]], args: Namespace,
                  tokenizer: Tokenizer) -> dict[str, float]:
    """Mean and standard deviation of the scores of the reference's answers (--reward-norm rollout): the
    actor's, which is the reference before step 1."""
    prompts, watch = prompts[:args.norm_prompts], partial(stoppable, label="answers, for their scores")
    uniforms = torch.rand(len(prompts), args.max_new, generator=random_numbers(args.seed, NORM))
    parts = [slice(at, at + args.rollout_batch) for at in range(0, len(prompts), args.rollout_batch)]
    rollouts = [rollout(roles, prompts[part], uniforms[part], args, tokenizer, watch) for part in parts]
    score = torch.cat([batch.raw_score for batch in rollouts])
    return {"mean": float(score.mean()), "std": max(float(score.std(correction=0)), 1e-6)}

# ------------------------------------------------------------ PPO
def main():
    args = get_args()
    rank, world, device, dtype = setup(args)
    with fail_together():
        inputs = read_inputs(args, world)
    with fail_together():
        roles = build_roles(args, dtype, device)
    tokenizer, train = inputs.tokenizer, inputs.train
    actor, critic = roles["actor"].network, roles["critic"].network
    # these configs have the tokenizer's BOS and EOS
    actor.config, critic.config, actor.n_words = inputs.config, inputs.reward_config, tokenizer.vocab_size
    actor.model.checkpointing = critic.model.checkpointing = args.checkpointing
    trained, lengths = freeze_untrained(roles), [len(prompt) for prompt in train]
    steps = args.steps or args.epochs * (len(train) // args.rollout_batch)
    updates = args.ppo_epochs * args.rollout_batch // args.mini_batch                   # per step
    # makes --out, or finds the checkpoint that --resume goes on from, if its data had these lengths
    state = Run(args, lengths)
    for role, weights in trained.items():    # resumed: read here, before the engines make float32 copies
        state.track_weights({f"{role}.{name}": weight for name, weight in weights.items()})
    add_engines(args, roles, trained, steps * updates, inputs.accumulation, dtype)
    state.track_engines(actor=roles["actor"].engine, critic=roles["critic"].engine)
    average = start_average(trained["actor"]) if args.ema is not None else {}          # rank 0's
    state.track_weights({f"ema.{i}": mean for i, mean in enumerate(average.values())}, on_all_ranks=False)
    args.gen_batch = args.gen_batch or room_for_answers(args, actor, state.engines.values())
    state.record(gen_batch=args.gen_batch)
    # extra is empty in a new run; if stats is None then, the evaluation before step 1 measures it
    stats, beta = state.extra.get("stats", inputs.stats), state.extra.get("beta", args.kl_coef)
    mix = stream([len(ids) for ids, _ in inputs.texts], args.mini_batch, args.seed, done=state.step * updates)
    log = Log(args, steps, rank, CURVES, state.step)

    def evaluate(step):
        nonlocal stats
        with state.evaluation(step, log):    # if a signal stops it, the resumed run does it first
            stats = stats or measure_stats(roles, train, args, tokenizer)
            samples, means = answer_held_out(roles, inputs.held_out, args, tokenizer, stats, inputs.gold)
            log.samples(step, samples)
            log.line(step=step, **means)

    if state.evaluation_due:                 # always in a new run
        evaluate(state.step)
    for step, epoch, row_numbers in stream(lengths, args.rollout_batch, args.seed, state.step, steps):
        # 1. rollout: one global batch, its random numbers drawn from (seed, step) alone
        rng = random_numbers(args.seed, step)
        uniforms = torch.rand(args.rollout_batch, args.max_new, generator=rng)
        batch = rollout(roles, [train[i] for i in row_numbers], uniforms, args, tokenizer)

        # 2. score: the reward model's, in standard deviations
        score = normalise(batch.raw_score, stats)                                       # (B,)

        # 3. rewards: the KL penalty at every token, the score at the last one
        rewards = token_rewards(batch, score, beta, args)                               # (B,R)

        # 4. advantages: of the whole batch, on every rank alike
        batch.adv, batch.returns = advantages(rewards, batch.values, batch.response_mask,
                                              args.gamma, args.lam)

        # 5. update: each rank trains its share of every mini-batch
        measures, lr = Measures(), roles["actor"].engine.get_lr()[0]
        for ppo_epoch in range(args.ppo_epochs):
            order = torch.randperm(args.rollout_batch, generator=rng)
            for n, rows in enumerate(order.split(args.mini_batch)):
                my_micros = my_micro_batches(batch, rows, args.micro_batch)
                # DeepSpeed takes the mean over the micro-batches of all ranks. Each is divided by the mean
                # number of tokens of a micro-batch, so this mean is all losses / all tokens.
                total = batch.response_mask[rows].sum() / (world * len(my_micros))
                _, _, text_rows = next(mix) if inputs.texts else (0, 0, [])
                texts = [inputs.texts[i] for i in text_rows]
                update_actor(roles["actor"], my_micros, total, args, tokenizer.vocab_size, measures,
                             is_first=(ppo_epoch, n) == (0, 0), texts=texts)
                update_critic(roles["critic"], my_micros, total, args, measures)
                if args.ema is not None:
                    update_average(average, trained["actor"], args.ema)

        # 6. log, now and then answer held-out prompts
        metrics = {**summary(batch, score), **measures.means(), "beta": beta, "lr": lr,
                   "explained_var": explained_variance(batch.values, batch.returns, batch.response_mask)}
        log.step(int(batch.mask.sum()), epoch=epoch, **metrics, **engine_metrics(roles["actor"].engine))
        warn(log, metrics, score.clamp(-args.score_clip, args.score_clip))
        if args.kl_target:
            beta = steered(beta, metrics["kl"], args.kl_target, args.kl_gain)
        state.extra.update(beta=beta, stats=stats)
        if step % args.eval_every == 0 or step == steps:
            evaluate(step)
        if step < steps:                     # no checkpoint after the last step: the models are written now
            state.end_step(step, row_numbers, log)       # may save; an error names the rows

    save_models(args, roles, inputs.tokenizer_folder, average, trained["actor"])
    state.finish(log)

if __name__ == "__main__":
    run(main)
