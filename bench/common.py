"""What the benchmarks share: models, a fair race, a process with its peak memory, what the machine allows, a table."""
import math
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from llama import Llama, LlamaConfig
from lora import add_lora, load_model, save_adapter
from reward import RewardModel
from runtime.folders import copy_tokenizer

SIZES = {"2M": (64, 172, 4, 4), "15M": (288, 768, 6, 6), "110M": (768, 2048, 12, 12)}  # width, inner, layers, heads
VOCABULARY = 32_000
RANK, ALPHA, TARGETS = 8, 16.0, ["q_proj", "k_proj"]
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def write_models(folder, size, ends=0.0):
    """Random LLaMAs of 32,000 words and a tied head: folder/base and folder/reward in full, and as adapters on base
    folder/base-lora and folder/reward-lora. An answer ends after each token with probability `ends`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    words = folder / "words.txt"
    words.write_text("\n".join(f"w{i}" for i in range(31_997)))
    sentencepiece.SentencePieceTrainer.train(input=str(words), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY,
                                             model_type="word", hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2,
                                             pad_id=-1, normalization_rule_name="identity", minloglevel=2)
    C, inner, layers, heads = SIZES[size]
    model = Llama(LlamaConfig(hidden_size=C, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                              max_position_embeddings=1024, tie_word_embeddings=True))
    if ends:
        # channel 0 is 1 in every word and before the last norm; after it, much the same everywhere
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
            weight = model.model.embed_tokens.weight
            weight[:, 0] = 1
            ids = torch.randint(3, 31_000, (4, 64))
            weight[2, 0] += math.log(ends / (1 - ends) * len(weight)) / model.model(ids, torch.ones_like(ids))[..., 0].mean()
    model.save_pretrained(folder / "base")
    reward = RewardModel.from_pretrained(folder / "base")
    reward.save_pretrained(folder / "reward")
    for name, model, task in (("base", load_model(folder / "base"), "CAUSAL_LM"), ("reward", reward, "SEQ_CLS")):
        add_lora(model, RANK, ALPHA, TARGETS)
        save_adapter(model, folder / f"{name}-lora", "default", folder / "base", task)
        for kind in ("", "-lora"):
            copy_tokenizer(folder, folder / f"{name}{kind}")


def process(words, log, **environment):
    """Runs a command to its end; (its standard output, its peak memory in MB). What it says on standard error goes
    to the file log."""
    with open(log, "w") as errors:
        child = subprocess.Popen([str(word) for word in words], cwd=ROOT, env={**os.environ, **CPU, **environment},
                                 stdout=subprocess.PIPE, stderr=errors, text=True)
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))}: failed, see {log}\n{Path(log).read_text()[-2000:]}")
    return out, usage.ru_maxrss / 1024


def race(*racers, rounds=3):
    """Median seconds of some runs of each function, in turn, after a warm-up. All must return the same number, or
    they do not do the same work."""
    first = [float(run()) for run in racers]
    assert all(math.isclose(x, first[0], rel_tol=1e-4) for x in first), f"not the same work: {first}"
    seconds = [[] for _ in racers]
    for _ in range(rounds):
        for run, times in zip(racers, seconds):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def flops(size, tokens, T, n_logits):
    """Floating-point operations of a forward pass over so many tokens, in texts of T, of which the causal half is
    attended to, and logits. A backward pass takes twice as many, or as many where only adapters are trained."""
    C, inner, layers, _ = SIZES[size]
    return tokens * layers * 2 * (4 * C * C + 3 * C * inner + C * T) + n_logits * 2 * C * VOCABULARY


def matrix_rate(size, dtype=torch.float32, device="cpu", rows=1024):
    """Operations a second of products of so many rows with a layer's widest matrix or with the head, the faster."""
    C, inner, *_ = SIZES[size]
    x = torch.randn(rows, C, dtype=dtype, device=device)
    weights = [torch.randn(n, C, dtype=dtype, device=device) for n in (inner, VOCABULARY)]
    return max(2 * rows * w.numel() / race(lambda: F.linear(x, w)[0, 0], rounds=9)[0] for w in weights)


def read_rate(n_bytes, device="cpu"):
    """Bytes a second at which so many are read and summed; of a small model they may lie in the processor's cache."""
    x = torch.ones(max(1, n_bytes // 4), device=device)
    return x.nbytes / race(x.sum, rounds=9)[0]


def synchronize():
    """A GPU works behind the program's back: waits until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(header, rows, device="cpu"):
    """Prints a table in Markdown and, below it, with what it was measured."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print("| " + " | ".join(x if isinstance(x, str) else f"{x:,.0f}" if x >= 100 else f"{x:.2f}" for x in row) + " |")
    name = torch.cuda.get_device_name() if str(device) == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\ntorch {torch.__version__}, {name}, {date.today()}", flush=True)
