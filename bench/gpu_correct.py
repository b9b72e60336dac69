"""Part a of gpu.py: the GPU computes what the CPU computes.

1. networks   logits and gradients of the GPU beside the CPU's, in float32 and bfloat16, with and without
              grouped queries, padded on both sides
2. decoding   CUDA graphs beside plain steps, as texts grow and rows leave; transformers' greedy text;
              what sampling may never do; a chat
3. trainers   sft.py, reward.py and ppo.py for 20 steps at ZeRO 0 to 3, in float32, bfloat16 and float16,
              beside the CPU's losses; through the launcher; killed, stopped and resumed

On a CPU, where this file is tested, 3 is the same run twice.
"""
import contextlib
import io
import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_tools import (
    MACHINE,
    ROOT,
    Check,
    Finding,
    Place,
    at_most,
    metrics,
    relative_error,
    train,
    worst,
    write_adapter,
)
from torch import Tensor

import llama
import toy
import toy.base
from data import pad
from llama import Llama, LlamaConfig, sample
from reward import RewardModel
from runtime.speed import CapturedStep
from runtime.tokenizer_write import copy_tokenizer

VOCABULARY = 2048
# The largest relative error that rounding explains. A wrong mask, position or column gives 0.1 and more.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.04}
HEADS = {"one KV head for each query": 8, "grouped queries": 2, "one KV head": 1}


# ------------------------------------------------------------------------------------------------ networks
def network(kv_heads: int, place: Place, dtype: torch.dtype, device: torch.device | None = None) -> Llama:
    """A random LLaMA, whose weights are large enough for logits that differ; they are numbers of dtype
    whatever the device."""
    C = 64 if place.small else 512
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=VOCABULARY, hidden_size=C, intermediate_size=2 * C,
                              num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=kv_heads,
                              head_dim=16 if place.small else 128, max_position_embeddings=1024))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(torch.bfloat16).to(device or place.device, dtype)


def padded(B: int, T: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and mask (B,T) of rows of all lengths."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (B, T), generator=rng)
    lengths = torch.linspace(1, T, B).long()[:, None]
    columns = torch.arange(T)
    mask = columns >= T - lengths if left else columns < lengths
    return (ids * mask).to(device), mask.to(device)


def logits_and_gradient(model: Llama, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the real places, and the gradient of the loss of the next tokens, all weights in one
    vector."""
    model.zero_grad()
    logits = model(ids, mask)
    both = mask[:, 1:] & mask[:, :-1]
    F.cross_entropy(logits[:, :-1][both].float(), ids[:, 1:][both]).backward()
    return logits[mask], torch.cat([p.grad.flatten().float() for p in model.parameters()])


def check_networks(place: Place) -> Iterator[Finding]:
    """In bfloat16 the CPU computes in float32 with the same weights, so the error is that of the arithmetic.
    192 columns: with 64 beyond a multiple of 128, cuDNN's attention once had NaN gradients."""
    for heads, kv_heads in HEADS.items():
        exact = network(kv_heads, place, torch.float32, torch.device("cpu"))
        for left, T, side in ((False, 192, "right"), (True, 37, "left, checkpointing")):
            expected = logits_and_gradient(exact, *padded(6, T, left, torch.device("cpu")))
            for dtype, bound in ROUNDING.items():
                model = network(kv_heads, place, dtype)
                model.model.checkpointing = left
                found = logits_and_gradient(model, *padded(6, T, left, place.device))
                error = worst(map(relative_error, found, expected))
                yield at_most(f"logits and gradient, {heads}, padded {side}, {str(dtype)[6:]}", error, bound)


# ------------------------------------------------------------------------------------------------ decoding
def decoded(model: Llama, ids: Tensor, mask: Tensor, uniforms: Tensor, eos_ids: list[int],
            forced: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(logits, ids) of each step of model.decode, of the rows that are still computed. forced: these ids are
    taken instead of sampled ones, so that two runs have the same texts."""
    logits_of_steps, ids_of_steps = [], []

    def recorded(logits, *settings):
        words = sample(logits, *settings) if forced is None else forced[len(ids_of_steps)]
        logits_of_steps.append(logits.clone())                     # the next step of a graph overwrites them
        ids_of_steps.append(words)
        return words

    llama.sample = recorded
    try:
        for _ in model.decode(ids, mask, uniforms.shape[1], eos_id=eos_ids, uniforms=uniforms):
            pass
    finally:
        llama.sample = sample
    return logits_of_steps, ids_of_steps


def check_decoding(place: Place) -> Iterator[Finding]:
    """Decoding with CUDA graphs beside decoding without, at every step. The texts grow through three widths
    of a graph, and their rows end one after the other. P + new is odd."""
    B, P, new, share = (40, 20, 61, 16) if place.small else (64, 201, 420, 64)
    faster_step, capture, captured = llama.faster_step, CapturedStep.capture, []
    CapturedStep.capture = lambda step: captured.append(len(step.ids)) or capture(step)
    uniforms = torch.rand(B, new, generator=torch.Generator().manual_seed(2)).to(place.device)
    uniforms[0] = 0.999_99                   # the last word: this row never ends
    eos_ids = [*range(VOCABULARY // share)]  # one word in `share` ends a row
    for heads, kv_heads in HEADS.items():
        for dtype, bound in ROUNDING.items():
            model, prompts = network(kv_heads, place, dtype), padded(B, P, True, place.device)
            captured.clear()
            fast, words = decoded(model, *prompts, uniforms, eos_ids)
            n_graphs = len(captured)
            llama.faster_step = lambda model, device: model.next_logits
            plain, _ = decoded(model, *prompts, uniforms, eos_ids, words)
            llama.faster_step = faster_step
            what = f"{heads}, {str(dtype)[6:]}"
            rows = [len(logits) for logits in fast]
            error = worst(map(relative_error, fast, plain))
            yield at_most(f"{len(rows)} steps of {rows[0]} to {rows[-1]} rows, graphs beside none, {what}",
                          error, bound)
            if place.device.type == "cuda":
                yield Finding(f"graphs captured, {what}", n_graphs, "", "3 or more", n_graphs >= 3)
    CapturedStep.capture = capture


def check_greedy(place: Place) -> Iterator[Finding]:
    """The likeliest words of this code on the GPU, on the CPU, and of transformers on the GPU. Where two
    words are equally likely but for rounding, a row may differ from there on."""
    import transformers
    P, new = 24, 48
    for heads, kv_heads in HEADS.items():
        model, (ids, mask) = network(kv_heads, place, torch.float32), padded(8, P, True, place.device)
        folder = place.folder / f"peer-{kv_heads}"
        model.save_pretrained(folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).to(place.device, torch.float32)
        peer.generation_config.eos_token_id = None
        ours, _ = model.generate(ids, mask, new, temperature=0)
        theirs = peer.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=new,
                               pad_token_id=0)[:, P:]
        on_cpu, _ = model.cpu().generate(ids.cpu(), mask.cpu(), new, temperature=0)
        for who, others in ((f"transformers {transformers.__version__}", theirs), ("the CPU", on_cpu)):
            n = int((ours.cpu() != others.cpu()).sum())
            yield at_most(f"words of {ours.numel()} that are not those of {who}, {heads}", n, new)


def check_sampling(place: Place) -> Iterator[Finding]:
    """A word of probability 0 is never drawn, for one row and for many, which CUDA sums in different ways;
    and the words are those of a sum in float64 but for a few at the edges of an interval."""
    rng = torch.Generator().manual_seed(3)
    V, rounds = (2_000, 20) if place.small else (32_000, 60)
    for B in (1, 64):
        impossible = different = 0
        for _ in range(rounds * (1 if B > 1 else 4)):
            logits = 3 * torch.randn(B, V, generator=rng)
            logits[torch.rand(B, V, generator=rng) < 0.9] = -math.inf
            uniforms = torch.rand(B, generator=rng)
            uniforms[0] = random.choice([0.0, 1 - 2**-24, float(uniforms[0])])     # the ends of [0, 1)
            words = sample(logits.to(place.device), 1.0, 0, 1.0, uniforms.to(place.device)).cpu()
            impossible += int(torch.isinf(logits.gather(1, words[:, None])).sum())
            sums = logits.double().softmax(-1).cumsum(-1)
            target = uniforms.double()[:, None] * sums[:, -1:]
            exact = torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=V - 1)
            different += int((words != exact).sum())
        yield at_most(f"words of probability 0 that were drawn, B = {B}", impossible, 0)
        n = B * rounds * (1 if B > 1 else 4)
        yield at_most(f"words that float64 would not draw, of {n:,}, B = {B}", different / n, 0.01)


def check_chat(place: Place) -> Iterator[Finding]:
    """chat.py answers one question, and with --versus two models answer it."""
    base, said = place.folder / "toy" / "base", io.StringIO()
    words = ["--model", base, "--versus", base, "--prompt", "Which colour is snow?", "--max-tokens", 20,
             "--seed", 1, "--temperature", 0.5]
    with contextlib.redirect_stdout(said):
        train("chat", words)                 # it has a main like the trainers
    text = " ".join(said.getvalue().split())
    yield Finding("characters that two speakers said", len(text), "", "more than 0", bool(text))


# ------------------------------------------------------------------------------------------------ trainers
STEPS = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Training:
    """20 steps of a trainer. kind: full or lora. more: further flags, which change no result but by
    rounding."""
    script: str
    kind: str = "full"
    dtype: str = "fp32"
    stage: int = 2
    more: tuple = ()
    label: str = ""

    @property
    def name(self) -> str:
        label = f"-{self.label}" if self.label else ""
        return f"{self.script}-{self.kind}-{self.dtype}-zero{self.stage}{label}"

    @property
    def reference(self) -> str:
        """The name of the same training on the CPU."""
        return f"cpu-{self.script}-{self.kind}"

    def words(self, folder: Path, out: Path) -> list:
        """The command line: the toy's flags, then others for small files and few steps."""
        data = {"sft": "demonstrations", "reward": "preferences", "ppo": "prompts"}[self.script]
        words = [f"@toy/{self.script}.args", "--data", folder / f"{data}.jsonl",
                 "--eval-data", folder / f"{data}-held-out.jsonl", "--out", out, "--steps", STEPS,
                 "--eval-every", 10, "--log-every", 1, "--dtype", self.dtype, "--zero-stage", self.stage]
        base, lora = folder / "toy" / "base", self.kind == "lora"
        if self.script == "ppo":             # with LoRA, all four roles are on one base
            actor, judge = (folder / "actor-lora", folder / "reward-lora") if lora else (
                base, folder / "reward")
            words += ["--actor", actor, "--reward", judge, "--micro-batch", 16, "--eval-prompts", 32]
        else:
            words += ["--model", base, "--micro-batch", 8]
            words += ["--lora-rank", 8, "--lora-targets", "all-linear", "--checkpointing"] * lora
        return [*words, *self.more]


class Answers:
    """The answers of the CPU's ppo.py, for the GPU's. A word whose random number lies at the edge of its
    interval becomes another word by rounding; all that follows would differ, and nothing could be compared.
    So the GPU's run samples its own answers, counts those that differ, and goes on with the CPU's."""

    def __init__(self, file: Path, replay: bool):
        self.file, self.replay = file, replay
        self.known = json.loads(file.read_text()) if replay else {}
        self.n = self.n_different = 0
        self.generate = Llama.generate
        Llama.generate = lambda model, *inputs, **named: self.of_rows(
            *self.generate(model, *inputs, **named), named["uniforms"])

    def of_rows(self, response: Tensor, mask: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and the mask (B,R) that ppo.py gets. A row is known by its random numbers. Those of the
        held-out answers are the same each time, so these answers are left as they are."""
        rows = [row[real].tolist() for row, real in zip(response, mask, strict=True)]
        keys = [str(hash(tuple(numbers))) for numbers in uniforms.tolist()]
        if not self.replay:
            self.known |= {key: None if key in self.known else row
                           for key, row in zip(keys, rows, strict=True)}
            return response, mask
        expected = [self.known[key] for key in keys]
        if None in expected:
            return response, mask
        self.n += len(rows)
        self.n_different += sum(row != other for row, other in zip(rows, expected, strict=True))
        return tuple(x.to(response.device) for x in pad(expected))

    def close(self):
        Llama.generate = self.generate
        if not self.replay:
            self.file.write_text(json.dumps(self.known))


# What is compared, and how far it may be from the CPU's at any step in float32: as a share of the CPU's
# figure, and beyond that in units of the figure. Rounding alone, by other micro-batches on a CPU, gives a
# hundredth of it; bfloat16 on a CPU gives up to 15 times as much.
BOUNDS = {"loss": (0.002, 0.0), "eval_ppl": (0.005, 0.0), "margin": (0.01, 0.01), "accuracy": (0.0, 0.01),
          "grad_norm": (0.05, 0.05), "score": (0.005, 0.005), "kl": (0.02, 0.01), "length": (0.0, 0.001),
          "policy_loss": (0.02, 0.001), "value_loss": (0.02, 0.001), "entropy": (0.005, 0.0),
          "first_ratio": (0.001, 0.0)}
LOOSER = {"fp32": 1, "bf16": 30, "fp16": 100}            # float16 may skip its first updates
SAMPLED = 0.25       # of the answers: with the weights of the CPU but for rounding, about 0.03 differ


def distances(lines: list[dict], reference: list[dict]) -> dict[str, float]:
    """{metric: how far a run is from the reference at its worst step, in units of its bound}. NaN and a
    missing line are infinitely far."""
    found = {key: {line["step"]: line[key] for line in lines if key in line} for key in BOUNDS}
    distance = dict.fromkeys(BOUNDS, 0.0)
    for line in reference:
        for key, (share, more) in BOUNDS.items():
            if key in line:
                x, expected = found[key].get(line["step"]), line[key]
                bound = share * abs(expected) + more
                distance[key] = max(distance[key], math.inf if x is None else abs(x - expected) / bound)
    known = {key for line in reference for key in line}
    return {key: ratio for key, ratio in distance.items() if key in known}


def compare(lines: list[dict], folder: Path, training: Training) -> Finding:
    """A run's metrics beside the CPU's: the one that is farthest away."""
    distance = distances(lines, metrics(folder / training.reference))
    if training.stage == 0 and training.dtype == "fp32":
        distance.pop("grad_norm")            # DeepSpeed knows none there
    farthest = max(distance, key=distance.get)
    finding = at_most(f"{len(distance)} metrics beside the CPU's, farthest: {farthest}", distance[farthest],
                      LOOSER[training.dtype], "of its bound")
    finding.details = distance
    return finding


def check_reference(training: Training, place: Place) -> Iterator[Finding]:
    """The training on the CPU, in a process that sees no GPU. It must train."""
    out = place.folder / training.reference
    answers = Answers(place.folder / f"{training.reference}.answers.json", replay=False)
    train(training.script, training.words(place.folder, out))
    answers.close()
    lines = [line for line in metrics(out) if "tokens_per_s" in line]
    yield Finding("steps on the CPU", len(lines), "", f"{STEPS}", len(lines) == STEPS)
    key = {"sft": "loss", "reward": "loss", "ppo": "score"}[training.script]
    yield Finding(f"{key} of the first and the last step", f"{lines[0][key]:.4f}, {lines[-1][key]:.4f}")


def check_training(training: Training, place: Place) -> Iterator[Finding]:
    if training.dtype == "fp16" and place.device.type == "cpu":
        yield Finding("float16", "needs a GPU")
        return
    out = place.folder / training.name
    answers = Answers(place.folder / f"{training.reference}.answers.json", replay=True)
    train(training.script, training.words(place.folder, out))
    answers.close()
    yield compare(metrics(out), place.folder, training)
    if answers.n:
        bound = SAMPLED if training.dtype == "fp32" else 1.0
        yield at_most(f"share of {answers.n:,} sampled answers that are not the CPU's",
                      answers.n_different / answers.n, bound)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(*words: object, done: int = 0):
    """Runs a Python program to its end, which must have this exit status."""
    found = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode
    if found != done:
        raise RuntimeError(f"{words[0]} ended with status {found}, not {done}")


def check_launcher(training: Training, place: Place) -> Iterator[Finding]:
    """The same through DeepSpeed's launcher, which need not be on the PATH."""
    out = place.folder / training.name
    launcher = "from deepspeed.launcher.runner import main; main()"
    command("-c", launcher, "--num_gpus", 1, "--master_port", free_port(), f"{training.script}.py",
            *training.words(place.folder, out))
    yield compare(metrics(out), place.folder, training)


# Runs a trainer that ends itself in the middle: by SIGKILL after a checkpoint, as a power cut would, or by
# SIGTERM within a step, as a cluster's scheduler would.
ENDED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import {script}, gpu_correct, runtime.checkpoint, runtime.log, runtime.ranks
gpu_correct.Answers(Path({answers!r}), replay=True)
Run, Log = runtime.checkpoint.Run, runtime.log.Log
owner, name, number = (Run, "save", signal.SIGKILL) if {killed} else (Log, "step", signal.SIGTERM)
function = getattr(owner, name)
def ending(self, *arguments, **named):
    function(self, *arguments, **named)
    if {killed} or self.n == 10:
        os.kill(os.getpid(), number)
setattr(owner, name, ending)
sys.argv = {words!r}
runtime.ranks.run({script}.main)
"""


def check_resumed(training: Training, place: Place, killed: bool) -> Iterator[Finding]:
    """A run that is ended in the middle and resumed has the losses of one that was not."""
    out, answers = place.folder / training.name, place.folder / f"{training.reference}.answers.json"
    words = [*training.words(place.folder, out), "--save-every", 8 if killed else 1000]
    program = ENDED.format(paths=[str(ROOT), str(ROOT / "bench")], script=training.script, killed=killed,
                           answers=str(answers), words=[f"{training.script}.py", *map(str, words)])
    command("-c", program, done=-signal.SIGKILL if killed else 128 + signal.SIGTERM)
    there = sorted(folder.name for folder in (out / "checkpoints").glob("step-*"))
    expected = "step-8" if killed else "step-10"
    yield Finding("checkpoint after the end", ", ".join(there), "", expected, there == [expected])
    Answers(answers, replay=True)
    train(training.script, [*words, "--resume"])
    yield compare(metrics(out), place.folder, training)


# ------------------------------------------------------------------------------------------------ the checks
def check_prepare(place: Place) -> Iterator[Finding]:
    """Makes the toy's world with a base model that has read little, a reward model, adapters, and small
    files."""
    toy.base.STEPS = 100
    toy.make(made=place.folder / "toy")
    base = place.folder / "toy" / "base"
    for file in (place.folder / "toy").glob("*.jsonl"):
        n = 96 if "held-out" in file.name else 700
        (place.folder / file.name).write_text("".join(file.read_text().splitlines(True)[:n]))
    torch.manual_seed(0)
    judge = RewardModel.from_pretrained(base)
    judge.save_pretrained(place.folder / "reward")
    copy_tokenizer(base, place.folder / "reward")
    write_adapter(place.folder / "actor-lora", base, "CAUSAL_LM", 8, ["q_proj", "k_proj", "v_proj"])
    write_adapter(place.folder / "reward-lora", base, "SEQ_CLS", 8, ["all-linear"])
    for name in ("reward", "reward-lora"):
        (place.folder / name / "reward_stats.json").write_text(json.dumps({"mean": 0.0, "std": 1.0}))
    yield Finding("data and models made in", shutil.disk_usage(place.folder).free / 1e9, "GB free")


FULL = ("sft", "reward", "ppo")
TRAININGS = [*[Training(script, stage=stage) for script in FULL for stage in range(4)],
             *[Training(script, dtype="bf16", stage=stage) for script in FULL for stage in (2, 3)],
             Training("sft", "lora", "bf16"), Training("sft", dtype="bf16", stage=0),
             Training("sft", dtype="fp16"), Training("sft", more=("--offload",), label="offload"),
             Training("ppo", "lora"), Training("ppo", "lora", stage=3), Training("ppo", "lora", "bf16"),
             Training("ppo", more=("--gen-batch", 7, "--ema"), label="pieces")]


def check_of(training: Training, check: Callable = check_training, **settings) -> Check:
    needs = ("prepare", training.reference)
    return Check(training.name, partial(check, training, **settings), 75, needs=needs)


PREPARE = Check("prepare", check_prepare, cpu=True)
REFERENCES = [Check(training.reference, partial(check_reference, training), 80, cpu=True)
              for training in (Training("ppo"), Training("ppo", "lora"), Training("sft"),
                               Training("sft", "lora"), Training("reward"))]
IN_ONE_PROCESS = [Check("networks", check_networks, needs=()), Check("decoding", check_decoding, needs=()),
                  Check("greedy", check_greedy, needs=()), Check("sampling", check_sampling, needs=()),
                  Check("chat", check_chat)]
ENDED_OR_LAUNCHED = [check_of(Training("sft", label="killed"), check_resumed, killed=True),
                     check_of(Training("ppo", label="stopped"), check_resumed, killed=False),
                     check_of(Training("sft", label="launcher"), check_launcher)]
GROUPS = [[MACHINE, PREPARE], [*REFERENCES, *IN_ONE_PROCESS],
          [*ENDED_OR_LAUNCHED, *[check_of(training) for training in TRAININGS]]]
