"""Step 2: the reward model. From pairs of answers, a LLaMA learns which answer people prefer.

1. read the preference pairs, keep this phase's share, hold some conversations out
2. load a language model; a score head (C -> 1) takes the place of its vocabulary head
3. for every batch of pairs: -log sigmoid(score of the chosen - score of the rejected)
4. before, during and after: accuracy and margin on held-out pairs
5. write the model, and the mean and standard deviation of its scores of chosen answers, by which PPO
   normalises

The score of an answer is the score at its last real token. --loss last compares these two scores. --loss
dense compares the scores at every token from where the two answers part; past its end, the shorter answer
keeps its last score.

    deepspeed reward.py --model LLAMA --data pairs.jsonl --out runs/rm --lora-rank 8
    python reward.py --model LLAMA --data pairs.jsonl --out runs/rm           # one process, GPU or CPU
    deepspeed reward.py                                                       # the toy, by toy/reward.args
"""
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import collate_pairs, encode_pair, load_rows, micro_batches, open_tokenizer, stream
from llama import Linear, LlamaConfig, Transformer
from lora import (
    add_lora_flags,
    load_adapter,
    refuse_second_adapter,
    resolve,
    save_model,
    trainable,
    use_adapter,
)
from runtime.adapters import is_reward_adapter
from runtime.checkpoint import Run, stoppable
from runtime.engine import backward_and_step, engine_metrics, make_engine, save_whole
from runtime.errors import BadInput
from runtime.flags import Flags, accumulation_steps, add_trainer_flags, number, positive
from runtime.folders import check_out, find_tensors, load_weights, save_weights, writing
from runtime.log import Log
from runtime.ranks import fail_together, run, setup, sum_over_ranks

PHASE = 1                                    # of --split: the shares 0 and 2 are for sft.py and ppo.py

def get_args():
    flags = Flags("Step 2 of RLHF: the reward model, from pairs of answers.")
    add = flags.group("model")
    add("--model", help="LLaMA folder to start from, or a reward model's folder, which is trained further")
    add("--base", help="base model of an adapter folder, if not at the path in the adapter's config")
    add = flags.group("data")
    add("--data", nargs="+", help="files of preference pairs (docs/data.md)")
    add("--max-len", type=positive, default=512, help="tokens of prompt and answer together")
    add = flags.group("training")
    add("--loss", default="last", choices=["last", "dense"],
        help="compare scores at the last token, or at every token from where the answers part")
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--steps", type=positive, help="optimiser steps, instead of --epochs")
    add("--batch", type=positive, default=32, help="pairs per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="pairs per rank and forward pass")
    add("--lr", type=number(0), default=5e-5, help="highest learning rate")
    add("--eval-every", type=positive, default=100, help="steps between held-out evaluations")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add_lora_flags(flags, dropout=True)
    add_trainer_flags(flags)                 # --out, --split, --eval-data, --seed, --zero-stage, ...
    return flags.parse("model", "data", "out")

CURVES = {"loss (nats per pair)": ["loss"], "accuracy (share of held-out pairs)": ["accuracy"],
          "margin (chosen - rejected score, held-out)": ["margin"]}

# ------------------------------------------------------------ the model
class Score(Linear):
    """The head: one number per hidden state, in float32 whatever the network's dtype."""
    def forward(self, x):
        return F.linear(x.float(), self.weight.float())

class RewardModel(nn.Module):
    """A transformer with a score head; the critic of PPO is one too. `model` may be the transformer of
    another network, so that roles share it. The state-dict keys are those of transformers'
    LlamaForSequenceClassification."""
    def __init__(self, config: LlamaConfig, model: Transformer | None = None):
        super().__init__()
        self.config = config
        self.model = Transformer(config) if model is None else model
        self.score = Score(config.hidden_size, 1, bias=False).to(self.model.norm.weight)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (B,T) in float32: at each token the score of the text up to it."""
        return self.score(self.model(ids, mask)).squeeze(-1)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "RewardModel":
        """Reads a full reward folder, or a language model's, with a new score head in place of the vocabulary
        head."""
        config = LlamaConfig.from_pretrained(path)
        with torch.device("meta"):           # no memory until the weights are there
            model = cls(config)
        load_weights(model, path, dtype, device, optional=["score.weight"])
        if "score.weight" not in find_tensors(path):
            nn.init.normal_(model.score.weight, std=(config.hidden_size + 1) ** -0.5)  # arXiv 2009.01325
        return model

    def save_pretrained(self, path: str | Path):
        """Writes a folder that transformers' AutoModelForSequenceClassification loads."""
        config = self.config.to_dict("LlamaForSequenceClassification", self.score.weight.dtype)
        save_weights(self, path, config)

def load_reward_model(path: str | Path, dtype: torch.dtype = torch.float32,
                      device: str | torch.device = "cpu", base: str | None = None, name: str = "default",
                      share: Transformer | None = None) -> RewardModel:
    """A RewardModel from any folder: a full one, or an adapter's, attached under `name` and in use. The
    adapter's base is read too, unless `share` is that base's transformer, in memory already."""
    full, adapter = resolve(path, base)
    if adapter is None:
        return RewardModel.from_pretrained(full, dtype, device)
    if not is_reward_adapter(adapter):
        raise BadInput(f"{path}: is a language model's adapter, not a reward model; merge it with lora.py "
                       f"first")
    model = RewardModel(share.config, share) if share else RewardModel.from_pretrained(full, dtype, device)
    load_adapter(model, adapter, name)
    use_adapter(model, name)
    return model

# ------------------------------------------------------------ scores and losses
def last_column(mask: Tensor) -> Tensor:
    """The column of the last real token (B,), wherever the padding is."""
    return mask.shape[1] - 1 - mask.long().flip(1).argmax(1)

def last_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of each text (B,): scores (B,T) at its last real token."""
    return scores.gather(1, last_column(mask)[:, None]).squeeze(1)

def pairwise_loss(chosen: Tensor, rejected: Tensor, mask: Tensor | None = None,
                  total: float | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected) (Bradley & Terry), summed over the pairs and divided by total, by
    default their number. Of scores (B,) it is taken once per pair; of scores (B,T) it is each pair's mean
    over mask (B,T)."""
    loss = -F.logsigmoid(chosen.float() - rejected.float())        # log(sigmoid(x)) would be -inf
    if loss.ndim == 2:
        mask = torch.ones_like(loss) if mask is None else mask
        loss = (loss * mask).sum(1) / mask.sum(1).clamp(min=1)
    return loss.sum() / (len(loss) if total is None else total)

def batch_loss(scores: Tensor, mask: Tensor, starts: Tensor, kind: str, total: float) -> Tensor:
    """pairwise_loss of a collated batch: scores, mask (2B,T), the chosen first; starts (B,), where the
    answers part. kind is --loss: "last" compares at the last tokens, "dense" at every token from `starts`
    on."""
    if kind == "last":
        return pairwise_loss(*last_scores(scores, mask).chunk(2), total=total)
    columns = torch.arange(mask.shape[1], device=mask.device)
    # beyond its end, an answer keeps its last score
    scores = scores.gather(1, torch.minimum(columns, last_column(mask)[:, None]))
    chosen_mask, rejected_mask = mask.chunk(2)
    longer = chosen_mask | rejected_mask
    compared = longer & (columns >= starts[:, None])
    return pairwise_loss(*scores.chunk(2), compared, total)

@torch.no_grad()
def evaluate(model: RewardModel, rows: list, micro_batch: int, device: torch.device) -> dict[str, float]:
    """Over held-out pairs: accuracy (share in which the chosen answer scores higher), margin (mean difference
    of the two scores), mean and std of the chosen answers' scores. Summed over all ranks."""
    model.eval()
    world = dist.get_world_size()
    # Every rank must take equally many passes. A filler is computed (-1 is the last row) and not counted.
    fillers = [-1] * (-len(rows) % (micro_batch * world))
    order = fillers + sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = torch.zeros(4, dtype=torch.float64)
    for micro in stoppable(micro_batches(order, dist.get_rank(), world, micro_batch), "held-out pairs"):
        ids, mask, _ = (x.to(device) for x in collate_pairs([rows[i] for i in micro]))
        chosen, rejected = last_scores(model(ids, mask), mask).double().cpu().chunk(2)
        real = torch.tensor(micro) >= 0
        sums += torch.stack([chosen > rejected, chosen - rejected, chosen, chosen**2])[:, real].sum(1)
    accuracy, margin, mean, mean_square = (x / len(rows) for x in sum_over_ranks(*sums.tolist()))
    return {"accuracy": accuracy, "margin": margin, "mean": mean, "std": max(mean_square - mean**2, 0) ** 0.5}

def main():
    args = get_args()
    rank, world, device, dtype = setup(args)

    # 1. the pairs; what can be checked is checked before any weights load, by all ranks together
    with fail_together():
        accumulation = accumulation_steps(args, "--batch", args.batch, world)
        full, adapter = resolve(args.model, args.base)
        refuse_second_adapter(args, adapter)
        check_out(args, full, adapter)
        tokenizer, config, tokenizer_folder = open_tokenizer(args.model, args.base, args.max_len)
        train, held_out = load_rows(args, PHASE, encode_pair, tokenizer, args.max_len, args.batch,
                                    folders=[args.model])

    # 2. the model, and the weights of it that are trained; the score head always is
    with fail_together():
        model = load_reward_model(args.model, dtype, device, args.base)
        trained = trainable(model, args)
    model.config = config                    # its BOS and EOS are the tokenizer's
    model.model.checkpointing = args.checkpointing
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected, _ in train]
    steps = args.steps or args.epochs * (len(train) // args.batch)
    state = Run(args, lengths)               # makes --out, or finds the checkpoint that --resume goes on from
    state.track_weights(trained)
    engine = make_engine(args, model, [*trained.values()], args.lr, steps, accumulation, dtype)
    state.track_engines(model=engine)
    log = Log(args, steps, rank, CURVES, state.step)
    stats = {}                               # of the last evaluation

    def evaluate_held_out(step):
        with state.evaluation(step, log):
            stats.update(evaluate(model, held_out, args.micro_batch, device))
            log.line(step=step, **stats)

    if state.evaluation_due:                 # always in a new run
        evaluate_held_out(state.step)
    for step, epoch, row_numbers in stream(lengths, args.batch, args.seed, state.step, steps):
        # 3. one global batch; DeepSpeed divides by ranks and micro-batches, which makes its loss a mean over
        # all pairs
        rows = [train[i] for i in row_numbers]
        lr, loss_sum = engine.get_lr()[0], 0.0
        model.train()
        for micro in micro_batches(rows, rank, world, args.micro_batch):
            ids, mask, starts = (x.to(device) for x in collate_pairs(micro))
            loss = batch_loss(engine(ids, mask), mask, starts, args.loss, total=len(micro))
            backward_and_step(engine, loss)
            loss_sum += float(loss.detach())
        # 4. what is logged is the loss of the global batch
        loss = sum_over_ranks(loss_sum)[0] / (world * accumulation)
        tokens = sum(len(chosen) + len(rejected) for chosen, rejected, _ in rows)
        log.step(tokens, epoch=epoch, loss=loss, lr=lr, **engine_metrics(engine))
        if step % args.eval_every == 0 or step == steps:
            evaluate_held_out(step)
        if step < steps:
            state.end_step(step, row_numbers, log)

    # 5. the folder, and the statistics by which PPO normalises scores
    adapter_name = "default" if adapter or args.lora_rank else None
    save_whole(model, args.out, save_model, tokenizer_folder, full, adapter_name)
    if rank == 0:
        with writing(args.out):
            saved = {"mean": stats["mean"], "std": stats["std"], "n": len(held_out),
                     "accuracy": stats["accuracy"]}
            (Path(args.out) / "reward_stats.json").write_text(json.dumps(saved) + "\n")
    state.finish(log)

if __name__ == "__main__":
    run(main)
