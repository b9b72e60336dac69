"""The commands of docs/clusters.md: their flags, the peaks beside them, and small runs of each of them."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora
import ppo
from conftest import REPO, metrics, run_script
from training import train

sys.path.append(str(REPO / "bench"))
import memory  # noqa: E402

PAGE = (REPO / "docs" / "clusters.md").read_text()
# Sizes of a run on a tiny network, which take the place of the command's
SMALL = {"sft.py": ["--batch", "4", "--micro-batch", "2", "--max-len", "64"],
         "reward.py": ["--batch", "4", "--micro-batch", "2", "--max-len", "64"],
         "ppo.py": ["--rollout-batch", "4", "--mini-batch", "4", "--micro-batch", "2", "--max-prompt", "48",
                    "--max-new", "4", "--eval-prompts", "2"]}


def section_commands(title, text):
    """The commands of a section: script, words, GPUs, the peak behind #, and the card of the title."""
    card = float(re.search(r"cards? of (\d+) GB", title)[1])
    hosts = 16 if "two machines of eight" in title else None
    for line in re.findall(r"^    (.+)$", text.replace("\\\n", " "), flags=re.M):
        line, _, peak = line.partition("#")
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        gpus = hosts or (int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 1)
        yield SimpleNamespace(script=words[at], words=words[at + 1:], gpus=gpus, card=card,
                              peak=peak.strip(), line=line.strip())


def sections():
    """{title: its commands} of "Commands for real machines"."""
    part = PAGE.partition("## Commands for real machines")[2].partition("\n## ")[0]
    pieces = re.split(r"^### (.+)$", part, flags=re.M)[1:]
    return {title: list(section_commands(title, text))
            for title, text in zip(pieces[::2], pieces[1::2], strict=True)}


SECTIONS = sections()


def value(command, flag):
    return command.words[command.words.index(flag) + 1] if flag in command.words else None


def size_of(folder, commands):
    """The size of the LLaMA behind a folder: of LLAMA-7B, or of the model that a command has started from."""
    if folder.startswith("LLAMA-"):
        return folder.removeprefix("LLAMA-")
    by = next(c for c in commands if value(c, "--out") == folder)
    return size_of(value(by, "--model") or value(by, "--actor") or by.words[0], commands)


def is_adapter(folder, commands):
    by = next(c for c in commands if value(c, "--out") == folder)
    return by.script != "lora.py" and value(by, "--lora-rank") is not None


def calculated(command, commands):
    """The calculator's job for a command. PPO on two adapter folders of one LLaMA needs no --lora-rank."""
    step, words, bases = command.script.removesuffix(".py"), [*command.words], 1
    if step == "ppo":
        folders = [value(command, "--actor"), value(command, "--reward")]
        adapters = [is_adapter(folder, commands) for folder in folders]
        words += ["--lora-rank", "8"] if all(adapters) else []
        bases = 2 if any(adapters) and not all(adapters) else 1
    size = size_of(value(command, "--model") or value(command, "--actor"), commands)
    return memory.make_job(step, size, words, command.gpus, command.card, bases)


def test_the_page_has_commands_for_all_machines():
    counts = {title: [c.script for c in commands] for title, commands in SECTIONS.items()}
    assert len(counts) == 5 and sum(len(scripts) for scripts in counts.values()) == 15
    assert sum(len(set(scripts) & {"sft.py", "reward.py", "ppo.py"}) == 3 for scripts in counts.values()) == 4


@pytest.mark.parametrize("title", SECTIONS)
def test_a_command_has_known_flags_fits_its_card_and_names_its_peak(title):
    for command in SECTIONS[title]:
        if command.script != "lora.py":
            job = calculated(command, SECTIONS[title])
            assert f"{memory.peak(job) / 1e9:.1f}" == command.peak, command.line
            assert memory.fits(job), command.line


def test_the_ram_of_a_command_is_named_below_it():
    jobs = [calculated(c, commands) for commands in SECTIONS.values() for c in commands
            if c.script != "lora.py"]
    named = re.findall(r"It takes (\d+) GB of RAM", PAGE)
    assert named == [f"{memory.ram(job) / 1e9:.0f}" for job in jobs if memory.ram(job)]


# ------------------------------------------------------------------------------------------------ small runs
def small(command, base, data, folder):
    """The command's words with a tiny network, few rows and one step, all in a folder."""
    words = [str(base) if word.startswith("LLAMA-") else str(data) if word.endswith(".jsonl")
             else str(folder / word) if word.startswith("runs/") else word for word in command.words]
    if command.script == "lora.py":
        return words
    return [*words, *SMALL[command.script], "--steps", "1", "--eval-share", "0.03"]


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_run_on_a_tiny_network(title, base, pairs_file, tmp_path, monkeypatch):
    """In this process, with an engine of plain PyTorch on one rank, or two threads."""
    monkeypatch.setattr(ppo, "divide_frozen", lambda network, *_: network)
    for command in SECTIONS[title]:
        words = small(command, base, pairs_file, tmp_path)
        if command.script == "lora.py":
            monkeypatch.setattr(sys, "argv", ["lora.py", *words])
            lora.main()
        else:
            script, out = import_module(command.script.removesuffix(".py")), words[words.index("--out") + 1]
            assert train(script, words, out, monkeypatch, world=min(2, command.gpus)).lines, command.line


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_run_with_the_launcher(title, base, pairs_file, tmp_path):
    for command in SECTIONS[title]:
        words, is_merge = small(command, base, pairs_file, tmp_path), command.script == "lora.py"
        done = run_script(command.script, *words, ranks=0 if is_merge else min(2, command.gpus))
        assert done.returncode == 0, command.line + done.stdout[-2000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ Slurm
SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node "$@" & machines+=($!); done
for machine in "${machines[@]}"; do wait "$machine" || exit 1; done
"""


@pytest.mark.slow
@pytest.mark.faults
def test_the_script_for_slurm_starts_both_machines(base, pairs_file, tmp_path):
    """srun and scontrol are stand-ins: both machines are this one, with a process each."""
    script = re.search(r"```bash\n(.+?)```", PAGE, flags=re.S)[1]
    assert "slots=8" in script
    for old, new in (("slots=8", "slots=1"), ("LLAMA-13B", str(base)), ("pairs.jsonl", str(pairs_file)),
                     ("--resume", " ".join([*SMALL["sft.py"], "--steps", "2", "--resume"]))):
        script = script.replace(old, new)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\nprintf 'localhost\\nsecond\\n'\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (tmp_path / "sft.py").symlink_to(REPO / "sft.py")
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "both", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([shutil.which("bash"), "job.sh"], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes" in done.stdout and metrics(tmp_path / "runs" / "sft")[-1]["step"] == 2
