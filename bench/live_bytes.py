"""How many bytes of tensors are alive: what torch.cuda.max_memory_allocated says of a GPU, on a CPU.

    python bench/live_bytes.py sft --model ...    # runs a trainer and prints each rank's peak
"""
import os
import sys
import weakref
from importlib import import_module
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class LiveBytes(TorchDispatchMode):
    """While it is entered, it sees every operation of PyTorch, the backward pass's too, and counts each new
    piece of memory until it is freed. What was there before is not counted: `but` are tensors of it."""

    def __init__(self, but=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata: None for x in but}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                self.count(x.untyped_storage())
        return result

    def count(self, memory):
        key, size = memory._cdata, memory.nbytes()
        if key in self.known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self.known[key] = weakref.finalize(memory, self.forget, key, size)
        self.known[key].atexit = False

    def forget(self, key, size):
        self.now -= size
        del self.known[key]


def main():
    """Runs the trainer that the first word names. Each rank prints its peak where it says goodbye."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    name = next(word for word in sys.argv[1:] if not word.startswith("-"))   # the launcher's flag comes first
    sys.argv.remove(name)
    script, checkpoint = import_module(name), import_module("runtime.checkpoint")
    live, finish = LiveBytes(), checkpoint.finish

    def print_and_finish():
        print(f"rank {os.environ['RANK']} peak {live.peak}", flush=True)
        finish()

    def run():
        with live:
            script.main()

    checkpoint.finish, checkpoint.keep_memory = print_and_finish, lambda: None
    import_module("runtime.ranks").run(run)


if __name__ == "__main__":
    main()
