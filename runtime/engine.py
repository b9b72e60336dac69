"""The DeepSpeed engine: its configuration, optimiser and schedule."""
import ctypes
import math
from contextlib import nullcontext, suppress

import torch

from runtime.ranks import say

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

def gathered(parameters):
    """Under ZeRO-3 the weights lie in pieces on all ranks; inside this context every rank holds these whole."""
    import deepspeed
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()

def keep_memory():
    """glibc returns every large block to the system, which fills the next one with zeros, page by page: a quarter of a
    step's time on CPU. From now on it keeps what it has; up to a quarter more memory was seen."""
    tell_allocator("mallopt", -4, 0)         # M_MMAP_MAX: no block is taken from the system by itself
    tell_allocator("mallopt", -1, -1)        # M_TRIM_THRESHOLD: and none is given back

def tell_allocator(function, *numbers):
    """Calls a function of glibc's; another system's allocator has none of that name, and goes on as it is."""
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*numbers)
