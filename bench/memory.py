"""How much memory a rank needs for weights, gradients and optimiser, by ZeRO stage; without activations and KV cache.

Of each weight that is trained there is, in b bytes (2 in bf16, 4 in float32), the weight and its gradient; in float32 two
moments, and under ZeRO (or in bf16) a copy of the weight and, while an update is made, one of the gradient. Stage 1 divides
what is in float32 by the ranks, and the gradients for the update; stage 2 divides them at once, stage 3 the weights too, but
to save them it makes them whole on every rank. Gradients travel in buckets. A frozen weight is b bytes. The formulas are
those of DeepSpeed 0.19, and tests/test_memory.py holds them against what ranks take.

    python bench/memory.py                    # the README's table
"""
BUCKET, ALLREDUCE = 2_000_000, 500_000_000    # elements: of sft.py under ZeRO, of DeepSpeed without
CARDS = (24, 40, 80)
MODELS = {"1B": 1.1e9, "7B": 6.7e9, "13B": 13e9}


def rank_bytes(trained, frozen=0, apart=0, ranks=1, stage=2, width=2, at_once=None):
    """Bytes on each rank for weights that are trained, frozen in a trained network, and in networks apart (which no stage
    divides); width is the bytes of a weight in the network, at_once is how many have gradients at one time, by default all
    that are trained."""
    at_once = at_once or trained
    weights = width * (apart + (frozen + trained) / (ranks if stage == 3 else 1))
    with_gradient = trained if stage == 3 else at_once             # stage 3 keeps its buffers
    gradients, part = (width * with_gradient / (ranks if stage >= least else 1) for least in (2, 1))
    float32 = (0 if stage == 0 and width == 4 else 4) + 8          # bytes: copy and moments, divided from stage 1 on
    float32 *= trained / (ranks if stage else 1)
    bucket = width * min(trained, BUCKET if stage else ALLREDUCE)
    backward = weights + gradients + float32 + bucket
    update = weights + part + float32
    if stage:                                # of its part, a rank makes a gradient in float32, in half precision by way of a copy
        update += (4 if width == 4 else 4 + width) * at_once / ranks + bucket
    elif width == 2:
        update += 4 * at_once
    whole = width * (frozen + trained)
    loading = width * apart + whole          # every rank reads all of it first, whatever the stage
    saving = weights + part + float32 + whole if stage == 3 else 0
    return max(loading, backward, update, saving)


def main():
    lora = 0.003                             # share of the weights: rank 8 on all seven projections of a 7B
    # trained, frozen, apart, at_once: actor and critic are updated in turn
    kinds = {"sft.py, full": lambda n: (n, 0, 0, n), "sft.py, LoRA": lambda n: (lora * n, n, 0, lora * n),
             "ppo.py, full": lambda n: (2 * n, 0, 2 * n, n),
             "ppo.py, LoRA, one base": lambda n: (2 * lora * n, (1 + 2 * lora) * n, 0, lora * n)}
    print(f"| GB per GPU, bf16 | ZeRO-2, 1 GPU | ZeRO-2, 8 GPUs | ZeRO-3, 8 GPUs | smallest stage that fits 8 x {CARDS} GB |")
    print("|---|---|---|---|---|")
    for size, n in MODELS.items():
        for kind, split in kinds.items():
            *split_n, at_once = split(n)
            needs = {(stage, ranks): rank_bytes(*split_n, ranks, stage, at_once=at_once) / 1e9
                     for stage in range(4) for ranks in (1, 8)}
            # a fifth of the card is left for activations, KV cache and logits
            fits = [next((f"ZeRO-{s}" for s in range(4) if needs[s, 8] < 0.8 * card), "-") for card in CARDS]
            print(f"| {size}, {kind} | " + " | ".join(f"{needs[at]:.1f}" for at in ((2, 1), (2, 8), (3, 8)))
                  + f" | {', '.join(fits)} |")


if __name__ == "__main__":
    main()
