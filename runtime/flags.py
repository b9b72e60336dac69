"""What the command lines of several scripts share."""
import argparse
import shlex
import sys
from pathlib import Path

import torch

from runtime.errors import BadInput

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

def accumulate(args, flag, batch, world):
    """Micro-batches per rank and optimiser step; BadInput where the batch does not divide into them. A micro-batch is
    at most what one rank has of the batch."""
    args.micro_batch = micro = min(args.micro_batch, max(1, batch // world))
    if batch % (micro * world):
        processes = f"{world} process{'es' * (world > 1)}"
        raise BadInput(f"{flag} {batch} does not divide by --micro-batch {micro} x {processes}")
    return batch // (micro * world)
