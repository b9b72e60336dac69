"""Speed side by side with transformers, on a random LLaMA of 15M parameters (6 layers, 32,000 words).

1. generate   64 prompt and 128 new tokens at temperature 1, none ends early: new tokens per second
2. SFT step   8 rows of 32 to 256 tokens, 40 % of each response, one optimiser step: real tokens per second
3. PPO step   16 prompts, 64 + 64 tokens, rollout and 2 passes of one mini-batch: seconds; no peer yet

Ours are the shipped functions. The peer is transformers' model with the same weights in the same process: its
generate with its own KV cache; its own loss with labels of -100 on prompts and padding, trained by the same
DeepSpeed ZeRO-2 engine and torch AdamW, and for LoRA (rank 8 on q_proj, k_proj) with lora.py's layers in it.

Each number is the median of 3 runs after a warm-up, ours and the peer's in turn, on the GPU if there is one.
In the warm-up both must give the same number of tokens, or the same loss. A ratio above 1: ours is faster.

    python bench/speed.py              # some minutes on two quiet cores
    python bench/speed.py --quick      # smaller in everything: to see that it works, not to compare
"""
import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import sft
from data import collate_sft, deal
from llama import Llama, LlamaConfig
from lora import add_lora, load_model, save_adapter, use_adapter
from reward import RewardModel

RANK, ALPHA, TARGETS = 8, 16.0, ["q_proj", "k_proj"]


def get_args():
    parser = argparse.ArgumentParser(description="Times generate, an SFT step and a PPO step.")
    parser.add_argument("--quick", action="store_true", help="smaller in everything: to see that it works")
    return parser.parse_args()


def flags(script, *given):
    """The flags of a trainer, so that all that is not given is its own default."""
    sys.argv = [script.__file__, *map(str, given)]
    return script.get_args()


def load_peer(folder, device, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).to(device, dtype)


def race(*racers):
    """Median seconds of 3 runs of each function, in turn. The warm-ups must all return the same number, or
    they do not do the same work."""
    first = [float(run()) for run in racers]
    assert all(math.isclose(x, first[0], rel_tol=1e-4) for x in first), f"not the same work: {first}"
    seconds = [[] for _ in racers]
    for _ in range(3):
        for run, times in zip(racers, seconds):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def synchronize():
    """A GPU works behind the program's back: waits until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ 1. generate
def time_generate(base, device, dtype, B, P, new):
    """New tokens per second of ours and of the peer."""
    ours, peer = load_model(base, dtype, device), load_peer(base, device, dtype)
    ids = torch.randint(3, ours.config.vocab_size, (B, P), device=device)
    mask = torch.ones_like(ids)
    peer.generation_config.eos_token_id = None           # or min_new_tokens slows it by 10 %

    def run_ours():
        return ours.generate(ids, mask.bool(), new, temperature=1.0)[1].sum()

    def run_peer():
        # top_k 0: transformers' default of 50 would be another distribution
        out = peer.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                            top_p=1.0, use_cache=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        return out[:, P:].numel()

    return [B * new / seconds for seconds in race(run_ours, run_peer)]


# ------------------------------------------------------------------------------------------------ 2. SFT
def time_sft(base, device, dtype, shortest, longest, lora):
    """Real tokens per second of one optimiser step over one batch of 8, of ours and of the peer."""
    args = flags(sft, "--model", base, "--data", "none", "--out", "none", "--batch", 8, "--micro-batch", 8)
    rng = random.Random(args.seed)
    lengths = [rng.randint(shortest, longest) for _ in range(args.batch)]
    rows = [([rng.randrange(3, 32000) for _ in range(T)], T - round(0.4 * T)) for T in lengths]
    ours, peer = (sft_engine(args, model, dtype, lora)
                  for model in (load_model(base, dtype, device), load_peer(base, device, dtype)))

    def step(engine, loss_of):
        for micro in deal(rows, 0, 1, args.micro_batch):
            ids, mask, labels = (x.to(device) for x in collate_sft(micro))
            loss = loss_of(engine, ids, mask, labels)
            engine.backward(loss)
            engine.step()
        return loss.detach()

    def loss_ours(engine, ids, mask, labels):
        return sft.sft_loss(*sft.response_logits(engine, ids, mask, labels), sft.n_labels(rows))

    def loss_peer(engine, ids, mask, labels):
        return engine(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss

    seconds = race(lambda: step(ours, loss_ours), lambda: step(peer, loss_peer))
    return [sum(lengths) / s for s in seconds]


def sft_engine(args, model, dtype, lora):
    """The trainers' own engine around ours or the peer."""
    if lora:
        add_lora(model, RANK, ALPHA, TARGETS)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return sft.make_engine(args, model, trained, args.lr, 100, args.micro_batch, 1, dtype)


# ------------------------------------------------------------------------------------------------ 3. PPO
def time_ppo(base, folder, device, dtype, B, P, new, lora):
    """Seconds of one step, rollout and update."""
    actor, reward = write_roles(base, folder, lora)
    args = flags(ppo, "--actor", actor, "--reward", reward, "--data", "none", "--out", "none",
                 "--max-new", new, "--rollout-batch", B, "--mini-batch", B, "--micro-batch", B,
                 "--ppo-epochs", 2)
    roles = ppo.build_roles(args, dtype, device)
    trained = ppo.trained_parameters(roles)
    engines = [sft.make_engine(args, roles[role][0], trained[role], lr, 100, args.micro_batch, 1, dtype)
               for role, lr in (("actor", args.actor_lr), ("critic", args.critic_lr))]
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(3, 32000) for _ in range(P)] for _ in range(B)]
    tokenizer = SimpleNamespace(eos_id=-1, vocab_size=32000)       # no word is -1: no answer ends early
    return race(lambda: ppo_step(args, roles, *engines, prompts, tokenizer))


def write_roles(base, folder, lora):
    """Folders of the actor and of the reward model: both full, or two adapters on the base."""
    reward = RewardModel.from_pretrained(base)
    if not lora:
        reward.save_pretrained(folder / "reward")
        return base, folder / "reward"
    for name, model, task in (("actor", load_model(base), "CAUSAL_LM"), ("reward", reward, "SEQ_CLS")):
        add_lora(model, RANK, ALPHA, TARGETS)
        save_adapter(model, folder / f"{name}-lora", "default", base, task)
    return folder / "actor-lora", folder / "reward-lora"


def ppo_step(args, roles, actor_engine, critic_engine, prompts, tokenizer):
    """Steps 1 to 5 of the loop in ppo.main, for one rank, mini-batches of one micro-batch, and no ptx."""
    rng = ppo.random_numbers(args.seed, 1)
    uniforms = torch.rand(args.rollout_batch, args.max_new, generator=rng)
    batch = ppo.rollout(roles, prompts, uniforms, args, tokenizer)
    mask = batch["response_mask"]
    P = batch["ids"].shape[1] - mask.shape[1]
    rewards = ppo.shape_rewards(batch["score"], batch["old_logp"], batch["ref_logp"], mask, args.kl_coef,
                                args.score_clip)
    advantages, batch["returns"] = ppo.gae(rewards, batch["values"], mask, args.gamma, args.lam)
    batch["adv"] = ppo.whiten(advantages, mask)

    passes = [torch.randperm(args.rollout_batch, generator=rng) for _ in range(args.ppo_epochs)]
    for mini in torch.cat(passes).view(-1, args.mini_batch).tolist():
        mb = {k: v[mini] for k, v in batch.items()}
        total = mb["response_mask"].sum()
        use_adapter(*roles["actor"])
        new_logp, logits = ppo.response_logps(actor_engine, mb["ids"], mb["mask"], mb["response_mask"],
                                              args.temperature, tokenizer.vocab_size)
        loss = ppo.policy_loss(new_logp, mb["old_logp"], mb["adv"], mb["response_mask"], args.clip, total)
        actor_engine.backward(loss)
        actor_engine.step()
        use_adapter(*roles["critic"])
        new_values = critic_engine(mb["ids"], mb["mask"])[:, P - 1:-1]
        loss = ppo.value_loss(new_values, mb["values"], mb["returns"], mb["response_mask"], args.value_clip,
                              total)
        critic_engine.backward(loss)
        critic_engine.step()
        # what the loop logs is part of its time
        ppo.policy_measures(new_logp, logits, mb["old_logp"], mb["response_mask"], args.clip,
                            args.temperature, total)
    return mask.sum()


# ------------------------------------------------------------------------------------------------ the table
def measure(folder, device, dtype, quick):
    """Rows (what, unit, ours, the peer's or None)."""
    base = folder / "base"
    Llama(LlamaConfig(hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                      max_position_embeddings=512, tie_word_embeddings=True)).save_pretrained(base)
    rows, P, new = [], 64, 16 if quick else 128
    for B in (1, 4) if quick else (1, 16, 64):
        speeds = time_generate(base, device, dtype, B, P, new)
        rows.append((f"generate {P} + {new}, B = {B}", "tokens/s", *speeds))
    kinds = (("full", False), (f"LoRA {RANK}", True))
    longest = 64 if quick else 256
    for kind, lora in kinds:
        speeds = time_sft(base, device, dtype, 32, longest, lora)
        rows.append((f"SFT step 8 x 32..{longest}, {kind}", "tokens/s", *speeds))
    B, P = (4, 16) if quick else (16, 64)
    for kind, lora in kinds:
        seconds = time_ppo(base, folder, device, dtype, B, P, P, lora)
        rows.append((f"PPO step {B} x ({P} + {P}), {kind}", "seconds", *seconds, None))
    return rows


def print_table(rows, device, dtype):
    print(f"\n{'':36}{'':>10}{'ours':>11}{'peer':>11}{'ratio':>8}")
    for what, unit, ours, peer in rows:
        theirs = f"{'no peer yet':>19}" if peer is None else f"{peer:11,.1f}{ours / peer:8.2f}"
        print(f"{what:36}{unit:>10}{ours:11,.1f}{theirs}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\ntorch {torch.__version__}, peer transformers {transformers.__version__}, {name}, "
          f"{str(dtype)[6:]}, {torch.get_num_threads()} threads, {date.today()}")


def main():
    args = get_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _, _, device, dtype = sft.setup(flags(sft, "--model", "none", "--data", "none", "--out", "none"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), device, dtype, args.quick)
    print_table(rows, device, dtype)
    sft.finish()


if __name__ == "__main__":
    main()
