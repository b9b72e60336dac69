"""Step 1: supervised fine-tuning. The model learns to answer, by imitation of responses only.

1. read the demonstrations, keep this phase's share, hold some conversations out
2. load the model; with --lora-rank only an adapter beside it is trained
3. for every batch: cross-entropy of the response tokens and EOS, never of the prompt
4. before, during and after: the perplexity of held-out responses
5. write a folder that transformers (or PEFT) loads

    deepspeed sft.py --model LLAMA --data demonstrations.jsonl --out runs/sft         # all GPUs of this machine
    deepspeed --num_gpus 1 sft.py --model LLAMA --data a.jsonl b.json --out runs/sft --lora-rank 8
    python sft.py --model LLAMA --data a.jsonl --out runs/sft                         # one process, GPU or CPU
    deepspeed sft.py                                                                  # the toy: flags of toy/sft.args
"""
import argparse
import math
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import collate_sft, deal, encode_sft, load_rows, open_tokenizer, stream
from lora import add_lora, load_model, lora_layers, resolve, save
from runtime.checkpoint import RunState
from runtime.engine import descend, engine_metrics, make_engine
from runtime.flags import accumulate, add_engine_flags, number, parse, positive
from runtime.folders import check_folders
from runtime.log import Log
from runtime.ranks import fail_together, run, setup, sum_over_ranks

def get_args():
    parser = argparse.ArgumentParser(description="Step 1 of RLHF: supervised fine-tuning on responses only.")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="LLaMA folder, or an adapter folder, which is then trained on")
    add("--base", help="base model of an adapter folder, where it is not where the adapter's config says")
    add("--lora-rank", type=number(0, kind=int), default=0, help="rank of a new adapter; 0 trains all weights")
    add("--lora-dropout", type=number(0, 1), default=0.0, help="share of the adapter's inputs dropped in training")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="files of demonstrations, pairs or conversations (README, data)")
    add("--max-len", type=positive, default=512, help="tokens of prompt and response together")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--steps", type=positive, help="optimiser steps, instead of --epochs")
    add("--batch", type=positive, default=32, help="rows per optimiser step, over all ranks")
    add("--micro-batch", type=positive, default=4, help="rows per rank and forward pass")
    add("--lr", type=number(0), default=5e-5, help="highest learning rate")
    add("--eval-every", type=positive, default=100, help="steps between held-out evaluations")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add_engine_flags(parser)
    return parse(parser, "model", "data", "out")

CURVES = {"loss (nats per response token)": ["loss"], "perplexity of held-out answers": ["eval_ppl"]}

def sft_loss(logits, labels, total=None):
    """Cross-entropy of logits (N,V), labels (N,), -100 for none: the sum over total (by default their number)."""
    total = (labels != -100).sum().clamp(min=1) if total is None else total
    return F.cross_entropy(logits.float(), labels, reduction="sum") / total

def response_logits(model, ids, mask, labels):
    """Logits (N,V) only where a label (N,) is to be predicted, and these labels: column t predicts token t + 1."""
    wanted = labels[:, 1:] != -100
    return model(ids, mask, F.pad(wanted, (0, 1))), labels[:, 1:][wanted]

def n_labels(rows):
    """Response tokens of [(ids, n_prompt)]: what a loss over them is divided by."""
    return sum(len(ids) - n_prompt for ids, n_prompt in rows)

@torch.no_grad()
def perplexity(model, rows, micro_batch, device):
    """exp(negative log-likelihood per response token) of rows [(ids, n_prompt)], each counted once."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]))
    # all ranks take equally many passes (ZeRO-3 waits for all): a filler row has no response, so it adds nothing
    filler = [(rows[0][0], len(rows[0][0]))] * (-len(rows) % (micro_batch * dist.get_world_size()))
    nll = 0.0
    for micro in deal(filler + rows, dist.get_rank(), dist.get_world_size(), micro_batch):
        ids, mask, labels = (x.to(device) for x in collate_sft(micro))
        nll += float(sft_loss(*response_logits(model, ids, mask, labels), total=1))
    return math.exp(sum_over_ranks(nll)[0] / n_labels(rows))

def main():
    args = get_args()
    rank, world, device, dtype = setup(args)

    # 1. everything that can be wrong is looked at before any weights load, and by all ranks together
    with fail_together():
        accumulation = accumulate(args, "--batch", args.batch, world)
        full, adapter = resolve(args.model, args.base)
        check_folders(args, adapter, full)
        tokenizer, config, tokenizer_folder = open_tokenizer(args.model, args.base, args.max_len)
        train, held_out = load_rows(args, 0, encode_sft, tokenizer, args.max_len, args.batch, Counter())

    # 2. the model, and the weights of it that are trained
    with fail_together():
        model = load_model(args.model, dtype, device, args.base)
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
        model.config, model.model.checkpointing = config, args.checkpointing    # config with the tokenizer's BOS, EOS
    lengths = [len(ids) for ids, _ in train]
    state = RunState(args, lengths)          # makes --out, or finds what --resume goes on from
    steps = args.steps or args.epochs * (len(train) // args.batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state.track_weights(trained)
    engine = make_engine(args, model, [*trained.values()], args.lr, steps, args.micro_batch, accumulation, dtype)
    state.track_engines(model=engine)
    log = Log(args, steps, rank, CURVES, state.step)

    if not state.step:
        log.line(step=0, eval_ppl=perplexity(model, held_out, args.micro_batch, device))
    for step, (epoch, chosen) in zip(range(state.step + 1, steps + 1),
                                     stream(lengths, args.batch, args.seed, state.step)):
        # 3. one global batch, formed before it is dealt, and its loss per response token of the whole of it
        rows = [train[i] for i in chosen]
        total = n_labels(rows) / (world * accumulation)            # DeepSpeed takes the mean over both, this makes it a sum
        model.train()
        lr, nll = engine.get_lr()[0], 0.0
        for micro in deal(rows, rank, world, args.micro_batch):
            ids, mask, labels = (x.to(device) for x in collate_sft(micro))
            loss = sft_loss(*response_logits(engine, ids, mask, labels), total)
            descend(engine, loss)
            nll += float(loss.detach())
        # 4. what is logged is the loss of the global batch
        loss = sum_over_ranks(nll)[0] / (world * accumulation)
        log.step(sum(len(ids) for ids, _ in rows), epoch=epoch, loss=loss, lr=lr, **engine_metrics(engine))
        if step % args.eval_every == 0 or step == steps:
            log.line(step=step, eval_ppl=perplexity(model, held_out, args.micro_batch, device))
        if step < steps:
            state.after(step, chosen, log)

    # 5. the folder
    save(model, args.out, rank, tokenizer_folder, "default" if lora_layers(model) else None, full)
    state.finish(log)

if __name__ == "__main__":
    run(main)
