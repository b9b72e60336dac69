"""Checks this project on a GPU, with one command in three parts of at most three minutes each.

    python bench/gpu.py --part a --out a.json    # correctness: the GPU's numbers beside the CPU's
    python bench/gpu.py --part b --out b.json    # memory: a 7B with LoRA, beside what is computed
    python bench/gpu.py --part c --out c.json    # speed: tokens and PPO steps, beside what the card can do
    python bench/gpu.py --part a --cpu           # the same checks at toy size, to test this script

Every check runs in a process of its own, with a time limit: an error of CUDA spoils the process that has it,
and memory is free again when its process has ended. A check that fails, or runs out of memory or time, is
reported, and the next one goes on. The exit status is 1 where one failed. It needs this repository and the
packages of requirements.txt and transformers, and no network. docs/clusters.md says what each part proves.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gpu_correct
import gpu_memory
import gpu_speed
import torch
from gpu_tools import LAUNCHER, ROOT, Check, Finding, Place

from runtime.errors import BadInput, exit_with_one_line
from runtime.flags import Flags, number, positive
from runtime.folders import writing
from runtime.gpu import gpu_is_usable
from runtime.ranks import cores

# Each part is a list of groups of checks. The checks of a group run side by side where the group has several:
# correctness does not care. Where memory or time is measured, each check is alone on the GPU.
PARTS = {"a": gpu_correct.GROUPS, "b": gpu_memory.GROUPS, "c": gpu_speed.GROUPS}
SECONDS, LEAST = 175, 5                      # of a part; with less time left, a check is not started
MOST_JOBS = 8                                # side by side; each takes a gigabyte of the GPU


def get_args() -> Namespace:
    flags = Flags("Checks this project on a GPU.")
    add = flags.group("the checks")
    add("--part", required=True, choices=list(PARTS), help="correctness, memory, or speed")
    add("--only", nargs="+", metavar="NAME", help="checks whose names begin like this")
    add("--limit", type=number(LEAST), default=float(SECONDS), help="seconds for the whole part")
    add("--jobs", type=positive, help="checks side by side in part a (half of the cores)")
    add("--cpu", action="store_true", help="toy size on the CPU, whatever GPU there is")
    add("--out", type=Path, help="file for the results, as JSON")
    add("--folder", type=Path, metavar="DIR", help="models, data and logs stay in DIR/PART, a new folder")
    add("--check", needs="--folder", help=argparse.SUPPRESS)       # what each process is called with
    args = flags.parse_args()
    flags.check_conditions(args)
    return args


# ------------------------------------------------------------------------------------------------ one check
def run_here(check: Check, folder: Path, small: bool):
    """Runs a check in this process. Every finding is one line of folder/NAME.jsonl as soon as it is there, so
    what was found stays found whatever happens next."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = 0
    with open(folder / f"{check.name}.jsonl", "w") as file:
        def note(finding):
            print(json.dumps(asdict(finding)), file=file, flush=True)

        try:
            for finding in check.run(Place(folder, device, small)):
                note(finding)
        except BaseException as error:       # a trainer may raise SystemExit too
            traceback.print_exc()
            note(Finding(type(error).__name__, first_words(error), ok=False))
            status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)                         # after an error, CUDA or NCCL could hang at the end


def first_words(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def environment(args, check: Check, jobs: int) -> dict[str, str]:
    """Of a check's process. It is one rank, whatever started this script, and computes float32 in float32:
    some containers switch TF32 on."""
    kept = {name: value for name, value in os.environ.items()
            if name not in (*LAUNCHER, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING")}
    kept |= {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
             "OMP_NUM_THREADS": str(max(1, cores() // jobs)), "OMP_WAIT_POLICY": "passive"}
    if args.cpu or check.cpu:
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept


def run_apart(check: Check, args, folder: Path, deadline: float, jobs: int, running: set) -> dict:
    """Runs a check in a process of its own: {"check", "seconds", "findings"}."""
    start = time.monotonic()
    limit = min(check.limit * max(1, args.limit / SECONDS), deadline - start)
    if limit < LEAST:
        missed = Finding("not run", "the part's time was used up", ok=False)
        return {"check": check.name, "seconds": 0.0, "findings": [asdict(missed)]}
    words = [sys.executable, __file__, "--part", args.part, "--check", check.name, "--folder", folder,
             *["--cpu"] * args.cpu]
    log = folder / f"{check.name}.log"
    with open(log, "w") as file:
        child = subprocess.Popen([str(word) for word in words], cwd=ROOT, env=environment(args, check, jobs),
                                 stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                 start_new_session=True)
    running.add(child)
    why = ""
    try:
        if status := child.wait(limit):
            why = f"exit status {status}"
    except subprocess.TimeoutExpired:
        why = f"stopped after {limit:.0f} s"
    end(child)                               # and what it has started
    running.discard(child)
    found = folder / f"{check.name}.jsonl"
    lines = found.read_text().splitlines() if found.exists() else []
    findings = [json.loads(line, parse_constant=str) for line in lines]      # NaN is no JSON
    if why and all(finding["ok"] is not False for finding in findings) or not findings:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        findings.append(asdict(Finding(why or "found nothing", " ".join(last)[:200], ok=False)))
    return {"check": check.name, "seconds": time.monotonic() - start, "findings": findings}


def end(child: subprocess.Popen):
    """Kills what is left of a check's process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# ------------------------------------------------------------------------------------------------ a part
def show(result: dict):
    """Prints the rows of a check."""
    for finding in result["findings"]:
        x = finding["measured"]
        figure = x if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
        verdict = {True: "ok", False: "FAILED", None: ""}[finding["ok"]]
        cells = (result["check"], finding["what"], f"{figure} {finding['unit']}".strip(),
                 finding["expected"], verdict)
        print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", flush=True)


def find(part: str, name: str) -> list[Check]:
    """The checks of a part whose names begin like this, the shortest first."""
    checks = sorted((check for group in PARTS[part] for check in group), key=lambda check: len(check.name))
    if not (found := [check for check in checks if check.name.startswith(name)]):
        raise BadInput(f"{name}: is no check of part {part}, which has "
                       f"{', '.join(sorted(check.name for check in checks))}")
    return found


def names(part: str, only: list[str] | None) -> set[str]:
    """The checks of a part: all, or those that `only` names and what they need."""
    chosen = [check for name in only or [""] for check in find(part, name)]
    return {name for check in chosen for name in (check.name, *check.needs)}


def run_part(args, folder: Path) -> list[dict]:
    """The results of all checks of the part that --only names. They are printed, and written, as they
    come."""
    start, results, running, wanted = time.monotonic(), [], set(), names(args.part, args.only)
    write(args, results, 0.0)                # before anything runs, so that a wrong --out is known
    print("| check | what | measured | expected | |\n|---|---|---|---|---|", flush=True)
    for group in PARTS[args.part]:
        group = [check for check in group if check.name in wanted]
        jobs = max(1, min(len(group), args.jobs or min(MOST_JOBS, cores() // 2)))
        run = partial(run_apart, args=args, folder=folder, deadline=start + args.limit, jobs=jobs,
                      running=running)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for result in pool.map(run, group):
                    results.append(result)
                    show(result)
                    write(args, results, time.monotonic() - start)
            finally:                         # Ctrl-C reaches this process alone
                for child in [*running]:
                    end(child)
    return results


def failed(results: list[dict]) -> list[str]:
    """The names of the checks with a finding that is not as expected."""
    return [result["check"] for result in results
            if any(finding["ok"] is False for finding in result["findings"])]


def write(args, results: list[dict], seconds: float):
    """Writes all results so far to --out."""
    if args.out:
        summary = {"part": args.part, "cpu": args.cpu, "seconds": seconds, "failed": failed(results),
                   "checks": results}
        with writing(args.out, flag="--out "):
            args.out.write_text(json.dumps(summary, indent=1) + "\n")


def make_folder(args, temporary: str) -> Path:
    """DIR/PART, or a part of the temporary folder. What is in a folder already is nothing of ours."""
    folder = (args.folder or Path(temporary)).resolve() / args.part
    with writing(folder, flag="--folder "):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BadInput(f"--folder {args.folder}: {folder} holds files already; name another folder")
    return folder


def main() -> int:
    args = get_args()
    if args.check:
        run_here(find(args.part, args.check)[0], args.folder, args.cpu)
    if not args.cpu and not gpu_is_usable():
        raise BadInput("there is no GPU; --cpu runs the checks at toy size on the CPU")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = make_folder(args, temporary)
        results = run_part(args, folder)
    n = sum(len(result["findings"]) for result in results)
    bad = failed(results)
    print(f"\npart {args.part}: {len(results)} checks, {n} findings, {time.monotonic() - start:.0f} s; "
          + (f"FAILED: {', '.join(bad)}" if bad else "all as expected"), flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    exit_with_one_line(lambda: sys.exit(main()))
