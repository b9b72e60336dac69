"""The trackers of --track: TensorBoard or Weights & Biases (wandb), beside metrics.jsonl; rank 0 alone.

Both are optional packages. They get the lines of metrics.jsonl, and the rows of samples.jsonl as a table.
"""
import importlib
import os
import re
import socket
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from runtime.errors import first_line, without_controls

# A module of each package. A folder of the package's name, such as wandb makes, does not have it.
MODULES = {"tensorboard": "tensorboard.summary.writer.record_writer", "wandb": "wandb.sdk"}
# Variables of wandb that are set where the user has not. (A version that does not know one passes it over.)
WANDB = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off",           # it prints nothing, and copies no output
         "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true", "WANDB__DISABLE_STATS": "true",
         "WANDB_ERROR_REPORTING": "false",                         # of its own errors, to its makers
         "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",             # seconds that a kill costs, instead of 15
         "WANDB_FINISH_TIMEOUT": "300"}      # seconds that a dead network holds the end of a run up

def tracker(name: str) -> str:
    """argparse type of --track: a tracker whose package can be imported."""
    if name not in MODULES:
        raise ArgumentTypeError(f"{name} is not {' or '.join(MODULES)}")
    if name == "wandb":
        set_variables()                      # before the import, which reads some
    try:
        for module in (name, MODULES[name]):
            importlib.import_module(module)
    except Exception as error:               # beside a NumPy or protobuf that it does not fit: of every kind
        raise ArgumentTypeError(f"{name} cannot be imported ({first_line(error)}); "
                                f"pip install {name}") from None
    return name

def set_variables():
    for variable, value in WANDB.items():
        os.environ.setdefault(variable, value)

class Tracker:
    """What --track names, or nothing without the flag and on other ranks than 0. A tracker that fails is
    given up, and one line says so. The run goes on: metrics.jsonl and samples.jsonl have everything."""

    def __init__(self, args: Namespace, rank: int, start: int):
        """start: the steps that a resumed run has behind it."""
        self.name, self.inner = getattr(args, "track", None), None
        if self.name and rank == 0:
            make = TensorBoard if self.name == "tensorboard" else Wandb
            self.inner = self.attempt(make, args, start)
        if self.inner:
            with suppress(OSError):
                tqdm.write(f"tracking with {without_controls(self.inner.words)}", file=sys.stdout)

    def metrics(self, metrics: dict[str, float]):
        """Records a line of metrics.jsonl; numbers that are not finite, too."""
        if self.inner:
            numbers = {name: x for name, x in metrics.items() if name != "step"}
            self.attempt(self.inner.metrics, metrics["step"], numbers)

    def samples(self, step: int, samples: list[dict]):
        """Records rows of samples.jsonl, which have the same keys, as a table."""
        if self.inner:
            self.attempt(self.inner.samples, step, samples)

    def close(self):
        if self.inner:
            self.attempt(self.inner.close)

    def attempt(self, call: Callable, *content: object) -> object:
        """What the call returns; where it fails, None. Its errors can be of every kind: a full disk, a
        process of the tracker that was killed, a server that refuses."""
        try:
            if self.inner and not self.inner.file.exists():        # what it writes would have no name
                raise FileNotFoundError(f"{self.inner.file} has vanished")
            return call(*content)
        except Exception as error:
            broken, self.inner = self.inner, None
            with suppress(Exception):
                broken.close()
            why = without_controls(f"{type(error).__name__}: {first_line(error)}").strip(": ")
            with suppress(OSError):
                tqdm.write(f"warning: --track {self.name} has failed, and the run goes on without it ({why})",
                           file=sys.stderr)

class TensorBoard:
    """An event file in OUT/tensorboard. torch's SummaryWriter is not used: its thread prints a traceback when
    the disk is full, and its import starts TensorFlow where that is installed."""

    def __init__(self, args: Namespace, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        folder = Path(args.out) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        self.file = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.handle, self.Event = self.file.open("wb"), Event
        self.records = RecordWriter(self.handle)
        self.words = f"TensorBoard: tensorboard --logdir {folder}"
        self.add(0, file_version="brain.Event:2")
        if start:                            # readers forget the steps from here on: they are written again
            self.add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: object):
        """Appends an event."""
        event = self.Event(wall_time=time.time(), step=step, **content)
        self.records.write(event.SerializeToString())

    def metrics(self, step: int, metrics: dict[str, float]):
        from tensorboard.compat.proto.summary_pb2 import Summary
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self.add(step, summary=Summary(value=values))
        self.records.flush()

    def samples(self, step: int, samples: list[dict]):
        from tensorboard.plugins.text.summary_v2 import text_pb
        self.add(step, summary=text_pb("samples", markdown(samples)))
        self.records.flush()

    def close(self):
        self.handle.close()

class Wandb:
    """A run of wandb in OUT/wandb. It stays on this machine unless wandb's own settings say otherwise
    (WANDB_MODE, or its settings files). A resumed run goes on with the same id."""

    def __init__(self, args: Namespace, start: int):
        set_variables()
        import wandb
        own = wandb.setup().settings
        if "mode" not in own.model_fields_set:                     # nobody has set it
            # offline for the whole process: a run that is offline alone still lets wandb report its own use
            own = wandb.setup(settings=wandb.Settings(mode="offline")).settings
        folder = Path(args.out).absolute() / "wandb"
        folder.mkdir(exist_ok=True)
        self.file, self.wandb = folder / "run-id", wandb
        config = {name: value for name, value in vars(args).items() if name != "defaults"}
        self.run = wandb.init(
            dir=folder.parent, id=self.file.read_text() if self.file.exists() else None, resume="allow",
            project=own.project or "alpaca-rlhf", name=own.run_name or str(args.out), config=config)
        self.file.write_text(self.run.id)
        self.first = self.run.step           # above 0 in a run that is resumed online
        self.words = f"wandb, {self.run.settings.mode}, in {folder}"

    def metrics(self, step: int, metrics: dict[str, float]):
        """Online, a resumed run may have steps after the checkpoint already. wandb takes none of them back,
        so they are not sent again."""
        if step >= self.first:
            self.run.log(metrics, step=step)

    def samples(self, step: int, samples: list[dict]):
        rows = [list(sample.values()) for sample in samples]
        self.metrics(step, {"samples": self.wandb.Table(columns=list(samples[0]), data=rows)})

    def close(self):
        try:
            self.run.finish()
        finally:
            self.wandb.teardown()            # ends wandb's own process

def markdown(rows: list[dict]) -> str:
    """A table in Markdown. What a model wrote is shown as text: nothing in it is a link, a picture or
    HTML."""
    def cell(x):
        if isinstance(x, float):
            return f"{x:.4g}"
        lines = without_controls(x).strip().splitlines()
        return "<br>".join(re.sub(r"[<>&|`*_\[\]\\]", lambda c: f"&#{ord(c[0])};", line) for line in lines)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
