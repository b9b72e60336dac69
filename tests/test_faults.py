"""Runs that are killed, told to stop, run out of disk or meet bad numbers: what was saved is whole, and the
run goes on as if nothing had happened. Each invariant is held once. What repeats a fault for another trainer,
number of ranks or damage is marked `faults` and runs in ./run.sh faults."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPO, metrics, run_script
from test_trainers import LORA, PPO, SUPERVISED, inputs, trained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow
FAULTS = pytest.mark.faults


def but_first(marked, *cases):
    """The cases, all but the first of them marked."""
    return [cases[0], *(pytest.param(*case, marks=marked) for case in cases[1:])]


SHORT = {"--steps": "12", "--save-every": "2", "--log-every": "1"}
LONG = {job: {"--steps": steps, "--save-every": "5", "--log-every": "1"}
        for job, steps in (("sft", "500"), ("reward", "300"), ("ppo", "150"))}
JOBS = {"sft": f"--model $talker --lora-dropout 0.1 {LORA} {SUPERVISED}",
        "reward": f"--model $talker {SUPERVISED}",
        "ppo": "--actor @sft --reward @reward --ema 0.9 --kl-target 0.01 --ptx-data $text "
               f"--reward-norm rollout {PPO}"}


@pytest.fixture(scope="session")
def command(inputs, trained):
    """command(job, out, flags): the words of a run of this job."""
    def command(job, out, flags, *more):
        words = [str(trained(w[1:])) if w[0] == "@" else str(inputs.get(w, w)) for w in JOBS[job].split()]
        for flag, value in flags.items():    # the last of two counts, in argparse
            words += [flag, value]
        return [*words, "--out", str(out), *more]
    return command


def start(job, words, ranks=0):
    """The process, in a group of its own."""
    python = Path(sys.executable)
    port = str(random.randint(20000, 40000))
    launcher = [str(python.parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port]
    launch = launcher if ranks else [str(python)]
    # not a pipe: one that nobody reads would stop the run when it is full
    log = tempfile.TemporaryFile("w+")       # noqa: SIM115
    process = subprocess.Popen([*launch, f"{job}.py", *words], cwd=REPO, start_new_session=True, stdout=log,
                               stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.log = log
    return process


def said_by(process, timeout=60):
    """What it said, when it has ended."""
    process.wait(timeout)
    process.log.seek(0)
    return process.log.read()


def complete(job, words, ranks=0):
    done = run_script(f"{job}.py", *words, ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def wait_for_step(out, process, beyond, timeout=60):
    """Waits until the run has logged a step greater than `beyond`; False where it has ended."""
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if last_step(out) > beyond:
            return True
        time.sleep(0.01)
    return False


def last_step(out):
    try:
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    return said_by(process)


def record(out):
    """What a run leaves, but for times: its lines, its samples and its weights, bit for bit."""
    lines = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in metrics(out)]
    samples = (out / "samples.jsonl").read_text() if (out / "samples.jsonl").exists() else None
    weights = {str(file.relative_to(out)): load_file(file) for file in sorted(out.glob("*.safetensors"))
               + sorted(out.glob("ema/*.safetensors"))}
    assert weights
    return lines, samples, weights


def assert_same(out, expected):
    lines, samples, weights = record(out)
    assert lines == expected[0] and samples == expected[1]
    assert weights.keys() == expected[2].keys()
    for file, tensors in weights.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[2][file][name]), (file, name)


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """uninterrupted(job, ranks, flags): the record of a run that nobody disturbs."""
    kept = {}

    def uninterrupted(job, ranks=0, flags=SHORT):
        key = job, ranks, flags["--steps"]
        if key not in kept:
            out = tmp_path_factory.mktemp("uninterrupted") / job
            complete(job, command(job, out, flags), ranks)
            kept[key], uninterrupted.folders[job, ranks] = record(out), out
        return kept[key]

    uninterrupted.folders = {}
    return uninterrupted


@pytest.mark.parametrize("job, ranks", but_first(FAULTS, ("sft", 0), ("reward", 0), ("ppo", 0), ("ppo", 2)))
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
        job, ranks, command, uninterrupted, tmp_path, full):
    kills, flags, rng = (20, LONG[job], random.Random(job)) if full else (2, SHORT, random.Random(job))
    out, left, said = tmp_path / "run", kills, ""
    while left:
        process = start(job, command(job, out, flags, "--resume"), ranks)
        before = last_step(out)
        # now and then in the midst of starting, else some moment after a step
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0, 5))
        elif wait_for_step(out, process, before if "resuming" not in said else -1):
            time.sleep(rng.uniform(0, 0.6))
        if process.poll() is not None:
            assert process.returncode == 0, said_by(process)[-3000:]
            break
        said = kill(process)
        left -= 1
    assert left < kills
    said = complete(job, command(job, out, flags, "--resume"), ranks)
    print(f"{job} on {ranks or 1} ranks: {kills - left} kills")
    assert_same(out, uninterrupted(job, ranks, flags))
    assert not list(out.glob("checkpoints/*.tmp")) or "resuming" in said


@pytest.mark.parametrize("number, status", but_first(FAULTS, (signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on_from_there(
        number, status, command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    flags = {**SHORT, "--save-every": "1000"}
    process = start("sft", command("sft", out, flags))
    assert wait_for_step(out, process, 1)
    process.send_signal(number)
    process.send_signal(number)              # within five seconds two count as one
    said = said_by(process)
    assert process.returncode == status, said
    assert f"stopped by {signal.Signals(number).name} after step" in said and "Traceback" not in said
    (saved,) = out.glob("checkpoints/*")
    assert saved.name == f"step-{last_step(out)}"
    said = complete("sft", command("sft", out, flags, "--resume"))
    assert f"resuming {out} after {saved.name.replace('-', ' ')}" in said
    assert_same(out, uninterrupted("sft"))


@FAULTS
@pytest.mark.parametrize("job", ["sft", "ppo"])
def test_a_signal_to_one_rank_stops_both_and_saves(job, command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(job, command(job, out, {**SHORT, "--save-every": "1000"}), ranks=2)
    assert wait_for_step(out, process, 1)
    rank_1 = f"{job}.py --local_rank=1.*{out}"
    ranks = subprocess.run(["pgrep", "-f", rank_1], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    said = said_by(process)
    assert process.returncode and "stopped by SIGTERM after step" in said and "Traceback" not in said, said
    complete(job, command(job, out, SHORT, "--resume"), ranks=2)
    assert_same(out, uninterrupted(job, 2))


# Sends the last rank a signal before the first item of the evaluation after a step.
IN_EVALUATION = """
import signal, runtime.checkpoint
stoppable, evaluation = {script}.stoppable, runtime.checkpoint.Run.evaluation
def noted(state, step, log):
    runtime.checkpoint.step_now = step
    return evaluation(state, step, log)
def told_to_stop(items, label):
    for n, item in enumerate(stoppable(items, label)):
        last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if n == 0 and runtime.checkpoint.step_now == {at} and last_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        assert n < 3 or runtime.checkpoint.step_now != {at}, "the evaluation goes on"
        yield item
{script}.stoppable, runtime.checkpoint.Run.evaluation = told_to_stop, noted
"""
RARELY = {**SHORT, "--save-every": "1000"}


@pytest.mark.parametrize("job, ranks, at", but_first(FAULTS, ("sft", 0, 4), ("reward", 0, 12), ("ppo", 2, 4)))
def test_a_signal_in_an_evaluation_stops_it_and_the_resumed_run_does_it_first(
        job, ranks, at, command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    fault = IN_EVALUATION.format(script=job, at=at)
    status, said, _ = run_faulty(job, fault, command(job, out, RARELY), tmp_path, ranks)
    assert status == 143 or status and ranks, said[-3000:]
    assert f"stopped by SIGTERM after step {at};" in said and "Traceback" not in said, said[-3000:]
    measured = {"sft": "eval_ppl", "reward": "accuracy", "ppo": "eval_score"}[job]
    assert not any(line["step"] == at and measured in line for line in metrics(out))
    (saved,) = out.glob("checkpoints/*")
    kept = json.loads((saved / "run.json").read_text())
    assert saved.name == f"step-{at}" and kept["evaluation_due"] is True
    said = complete(job, command(job, out, RARELY, "--resume"), ranks)
    assert f"resuming {out} after step {at}" in said
    assert_same(out, uninterrupted(job, ranks))


def test_a_signal_in_the_first_evaluation_ends_the_run_and_saves_nothing(command, tmp_path):
    out = tmp_path / "run"
    fault = IN_EVALUATION.format(script="sft", at=0)
    status, said, _ = run_faulty("sft", fault, command("sft", out, RARELY), tmp_path)
    assert status == 143 and "before step 1, nothing saved" in said and "Traceback" not in said, said[-3000:]
    assert metrics(out) == [] and not (out / "checkpoints").exists()


@pytest.fixture(scope="session")
def stopped(command, tmp_path_factory):
    """A copy of a run of sft.py that was stopped after step 4, with the checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("stopped")
    out = root / "run"
    process = start("sft", command("sft", out, SHORT))
    assert wait_for_step(out, process, 4)
    kill(process)
    for later in out.glob("checkpoints/*"):
        if later.name not in ("step-2", "step-4"):
            shutil.rmtree(later)
    assert sorted(os.listdir(out / "checkpoints")) == ["step-2", "step-4"]

    def stopped(to):
        shutil.copytree(out, to)
        return to
    return stopped


@pytest.mark.parametrize("file, damage", but_first(FAULTS, *itertools.product(
    ["rank-0.pt", "weights.safetensors", "run.json", "manifest.json"], ["flipped", "cut", "gone"])))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
        file, damage, stopped, command, uninterrupted, tmp_path):
    out = stopped(tmp_path / "run")
    target = out / "checkpoints" / "step-4" / file
    content = bytearray(target.read_bytes())
    target.unlink()
    if damage == "cut":
        target.write_bytes(content[:len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    said = complete("sft", command("sft", out, SHORT, "--resume"))
    assert f"resuming {out} after step 2" in said and str(target.parent) in said and "damaged" in said
    assert_same(out, uninterrupted("sft"))


def test_where_no_checkpoint_is_whole_nothing_is_deleted(stopped, command, tmp_path):
    out = stopped(tmp_path / "run")
    for step in ("step-2", "step-4"):
        (out / "checkpoints" / step / "weights.safetensors").write_bytes(b"cut")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    done = run_script("sft.py", *command("sft", out, SHORT, "--resume"))
    assert done.returncode == 2 and "none of its checkpoints is whole" in done.stderr
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@FAULTS
def test_a_rank_whose_part_is_lost_costs_the_moments_and_no_more(command, tmp_path):
    out = tmp_path / "run"
    process = start("sft", command("sft", out, SHORT), ranks=2)
    assert wait_for_step(out, process, 4)
    kill(process)
    for file in out.glob("checkpoints/*/rank-1.pt"):
        file.unlink()
    said = complete("sft", command("sft", out, SHORT, "--resume"), ranks=2)
    assert "resuming" in said and "moments start anew" in said
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, 13))


@FAULTS
def test_a_newer_checkpoint_that_is_damaged_does_not_count_as_one_of_the_two(stopped, command, tmp_path):
    out = stopped(tmp_path / "run")
    (out / "checkpoints" / "step-4" / "manifest.json").unlink()
    complete("sft", command("sft", out, {**SHORT, "--save-every": "3", "--steps": "12"}, "--resume"))
    assert sorted(os.listdir(out / "checkpoints")) == ["step-6", "step-9"]


@FAULTS
def test_flags_that_make_it_another_run_are_refused_and_others_named(stopped, command, tmp_path):
    out = stopped(tmp_path / "run")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    done = run_script("sft.py", *command("sft", out, {**SHORT, "--lr": "5e-4"}, "--resume"))
    assert done.returncode == 2 and "lr 0.001 -> 0.0005" in done.stderr and "Traceback" not in done.stderr
    done = run_script("sft.py", *command("sft", out, SHORT))       # without --resume it is not written over
    assert done.returncode == 2 and "--resume" in done.stderr and "--overwrite" in done.stderr
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    said = complete("sft", command("sft", out, {**SHORT, "--log-every": "2"}, "--resume"))
    assert "changed: log_every 1 -> 2" in said
    said = complete("sft", command("sft", out, SHORT, "--resume"))
    assert "complete" in said
    done = run_script("sft.py", *command("sft", out, {**SHORT, "--lr": "5e-4"}, "--resume"))
    assert done.returncode == 2 and "lr 0.001 -> 0.0005" in done.stderr


@FAULTS
def test_on_other_ranks_the_weights_are_kept_and_the_moments_start_anew(stopped, command, tmp_path):
    out = stopped(tmp_path / "run")
    said = complete("sft", command("sft", out, SHORT, "--resume"), ranks=2)
    assert "world_size 1 -> 2" in said and "moments start anew" in said
    steps = [line["step"] for line in metrics(out) if "loss" in line]
    assert steps == list(range(1, 13))       # no line twice, none missing


def test_two_checkpoints_are_kept_and_hold_no_frozen_weight(uninterrupted):
    uninterrupted("sft")
    out = uninterrupted.folders["sft", 0]
    assert sorted(os.listdir(out / "checkpoints")) == ["step-10", "step-8"]
    names = list(load_file(out / "checkpoints" / "step-10" / "weights.safetensors"))
    assert names and all(".lora_" in name for name in names)


FAULTY = """
import os, sys, time
sys.path.insert(0, {repo!r})
sys.argv[0] = {script!r}
import torch, sft, {script}
{fault}
from runtime.ranks import run
run({script}.main)
"""
DISK = """
import runtime.checkpoint
save = runtime.checkpoint.save_file
def full(tensors, path, *more):
    if "step-6" in str(path):
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100000)
    save(tensors, path, *more)
runtime.checkpoint.save_file = full
"""
RAISES = """
import runtime.checkpoint
steps, place = [], {place}
{where} = place.{where}
def fault(*args, **more):
    steps.append(0)
    if len(steps) == 3 and torch.distributed.get_rank() == {rank}:
        {what}
    return {where}(*args, **more)
place.{where} = fault
"""


def run_faulty(job, fault, words, tmp_path, ranks=0, timeout=120):
    """Runs a trainer with a fault put in; (its exit status, what it said, seconds)."""
    script = tmp_path / f"faulty_{job}.py"
    script.write_text(FAULTY.format(repo=str(REPO), script=job, fault=fault))
    begin = time.monotonic()
    done = run_script(script, *words, ranks=ranks, timeout=timeout, env={"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=FAULTS)])
def test_a_full_disk_is_said_with_its_path_and_the_checkpoint_before_is_whole(
        ranks, command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    status, said, _ = run_faulty("sft", DISK, command("sft", out, SHORT), tmp_path, ranks)
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert status == 2 and "step-6.tmp" in line and "No space left" in line and "MB" in line
    assert "Traceback" not in said
    said = complete("sft", command("sft", out, SHORT, "--resume"), ranks)
    assert f"resuming {out} after step 4" in said
    assert_same(out, uninterrupted("sft", ranks))


# In a mount namespace of its own: a disk of $1 KiB, which a run fills up; then a larger one, on which the run
# goes on. $2 gets everything.
SMALL_DISK = """
mount -t tmpfs -o size=$1k small "$OUT" || exit 77
"$PYTHON" sft.py "${@:3}" --out "$OUT"; echo "status $?"
ls -d "$OUT"/checkpoints/*
mount -o remount,size=1g "$OUT"
"$PYTHON" sft.py "${@:3}" --out "$OUT" --resume; echo "status $?"
cp -r "$OUT/." "$2"
"""


@FAULTS
@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare, which makes such a disk")
def test_a_small_disk_that_fills_up_for_real(stopped, command, uninterrupted, tmp_path):
    def kilobytes(files):
        return sum(-(-file.stat().st_size // 4096) * 4 for file in files)

    earlier, out, kept = stopped(tmp_path / "earlier"), tmp_path / "run", tmp_path / "kept"
    others = [file for file in earlier.rglob("*") if file.is_file() and "checkpoints" not in file.parts]
    room = kilobytes(others) + round(2.5 * kilobytes((earlier / "checkpoints" / "step-4").iterdir()))
    for folder in (out, kept):
        folder.mkdir()
    own_disks = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SMALL_DISK, "-"]
    words = command("sft", out, SHORT)[:-2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), "PYTHON": sys.executable}
    done = subprocess.run([*own_disks, str(room), str(kept), *words], cwd=REPO, env=env, text=True,
                          timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 77 or "unshare:" in done.stdout:
        pytest.skip("this user may not mount a disk of his own")
    (line,) = [line for line in done.stdout.splitlines() if "error: " in line]
    assert "step-6.tmp" in line and "No space left" in line and "MB are needed, 0 MB are free" in line
    ends = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert ends == ["status 2", "status 0"] and "Traceback" not in done.stdout
    assert f"{out}/checkpoints/step-2\n{out}/checkpoints/step-4\n" in done.stdout
    assert f"resuming {out} after step 4" in done.stdout
    assert_same(kept, uninterrupted("sft"))


RAISE = "raise ArithmeticError('this one')", "ArithmeticError: this one"
KILL = "os.kill(os.getpid(), 9)", "code = -9"


@pytest.mark.parametrize("rank, what, words", but_first(
    FAULTS, (1, *RAISE), (0, *KILL), (0, *RAISE), (1, *KILL)))
def test_a_rank_that_dies_ends_the_job_and_its_own_words_are_found(rank, what, words, command, tmp_path):
    # in the middle of a step, or while the others wait for a part of a checkpoint
    fault = RAISES.format(rank=rank, what=what, where="backward_and_step" if rank else "fingerprint",
                          place="sft" if rank else "runtime.checkpoint")
    words_of_run = command("sft", tmp_path / "run", SHORT)
    status, said, seconds = run_faulty("sft", fault, words_of_run, tmp_path, ranks=2)
    assert status and words in said and said.count("Traceback") == words.startswith("Arith")
    assert seconds < 90                      # of which some are its start
    assert words.startswith("code") or f"rank {rank} failed:" in said


@FAULTS
def test_a_rank_that_stalls_ends_the_job(command, tmp_path):
    words = command("sft", tmp_path / "run", SHORT, "--timeout", "10")
    fault = RAISES.format(rank=1, what="time.sleep(1000)", where="backward_and_step", place="sft")
    status, said, seconds = run_faulty("sft", fault, words, tmp_path, ranks=2)
    assert status and "lost touch" in said and seconds < 10 + 30 + 50


NAN = """
step, count = {script}.backward_and_step, 0
def bad(engine, loss):
    global count
    count += 1
    step(engine, loss * float("nan") if count in {at} else loss)
{script}.backward_and_step = bad
"""


@pytest.mark.parametrize("stage, words", but_first(
    FAULTS, (0, ""), (1, ""), (2, ""), (3, ""),
    *[(stage, "--dtype bf16 --lora-rank 1 --offload") for stage in (1, 2, 3)]))
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(stage, words, command, tmp_path):
    fault = NAN.format(script="reward", at=(2, 3))
    status, said, _ = run_faulty("reward", fault, command("reward", tmp_path / "run", {
        **SHORT, "--zero-stage": str(stage), "--micro-batch": "8"}, *words.split()), tmp_path)
    assert status == 0, said
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in lines[:4]] == [0, 1, 2, 2] and lines[1].get("grad_norm") is None
    assert all(line["accuracy"] is not None for line in metrics(tmp_path / "run") if "accuracy" in line)


def test_five_in_a_row_end_the_run_with_the_step_the_rows_and_the_last_good_checkpoint(command, tmp_path):
    fault = NAN.format(script="reward", at=range(5, 99))
    words = command("reward", tmp_path / "run", {**SHORT, "--micro-batch": "8"})
    status, said, _ = run_faulty("reward", fault, words, tmp_path)
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert status == 2 and "step 9:" in line and "rows of the data" in line and "step-8" in line
