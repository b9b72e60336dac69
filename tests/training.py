"""Trainers that run in the process of the test: a few steps take a second, and no number is hidden.

Ranks are threads here. What real ranks do together through gloo or nccl, threads do through a barrier.
"""
import signal
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import runtime.checkpoint
from conftest import metrics, tiny_llama
from runtime.log import Log
from runtime.tokenizer_write import copy_tokenizer

class Ranks:
    """torch.distributed for `world` threads, whose ranks are thread-local."""

    def __init__(self, world):
        self.world, self.local = world, threading.local()
        self.barrier, self.slots = threading.Barrier(world, timeout=60), [None] * world

    def exchange(self, thing):
        """What all ranks hand over, in the order of the ranks."""
        self.slots[self.local.rank] = thing
        self.barrier.wait()
        things = list(self.slots)
        self.barrier.wait()                  # or the next exchange would write into a slot not yet read
        return things

    def all_reduce(self, x, op=dist.ReduceOp.SUM):
        parts = torch.stack(self.exchange(x.clone()))
        x.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))

    def all_gather(self, parts, x):
        shapes = {tuple(other.shape) for other in self.exchange(x)}
        assert len(shapes) == 1, "gloo and nccl gather tensors of one shape only"
        for part, other in zip(parts, self.exchange(x.clone()), strict=True):
            part.copy_(other)

    def all_gather_object(self, things, thing):
        things[:] = self.exchange(thing)

    def broadcast(self, x, source):
        x.copy_(self.exchange(x.clone())[source])

    def patch(self, monkeypatch):
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
            monkeypatch.setattr(dist, name, getattr(self, name))
        monkeypatch.setattr(dist, "get_rank", lambda: self.local.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: self.world)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "barrier", lambda: self.exchange(None))


def on_ranks(world, work, monkeypatch):
    """[work(rank) of each rank], where dist and runtime.ranks mean these ranks."""
    ranks, results, errors = Ranks(world), [None] * world, []

    def run(rank):
        ranks.local.rank = rank
        try:
            results[rank] = work(rank)
        except BaseException as error:       # of a thread, pytest would not see it
            errors.append(error)
            ranks.barrier.abort()

    with monkeypatch.context() as patches:
        ranks.patch(patches)
        threads = [threading.Thread(target=run, args=[rank]) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


class PlainEngine:
    """An engine of plain PyTorch. The gradient is the mean over micro-batches and ranks, as DeepSpeed's is;
    the update is gradient descent. The engine keeps the gradient of every update."""

    def __init__(self, args, model, trained, lr, updates, accumulation, dtype, shares=False):
        self.model, self.trained, self.accumulation, self.updates = model, trained, accumulation, updates
        self.optimizer = torch.optim.SGD(trained, lr=lr)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda done: 1 - done / updates)
        self.micro_batches, self.skipped_steps, self.skipped_in_a_row, self.gradients = 0, 0, 0, []
        for p in trained:
            dist.broadcast(p.data, 0)

    def __call__(self, *inputs, **more):
        return self.model(*inputs, **more)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def is_gradient_accumulation_boundary(self):
        return (self.micro_batches + 1) % self.accumulation == 0

    def step(self):
        is_update = self.is_gradient_accumulation_boundary()
        self.micro_batches += 1
        if is_update:
            gradient = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                                  for p in self.trained])
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
            self.gradients.append(gradient)
            for p, part in zip(self.trained, gradient.split([p.numel() for p in self.trained]), strict=True):
                p.grad = part.view_as(p)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()

    def get_lr(self):
        return self.lr_scheduler.get_last_lr()

    def get_global_grad_norm(self):
        return float(self.gradients[-1].norm())

    def fp16_enabled(self):
        return False


def prepare(script, words, monkeypatch, world=1):
    """Lets script.main() run in this process, with these words as its command line."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import_module("deepspeed")               # args.json names its version

    def setup(args):
        torch.manual_seed(args.seed)
        return dist.get_rank(), world, torch.device("cpu"), torch.float32

    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, words)])
    monkeypatch.setattr(script, "setup", setup)
    monkeypatch.setattr(runtime.checkpoint, "finish", lambda: None)
    monkeypatch.setattr(runtime.checkpoint, "keep_memory", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Log, "draw", lambda log: None)


def train(script, words, out, monkeypatch, world=1):
    """Runs a trainer with PlainEngine on so many ranks. Returns its folder `out`, the lines of its metrics,
    and the engines of rank 0 in the order in which they were made."""
    engines = []

    def make_engine(*arguments, **named):
        engine = PlainEngine(*arguments, **named)
        if dist.get_rank() == 0:
            engines.append(engine)
        return engine

    with monkeypatch.context() as patches:
        prepare(script, [*words, "--out", out], patches, world)
        patches.setattr(script, "make_engine", make_engine)
        on_ranks(world, lambda rank: script.main(), patches)
    lines = [{key: x for key, x in line.items() if key != "tokens_per_s"} for line in metrics(out)]
    return SimpleNamespace(out=Path(out), lines=lines, engines=engines)


def spy(script, name, monkeypatch):
    """A list to which every call of the function of this name adds its (arguments, result)."""
    function, calls = getattr(script, name), []

    def spying(*arguments, **named):
        result = function(*arguments, **named)
        calls.append((arguments, named, result))
        return result

    monkeypatch.setattr(script, name, spying)
    return calls


def save_talker(folder, tokenizer_file):
    """Writes a tiny model whose answers end after a few words."""
    model = tiny_llama(std=0.05)
    with torch.no_grad():                    # a constant in all hidden states, which the head makes a bias
        model.model.embed_tokens.weight[:, 0] = 5
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[:2, 0] = -40
        model.lm_head.weight[2, 0] = 0.6
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer_file.parent, folder)
    return folder
