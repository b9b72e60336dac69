"""An SFT step beside DeepSpeed with transformers: batches of 8 rows of 32 to 256 tokens, in real tokens per second.

Both are trained by the same DeepSpeed ZeRO-2 engine in the same process, with the same weights. Ours is what sft.py
does: rows of like length in a batch, logits where there is a label, fused AdamW. The peer is what is usual: rows as
they come, transformers' own loss with labels of -100 on prompts and padding, torch's AdamW by default. For LoRA
both have lora.py's layers. Each race is over one epoch of the same 64 rows, whose losses must agree.

    python bench/sft_step.py                  # some minutes on two quiet cores
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from common import ALPHA, RANK, TARGETS, add_lora, load_model, race, table, write_models
import sft
from data import batches, collate_sft

ROWS, BATCH = 64, 8


def get_args():
    parser = argparse.ArgumentParser(description="Times an SFT step beside DeepSpeed with transformers.")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--rows", type=int, default=ROWS)
    return parser.parse_args()


def our_engine(model, base, lora, dtype):
    """As sft.py makes it; the rate is 0, so that every round has the same weights."""
    sys.argv = ["sft.py", "--model", str(base), "--data", "none", "--out", "none", "--batch", str(BATCH)]
    args = sft.get_args()
    return sft.make_engine(args, model, trained(model, lora), 0.0, 100, BATCH, 1, dtype)


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


def measure(base, lora, share, n_rows, device, dtype):
    """Real tokens per second of ours and of the peer, where this share of each row is response."""
    rng = random.Random(0)
    lengths = [rng.randint(32, 256) for _ in range(n_rows)]
    rows = [([rng.randrange(3, 31_990) for _ in range(T)], max(1, T - round(share * T))) for T in lengths]
    ours = our_engine(load_model(base, dtype, device), base, lora, dtype)
    peer = peer_engine(transformers.AutoModelForCausalLM.from_pretrained(base).to(device, dtype), lora, dtype)

    def epoch(engine, groups, loss_of):
        """The mean loss per response token of all the rows."""
        total = 0.0
        for group in groups:
            some = [rows[i] for i in group]
            loss = loss_of(engine, *(x.to(device) for x in collate_sft(some)), some)
            engine.backward(loss)
            engine.step()
            total += float(loss) * sft.n_labels(some)
        return total / sft.n_labels(rows)

    def loss_ours(engine, ids, mask, labels, some):
        return sft.sft_loss(*sft.response_logits(engine, ids, mask, labels), sft.n_labels(some))

    def loss_peer(engine, ids, mask, labels, some):
        return engine(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss

    as_they_come = [range(at, at + BATCH) for at in range(0, n_rows, BATCH)]
    seconds = race(lambda: epoch(ours, batches(lengths, BATCH, 0, 0), loss_ours),
                   lambda: epoch(peer, as_they_come, loss_peer))
    return [sum(lengths) / s for s in seconds]


def main():
    args = get_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.argv = ["sft.py", "--model", "none", "--data", "none", "--out", "none"]
    _, _, device, dtype = sft.setup(sft.get_args())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder) / args.size, args.size)
        for lora in (False, True):
            for share in (0.4, 1.0):
                ours, peer = measure(Path(folder) / args.size / "base", lora, share, args.rows, device, dtype)
                rows.append((f"{'LoRA' if lora else 'full'}, {share:.0%} of the tokens are response", ours, peer,
                             f"{ours / peer:.2f}"))
    table([f"SFT, {args.size}: real tokens/s", "ours", f"DeepSpeed + transformers {transformers.__version__}", "ratio"], rows)
    sft.finish()


if __name__ == "__main__":
    main()
