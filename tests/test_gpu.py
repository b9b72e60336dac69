"""What is said where a GPU cannot be used or has no memory left, and how many answers it has room for.

There is no GPU here: the functions of torch.cuda that are asked are replaced.
"""
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import runtime.engine
import runtime.gpu
from conftest import REPO, tiny_llama
from llama import LlamaConfig
from runtime.engine import room_for_answers
from runtime.errors import BadInput, exit_with_one_line, is_out_of_memory, note
from runtime.gpu import answer_bytes, free_memory, gpu_is_usable, rows_at_once
from runtime.ranks import check_stage, cores, run, setup
from training import on_ranks

SEVEN_B = LlamaConfig()
GIB = 2**30


# --------------------------------------------------------------------------------- a GPU that cannot be used
@pytest.fixture()
def driver(monkeypatch, tmp_path):
    """driver(usable, warning, there): what PyTorch says of the GPU, and whether the machine has one."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "x")        # so that it is put back at the end
        monkeypatch.delenv(name)

    def set_up(usable, warning=None, there=True):
        def is_available():
            if warning:
                warnings.warn(warning, UserWarning, stacklevel=1)
            return usable and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")       # as CUDA does

        (tmp_path / "version").write_text("535")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(runtime.gpu, "DRIVER", tmp_path / ("version" if there else "nothing"))
        monkeypatch.setattr(runtime.gpu.Path, "glob", lambda *_: iter([there] if there else []))
    return set_up


TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020).\nPlease"


def test_a_gpu_that_works_is_used_and_a_machine_without_one_computes_on_the_cpu(driver):
    driver(True)
    assert gpu_is_usable() is True
    driver(False, there=False)
    assert gpu_is_usable() is False
    driver(False, "a word about something else", there=False)
    assert gpu_is_usable() is False


@pytest.mark.parametrize("there, warning, said", [
    (True, TOO_OLD, "driver on your system is too old"), (False, TOO_OLD, "driver on your system is too old"),
    (True, None, torch.__version__)])
def test_a_gpu_that_pytorch_cannot_use_ends_the_run_in_one_line(there, warning, said, driver):
    driver(False, warning, there)
    with pytest.raises(BadInput, match="there is a GPU that PyTorch cannot use") as error:
        gpu_is_usable()
    line = str(error.value)
    assert said in line and "--index-url" in line and "DS_ACCELERATOR=cpu" in line and "\n" not in line
    assert error.value.everywhere


@pytest.mark.filterwarnings("ignore:CUDA initialization")
@pytest.mark.parametrize("name, value", [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"),
                                         ("DS_ACCELERATOR", "cpu")])
def test_who_hides_the_gpu_means_the_cpu(name, value, driver, monkeypatch):
    """Whether or not the GPU works; and torch.cuda says so to all who ask it later."""
    for usable, warning in ((False, TOO_OLD), (True, None)):
        driver(usable, warning)
        monkeypatch.setenv(name, value)
        assert gpu_is_usable() is False and torch.cuda.is_available() is False


def test_nobody_asks_cuda_before_the_run_has_decided():
    """CUDA reads CUDA_VISIBLE_DEVICES when it is asked first."""
    program = "import torch; torch.cuda.is_available = lambda: 1 / 0; import sft, reward, ppo, chat"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("own, expected", [({}, "expandable_segments:True"),
                                           ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, "x"),
                                           ({"PYTORCH_ALLOC_CONF": "y"}, None)])
def test_expandable_segments_are_set_before_cuda_is_asked(own, expected, monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")         # so that it is put back at the end
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    def ask():
        assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
        raise BadInput("asked")

    monkeypatch.setattr(runtime.ranks, "gpu_is_usable", ask)
    with pytest.raises(BadInput, match="asked"):
        setup(Namespace(dtype="auto"))


# ------------------------------------------------------------------------------------- how many have room
def test_the_rows_of_a_7b_that_have_room_are_those_of_the_arithmetic():
    # 0.5 MiB of keys and values for each token, a quarter more while rows leave; the prompt's pass; the mask;
    # the numbers of sampling
    cache, prompt_pass = 1.25 * 512 * 0.5 * 2**20, 3 * (11008 + 4096) * 256 * 2
    assert answer_bytes(SEVEN_B, 2, 256, 512) == cache + prompt_pass + (2 + 2) * 256**2 + 20 * 32000
    free = (22.7 - 12.6) * GIB                                     # of a card of 24 GB beside the weights
    assert 20 < rows_at_once(free, SEVEN_B, 2, 256, 512) < 29
    assert rows_at_once(0, SEVEN_B, 2, 256, 512) == rows_at_once(-GIB, SEVEN_B, 2, 256, 512) == 1
    grouped = LlamaConfig(num_key_value_heads=4)
    assert answer_bytes(grouped, 2, 256, 512) < answer_bytes(SEVEN_B, 2, 256, 512) / 3


def test_memory_that_pytorch_keeps_and_does_not_use_is_free(monkeypatch):
    assert free_memory() is None             # a CPU has no bound
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7 * GIB)
    assert free_memory() == 12 * GIB


def flags(**changes):
    return Namespace(**{"max_prompt": 32, "max_new": 32, "zero_stage": 2, "offload": False, **changes})


def test_all_ranks_take_the_number_of_the_fullest_gpu(monkeypatch, capsys):
    model, per_row = tiny_llama(), answer_bytes(tiny_llama().config, 4, 32, 64)
    free = [100 * per_row, 20 * per_row]
    monkeypatch.setattr(runtime.engine, "free_memory", lambda: free[torch.distributed.get_rank()])
    assert on_ranks(2, lambda rank: room_for_answers(flags(), model, []), monkeypatch) == [16, 16]
    assert "generating up to 16 answers per GPU at a time" in capsys.readouterr().out
    free[:] = [None, None]                   # on a CPU
    assert on_ranks(2, lambda rank: room_for_answers(flags(), model, []), monkeypatch) == [None, None]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("ranks, changes, state, divided_by", [
    (1, {}, {}, 1), (2, {}, {}, 2), (2, {"zero_stage": 0}, {}, 1), (1, {"offload": True}, {}, None),
    (1, {}, {"moments": "of a resumed run"}, None)])
def test_the_moments_that_the_first_update_makes_are_not_free(ranks, changes, state, divided_by, monkeypatch):
    model = tiny_llama()
    per_row, n = answer_bytes(model.config, 4, 32, 64), sum(p.numel() for p in model.parameters())
    moments = 8 * n / divided_by if divided_by else 0
    monkeypatch.setattr(runtime.engine, "free_memory", lambda: 20.01 * per_row + moments)
    trained = [*model.parameters()]          # by two engines, one of which has PyTorch's optimiser
    torchs = SimpleNamespace(state=state)
    engines = [SimpleNamespace(optimizer=optimizer, trained=some) for optimizer, some in (
        (torchs, trained[:5]), (SimpleNamespace(optimizer=torchs), trained[5:]))]
    found = on_ranks(ranks, lambda rank: room_for_answers(flags(**changes), model, engines), monkeypatch)
    assert found == [16] * ranks


def test_the_weights_that_a_rollout_will_make_whole_are_not_free(monkeypatch):
    model = tiny_llama()
    per_row, weights = answer_bytes(model.config, 4, 32, 64), sum(p.nbytes for p in model.parameters())
    for p in model.parameters():             # as ZeRO-3 leaves a weight: its whole size, and no numbers
        p.ds_id, p.ds_numel = 0, p.numel()
        p.data = torch.empty(0)
    free = [20.01 * per_row + weights]
    monkeypatch.setattr(runtime.engine, "free_memory", lambda: free[0])
    assert on_ranks(2, lambda rank: room_for_answers(flags(), model, []), monkeypatch) == [16, 16]
    free[0] = 20.01 * per_row                # of one rank ZeRO-3 takes nothing more
    assert on_ranks(1, lambda rank: room_for_answers(flags(), model, []), monkeypatch) == [16]


# -------------------------------------------------------------------------------------------- out of memory
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
          torch.OutOfMemoryError("another text"),
          RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"),
          RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
          MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_lack_of_memory_is_one_line_that_names_the_flags(error, monkeypatch, capsys):
    def main():
        raise error

    left = []
    monkeypatch.setattr(runtime.ranks, "leave", left.append)
    run(main)
    said = capsys.readouterr().err
    assert left == [1] and said.count("\n") == 1 and "Traceback" not in said
    assert all(flag in said for flag in ("--micro-batch", "--checkpointing", "--gen-batch", "--offload"))
    is_ram = error in ERRORS[-2:]            # of which --offload takes more
    assert is_ram == ("the RAM is not enough" in said) == ("neither --offload" in said)
    with pytest.raises(SystemExit) as end:
        exit_with_one_line(main)
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1


NCCL = ("NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for "
        "details), NCCL version 2.27.3\nncclSystemError: System call or external library call failed. \n"
        "Last error:\n{}")


@pytest.mark.parametrize("cause, said", [
    ("Error while creating shared memory segment /dev/shm/nccl-9 (size 9637888)\nmore",
     "rank 0 has lost touch with another rank: NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled system "
     "error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3 (Error while creating shared memory "
     "segment /dev/shm/nccl-9 (size 9637888))"),
    ("\nCuda failure 2 'out of memory'", "(Cuda failure 2 'out of memory')"), ("", "NCCL version 2.27.3")])
def test_what_nccl_names_as_the_cause_is_said(cause, said, monkeypatch, capsys):
    def main():
        raise torch.distributed.DistBackendError(NCCL.format(cause))

    monkeypatch.setattr(runtime.ranks, "leave", lambda status: None)
    monkeypatch.setattr(runtime.ranks.time, "sleep", lambda seconds: None)
    run(main)
    line = capsys.readouterr().err
    assert line.endswith(f"{said}\n") and line.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr(runtime.ranks, "leave", lambda status: None)
    run(lambda: 1 / 0)
    assert "Traceback" in capsys.readouterr().err and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(ZeroDivisionError):
        exit_with_one_line(lambda: 1 / 0)


# ------------------------------------------------------------------------------- what DeepSpeed does wrongly
def test_fp16_without_zero_and_offload_without_zero_are_refused():
    with pytest.raises(BadInput, match="--zero-stage 0 with fp16"):
        check_stage(Namespace(zero_stage=0, dtype="fp16", offload=False))
    with pytest.raises(BadInput, match="--offload needs --zero-stage 1, 2 or 3"):
        check_stage(Namespace(zero_stage=0, dtype="bf16", offload=True))
    for stage, dtype, offload in ((1, "fp16", False), (0, "bf16", False), (2, "fp16", True)):
        check_stage(Namespace(zero_stage=stage, dtype=dtype, offload=offload))


@pytest.mark.parametrize("offload", [False, True])
def test_on_a_cpu_the_ranks_share_their_cores_and_offload_saves_nothing(offload, monkeypatch, capsys):
    """The cores are those that the process may use, not all of the machine's."""
    for name, value in (("LOCAL_SIZE", "2"), ("RANK", "0"), ("DS_ACCELERATOR", "cpu"),
                        ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "x"),
                        ("PYTORCH_CUDA_ALLOC_CONF", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 5, 7, 9, 11}, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(runtime.ranks.warnings, "filterwarnings", lambda _: None)
    monkeypatch.setattr(runtime.ranks, "start_group", lambda *_: None)
    note.cache_clear()
    args = Namespace(dtype="fp32", zero_stage=2, offload=offload, timeout=10, seed=1)
    with pytest.raises(ValueError, match="Default process group"):
        setup(args)
    assert threads == [3] and ("--offload: on a CPU" in capsys.readouterr().err) == offload
    monkeypatch.delattr(os, "sched_getaffinity")                   # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores() == 5


def test_the_refusal_reaches_the_user_as_one_line(tmp_path):
    words = ["sft.py", *f"--model x --data y --out {tmp_path}/out --zero-stage 0 --offload".split()]
    done = subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --offload needs --zero-stage 1, 2 or 3\n"


# ------------------------------------------------------------------------------------ the engine's dictionary
@pytest.mark.parametrize("gpu, stage, offload, trained_share, dtype, shares", [
    (False, 2, False, 1, torch.float32, False), (True, 3, True, 1, torch.bfloat16, False),
    (True, 2, False, 0.01, torch.bfloat16, True), (True, 0, False, 0.01, torch.bfloat16, True),
    (True, 2, True, 0.01, torch.bfloat16, True)])
def test_the_configuration_is_that_of_the_device_and_the_flags(
        gpu, stage, offload, trained_share, dtype, shares, monkeypatch):
    import deepspeed
    network = torch.nn.Linear(1000, 1000, bias=False)
    trained = [torch.nn.Parameter(torch.ones(10, 100))] if trained_share < 1 else [*network.parameters()]
    if trained_share < 1:
        network.small = trained[0]
    seen, optimizer = {}, SimpleNamespace(optimizer=SimpleNamespace(state={}))

    def initialize(config, **more):
        seen.update(config)
        return [SimpleNamespace(optimizer=optimizer)]

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = Namespace(weight_decay=0.1, warmup=0.1, zero_stage=stage, micro_batch=2, grad_clip=1.0,
                     offload=offload)
    on_ranks(1, lambda rank: runtime.engine.make_engine(args, network, trained, 1e-3, 4, 2, dtype, shares),
             monkeypatch)
    zero = seen["zero_optimization"]
    assert zero["stage"] == stage and zero["overlap_comm"] is gpu
    assert zero["stage3_prefetch_bucket_size"] == (0 if shares else 50_000_000)
    assert zero["reduce_bucket_size"] == sum(p.numel() for p in trained)       # fewer than a bucket holds
    assert zero["offload_optimizer"] == ({"device": "cpu", "pin_memory": gpu} if offload else None)
    in_float32 = trained_share < 1 and dtype == torch.bfloat16 and stage > 0 and not offload
    assert seen["data_types"] == {"grad_accum_dtype": "fp32" if in_float32 else None}
    assert seen["timers"] == {"throughput": {"enabled": False}} and not seen["zero_force_ds_cpu_optimizer"]
