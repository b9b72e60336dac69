"""Several machines: deepspeed's hostfile without ssh, as two "machines" of two processes on loopback.

They have one disk for both, or a disk each: a working folder of their own, in which --out is a relative path.
"""
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from test_faults import assert_same, command, last_step, record, wait_for_step  # noqa: F401 (fixture)
from test_trainers import inputs, trained  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.faults]
FLAGS = {"--steps": "8", "--save-every": "2", "--log-every": "1", "--micro-batch": "1"}


def start(words, disks, hostfile, script="sft.py"):
    """The launchers of two machines, started in their folders."""
    launcher = [Path(sys.executable).parent / "deepspeed", "--hostfile", hostfile, "--no_ssh",
                "--master_addr", "127.0.0.1", "--master_port", random.randint(20000, 40000)]
    machines = []
    for rank, disk in enumerate(disks):
        flags = [str(word) for word in [*launcher, "--node_rank", rank, REPO / script, *words]]
        machines.append(subprocess.Popen(flags, cwd=disk, text=True, start_new_session=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                         env={**os.environ, "OMP_NUM_THREADS": "1"}))
    return machines


def complete(*start_with):
    machines = start(*start_with)
    said = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return said


@pytest.mark.parametrize("disks", ["one disk", "a disk each"])
def test_two_machines_save_are_killed_and_resume(disks, command, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=2\nsecond slots=2\n")
    folders = [tmp_path / "a", tmp_path / ("a" if disks == "one disk" else "b")]
    for folder in folders:
        folder.mkdir(exist_ok=True)

    said = complete(command("sft", "whole", FLAGS), folders, hostfile)
    assert "4 processes" in said[0] and "error" not in said[0] + said[1]
    expected = record(folders[0] / "whole")

    machines = start(command("sft", "run", FLAGS), folders, hostfile)
    assert wait_for_step(folders[0] / "run", machines[0], 5)
    for machine in machines:
        os.killpg(machine.pid, signal.SIGKILL)
        machine.communicate()
    for machine, folder in enumerate(folders):           # its own disk has what its ranks need, and no model
        kept = folder / "run" / "checkpoints" / "step-4"
        assert (kept / "manifest.json").exists() and (kept / f"rank-{2 * machine}.pt").exists()
    assert disks == "one disk" or not (folders[1] / "run" / "metrics.jsonl").exists()

    said = complete(command("sft", "run", FLAGS, "--resume"), folders, hostfile)
    assert "resuming run after step" in said[0] and last_step(folders[0] / "run") == 8
    assert_same(folders[0] / "run", expected)
