"""Step 1: supervised fine-tuning. The model learns to answer, by imitation of responses only.

1. read the demonstrations, keep this phase's share, hold some conversations out
2. load the model; with --lora-rank only an adapter beside it is trained
3. for every batch: cross-entropy of the response tokens and EOS, never of the prompt
4. before, during and after: the perplexity of held-out responses
5. write a folder that transformers (or PEFT) loads

    deepspeed sft.py --model LLAMA --data demonstrations.jsonl --out runs/sft     # all GPUs of this machine
    deepspeed --num_gpus 1 sft.py --model LLAMA --data a.jsonl b.json --out runs/sft --lora-rank 8
    python sft.py --model LLAMA --data a.jsonl --out runs/sft                     # one process, GPU or CPU
    deepspeed sft.py                                                              # the toy, by toy/sft.args
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import collate_sft, encode_sft, load_rows, micro_batches, open_tokenizer, stream
from llama import Llama
from lora import add_lora_flags, load_model, refuse_second_adapter, resolve, save_model, trainable
from runtime.checkpoint import Run, stoppable
from runtime.engine import backward_and_step, engine_metrics, make_engine, save_whole
from runtime.flags import Flags, accumulation_steps, add_trainer_flags, number, positive
from runtime.folders import check_out
from runtime.log import Log
from runtime.ranks import fail_together, run, setup, sum_over_ranks

PHASE = 0                                    # of --split: the shares 1 and 2 are for reward.py and ppo.py

def get_args():
    flags = Flags("Step 1 of RLHF: supervised fine-tuning on responses only.")
    add = flags.group("model")
    add("--model", help="LLaMA folder, or an adapter folder, whose adapter is trained further")
    add("--base", help="base model of an adapter folder, if not at the path in the adapter's config")
    add = flags.group("data")
    add("--data", nargs="+", help="files of demonstrations, pairs or conversations (docs/data.md)")
    add("--max-len", type=positive, default=512, help="tokens of prompt and response together")
    add = flags.group("training")
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--steps", type=positive, help="optimiser steps, instead of --epochs")
    add("--batch", type=positive, default=32, help="rows per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="rows per rank and forward pass")
    add("--lr", type=number(0), default=5e-5, help="highest learning rate")
    add("--eval-every", type=positive, default=100, help="steps between held-out evaluations")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add_lora_flags(flags, dropout=True)
    add_trainer_flags(flags)                 # --out, --split, --eval-data, --seed, --zero-stage, ...
    return flags.parse("model", "data", "out")

CURVES = {"loss (nats per response token)": ["loss"], "perplexity of held-out answers": ["eval_ppl"]}

def sft_loss(logits: Tensor, labels: Tensor, total: float | Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (N,V) with labels (N,), -100 for none: the sum divided by total, by default
    their number."""
    total = (labels != -100).sum().clamp(min=1) if total is None else total
    return F.cross_entropy(logits.float(), labels, reduction="sum") / total

def label_logits(model: Llama, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N,V) at the N places that have a label to predict, and these labels (N,); ids, mask, labels are
    (B,T)."""
    has_label = labels[:, 1:] != -100        # column t predicts token t + 1
    return model(ids, mask, at=F.pad(has_label, (0, 1))), labels[:, 1:][has_label]

def rows_loss(model: Llama, rows: list[tuple[list[int], int]], total: float, device: torch.device) -> Tensor:
    """sft_loss of rows [(ids, n_prompt)]."""
    ids, mask, labels = (x.to(device) for x in collate_sft(rows))
    return sft_loss(*label_logits(model, ids, mask, labels), total)

def n_labels(rows: list[tuple[list[int], int]]) -> int:
    """The number of response tokens in rows [(ids, n_prompt)], by which a loss over them is divided."""
    return sum(len(ids) - n_prompt for ids, n_prompt in rows)

@torch.no_grad()
def perplexity(model: Llama, rows: list, micro_batch: int, device: torch.device) -> float:
    """exp(negative log-likelihood per response token) of rows [(ids, n_prompt)], summed over all ranks."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]))               # like lengths together: little padding
    # Every rank must take equally many passes. A filler row is all prompt: it has no label and adds nothing.
    filler = [(rows[0][0], len(rows[0][0]))] * (-len(rows) % (micro_batch * dist.get_world_size()))
    nll = 0.0
    mine = micro_batches(filler + rows, dist.get_rank(), dist.get_world_size(), micro_batch)
    for micro in stoppable(mine, "held-out perplexity"):
        nll += float(rows_loss(model, micro, 1, device))
    return math.exp(sum_over_ranks(nll)[0] / n_labels(rows))

def main():
    args = get_args()
    rank, world, device, dtype = setup(args)

    # 1. the demonstrations; what can be checked is checked before any weights load, by all ranks together
    with fail_together():
        accumulation = accumulation_steps(args, "--batch", args.batch, world)
        full, adapter = resolve(args.model, args.base)
        refuse_second_adapter(args, adapter)
        check_out(args, full, adapter)
        tokenizer, config, tokenizer_folder = open_tokenizer(args.model, args.base, args.max_len)
        train, held_out = load_rows(args, PHASE, encode_sft, tokenizer, args.max_len, args.batch,
                                    folders=[args.model])

    # 2. the model, and the weights of it that are trained
    with fail_together():
        model = load_model(args.model, dtype, device, args.base)
        trained = trainable(model, args)
    model.config = config                    # its BOS and EOS are the tokenizer's
    model.model.checkpointing = args.checkpointing
    lengths = [len(ids) for ids, _ in train]
    steps = args.steps or args.epochs * (len(train) // args.batch)
    state = Run(args, lengths)               # makes --out, or finds the checkpoint that --resume goes on from
    state.track_weights(trained)
    engine = make_engine(args, model, [*trained.values()], args.lr, steps, accumulation, dtype)
    state.track_engines(model=engine)
    log = Log(args, steps, rank, CURVES, state.step)

    def evaluate(step):
        with state.evaluation(step, log):
            log.line(step=step, eval_ppl=perplexity(model, held_out, args.micro_batch, device))

    if state.evaluation_due:                 # always in a new run
        evaluate(state.step)
    for step, epoch, row_numbers in stream(lengths, args.batch, args.seed, state.step, steps):
        # 3. one global batch; its loss is a mean over the response tokens of all ranks and micro-batches
        rows = [train[i] for i in row_numbers]
        total = n_labels(rows) / (world * accumulation)            # DeepSpeed divides the sum by both
        lr, loss_sum = engine.get_lr()[0], 0.0
        model.train()
        for micro in micro_batches(rows, rank, world, args.micro_batch):
            loss = rows_loss(engine, micro, total, device)
            backward_and_step(engine, loss)
            loss_sum += float(loss.detach())
        # 4. what is logged is the loss of the global batch
        loss = sum_over_ranks(loss_sum)[0] / (world * accumulation)
        tokens = sum(lengths[i] for i in row_numbers)
        log.step(tokens, epoch=epoch, loss=loss, lr=lr, **engine_metrics(engine))
        if step % args.eval_every == 0 or step == steps:
            evaluate(step)
        if step < steps:
            state.end_step(step, row_numbers, log)

    # 5. the folder
    adapter_name = "default" if adapter or args.lora_rank else None
    save_whole(model, args.out, save_model, tokenizer_folder, full, adapter_name)
    state.finish(log)

if __name__ == "__main__":
    run(main)
