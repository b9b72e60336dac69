"""The embedded default: a tiny world of questions and answers, on which a script runs that is given no flag.

make() writes toy/made/ (about a minute, once): `base`, a LLaMA of a million parameters that knows the world's facts,
and beside it the demonstrations, preferences and prompts that the three steps train on, with their held-out files.
"""
import os
import shutil
from pathlib import Path

from llama import BadInput

HERE = Path(__file__).resolve().parent
MADE = HERE / "made"
MADE_BY = {"runs/toy/sft": "deepspeed sft.py", "runs/toy/reward": "deepspeed reward.py",
           "runs/toy/ppo": "deepspeed ppo.py"}                     # each with no flag


def flags(script):
    """The words that stand for no flags: those of toy/SCRIPT.args, whose paths start at the project's folder."""
    os.chdir(HERE.parent)
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}.py: no flags given, so the toy's are taken: @toy/{script}.args", flush=True)
    return [f"@toy/{script}.args"]


def prepare(rank, *paths):
    """Where the paths lie in the toy's folders: rank 0 (None: nobody) makes the world if it is missing; BadInput names
    the command that makes the run which is."""
    for path in filter(None, paths):
        if not Path(path).exists() and str(path) in MADE_BY:
            raise BadInput(f"{path}: is not there yet; `{MADE_BY[path]}` makes it")
    if rank == 0 and any(str(path).startswith("toy/made/") for path in paths):
        make()


def make(seed=1234, made=None):
    """Makes the folder (by default toy/made) where it is missing: whole, or not at all."""
    from toy.base import make_base
    from toy.world import write_files
    made = Path(made or MADE)
    if made.exists():
        return
    print(f"making the toy's world and base model in {made}", flush=True)
    unfinished = made.with_name(f"{made.name}.{os.getpid()}")
    try:
        make_base(unfinished / "base", seed)
        write_files(unfinished, seed)
        unfinished.rename(made)
    except OSError as error:
        raise BadInput(f"{made}: cannot be made ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

