"""The peer of ppo_step.py: TRL's PPO trainer on the same models and prompts, in a process of its own.

    python bench/trl_ppo.py FOLDER --new 64 --steps 4 [--lora] [--tuned]

prints the seconds of each step as JSON. --tuned leaves out the gradient checkpointing that is TRL's default, which
saves memory and costs time.
"""
import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import tokenizers
from datasets import Dataset
from peft import LoraConfig
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast,
                          TrainerCallback)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from common import ALPHA, RANK, TARGETS
from data import Tokenizer, encode_prompt, read_records

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--new", type=int, default=64)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--lora", action="store_true")
parser.add_argument("--tuned", action="store_true")
args = parser.parse_args()


class Clock(TrainerCallback):
    times = []

    def on_train_begin(self, *_, **__):
        self.times.append(time.perf_counter())

    on_step_end = on_train_begin


words = Tokenizer(args.folder / "base").pieces()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")),
    unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left")
prompts = [{"input_ids": encode_prompt(Tokenizer(args.folder / "base"), record, 64)}
           for record in read_records(args.folder / "prompts.jsonl")]
policy, reference = (AutoModelForCausalLM.from_pretrained(args.folder / "base") for _ in range(2))
value, reward = (AutoModelForSequenceClassification.from_pretrained(args.folder / "reward") for _ in range(2))
adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM") if args.lora else None
config = PPOConfig(output_dir=args.folder / "trl", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                   disable_tqdm=True, per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
                   total_episodes=args.batch * args.steps, num_ppo_epochs=2, num_mini_batches=1, temperature=1.0,
                   response_length=args.new, num_sample_generations=0, eval_strategy="no",
                   **({"gradient_checkpointing": False} if args.tuned else {}))
with contextlib.redirect_stdout(sys.stderr):
    PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=None if args.lora else reference,
               reward_model=reward, value_model=value, peft_config=adapters, callbacks=[Clock()],
               train_dataset=Dataset.from_list(prompts), eval_dataset=Dataset.from_list(prompts[:args.batch])).train()
print(json.dumps([b - a for a, b in zip(Clock.times, Clock.times[1:])]))
