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
import json
import logging
import math
import os
import shlex
import shutil
import socket
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import collate_sft, deal, encode_sft, load_records, open_tokenizer, stream
from llama import BadInput, copy_tokenizer
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
    # all ranks take equally many passes (ZeRO-3 waits for all): a filler row is all prompt and counts nothing
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
    with together():
        accumulation = accumulate(args, "--batch", args.batch, world)
        full, adapter = resolve(args.model, args.base)
        check_folders(args, adapter, full)
        tokenizer, config, tokenizer_folder = open_tokenizer(args.model, args.base, args.max_len)
        train, held_out = load_rows(args, 0, encode_sft, tokenizer, args.max_len, args.batch, Counter())

    # 2. the model, and the weights of it that are trained
    with together():
        model = load_model(args.model, dtype, device, args.base)
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
        model.config, model.model.checkpointing = config, args.checkpointing    # config with the tokenizer's BOS, EOS
        start_run(args, rank)
    steps = args.steps or args.epochs * (len(train) // args.batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = make_engine(args, model, trained, args.lr, steps, args.micro_batch, accumulation, dtype)
    log = Log(args, steps, rank, CURVES)

    log.line(step=0, eval_ppl=perplexity(model, held_out, args.micro_batch, device))
    lengths = [len(ids) for ids, _ in train]
    for step, (epoch, rows) in zip(range(1, steps + 1), stream(lengths, args.batch, args.seed)):
        # 3. one global batch, formed before it is dealt, and its loss per response token of the whole of it
        rows = [train[i] for i in rows]
        total = n_labels(rows) / (world * accumulation)            # the engine divides by both
        model.train()
        lr, nll = engine.get_lr()[0], 0.0
        for micro in deal(rows, rank, world, args.micro_batch):
            ids, mask, labels = (x.to(device) for x in collate_sft(micro))
            loss = sft_loss(*response_logits(engine, ids, mask, labels), total)
            engine.backward(loss)
            engine.step()
            nll += float(loss.detach())
        # 4. what is logged is the loss of the global batch
        loss = sum_over_ranks(nll)[0] / (world * accumulation)
        log.step(sum(len(ids) for ids, _ in rows), epoch=epoch, loss=loss, lr=lr, **engine_metrics(engine))
        if step % args.eval_every == 0 or step == steps:
            log.line(step=step, eval_ppl=perplexity(model, held_out, args.micro_batch, device))

    # 5. the folder
    save(model, args.out, rank, tokenizer_folder, "default" if lora_layers(model) else None, full)
    log.close()
    finish()

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
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")         # tensors on huge pages: a quarter less time for logits
        if "OMP_NUM_THREADS" not in os.environ:                    # ranks of one machine share its cores
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", 1))))
    import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:                             # plain gloo: DeepSpeed's shared-memory extension needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    except dist.DistNetworkError as error:   # most often another run's port
        raise BadInput(f"the ranks cannot meet: {str(error).splitlines()[0]} (for two runs at once on one machine: "
                       f"deepspeed --master_port 29501 ...)") from None
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                # with a mask its gradients can be NaN (pytorch #196678)
    best = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    name = best if args.dtype == "auto" else args.dtype
    if name == "fp16" and not cuda:
        raise BadInput("--dtype fp16 needs a GPU; on CPU there are fp32 and bf16")
    with together():
        import toy                           # makes the toy world where the flags name it and it is not there
        toy.prepare(rank, *(getattr(args, name, None) for name in ("model", "actor", "reward")), *args.data)
    torch.manual_seed(args.seed)
    script, processes = Path(sys.argv[0]).name, f"{world} process{'es' * (world > 1)}"
    say(f"{script}: {processes} on {device.type}, {name}, ZeRO-{args.zero_stage}")
    return rank, world, device, DTYPES[name]

def say(text):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)

@contextmanager
def together():
    """If a rank meets BadInput in the body, all raise it, and none is left waiting for it."""
    mine, errors = None, [None] * dist.get_world_size()
    try:
        yield
    except BadInput as error:
        mine = str(error)
    dist.all_gather_object(errors, mine)
    if any(errors):
        raise BadInput(next(e for e in errors if e))

def sum_over_ranks(*numbers):
    """The sum over ranks of each number, in float64."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x)
    return x.tolist()

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

def check_folders(args, adapter, *folders):
    """BadInput where --out is a folder that is read, or holds another run, or where --lora-rank asks for an adapter
    on an adapter; before any weights load."""
    if args.lora_rank and adapter:
        raise BadInput(f"--lora-rank: {adapter} is an adapter already, which is trained on; leave the flag out")
    read = [folder.resolve() for folder in (adapter, *folders) if folder]
    if any((Path(args.out) / part).resolve() in read for part in ("", "critic", "ema")):
        raise BadInput(f"--out {args.out}: is a folder that this run reads; choose another")
    if not args.overwrite and any((Path(args.out) / name).exists() for name in WRITTEN):
        raise BadInput(f"--out {args.out}: holds a run or a model already; choose another folder, or --overwrite")

def start_run(args, rank):
    """Rank 0 makes --out and writes args.json; BadInput where it cannot be written."""
    out = Path(args.out)
    torch.manual_seed(args.seed + rank)      # the new weights are made; dropout differs between ranks
    if rank:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:                 # an adapter_config.json left behind would win over the new full model
            (out / name).unlink(missing_ok=True)
        for part in ("critic", "ema"):
            shutil.rmtree(out / part, ignore_errors=True)
        versions = {name: sys.modules[name].__version__ for name in ("torch", "deepspeed")}
        flags = {**vars(args), "world_size": dist.get_world_size(), "versions": versions}
        (out / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from None

def make_engine(args, model, trained, lr, steps, micro, accumulation, dtype):
    """A DeepSpeed engine that trains these parameters of model: AdamW, warm-up and cosine over `steps`."""
    import deepspeed
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}    # whole, where ZeRO-3 has cut p up
    n_trained, n = (sum(math.prod(shapes[p]) for p in some) for some in (trained, shapes))
    say(f"training {n_trained:,} of {n:,} weights for {steps:,} steps")
    # weight decay pulls matrices towards 0; a norm's weight belongs near 1. An empty group would crash DeepSpeed
    groups = [{"params": [p for p in trained if len(shapes[p]) >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if len(shapes[p]) < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, round(args.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / warmup) * 0.5 * (
        1 + math.cos(math.pi * min(1, max(0, n + 1 - warmup) / max(1, steps - warmup + 1)))))
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
              "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
              "zero_optimization": {"stage": args.zero_stage, "reduce_bucket_size": 50_000_000,      # elements
                                    "stage3_prefetch_bucket_size": 0},       # two engines on one base: none ahead
              "zero_allow_untested_optimizer": True,               # torch's AdamW: DeepSpeed's own compiles C++
              "gradient_clipping": args.grad_clip, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]

def engine_metrics(engine):
    norm = engine.get_global_grad_norm()     # None under ZeRO-0 in float32
    return {"skipped": engine.skipped_steps} | ({} if norm is None else {"grad_norm": float(norm)})

class Log:
    """metrics.jsonl, a line per logged step, curves.png drawn from it, and the progress bar; rank 0 alone."""
    def __init__(self, args, steps, rank, curves):
        self.out, self.curves, self.drawn = Path(args.out), curves, time.perf_counter()
        self.file = None if rank else open(Path(args.out) / "metrics.jsonl", "w")
        # disable=None: the bar is only on a terminal
        self.bar = tqdm(total=steps, disable=rank > 0 or None, dynamic_ncols=True, unit="step")
        self.every, self.steps, self.n, self.tokens, self.since = args.log_every, steps, 0, 0, time.perf_counter()

    def step(self, tokens, **metrics):
        """After each step: tokens it took in, what it measured."""
        self.tokens += tokens
        self.n += 1
        self.bar.update()
        if self.n % self.every == 0 or self.n in (1, self.steps):
            now = time.perf_counter()
            self.line(step=self.n, **metrics, tokens_per_s=self.tokens / (now - self.since))
            self.tokens, self.since = 0, now

    def line(self, **metrics):
        if self.file is None:
            return
        print(json.dumps(metrics), file=self.file, flush=True)
        self.since = self.since if self.tokens else time.perf_counter()      # tokens_per_s is without evaluation
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
        if time.perf_counter() - self.drawn > 60:
            self.draw()

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
        figure.suptitle(str(self.out))
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

    def close(self):
        """After the model is saved: no picture is worth losing one."""
        self.bar.close()
        if self.file:
            self.file.close()
            self.draw()
            if not (self.out / "curves.png").exists():
                say("no curves.png: matplotlib is not installed")

def gathered(model):
    """Under ZeRO-3 the weights lie in pieces on all ranks; inside this context every rank holds them whole."""
    import deepspeed
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()

def save(model, out, rank, tokenizer_folder, adapter, base, average=()):
    """Writes the model, or only the adapter of this name, and its tokenizer, as transformers or PEFT load them.
    average: pairs (parameter, its moving average), which then takes the parameter's place."""
    with gathered(model):
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

def finish():
    dist.barrier()                           # without these two, some runs of two CPU ranks abort at exit
    dist.destroy_process_group()

def run(main):
    """main(); BadInput becomes one line, by rank 0, and exit status 2, on every rank."""
    try:
        main()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not dist.is_initialized():
            time.sleep(5)                    # the launcher kills rank 0 soon after another has left: let it speak
        if dist.is_initialized():
            finish()
        sys.exit(2)

if __name__ == "__main__":
    run(main)
