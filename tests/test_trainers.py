"""The three trainers from end to end, as a user starts them: plain `python X.py`, and through deepspeed's launcher."""
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from conftest import REPO, metrics, run_script, tiny_llama
from data import Tokenizer
from llama import Llama, copy_tokenizer, read_tensor
from lora import load_model
from reward import load_reward_model

pytestmark = pytest.mark.slow

# Rates at which three steps move the weights well beyond rounding: runs that agree have trained alike, not stood still.
STEPS = "--steps 3 --log-every 1 --eval-every 2"
LORA = "--lora-rank 4 --lora-targets q_proj,v_proj,down_proj"
FIRST_STEPS = f"--max-len 64 --batch 8 --lr 1e-3 {STEPS}"
PPO = ("--max-prompt 32 --max-new 16 --rollout-batch 16 --mini-batch 8 --ppo-epochs 2 --actor-lr 1e-3 --critic-lr 1e-3 "
       f"{STEPS}")
# every optional part of PPO at once
EXTRAS = ("--ptx-data $text --ptx-coef 0.5 --ema 0.9 --kl-target 0.01 --missing-eos-penalty 0.5 --reward-norm rollout "
          "--norm-prompts 11 --gold $gold --save-critic --checkpointing")
# name: (script, flags); @name stands for the folder of another run
JOBS = {
    "sft": ("sft", f"--model $talker --data $pairs {FIRST_STEPS}"),
    "sft-lora": ("sft", f"--model $talker --data $pairs {LORA} {FIRST_STEPS}"),
    "reward": ("reward", f"--model $talker --data $pairs {FIRST_STEPS}"),
    "reward-lora": ("reward", f"--model $talker --data $pairs --loss dense --checkpointing {LORA} {FIRST_STEPS}"),
    "ppo": ("ppo", f"--actor @sft --reward @reward --data $pairs --ema 0.9 --save-critic {PPO}"),
    "ppo-new-lora": ("ppo", f"--actor @sft --reward @reward --data $pairs {LORA} {PPO}"),
    "ppo-one-base": ("ppo", f"--actor @sft-lora --reward @reward-lora --data $pairs {EXTRAS} {PPO}"),
    # half of the batch answers with EOS alone: of two ranks one has answers of one token, the other of many
    "ppo-uneven": ("uneven", f"--actor @sft-lora --reward @reward-lora --data $pairs {PPO}"),
}
# Importing torch and deepspeed takes longer than these trainings, so this runs many in one process, or in one per rank.
CHAIN = """
import json, sys
sys.path.insert(0, {repo!r})
import torch.distributed as dist
import sft, reward, ppo

def uneven(roles, prompts, uniforms, args, tokenizer):
    uniforms = uniforms.clone()
    uniforms[:len(prompts) // 2] = 1e-9             # picks the first word of any probability, which is EOS
    return rollout(roles, prompts, uniforms, args, tokenizer)

rollout = ppo.rollout
for module in (sft, reward, ppo):
    module.finish = dist.barrier                    # the next run takes the process group over
for script, flags in json.load(open(sys.argv[-1])):
    ppo.rollout = uneven if script == "uneven" else rollout
    sys.argv = [script, *flags]
    {{"sft": sft, "reward": reward, "ppo": ppo, "uneven": ppo}}[script].main()
dist.destroy_process_group()
"""
ONE_RANK = ["--micro-batch 8 --zero-stage 0", "--micro-batch 4 --zero-stage 3"]
TWO_RANKS = ["--micro-batch 4 --zero-stage 0", "--micro-batch 2 --zero-stage 1", "--micro-batch 1 --zero-stage 2",
             "--micro-batch 2 --zero-stage 3"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tokenizer_file, pairs_file):
    """The paths that $words in JOBS stand for. The model's answers end after some words, and its ids 0 and 1 have no
    probability at all: EOS (2) is the word that the smallest random numbers pick."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_llama(std=0.05)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[:2, 0] = -40
        model.lm_head.weight[2, 0] = 0.8
    model.save_pretrained(folder / "talker")
    copy_tokenizer(tokenizer_file.parent, folder / "talker")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"the sky is blue {i}"}) + "\n" for i in range(20)))
    (folder / "gold.py").write_text("def gold(prompt, answer):\n    return answer.count('e')\n")
    return {"$talker": folder / "talker", "$pairs": pairs_file, "$text": folder / "text.jsonl", "$gold": folder / "gold.py"}


def succeeded(result):
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, inputs):
    """trained(job): the folder of a plain `python` run of it in micro-batches of one row, made when first asked for."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def fill(flags):
        return [str(trained(f[1:]) if f[0] == "@" else inputs.get(f, f)) for f in flags.split()]

    def trained(job, ranks=0, env=None, extra="--micro-batch 1"):
        key = (job, ranks, extra)
        if key not in folders:
            script, flags = JOBS[job]
            folders[key] = root / f"{job}-{len(folders)}"
            flags = fill(f"{flags} {extra} --out {folders[key]}")
            if script == "uneven":
                succeeded(chain([(script, flags)], ranks))
            else:
                succeeded(run_script(f"{script}.py", *flags, ranks=ranks, env=env))
        return folders[key]

    def chain(runs, ranks):
        (root / "chain.py").write_text(CHAIN.format(repo=str(REPO)))
        (root / "chain.json").write_text(json.dumps(runs))
        return run_script(root / "chain.py", root / "chain.json", ranks=ranks)

    def variants(ranks, extras):
        """{(job, flags): folder} of every job with each of these flags."""
        made = {(job, extra): root / f"{ranks}-{job}{extra}".replace(" ", "") for job in JOBS for extra in extras}
        succeeded(chain([(JOBS[job][0], fill(f"{JOBS[job][1]} {extra} --out {out}"))
                         for (job, extra), out in made.items()], ranks))
        return made

    trained.variants = variants
    return trained


@pytest.fixture(scope="session")
def on_one_rank(trained):
    return trained.variants(0, ONE_RANK)


@pytest.fixture(scope="session")
def on_two_ranks(trained):
    return trained.variants(2, TWO_RANKS)


def test_tmp(trained):
    for j in JOBS: print(j, trained(j))

def test_tmp1(on_one_rank):
    pass

def test_tmp2(on_two_ranks):
    pass
