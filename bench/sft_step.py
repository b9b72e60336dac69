"""An SFT step beside DeepSpeed with transformers: batches of 8 rows of 32 to 256 tokens, in real tokens per second.

Both are trained by the same DeepSpeed ZeRO-2 engine with the same weights, each in a process of its own. Ours is what
sft.py does: rows of like length in a batch, logits where there is a label, fused AdamW, memory that is kept. The peer is
what is usual: rows as they come, transformers' own loss with labels of -100 on prompts and padding, torch's AdamW by
default. For LoRA both have lora.py's layers. Measured are epochs of the same rows, whose losses must agree. "At
most" is the speed at which the machine would do nothing but the products of those rows.

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

from common import (ALPHA, RANK, TARGETS, add_lora, flops, load_model, matrix_rate, process, synchronize, table,
                    write_models)
import sft
from data import batches, collate_sft
from runtime.engine import keep_memory, make_engine
from runtime.ranks import finish, setup

ROWS, BATCH, EPOCHS = 32, 8, 3


def get_args():
    parser = argparse.ArgumentParser(description="Times an SFT step beside DeepSpeed with transformers.")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each, in turn")
    parser.add_argument("--child", nargs=4, metavar=("WHO", "BASE", "LORA", "SHARE"), help="what each process is called with")
    return parser.parse_args()


def our_engine(model, base, lora, dtype):
    """As sft.py makes it; the rate is 0, so that every round has the same weights."""
    sys.argv = ["sft.py", "--model", str(base), "--data", "none", "--out", "none", "--batch", str(BATCH)]
    args = sft.get_args()
    keep_memory()                        # as RunState.track_engines does
    return make_engine(args, model, trained(model, lora), 0.0, 100, BATCH, 1, dtype)


def peer_engine(model, lora, dtype):
    """As DeepSpeed's tutorials make it: ZeRO-2 and torch's AdamW."""
    import deepspeed                         # after setup has told it where it is
    config = {"train_micro_batch_size_per_gpu": BATCH, "bf16": {"enabled": dtype == torch.bfloat16},
              "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained(model, lora), lr=0.0), config=config)[0]


def trained(model, lora):
    if lora:
        add_lora(model, RANK, ALPHA, TARGETS)
    model.train()
    return [p for p in model.parameters() if p.requires_grad]


def train(who, base, lora, share, n_rows):
    """Prints as JSON the seconds of some epochs, after one that warms up, and the mean loss per response token; of ours
    or of the peer, where this share of each row is response."""
    sys.argv = ["sft.py", "--model", "none", "--data", "none", "--out", "none"]
    _, _, device, dtype = setup(sft.get_args())
    rng = random.Random(0)
    lengths = [rng.randint(32, 256) for _ in range(n_rows)]
    rows = [([rng.randrange(3, 31_990) for _ in range(T)], max(1, T - round(share * T))) for T in lengths]
    if who == "ours":
        engine, groups = our_engine(load_model(base, dtype, device), base, lora, dtype), list(batches(lengths, BATCH, 0, 0))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base).to(device, dtype)
        engine, groups = peer_engine(model, lora, dtype), [range(at, at + BATCH) for at in range(0, n_rows, BATCH)]

    def loss_of(ids, mask, labels):
        if who == "ours":
            return sft.sft_loss(*sft.response_logits(engine, ids, mask, labels), int((labels != -100).sum()))
        return engine(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss

    seconds = []
    for _ in range(1 + EPOCHS):
        start, loss = time.perf_counter(), 0.0
        for group in groups:
            some = [rows[i] for i in group]
            batch_loss = loss_of(*(x.to(device) for x in collate_sft(some)))
            engine.backward(batch_loss)
            engine.step()
            loss += float(batch_loss) * sft.n_labels(some) / sft.n_labels(rows)
        synchronize()
        seconds.append(time.perf_counter() - start)
    shapes = [(len(ids), len(ids) - n_prompt) for ids, n_prompt in rows]
    print(json.dumps({"seconds": seconds[1:], "loss": loss, "shapes": shapes}))
    finish()


def measure(base, size, lora, share, n_rows, rounds):
    """Real tokens per second of ours, of the peer, and of a machine that did nothing but the products that are needed."""
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
    seconds = [statistics.median(s for result in results for s in result["seconds"]) for results in found.values()]
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
        for lora in (False, True):
            for share in (0.4, 1.0):
                base = Path(folder) / args.size / "base"
                ours, peer, floor = measure(base, args.size, lora, share, args.rows, args.rounds)
                rows.append((f"{'LoRA' if lora else 'full'}, {share:.0%} of the tokens are response", ours, peer,
                             f"{ours / peer:.2f}", floor))
    peer = f"DeepSpeed + transformers {transformers.__version__}"
    table([f"SFT, {args.size}: real tokens/s", "ours", peer, "ratio", "at most"], rows)


if __name__ == "__main__":
    main()
