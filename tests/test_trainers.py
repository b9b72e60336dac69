"""The three trainers from end to end, as a user starts them: `python X.py`, and deepspeed's launcher."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from conftest import REPO, metrics, run_script, tiny_llama
from data import Tokenizer
from lora import load_model
from reward import load_reward_model
from runtime.folders import read_tensor, tensor_names
from runtime.tokenizer_write import copy_tokenizer

pytestmark = pytest.mark.slow

# The learning rates are so high that a few steps move the weights far beyond rounding. So runs that agree
# have trained alike; they have not merely stood still.
LORA = "--lora-rank 4 --lora-targets q_proj,v_proj,down_proj"
SUPERVISED = "--data $pairs --max-len 64 --batch 8 --lr 1e-3 --steps 3 --log-every 1 --eval-every 2"
PPO = ("--data $pairs --max-prompt 32 --max-new 8 --rollout-batch 8 --mini-batch 4 --ppo-epochs 2 --steps 2 "
       "--actor-lr 3e-4 --critic-lr 3e-4 --weight-decay 3 --eval-every 2")
EXTRAS = ("--ptx-data $text --ptx-coef 0.5 --ema 0.9 --kl-target 0.01 --missing-eos-penalty 0.5 "
          "--reward-norm rollout --norm-prompts 11 --gold $gold --save-critic --checkpointing")
# name: (script, flags); @name stands for the folder of another run, $name for an input
JOBS = {
    "sft": ("sft", f"--model $talker {SUPERVISED}"),
    "sft-lora": ("sft", f"--model $talker {LORA} {SUPERVISED}"),
    "reward": ("reward", f"--model $talker {SUPERVISED}"),
    "reward-lora": ("reward", f"--model $talker --loss dense --checkpointing {LORA} {SUPERVISED}"),
    "ppo": ("ppo", f"--actor @sft --reward @reward --ema 0.9 --save-critic {PPO}"),
    "ppo-new-lora": ("ppo", f"--actor @sft --reward @reward {LORA} {PPO}"),
    "ppo-one-base": ("ppo", f"--actor @sft-lora --reward @reward-lora {EXTRAS} {PPO}"),
    # half of the batch answers with EOS alone: of two ranks, one has answers of one token and the other
    # longer ones
    "ppo-uneven": ("uneven", f"--actor @sft-lora --reward @reward-lora {PPO}"),
}
REFERENCE = "--micro-batch 1 --zero-stage 2"                       # one process, a row at a time
# the last of each always, the others in ./run.sh faults
ONE_RANK = ["--micro-batch 1 --zero-stage 0", "--micro-batch 2 --zero-stage 2 --offload --gen-batch 3",
            "--micro-batch 4 --zero-stage 3"]
TWO_RANKS = ["--micro-batch 1 --zero-stage 0", "--micro-batch 1 --zero-stage 1 --offload",
             "--micro-batch 1 --zero-stage 3", "--micro-batch 2 --zero-stage 3 --offload --gen-batch 3",
             "--micro-batch 2 --zero-stage 2"]
# Importing torch and deepspeed takes longer than these trainings, so this script runs many of them in one
# process, or in one process per rank.
CHAIN = """
import json, sys
sys.path.insert(0, {repo!r})
import torch.distributed as dist
import sft, reward, ppo, runtime.checkpoint

def uneven(roles, prompts, uniforms, args, tokenizer, *watch):
    uniforms = uniforms.clone()
    uniforms[:len(prompts) // 2] = 1e-9             # picks the first word that has any probability: EOS
    return rollout(roles, prompts, uniforms, args, tokenizer, *watch)

rollout = ppo.rollout
runtime.checkpoint.finish = dist.barrier                    # the next run takes the process group over
for script, flags in json.load(open(sys.argv[-1])):
    ppo.rollout = uneven if script == "uneven" else rollout
    sys.argv = [script, *flags]
    {{"sft": sft, "reward": reward, "ppo": ppo, "uneven": ppo}}[script].main()
dist.destroy_process_group()
"""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tokenizer_file, pairs_file):
    """The files that $words in JOBS stand for. The model's answers end after a few words, and its ids 0 and
    1 have no probability at all, so that EOS (2) is the word that the smallest random numbers pick."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_llama(std=0.05)
    with torch.no_grad():                    # a constant in every hidden state shifts some words' logits
        model.model.embed_tokens.weight[:, 0] = 5
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[:2, 0] = -40
        model.lm_head.weight[2, 0] = 0.8
    model.save_pretrained(folder / "talker")
    copy_tokenizer(tokenizer_file.parent, folder / "talker")
    texts = [json.dumps({"text": f"the sky is blue {i}"}) + "\n" for i in range(20)]
    (folder / "text.jsonl").write_text("".join(texts))
    (folder / "gold.py").write_text("def gold(prompt, answer):\n    return len(answer)\n")
    return {"$talker": folder / "talker", "$pairs": pairs_file, "$text": folder / "text.jsonl",
            "$gold": folder / "gold.py"}


def start(script, *flags, ranks=0, env=None):
    result = run_script(script, *flags, ranks=ranks, timeout=900, env={"OMP_NUM_THREADS": "1", **(env or {})})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, inputs):
    """trained(job): the folder of its reference run, made when first asked for; trained.chain makes many
    others."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def fill(flags):
        if "--rollout-batch" not in flags:   # a flag of ppo.py alone
            flags = flags.replace("--gen-batch 3", "")
        return [str(trained(f[1:]) if f[0] == "@" else inputs.get(f, f)) for f in flags.split()]

    def trained(job, extra=REFERENCE, ranks=0, env=None):
        if (job, extra, ranks) not in folders:
            script, flags = JOBS[job]
            out = folders[job, extra, ranks] = root / f"{len(folders)}-{job}"
            if script == "uneven":
                chain({(job, extra): out}, ranks)
            else:
                start(f"{script}.py", *fill(f"{flags} {extra} --out {out}"), ranks=ranks, env=env)
        return folders[job, extra, ranks]

    def chain(folders, ranks):
        """Runs {(job, extra flags): folder to write}, one after the other."""
        runs = [(JOBS[job][0], fill(f"{JOBS[job][1]} {extra} --out {out}"))
                for (job, extra), out in folders.items()]
        (root / "chain.py").write_text(CHAIN.format(repo=str(REPO)))
        (root / "chain.json").write_text(json.dumps(runs))
        start(root / "chain.py", root / "chain.json", ranks=ranks)
        return folders

    trained.chain = lambda ranks, extras: chain(
        {(job, x): root / f"{job}-{ranks}-ranks-{i}" for job in JOBS for i, x in enumerate(extras)}, ranks)
    return trained


@pytest.fixture(scope="session")
def every_stage(request):
    return request.config.getoption("--full") or request.config.getoption("--sample")


@pytest.fixture(scope="session")
def on_one_rank(trained, every_stage):
    return trained.chain(0, ONE_RANK if every_stage else ONE_RANK[-1:])


@pytest.fixture(scope="session")
def on_two_ranks(trained, every_stage):
    return trained.chain(2, TWO_RANKS if every_stage else TWO_RANKS[-1:])


def but_last(flags):
    """The flags, all but the last of them marked `faults`."""
    return [*(pytest.param(x, marks=pytest.mark.faults) for x in flags[:-1]), flags[-1]]


def weights(folder):
    file = next(f for f in (folder / "model.safetensors", folder / "adapter_model.safetensors") if f.exists())
    return {name: read_tensor(file, name) for name in tensor_names(file)}


def all_weights(folder):
    """Those of the critic and of the moving average too, where there are any."""
    parts = [part for part in (".", "critic", "ema") if (folder / part).exists()]
    return {(part, name): tensor for part in parts for name, tensor in weights(folder / part).items()}


def samples(folder):
    file = folder / "samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_agree(run, reference, tolerance, extra=""):
    """Metrics and samples of two runs are equal to the tolerance, their answers are the same, their weights
    close."""
    incomparable = {"tokens_per_s", "grad_norm"} if "zero-stage 0" in extra else {"tokens_per_s"}
    for rows, others in ((metrics(run), metrics(reference)), (samples(run), samples(reference))):
        assert [row.keys() - incomparable for row in rows] == [row.keys() - incomparable for row in others]
        for row, other in zip(rows, others, strict=True):
            for key in row.keys() - incomparable:
                number = not isinstance(other[key], str)
                expected = pytest.approx(other[key], tolerance, tolerance) if number else other[key]
                assert row[key] == expected, f"{key} at step {row['step']}"
    new, old = all_weights(run), all_weights(reference)
    assert new.keys() == old.keys()
    for key in old:
        assert (new[key] - old[key]).abs().max() < 1e-4, key


# --------------------------------------------------------------------------------------- one meaning of batch
def tolerance(job, exact):
    """PPO's scores are divided by their standard deviation, which is 4e-4 here, so rounding errors grow two
    thousand times as large."""
    return 2e-4 if "ppo" in job else 2e-5 if exact else 1e-4


@pytest.mark.parametrize("extra", but_last(ONE_RANK))
@pytest.mark.parametrize("job", JOBS)
def test_results_do_not_depend_on_the_micro_batch(job, extra, trained, on_one_rank):
    assert_agree(on_one_rank[job, extra], trained(job), tolerance(job, "stage 3" not in extra), extra)


@pytest.mark.parametrize("extra", but_last(TWO_RANKS))
@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_give_what_one_rank_gives_in_every_zero_stage(job, extra, trained, on_two_ranks):
    assert_agree(on_two_ranks[job, extra], trained(job), tolerance(job, "stage 2" in extra), extra)


@pytest.mark.parametrize("job", ["sft", "ppo-one-base"])
def test_no_zero_stage_logs_a_gradient_of_zero(job, on_two_ranks):
    runs = [out for (name, _), out in on_two_ranks.items() if name == job]
    for out in runs:                         # one that is not known may be left out, but 0 would be false
        assert all(line.get("grad_norm", 1) > 0 for line in metrics(out)), out
    assert runs


@pytest.mark.faults
def test_the_launcher_without_a_compiler_gives_what_plain_python_gives(trained, tmp_path):
    compilers = ("cc", "gcc", "g++", "c++", "clang", "c89", "c99", "cpp", "nvcc", "ninja")
    for folder in filter(os.path.isdir, os.environ["PATH"].split(os.pathsep)):
        for program in Path(folder).iterdir():
            if not program.name.startswith(compilers) and not (tmp_path / program.name).exists():
                (tmp_path / program.name).symlink_to(program)
    assert not any(shutil.which(c, path=tmp_path) for c in compilers) and shutil.which("env", path=tmp_path)
    env = {"PATH": str(tmp_path), "CC": "/nonexistent", "CXX": "/nonexistent",
           "TORCH_EXTENSIONS_DIR": str(tmp_path / "new")}
    assert_agree(trained("sft", ranks=2, env=env), trained("sft"), 1e-5)


def test_two_seeded_runs_are_equal_bit_for_bit(trained):
    once, again = trained("ppo-one-base"), trained("ppo-one-base", ranks=1)  # the second one by the launcher
    for a, b in zip(metrics(once), metrics(again), strict=True):
        assert {**a, "tokens_per_s": 0} == {**b, "tokens_per_s": 0}
    assert samples(once) == samples(again)
    for folder in (".", "critic", "ema"):
        file = Path(folder, "adapter_model.safetensors")
        assert (once / file).read_bytes() == (again / file).read_bytes()


# -------------------------------------------------------------------------------------------- what is learned
@pytest.mark.parametrize("job", ["sft", "sft-lora"])
def test_fine_tuning_lowers_the_held_out_perplexity(job, trained):
    perplexities = [line["eval_ppl"] for line in metrics(trained(job)) if "eval_ppl" in line]
    assert len(perplexities) == 3 and perplexities[2] < perplexities[1] < perplexities[0]


@pytest.mark.parametrize("job", ["reward", "reward-lora"])
def test_reward_training_widens_the_held_out_margin(job, trained):
    lines = [line for line in metrics(trained(job)) if "margin" in line]
    assert lines[-1]["margin"] > lines[0]["margin"]
    stats = json.loads((trained(job) / "reward_stats.json").read_text())
    assert stats.keys() == {"mean", "std", "n", "accuracy"}
    assert stats["mean"] == lines[-1]["mean"] and stats["std"] > 0


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("ppo")])
def test_ppo_starts_at_ratio_one_and_no_kl_and_then_moves(job, trained):
    steps = [line for line in metrics(trained(job)) if "kl" in line]
    assert all(line["first_ratio"] == pytest.approx(1, abs=1e-5) for line in steps)
    assert steps[0]["kl"] == 0 and abs(steps[1]["kl"]) > 1e-5
    # the answers are of many lengths
    assert all(line["eos_share"] > 0 and 1 < line["length"] < 8 for line in steps)


def test_bf16_starts_near_ratio_one(trained):
    steps = [line for line in metrics(trained("ppo-one-base", f"{REFERENCE} --dtype bf16")) if "kl" in line]
    assert steps[0]["kl"] == 0 and all(line["first_ratio"] == pytest.approx(1, abs=0.05) for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)


def test_uneven_answers_are_one_token_on_one_side_of_the_batch(trained):
    steps = [line for line in metrics(trained("ppo-uneven")) if "length" in line]
    assert all(line["eos_share"] >= 0.5 and line["length"] >= 1.5 for line in steps)
    responses = [row["response"] for row in samples(trained("ppo-uneven"))[:5]]      # those before training
    assert responses[:2] == ["", ""] and any(responses[2:])


# ------------------------------------------------------------------------------------------------ the folders
IDS = torch.tensor([[1, 300, 7, 44, 2, 301, 19]])
EVERYWHERE = torch.ones_like(IDS, dtype=torch.bool)


def load_elsewhere(folder, kind):
    """The model in a folder as transformers loads it, or PEFT where it is an adapter."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    if not (folder / "adapter_config.json").exists():
        return getattr(transformers, kind).from_pretrained(folder)
    labels = {"num_labels": 1, "pad_token_id": 0} if "Sequence" in kind else {}
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return peft.PeftModel.from_pretrained(getattr(transformers, kind).from_pretrained(base, **labels), folder)


@torch.no_grad()
@pytest.mark.parametrize("job, part", [("sft", "."), ("sft-lora", "."), ("ppo", "."), ("ppo", "ema"),
                                       ("ppo-new-lora", "."), ("ppo-one-base", "."), ("ppo-one-base", "ema")])
def test_transformers_and_peft_load_the_language_models(job, part, trained):
    folder = trained(job) / part
    ours = load_model(folder)(IDS, EVERYWHERE)
    theirs = load_elsewhere(folder, "AutoModelForCausalLM")(IDS).logits
    assert (theirs - ours).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("job, part", [("reward", "."), ("reward-lora", "."), ("ppo", "critic"),
                                       ("ppo-one-base", "critic")])
def test_transformers_and_peft_load_the_reward_models(job, part, trained):
    folder = trained(job) / part
    ours = load_reward_model(folder)(IDS, EVERYWHERE)[:, -1:]
    theirs = load_elsewhere(folder, "AutoModelForSequenceClassification")(IDS).logits
    assert ours.abs() > 1e-3 and (theirs - ours).abs().max() < 1e-4


@pytest.mark.parametrize("job, part", [("sft", "."), ("reward-lora", "."), ("ppo-one-base", "ema"),
                                       ("ppo-one-base", "critic")])
def test_transformers_gives_the_ids_of_the_tokenizer(job, part, trained):
    text = "\n\nHuman: why is the sky blue today\n\nAssistant:"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained(job) / part)         # needs protobuf
    assert theirs(text).input_ids == [1, *Tokenizer(trained(job) / part).encode(text)]


@pytest.mark.parametrize("job", ["ppo", "ppo-one-base"])
def test_the_moving_average_lies_between_the_first_actor_and_the_last(job, trained):
    folders = (trained(JOBS[job][1].split()[1][1:]), trained(job), trained(job) / "ema")
    first, last, average = (weights(folder) for folder in folders)
    way = [float((average[k] - first[k]).norm() / (last[k] - first[k]).norm()) for k in last
           if ".lora_A" in k or ".mlp" in k]
    # were all of the way the first of the 8 updates, the share would be 1 - 0.9^8 = 0.57
    assert way and all(0.05 < share < 0.6 for share in way)


@pytest.mark.parametrize("job", ["ppo-one-base", "ppo"])
def test_the_saved_critic_has_moved_away_from_the_reward_model(job, trained):
    reward, critic = weights(trained(JOBS[job][1].split()[3][1:])), weights(trained(job) / "critic")
    moved = {key: float((critic[key] - reward[key]).abs().max()) for key in reward}
    trained_keys = [key for key in moved if "lora_" in key or "score" in key or "_proj" in key]
    assert trained_keys and all(moved[key] > 0 for key in trained_keys)


def test_training_leaves_the_base_of_an_adapter_alone(trained, inputs):
    config = json.loads((trained("ppo-one-base") / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == inputs["$talker"].resolve()
    assert config["task_type"] == "CAUSAL_LM"
    assert {f.name for f in inputs["$talker"].iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}


# ---------------------------------------------------------------------------------------- the record of a run
@pytest.mark.parametrize("job", JOBS)
def test_args_json_and_metrics_say_how_the_run_went(job, trained, on_two_ranks):
    flags = json.loads((trained(job) / "args.json").read_text())
    assert flags["seed"] == 1234 and flags["micro_batch"] == 1
    assert flags["zero_stage"] == 2 and flags["world_size"] == 1
    assert flags["versions"]["torch"] == torch.__version__ and flags["versions"]["deepspeed"]
    assert json.loads((on_two_ranks[job, TWO_RANKS[-1]] / "args.json").read_text())["world_size"] == 2
    lines = metrics(trained(job))
    numbers = [line["step"] for line in lines]
    assert numbers == sorted(numbers) and numbers[0] == 0
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, flags["steps"] + 1))
    assert all(line["skipped"] == 0 and line["tokens_per_s"] > 0 for line in lines if "lr" in line)


def test_ppo_logs_every_measure_and_keeps_its_samples(trained):
    lines, rows = metrics(trained("ppo-one-base")), samples(trained("ppo-one-base"))
    steps = [line for line in lines if "lr" in line]
    measures = {"step", "epoch", "score", "kl", "length", "eos_share", "policy_loss", "value_loss",
                "ptx_loss", "approx_kl", "first_ratio", "clip_frac", "entropy", "explained_var", "beta", "lr",
                "grad_norm", "skipped", "tokens_per_s"}
    assert steps and all(line.keys() == measures for line in steps)
    assert [row["step"] for row in rows] == [0] * 5 + [2] * 5 and rows[0]["prompt"] == rows[5]["prompt"]
    assert all(row["gold"] == len(row["response"]) and row["prompt"].endswith("Assistant:") for row in rows)
    assert all(row["kl"] == 0 for row in rows[:5]) and any(row["kl"] != 0 for row in rows[5:])
    evaluations = [line for line in lines if "gold" in line]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert evaluations[0]["gold"] == pytest.approx(sum(row["gold"] for row in rows[:5]) / 5)


def test_beta_is_steered_towards_the_target_of_the_kl(trained):
    first, second = (line for line in metrics(trained("ppo-one-base")) if "beta" in line)
    # the KL of the first step is 0, which is below the target
    assert first["beta"] == 0.02 and second["beta"] == pytest.approx(0.02 * (1 - 0.1 * 0.2))
