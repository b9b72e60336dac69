"""The process group: how it starts, what its ranks tell each other, and how a job ends.

A rank is one process, with one GPU or a share of the CPU. DeepSpeed's launcher starts them; plain `python
X.py` is one rank.
"""
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from runtime.errors import BadInput, first_line, is_out_of_memory, is_out_of_ram, note, without_controls
from runtime.flags import DTYPES
from runtime.gpu import gpu_is_usable

# ------------------------------------------------------------ the start
def setup(args: Namespace) -> tuple[int, int, torch.device, torch.dtype]:
    """Starts the process group, with the launcher or without: (rank, world size, device, dtype). Replaces
    --dtype auto."""
    # Before CUDA starts and PyTorch reads it: texts of many lengths would cut the memory into pieces that
    # are too small for the next text.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cuda = gpu_is_usable()
    warnings.filterwarnings("ignore")
    if args.dtype == "fp16" and not cuda:
        raise BadInput("--dtype fp16 needs a GPU; on CPU there are fp32 and bf16", everywhere=True)
    if args.dtype == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bf16" if bf16 else "fp16" if cuda else "fp32"
    check_stage(args)
    if args.offload and not cuda:
        note("--offload: on a CPU the optimiser is in the CPU's memory anyway, and the flag takes more of it")
    if "RANK" not in os.environ:
        pretend_launcher()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # the ranks of one machine share its cores, with --offload too
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_SIZE", 1))))
    start_group(cuda, timedelta(seconds=args.timeout))
    torch.manual_seed(args.seed)             # the same new weights on every rank
    rank, world = dist.get_rank(), dist.get_world_size()
    say(f"{Path(sys.argv[0]).name}: {world} process{'es' * (world > 1)} on {device.type}, {args.dtype}, "
        f"ZeRO-{args.zero_stage}")
    return rank, world, device, DTYPES[args.dtype]

def cores() -> int:
    """The cores that this process may use: all, or the share that Slurm or a container gives it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def check_stage(args: Namespace):
    """BadInput where DeepSpeed would train wrongly at this ZeRO stage, or not at all."""
    if args.zero_stage == 0 and args.dtype == "fp16":
        raise BadInput("--zero-stage 0 with fp16: DeepSpeed does not scale the loss there, so the gradients "
                       "vanish; use --zero-stage 1, or --dtype bf16", everywhere=True)
    if args.zero_stage == 0 and args.offload:
        raise BadInput("--offload needs --zero-stage 1, 2 or 3", everywhere=True)

def pretend_launcher():
    """Sets what DeepSpeed's launcher would set for one process, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))

def start_group(cuda: bool, timeout: timedelta):
    """All ranks meet. From then on a collective call that takes longer than timeout raises an error on those
    who wait."""
    import deepspeed
    import deepspeed.runtime.bf16_optimizer
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None          # ten lines per engine
    if not cuda:                             # DeepSpeed's shared-memory extension needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    c10d = dist.distributed_c10d             # DeepSpeed's own groups take torch's default timeouts
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=timeout)
    except dist.DistError as error:          # most often the port of another run
        raise BadInput(f"the ranks cannot meet: {first_line(error)} (for two runs at once on one "
                       f"machine: deepspeed --master_port 29501 ...)") from None

# ------------------------------------------------------------ talking to each other
def say(text: str):
    """Prints on rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        with suppress(OSError):              # a log on a full disk must not end the run
            tqdm.write(without_controls(text), file=sys.stdout)

@contextmanager
def fail_together():
    """If the body raises BadInput on some ranks, all ranks raise it, so that none waits for a rank that has
    gone. A body in which ranks wait for each other calls fail_if_another_did before."""
    mine = None
    try:
        yield
    except BadInput as error:
        if error.everywhere:                 # all ranks know it already
            raise
        mine = str(error)
    if errors := [error for error in from_all(mine) if error]:
        raise BadInput(errors[0], everywhere=True)

def fail_if_another_did():
    """Inside fail_together: where another rank has raised BadInput by now, this one raises it too."""
    with fail_together():
        pass

def from_all(thing: object) -> list:
    """What each rank hands over, in the order of the ranks, on every rank."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things

def gather(x: Tensor) -> Tensor:
    """The rows of all ranks' tensors, which have one shape, in the order of the ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)

def sum_over_ranks(*numbers: float) -> list[float]:
    """The sum over the ranks of each number, in float64."""
    return reduced(numbers, dist.ReduceOp.SUM)

def max_over_ranks(*numbers: float) -> list[float]:
    """The largest of each number over the ranks."""
    return reduced(numbers, dist.ReduceOp.MAX)

def reduced(numbers, operation):
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x, operation)
    return x.tolist()

# ------------------------------------------------------------ the end
OUT_OF_MEMORY = ("the {} is not enough; take a smaller --micro-batch, --checkpointing or --lora-rank, in "
                 "ppo.py a smaller --gen-batch, {} (docs/memory.md says what fits)")
GPU_OR_RAM = (("memory", "--offload, or on several GPUs --zero-stage 3"),
              ("RAM", "and neither --offload nor --ema, which use it"))

def finish():
    """The end of every main. Without the barrier and the destruction, some runs of two CPU ranks abort at
    exit."""
    dist.barrier()
    dist.destroy_process_group()

def run(main: Callable[[], None]):
    """Runs main and ends the process: status 0, or 2 after BadInput, 128 + n after signal n, 1 after any
    other error.

    The launcher ends all ranks as soon as it finds one that has failed, and names that one. So a rank whose
    words matter leaves at once, and a rank that only lost the others waits for the launcher to end it."""
    rank, status, wait = int(os.environ.get("RANK", 0)), 0, False
    try:
        main()
    except BadInput as error:
        met = dist.is_initialized()          # before that, each machine says what is wrong on it
        speaker = (rank if met else int(os.environ.get("LOCAL_RANK", rank))) == 0
        status, wait = 2, error.everywhere and not speaker
        if not wait:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if error.everywhere and met:
            finish()
    except (SystemExit, KeyboardInterrupt) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code or 0
    except Exception as error:
        status, wait = 1, lost_touch(error)
        why, what = traceback.format_exc(), "failed:\n"
        if is_out_of_memory(error):
            advice = OUT_OF_MEMORY.format(*GPU_OR_RAM[is_out_of_ram(error)])
            why, what = f"{advice}: {first_line(error)}", "failed: "
        elif wait:
            why, what = first_line(error), "has lost touch with another rank: "
        print(f"rank {rank} {what}{why}", file=sys.stderr, flush=True)
    if wait:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if status or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(status)

def lost_touch(error: Exception) -> bool:
    """Whether another rank has gone or is silent. Gloo raises a bare RuntimeError for that, with its own name
    in it."""
    return isinstance(error, dist.DistError) or type(error) is RuntimeError and "gloo" in str(error)

def leave(status: int):
    """Ends the process without the interpreter's end, where the threads of a broken process group can hang or
    abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
