"""The DeepSpeed engine: its configuration, optimiser and schedule, written out; and weights that ZeRO-3 has
divided."""
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.folders import writing
from runtime.gpu import free_memory, rows_at_once
from runtime.ranks import fail_if_another_did, fail_together, max_over_ranks, say

def make_engine(args: Namespace, model: nn.Module, trained: list[nn.Parameter], lr: float, updates: int,
                accumulation: int, dtype: torch.dtype, shares: bool = False):
    """A DeepSpeed engine that trains these parameters of model for so many updates of `accumulation`
    micro-batches. shares: another engine trains other parameters of the same network."""
    import deepspeed
    gpu = torch.cuda.is_available()
    # ds_shape is the shape of the whole, where ZeRO-3 has divided a weight
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}
    ours = set(trained)                      # other roles' adapters on the same base do not count
    used = ours | {p for name, p in model.named_parameters() if ".lora_" not in name}
    n_trained, n_used = (sum(math.prod(shapes[p]) for p in some) for some in (ours, used))
    say(f"training {n_trained:,} of {n_used:,} weights in {updates:,} updates")
    is_adapter, is_bf16 = 10 * n_trained < n_used, dtype == torch.bfloat16
    # Weight decay pulls a matrix towards 0; a norm's weight belongs near 1. An empty group would crash
    # DeepSpeed.
    groups = [{"params": [p for p in trained if len(shapes[p]) >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if len(shapes[p]) < 2], "weight_decay": 0.0}]
    optimizer_class = torch.optim.AdamW if args.zero_stage else AdamW
    optimizer = optimizer_class([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, round(args.warmup * updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_share(done, warmup, updates))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config={
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": is_bf16},
        "fp16": {"enabled": dtype == torch.float16},
        "gradient_clipping": args.grad_clip,
        # In bf16 a sum over many micro-batches loses digits; in float32 an adapter's sum is still small. Not
        # with --offload: there DeepSpeed keeps a float32 sum that is not finite, and skips all later updates.
        "data_types": {"grad_accum_dtype": "fp32" if is_adapter and is_bf16 and args.zero_stage
                       and not args.offload else None},
        "zero_optimization": {
            "stage": args.zero_stage,
            "reduce_bucket_size": min(n_trained, 50_000_000 if gpu else 2_000_000),        # elements
            "overlap_comm": gpu,                       # reduce gradients during the backward pass
            # elements that ZeRO-3 fetches ahead; it would mix up two engines on one network
            "stage3_prefetch_bucket_size": 0 if shares else 50_000_000,
            "offload_optimizer": {"device": "cpu", "pin_memory": gpu} if args.offload else None,
        },
        # PyTorch's AdamW, on a GPU and for --offload on the CPU: DeepSpeed's own compile C++
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # the timer would wait for the GPU at every step
        "steps_per_print": 10**9,
    })[0]
    engine.skipped_in_a_row, engine.trained = 0, trained
    if is_bf16 and not args.zero_stage:      # there Adam has counted a step of zeros by DeepSpeed
        moments_of(engine).clear()
    if dtype == torch.float16 and args.zero_stage:
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False          # Run.end_step ends the run
    return engine

def rate_share(done: int, warmup: int, updates: int) -> float:
    """The learning rate after `done` updates, as a share of the highest: a straight line up, then a cosine
    down."""
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done + 1 - warmup) / (updates - warmup + 1))

class AdamW(torch.optim.AdamW):
    """AdamW that skips a gradient that is not finite. DeepSpeed skips one by itself only under ZeRO; without
    ZeRO it reads `overflow` here, and counts the update as skipped."""
    overflow = False

    def step(self, closure: Callable | None = None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not math.isfinite(torch.nn.utils.get_total_norm(gradients))
        if not self.overflow:
            super().step(closure)

def backward_and_step(engine, loss: Tensor):
    """One backward pass, and an update where it ends an accumulation. engine.skipped_in_a_row counts the last
    updates that were skipped because their gradient was not finite."""
    skipped = engine.skipped_steps
    engine.backward(loss)
    is_update = engine.is_gradient_accumulation_boundary()
    engine.step()
    if is_update:
        engine.skipped_in_a_row = engine.skipped_in_a_row + 1 if engine.skipped_steps > skipped else 0

def engine_metrics(engine) -> dict[str, float]:
    """What is logged of the last update; DeepSpeed knows no norm of the gradient without ZeRO in float32."""
    norm = engine.get_global_grad_norm()
    return {"skipped": engine.skipped_steps} | ({} if norm is None else {"grad_norm": float(norm)})

def moments_of(engine) -> dict:
    """{weight: Adam's moments}, as PyTorch's optimiser inside an engine has them."""
    optimizer = engine.optimizer             # DeepSpeed's around PyTorch's, or PyTorch's itself
    return getattr(optimizer, "optimizer", optimizer).state

# ------------------------------------------------------------ ZeRO-3
def numbers_of_whole(p: Tensor) -> int:
    """The numbers of a weight, of which ZeRO-3 may have left this rank a piece."""
    return getattr(p, "ds_numel", p.numel())

def bytes_of_whole(p: Tensor) -> int:
    return numbers_of_whole(p) * p.element_size()

def gathered(parameters: Iterable[Tensor]):
    """A context in which every rank holds these weights whole. Under ZeRO-3 they lie in pieces on all
    ranks."""
    divided = [p for p in parameters if hasattr(p, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(divided)

@contextmanager
def made_whole(network: nn.Module, engines: Iterable):
    """A context in which every rank holds the network whole and calls its layers without waiting for others.
    engines: all that train a part of the network. Under ZeRO-3 their hooks would gather every layer anew for
    each token, and give it back; so they are taken off, and put on again at the end. (One hook of the whole
    network stays, which waits for all ranks: decode calls only parts of it.)"""
    offloads = [engine.optimizer.parameter_offload for engine in engines
                if hasattr(engine.optimizer, "parameter_offload")]
    with gathered(network.parameters()):
        for offload in offloads:
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            for offload in offloads:
                offload._register_deepspeed_module(offload.module)

def give_back_fetched(engines: Iterable):
    """After a pass without a backward pass, as in an evaluation. ZeRO-3 may have fetched weights ahead for a
    backward pass that does not come, and cannot gather them for saving until they are given back."""
    for engine in engines:
        if hasattr(engine.optimizer, "parameter_offload"):
            engine.optimizer.parameter_offload.partition_all_parameters()

def room_for_answers(args: Namespace, network: nn.Module, engines: Iterable) -> int | None:
    """How many answers the GPU of every rank has room to generate at one time, beside what is still to come
    for the weights that the engines train. The smallest number of all ranks, so that all take equally many
    pieces. On a CPU None: all at one time."""
    free = free_memory()
    if free is None:
        return None
    weights, world = list(network.parameters()), dist.get_world_size()
    if world > 1:                            # what made_whole will take, where ZeRO-3 has divided the weights
        free -= sum(bytes_of_whole(p) - p.nbytes for p in weights)
    # two moments in float32, which the first update makes; a resumed run may have read them already
    coming = [p for engine in engines if not moments_of(engine) for p in engine.trained]
    if not args.offload:
        free -= 8 * sum(numbers_of_whole(p) for p in coming) / (world if args.zero_stage else 1)
    columns = args.max_prompt + args.max_new
    mine = rows_at_once(free, network.config, weights[0].element_size(), args.max_prompt, columns)
    rows = -int(max_over_ranks(-mine)[0])
    say(f"generating up to {rows:,} answers per GPU at a time (--gen-batch)")
    return rows

def divide_frozen(network: nn.Module, args: Namespace, dtype: torch.dtype) -> nn.Module:
    """Under ZeRO-3, divides a network that nothing trains among the ranks, as an engine divides its own; the
    hooks that it gets make it whole layer by layer when it is called. Other stages leave it as it is."""
    if args.zero_stage == 3:
        fail_if_another_did()                # initialize waits for all ranks, and one may have read nothing
        import deepspeed
        deepspeed.initialize(model=network.requires_grad_(False), config={
            "train_micro_batch_size_per_gpu": args.micro_batch,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_optimization": {"stage": 3},
            "steps_per_print": 10**9,
        })
    return network

def save_whole(model: nn.Module, out: object, write: Callable, *more: object):
    """Rank 0 calls write(model, out, *more), which writes the folder `out`, while every rank holds the
    weights whole."""
    needed = sum(bytes_of_whole(p) for p in model.parameters() if p.requires_grad)
    with gathered(model.parameters()), fail_together(), writing(out, needed):
        if dist.get_rank() == 0:
            write(model, out, *more)
    say(f"wrote {out}")
