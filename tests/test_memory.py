"""bench/memory.py against what tensors really take: per layer, in a backward pass, in whole runs."""
import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import llama
import ppo
import reward
import sft
from conftest import REPO, run_script, tiny_config, tiny_llama
from data import open_tokenizer
from llama import Llama, LlamaConfig
from lora import add_lora
from reward import RewardModel
from runtime.errors import BadInput, exit_with_one_line
from runtime.tokenizer_write import copy_tokenizer

sys.path.append(str(REPO / "bench"))
import memory  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402

HEADS = {"MHA": {"num_attention_heads": 4, "num_key_value_heads": 4},
         "GQA": {"num_attention_heads": 8, "num_key_value_heads": 2}}
TRAINED = {"q and k": ["--lora-rank", "8"], "all seven": ["--lora-rank", "8", "--lora-targets", "all-linear"],
           "dropout": ["--lora-rank", "8", "--lora-dropout", "0.1"], "full": []}
OF_8 = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}


def job_of(config, step, *words, **options):
    """The calculator's job for a config, in bf16 on a CPU."""
    job = memory.make_job(step, "7B", [*words, "--dtype", "bf16"], on_gpu=False, **options)
    job.config = config
    return job


def network_of(job):
    """A network that the job's trainer would train, with random weights."""
    is_reward_model = job.step == "reward"
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = (RewardModel if is_reward_model else Llama)(job.config)
    finally:
        torch.set_default_dtype(torch.float32)
    if job.args.lora_rank:
        add_lora(network, job.args.lora_rank, 16.0, job.args.lora_targets,
                 getattr(job.args, "lora_dropout", 0.0))
    network.model.checkpointing = job.args.checkpointing
    return network


# ------------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("config", [tiny_config(tie_word_embeddings=True), *memory.MODELS.values()],
                         ids=["tied", *memory.MODELS])
def test_numbers_of_weights_are_those_of_the_networks(config, words):
    config = LlamaConfig(**{**vars(config), "num_hidden_layers": 3})
    for step in ("sft", "reward"):
        job = job_of(config, step, *words)
        with torch.device("meta"):
            parameters = list(network_of(job).parameters())
        assert sum(memory.trained(job).values()) == sum(p.numel() for p in parameters if p.requires_grad)
        assert memory.frozen(job) == sum(p.numel() for p in parameters if not p.requires_grad)


def test_the_sizes_are_those_of_the_models_of_this_name():
    sizes = {name: memory.n_weights(config) for name, config in memory.MODELS.items()}
    assert sizes == {"1B": 1_100_048_384, "7B": 6_738_415_616, "13B": 13_015_864_320}


# ------------------------------------------------------------------------------------------------ activations
def kept(job, n_layers):
    """Bytes that the forward pass of the job's network, with so many layers, keeps for the backward pass."""
    job.config.num_hidden_layers = n_layers
    network = network_of(job).train()
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    found = {}                               # the tensors are held, so that no two have the same address

    def keep(x):
        if x.untyped_storage()._cdata not in parameters:
            found[x.untyped_storage()._cdata] = x
        return x

    rows, length = memory.texts(job)
    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = network.model(ids, torch.ones_like(ids, dtype=torch.bool))
    hidden.sum().backward()                  # a network whose backward pass fails would prove nothing
    return sum(x.untyped_storage().nbytes() for x in found.values())


def of_one_layer(job):
    return kept(job, 3) - kept(job, 2)


@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("heads", HEADS)
def test_a_layer_keeps_what_the_formula_says(heads, words):
    job = job_of(tiny_config(**HEADS[heads], hidden_size=64, intermediate_size=172), "sft",
                 "--max-len", "32", "--batch", "2", "--micro-batch", "2", *words)
    assert of_one_layer(job) == 64 * memory.kept_by_layer(job)
    job.args.checkpointing = True
    assert of_one_layer(job) == 64 * 2 * 64


class FusedNorm(torch.autograd.Function):
    """What PyTorch's kernel on a GPU keeps (_fused_rms_norm in its derivatives.yaml): input, root, weight."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, root, weight)
        return (x.float() * root).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum((0, 1)), None


def efficient_attention(q, k, v, attn_mask, **_):
    """The kernel that a GPU takes; without a GPU, PyTorch still knows its shapes. The heads of a group go in
    as one head with all of their queries."""
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    queries = q.reshape(*k.shape[:2], -1, q.shape[3])
    return attention(queries, k, v, attn_mask, torch.is_grad_enabled())[0].reshape(q.shape)


@pytest.mark.parametrize("words", [TRAINED[name] for name in ("q and k", "all seven", "full")])
@pytest.mark.parametrize("name", ["7B", "1B"])
def test_a_layer_keeps_the_same_with_the_kernels_of_a_gpu(name, words, monkeypatch):
    """At full size, with tensors that have a shape and no memory."""
    monkeypatch.setattr(llama.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight, self.eps))
    monkeypatch.setattr(llama.F, "scaled_dot_product_attention", efficient_attention)
    job = job_of(LlamaConfig(**vars(memory.MODELS[name])), "sft", *words)
    job.on_gpu = True
    with FakeTensorMode():
        assert of_one_layer(job) == pytest.approx(4 * 512 * memory.kept_by_layer(job), rel=1e-6)


class Engine:
    """An engine that only calls its network."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *arguments, **named):
        return self.network(*arguments, **named)


def backward_pass(job, engine, network):
    """Forward and backward of one micro-batch, by the trainer's own functions."""
    rows, length = memory.texts(job)
    ids = torch.randint(3, job.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if job.step == "sft":
        sft.rows_loss(network, [(row, 1) for row in ids.tolist()], 1.0, ids.device).backward()
    elif job.step == "reward":
        starts = torch.zeros(rows // 2, dtype=torch.long)
        reward.batch_loss(network(ids, mask), mask, starts, job.args.loss, 1).backward()
    else:
        new, numbers = job.args.max_new, torch.zeros(rows, job.args.max_new)
        mb = ppo.Rollout(ids, mask, mask[:, :new], length - new, mask[:, 0], numbers[:, 0], *[numbers] * 5)
        role = ppo.Role(network, "default" if job.args.lora_rank else None, Engine(network))
        more = (job.config.vocab_size,) if engine == "actor" else ()
        last = {"is_first": True, "texts": []} if engine == "actor" else {}
        update = {"actor": ppo.update_actor, "critic": ppo.update_critic}[engine]
        update(role, [mb], torch.tensor(1.0), job.args, *more, ppo.Measures(), **last)


SHORT = ["--batch", "4", "--micro-batch", "4", "--max-len", "96"]
ANSWERS = ["--rollout-batch", "4", "--mini-batch", "4", "--max-prompt", "48", "--max-new", "48"]


@pytest.mark.parametrize("step, engine, words", [
    ("sft", "model", [*SHORT, *TRAINED["q and k"]]), ("sft", "model", SHORT),
    ("sft", "model", [*SHORT, "--checkpointing"]), ("reward", "model", [*SHORT, *TRAINED["all seven"]]),
    ("ppo", "actor", [*ANSWERS, *TRAINED["q and k"]]), ("ppo", "actor", [*ANSWERS, "--checkpointing"]),
    ("ppo", "critic", [*ANSWERS, "--checkpointing", *TRAINED["q and k"]])])
@pytest.mark.parametrize("n_words", [300, 4000], ids=["few words", "many words"])
def test_the_peak_of_a_backward_pass_is_the_formulas(step, engine, words, n_words, monkeypatch):
    """With few words a layer is the most that the backward pass adds, with many the logits."""
    job = job_of(tiny_config(vocab_size=n_words, **OF_8, **HEADS["GQA"]), step, *words)
    network = network_of(Namespace(**{**vars(job), "step": "reward" if engine == "critic" else step}))
    for p in network.parameters():           # gradients of a micro-batch before
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    monkeypatch.setattr(ppo, "backward_and_step", lambda engine, loss: loss.backward())
    monkeypatch.setattr(ppo.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(ppo.dist, "get_rank", lambda: 0)
    there = [x for p in network.parameters() for x in (p, p.grad) if x is not None]
    with LiveBytes(but=there) as live:
        backward_pass(job, engine, network)
    assert 0.9 < live.peak / sum(memory.activations(job, engine).values()) < 1.03


@pytest.mark.parametrize("prompt, new", [(8, 100), (120, 8)], ids=["long answers", "long prompts"])
def test_the_peak_of_generating_is_the_formula(prompt, new):
    """Half of the answers end at once and leave the batch, for which half of the cache is copied."""
    config = tiny_config(vocab_size=200, **OF_8, **HEADS["MHA"])
    job = job_of(config, "ppo", "--rollout-batch", "8", "--mini-batch", "8", "--eval-prompts", "8",
                 "--gen-batch", "8", "--max-prompt", str(prompt), "--max-new", str(new))
    actor, ids = network_of(job), torch.randint(3, 200, (8, prompt))
    uniforms = torch.tensor([0.0, 0.999]).repeat_interleave(4)[:, None].expand(8, new)
    with torch.no_grad(), LiveBytes(but=actor.parameters()) as live:
        _, mask = actor.generate(ids, torch.ones_like(ids), new, eos_id=list(range(100)), uniforms=uniforms)
    assert mask.sum(1).tolist() == [1] * 4 + [new] * 4
    (_, expected), = memory.generating(job).items()
    assert 0.8 < live.peak / expected < 1.02


def test_the_peak_of_scoring_is_the_formula():
    for n_words in (300, 8000):
        job = job_of(tiny_config(vocab_size=n_words, **OF_8, **HEADS["MHA"]), "ppo", *ANSWERS)
        network, ids, numbers = network_of(job), torch.randint(3, n_words, (4, 96)), torch.zeros(4, 48)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mb = ppo.Rollout(ids, mask, mask[:, :48], 48, mask[:, 0], numbers[:, 0], *[numbers] * 3)
        with torch.no_grad(), LiveBytes(but=network.parameters()) as live:
            ppo.answer_logps(network, mb, 1.0, n_words)
        assert 0.9 < live.peak / sum(memory.scoring(job).values()) < 1.1


# ------------------------------------------------------------------------------------------------ engines
@pytest.mark.parametrize("words, is_whole", [
    ("", False), ("--ptx-data x", True), ("--ptx-data x --checkpointing", False)])
def test_two_losses_in_a_backward_pass_leave_the_actor_whole_under_zero_3(words, is_whole):
    """tests/test_runtime.py has DeepSpeed do it."""
    job = memory.make_job("ppo", "7B", ["--zero-stage", "3", *words.split()], gpus=8)
    for name, parts in memory.phases(job).items():
        if name.partition(":")[0] in ("actor", "critic", "scoring") and "update" not in name:
            whole = is_whole and name.startswith("actor")
            of_this = 6_738_415_616 if whole else memory.LIVE
            assert parts["gathered"] == 2 * (of_this + memory.LIVE), name


@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("step", ["sft", "reward"])
def test_the_sums_of_micro_batches_are_pinned_weight_by_weight(step, words):
    config = tiny_config(tie_word_embeddings=step == "sft", hidden_size=24, intermediate_size=40)
    once, often = (job_of(config, step, *words, "--offload", "--micro-batch", "2", "--batch", batch)
                   for batch in ("2", "8"))
    once.on_gpu = often.on_gpu = True
    with torch.device("meta"):
        numbers = [p.numel() for p in network_of(often).parameters() if p.requires_grad]
    sums = sum(1 << (2 * n - 1).bit_length() for n in numbers)     # the next power of two
    assert memory.ram(often) - memory.ram(once) == sums > 2 * sum(numbers)


# ------------------------------------------------------------------------------------------------ the pages
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_page_has_the_tables_of_today(gpus):
    assert memory.table(gpus) in (REPO / "docs" / "memory.md").read_text()


def test_a_run_is_shown_in_its_phases(monkeypatch, capsys):
    words = "--step ppo --model 7B --card 24 --lora-rank 8 --checkpointing"
    monkeypatch.setattr(sys, "argv", ["memory.py", *words.split()])
    memory.main()
    shown, page = capsys.readouterr().out.splitlines(), (REPO / "docs" / "memory.md").read_text()
    assert "\n".join(shown[:5]) in page and shown[-1] == "peak 21.8 GB, fits a card of 24, 40, 80 GB"


@pytest.mark.parametrize("trained, line", [
    ("q and k", "LoRA on `q_proj` and `k_proj`"), ("all seven", "LoRA on all seven matrices"),
    ("full", "full training")])
def test_the_page_has_the_activations_of_a_7b(trained, line):
    units = []
    for on_gpu in (False, True):
        job = memory.make_job("sft", "7B", TRAINED[trained], on_gpu=on_gpu)
        units.append(f"{memory.kept_by_layer(job) / (2 * 4096):.1f}")
    assert f"| {line} | {' | '.join(units)} |" in (REPO / "docs" / "memory.md").read_text()


def test_what_is_not_counted_is_refused():
    with pytest.raises(BadInput, match="lm_head: is not counted"):
        memory.n_adapter(memory.make_job("sft", "7B", ["--lora-rank", "8", "--lora-targets", "lm_head"]))
    with pytest.raises(BadInput, match="config.json: is missing"):
        memory.make_job("sft", "8B", [])
    for words, message in (["--micro-bath", "2"], "did you mean --micro-batch"), (["--batch", "6"], "divide"):
        with pytest.raises(BadInput, match=message):
            memory.make_job("sft", "7B", words)


def outcome(words, monkeypatch, capsys):
    """(exit status, output, what is on standard error) of the program with these words."""
    monkeypatch.setattr(sys, "argv", ["memory.py", *words.split()])
    try:
        exit_with_one_line(memory.main)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("words, said", [
    ("--step sft --gpus 0", "--gpus: 0 is not from 1"), ("--step sft --gpus -3", "--gpus: -3 is not from 1"),
    ("--step sft --gpus x", "--gpus: x is not a whole number"), ("--step sft --gpus 3", "does not divide"),
    *[(f"--step ppo --card {x}", f"--card: {x} is not from 1 to 10000") for x in ("0", "-5", "nan", "inf")],
    ("--gpus 8", "--gpus has no effect without --step"), ("--card 24", "--card has no effect without --step"),
    ("--model 13B", "--model has no effect without --step"), ("--bases 2", "--bases has no effect without"),
    ("--step sft --bases 2", "--bases has no effect without --step ppo"),
    ("--step ppo --bases 2", "--bases has no effect without --lora-rank"),
    ("--step ppo --bases 3", "invalid choice: 3"), ("--step chat", "invalid choice: 'chat'"),
    ("--step", "expected one argument"), ("--offload", "--offload: has no effect without --step"),
    ("--step sft --offload --zero-stage 0", "--offload needs --zero-stage 1"),
    ("--step sft --dtype fp16 --zero-stage 0", "--zero-stage 0 with fp16"),
    ("--step ppo --rollout-batch 33", "--rollout-batch 33 does not divide by --mini-batch 32"),
    ("--step ppo --max-prompt 100000", "--max-prompt + --max-new: 100256 tokens are more than"),
    ("--step sft --max-len 100000", "--max-len: 100000 tokens are more than the model's context of 2048"),
    ("--step ppo --lora-rank 8 --lora-targets foo", "--lora-targets foo: is not counted"),
    ("--step sft --gen-batch 4", "unknown argument --gen-batch"), ("--step sft @nofile", "nofile")])
def test_what_is_refused_is_one_line_and_nothing_is_printed_before(words, said, monkeypatch, capsys):
    status, out, err = outcome(words, monkeypatch, capsys)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_flags_of_the_trainer_may_have_the_beginning_of_one_of_this_program(monkeypatch, capsys):
    """--ste is the trainer's --steps, and not --step."""
    assert outcome("--step sft --ste 3 --lora_rank=8 --gpus 2", monkeypatch, capsys)[0] == 0


# ------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_file):
    """A language model and a reward model in bf16, and pairs of one length, which is the last value."""
    root, config = tmp_path_factory.mktemp("memory"), {**OF_8, **HEADS["MHA"], "head_dim": None}
    model = tiny_llama(std=0.05, **config).bfloat16()
    model.save_pretrained(root / "base")
    copy_tokenizer(tokenizer_file.parent, root / "base")
    RewardModel.from_pretrained(root / "base", torch.bfloat16).save_pretrained(root / "reward")
    copy_tokenizer(tokenizer_file.parent, root / "reward")
    with open(root / "pairs.jsonl", "w") as file:
        for i in range(100, 164):
            pair = {"chosen": " blue" + " the" * 60, "rejected": " red" + " the" * 60}
            question = "the " * 40 + str(i)
            file.write(json.dumps({"prompt": f"\n\nHuman: {question}\n\nAssistant:", **pair}) + "\n")
    tokenizer, _, _ = open_tokenizer(root / "base", None, 200)
    prompt = [tokenizer.bos_id, *tokenizer.encode(f"\n\nHuman: {question}\n\nAssistant:")]
    return root, tiny_config(**config), len(prompt), len(tokenizer.encode_answer(pair["chosen"])) + 1


BATCH_4, BATCH_8 = ["--batch", "4", "--micro-batch", "2"], ["--batch", "8", "--micro-batch", "2"]
STEP_8 = ["--rollout-batch", "8", "--mini-batch", "8", "--eval-prompts", "4"]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("ranks, step, words", [
    *[(1, "sft", [*BATCH_4, "--zero-stage", stage]) for stage in "0123"],
    *[(1, "sft", [*BATCH_4, "--offload", "--zero-stage", stage]) for stage in "123"],
    *[(2, "sft", [*BATCH_8, "--zero-stage", stage]) for stage in "0123"],
    (2, "sft", [*BATCH_8, "--offload"]), (1, "sft", [*BATCH_4, *TRAINED["all seven"]]),
    (1, "reward", [*BATCH_4, *TRAINED["q and k"]]), (1, "reward", [*BATCH_4, "--checkpointing"]),
    (1, "ppo", STEP_8), (1, "ppo", [*STEP_8, "--gen-batch", "4", *TRAINED["q and k"]]),
    (2, "ppo", STEP_8), (2, "ppo", [*STEP_8, "--zero-stage", "3"]),
    (2, "ppo", [*STEP_8, "--zero-stage", "3", "--offload"])], ids=str)
def test_the_peak_of_a_run_is_the_formulas(ranks, step, words, folders, tmp_path):
    """Tensors of whole runs, with DeepSpeed's engine; on a CPU, those of --offload count too."""
    root, config, prompt, answer = folders
    models = {"ppo": ["--actor", root / "base", "--reward", root / "reward", "--reward-norm", "none"]}
    sizes = {"ppo": ["--max-prompt", prompt, "--max-new", answer]}.get(step, ["--max-len", prompt + answer])
    words = [str(word) for word in [*words, *sizes, "--dtype", "bf16"]]
    done = run_script(REPO / "bench" / "live_bytes.py", step, *models.get(step, ["--model", root / "base"]),
                      "--data", root / "pairs.jsonl", "--split", "none", "--steps", "2",
                      "--out", tmp_path / "run", *words, ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured = max(map(int, re.findall(r"peak (\d+)", done.stdout)))
    job = job_of(config, step, *words, gpus=ranks, bases=2)
    expected = memory.peak(job) + memory.ram(job) / ranks
    print(f"{ranks} x {step} {' '.join(words)}: {measured / 1e6:.1f} MB, {measured / expected:.3f} of it")
    assert 0.9 < measured / expected < 1.1
