"""An SFT step beside DeepSpeed with transformers: real tokens per second, 8 rows of 32 to 256 tokens.

The same DeepSpeed ZeRO-2 engine trains the same weights on both sides, each side in a process of its own.
Ours is what sft.py does: a batch has rows of like length, logits are computed only where there is a label,
AdamW is fused, and the process keeps the memory that it frees. The other side is the usual way: rows as
they come, transformers' own loss with labels of -100 on prompts and padding, torch's AdamW by default. For
LoRA both have lora.py's layers. Both take epochs over the same rows, and their losses must agree. "At the
roofline" is the speed at which the machine would do nothing but the matrix products of these rows.
docs/speed.md has the results.

    python bench/sft_step.py                  # some minutes on two quiet cores
"""
import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from common import add_adapter, flops, matrix_rate, process, synchronize, table, write_models

import sft
from data import batches, collate_sft
from lora import load_model
from runtime.engine import backward_and_step, make_engine
from runtime.ranks import finish, setup
from runtime.speed import keep_memory

ROWS, BATCH, EPOCHS = 32, 8, 3


def get_args():
    parser = argparse.ArgumentParser(description="Times an SFT step beside DeepSpeed with transformers.")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each, in turn")
    parser.add_argument("--child", nargs=4, metavar=("WHO", "BASE", "LORA", "SHARE"),
                        help="what each process is called with")
    return parser.parse_args()


def trained(model, lora):
    """The weights that are trained, with LoRA those of a new adapter."""
    if lora:
        add_adapter(model)
    model.train()
    return [p for p in model.parameters() if p.requires_grad]


# The learning rate of both sides is 0, so that every epoch has the same weights and the same loss.
class Ours:
    """As sft.py trains."""

    def __init__(self, args, base, lora, device, dtype):
        model = load_model(base, dtype, device)
        keep_memory()                        # as Run.track_engines does
        self.engine = make_engine(args, model, trained(model, lora), lr=0.0, updates=100, accumulation=1,
                                  dtype=dtype)

    def batches(self, lengths):
        return batches(lengths, BATCH, seed=0, epoch=0)

    def step(self, rows, device):
        loss = sft.rows_loss(self.engine, rows, sft.n_labels(rows), device)
        backward_and_step(self.engine, loss)
        return float(loss)


class Peer:
    """As DeepSpeed's tutorials train a model of transformers: ZeRO-2 and torch's AdamW."""

    def __init__(self, args, base, lora, device, dtype):
        import deepspeed  # only now: `setup` has told it which accelerator to use

        model = transformers.AutoModelForCausalLM.from_pretrained(base).to(device, dtype)
        optimizer = torch.optim.AdamW(trained(model, lora), lr=0.0)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": BATCH, "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0})[0]

    def batches(self, lengths):
        return [range(at, at + BATCH) for at in range(0, len(lengths), BATCH)]

    def step(self, rows, device):
        ids, mask, labels = (x.to(device) for x in collate_sft(rows))
        loss = self.engine(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss)


def train(who, base, lora, share, n_rows):
    """Prints as JSON the seconds of some epochs after a warm-up epoch, and the mean loss per response
    token. `who` is ours or peer; `share` of each row is response."""
    sys.argv = ["sft.py", "--model", "none", "--data", "none", "--out", "none", "--micro-batch", str(BATCH)]
    args = sft.get_args()
    _, _, device, dtype = setup(args)
    rng = random.Random(0)
    lengths = [rng.randint(32, 256) for _ in range(n_rows)]
    rows = [([rng.randrange(3, 31_990) for _ in range(T)], max(1, T - round(share * T))) for T in lengths]
    side = {"ours": Ours, "peer": Peer}[who](args, base, lora, device, dtype)
    groups, seconds = [[rows[i] for i in group] for group in side.batches(lengths)], []
    for _ in range(1 + EPOCHS):
        start, loss = time.perf_counter(), 0.0
        for group in groups:
            loss += side.step(group, device) * sft.n_labels(group) / sft.n_labels(rows)
        synchronize()
        seconds.append(time.perf_counter() - start)
    shapes = [(len(ids), len(ids) - n_prompt) for ids, n_prompt in rows]
    print(json.dumps({"seconds": seconds[1:], "loss": loss, "shapes": shapes}))
    finish()


def measure(base, size, lora, share, n_rows, rounds):
    """Real tokens per second of ours, of the other side, and at the roofline."""
    found = {"ours": [], "peer": []}
    for _ in range(rounds):
        for who, results in found.items():
            child = ["--child", who, base, lora, share]
            out, _ = process([sys.executable, __file__, "--rows", n_rows, *child], base.parent / f"{who}.log")
            results.append(json.loads(out.splitlines()[-1]))
    losses = [result["loss"] for results in found.values() for result in results]
    assert all(math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses), f"not the same work: {losses}"
    shapes = found["ours"][0]["shapes"]      # [(tokens, of which response)]
    needed = (2 if lora else 3) * sum(flops(size, T, T, n) for T, n in shapes)
    seconds = [statistics.median(s for result in results for s in result["seconds"])
               for results in found.values()]
    return [sum(T for T, _ in shapes) / s for s in (*seconds, needed / matrix_rate(size))]


def main():
    args = get_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.child:
        who, base, lora, share = args.child
        return train(who, Path(base), lora == "True", float(share), args.rows)
    if args.rows % BATCH:
        sys.exit(f"--rows {args.rows} does not divide by {BATCH}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder) / args.size, args.size)
        base = Path(folder) / args.size / "base"
        for lora in (False, True):
            for share in (0.4, 1.0):
                ours, peer, at_roofline = measure(base, args.size, lora, share, args.rows, args.rounds)
                what = f"{'LoRA' if lora else 'full'}, {share:.0%} of the tokens are response"
                rows.append((what, ours, peer, f"{ours / peer:.2f}", at_roofline))
    peer = f"DeepSpeed + transformers {transformers.__version__}"
    table([f"SFT, {args.size}: real tokens/s", "ours", peer, "ratio", "at the roofline"], rows)


if __name__ == "__main__":
    main()
