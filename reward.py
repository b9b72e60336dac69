"""Step 2: the reward model. A LLaMA that learns from pairs of answers which of the two people prefer.

1. read the preference pairs, keep this phase's share, hold some conversations out
2. load a language model; a score head (C -> 1) takes the place of its vocabulary head
3. for every batch of pairs: -log sigmoid(score of the chosen - score of the rejected)
4. before, during and after: accuracy and margin on held-out pairs
5. write the model, and the mean and standard deviation of its scores, by which PPO normalises

An answer's score is the one at its last real token. --loss last compares these; --loss dense compares at every
token from where the two answers part, the shorter one's last score standing on beyond its end.

    deepspeed reward.py --model LLAMA --data pairs.jsonl --out runs/rm --lora-rank 8
    python reward.py --model LLAMA --data pairs.jsonl --out runs/rm           # one process, GPU or CPU
    deepspeed reward.py                                                       # the toy: flags of toy/reward.args
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import collate_pairs, deal, encode_pair, load_rows, open_tokenizer, stream
from llama import BadInput, Linear, LlamaConfig, Transformer
from lora import add_lora, load_adapter, lora_layers, read_adapter_config, resolve, save, use_adapter
from runtime.checkpoint import RunState
from runtime.engine import descend, engine_metrics, make_engine
from runtime.flags import accumulate, add_engine_flags, number, parse, positive
from runtime.folders import check_folders, find_tensors, load_weights, save_weights, writing
from runtime.log import Log
from runtime.ranks import fail_together, run, setup, sum_over_ranks

def get_args():
    parser = argparse.ArgumentParser(description="Step 2 of RLHF: the reward model, from pairs of answers.")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="LLaMA folder to start from, or a reward model's, which is then trained on")
    add("--base", help="base model of an adapter folder, where it is not where the adapter's config says")
    add("--lora-rank", type=number(0, kind=int), default=0, help="rank of a new adapter; 0 trains all weights")
    add("--lora-dropout", type=number(0, 1), default=0.0, help="share of the adapter's inputs dropped in training")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="files of preference pairs (README, data)")
    add("--max-len", type=positive, default=512, help="tokens of prompt and answer together")
    add = parser.add_argument_group("training").add_argument
    add("--loss", default="last", choices=["last", "dense"], help="compare last tokens, or all after they part")
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--steps", type=positive, help="optimiser steps, instead of --epochs")
    add("--batch", type=positive, default=32, help="pairs per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="pairs per rank and forward pass")
    add("--lr", type=number(0), default=5e-5, help="highest learning rate")
    add("--eval-every", type=positive, default=100, help="steps between held-out evaluations")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add_engine_flags(parser)
    return parse(parser, "model", "data", "out")

CURVES = {"loss (nats per pair)": ["loss"], "accuracy (share of held-out pairs)": ["accuracy"],
          "margin (chosen - rejected score, held-out)": ["margin"]}

# ------------------------------------------------------------------------------------------------ the model
class Score(Linear):
    """The head: one number per hidden state, in float32 whatever the network's dtype."""
    def forward(self, x):
        return F.linear(x.float(), self.weight.float())

class RewardModel(nn.Module):
    """A transformer with a score head, as the critic is too. model may be another network's transformer, which
    roles share. The state-dict keys are those of transformers' LlamaForSequenceClassification."""
    def __init__(self, config, model=None):
        super().__init__()
        self.config = config
        self.model = Transformer(config) if model is None else model
        self.score = Score(config.hidden_size, 1, bias=False).to(self.model.norm.weight)

    def forward(self, ids, mask):
        """Scores (B,T) in float32: at each token that of the text up to it."""
        return self.score(self.model(ids, mask)).squeeze(-1)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Reads a full reward folder, or a language model's, with a new score head in place of its own."""
        config = LlamaConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, path, dtype, device, optional=["score.weight"])
        if "score.weight" not in find_tensors(path):
            nn.init.normal_(model.score.weight, std=(config.hidden_size + 1) ** -0.5)  # arXiv 2009.01325
        return model

    def save_pretrained(self, path):
        """Writes a folder that transformers' AutoModelForSequenceClassification loads."""
        save_weights(self, path, self.config.to_dict("LlamaForSequenceClassification", self.score.weight.dtype))

def load_reward_model(path, dtype=torch.float32, device="cpu", base=None, name="default", share=None):
    """A RewardModel from any folder: a full one, or an adapter's, attached under `name` and in use. The adapter's
    base is read too, unless `share` is its transformer, in memory already."""
    full, adapter = resolve(path, base)
    if adapter is None:
        return RewardModel.from_pretrained(full, dtype, device)
    if read_adapter_config(adapter).get("task_type") != "SEQ_CLS":
        raise BadInput(f"{path}: is a language model's adapter, not a reward model; merge it with lora.py first")
    model = RewardModel(share.config, share) if share else RewardModel.from_pretrained(full, dtype, device)
    load_adapter(model, adapter, name)
    use_adapter(model, name)
    return model

# ------------------------------------------------------------------------------------------------ scores, losses
def last_column(mask):
    """The column of the last real token (B,), wherever the padding is."""
    return mask.shape[1] - 1 - mask.long().flip(1).argmax(1)

def last_scores(scores, mask):
    """The score of each text (B,): scores (B,T) at its last real token."""
    return scores.gather(1, last_column(mask)[:, None]).squeeze(1)

def pairwise_loss(chosen, rejected, mask=None, total=None):
    """-log sigmoid(chosen - rejected) (Bradley & Terry): for scores (B,) per pair, for scores (B,T) the mean over
    mask (B,T) of each pair; summed over the pairs and divided by total (by default their number)."""
    loss = -F.logsigmoid(chosen.float() - rejected.float())        # log(sigmoid(x)) would overflow
    if loss.ndim == 2:
        mask = torch.ones_like(loss) if mask is None else mask
        loss = (loss * mask).sum(1) / mask.sum(1).clamp(min=1)
    return loss.sum() / (len(loss) if total is None else total)

def batch_loss(scores, mask, starts, kind, total):
    """pairwise_loss of a collated batch of pairs: scores, mask (2B,T), chosen first, starts (B,)."""
    if kind == "last":
        return pairwise_loss(*last_scores(scores, mask).chunk(2), total=total)
    columns = torch.arange(mask.shape[1], device=mask.device)
    standing = scores.gather(1, torch.minimum(columns, last_column(mask)[:, None]))     # the last score stands on
    chosen, rejected = mask.chunk(2)
    return pairwise_loss(*standing.chunk(2), (chosen | rejected) & (columns >= starts[:, None]), total)

@torch.no_grad()
def evaluate(model, rows, micro_batch, device):
    """Held-out accuracy (share with the chosen above), margin (mean difference), mean and std of the chosen."""
    model.eval()
    world = dist.get_world_size()
    order = [-1] * (-len(rows) % (micro_batch * world)) + sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = torch.zeros(4, dtype=torch.float64)
    for micro in deal(order, dist.get_rank(), world, micro_batch):  # -1 is a filler: all ranks take as many passes
        ids, mask, _ = (x.to(device) for x in collate_pairs([rows[i] for i in micro]))
        chosen, rejected = last_scores(model(ids, mask), mask).double().cpu().chunk(2)
        real = torch.tensor(micro) >= 0
        sums += torch.stack([chosen > rejected, chosen - rejected, chosen, chosen**2])[:, real].sum(1)
    accuracy, margin, mean, square = (x / len(rows) for x in sum_over_ranks(*sums.tolist()))
    return {"accuracy": accuracy, "margin": margin, "mean": mean, "std": max(square - mean**2, 0) ** 0.5}

def main():
    args = get_args()
    rank, world, device, dtype = setup(args)

    # 1. the pairs
    with fail_together():
        accumulation = accumulate(args, "--batch", args.batch, world)
        full, adapter = resolve(args.model, args.base)
        check_folders(args, adapter, full)
        tokenizer, config, tokenizer_folder = open_tokenizer(args.model, args.base, args.max_len)
        train, held_out = load_rows(args, 1, encode_pair, tokenizer, args.max_len, args.batch, Counter())

    # 2. the model, and the weights of it that are trained; the score head always is
    with fail_together():
        model = load_reward_model(args.model, dtype, device, args.base)
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
        model.config, model.model.checkpointing = config, args.checkpointing
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected, _ in train]
    state = RunState(args, lengths)
    steps = args.steps or args.epochs * (len(train) // args.batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state.track_weights(trained)
    engine = make_engine(args, model, [*trained.values()], args.lr, steps, args.micro_batch, accumulation, dtype)
    state.track_engines(model=engine)
    log = Log(args, steps, rank, CURVES, state.step)

    if not state.step:
        log.line(step=0, **evaluate(model, held_out, args.micro_batch, device))
    for step, (epoch, chosen) in zip(range(state.step + 1, steps + 1),
                                     stream(lengths, args.batch, args.seed, state.step)):
        # 3. one global batch, formed before it is dealt; its loss per pair of the whole of it
        rows = [train[i] for i in chosen]
        model.train()
        lr, loss_sum = engine.get_lr()[0], 0.0
        for micro in deal(rows, rank, world, args.micro_batch):
            ids, mask, starts = (x.to(device) for x in collate_pairs(micro))
            loss = batch_loss(engine(ids, mask), mask, starts, args.loss, args.micro_batch)
            descend(engine, loss)
            loss_sum += float(loss.detach())
        # 4. logging and held-out pairs
        loss = sum_over_ranks(loss_sum)[0] / (world * accumulation)
        log.step(sum(len(c) + len(r) for c, r, _ in rows), epoch=epoch, loss=loss, lr=lr, **engine_metrics(engine))
        if step % args.eval_every == 0 or step == steps:
            stats = evaluate(model, held_out, args.micro_batch, device)
            log.line(step=step, **stats)
        if step < steps:
            state.after(step, chosen, log)

    # 5. the folder, with the statistics
    save(model, args.out, rank, tokenizer_folder, "default" if lora_layers(model) else None, full)
    if rank == 0:
        stats = {"mean": stats["mean"], "std": stats["std"], "n": len(held_out), "accuracy": stats["accuracy"]}
        with writing(args.out):
            (Path(args.out) / "reward_stats.json").write_text(json.dumps(stats) + "\n")
    state.finish(log)

if __name__ == "__main__":
    run(main)
