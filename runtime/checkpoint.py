"""Checkpoints: never lose a run."""
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.engine import gathered, keep_memory, tell_allocator
from runtime.errors import BadInput
from runtime.folders import PARTS, WRITTEN, fingerprint, read_json, write_whole, writing
from runtime.ranks import Agreed, fail_together, finish, from_all, max_over_ranks, say, stop

# these may differ when a run is resumed; they change where it writes, what it logs, or how fast it is
FREE = {"out", "overwrite", "resume", "save_every", "timeout", "log_every", "eval_every", "local_rank", "micro_batch",
        "checkpointing", "zero_stage", "world_size", "versions", "finished", "inputs_modified"}

class RunState:
    """All that a run needs to go on as if it had not been interrupted, in OUT/checkpoints/step-N: weights.safetensors, the
    trained weights; rank-R.pt, the optimisers and random generators of each rank; run.json, the flags, the sizes of the
    logs and what the loop keeps; manifest.json, size and SHA-256 of each. It is written as step-N.tmp, and gets its
    name when it is whole. The ranks' files may lie on one disk or on a disk per machine."""
    def __init__(self, args, lengths):
        """Makes --out with args.json; or with --resume, all ranks agree on a checkpoint to go on from."""
        self.args, self.out, self.rank, self.world = args, Path(args.out), dist.get_rank(), dist.get_world_size()
        self.first = int(os.environ.get("LOCAL_RANK", 0)) == 0     # of its machine
        self.folder, self.saved, self.engines, self.weights = self.out / "checkpoints", time.monotonic(), {}, {}
        self.step, self.own, self.source, self.same = 0, {}, None, True
        torch.manual_seed(args.seed + self.rank)                   # new weights are made; dropout differs between ranks
        versions = {name: sys.modules[name].__version__ for name in ("torch", "deepspeed")}
        self.flags = {**vars(args), "script": Path(sys.argv[0]).stem, "world_size": self.world, "versions": versions,
                      "rows": len(lengths), "tokens": sum(lengths), "inputs_modified": modified(args)}
        self.flags = json.loads(json.dumps(self.flags))            # as they will be read
        if args.resume:
            self.find()
        with fail_together(), writing(self.out, flag="--out "):
            if self.rank == 0 and not self.step:
                self.out.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / "args.json", json.dumps(self.flags, indent=2) + "\n")
                for name in WRITTEN[1:]:     # an adapter_config.json left behind would win over the new full model
                    (self.out / name).unlink(missing_ok=True)
            if self.first and not self.step:
                for part in PARTS:
                    shutil.rmtree(self.out / part, ignore_errors=True)

    def find(self):
        """Chooses the newest step whose files every rank finds whole, and reads its run.json."""
        with fail_together():
            there = self.rank == 0 and (self.out / "args.json").exists()
            kept = read_json(self.out / "args.json") if there else {}
            self.refuse_others(kept)
            mine = {step: mark for step in self.steps() if (mark := self.verify(step))}
        complete, some, marks = zip(*from_all((kept.get("finished", False), bool(self.steps()), mine)))
        if complete[0]:
            say(f"{self.out}: this run is complete, there is nothing to resume")
            finish()
            raise SystemExit(0)
        # the same manifest everywhere: on a disk of its own, another run's may have been left
        common = [step for step, mark in marks[0].items() if all(other.get(step) == mark for other in marks)]
        alone = not common                   # no checkpoint is whole on all ranks: rank 0's weights are enough
        common = common or list(marks[0])
        if any(some) and not common:
            raise Agreed(f"--resume {self.out}: none of its checkpoints is whole (see the warnings); to start at the "
                         f"beginning, move {self.folder} away")
        if not common:
            say(f"{self.out}: no checkpoint to resume from, so the run starts at its beginning")
            return
        self.step = max(common)
        self.source = self.folder / f"step-{self.step}"
        with fail_together():
            run = read_json(self.source / "run.json") if self.rank == 0 else {}
            self.refuse_others(run.get("flags", {}))
        run = from_all(run)[0]
        self.own, changed = run["own"], self.refuse_others(run["flags"])
        self.same = not alone and not {"world_size", "zero_stage"} & changed.keys()
        named = [text for k, text in changed.items() if k not in ("out", "overwrite", "resume")]
        say(f"resuming {self.out} after step {self.step}" + (f"; changed: {', '.join(named)}" if named else "")
            + ("" if self.same else "; so the weights are kept, and the optimisers' moments start anew"))
        with fail_together(), writing(self.out):  # lines that came after the checkpoint are written again
            for name, size in run["sizes"].items() if self.rank == 0 else ():
                os.truncate(self.out / name, min(size, (self.out / name).stat().st_size))

    def refuse_others(self, then):
        """{flag: what it was and is}, of those that have changed since; BadInput where one makes it another run."""
        changed = {k: f"{k} {then.get(k)!r} -> {self.flags.get(k)!r}" for k in sorted({*then, *self.flags})
                   if then and then.get(k) != self.flags.get(k)}
        if other := [text for k, text in changed.items() if k not in FREE]:
            raise BadInput(f"--resume {self.out}: {other[0]} would make it another run; choose another --out")
        return changed

    def steps(self):
        """The steps that have a folder here, newest first."""
        names = [path.name[5:] for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def verify(self, step):
        """The manifest's own digest where the files that this rank reads of a checkpoint are as it says, else None."""
        folder = self.folder / f"step-{step}"
        try:
            manifest = read_json(folder / "manifest.json")
            needed = {"weights.safetensors", "run.json"} if self.rank == 0 else set()
            for name in needed | ({f"rank-{self.rank}.pt"} & manifest.keys()):
                if manifest.get(name) != fingerprint(folder / name):
                    raise BadInput(f"{folder / name}: is not as the manifest says")
            return fingerprint(folder / "manifest.json")[1]
        except (BadInput, OSError) as error:
            print(f"warning: a checkpoint is damaged, an older one is looked for: {error}", file=sys.stderr, flush=True)

    def track_weights(self, weights):
        """{name: tensor} will be in every checkpoint; on --resume rank 0 reads them, and all get them."""
        self.weights |= weights
        if not self.step:
            return
        file = safe_open(self.source / "weights.safetensors", "pt") if self.rank == 0 else None
        for name, weight in weights.items():
            if file:
                weight.data.copy_(file.get_tensor(name))
            dist.broadcast(weight.data, 0)

    def track_engines(self, **engines):
        """The engines will be in every checkpoint; on --resume they get their moments and places in the schedule."""
        self.engines = engines
        stop["wait"] = True                  # training begins: from now on a signal lets the step end
        if self.args.zero_stage < 3 and not torch.cuda.is_available():       # ZeRO-3 is for those who are short of memory
            keep_memory()                    # what loading took has gone back
        if not self.step:
            return
        for name, engine in engines.items():
            engine.lr_scheduler.load_state_dict(self.own["schedules"][name])
            engine.skipped_steps = self.own["skipped"][name]
            for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr()):
                group["lr"] = lr
        if self.same:
            mine = torch.load(self.source / f"rank-{self.rank}.pt", map_location="cpu", weights_only=False)
            for name, engine in engines.items():
                if self.args.zero_stage:     # DeepSpeed picks this rank's from a list of all ranks'
                    engine.optimizer.load_state_dict([mine[name]] * self.world, load_from_fp32_weights=True)
                else:
                    engine.optimizer.load_state_dict(mine[name])
            torch.set_rng_state(mine["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["cuda"])

    def after(self, step, rows, log, **own):
        """After each step but the last, on all ranks alike: stops a run that has gone bad or was told to stop, and
        saves now and then. rows are the numbers of the rows of the step, own is what the loop keeps."""
        for name, engine in self.engines.items():                  # fp16 skips some on purpose, to find its scale
            if engine.bad >= 5 and not (engine.fp16_enabled() and engine.optimizer.loss_scale > 1):
                last = next((f"step-{s}" for s in self.steps()), "there is none")
                raise Agreed(f"step {step}: the last {engine.bad} gradients of the {name} were not finite, and the rate may be "
                             f"too high; rows of the data in this step: {rows}; last checkpoint: {last}")
        if step % 50 == 0:                   # or what lies free between blocks in use would grow with the steps
            tell_allocator("malloc_trim", 0)
        every = self.args.save_every
        due = step % every == 0 if every else time.monotonic() - self.saved > 15 * 60
        number, due = max_over_ranks(stop["signal"], due and self.rank == 0)
        if due or number:
            self.save(step, own)
            log.leave_out()
        if number:
            say(f"stopped by {signal.Signals(int(number)).name} after step {step}; --resume goes on from there")
            log.close()
            finish()
            raise SystemExit(128 + int(number))

    def save(self, step, own):
        """Writes a checkpoint: each rank its part, then rank 0 the manifest and the name, and where the disk is not rank
        0's, the first rank of that machine."""
        part = self.folder / f"step-{step}.tmp"
        own |= {"schedules": {name: engine.lr_scheduler.state_dict() for name, engine in self.engines.items()},
                "skipped": {name: engine.skipped_steps for name, engine in self.engines.items()}}
        with fail_together(), writing(part):
            if self.rank == 0 and not self.out.exists():
                raise BadInput(f"{self.out}: the folder has vanished")
            for old in self.folder.glob("*.tmp") if self.first else ():            # an interrupted save's
                shutil.rmtree(old, ignore_errors=True)
        # of each weight itself, its copy in float32 and two moments
        needed = sum(w.nbytes + 12 * getattr(w, "ds_numel", w.numel()) for w in self.weights.values())
        with gathered(self.weights.values()), fail_together(), writing(part, needed):
            part.mkdir(parents=True, exist_ok=True)
            mine = {name: engine.optimizer.state_dict() for name, engine in self.engines.items()}
            mine["random"] = torch.get_rng_state()
            if torch.cuda.is_available():
                mine["cuda"] = torch.cuda.get_rng_state()
            torch.save(mine, part / f"rank-{self.rank}.pt")
            if self.rank == 0:
                save_file({n: w.detach().cpu().contiguous() for n, w in self.weights.items()}, part / "weights.safetensors")
                sizes = {name: (self.out / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")
                         if (self.out / name).exists()}
                (part / "run.json").write_text(json.dumps({"step": step, "flags": self.flags, "sizes": sizes, "own": own}))
            names = [f"rank-{self.rank}.pt"] + ["weights.safetensors", "run.json"] * (self.rank == 0)
            prints = {name: fingerprint(part / name, sync=True) for name in names}
        manifest = {name: mark for some in from_all(prints) for name, mark in some.items()}
        for turn in (self.rank == 0, self.rank > 0 and self.first):        # then where another machine has another disk
            with fail_together(), writing(part):
                if turn and part.exists():
                    self.publish(part, manifest)
        self.saved = time.monotonic()

    def publish(self, part, manifest):
        """The last act of a checkpoint, after which it counts; of those before, one is kept."""
        with suppress(BadInput):             # one disk: rank 0 did it, though a cache may still show the old name
            if read_json(part.with_suffix("") / "manifest.json") == manifest:
                return
        write_whole(part / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(part.with_suffix(""), ignore_errors=True)    # there, damaged, where the run was resumed before it
        part.rename(part.with_suffix(""))
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)                 # the name is on the disk too
        os.close(descriptor)
        now = int(part.stem[5:])             # a newer step is a damaged one, or another rank does not have it
        for old in [s for s in self.steps() if s > now] + [s for s in self.steps() if s <= now][2:]:
            shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def finish(self, log):
        """After the model is saved: marks the run as complete, and leaves."""
        if self.rank == 0:
            with writing(self.out):
                write_whole(self.out / "args.json", json.dumps({**self.flags, "finished": True}, indent=2) + "\n")
        log.close()
        finish()

def modified(args):
    """When the newest of the files that a run reads was modified, in whole seconds."""
    files = [*args.data, *(args.eval_data or []), *(getattr(args, "ptx_data", None) or [])]
    for name in ("model", "actor", "reward"):
        if folder := getattr(args, name, None):
            files += [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    return max(int(Path(file).stat().st_mtime) for file in files)
