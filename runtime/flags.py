"""Command lines: argparse, with errors in one line, flags from files, and the toy where no flag is given.

    flags = Flags("Step 1 of RLHF: ...")
    add = flags.group("model")
    add("--model", help="LLaMA folder")
    args = flags.parse("model")              # --model must be given
"""
import argparse
import difflib
import importlib.util
import os
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.errors import BadInput
from runtime.trackers import tracker

PROJECT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What makes a folder of the toy that is not there yet.
MADE_BY = {"toy/made": "python -m toy", "runs/toy/sft": "deepspeed sft.py",
           "runs/toy/reward": "deepspeed reward.py", "runs/toy/ppo": "deepspeed ppo.py"}

class Flags(argparse.ArgumentParser):
    """An ArgumentParser whose errors are BadInput. @FILE reads flags from a file, with comments; --a_b is
    --a-b. prog: how the program is called, where it is no script."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(prog, "%(prog)s [flags]", description, fromfile_prefix_chars="@")
        self.known, self.conditions = ["--help"], []

    def group(self, title: str) -> Callable:
        """add_argument for a titled group. It ends the help of a flag with its default. needs="--x" or "--x
        value": the flag is refused unless that other flag is given. unless="--x": it is refused if --x is."""
        group = self.add_argument_group(title)

        def add(name, help, needs=None, unless=None, default=None, **options):
            self.known.append(name)
            if default is not None and help != argparse.SUPPRESS:
                help += f" ({default})"
            if needs or unless:              # it stays None where it is not given; parse fills in the default
                if isinstance(default, str):
                    default = options["type"](default)
                self.conditions.append((name, needs, unless, default))
            elif default is not None:
                options["default"] = default
            group.add_argument(name, help=help, **options)
        return add

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return [with_hyphens(word) for word in shlex.split(line, comments=True)]

    def error(self, message: str):
        raise BadInput(f"{message} (see {self.prog} -h)", everywhere=True)

    def parse(self, *required: str) -> Namespace:
        """The flags of this process. With none but the launcher's, those of toy/SCRIPT.args, from the
        project's folder. args.defaults has the default of each flag."""
        words = [with_hyphens(word) for word in sys.argv[1:]]
        if all(word.startswith("--local-rank") for word in words):
            script = Path(self.prog.split()[-1]).stem              # web, of python -m web
            if os.environ.get("RANK", "0") == "0":
                print(f"{self.prog}: no flags given, so the toy's are taken: @toy/{script}.args", flush=True)
            os.chdir(PROJECT)
            words = [f"@toy/{script}.args"]
        args, unknown = self.parse_known_args(words)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self.known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        if missing := [f"--{name}" for name in required if not getattr(args, name)]:
            self.error(f"{', '.join(missing)} must be given")
        self.check_conditions(args)
        dependent = {key(name): default for name, _, _, default in self.conditions}
        args.defaults = vars(self.parse_known_args([])[0]) | dependent
        for name in ("model", "actor", "reward", "versus", "run", "data"):
            for path in [value] if isinstance(value := getattr(args, name, None), str) else value or []:
                check_toy(path)
        return args

    def check_conditions(self, args: Namespace):
        """Refuses flags that have no effect, and fills in the defaults of those that depend on others."""
        def given(flag):
            name, _, value = flag.partition(" ")
            found = getattr(args, key(name))
            return str(found) == value if value else bool(found)

        for name, needs, unless, default in self.conditions:
            if getattr(args, key(name)) is None:
                setattr(args, key(name), default)
            elif needs and not given(needs):
                self.error(f"{name} has no effect without {needs}")
            elif unless and given(unless):
                self.error(f"{name} has no effect beside {unless}")

def key(flag: str) -> str:
    """The name in args of a flag: lora_rank for --lora-rank."""
    return flag.strip("-").replace("-", "_")

def with_hyphens(word: str) -> str:
    """--lora_rank=8 as --lora-rank=8; other words as they are."""
    name, equals, value = word.partition("=")
    is_flag = name.startswith("--") and " " not in name            # a value may begin with -- too
    return name.replace("_", "-") + equals + value if is_flag else word

def check_toy(path: str):
    """BadInput where a path lies in the toy's folders and has not been made; the line names the command that
    makes it."""
    for folder, command in MADE_BY.items():
        if (path + "/").startswith(folder + "/") and not Path(path).exists():
            raise BadInput(f"{path}: is not there yet; `{command}` makes it", everywhere=True)

# ------------------------------------------------------------ types of flags
def number(low: float, high: float = 1e12, kind: type = float) -> Callable[[str], float]:
    """argparse type of a number from low to high, both included."""
    def parse_number(text):
        try:
            x = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number") from None
        if not low <= x <= high:
            raise ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return x
    return parse_number

positive = number(1, kind=int)

def shares(text: str) -> list[float] | None:
    """argparse type of --split: three shares such as 4,4,2, or none."""
    try:
        numbers = None if text == "none" else [number(0)(x) for x in text.split(",")]
        if numbers is None or len(numbers) == 3 and sum(numbers) > 0:
            return numbers
    except ArgumentTypeError:
        pass
    raise ArgumentTypeError(f"{text} is not three shares such as 4,4,2, nor none")

def column(text: str) -> tuple[str, str]:
    """argparse type of --columns: prompt=question."""
    name, equals, field = text.partition("=")
    if not (name and equals and field):
        raise ArgumentTypeError(f"{text} is not NAME=FIELD, such as prompt=question")
    return name, field

class AsDictionary(argparse.Action):
    def __call__(self, parser, args, pairs, option_string=None):
        pairs = [*(getattr(args, self.dest) or {}).items(), *pairs]          # the flag may be given twice
        if len(dict(pairs)) < len(pairs):
            raise argparse.ArgumentError(self, "names a field twice")
        setattr(args, self.dest, dict(pairs))

# ------------------------------------------------------------ of all three trainers
def add_trainer_flags(flags: Flags):
    """The flags that mean the same in sft.py, reward.py and ppo.py."""
    add = flags.group("division of the data")
    add("--columns", type=column, nargs="+", action=AsDictionary, metavar="NAME=FIELD",
        help="names of fields of the data, as in prompt=question chosen=best rejected=worst (docs/data.md)")
    add("--split", type=shares, default="4,4,2", help="shares of the three steps in files of pairs, or none")
    add("--split-seed", type=int, default=1234, help="of that and of what is held out")
    add("--eval-data", nargs="+", help="held-out files, instead of --eval-share")
    add("--eval-share", type=number(0, 1), default=0.05, unless="--eval-data",
        help="share of the conversations that is held out")
    add = flags.group("run")
    add("--out", help="folder to write")
    add("--overwrite", action="store_true", help="write into a folder that holds another run")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--save-every", type=positive, help="steps between checkpoints; by default one every 15 minutes")
    add("--seed", type=int, default=1234, help="of the order, of new weights and of samples")
    add("--track", type=tracker, metavar="NAME",
        help="record metrics and samples with tensorboard or wandb too; wandb stays offline by default")
    add = flags.group("engine")
    add("--warmup", type=number(0, 1), default=0.03, help="share of steps in which the rate rises")
    add("--weight-decay", type=number(0), default=0.1, help="of matrices; norms and biases get none")
    add("--grad-clip", type=number(0), default=1.0, help="largest norm of the gradient; 0 is off")
    add("--zero-stage", type=int, default=2, choices=range(4),
        help="ZeRO divides the optimiser among the ranks from 1 on, gradients from 2 on, weights at 3")
    add("--offload", action="store_true",
        help="keep the optimiser on the CPU: less memory on the GPU, and slower (ZeRO 1 to 3)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 or fp16 on a GPU, fp32 on CPU")
    add("--checkpointing", action="store_true", help="recompute layers in the backward pass, to save memory")
    add("--timeout", type=number(10, 1e9), default=1800.0,         # in nanoseconds, of 63 bits
        help="seconds that a rank may be silent before the others give up")
    add("--local-rank", type=int, default=-1, help=argparse.SUPPRESS)          # the launcher passes it

def accumulation_steps(args: Namespace, flag: str, batch: int, world: int) -> int:
    """Micro-batches per rank and optimiser step. Lowers args.micro_batch to what one rank has of the batch;
    BadInput where the batch does not divide."""
    args.micro_batch = micro = min(args.micro_batch, max(1, batch // world))
    if batch % (micro * world):
        processes = f"{world} process{'es' * (world > 1)}"
        raise BadInput(f"{flag} {batch} does not divide by --micro-batch {micro} x {processes}")
    return batch // (micro * world)

def load_function(path: str | None, name: str, flag: str) -> Callable | None:
    """The function of that name in a user's Python file, which a flag names; None where the flag is not
    given."""
    if not path:
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not Path(path).exists():
        raise BadInput(f"{flag} {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise BadInput(f"{flag} {path}: has no function {name}(...)")
    return getattr(module, name)
