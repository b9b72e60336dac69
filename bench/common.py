"""What the benchmarks share: models, timing, a process with its peak memory, the machine's limits, a table.

Every benchmark imports this file before it imports the project, because this file puts the project's folder
on Python's path.
"""
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama import Llama, LlamaConfig  # noqa: E402
from lora import add_lora, load_model, save_adapter  # noqa: E402
from reward import RewardModel  # noqa: E402
from runtime.tokenizer_write import copy_tokenizer  # noqa: E402

# C, inner size, layers, heads
SIZES = {"2M": (64, 172, 4, 4), "15M": (288, 768, 6, 6), "110M": (768, 2048, 12, 12)}
VOCABULARY = 32_000
RANK, ALPHA, TARGETS = 8, 16.0, ["q_proj", "k_proj"]
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


# ------------------------------------------------------------------------------------------------ models
def write_models(folder: Path, size: str, ends: float = 0.0):
    """Writes random LLaMAs of 32,000 words with a tied head: folder/base and folder/reward in full, and
    adapters on base, folder/base-lora and folder/reward-lora. After each token an answer ends with
    probability `ends`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    C, inner, layers, heads = SIZES[size]
    model = Llama(LlamaConfig(hidden_size=C, intermediate_size=inner, num_hidden_layers=layers,
                              num_attention_heads=heads, max_position_embeddings=1024,
                              tie_word_embeddings=True))
    if ends:
        raise_eos(model, ends)
    model.save_pretrained(folder / "base")
    reward = RewardModel.from_pretrained(folder / "base")
    reward.save_pretrained(folder / "reward")
    language = load_model(folder / "base")
    for name, model, task in (("base", language, "CAUSAL_LM"), ("reward", reward, "SEQ_CLS")):
        add_adapter(model)
        save_adapter(model, folder / f"{name}-lora", "default", folder / "base", task)
        for kind in ("", "-lora"):
            copy_tokenizer(folder, folder / f"{name}{kind}")


def write_tokenizer(folder):
    """Writes folder/tokenizer.model: 32,000 whole words, with <unk> 0, BOS 1 and EOS 2."""
    words = folder / "words.txt"
    words.write_text("\n".join(f"w{i}" for i in range(31_997)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, model_type="word",
        hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity")


@torch.no_grad()
def raise_eos(model, probability):
    """Changes a model with a tied head so that EOS follows every token with about this probability."""
    # Channel 0 is 1 in every word, and no layer changes it. After the last norm it is nearly the same
    # everywhere, so the head's weight of EOS in this channel shifts the logit of EOS by nearly the same
    # number everywhere.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    weight = model.model.embed_tokens.weight
    weight[:, 0] = 1
    ids = torch.randint(3, 31_000, (4, 64))
    channel = model.model(ids, torch.ones_like(ids))[..., 0].mean()
    weight[2, 0] += math.log(probability / (1 - probability) * len(weight)) / channel


def add_adapter(model: torch.nn.Module):
    """Adds the adapter that all benchmarks with LoRA train."""
    add_lora(model, RANK, ALPHA, TARGETS)


# ------------------------------------------------------------------------------------------------ measuring
def process(words: Sequence, log: Path, **environment: str) -> tuple[str, float]:
    """Runs a command to its end, and returns its standard output and its peak memory in MB. Its standard
    error goes to the file log. Exits where the command fails."""
    with open(log, "w") as errors:
        child = subprocess.Popen([str(word) for word in words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                 stderr=errors, env={**os.environ, **CPU, **environment})
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))}: failed, see {log}\n{Path(log).read_text()[-2000:]}")
    return out, usage.ru_maxrss / 1024


def race(*racers: Callable[[], float], rounds: int = 3) -> list[float]:
    """The median seconds of each function over some rounds, in which the functions take turns, after a
    warm-up. All functions must return the same number; otherwise they do not do the same work."""
    first = [float(run()) for run in racers]
    assert all(math.isclose(x, first[0], rel_tol=1e-4) for x in first), f"not the same work: {first}"
    seconds = [[] for _ in racers]
    for _ in range(rounds):
        for run, times in zip(racers, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def synchronize():
    """Waits until the GPU is done: a program goes on while its GPU still works."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ roofline
def flops(size: str, tokens: int, T: int, n_logits: int) -> int:
    """Floating-point operations of a forward pass over this many tokens, in texts of T tokens, with
    n_logits rows of logits. Of attention the causal half is counted. A backward pass takes twice as many
    operations, or as many as the forward pass where only adapters are trained."""
    C, inner, layers, _ = SIZES[size]
    body = tokens * layers * 2 * (4 * C * C + 3 * C * inner + C * T)
    return body + n_logits * 2 * C * VOCABULARY


def matrix_rate(size: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                rows: int = 1024) -> float:
    """Operations per second of a product of this many rows with a layer's widest matrix, or with the head's
    matrix, whichever is faster."""
    C, inner, *_ = SIZES[size]
    x = torch.randn(rows, C, dtype=dtype, device=device)
    weights = [torch.randn(n, C, dtype=dtype, device=device) for n in (inner, VOCABULARY)]
    return max(2 * rows * w.numel() / race(lambda w=w: F.linear(x, w)[0, 0], rounds=9)[0] for w in weights)


def read_rate(n_bytes: int, device: str | torch.device = "cpu") -> float:
    """Bytes per second at which this many bytes are read and summed. The bytes of a small model may lie in
    the processor's cache, as the model itself would."""
    x = torch.ones(max(1, n_bytes // 4), device=device)
    return x.nbytes / race(x.sum, rounds=9)[0]


# ------------------------------------------------------------------------------------------------ table
def table(header: Sequence[str], rows: Sequence[Sequence], device: str | torch.device = "cpu"):
    """Prints a table in Markdown, and below it the machine that was measured."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(in_words, row))} |")
    gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"\ntorch {torch.__version__}, {name}, {date.today()}", flush=True)


def in_words(cell):
    """The text of a cell: a text as it is, a number in a few digits."""
    return cell if isinstance(cell, str) else f"{cell:,.0f}" if cell >= 100 else f"{cell:.2f}"
