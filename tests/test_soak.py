"""A long PPO run: memory, open files and throughput at its end are what they were at its beginning."""
import statistics
import subprocess
import sys
import time

import psutil
import pytest

from conftest import REPO, metrics
from test_faults import command, complete, last_step, said_by, start  # noqa: F401 (fixture)
from test_trainers import inputs, trained  # noqa: F401 (fixtures)

@pytest.mark.slow
@pytest.mark.faults
def test_a_long_run_takes_no_more_memory_files_or_time_at_its_end(command, tmp_path, full):
    out, n = tmp_path / "run", 2000 if full else 60
    if full:                                 # the demo's PPO, longer; what it starts from is made if missing
        if not (REPO / "toy" / "made").exists():
            subprocess.run([sys.executable, "-m", "toy"], cwd=REPO, check=True)
        for script, last_file in (("sft", "model.safetensors"), ("reward", "reward_stats.json")):
            if not (REPO / "runs" / "toy" / script / last_file).exists():
                complete(script, [])
        words = ["@toy/ppo.args", "--steps", str(n), "--eval-every", "250", "--out", str(out)]
    else:
        words = command("ppo", out, {"--steps": str(n), "--log-every": "1", "--save-every": "5"})
    process = start("ppo", words)
    own, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            samples.append((last_step(out), own.memory_info().rss / 1e6, own.num_fds()))
        except psutil.Error:
            break
        time.sleep(5 if full else 0.02)
    said = said_by(process)
    assert process.returncode == 0, said[-3000:]
    assert not full or "warning" not in said
    # not the last step: after it the curves are drawn, with files and memory of their own
    early, late = ([x for x in samples if low * n <= x[0] < high * n] for low, high in ((0.1, 0.3), (0.8, 1)))
    memory, files = ([statistics.median(x[i] for x in part) for part in (early, late)] for i in (1, 2))
    speeds = [line["tokens_per_s"] for line in metrics(out) if "tokens_per_s" in line]
    ends = [statistics.median(part) for part in (speeds[1:n // 20 + 1], speeds[-(n // 20):])]
    print(f"{n} steps: {memory[0]:.0f} MB at first, {memory[1]:.0f} at last; {files[0]} and {files[1]} open "
          f"files; {ends[0]:.0f} and {ends[1]:.0f} tokens/s", file=sys.stderr)
    assert memory[1] < (1.05 if full else 1.2) * memory[0] and files[1] <= files[0] + 2
    assert ends[1] > (0.9 if full else 0.5) * ends[0]
