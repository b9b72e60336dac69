"""How much memory a rank needs for weights, gradients and optimiser, by ZeRO stage.

With b bytes for a number of the network (2 in bf16, 4 in float32), each trained weight needs:
- b bytes for the weight, and b bytes for its gradient
- 8 bytes for two moments in float32
- under ZeRO, or in bf16: 4 bytes for a copy of the weight in float32, and during an update 4 for its gradient
Stage 1 divides among the ranks what is in float32, and during an update the gradients. Stage 2 divides the
gradients at once. Stage 3 divides the weights too, but to save the model every rank gathers all of them.
Gradients travel in buckets. A frozen weight needs b bytes. Activations and the KV cache come on top. The
formulas are those of DeepSpeed 0.19; tests/test_memory.py compares them with the memory that ranks really
take.

    python bench/memory.py                    # the table of docs/memory.md
"""
# Gradients in a bucket: runtime/engine.py sets the number under ZeRO, DeepSpeed the one without ZeRO.
BUCKET, ALLREDUCE = 2_000_000, 500_000_000
CARDS = (24, 40, 80)
MODELS = {"1B": 1.1e9, "7B": 6.7e9, "13B": 13e9}


def rank_bytes(trained: float, frozen: float = 0, apart: float = 0, ranks: int = 1, stage: int = 2,
               width: int = 2, at_once: float | None = None) -> float:
    """Bytes on each rank, from numbers of weights: those that are trained, those that are frozen in a trained
    network, and those of networks apart, which no stage divides. width: the bytes of a weight in the network.
    at_once: how many weights have gradients at one time, by default all that are trained."""
    at_once = at_once or trained
    weights = width * (apart + (frozen + trained) / (ranks if stage == 3 else 1))
    with_gradient = trained if stage == 3 else at_once             # stage 3 keeps its buffers
    gradients, part = (width * with_gradient / (ranks if stage >= least else 1) for least in (2, 1))
    # bytes per weight, divided from stage 1 on: the copy and the moments
    float32 = (0 if stage == 0 and width == 4 else 4) + 8
    float32 *= trained / (ranks if stage else 1)
    bucket = width * min(trained, BUCKET if stage else ALLREDUCE)
    backward = weights + gradients + float32 + bucket
    update = weights + part + float32
    if stage:                                # the gradient of a rank's part in float32, and copied from bf16
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
    print("| GB per GPU, bf16 | ZeRO-2, 1 GPU | ZeRO-2, 8 GPUs | ZeRO-3, 8 GPUs "
          f"| smallest stage that fits 8 x {CARDS} GB |")
    print("|---|---|---|---|---|")
    for size, n in MODELS.items():
        for kind, numbers in kinds.items():
            *of_weights, at_once = numbers(n)
            needs = {(stage, ranks): rank_bytes(*of_weights, ranks, stage, at_once=at_once) / 1e9
                     for stage in range(4) for ranks in (1, 8)}
            # a fifth of the card is left for activations, KV cache and logits
            fits = [next((f"ZeRO-{s}" for s in range(4) if needs[s, 8] < 0.8 * card), "-") for card in CARDS]
            print(f"| {size}, {kind} | " + " | ".join(f"{needs[at]:.1f}" for at in ((2, 1), (2, 8), (3, 8)))
                  + f" | {', '.join(fits)} |")


if __name__ == "__main__":
    main()
