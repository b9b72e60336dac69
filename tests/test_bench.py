"""The benchmarks run on today's code, with a model of 2 million weights; nobody looks at their figures."""
import os
import subprocess
import sys

import pytest

from conftest import REPO

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPO / "bench")}
BASE = "import sys; from pathlib import Path; import common; common.write_models(Path(sys.argv[1]), '2M')"


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=REPO, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_an_sft_step_of_ours_and_of_the_peer_have_the_same_loss(tmp_path):
    base = tmp_path / "models" / "base"
    run("-c", BASE, base.parent)
    losses = []
    for who in ("ours", "peer"):
        out = run("bench/sft_step.py", "--rows", 8, "--child", who, base, "True", 0.4)
        losses.append(float(out.rpartition('"loss": ')[2].split(",")[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.faults
def test_the_phases_of_a_ppo_step_and_the_parts_of_a_token_are_timed():
    out = run("bench/where.py", "--size", "2M", "--steps", 2)
    assert "update: backward passes" in out and "B = 64" in out
