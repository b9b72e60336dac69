"""TRL's PPO trainer on the models and prompts of ppo_step.py, in a process of its own.

    python bench/trl_ppo.py FOLDER --new 64 --steps 4 [--lora] [--tuned]

prints the seconds of each step as JSON. --tuned leaves out the gradient checkpointing that is TRL's
default, which saves memory and costs time.
"""
import argparse
import contextlib
import itertools
import json
import sys
import time
from pathlib import Path

import tokenizers
import transformers
from common import ALPHA, RANK, TARGETS
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

from data import Tokenizer, encode_prompt, read_records

def get_args():
    parser = argparse.ArgumentParser(description="Times the steps of TRL's PPO trainer.")
    parser.add_argument("folder", type=Path, help="models and prompts of ppo_step.py")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--tuned", action="store_true")
    return parser.parse_args()


class Clock(transformers.TrainerCallback):
    """Notes when training begins and when each step ends."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, *_, **__):
        self.times.append(time.perf_counter())

    on_step_end = on_train_begin


def peer_tokenizer(words):
    """The same words as a tokenizer of transformers."""
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>", pad_token="<unk>", bos_token="<s>",
        eos_token="</s>", padding_side="left")


def main():
    args = get_args()
    ours = Tokenizer(args.folder / "base")
    prompts = [{"input_ids": encode_prompt(ours, record, 64)}
               for record in read_records(args.folder / "prompts.jsonl")]
    base, scorer = args.folder / "base", args.folder / "reward"
    policy = AutoModelForCausalLM.from_pretrained(base)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(scorer) for _ in range(2))
    reference, adapters = None, None         # with LoRA, the reference is the policy without its adapter
    if args.lora:
        adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    else:
        reference = AutoModelForCausalLM.from_pretrained(base)
    config = PPOConfig(
        output_dir=args.folder / "trl", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
        total_episodes=args.batch * args.steps, num_ppo_epochs=2, num_mini_batches=1, temperature=1.0,
        response_length=args.new, num_sample_generations=0, eval_strategy="no",
        **({"gradient_checkpointing": False} if args.tuned else {}))
    clock = Clock()
    with contextlib.redirect_stdout(sys.stderr):
        trainer = PPOTrainer(
            args=config, processing_class=peer_tokenizer(ours.pieces()), model=policy, ref_model=reference,
            reward_model=reward, value_model=value, peft_config=adapters, callbacks=[clock],
            train_dataset=Dataset.from_list(prompts), eval_dataset=Dataset.from_list(prompts[:args.batch]))
        trainer.train()
    print(json.dumps([end - start for start, end in itertools.pairwise(clock.times)]))


if __name__ == "__main__":
    main()
