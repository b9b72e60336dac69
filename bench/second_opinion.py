"""What a second reward model says: of a reward model's held-out pairs, and of PPO's answers before and after.

PPO raises the score of the reward model that it is trained on; whether the answers became better is for
someone else to say. Here that is a reward model trained on pairs that the first one never saw. The models
answer the same held-out prompts with the same random numbers, so differences are taken per prompt.

    python bench/second_opinion.py --reward runs/rm2 --data pairs.jsonl --models runs/sft runs/ppo
    python bench/second_opinion.py --reward runs/rm --data pairs.jsonl                # its accuracy alone

Pairs and prompts are those of one step's share of the file (--split, --phase), which the reward model of
--reward must not have seen. docs/results.md has the results.
"""
import argparse
import math
from pathlib import Path

import torch
from common import table

from data import (
    Tokenizer,
    collate_pairs,
    collate_prompts,
    encode_pair,
    encode_prompt,
    open_tokenizer,
    read_records,
    split_records,
)
from llama import Llama, is_eos
from lora import load_model
from reward import RewardModel, last_scores, load_reward_model
from runtime.flags import DTYPES, shares
from runtime.votes import wilson

def get_args():
    parser = argparse.ArgumentParser(description="Scores pairs and answers by a second reward model.")
    parser.add_argument("--reward", required=True, help="folder of the reward model that judges")
    parser.add_argument("--data", required=True, help="file of pairs")
    parser.add_argument("--split", type=shares, default="4,4,2", help="shares of the steps in that file")
    parser.add_argument("--split-seed", type=int, default=1234)
    parser.add_argument("--phase", type=int, default=2, help="the share that is used: 0, 1 or 2")
    parser.add_argument("--models", nargs="+", default=[], help="folders of language models that answer")
    parser.add_argument("--n", type=int, default=256, help="pairs and prompts, at most")
    parser.add_argument("--max-len", type=int, default=384, help="tokens of a pair's prompt and answer")
    parser.add_argument("--max-new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    return parser.parse_args()


def mean_interval(x: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval of a mean, from the standard error."""
    half = 1.96 * float(x.std()) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


@torch.no_grad()
def judge_pairs(judge: RewardModel, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair: 1 where the chosen answer scores higher, and 1 where it is the shorter one (half a
    point where both are equally long)."""
    right, shorter = [], []
    for at in range(0, len(rows), 8):
        ids, mask, _ = collate_pairs(rows[at:at + 8])
        chosen, rejected = last_scores(judge(ids, mask), mask).chunk(2)
        right += (chosen > rejected).tolist()
        shorter += [(len(c) < len(r)) + (len(c) == len(r)) / 2 for c, r, _ in rows[at:at + 8]]
    return torch.tensor(right, dtype=torch.float64), torch.tensor(shorter, dtype=torch.float64)


@torch.no_grad()
def judge_answers(judge: RewardModel, model: Llama, tokenizer: Tokenizer, prompts: list, args
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each prompt: the judge's score of the model's answer, its length, and whether it ended."""
    uniforms = torch.rand(len(prompts), args.max_new, generator=torch.Generator().manual_seed(args.seed))
    scores, lengths, ended = [], [], []
    for at in range(0, len(prompts), 16):
        ids, mask = collate_prompts(prompts[at:at + 16])
        response, response_mask = model.generate(ids, mask, args.max_new, eos_id=tokenizer.eos_ids,
                                                 uniforms=uniforms[at:at + 16])
        whole = torch.cat([mask, response_mask], 1)
        scores += last_scores(judge(torch.cat([ids, response], 1), whole), whole).tolist()
        lengths += response_mask.sum(1).tolist()
        ended += (is_eos(response, tokenizer.eos_ids) & response_mask).any(1).tolist()
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (scores, lengths, ended))


def main():
    args = get_args()
    tokenizer, _, _ = open_tokenizer(args.reward)
    judge = load_reward_model(args.reward, DTYPES[args.dtype]).eval()
    records = read_records(args.data)
    if args.split:
        records = split_records(records, args.split, args.phase, args.split_seed)
    rows = [row for record in records if (row := encode_pair(tokenizer, record, args.max_len))][:args.n]
    right, shorter = judge_pairs(judge, rows)
    table([f"{len(rows)} pairs that {Path(args.reward).name} never saw", "share right", "95 % interval"],
          [(what, f"{x.mean():.3f}", "{:.3f} to {:.3f}".format(*wilson(float(x.sum()), len(x))))
           for what, x in (("the reward model", right), ("the shorter answer", shorter))])
    if not args.models:
        return
    longest = args.max_len - args.max_new
    prompts = [ids for record in records if (ids := encode_prompt(tokenizer, record, longest))][:args.n]
    found = []
    for folder in args.models:
        own, model = open_tokenizer(folder)[0], load_model(folder, DTYPES[args.dtype])
        model.n_words = own.vocab_size       # larger ids are never sampled
        found.append(judge_answers(judge, model, own, prompts, args))
    first, lines = found[0][0], []
    for folder, (scores, lengths, ended) in zip(args.models, found, strict=True):
        gain = scores - first
        low, high = mean_interval(gain)
        lines.append((folder, f"{scores.mean():.3f}", f"{gain.mean():.3f} ({low:.3f} to {high:.3f})",
                      f"{(gain > 0).double().mean():.2f}", f"{lengths.mean():.1f}", f"{ended.mean():.2f}"))
    table([f"answers to {len(prompts)} prompts, judged by {Path(args.reward).name}", "score",
           "gain over the first (95 %)", "better answers", "tokens", "ended"], lines)


if __name__ == "__main__":
    main()
