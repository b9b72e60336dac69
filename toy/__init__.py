"""The toy: a tiny world of questions and answers on which the whole recipe runs in minutes.

`python -m toy` writes toy/made/ once, in about a minute. The folder holds `base`, a LLaMA of about a million
parameters that knows the facts of the world. Beside `base` lie the demonstrations, preferences and prompts
that the three steps train on, each with a held-out file. A script that is given no flags reads
toy/SCRIPT.args.
"""
import os
import shutil
from pathlib import Path

from runtime.errors import BadInput

MADE = Path(__file__).resolve().parent / "made"

def make(seed: int = 1234, made: Path | None = None) -> bool:
    """Makes the folder (by default toy/made) whole or not at all. Returns False where the folder is there
    already. Raises BadInput where the folder cannot be written."""
    from toy.base import make_base  # loads torch, which the readers of toy/world.py alone do not need
    from toy.world import write_files

    made = Path(made or MADE)
    if made.exists():
        return False
    unfinished = made.with_name(f"{made.name}.{os.getpid()}")
    try:
        make_base(unfinished / "base", seed)
        write_files(unfinished, seed)
        unfinished.rename(made)
    except OSError as error:
        raise BadInput(f"{made}: cannot be made ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True
