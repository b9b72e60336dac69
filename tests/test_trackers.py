"""--track: the files of TensorBoard and wandb are read back. They hold what metrics.jsonl and samples.jsonl
hold."""
import http.server
import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
from argparse import ArgumentTypeError
from collections import Counter
from html import unescape
from types import SimpleNamespace

import pytest
import torch

import ppo
import reward
import sft
from conftest import REPO, metrics
from runtime.errors import BadInput
from runtime.log import Log
from runtime.trackers import MODULES, Wandb, markdown, tracker
from test_runtime import PPO, SFT, Killed, deepspeed, group, jobs, kill_in_third, no_signal, parsed, start  # noqa: F401 (fixtures)
from training import train

def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None,
                              reason=f"{package} is not installed (tests/requirements.txt)")


SAMPLES = [{"prompt": "\n\nHuman: why?\n\nAssistant:", "response": "so", "score": 1.25, "kl": math.nan},
           {"prompt": "\n\nHuman: when?\n\nAssistant:", "response": "now", "score": -2.0, "kl": 0.5}]
NUMBERS = [0.5, math.nan, math.inf, -math.inf, 1e300, 0.25, 7]


def new_log(out):
    return Log(SimpleNamespace(out=str(out), log_every=1, track="tensorboard"), 9, 0, sft.CURVES)


def steps(log, until):
    """Trains up to a step, and evaluates after it."""
    while log.n < until:
        log.step(10, loss=NUMBERS[log.n % len(NUMBERS)], skipped=log.n)
    log.samples(until, SAMPLES)
    log.line(step=until, eval_ppl=3.5)


def values(lines):
    """{(step, name): value} of lines of metrics.jsonl, without the times."""
    return {(line["step"], name): x for line in lines for name, x in line.items()
            if name not in ("step", "tokens_per_s")}


# ------------------------------------------------------------------------------------------ TensorBoard
def float32(x):
    """The number that TensorBoard has of x; of a large one, infinity."""
    return float(torch.tensor(x, dtype=torch.float64).float())


def board(out):
    """All that TensorBoard reads in OUT: its scalars [(step, name, value)], and its texts {step: text}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = [(event.step, name, event.value) for name in events.Tags()["scalars"]
             for event in events.Scalars(name)]
    texts = events.Tensors("samples") if "samples" in events.Tags()["tensors"] else []
    assert len({event.step for event in texts}) == len(texts)
    return found, {event.step: event.tensor_proto.string_val[0].decode() for event in texts}


def check_board(out):
    """TensorBoard has the lines of metrics.jsonl, each once, and the samples of every evaluation."""
    found, texts = board(out)
    assert Counter(name for _, name, _ in found) == Counter(
        name for line in metrics(out) for name in line if name != "step")
    for step, name, value in found:
        if name != "tokens_per_s":
            expected = values(metrics(out))[step, name]
            assert not math.isfinite(value) if expected is None else value == float32(expected)
    rows = [json.loads(row) for row in (out / "samples.jsonl").read_text().splitlines()]
    assert texts.keys() == {row["step"] for row in rows}
    for step, text in texts.items():
        assert text == markdown([{name: x for name, x in row.items() if name != "step"}
                                 for row in rows if row["step"] == step])


@needs("tensorboard")
def test_tensorboard_has_every_line_and_numbers_that_are_not_finite_break_nothing(tmp_path, capsys):
    log = new_log(tmp_path)
    steps(log, 7)
    check_board(tmp_path)                    # while the run goes on
    log.close()
    said = f"tracking with TensorBoard: tensorboard --logdir {tmp_path}/tensorboard\n"
    assert said in capsys.readouterr().out
    loss = {step: x for step, name, x in board(tmp_path)[0] if name == "loss"}
    assert loss == pytest.approx(dict(enumerate([0.5, math.nan, math.inf, -math.inf, math.inf, 0.25, 7], 1)),
                                 nan_ok=True)


@needs("tensorboard")
def test_a_run_that_is_killed_and_resumed_is_one_record_without_doubles(start, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        start("ppo", out, "--track tensorboard", at_evaluation=kill_in_third)
    before = {step for step, name, _ in board(out)[0] if name == "lr"}
    assert before == {1, 2, 3, 4}            # step 4 comes after the checkpoint
    start("ppo", out, "--track tensorboard --resume")
    assert len([*out.glob("tensorboard/*")]) == 2
    check_board(out)


@needs("tensorboard")
def test_of_two_ranks_the_first_alone_has_a_tracker(jobs, tmp_path, monkeypatch):
    out, words = tmp_path / "out", jobs["sft-full"][1].split()
    train(sft, [*words, "--micro-batch", 1, "--track", "tensorboard"], out, monkeypatch, world=2)
    (out / "samples.jsonl").touch()
    check_board(out)
    assert len([*out.glob("tensorboard/*")]) == 1


@needs("tensorboard")
@pytest.mark.parametrize("what", ["full", "vanished"])
def test_a_tracker_that_fails_is_given_up_in_one_line_and_the_run_goes_on(what, tmp_path, capsys):
    log = new_log(tmp_path)
    steps(log, 2)
    inner = log.tracker.inner
    if what == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), inner.handle.fileno())
    else:
        (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
    steps(log, 4)
    steps(log, 5)
    log.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    del log, inner
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --track tensorboard has failed, and the run goes on without it (")
    assert {"full": "No space left", "vanished": "has vanished"}[what] in line


@needs("tensorboard")
def test_in_a_folder_that_cannot_be_made_the_run_starts_without_its_tracker(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file of this name")
    log = new_log(tmp_path)
    steps(log, 1)
    log.close()
    assert len(metrics(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has failed" in line and "tensorboard" in line


@needs("tensorboard")
def test_what_a_model_wrote_is_shown_as_text():
    from tensorboard.plugin_util import markdown_to_safe_html
    hostile = ("a|b\n<b>c</b> ![d](http://e) [f](http://g) `h` *i* __j__ \\k &lt; <http://l>\r\n"
               "| m\x1b[2J\x02n")
    html = markdown_to_safe_html(markdown([{"response": hostile, "score": 1 / 3}, SAMPLES[0]]))
    shown = unescape(re.sub("<[^>]*>", "", html))
    for tag in ("<a", "<img", "<b>", "<code", "<em", "<strong"):
        assert tag not in html
    assert html.count("<tr>") == 3 and html.count("<td") == 4 and html.count("<br>") == 4
    for part in ("a|b", hostile.splitlines()[1], "| m[2Jn", "0.3333"):
        assert part in shown


# ------------------------------------------------------------------------------------------ wandb
# Sessions of a run, in a process of its own: for each the step that it goes on from, what it records, and
# whether wandb's own process is killed before that.
SESSIONS = """
import json, sys
from argparse import Namespace
sys.path.insert(0, {repo!r})
import psutil
from runtime.trackers import Tracker, tracker
tracker("wandb")
for start, calls, kill in json.load(sys.stdin):
    log = Tracker(Namespace(out={out!r}, track="wandb", lr=0.5), 0, start)
    if kill:
        for process in psutil.Process().children():
            process.kill()
            process.wait()
    for name, *content in calls:
        getattr(log, name)(*content)
    log.close()
"""


def sessions(out, *parts, **env):
    """Runs them. Returns what they print."""
    out.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    code = SESSIONS.format(repo=str(REPO), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], cwd=out.parent, input=json.dumps(parts), text=True,
                          capture_output=True, timeout=200, env={**clean, "HOME": str(out.parent), **env})
    assert done.returncode == 0, done.stderr
    return done


def recorded(*numbers):
    """The calls that record so many steps, with an evaluation after the last one."""
    lines = [["metrics", {"step": n, "loss": NUMBERS[n % len(NUMBERS)], "skipped": n}] for n in numbers]
    n = numbers[-1]
    return [*lines, ["samples", n, SAMPLES], ["metrics", {"step": n, "eval_ppl": 3.5}]]


def wandb_records(file):
    """The records in a .wandb file: a log as LevelDB's, of 32 KB blocks, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2
    data, at, found, parts = file.read_bytes(), 7, [], []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:           # the end of a block is filled up
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        parts.append(data[at + 7:at + 7 + size])
        at += 7 + size
        if kind in (1, 4):                   # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return found


def history(folder):
    """{(step, name): value} of a session, without wandb's own names. A table's name is samples.path, its
    value a file in the session's folder."""
    found = {}
    (file,) = folder.glob("*.wandb")
    for record in wandb_records(file):
        row = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found |= {(row["_step"], name): x for name, x in row.items() if name[0] != "_"}
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """All sessions: OUT, their folders, their stderr, and the requests that came to wandb's server."""
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.path)
            self.send_error(404)
        do_GET = do_POST

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path_factory.mktemp("wandb") / "out"
    for words in ("init -q", "-c user.name=n -c user.email=e commit -q --allow-empty -m m"):
        subprocess.run(["git", *words.split()], cwd=out.parent, check=True)
    first, second, third = recorded(1, 2, 3, 4, 5), recorded(3, 4), recorded(5, 6)
    done = sessions(out, (0, first, False), (2, second, False), (4, third, True),
                    WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", WANDB_API_KEY="k" * 40)
    server.shutdown()
    return SimpleNamespace(out=out, done=done, requests=requests, calls=[first, second],
                           runs=sorted(out.glob("wandb/offline-run-*")))


@needs("wandb")
def test_a_resumed_run_has_the_same_id_and_what_it_records_is_that_of_metrics_jsonl(tracked):
    id = (tracked.out / "wandb" / "run-id").read_text()
    assert [f"-{id}" in run.name for run in tracked.runs] == [True] * 3
    for run, calls in zip(tracked.runs, tracked.calls, strict=False):
        numbers = {place: x for place, x in history(run).items() if not place[1].startswith("samples")}
        expected = values(content[0] for name, *content in calls if name == "metrics")
        assert numbers.keys() == expected.keys() and len(numbers) > 4
        for place, x in expected.items():    # wandb writes "NaN", "Infinity" and "-Infinity"
            assert float(numbers[place]) == pytest.approx(x, nan_ok=True)
    assert tracked.done.stdout.splitlines() == [f"tracking with wandb, offline, in {tracked.out}/wandb"] * 3


@needs("wandb")
def test_the_samples_of_each_evaluation_are_a_table(tracked):
    for run, step in zip(tracked.runs, (5, 4), strict=False):
        (table,) = [(place, x) for place, x in history(run).items() if place[1] == "samples.path"]
        assert table[0][0] == step
        table = json.loads((run / "files" / table[1]).read_text())
        first, second = table["data"]
        assert table["columns"] == [*SAMPLES[0]] and second == [*SAMPLES[1].values()]
        assert first[:3] == [*SAMPLES[0].values()][:3] and math.isnan(first[3])


@needs("wandb")
def test_nothing_leaves_the_machine_and_neither_output_nor_code_is_copied(tracked):
    assert tracked.requests == []
    records = [record for run in tracked.runs for record in wandb_records(next(run.glob("*.wandb")))]
    kinds = {record.WhichOneof("record_type") for record in records}
    assert {"history", "run"} <= kinds and not kinds & {"output", "output_raw"}
    (config,) = {item.value_json for record in records if record.HasField("run")
                 for item in record.run.config.update if item.key == "lr"}
    assert config == "0.5"                   # the flags
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tracked.out).strip()
    assert not [path for path in tracked.out.rglob("*") if path.is_file() and commit in path.read_bytes()]


@needs("wandb")
def test_where_the_process_of_wandb_is_killed_the_run_goes_on(tracked):
    # before 0.30, wandb warns that offline it cannot look for a run to resume
    (line,) = [line for line in tracked.done.stderr.splitlines() if not line.startswith("wandb: ")]
    assert line.startswith("warning: --track wandb has failed, and the run goes on without it (")


@needs("wandb")
def test_wandbs_own_settings_win(tmp_path):
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    done = sessions(tmp_path / "out", (0, recorded(1), False), WANDB_CONFIG_DIR=str(tmp_path))
    assert "tracking with wandb, disabled" in done.stdout and "--track" not in done.stderr
    assert not [*tmp_path.glob("out/wandb/offline-run-*")]


def test_steps_that_wandb_has_already_are_not_sent_again():
    sent = []
    resumed = SimpleNamespace(first=5, run=SimpleNamespace(log=lambda metrics, step: sent.append(step)))
    for step in (4, 5, 6):
        Wandb.metrics(resumed, step, {"loss": 1.0})
    assert sent == [5, 6]


# ------------------------------------------------------------------------------------------ the flag
def test_another_name_or_a_missing_package_is_one_line_before_anything_is_read(parsed, monkeypatch):
    for script, words in ((sft, SFT), (reward, SFT), (ppo, PPO)):
        with pytest.raises(BadInput, match="--track: mlflow is not tensorboard or wandb") as error:
            parsed(script, words + "--track mlflow")
        assert error.value.everywhere
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, None)           # import raises, as if not installed
            with pytest.raises(BadInput, match=rf"--track: {name} cannot .*; pip install {name} ") as error:
                parsed(script, words + f"--track {name}")
            assert error.value.everywhere


def test_a_folder_that_wandb_has_made_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    for name in {"wandb", *(name for name in sys.modules if name.startswith("wandb."))}:
        monkeypatch.setitem(sys.modules, name, None)               # so that it is as before in the end
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ArgumentTypeError, match="wandb cannot be imported .*pip install wandb"):
        tracker("wandb")


def test_a_new_run_begins_a_new_record_and_takes_no_runs_of_others_away(jobs, tmp_path, monkeypatch):
    out, words = tmp_path / "out", jobs["sft-full"][1].split()
    for name in ("tensorboard/events.out.tfevents.1", "wandb/run-id", "wandb/offline-run-1/run-1.wandb"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    with pytest.raises(BadInput, match="holds a run or a model already"):
        train(sft, words, out, monkeypatch)
    (out / "wandb" / "run-id").rename(out / "kept")
    with pytest.raises(BadInput, match="holds tensorboard, but no run to resume"):
        train(sft, [*words, "--resume"], out, monkeypatch)
    (out / "kept").rename(out / "wandb" / "run-id")
    train(sft, [*words, "--overwrite"], out, monkeypatch)
    assert not (out / "tensorboard").exists()
    assert [path.name for path in (out / "wandb").iterdir()] == ["offline-run-1"]
