"""The process group: how it starts, what its ranks tell each other, how a job ends."""
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.errors import BadInput, without_controls
from runtime.flags import DTYPES

stop = {"signal": 0, "at": 0.0, "wait": False}                     # the signal, when it came, whether to finish the step

def on_signal(number, frame):
    """Once training has begun, the first SIGINT or SIGTERM stops at the end of the step; one that comes more than five
    seconds later (the launcher sends two), or before training, at once."""
    if stop["signal"] and time.monotonic() - stop["at"] < 5:
        return
    if stop["signal"] or not stop["wait"]:
        raise SystemExit(128 + number)
    stop.update(signal=number, at=time.monotonic())
    if os.environ["RANK"] == "0" and sys.stderr.isatty():
        print("stopping after this step; tell it again after five seconds to leave at once", file=sys.stderr, flush=True)

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
        if "OMP_NUM_THREADS" not in os.environ:                    # ranks of one machine share its cores
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", 1))))
    import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:                             # plain gloo: DeepSpeed's shared-memory extension needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    global patience
    patience = 0.8 * args.timeout            # the rest is for what comes before and after the waiting
    c10d = dist.distributed_c10d             # DeepSpeed makes more groups, which take torch's defaults
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(seconds=patience)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False,
                                   timeout=timedelta(seconds=patience))
    except dist.DistError as error:          # most often another run's port
        raise CannotMeet(f"the ranks cannot meet: {str(error).splitlines()[0]} (for two runs at once on one machine: "
                       f"deepspeed --master_port 29501 ...)") from None
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                # with a mask its gradients can be NaN (pytorch #196678)
    best = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    name = best if args.dtype == "auto" else args.dtype
    args.dtype = name
    with fail_together():
        if name == "fp16" and not cuda:
            raise BadInput("--dtype fp16 needs a GPU; on CPU there are fp32 and bf16")
        import toy                           # makes the toy world where the flags name it and it is not there
        toy.prepare(rank, *(getattr(args, name, None) for name in ("model", "actor", "reward")), *args.data)
    torch.manual_seed(args.seed)
    script, processes = Path(sys.argv[0]).name, f"{world} process{'es' * (world > 1)}"
    say(f"{script}: {processes} on {device.type}, {name}, ZeRO-{args.zero_stage}")
    return rank, world, device, DTYPES[name]

def say(text):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        with suppress(OSError):              # a log on a full disk ends no run
            tqdm.write(without_controls(text), file=sys.stdout)

class Agreed(BadInput):
    """A BadInput that every rank raises at the same place."""

class CannotMeet(BadInput):
    """A BadInput that each rank has to say for itself."""

patience, meetings = 1800.0, itertools.count()                     # seconds of silence that ranks bear from each other

@contextmanager
def fail_together():
    """If a rank meets BadInput in the body, all raise it, and none is left waiting for it. The body may take one rank
    (often rank 0) as long as it likes: a thread tells the others that it is alive."""
    mine, done, meeting = None, threading.Event(), next(meetings)
    me, store = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def sign_of_life():
        with suppress(Exception):            # the store is gone: the main thread will meet that too
            while not done.wait(1):
                store.add(f"alive {me}", 1)

    store.set(f"{meeting} {me} began", "")
    threading.Thread(target=sign_of_life, daemon=True).start()
    try:
        yield
    except BadInput as error:
        mine = str(error)
    finally:
        done.set()
    store.set(f"{meeting} {me} ended", "")
    for rank in range(dist.get_world_size()):
        life, since = None, time.monotonic()
        while not store.check([f"{meeting} {rank} ended"]):
            if (now := store.add(f"alive {rank}", 0)) != life:
                life, since = now, time.monotonic()
            # one that has begun beats every second, but for a long call into C; another may still be in the step before
            silence = 300 if store.check([f"{meeting} {rank} began"]) else patience
            if store.check(["failed"]) or time.monotonic() - since > min(silence, patience):
                raise TimeoutError(f"rank {rank} has failed, or been silent for {time.monotonic() - since:.0f} s")
            if stop["signal"] and time.monotonic() - stop["at"] > 20 and time.monotonic() - since > 5:
                raise SystemExit(128 + stop["signal"])             # told to stop, and the other does not come
            time.sleep(0.02)
    if errors := [error for error in from_all(mine) if error]:
        raise Agreed(errors[0])

def sum_over_ranks(*numbers):
    """The sum over ranks of each number, in float64."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x)
    return x.tolist()

def max_over_ranks(*numbers):
    """The largest of each number over the ranks."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()

def from_all(thing):
    """What each rank hands over, in the order of the ranks, on every rank."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things

def gather(x):
    """The rows of all ranks, in the order of the ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)

def finish():
    dist.barrier()                           # without these two, some runs of two CPU ranks abort at exit
    dist.destroy_process_group()

def run(main):
    """main(), and the ways it can end. BadInput becomes one line and exit status 2. A rank that fails says why, leaves at
    once, and those that lose touch with it leave in silence."""
    rank = os.environ.get("RANK", "0")
    try:
        main()
        if int(os.environ["WORLD_SIZE"]) > 1:                      # one rank of two has aborted in the interpreter's end
            leave(0)
    except Agreed as error:                  # by all ranks at one place
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        finish()
        leave(2)
    except BadInput as error:
        if rank == "0" or dist.is_initialized() or isinstance(error, CannotMeet):
            tell_failed()
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)                    # the launcher kills rank 0 soon after another has left: let it speak
        leave(2)
    except (SystemExit, KeyboardInterrupt) as error:
        tell_failed()
        leave(130 if isinstance(error, KeyboardInterrupt) else error.code or 0)
    except Exception as error:
        if isinstance(error, TimeoutError | dist.DistError) or isinstance(error, RuntimeError) and "gloo/" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)          # the launcher's: there is no step to end any more
            if not another_spoke():
                print(f"error: rank {rank} has lost touch with another rank ({str(error).splitlines()[0]}); the "
                      f"launcher names one that was killed", file=sys.stderr, flush=True)
            time.sleep(0 if "imed out" in str(error) else 3)       # the launcher is to name the one that was killed first
        else:
            tell_failed()
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if rank == "0" and dist.is_initialized() and dist.get_world_size() > 1:
                time.sleep(2)                # it keeps the store, from which others learn that it has failed
        leave(1)

def tell_failed():
    """Tells the ranks that wait for this one that it leaves, and prints why."""
    with suppress(Exception):
        dist.distributed_c10d._get_default_store().set("failed", "")

def another_spoke():
    """Whether a rank has failed and said why, or rank 0, which keeps the store of such words, is gone."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                   # the store complains in C++, with a stack
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return store.check(["failed"])
    except Exception:
        return True
    finally:
        os.dup2(stderr, 2)

def leave(status):
    """Without the end of the interpreter, in which threads of a broken process group wait or abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
