"""How much memory a run takes on each GPU: computed, for a run of any size, before it starts.

A run goes through phases: it loads the weights, generates answers, scores them, and each update has a
backward pass that begins, one that ends, and the optimiser's step. In each phase some parts lie in memory
together. The peak is the largest sum of a phase. Each part is one function here, with its formula.

The formulas follow the code: llama.py for what a layer keeps, the three trainers for what is alive at the
same time, DeepSpeed 0.19 for the optimiser. tests/test_memory.py holds them against measurements on a CPU.
What a GPU adds is computed or, where it says so, estimated. docs/memory.md says which is which.

    python bench/memory.py                                                    # the tables of docs/memory.md
    python bench/memory.py --step ppo --model 7B --gpus 8 --card 80 --zero-stage 3 --checkpointing

--model is 1B, 7B, 13B or a LLaMA folder. Every flag of the trainer may stand there too.
"""
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama import LlamaConfig  # noqa: E402
from runtime.errors import BadInput, exit_with_one_line  # noqa: E402
from runtime.flags import Flags, accumulation_steps, number, positive  # noqa: E402
from runtime.gpu import answer_bytes, rows_at_once  # noqa: E402
from runtime.ranks import check_stage  # noqa: E402

MODELS = {"1B": LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                            num_attention_heads=32, num_key_value_heads=4),
          "7B": LlamaConfig(),
          "13B": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                             num_attention_heads=40)}
CARDS = (24, 40, 80)                         # GB, that is 10**9 bytes
USABLE = 0.95                                # of a card; the rest is for memory in pieces that are too small
CONTEXT = 1e9                                # CUDA, cuBLAS and NCCL: an estimate, not computed
# Elements. The buckets on a GPU and on a CPU are runtime/engine.py's, the other numbers DeepSpeed's defaults.
BUCKET, CPU_BUCKET, ALLREDUCE = 50_000_000, 2_000_000, 500_000_000
LIVE, SUB_GROUP = 1_000_000_000, 1_000_000_000       # weights that ZeRO-3 keeps gathered, and updates at once
ENGINES = {"sft": ["model"], "reward": ["model"], "ppo": ["actor", "critic"]}
INPUTS = {"sft": "--model M --data D --out O", "reward": "--model M --data D --out O",
          "ppo": "--actor A --reward R --data D --out O"}


@dataclass
class Job:
    """A run. args are the trainer's flags. bases: how many LLaMAs carry the adapters of ppo.py's four roles.
    on_gpu False counts what the same run takes on a CPU, as the tests measure it."""
    step: str
    config: LlamaConfig
    args: Namespace
    gpus: int = 1
    card: float = 80
    bases: int = 1
    on_gpu: bool = True

    def __post_init__(self):
        flag = {"ppo": "mini_batch"}.get(self.step, "batch")
        batch = getattr(self.args, flag)
        self.accumulation = accumulation_steps(self.args, f"--{flag.replace('_', '-')}", batch, self.gpus)
        self.width = 4 if self.args.dtype == "fp32" else 2         # bytes of a number in the network
        self.full, self.stage = not self.args.lora_rank, self.args.zero_stage
        # between how many ranks the optimiser, the gradients and the weights are divided
        self.optimisers, self.gradients, self.weights = (
            self.gpus if self.stage >= least else 1 for least in (1, 2, 3))


# ------------------------------------------------------------------------------------------------ weights
def matrices(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of a layer."""
    C, inner = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {"q_proj": (C, q), "k_proj": (C, kv), "v_proj": (C, kv), "o_proj": (q, C),
            "gate_proj": (C, inner), "up_proj": (C, inner), "down_proj": (inner, C)}


def n_weights(c: LlamaConfig, is_reward_model: bool = False) -> int:
    """The weights of a language model, or of a reward model, which has a score head instead of the other."""
    layer = sum(a * b for a, b in matrices(c).values()) + 2 * c.hidden_size
    n_tables = 1 if c.tie_word_embeddings or is_reward_model else 2           # the embedding and the head
    score = c.hidden_size if is_reward_model else 0
    return c.num_hidden_layers * layer + n_tables * c.vocab_size * c.hidden_size + c.hidden_size + score


def trained_matrices(job: Job) -> set[str]:
    """The matrices of a layer that are trained, or that have an adapter."""
    known, targets = matrices(job.config), job.args.lora_targets
    if job.full or targets == ["all-linear"]:
        return set(known)
    if unknown := set(targets) - set(known):
        raise BadInput(f"--lora-targets {','.join(sorted(unknown))}: is not counted here; there are "
                       f"{', '.join(known)}")
    return set(targets)


def n_adapter(job: Job) -> int:
    """Each adapter has a matrix A (rank, inputs) and a matrix B (outputs, rank)."""
    pairs = [matrices(job.config)[name] for name in trained_matrices(job)]
    return job.config.num_hidden_layers * job.args.lora_rank * sum(a + b for a, b in pairs)


def sizes(job: Job, engine: str) -> list[int]:
    """The numbers of each weight that the engine trains."""
    c, is_reward_model = job.config, job.step == "reward" or engine == "critic"
    pairs = [matrices(c)[name] for name in trained_matrices(job)]
    score = [c.hidden_size] * is_reward_model
    if not job.full:
        return [job.args.lora_rank * n for pair in pairs for n in pair] * c.num_hidden_layers + score
    layer = [a * b for a, b in pairs] + [c.hidden_size] * 2
    tables = [c.vocab_size * c.hidden_size] * (1 if c.tie_word_embeddings or is_reward_model else 2)
    return layer * c.num_hidden_layers + tables + [c.hidden_size] + score


def trained(job: Job) -> dict[str, int]:
    """{engine: the number of weights that it trains}."""
    return {engine: sum(sizes(job, engine)) for engine in ENGINES[job.step]}


def frozen(job: Job) -> int:
    """The weights that nothing trains: with LoRA the base, in full PPO the reference and the reward model."""
    model, reward = n_weights(job.config), n_weights(job.config, is_reward_model=True)
    if job.step == "ppo":
        return model + reward if job.full or job.bases == 2 else model + 2 * n_adapter(job)
    return 0 if job.full else {"sft": model, "reward": reward - job.config.hidden_size}[job.step]


# ------------------------------------------------------------------------------------------------ held
def held(job: Job) -> dict[str, float]:
    """What lies in memory from the first step to the last. ZeRO-3 keeps its gradients and buckets."""
    n = sum(trained(job).values())
    parts = {"weights": job.width * (n + frozen(job)) / job.weights}
    if not job.args.offload:
        parts["optimiser"] = float32(job) * n / job.optimisers
    if job.stage == 3:
        parts["gradients"] = 0 if job.args.offload else job.width * n / job.gradients
        parts["buckets"] = sum(buckets(job, n) for n in trained(job).values())
    elif job.args.offload:
        parts["buckets"] = job.width * len(trained(job)) * largest(job)      # for one gradient on its way
    return parts | ({"CUDA and NCCL": CONTEXT} if job.on_gpu else {})


def buckets(job: Job, n: int) -> float:
    """Where gradients are put together for the sum over the ranks; on a GPU, one is filled while the other is
    summed."""
    if not job.on_gpu:
        return job.width * min(n, CPU_BUCKET if job.stage else ALLREDUCE)
    return job.width * (min(n, ALLREDUCE) if not job.stage else min(n, BUCKET) * (1 if job.stage == 3 else 2))


def largest(job: Job) -> int:
    """The largest weight that is trained: in full training the embedding, or the head."""
    size = max(a * b for a, b in matrices(job.config).values())
    return max(size, job.config.vocab_size * job.config.hidden_size) if job.full else 0


def passing(job: Job) -> float:
    """A gradient that is larger than a bucket is summed alone: itself and a copy, and with --offload, which
    takes its norm at once, the same in float64."""
    return (2 * job.width + (8 if job.args.offload else 0)) * largest(job)


def float32(job: Job) -> int:
    """Bytes of the optimiser for each weight: two moments, and under ZeRO or in bf16 a copy of the weight."""
    return 8 + (0 if job.stage == 0 and job.width == 4 else 4)


def loading(job: Job) -> float:
    """Every rank reads a network whole, whatever the stage. Under ZeRO-3, ppo.py divides a frozen network
    before it reads the next. DeepSpeed's flat copy of the weights goes through RAM where a GPU is full."""
    apart = job.step == "ppo" and job.full                         # the frozen networks are of their own
    return job.width * (sum(trained(job).values()) + frozen(job) / (job.weights if apart else 1))


def fetched(job: Job, engine: str = "") -> dict[str, float]:
    """Weights that ZeRO-3 has gathered for the layers that are computed now and next, and in full PPO what is
    left of the network before. One GPU has all. With two forward passes before a backward pass, ZeRO-3 gives
    a weight back after the second backward through it, and so the actor is whole in between."""
    n, is_full_ppo = n_weights(job.config), job.step == "ppo" and job.full
    now = n if engine == "actor" and job.args.ptx_data and not job.args.checkpointing else min(n, LIVE)
    before = min(n, LIVE) if is_full_ppo else 0
    return {"gathered": job.width * (now + before)} if job.weights > 1 else {}


def whole(job: Job) -> dict[str, float]:
    """A network that ZeRO-3 gathers whole: to generate with it, and to save it."""
    return {"gathered": job.width * n_weights(job.config)} if job.weights > 1 else {}


# ------------------------------------------------------------------------------------------------ activations
def kept_by_norm(job: Job) -> float:
    """Bytes per token that an RMSNorm keeps for its backward pass: its input, and the root. Written out, as
    on a CPU, it keeps its input in float32, and its result too where its weight is trained."""
    C = job.config.hidden_size
    return 4 + (job.width * C if job.on_gpu else 4 * C + (job.width * C if job.full else 0))


def kept_by_layer(job: Job) -> float:
    """The same of a layer."""
    c, w, sizes = job.config, job.width, matrices(job.config)
    (C, q), (_, kv), (_, inner) = (sizes[name] for name in ("q_proj", "k_proj", "gate_proj"))
    attention = w * (2 * q + 2 * kv) + 4 * c.num_attention_heads   # queries, output, keys, values, log-sums
    mlp = w * 3 * inner                                            # gate, silu(gate), up
    return 2 * kept_by_norm(job) + attention + mlp + kept_inputs(job, C, q, inner)


def kept_inputs(job: Job, C: int, q: int, inner: int) -> float:
    """The same of what trained matrices and adapters multiply; q and k, for example, share their input."""
    w, names, dropout = job.width, trained_matrices(job), getattr(job.args, "lora_dropout", 0)
    # the output of attention is kept already, but that of groups of heads has to be copied
    has_groups = job.config.num_key_value_heads < job.config.num_attention_heads
    shared = {("q_proj", "k_proj", "v_proj"): C, ("o_proj",): q if has_groups else 0,
              ("gate_proj", "up_proj"): C, ("down_proj",): inner}
    inputs = sum(w * size for users, size in shared.items() if names & set(users))
    if dropout:                              # each adapter keeps its own input, and what was dropped
        inputs = sum((w + (1 if job.on_gpu else w)) * matrices(job.config)[name][0] for name in names)
    return inputs + (0 if job.full else w * job.args.lora_rank * len(names))


def inside_mlp(job: Job) -> float:
    """Bytes per token of the gradients inside an MLP at one time, less what has been used by then."""
    C, inner = job.config.hidden_size, job.config.intermediate_size
    return job.width * (C + inner * (2 if "down_proj" in trained_matrices(job) else 3))


def inside_norm(job: Job) -> float:
    """The same of an RMSNorm. Written out, it has five numbers in float32."""
    return (3 * job.width if job.on_gpu else 20) * job.config.hidden_size


def texts(job: Job) -> tuple[int, int]:
    """(rows, length) of a micro-batch; a pair is two rows."""
    args = job.args
    if job.step == "ppo":
        return args.micro_batch, args.max_prompt + args.max_new
    return args.micro_batch * (2 if job.step == "reward" else 1), args.max_len


def places(job: Job, engine: str) -> int:
    """The most places of a micro-batch that have logits: of sft.py with the shortest prompts, of ppo.py with
    the longest answers."""
    rows, length = texts(job)
    return {"model": rows * length if job.step == "sft" else 0, "critic": 0,
            "actor": rows * getattr(job.args, "max_new", 0)}[engine]


def of_all_layers(job: Job) -> float:
    """Bytes per token of what all layers share: a row of the mask for each head of a group, and angles."""
    groups = job.config.num_attention_heads // job.config.num_key_value_heads
    return job.width * (groups * texts(job)[1] + 2 * job.config.head_dim)


def activations(job: Job, engine: str) -> dict[str, float]:
    """What a forward pass leaves for the backward pass, and the most that this one adds: at its begin three
    float32 tables of logits (the log-probabilities, and two gradients), later the inside of a layer."""
    c, (rows, length), n_places = job.config, texts(job), places(job, engine)
    tokens, table, layers = rows * length, 4 * c.vocab_size, c.num_hidden_layers
    if job.args.checkpointing:               # a layer's input; the rest is computed again
        kept, again = layers * job.width * c.hidden_size, kept_by_layer(job)
    else:                                    # with LoRA, nothing before the first adapter needs a gradient
        kept, again = layers * kept_by_layer(job) - (0 if job.full else kept_by_norm(job)), 0
    kept = tokens * (kept + of_all_layers(job))
    # what a trained head multiplies: the vocabulary's at the places with logits, the score's in float32
    inputs = job.width * n_places * job.full if n_places else 4 * tokens
    head, logits = tokens * kept_by_norm(job) + c.hidden_size * inputs, 3 * table * n_places
    if engine == "actor" and job.args.ptx_data:          # both losses go into one backward pass
        kept, logits = 2 * kept + table * n_places, 3 * table * tokens
    at_once = {"logits": head + logits, "last norm": head + tokens * inside_norm(job),
               "one layer": tokens * (again + inside_mlp(job))}
    if n_places:
        at_once["head's gradient"] = head + job.width * c.vocab_size * n_places + passing(job)
    most = max(at_once, key=at_once.get)
    return {"activations": kept, most: at_once[most]}


# ------------------------------------------------------------------------------------------------ phases
def backward(job: Job, engine: str) -> dict[str, dict[str, float]]:
    """A backward pass begins with all activations, and with the gradients of the micro-batches before. It
    ends with all gradients; the largest is in no bucket, and is copied for its sum."""
    n, several = trained(job)[engine], job.accumulation > 1
    mine = 0 if job.stage == 3 else job.width * n / job.gradients
    to_cpu = job.stage == 2 and job.args.offload
    earlier = mine if several and not to_cpu else 0
    new = 0 if to_cpu and not several else mine          # what has nothing to be added to leaves at once
    begins = {"gradients": earlier} | fetched(job, engine) | activations(job, engine)
    ends = {"gradients": new + (earlier if job.stage == 2 else 0), "largest": passing(job)}
    if job.stage in (1, 2):                  # there from the first gradient on; without ZeRO at the end alone
        begins["buckets"] = buckets(job, n)
    if job.stage < 3:
        ends["buckets"] = buckets(job, n)
    return {"backward begins": begins, "backward ends": ends | fetched(job, engine)}


def update(job: Job, engine: str) -> dict[str, float]:
    """The optimiser's step, for which each rank has its part of the gradient in float32 too."""
    n = trained(job)[engine] / job.optimisers
    if job.args.offload:
        return {}
    at_once = min(n, SUB_GROUP) if job.stage == 3 else n
    copies = 4 + (job.width if job.width < 4 and job.stage else 0)
    return {"gradients": 0 if job.stage == 3 else job.width * n,
            "float32 gradients": copies * at_once if job.stage or job.width < 4 else 0}


def generating(job: Job) -> dict[str, float]:
    """The cache of the answers that are generated at a time, and the pass over their prompts."""
    rows, (_, columns) = rows_at_a_time(job), texts(job)
    each = answer_bytes(job.config, job.width, job.args.max_prompt, columns)
    # a CPU decodes with a copy of the head (head_in_columns)
    head = 0 if job.on_gpu else job.width * job.config.vocab_size * job.config.hidden_size
    return whole(job) | {f"{rows} answers": rows * each + head}


def rows_at_a_time(job: Job) -> int:
    """--gen-batch, or what ppo.py chooses on such a card."""
    args = job.args
    share = math.ceil(max(args.rollout_batch, args.eval_prompts) / job.gpus)
    free = 1e9 * job.card - sum((held(job) | whole(job)).values())
    fit = rows_at_once(free, job.config, job.width, args.max_prompt, texts(job)[1])
    return min(share, args.gen_batch or fit)


def scoring(job: Job) -> dict[str, float]:
    """A pass without gradients: one layer's numbers at a time, then the logits, three tables of which two are
    in float32."""
    c, (rows, length) = job.config, texts(job)
    logits = (job.width + 8) * c.vocab_size * rows * job.args.max_new
    inside = rows * length * (job.width * 3 * (c.intermediate_size + c.hidden_size) + of_all_layers(job))
    return fetched(job) | {"logits or a layer": max(logits, inside)}


def phases(job: Job) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes}} of a rank."""
    always, found = held(job), {"loading": {"weights": loading(job), "CUDA and NCCL": CONTEXT * job.on_gpu}}

    def add(name, parts):
        found[name] = {part: always.get(part, 0) + parts.get(part, 0) for part in always | parts}

    if job.step == "ppo":
        add("generating", generating(job))
        add("scoring", scoring(job))
    for engine in trained(job):
        for name, parts in (backward(job, engine) | {"update": update(job, engine)}).items():
            add(f"{engine}: {name}", parts)
    if job.weights > 1:
        add("saving", whole(job))
    return found


def peak(job: Job) -> float:
    """The most bytes that a rank's GPU holds at one time."""
    return max(sum(parts.values()) for parts in phases(job).values())


# ------------------------------------------------------------------------------------------------ RAM
def ram(job: Job) -> float:
    """Bytes in the RAM of all machines together: --offload of each engine, and --ema, which is rank 0's. Of a
    rank's part: two moments and a copy of the weights in float32, the gradient in float32, and in the
    network's precision weights or gradients on their way."""
    numbers, args = trained(job), job.args
    average = 4 * numbers["actor"] if job.step == "ppo" and args.ema is not None else 0
    if not args.offload:
        return average
    total = 0
    for engine, n in numbers.items():
        part = n / job.gpus
        copy = 4 * part if job.stage == 3 else pinned(job, 4 * part)
        # of micro-batches, each weight for itself
        sums = sum(pinned(job, job.width * size) for size in sizes(job, engine)) / job.gpus
        sums = sums if job.stage < 3 and job.accumulation > 1 else 0
        total += 8 * part + copy + pinned(job, 4 * part) + pinned(job, job.width * part) + sums
    return average + job.gpus * total


def pinned(job: Job, n: float) -> float:
    """What n bytes take in memory that a GPU reads directly: PyTorch takes the next power of two."""
    return 2 ** math.ceil(math.log2(n)) if job.on_gpu else n


# ------------------------------------------------------------------------------------------------ printing
def make_job(step: str, model: str, words: list[str], gpus: int = 1, card: float = 80, bases: int = 1,
             on_gpu: bool = True) -> Job:
    """words: the trainer's flags, which its own parser reads."""
    config = MODELS.get(model) or LlamaConfig.from_pretrained(model)
    before, sys.argv = sys.argv, [f"{step}.py", *INPUTS[step].split(), *words]
    try:
        args = import_module(step).get_args()
    finally:
        sys.argv = before
    return Job(step, config, args, gpus, card, bases, on_gpu)


def fits(job: Job) -> bool:
    return peak(job) <= USABLE * 1e9 * job.card


def check(job: Job):
    """BadInput where the trainer would refuse the run."""
    args, length = job.args, texts(job)[1]
    check_stage(args)
    if job.step == "ppo" and args.rollout_batch % args.mini_batch:
        raise BadInput(f"--rollout-batch {args.rollout_batch} does not divide by --mini-batch "
                       f"{args.mini_batch}")
    if length > job.config.context:
        flags = "--max-prompt + --max-new" if job.step == "ppo" else "--max-len"
        raise BadInput(f"{flags}: {length} tokens are more than the model's context of {job.config.context}")
    if job.bases > 1 and job.full:
        raise BadInput("--bases has no effect without --lora-rank")


def shown(job: Job) -> str:
    """The phases of a run with their parts, and its peak."""
    lines = [f"{job.step}.py on {job.gpus} GPU{'s' * (job.gpus > 1)}, GB (10**9 bytes) on each:"]
    for phase, parts in phases(job).items():
        named = ", ".join(f"{part} {n / 1e9:.1f}" for part, n in parts.items() if n >= 5e7)
        lines.append(f"{phase:>24} {sum(parts.values()) / 1e9:6.1f} = {named}")
    needed = peak(job) / 1e9
    cards = [str(card) for card in CARDS if needed <= USABLE * card]
    fit = f"fits a card of {', '.join(cards)} GB" if cards else "fits no card"
    lines.append(f"peak {needed:.1f} GB, {fit}" + (f"; {ram(job) / 1e9:.0f} GB of RAM" if ram(job) else ""))
    return "\n".join(lines)


# Flags that save memory, in the order in which docs/memory.md tries them, by what they cost
ADAPTER_FLAGS = ["", "c", "cm"]
FULL_FLAGS = ["", "c", "z", "zc", "o", "oc", "zo", "zoc", "zocm"]
LETTERS = {"c": ["--checkpointing"], "z": ["--zero-stage", "3"], "o": ["--offload"],
           "m": ["--micro-batch", "1"]}


def cell(step: str, model: str, is_full: bool, gpus: int, card: int) -> str:
    """The first flags with which a run fits, as letters, and its peak; with --offload also its RAM."""
    for letters in FULL_FLAGS if is_full else ADAPTER_FLAGS:
        words = [] if is_full else ["--lora-rank", "8"]
        job = make_job(step, model, words + [word for x in letters for word in LETTERS[x]], gpus, card)
        if fits(job):
            in_ram = f" + {ram(job) / 1e9:.0f}" if ram(job) else ""
            return f"`{letters}` {peak(job) / 1e9:.1f}{in_ram}" if letters else f"{peak(job) / 1e9:.1f}"
    return "-"


def table(gpus: int) -> str:
    """The table of docs/memory.md for so many GPUs."""
    lines = [f"| {gpus} GPU{'s' * (gpus > 1)} | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
             "|---" * (len(CARDS) + 1) + "|"]
    for model in MODELS:
        for is_full in (False, True):
            for step in INPUTS:
                cells = [cell(step, model, is_full, gpus, card) for card in CARDS]
                lines.append(f"| {model}, {step}.py, {'full' if is_full else 'LoRA'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def get_args() -> tuple[Namespace, list[str]]:
    """The flags of this program, and all others, which are the trainer's."""
    flags = Flags("The memory that a run takes on each GPU, computed. Flags of the trainer may follow.")
    flags.allow_abbrev = False               # a short form may mean a flag of the trainer
    add = flags.group("the run")
    add("--step", choices=list(INPUTS), help="the trainer; without it, the tables")
    add("--model", type=str, default="7B", needs="--step", help="1B, 7B, 13B, or a LLaMA folder")
    add("--gpus", type=positive, default=1, needs="--step", help="of all machines together")
    add("--card", type=number(1, 10_000), default=80.0, needs="--step",
        help="GB of a GPU; ppo.py generates as many answers at a time as fit")
    add("--bases", type=int, default=1, choices=[1, 2], needs="--step ppo",
        help="2: actor and reward model are adapters on two LLaMAs")
    args, words = flags.parse_known_args()
    flags.check_conditions(args)
    if words and not args.step:
        raise BadInput(f"{words[0]}: has no effect without --step")
    return args, words


def main():
    args, words = get_args()
    if args.step:
        job = make_job(args.step, args.model, words, args.gpus, args.card, args.bases)
        check(job)
        print(shown(job))
    else:
        print(table(1), table(8), sep="\n", end="")


if __name__ == "__main__":
    exit_with_one_line(main)
