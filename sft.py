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
import ctypes
import errno
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import collate_sft, deal, encode_sft, load_records, open_tokenizer, stream
from llama import BadInput, copy_tokenizer, read_json, without_controls
from lora import add_lora, load_model, lora_layers, resolve, save_adapter

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

# ------------------------------------------------------------------------------------------------ for all trainers
def add_engine_flags(parser):
    """The flags that mean the same in sft.py, reward.py and ppo.py."""
    add = parser.add_argument_group("adapter").add_argument
    add("--lora-alpha", type=number(0), default=16.0, help="the adapter counts alpha / rank times")
    add("--lora-targets", type=lambda text: text.split(","), default="q_proj,k_proj",
        help="ends of the names of the layers that get one")
    add = parser.add_argument_group("division of the data").add_argument
    add("--split", type=shares, default="4,4,2", help="shares of the three steps in files of pairs, or none")
    add("--split-seed", type=int, default=1234, help="of that division and of what is held out: the same in all steps")
    add("--eval-data", nargs="+", help="held-out files; without them a share of the conversations")
    add("--eval-share", type=number(0, 1), default=0.05, help="share of the conversations held out")
    add = parser.add_argument_group("engine").add_argument
    add("--out", help="folder to write")
    add("--overwrite", action="store_true", help="write into a folder that holds another run")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out; from the start if there is none")
    add("--save-every", type=positive, help="steps between checkpoints; by default one every 15 minutes")
    add("--timeout", type=number(10), default=1800.0, help="seconds after which a rank that is silent ends the run")
    add("--warmup", type=number(0, 1), default=0.03, help="share of the steps in which the rate rises, before a cosine")
    add("--weight-decay", type=number(0), default=0.1, help="of matrices; norms and biases get none")
    add("--grad-clip", type=number(0), default=1.0, help="largest norm of the gradient; 0 is off")
    add("--zero-stage", type=int, default=2, choices=range(4), help="1 shards optimiser, 2 gradients, 3 weights")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16, else fp16, on a GPU; fp32 on CPU")
    add("--checkpointing", action="store_true", help="recompute layers in the backward: less memory, more time")
    add("--seed", type=int, default=1234, help="of the order, the new weights and the samples")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)                # the launcher passes it

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

def number(low, high=1e12, kind=float):
    """argparse type of a number from low to high, both included."""
    def parse_number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    return parse_number

positive = number(1, kind=int)

def shares(text):
    """argparse type of --split: three shares such as 4,4,2, or none."""
    numbers = None if text == "none" else [float(x) for x in text.split(",")]
    if numbers and (len(numbers) != 3 or min(numbers) < 0 or sum(numbers) <= 0):
        raise argparse.ArgumentTypeError(f"{text} is not three shares such as 4,4,2, nor none")
    return numbers

def parse(parser, *required):
    """The flags; whatever is wrong with them is BadInput, one line instead of the whole usage from every rank."""
    def fail(message):
        raise BadInput(f"{message} (see {parser.prog} -h)")
    parser.error = fail
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS) and action.help != argparse.SUPPRESS:
            action.help += " (%(default)s)"
    parser.fromfile_prefix_chars = "@"       # @FILE holds flags, a line each, with comments
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    words = sys.argv[1:]
    if all(word.startswith("--local_rank") for word in words):     # nothing but what the launcher passes
        import toy
        words = toy.flags(Path(parser.prog).stem)
    args = parser.parse_args(words)
    if missing := [f"--{name}" for name in required if not getattr(args, name)]:
        fail(f"{', '.join(missing)} must be given")
    return args

def keep_memory():
    """glibc returns every large block to the system, which fills the next one with zeros, page by page: a quarter of a
    step's time on CPU. From now on it keeps what it has; up to a quarter more memory was seen."""
    tell_allocator("mallopt", -4, 0)         # M_MMAP_MAX: no block is taken from the system by itself
    tell_allocator("mallopt", -1, -1)        # M_TRIM_THRESHOLD: and none is given back

def tell_allocator(function, *numbers):
    """Calls a function of glibc's; another system's allocator has none of that name, and goes on as it is."""
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*numbers)

def setup(args):
    """Starts the process group, with the launcher or without; (rank, world, device, dtype)."""
    if "RANK" not in os.environ:             # plain `python X.py`: DeepSpeed would go looking for MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.filterwarnings("ignore")
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:                    # ranks of one machine share its cores
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", 1))))
    import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:                             # plain gloo: DeepSpeed's shared-memory extension needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    global patience
    patience = 0.8 * args.timeout            # the rest is for what comes before and after the waiting
    c10d = dist.distributed_c10d             # DeepSpeed makes more groups, which take torch's defaults
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(seconds=patience)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False,
                                   timeout=timedelta(seconds=patience))
    except dist.DistError as error:          # most often another run's port
        raise CannotMeet(f"the ranks cannot meet: {str(error).splitlines()[0]} (for two runs at once on one machine: "
                       f"deepspeed --master_port 29501 ...)") from None
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                # with a mask its gradients can be NaN (pytorch #196678)
    best = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    name = best if args.dtype == "auto" else args.dtype
    args.dtype = name
    with fail_together():
        if name == "fp16" and not cuda:
            raise BadInput("--dtype fp16 needs a GPU; on CPU there are fp32 and bf16")
        import toy                           # makes the toy world where the flags name it and it is not there
        toy.prepare(rank, *(getattr(args, name, None) for name in ("model", "actor", "reward")), *args.data)
    torch.manual_seed(args.seed)
    script, processes = Path(sys.argv[0]).name, f"{world} process{'es' * (world > 1)}"
    say(f"{script}: {processes} on {device.type}, {name}, ZeRO-{args.zero_stage}")
    return rank, world, device, DTYPES[name]

def say(text):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        with suppress(OSError):              # a log on a full disk ends no run
            tqdm.write(without_controls(text), file=sys.stdout)

class Agreed(BadInput):
    """A BadInput that every rank raises at the same place."""

class CannotMeet(BadInput):
    """A BadInput that each rank has to say for itself."""

patience, meetings = 1800.0, itertools.count()                     # seconds of silence that ranks bear from each other

@contextmanager
def fail_together():
    """If a rank meets BadInput in the body, all raise it, and none is left waiting for it. The body may take one rank
    (often rank 0) as long as it likes: a thread tells the others that it is alive."""
    mine, done, meeting = None, threading.Event(), next(meetings)
    me, store = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def sign_of_life():
        with suppress(Exception):            # the store is gone: the main thread will meet that too
            while not done.wait(1):
                store.add(f"alive {me}", 1)

    store.set(f"{meeting} {me} began", "")
    threading.Thread(target=sign_of_life, daemon=True).start()
    try:
        yield
    except BadInput as error:
        mine = str(error)
    finally:
        done.set()
    store.set(f"{meeting} {me} ended", "")
    for rank in range(dist.get_world_size()):
        life, since = None, time.monotonic()
        while not store.check([f"{meeting} {rank} ended"]):
            if (now := store.add(f"alive {rank}", 0)) != life:
                life, since = now, time.monotonic()
            # one that has begun beats every second, but for a long call into C; another may still be in the step before
            silence = 300 if store.check([f"{meeting} {rank} began"]) else patience
            if store.check(["failed"]) or time.monotonic() - since > min(silence, patience):
                raise TimeoutError(f"rank {rank} has failed, or been silent for {time.monotonic() - since:.0f} s")
            if stop["signal"] and time.monotonic() - stop["at"] > 20 and time.monotonic() - since > 5:
                raise SystemExit(128 + stop["signal"])             # told to stop, and the other does not come
            time.sleep(0.02)
    if errors := [error for error in from_all(mine) if error]:
        raise Agreed(errors[0])

def sum_over_ranks(*numbers):
    """The sum over ranks of each number, in float64."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x)
    return x.tolist()

def max_over_ranks(*numbers):
    """The largest of each number over the ranks."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()

def from_all(thing):
    """What each rank hands over, in the order of the ranks, on every rank."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things

def accumulate(args, flag, batch, world):
    """Micro-batches per rank and optimiser step; BadInput where the batch does not divide into them. A micro-batch is
    at most what one rank has of the batch."""
    args.micro_batch = micro = min(args.micro_batch, max(1, batch // world))
    if batch % (micro * world):
        processes = f"{world} process{'es' * (world > 1)}"
        raise BadInput(f"{flag} {batch} does not divide by --micro-batch {micro} x {processes}")
    return batch // (micro * world)

def load_rows(args, phase, encode, tokenizer, max_len, batch, tally):
    """(training, held-out) rows that encode makes of this phase's records; says what was read, cut and dropped."""
    parts = load_records(args.data, phase, args.split, args.split_seed, args.eval_data, args.eval_share, tally)
    train, held_out = ([row for r in part if (row := encode(tokenizer, r, max_len, tally))] for part in parts)
    say(f"data: {len(train):,} rows to train on, {len(held_out):,} held out"
        + "".join(f"; {n:,} {what}" for what, n in tally.items() if n))
    if len(train) < batch:
        raise BadInput(f"--data: {len(train)} usable rows in this phase, fewer than one batch of {batch} "
                       f"(see --split, --max-len and the batch)")
    if not held_out:
        raise BadInput("--eval-data, --eval-share: no usable held-out rows; name a file or raise the share")
    return train, held_out

WRITTEN = ["args.json", "config.json", "adapter_config.json", "metrics.jsonl", "samples.jsonl", "reward_stats.json",
           "curves.png"]
PARTS = ["critic", "ema", "checkpoints"]

def check_folders(args, adapter, *folders):
    """BadInput where --out is a folder that is read, or holds another run, or where --lora-rank asks for an adapter
    on an adapter; before any weights load."""
    if args.lora_rank and adapter:
        raise BadInput(f"--lora-rank: {adapter} is an adapter already, which is trained on; leave the flag out")
    read = [folder.resolve() for folder in (adapter, *folders) if folder]
    if any((Path(args.out) / part).resolve() in read for part in ("", "critic", "ema")):
        raise BadInput(f"--out {args.out}: is a folder that this run reads; choose another")
    if dist.get_rank():                      # its machine may have another disk, with nothing but checkpoints
        return
    there = [name for name in [*WRITTEN, "checkpoints"] if (Path(args.out) / name).exists()]
    if there and args.resume and "args.json" not in there:
        raise BadInput(f"--out {args.out}: holds {there[0]}, but no run to resume; choose another folder, or --overwrite it "
                       f"without --resume")
    if there and not args.overwrite and not args.resume:
        raise BadInput(f"--out {args.out}: holds a run or a model already; choose another folder, --resume the run, or "
                       f"--overwrite it")

class AdamW(torch.optim.AdamW):
    """Skips a gradient that is not finite. DeepSpeed looks for one only under ZeRO; it reads `overflow` here."""
    overflow = False

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not math.isfinite(torch.nn.utils.get_total_norm(gradients))
        if not self.overflow:
            super().step(closure)

def make_engine(args, model, trained, lr, steps, micro, accumulation, dtype):
    """A DeepSpeed engine that trains these parameters of model: AdamW, warm-up and cosine over `steps`."""
    import deepspeed
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}    # whole, where ZeRO-3 has cut p up
    n_trained, n = (sum(math.prod(shapes[p]) for p in some) for some in (trained, shapes))
    say(f"training {n_trained:,} of {n:,} weights for {steps:,} steps")
    # weight decay pulls matrices towards 0; a norm's weight belongs near 1. An empty group would crash DeepSpeed
    groups = [{"params": [p for p in trained if len(shapes[p]) >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if len(shapes[p]) < 2], "weight_decay": 0.0}]
    kind = torch.optim.AdamW if args.zero_stage else AdamW
    optimizer = kind([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, round(args.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1, (done + 1) / warmup) * (
        0.5 + 0.5 * math.cos(math.pi * max(0, done + 1 - warmup) / (steps - warmup + 1))))      # a line up, a cosine down
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
              "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
              "zero_optimization": {"stage": args.zero_stage, "reduce_bucket_size": 2_000_000,       # elements
                                    "stage3_prefetch_bucket_size": 0},       # two engines on one base: none ahead
              "zero_allow_untested_optimizer": True,               # torch's AdamW: DeepSpeed's own compiles C++
              "gradient_clipping": args.grad_clip, "steps_per_print": 10**9}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    engine.bad = 0                           # updates skipped in a row
    if dtype == torch.float16 and args.zero_stage:
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False              # RunState.after has the word for it
    return engine

def descend(engine, loss):
    """One backward pass and, where it ends an accumulation, an update; counts in engine.bad the updates in a row that
    were skipped because their gradient was not finite."""
    skipped = engine.skipped_steps
    engine.backward(loss)
    updates = engine.is_gradient_accumulation_boundary()
    engine.step()
    if updates:
        engine.bad = engine.bad + 1 if engine.skipped_steps > skipped else 0

def engine_metrics(engine):
    norm = engine.get_global_grad_norm()     # None under ZeRO-0 in float32
    return {"skipped": engine.skipped_steps} | ({} if norm is None else {"grad_norm": float(norm)})

class Log:
    """metrics.jsonl, a line per logged step, curves.png drawn from it, and the progress bar; rank 0 alone."""
    def __init__(self, args, steps, rank, curves, start=0):
        self.out, self.curves, self.drawn = Path(args.out), curves, time.perf_counter()
        self.file = None if rank else open(Path(args.out) / "metrics.jsonl", "a")
        # disable=None: the bar is only on a terminal
        self.bar = tqdm(total=steps, initial=start, disable=rank > 0 or None, dynamic_ncols=True, unit="step")
        self.every, self.steps, self.n, self.tokens = args.log_every, steps, start, 0
        self.since = self.stepped = time.perf_counter()            # of these tokens; the end of the last step
        self.warned = set()

    def step(self, tokens, **metrics):
        """After each step: tokens it took in, what it measured."""
        self.tokens += tokens
        self.n += 1
        self.stepped = time.perf_counter()
        self.bar.update()
        if self.n % self.every == 0 or self.n in (1, self.steps):
            now = time.perf_counter()
            self.line(step=self.n, **metrics, tokens_per_s=self.tokens / (now - self.since))
            self.tokens, self.since = 0, now

    def line(self, **metrics):
        if self.file is None:
            return
        try:
            if not (self.out / "metrics.jsonl").exists():          # lines would go nowhere without a word
                raise BadInput(f"{self.out}: the folder, or its metrics.jsonl, has vanished while the run was writing it")
            # JSON knows no NaN
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise BadInput(f"{self.out / 'metrics.jsonl'}: cannot be written ({error.strerror})") from None
        self.leave_out()
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
        if time.perf_counter() - self.drawn > 60:
            with suppress(OSError):
                self.draw()

    def leave_out(self):
        """What came after the last step, evaluation or a checkpoint, does not count in tokens_per_s."""
        now = time.perf_counter()
        self.since, self.stepped = self.since + now - self.stepped, now

    def warn(self, when, text):
        """Says the text once in a run, the first time that `when` is true."""
        if when and text not in self.warned:
            self.warned.add(text)
            if self.file:
                tqdm.write(f"warning: step {self.n}: {text}", file=sys.stderr)

    def draw(self):
        """curves.png: a panel for each of curves {title: metrics}, a smooth line over raw points."""
        self.drawn = time.perf_counter()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        known = {key for line in lines for key in line}
        panels = {title: shown for title, keys in self.curves.items() if (shown := [k for k in keys if k in known])}
        columns = min(3, len(panels))
        figure = Figure((4.5 * columns, 3.2 * math.ceil(len(panels) / columns)), dpi=110, layout="constrained")
        figure.suptitle(str(self.out), parse_math=False)
        for n, (title, keys) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, n, title=title, xlabel="step")
            for key in keys:
                x, y = np.array([(line["step"], line[key]) for line in lines if key in line], dtype=float).T
                window = np.ones(1 + len(y) // 12)                 # a moving mean, over fewer points at the ends
                mean = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
                line, = axes.plot(x, mean, label=key)
                axes.plot(x, y, ".", color=line.get_color(), alpha=0.35, markersize=5)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(self.out / "curves.png")
        del figure, axes, line
        gc.collect()                         # a figure is a knot of references, and Python would keep many of them

    def close(self):
        """After the model is saved: no picture is worth losing one."""
        self.bar.close()
        if self.file:
            self.file.close()
            try:
                self.draw()
            except OSError as error:
                say(f"no curves.png: {error.strerror}")
            if not (self.out / "curves.png").exists():
                say("no curves.png: matplotlib is not installed")

def gathered(parameters):
    """Under ZeRO-3 the weights lie in pieces on all ranks; inside this context every rank holds these whole."""
    import deepspeed
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()

def save(model, out, rank, tokenizer_folder, adapter, base, average=()):
    """Writes the model, or only the adapter of this name, and its tokenizer, as transformers or PEFT load them.
    average: pairs (parameter, its moving average), which takes the parameter's place for good."""
    needed = sum(p.nbytes for p in model.parameters() if p.requires_grad or not adapter)
    with gathered(model.parameters()), fail_together(), writing(out, needed):
        for parameter, mean in average:
            parameter.data.copy_(mean)
        if rank == 0:
            task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
            if adapter:
                save_adapter(model, out, adapter, base, task)
            else:
                model.save_pretrained(out)
            copy_tokenizer(tokenizer_folder, out)
            if task == "CAUSAL_LM":
                ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
                (Path(out) / "generation_config.json").write_text(json.dumps(ids) + "\n")
    say(f"wrote {out}")

@contextmanager
def writing(path, needed=0, flag=""):
    """What a full disk, a missing permission or a vanished folder raise becomes BadInput, with the path, how many bytes are
    needed and how many are left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:      # torch and safetensors wrap the system's errors
        if isinstance(error, RuntimeError) and not re.search("writ|inline_container", str(error)):
            raise
        there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
        free, why = shutil.disk_usage(there).free, getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "inline_container" in why and free < needed:            # torch.save speaks of positions
            why = os.strerror(errno.ENOSPC)
        room = f"; {max(1, needed / 1e6):,.0f} MB are needed, {free / 1e6:,.0f} MB are free" if needed else ""
        raise BadInput(f"{flag}{path}: cannot be written ({why}){room}") from None

# ------------------------------------------------------------------------------------------------ never lose a run
# these may differ when a run is resumed; they change where it writes, what it logs, or how fast it is
FREE = {"out", "overwrite", "resume", "save_every", "timeout", "log_every", "eval_every", "local_rank", "micro_batch",
        "checkpointing", "zero_stage", "world_size", "versions", "finished", "inputs_modified"}
stop = {"signal": 0, "at": 0.0, "wait": False}                     # the signal, when it came, whether to finish the step

def on_signal(number, frame):
    """Once training has begun, the first SIGINT or SIGTERM stops at the end of the step; one that comes more than five
    seconds later (the launcher sends two), or before training, at once."""
    if stop["signal"] and time.monotonic() - stop["at"] < 5:
        return
    if stop["signal"] or not stop["wait"]:
        raise SystemExit(128 + number)
    stop.update(signal=number, at=time.monotonic())
    if os.environ["RANK"] == "0" and sys.stderr.isatty():
        print("stopping after this step; tell it again after five seconds to leave at once", file=sys.stderr, flush=True)

class RunState:
    """All that a run needs to go on as if it had not been interrupted, in OUT/checkpoints/step-N: weights.safetensors, the
    trained weights; rank-R.pt, the optimisers and random generators of each rank; run.json, the flags, the sizes of the
    logs and what the loop keeps; manifest.json, size and SHA-256 of each. It is written as step-N.tmp, and gets its
    name when it is whole. The ranks' files may lie on one disk or on a disk per machine."""
    def __init__(self, args, lengths):
        """Makes --out with args.json; or with --resume, all ranks agree on a checkpoint to go on from."""
        self.args, self.out, self.rank, self.world = args, Path(args.out), dist.get_rank(), dist.get_world_size()
        self.first = int(os.environ.get("LOCAL_RANK", 0)) == 0     # of its machine
        self.folder, self.saved, self.engines, self.weights = self.out / "checkpoints", time.monotonic(), {}, {}
        self.step, self.own, self.source, self.same = 0, {}, None, True
        torch.manual_seed(args.seed + self.rank)                   # new weights are made; dropout differs between ranks
        versions = {name: sys.modules[name].__version__ for name in ("torch", "deepspeed")}
        self.flags = {**vars(args), "script": Path(sys.argv[0]).stem, "world_size": self.world, "versions": versions,
                      "rows": len(lengths), "tokens": sum(lengths), "inputs_modified": modified(args)}
        self.flags = json.loads(json.dumps(self.flags))            # as they will be read
        if args.resume:
            self.find()
        with fail_together(), writing(self.out, flag="--out "):
            if self.rank == 0 and not self.step:
                self.out.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / "args.json", json.dumps(self.flags, indent=2) + "\n")
                for name in WRITTEN[1:]:     # an adapter_config.json left behind would win over the new full model
                    (self.out / name).unlink(missing_ok=True)
            if self.first and not self.step:
                for part in PARTS:
                    shutil.rmtree(self.out / part, ignore_errors=True)

    def find(self):
        """Chooses the newest step whose files every rank finds whole, and reads its run.json."""
        with fail_together():
            there = self.rank == 0 and (self.out / "args.json").exists()
            kept = read_json(self.out / "args.json") if there else {}
            self.refuse_others(kept)
            mine = {step: mark for step in self.steps() if (mark := self.verify(step))}
        complete, some, marks = zip(*from_all((kept.get("finished", False), bool(self.steps()), mine)))
        if complete[0]:
            say(f"{self.out}: this run is complete, there is nothing to resume")
            finish()
            raise SystemExit(0)
        # the same manifest everywhere: on a disk of its own, another run's may have been left
        common = [step for step, mark in marks[0].items() if all(other.get(step) == mark for other in marks)]
        alone = not common                   # no checkpoint is whole on all ranks: rank 0's weights are enough
        common = common or list(marks[0])
        if any(some) and not common:
            raise Agreed(f"--resume {self.out}: none of its checkpoints is whole (see the warnings); to start at the "
                         f"beginning, move {self.folder} away")
        if not common:
            say(f"{self.out}: no checkpoint to resume from, so the run starts at its beginning")
            return
        self.step = max(common)
        self.source = self.folder / f"step-{self.step}"
        with fail_together():
            run = read_json(self.source / "run.json") if self.rank == 0 else {}
            self.refuse_others(run.get("flags", {}))
        run = from_all(run)[0]
        self.own, changed = run["own"], self.refuse_others(run["flags"])
        self.same = not alone and not {"world_size", "zero_stage"} & changed.keys()
        named = [text for k, text in changed.items() if k not in ("out", "overwrite", "resume")]
        say(f"resuming {self.out} after step {self.step}" + (f"; changed: {', '.join(named)}" if named else "")
            + ("" if self.same else "; so the weights are kept, and the optimisers' moments start anew"))
        with fail_together(), writing(self.out):  # lines that came after the checkpoint are written again
            for name, size in run["sizes"].items() if self.rank == 0 else ():
                os.truncate(self.out / name, min(size, (self.out / name).stat().st_size))

    def refuse_others(self, then):
        """{flag: what it was and is}, of those that have changed since; BadInput where one makes it another run."""
        changed = {k: f"{k} {then.get(k)!r} -> {self.flags.get(k)!r}" for k in sorted({*then, *self.flags})
                   if then and then.get(k) != self.flags.get(k)}
        if other := [text for k, text in changed.items() if k not in FREE]:
            raise BadInput(f"--resume {self.out}: {other[0]} would make it another run; choose another --out")
        return changed

    def steps(self):
        """The steps that have a folder here, newest first."""
        names = [path.name[5:] for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def verify(self, step):
        """The manifest's own digest where the files that this rank reads of a checkpoint are as it says, else None."""
        folder = self.folder / f"step-{step}"
        try:
            manifest = read_json(folder / "manifest.json")
            needed = {"weights.safetensors", "run.json"} if self.rank == 0 else set()
            for name in needed | ({f"rank-{self.rank}.pt"} & manifest.keys()):
                if manifest.get(name) != fingerprint(folder / name):
                    raise BadInput(f"{folder / name}: is not as the manifest says")
            return fingerprint(folder / "manifest.json")[1]
        except (BadInput, OSError) as error:
            print(f"warning: a checkpoint is damaged, an older one is looked for: {error}", file=sys.stderr, flush=True)

    def track_weights(self, weights):
        """{name: tensor} will be in every checkpoint; on --resume rank 0 reads them, and all get them."""
        self.weights |= weights
        if not self.step:
            return
        file = safe_open(self.source / "weights.safetensors", "pt") if self.rank == 0 else None
        for name, weight in weights.items():
            if file:
                weight.data.copy_(file.get_tensor(name))
            dist.broadcast(weight.data, 0)

    def track_engines(self, **engines):
        """The engines will be in every checkpoint; on --resume they get their moments and places in the schedule."""
        self.engines = engines
        stop["wait"] = True                  # training begins: from now on a signal lets the step end
        if self.args.zero_stage < 3 and not torch.cuda.is_available():       # ZeRO-3 is for those who are short of memory
            keep_memory()                    # what loading took has gone back
        if not self.step:
            return
        for name, engine in engines.items():
            engine.lr_scheduler.load_state_dict(self.own["schedules"][name])
            engine.skipped_steps = self.own["skipped"][name]
            for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr()):
                group["lr"] = lr
        if self.same:
            mine = torch.load(self.source / f"rank-{self.rank}.pt", map_location="cpu", weights_only=False)
            for name, engine in engines.items():
                if self.args.zero_stage:     # DeepSpeed picks this rank's from a list of all ranks'
                    engine.optimizer.load_state_dict([mine[name]] * self.world, load_from_fp32_weights=True)
                else:
                    engine.optimizer.load_state_dict(mine[name])
            torch.set_rng_state(mine["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["cuda"])

    def after(self, step, rows, log, **own):
        """After each step but the last, on all ranks alike: stops a run that has gone bad or was told to stop, and
        saves now and then. rows are the numbers of the rows of the step, own is what the loop keeps."""
        for name, engine in self.engines.items():                  # fp16 skips some on purpose, to find its scale
            if engine.bad >= 5 and not (engine.fp16_enabled() and engine.optimizer.loss_scale > 1):
                last = next((f"step-{s}" for s in self.steps()), "there is none")
                raise Agreed(f"step {step}: the last {engine.bad} gradients of the {name} were not finite, and the rate may be "
                             f"too high; rows of the data in this step: {rows}; last checkpoint: {last}")
        if step % 50 == 0:                   # or what lies free between blocks in use would grow with the steps
            tell_allocator("malloc_trim", 0)
        every = self.args.save_every
        due = step % every == 0 if every else time.monotonic() - self.saved > 15 * 60
        number, due = max_over_ranks(stop["signal"], due and self.rank == 0)
        if due or number:
            self.save(step, own)
            log.leave_out()
        if number:
            say(f"stopped by {signal.Signals(int(number)).name} after step {step}; --resume goes on from there")
            log.close()
            finish()
            raise SystemExit(128 + int(number))

    def save(self, step, own):
        """Writes a checkpoint: each rank its part, then rank 0 the manifest and the name, and where the disk is not rank
        0's, the first rank of that machine."""
        part = self.folder / f"step-{step}.tmp"
        own |= {"schedules": {name: engine.lr_scheduler.state_dict() for name, engine in self.engines.items()},
                "skipped": {name: engine.skipped_steps for name, engine in self.engines.items()}}
        with fail_together(), writing(part):
            if self.rank == 0 and not self.out.exists():
                raise BadInput(f"{self.out}: the folder has vanished")
            for old in self.folder.glob("*.tmp") if self.first else ():            # an interrupted save's
                shutil.rmtree(old, ignore_errors=True)
        # of each weight itself, its copy in float32 and two moments
        needed = sum(w.nbytes + 12 * getattr(w, "ds_numel", w.numel()) for w in self.weights.values())
        with gathered(self.weights.values()), fail_together(), writing(part, needed):
            part.mkdir(parents=True, exist_ok=True)
            mine = {name: engine.optimizer.state_dict() for name, engine in self.engines.items()}
            mine["random"] = torch.get_rng_state()
            if torch.cuda.is_available():
                mine["cuda"] = torch.cuda.get_rng_state()
            torch.save(mine, part / f"rank-{self.rank}.pt")
            if self.rank == 0:
                save_file({n: w.detach().cpu().contiguous() for n, w in self.weights.items()}, part / "weights.safetensors")
                sizes = {name: (self.out / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")
                         if (self.out / name).exists()}
                (part / "run.json").write_text(json.dumps({"step": step, "flags": self.flags, "sizes": sizes, "own": own}))
            names = [f"rank-{self.rank}.pt"] + ["weights.safetensors", "run.json"] * (self.rank == 0)
            prints = {name: fingerprint(part / name, sync=True) for name in names}
        manifest = {name: mark for some in from_all(prints) for name, mark in some.items()}
        for turn in (self.rank == 0, self.rank > 0 and self.first):        # then where another machine has another disk
            with fail_together(), writing(part):
                if turn and part.exists():
                    self.publish(part, manifest)
        self.saved = time.monotonic()

    def publish(self, part, manifest):
        """The last act of a checkpoint, after which it counts; of those before, one is kept."""
        with suppress(BadInput):             # one disk: rank 0 did it, though a cache may still show the old name
            if read_json(part.with_suffix("") / "manifest.json") == manifest:
                return
        write_whole(part / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(part.with_suffix(""), ignore_errors=True)    # there, damaged, where the run was resumed before it
        part.rename(part.with_suffix(""))
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)                 # the name is on the disk too
        os.close(descriptor)
        now = int(part.stem[5:])             # a newer step is a damaged one, or another rank does not have it
        for old in [s for s in self.steps() if s > now] + [s for s in self.steps() if s <= now][2:]:
            shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def finish(self, log):
        """After the model is saved: marks the run as complete, and leaves."""
        if self.rank == 0:
            with writing(self.out):
                write_whole(self.out / "args.json", json.dumps({**self.flags, "finished": True}, indent=2) + "\n")
        log.close()
        finish()

def write_whole(path, text):
    """Writes a file so that at any moment the old one or the new one is there, never a part."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    fingerprint(new, sync=True)
    new.replace(path)

def modified(args):
    """When the newest of the files that a run reads was modified, in whole seconds."""
    files = [*args.data, *(args.eval_data or []), *(getattr(args, "ptx_data", None) or [])]
    for name in ("model", "actor", "reward"):
        if folder := getattr(args, name, None):
            files += [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    return max(int(Path(file).stat().st_mtime) for file in files)

def fingerprint(file, sync=False):
    """[size, SHA-256] of a file; sync: it is on the disk itself before this returns."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        while piece := f.read(2**24):
            digest.update(piece)
    return [file.stat().st_size, digest.hexdigest()]

def finish():
    dist.barrier()                           # without these two, some runs of two CPU ranks abort at exit
    dist.destroy_process_group()

def run(main):
    """main(), and the ways it can end. BadInput becomes one line and exit status 2. A rank that fails says why, leaves at
    once, and those that lose touch with it leave in silence."""
    rank = os.environ.get("RANK", "0")
    try:
        main()
        if int(os.environ["WORLD_SIZE"]) > 1:                      # one rank of two has aborted in the interpreter's end
            leave(0)
    except Agreed as error:                  # by all ranks at one place
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        finish()
        leave(2)
    except BadInput as error:
        if rank == "0" or dist.is_initialized() or isinstance(error, CannotMeet):
            tell_failed()
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)                    # the launcher kills rank 0 soon after another has left: let it speak
        leave(2)
    except (SystemExit, KeyboardInterrupt) as error:
        tell_failed()
        leave(130 if isinstance(error, KeyboardInterrupt) else error.code or 0)
    except Exception as error:
        if isinstance(error, TimeoutError | dist.DistError) or isinstance(error, RuntimeError) and "gloo/" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)          # the launcher's: there is no step to end any more
            if not another_spoke():
                print(f"error: rank {rank} has lost touch with another rank ({str(error).splitlines()[0]}); the "
                      f"launcher names one that was killed", file=sys.stderr, flush=True)
            time.sleep(0 if "imed out" in str(error) else 3)       # the launcher is to name the one that was killed first
        else:
            tell_failed()
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if rank == "0" and dist.is_initialized() and dist.get_world_size() > 1:
                time.sleep(2)                # it keeps the store, from which others learn that it has failed
        leave(1)

def tell_failed():
    """Tells the ranks that wait for this one that it leaves, and prints why."""
    with suppress(Exception):
        dist.distributed_c10d._get_default_store().set("failed", "")

def another_spoke():
    """Whether a rank has failed and said why, or rank 0, which keeps the store of such words, is gone."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                   # the store complains in C++, with a stack
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return store.check(["failed"])
    except Exception:
        return True
    finally:
        os.dup2(stderr, 2)

def leave(status):
    """Without the end of the interpreter, in which threads of a broken process group wait or abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)

if __name__ == "__main__":
    run(main)
