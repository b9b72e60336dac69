"""Part c of gpu.py: how fast a 7B decodes and takes a PPO step, beside what the card can do.

A token cannot take less time than reading the weights and the cache once, and a training step not less than
its matrix products. Both limits come from two rates, which are measured here and not looked up: of a large
copy within the GPU's memory, and of a large matrix product. The weights are random, so answers have their
full length. On a CPU the network is small.
"""
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import wraps

import torch
from gpu_tools import (
    MACHINE,
    Check,
    Finding,
    Place,
    draw_instead_of_reading,
    metrics,
    seconds_of,
    synchronize,
    train,
    within,
    write_adapter,
    write_llama,
    write_rows,
)
from memory import matrices

import ppo
from llama import Llama, LlamaConfig

SMALL = LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
# Of the limit. More than all of it means that the clock did not wait for the GPU; so little of it means that
# something goes wrong, such as tokens without a CUDA graph.
DECODING, TRAINING = (0.3, 1.05), (0.15, 1.05)


# ------------------------------------------------------------------------------------------------ the card
def copy_rate(device: torch.device) -> float:
    """Bytes per second that are read and written within the device's memory."""
    x = torch.empty(2**24 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, rounds=10)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product of random numbers; of zeros it would be faster."""
    n = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device, rounds=10)


def precision(place: Place) -> torch.dtype:
    return torch.float32 if place.small else torch.bfloat16


def check_card(place: Place) -> Iterator[Finding]:
    yield Finding("a copy within memory, read and written", copy_rate(place.device) / 1e9, "GB/s")
    yield Finding("a matrix product", product_rate(place.device, precision(place)) / 1e12, "TFLOP/s")


# ------------------------------------------------------------------------------------------------ decoding
def decoding_limit(config: LlamaConfig, B: int, length: float, width: int, rate: float) -> float:
    """Seconds of a token for each of B texts: the time of reading the weights (but for the embedding's table,
    of which few rows are read) and the cache of so many tokens."""
    with torch.device("meta"):
        model = Llama(config)
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * B
    return width * (weights + cache) / rate


def seconds_of_decode(model: Llama, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds of the prompts with the first token, and of each token after it, with all that decoding needs:
    the capture of graphs, and the choice of a word."""
    steps = model.decode(ids, torch.ones_like(ids), new)
    synchronize(ids.device)
    start = time.perf_counter()
    next(steps)
    synchronize(ids.device)
    first = time.perf_counter()
    for _ in steps:
        pass
    synchronize(ids.device)
    return first - start, (time.perf_counter() - first) / (new - 1)


def peer_of(model: Llama):
    """transformers' LLaMA around the same weights: no second copy of a 7B."""
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM
    weight = model.lm_head.weight
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            peer = LlamaForCausalLM(PeerConfig(**model.config.to_dict()))
    finally:
        torch.set_default_dtype(before)
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.generation_config.eos_token_id = None
    return peer.eval()


def seconds_of_peer(peer, ids: torch.Tensor, new: int) -> float:
    """Seconds of transformers for each token after the first, by the difference of two lengths."""
    def seconds(n):
        return seconds_of(lambda: peer.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=n, pad_token_id=0), ids.device, rounds=1)
    return (seconds(new) - seconds(1)) / (new - 1)


def check_decoding(place: Place) -> Iterator[Finding]:
    """The prompts are long, so the cache counts; a new word is chosen at temperature 1."""
    P, new, peers_new = (16, 17, 5) if place.small else (256, 129, 33)
    draw_instead_of_reading()
    dtype, device = precision(place), place.device
    model = Llama.from_pretrained(place.folder / "model", dtype, device).eval()
    peer, rate = peer_of(model), copy_rate(device)
    for B in (1, 16, 64):
        ids = torch.randint(3, 31_000, (B, P), device=device)
        runs = [seconds_of_decode(model, ids, new) for _ in range(4)][1:]          # the first warms up
        prompt, ours = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
        limit = decoding_limit(model.config, B, P + new / 2, dtype.itemsize, rate)
        theirs = seconds_of_peer(peer, ids, peers_new)
        yield Finding(f"tokens per second, B = {B}", B / ours, "", f"{B / theirs:,.0f} by transformers")
        yield share_of_limit(f"a token, B = {B}", limit, ours, DECODING, place)
        yield Finding(f"the prompts and the first token, B = {B}", 1e3 * prompt, "ms")


def share_of_limit(what: str, limit: float, seconds: float, bounds: tuple[float, float],
                   place: Place) -> Finding:
    """The share of the measured seconds that the limit is. At toy size it is hardly judged: Python's own time
    is long beside such a network, and a CPU with other work has another rate each time."""
    what = f"{what}: {1e3 * seconds:,.1f} ms, limit {1e3 * limit:,.1f} ms, share"
    low, high = (0, 10) if place.small else bounds
    return within(what, limit / seconds, low, high)


# ------------------------------------------------------------------------------------------------ a PPO step
def operations(config: LlamaConfig, tokens: int, T: int, n_logits: int) -> float:
    """Floating-point operations of a forward pass over so many tokens, in texts of T tokens, with n_logits
    rows of logits. Of attention the causal half is counted."""
    layer = sum(a * b for a, b in matrices(config).values())
    attention = config.num_attention_heads * config.head_dim * T
    return (2 * tokens * config.num_hidden_layers * (layer + attention)
            + 2 * n_logits * config.hidden_size * config.vocab_size)


def ppo_limits(config: LlamaConfig, B: int, P: int, new: int, place: Place) -> dict[str, float]:
    """{phase: seconds at least} of a PPO step with LoRA whose B answers all have their full length. With
    LoRA, a backward pass takes as many operations as a forward pass."""
    dtype = precision(place)
    reading, computing = copy_rate(place.device), product_rate(place.device, dtype)
    body, head = operations(config, B * (P + new), P + new, 0), operations(config, 0, 0, B * new)
    prompts = operations(config, B * P, P, B) / computing
    tokens = (new - 1) * decoding_limit(config, B, P + new / 2, dtype.itemsize, reading)
    return {"answers": prompts + tokens, "scoring": (4 * body + 2 * head) / computing,
            "actor": 2 * (body + head) / computing, "critic": 2 * body / computing}


class Clock:
    """The seconds spent in each phase of the last PPO step."""

    def __init__(self, device: torch.device):
        self.device, self.spent, self.last = device, Counter(), {}
        self.timed(Llama, "generate", "answers")
        self.timed(ppo, "rollout", "rollout")
        self.timed(ppo, "update_actor", "actor")
        self.timed(ppo, "update_critic", "critic")

    def timed(self, owner: object, name: str, phase: str):
        function = getattr(owner, name)

        @wraps(function)
        def measured(*inputs, **named):
            if phase == "rollout":           # a step, or the answers of an evaluation
                self.spent.clear()
            synchronize(self.device)
            start = time.perf_counter()
            result = function(*inputs, **named)
            synchronize(self.device)
            self.spent[phase] += time.perf_counter() - start
            if phase == "critic":            # a step ends with it, an evaluation has none
                self.last = dict(self.spent)
            return result

        setattr(owner, name, measured)

    def seconds(self) -> dict[str, float]:
        last = dict(self.last)
        return {"answers": last["answers"], "scoring": last["rollout"] - last["answers"],
                "actor": last["actor"], "critic": last["critic"]}


def check_ppo_step(place: Place) -> Iterator[Finding]:
    """The second step of ppo.py with four roles on one base, LoRA of rank 8 on q and k, and its default
    sizes."""
    B, P, new = (8, 24, 24) if place.small else (64, 256, 256)
    words = ["--rollout-batch", B, "--mini-batch", B // 2, "--max-prompt", P, "--max-new", new]
    draw_instead_of_reading()
    folder, clock = place.folder, Clock(place.device)
    train("ppo", ["--actor", folder / "actor", "--reward", folder / "reward", "--reward-norm", "none",
                  "--data", folder / "rows.jsonl", "--split", "none", "--eval-data", folder / "rows.jsonl",
                  "--eval-prompts", 1, "--out", folder / "run", "--steps", 2, *words])
    last = [line for line in metrics(folder / "run") if "tokens_per_s" in line][-1]
    total, seconds = B * (P + last["length"]) / last["tokens_per_s"], clock.seconds()
    config = LlamaConfig.from_pretrained(folder / "model")
    limits = ppo_limits(config, B, P, new, place)
    yield Finding(f"tokens of an answer, of {new}", last["length"])
    for phase, least in limits.items():
        bounds = DECODING if phase == "answers" else TRAINING
        yield share_of_limit(f"{phase} of a PPO step", least, seconds[phase], bounds, place)
    yield share_of_limit("a PPO step", sum(limits.values()), total, TRAINING, place)
    yield Finding("the rest of the step", 1e3 * (total - sum(seconds.values())), "ms")
    if place.device.type == "cuda":
        yield Finding("most memory that tensors had", torch.cuda.max_memory_allocated() / 1e9, "GB")


def check_prepare(place: Place) -> Iterator[Finding]:
    """Writes a folder that has everything but weights, two adapters, and prompts of full length."""
    write_llama(place.folder / "model", SMALL if place.small else LlamaConfig())
    for role, task in (("actor", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        write_adapter(place.folder / role, place.folder / "model", task, 8, ["q_proj", "k_proj"])
    half = 24 if place.small else 256
    write_rows(place.folder / "rows.jsonl", 128, half, half)
    yield Finding("models and prompts", "made")


GROUPS = [[MACHINE, Check("prepare", check_prepare, cpu=True)], [Check("card", check_card)],
          [Check("decoding", check_decoding, 80)], [Check("ppo-step", check_ppo_step, 120)]]
