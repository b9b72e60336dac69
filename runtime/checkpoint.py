"""Checkpoints and signals: a run that is interrupted goes on later as if it had not been.

OUT/checkpoints/step-N/ holds
    weights.safetensors   the trained weights (and a moving average of them)
    rank-R.pt             rank R's optimisers and random generators
    run.json              flags, sizes of the logs, what the loop keeps, whether a held-out evaluation is due
    manifest.json         size and SHA-256 of each of these files; it is written last
A checkpoint is written as step-N.tmp and renamed when it is whole. The ranks' files may lie on one disk, or
on a disk of each machine.
"""
import json
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from runtime.engine import bytes_of_whole, gathered, give_back_fetched, numbers_of_whole
from runtime.errors import BadInput
from runtime.folders import FILES, FOLDERS, fingerprint, read_json, write_whole, writing
from runtime.log import Log
from runtime.ranks import fail_together, finish, from_all, max_over_ranks, say
from runtime.rows import data_sizes
from runtime.speed import give_back_memory, keep_memory

# Entries of args.json that may change between a run and its --resume: they change no step.
MAY_CHANGE = {"out", "overwrite", "resume", "save_every", "timeout", "log_every", "eval_every", "local_rank",
              "micro_batch", "gen_batch", "checkpointing", "zero_stage", "offload", "world_size", "versions",
              "finished", "data_sizes", "track", "inputs_modified"}          # older runs have the last one
MINUTES = 15                                 # between checkpoints, where --save-every is not given
SKIPPED = 5                                  # updates in a row whose gradient is not finite end the run

# ------------------------------------------------------------ signals
seen = {"signal": 0, "at": 0.0}              # the signal that asks this rank to stop, and when it came

def on_signal(number, frame):
    """The first SIGINT or SIGTERM lets the step finish and the run save. A second one, at least five seconds
    later, quits at once without saving; sooner it is ignored, because the launcher sends two in a row."""
    if seen["signal"]:
        if time.monotonic() - seen["at"] < 5:
            return
        raise SystemExit(128 + number)
    seen.update(signal=number, at=time.monotonic())
    if os.environ.get("RANK") == "0" and sys.stderr.isatty():
        print("stopping when all is saved; a second signal after five seconds quits at once", file=sys.stderr)

class Stopped(Exception):
    """A held-out evaluation was cut short because some rank got a signal. All ranks raise it at the same
    place."""

def stoppable(items: Iterable, label: str) -> Iterator:
    """Yields the items under a progress bar. Before each one all ranks look whether any of them got a signal,
    and raise Stopped. The ranks may have different numbers of items: those that have ended look on until all
    have."""
    def look(going):
        number, some_go_on = max_over_ranks(seen["signal"], going)
        if number:
            raise Stopped
        return some_go_on

    quiet = None if dist.get_rank() == 0 else True                 # None: only on a terminal
    for item in tqdm(items, label, leave=False, disable=quiet, dynamic_ncols=True):
        look(True)
        yield item
    while look(False):
        pass

# ------------------------------------------------------------ the run
class Run:
    """A run of a trainer in --out: new, or resumed. step: the steps it has behind it. extra: what the loop
    keeps beside weights and optimisers. evaluation_due: the held-out evaluation after `step` has not been
    done yet."""

    def __init__(self, args: Namespace, lengths: list[int]):
        """Makes --out with args.json; or with --resume, all ranks agree on a checkpoint. lengths: of the
        training rows."""
        self.args, self.out, self.folder = args, Path(args.out), Path(args.out) / "checkpoints"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0            # the first rank of its machine
        self.engines, self.weights, self.saved_at = {}, {}, time.monotonic()
        self.step, self.extra, self.evaluation_due = 0, {}, True
        self.source, self.same_ranks = None, True                  # of a resumed run: the checkpoint's folder
        given = {name: value for name, value in vars(args).items() if name != "defaults"}
        self.flags = as_json({
            **given, "script": Path(sys.argv[0]).stem, "world_size": self.world,
            "versions": {name: sys.modules[name].__version__ for name in ("torch", "deepspeed")},
            "rows": len(lengths), "tokens": sum(lengths), "data_sizes": data_sizes(args.data)})
        if args.resume:
            self.find_checkpoint()
        if not self.step:
            self.begin()

    def begin(self):
        """Makes --out, and takes away another run's records and adapter config."""
        with fail_together(), writing(self.out, flag="--out "):
            if self.rank == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / "args.json", json.dumps(self.flags, indent=2) + "\n")
                for name in FILES[1:]:       # an old adapter_config.json would win over the new full model
                    (self.out / name).unlink(missing_ok=True)
            if self.first_here:
                for name in FOLDERS:
                    shutil.rmtree(self.out / name, ignore_errors=True)

    # ------------------------------------------------------------ resume
    def find_checkpoint(self):
        """Chooses the newest checkpoint whose files every rank finds whole, and reads its run.json."""
        with fail_together():
            file = self.out / "args.json"
            begun = read_json(file) if self.rank == 0 and file.exists() else {}
            self.changed_flags(begun)
            mine = {step: digest for step in self.steps_on_disk() if (digest := self.verify(step))}
        finished, digests = from_all(begun.get("finished"))[0], from_all(mine)
        any_here = any(from_all(self.steps_on_disk()))
        if finished:
            say(f"{self.out}: this run is complete, there is nothing to resume")
            finish()
            raise SystemExit(0)
        # Every rank must find the same manifest: on a machine's own disk another run's checkpoint may have
        # been left.
        whole = [step for step in digests[0] if len({other.get(step) for other in digests}) == 1]
        usable = whole or [*digests[0]]      # rank 0's part holds all the weights: it alone is of use too
        if usable:
            self.step = max(usable)
            self.source = self.folder / f"step-{self.step}"
            self.read_checkpoint(only_rank_0=not whole)
        elif any_here:
            raise BadInput(f"--resume {self.out}: none of its checkpoints is whole (see the warnings); to "
                           f"start at the beginning, move {self.folder} away", everywhere=True)
        else:
            say(f"{self.out}: no checkpoint to resume from, so the run starts at its beginning")

    def read_checkpoint(self, only_rank_0: bool):
        """Reads run.json, says what has changed since, and cuts the logs back to where they were."""
        with fail_together():
            kept = read_json(self.source / "run.json") if self.rank == 0 else {}
            self.changed_flags(kept.get("flags", {}))
        kept = from_all(kept)[0]
        self.extra, self.evaluation_due = kept["own"], kept.get("evaluation_due", False)
        changed = self.changed_flags(kept["flags"])
        self.same_ranks = not only_rank_0 and not {"world_size", "zero_stage", "offload"} & changed.keys()
        unnamed = ("out", "overwrite", "resume", "gen_batch", "data_sizes", "inputs_modified")
        named = [text for name, text in changed.items() if name not in unnamed]
        say(f"resuming {self.out} after step {self.step}"
            + (f"; changed: {', '.join(named)}" if named else "")
            + ("" if self.same_ranks else "; the weights are kept, and the optimisers' moments start anew"))
        with fail_together(), writing(self.out):
            for name, size in kept["sizes"].items() if self.rank == 0 else ():
                os.truncate(self.out / name, min(size, (self.out / name).stat().st_size))

    def changed_flags(self, then: dict) -> dict[str, str]:
        """{flag: "flag old -> new"} of those that differ from a run begun before; BadInput where one makes it
        another run. A flag that the earlier run did not know counts as its default."""
        if not then:
            return {}
        then = {**as_json(getattr(self.args, "defaults", {})), **then}
        changed = {name: f"{name} {then.get(name)!r} -> {self.flags.get(name)!r}"
                   for name in sorted({*then, *self.flags}) if then.get(name) != self.flags.get(name)}
        if refused := [text for name, text in changed.items() if name not in MAY_CHANGE]:
            raise BadInput(f"--resume {self.out}: {refused[0]} would make it another run; choose another "
                           f"--out")
        return changed

    def steps_on_disk(self) -> list[int]:
        """The steps that have a checkpoint folder on this rank's disk, newest first."""
        names = [path.name[5:] for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def verify(self, step: int) -> str | None:
        """The manifest's digest, where the files that this rank reads of a checkpoint are as the manifest
        says."""
        folder = self.folder / f"step-{step}"
        try:
            manifest = read_json(folder / "manifest.json")
            needed = {"weights.safetensors", "run.json"} if self.rank == 0 else set()
            for name in needed | ({f"rank-{self.rank}.pt"} & manifest.keys()):
                if manifest.get(name) != fingerprint(folder / name):
                    raise BadInput(f"{folder / name}: is not as the manifest says")
            return fingerprint(folder / "manifest.json")[1]
        except (BadInput, OSError) as error:
            print(f"warning: a checkpoint is damaged, an older one is looked for: {error}", file=sys.stderr)
            return None

    def track_weights(self, weights: dict[str, Tensor], on_all_ranks: bool = True):
        """These tensors will be in every checkpoint. A resumed run's rank 0 reads them, and hands them to all
        ranks that have them."""
        self.weights |= weights
        if not self.step:
            return
        file = safe_open(self.source / "weights.safetensors", "pt") if self.rank == 0 else None
        for name, weight in weights.items():
            if file:
                weight.data.copy_(file.get_tensor(name))
            if on_all_ranks:
                dist.broadcast(weight.data, 0)

    def record(self, **chosen):
        """Adds to args.json what the run itself has chosen."""
        self.flags |= chosen
        with fail_together(), writing(self.out):
            if self.rank == 0:
                write_whole(self.out / "args.json", json.dumps(self.flags, indent=2) + "\n")

    def track_engines(self, **engines):
        """Training begins: these engines will be in every checkpoint, and from now on a signal lets the step
        finish. A resumed run's engines get their moments and their places in the schedule."""
        self.engines = engines
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        torch.manual_seed(self.args.seed + self.rank)              # dropout differs between the ranks
        if self.args.zero_stage < 3 and not torch.cuda.is_available():         # ZeRO-3: memory is short
            keep_memory()                    # now, when what loading needed has been given back
        if not self.step:
            return
        for name, engine in engines.items():
            engine.lr_scheduler.load_state_dict(self.extra["schedules"][name])
            engine.skipped_steps = self.extra["skipped"][name]
            rates = engine.lr_scheduler.get_last_lr()
            for group, lr in zip(engine.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        if self.same_ranks:
            self.restore_rank()

    def restore_rank(self):
        """Reads this rank's optimisers and random generators."""
        # A pickle, so it can run code: resume only your own runs.
        mine = torch.load(self.source / f"rank-{self.rank}.pt", map_location="cpu", weights_only=False)
        for name, engine in self.engines.items():
            if self.args.zero_stage:         # DeepSpeed picks this rank's state from a list of all ranks'
                engine.optimizer.load_state_dict([mine[name]] * self.world, load_from_fp32_weights=True)
            else:
                engine.optimizer.load_state_dict(mine[name])
        torch.set_rng_state(mine["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])

    # ------------------------------------------------------------ in training
    @contextmanager
    def evaluation(self, step: int, log: Log):
        """Around the held-out evaluation after `step`. If a signal stops it, it writes no line; the
        checkpoint notes that it is due, and the resumed run does it first. Before the first step there is
        nothing to save."""
        stopped = False
        try:
            yield
        except Stopped:
            stopped = True
        give_back_fetched(self.engines.values())       # before anything is saved
        if stopped:
            if step != self.step:            # else a resumed run has this checkpoint already
                self.save(step, evaluation_due=True)
            self.stop(step, log)
        self.evaluation_due = False

    def end_step(self, step: int, rows: list[int], log: Log):
        """After each step but the last, on all ranks alike: ends a run whose gradients are not finite, saves
        now and then, and stops on a signal. rows: the numbers of the step's training rows."""
        for name, engine in self.engines.items():
            searching = engine.fp16_enabled() and engine.optimizer.loss_scale > 1      # fp16 finds its scale
            if engine.skipped_in_a_row >= SKIPPED and not searching:
                last = next((f"step-{s}" for s in self.steps_on_disk()), "there is none")
                raise BadInput(f"step {step}: the last {engine.skipped_in_a_row} gradients of the {name} "
                               f"were not finite, and the rate may be too high; rows of the data in this "
                               f"step: {rows}; last checkpoint: {last}", everywhere=True)
        if step % 50 == 0:
            give_back_memory()               # or what lies free between blocks in use grows with the steps
        every = self.args.save_every
        due = step % every == 0 if every else time.monotonic() - self.saved_at > 60 * MINUTES
        signal_seen, due = max_over_ranks(seen["signal"], due and self.rank == 0)
        if due or signal_seen:
            self.save(step)
            log.restart_clock()
        if signal_seen:
            self.stop(step, log)

    def stop(self, step: int, log: Log):
        """Ends a run that got a signal, on all ranks."""
        number = int(max_over_ranks(seen["signal"])[0])
        when = f"after step {step}; --resume goes on from there" if step else "before step 1, nothing saved"
        say(f"stopped by {signal.Signals(number).name} {when}")
        log.close()
        finish()
        raise SystemExit(128 + number)

    def finish(self, log: Log):
        """After the model is saved: marks the run as complete, and leaves the process group."""
        if self.rank == 0:
            with writing(self.out):
                flags = {**self.flags, "finished": True}
                write_whole(self.out / "args.json", json.dumps(flags, indent=2) + "\n")
        log.close()
        finish()

    # ------------------------------------------------------------ save
    def save(self, step: int, evaluation_due: bool = False):
        """Writes a checkpoint: each rank its own files, then rank 0 the manifest and the name; where another
        machine has a disk of its own, that machine's first rank does the same there."""
        part = self.folder / f"step-{step}.tmp"
        with fail_together(), writing(part):
            if self.rank == 0 and not self.out.exists():
                raise BadInput(f"{self.out}: the folder has vanished")
            for old in self.folder.glob("*.tmp") if self.first_here else ():   # an interrupted save's
                shutil.rmtree(old, ignore_errors=True)
        files = {f"rank-{self.rank}.pt": self.write_rank}
        if self.rank == 0:
            files["weights.safetensors"] = lambda path: save_file(whole, path)
            files["run.json"] = lambda path: path.write_text(json.dumps(self.kept(step, evaluation_due)))
        # each weight itself, its copy in float32 and its two moments
        needed = sum(bytes_of_whole(w) + 12 * numbers_of_whole(w) for w in self.weights.values())
        whole = self.whole_weights()
        with fail_together(), writing(part, needed):
            part.mkdir(parents=True, exist_ok=True)
            quiet = None if self.rank == 0 else True
            for name, write in tqdm(files.items(), f"saving step-{step}", leave=False, disable=quiet):
                write(part / name)
            marks = {name: fingerprint(part / name, sync=True) for name in files}
        manifest = {name: mark for some in from_all(marks) for name, mark in some.items()}
        for my_turn in (self.rank == 0, self.rank > 0 and self.first_here):
            with fail_together(), writing(part):
                if my_turn and part.exists():
                    self.publish(part, manifest)
        self.saved_at = time.monotonic()

    def whole_weights(self) -> dict[str, Tensor]:
        """The tracked weights in rank 0's RAM. What ZeRO-3 has divided is made whole one weight at a time: a
        GPU may not have room for all of them."""
        whole = {}
        for name, weight in self.weights.items():
            with gathered([weight]):
                if self.rank == 0:
                    divided = hasattr(weight, "ds_id")             # its memory is given back after this
                    whole[name] = weight.detach().to("cpu", copy=divided).contiguous()
        return whole

    def kept(self, step: int, evaluation_due: bool) -> dict:
        """The content of run.json."""
        sizes = {name: (self.out / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")
                 if (self.out / name).exists()}
        schedules = {name: engine.lr_scheduler.state_dict() for name, engine in self.engines.items()}
        skipped = {name: engine.skipped_steps for name, engine in self.engines.items()}
        return {"step": step, "flags": self.flags, "sizes": sizes, "evaluation_due": evaluation_due,
                "own": {**self.extra, "schedules": schedules, "skipped": skipped}}

    def write_rank(self, path: Path):
        """Writes this rank's optimisers and random generators."""
        mine = {name: engine.optimizer.state_dict() for name, engine in self.engines.items()}
        mine["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            mine["cuda"] = torch.cuda.get_rng_state()
        with open(path, "wb") as file:
            try:
                torch.save(mine, file)
            except RuntimeError as error:    # PyTorch's error hides the system's, which says why
                raise error.__context__ or error from None

    def publish(self, part: Path, manifest: dict):
        """The last act of a checkpoint, from which it counts. Of the checkpoints before, one is kept."""
        whole = part.with_suffix("")
        with suppress(BadInput):             # on one disk rank 0 did it; a cache may still show the old name
            if read_json(whole / "manifest.json") == manifest:
                return
        write_whole(part / "manifest.json", json.dumps(manifest, indent=1))
        if whole.exists():                   # a damaged one, where the run was resumed before it
            whole.rename(whole.with_suffix(".old.tmp"))
        part.rename(whole)
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)                 # so that the name, too, is on the disk
        os.close(descriptor)
        now = int(part.stem[5:])             # a newer checkpoint is damaged, or another rank does not have it
        older = [step for step in self.steps_on_disk() if step <= now]
        for step in {*self.steps_on_disk()} - {*older[:2]}:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

def as_json(values: dict) -> dict:
    """The dictionary as it will be when it is read from a JSON file."""
    return json.loads(json.dumps(values))
