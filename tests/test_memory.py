"""bench/memory.py against the memory that ranks really take."""
import re
import sys

import pytest

from conftest import REPO, run_script, tiny_llama
from runtime.tokenizer_write import copy_tokenizer

sys.path.append(str(REPO / "bench"))
from memory import rank_bytes  # noqa: E402

SIZES = {"small": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
                   "num_attention_heads": 4},
         "large": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12,
                   "num_attention_heads": 8}}
# Prints each rank's peak of memory in training, from the first evaluation, when the model is loaded, to the
# end of saving. The file itself is not written: on a GPU its bytes do not lie in a rank's memory.
MEASURED = """
import sys, threading, time
sys.path.insert(0, {repo!r})
sys.argv[0] = "sft"
import llama, psutil, runtime.checkpoint, runtime.ranks, sft

perplexity, save_whole, peak = sft.perplexity, sft.save_whole, 0
def watch():
    global peak
    while True:
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.005)
def begin(*args):
    sft.perplexity = perplexity
    threading.Thread(target=watch, daemon=True).start()
    return perplexity(*args)
def end(*args):
    save_whole(*args)
    print("peak", peak, flush=True)
sft.perplexity, sft.save_whole = begin, end
llama.Llama.save_pretrained = lambda *_: time.sleep(0.1)
runtime.checkpoint.keep_memory = lambda: None # memory that a CPU run keeps would come on top
runtime.ranks.run(sft.main)
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("ranks, stage", [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_calculator_agrees_with_measured_peaks(ranks, stage, tokenizer_file, pairs_file, tmp_path):
    peaks, weights = {}, {}
    # glibc gives freed memory back at once
    env = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    (tmp_path / "measured.py").write_text(MEASURED.format(repo=str(REPO)))
    for size, config in SIZES.items():
        model = tiny_llama(**config, num_key_value_heads=None, head_dim=None)
        weights[size] = sum(p.numel() for p in model.parameters())
        model.save_pretrained(tmp_path / size)
        copy_tokenizer(tokenizer_file.parent, tmp_path / size)
        del model
        done = run_script(tmp_path / "measured.py", "--model", tmp_path / size, "--data", pairs_file,
                          "--max-len", "48", "--batch", "2", "--micro-batch", "1", "--steps", "2",
                          "--zero-stage", stage, "--split", "none", "--out", tmp_path / f"{size}-run",
                          ranks=ranks, env=env)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        peaks[size] = max(map(int, re.findall(r"peak (\d+)", done.stdout)))
    computed = {size: rank_bytes(n, ranks=ranks, stage=stage, width=4) for size, n in weights.items()}
    # the difference leaves out what the program and its libraries take
    measured, expected = peaks["large"] - peaks["small"], computed["large"] - computed["small"]
    print(f"ranks {ranks} stage {stage}: measured {measured / 1e6:.0f} MB, expected {expected / 1e6:.0f} MB")
    assert 0.9 < measured / expected < 1.1
