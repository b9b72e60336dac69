"""Generation beside transformers: 64 prompt and 128 new tokens at temperature 1, none of which ends early.

Both libraries have the same weights in the same process. transformers is measured twice: as it generates by
default, and tuned, with a static cache and its forward pass compiled, which is its fastest setting (on a
CPU that needs a C++ compiler). "At the roofline" is the speed of a machine that, for each token, only reads
the weights and the cache once or only multiplies, whichever takes longer. docs/speed.md has the results.

    python bench/generate.py                  # 15M at B = 1, 16, 64 and 110M at B = 1, 16
    python bench/generate.py --sizes 15M --batches 16 --dtype bf16 --no-tuned
"""
import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from common import SIZES, VOCABULARY, flops, matrix_rate, race, read_rate, table, write_models

from lora import load_model
from runtime.flags import DTYPES

P, NEW = 64, 128


def get_args():
    parser = argparse.ArgumentParser(description="Times generate beside transformers.")
    parser.add_argument("--sizes", nargs="+", default=["15M", "110M"], choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, help="1, 16 and, up to 15M, 64 by default")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--no-tuned", action="store_true", help="leave out transformers' compiled setting")
    return parser.parse_args()


def measure(base, B, new, device, dtype, tuned):
    """New tokens per second of ours, of transformers by default, and of transformers tuned."""
    ours = load_model(base, dtype, device)
    ids = torch.randint(3, 31_990, (B, P), device=device)
    mask = torch.ones_like(ids)

    def run_ours():
        return ours.generate(ids, mask.bool(), new, temperature=1.0)[1].sum()

    def peer(**more):
        model = transformers.AutoModelForCausalLM.from_pretrained(base).to(device, dtype)
        model.generation_config.eos_token_id = None      # or min_new_tokens slows it by 10 %
        if more:
            model.forward = torch.compile(model.forward)

        def run():
            # top_k 0: transformers' default of 50 would be another distribution
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0,
                                 top_k=0, top_p=1.0, use_cache=True, min_new_tokens=new, max_new_tokens=new,
                                 pad_token_id=0, **more)
            return out[:, P:].numel()
        return run

    racers = [run_ours, peer()] + [peer(cache_implementation="static")] * tuned
    return [B * new / seconds for seconds in race(*racers)]


def roofline(size: str, B: int, new: int, device: str | torch.device,
             dtype: torch.dtype) -> tuple[float, float]:
    """Seconds that the machine needs at least: for the prompts, and for each step after them."""
    C, inner, layers, _ = SIZES[size]
    weights = layers * (4 * C * C + 3 * C * inner) + C * VOCABULARY
    length = P + new // 2                                # of a text, on average
    n_bytes = (weights + B * length * layers * 2 * C) * dtype.itemsize
    # products in bfloat16 may be slower than in float32
    rate = max(matrix_rate(size, kind, device) for kind in {dtype, torch.float32})
    step = max(n_bytes / read_rate(n_bytes, device), flops(size, B, 2 * length, B) / rate)
    return flops(size, B * P, P, B) / rate, step


def main():
    args = get_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, rows = DTYPES[args.dtype], []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder) / size, size)
            for B in args.batches or [1, 16, 64][:2 if size == "110M" else 3]:
                speeds = measure(Path(folder) / size / "base", B, args.new, device, dtype, not args.no_tuned)
                ratios = [f"{speeds[0] / peer:.2f}" for peer in speeds[1:]]
                prompts, step = roofline(size, B, args.new, device, dtype)
                at_roofline = B * args.new / (prompts + (args.new - 1) * step)
                rows.append((f"{size}, B = {B}", *speeds, *ratios, at_roofline))
    peers = [f"transformers {transformers.__version__}"]
    if not args.no_tuned:
        peers.append(f"{peers[0]}, tuned")
    table([f"generate, {P} + {args.new}, {args.dtype}: tokens/s", "ours", *peers,
           *(["ratio"] * len(peers)), "at the roofline"], rows, device)


if __name__ == "__main__":
    main()
