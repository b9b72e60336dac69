"""What the steps did to the toy, read from their folders in runs/toy.

    python -m toy.show sft    # after `deepspeed sft.py`: what came out of that step; reward and ppo likewise
    python -m toy.show        # after all three steps: answers of base, SFT and RLHF, and a table
"""
import argparse
import json
import textwrap
from pathlib import Path
from statistics import mean

import torch

from data import Tokenizer, collate_prompts
from llama import Llama
from runtime.errors import exit_with_one_line
from runtime.flags import check_toy
from toy import MADE
from toy.gold import FACT_OF, gold, question_of
from toy.world import NOISE

SHOWN, WIDTH = 8, 79                         # questions; columns of a terminal

def read_lines(run: str, name: str) -> list[dict]:
    """The JSON lines of a file in runs/toy. BadInput names the command that makes a missing one."""
    path = f"runs/toy/{run}/{name}"
    check_toy(path)
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def before_and_after(lines: list[dict], key: str) -> tuple[float, float]:
    """The first and the last value of a metric."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return values[0], values[-1]

# ------------------------------------------------------------ in words
def sft_result(lines: list[dict]) -> str:
    """What came out of sft.py, from the lines of its metrics.jsonl."""
    before, after = before_and_after(lines, "eval_ppl")
    return (f"The perplexity of held-out answers was {before:.2f} before the step and is {after:.2f} "
            f"after it. A perplexity of {after:.2f} means that at each token the model is, on average, as "
            f"unsure as in a choice among {after:.2f} equally likely tokens.")

def reward_result(lines: list[dict]) -> str:
    """What came out of reward.py, from the lines of its metrics.jsonl."""
    before, after = before_and_after(lines, "accuracy")
    return (f"The reward model scored the answer that is labelled better higher in {before:.0%} of the "
            f"held-out pairs before the step. After it, the share is {after:.0%}. Guessing reaches 50%. "
            f"Perfect knowledge reaches {1 - NOISE:.0%}, because {NOISE:.0%} of the labels are wrong.")

def ppo_result(lines: list[dict]) -> str:
    """What came out of ppo.py, from the lines of its metrics.jsonl."""
    score, true, kl = (before_and_after(lines, key) for key in ("eval_score", "gold", "eval_kl"))
    return (f"On held-out questions, the mean score of the answers was {score[0]:.2f} standard deviations "
            f"before the step and is {score[1]:.2f} after it. The mean true reward (gold) was {true[0]:.2f} "
            f"and is {true[1]:.2f}; the best answers get 1. The model has moved away from the SFT model by a "
            f"KL divergence of {kl[1]:.1f} nats per answer.")

RESULTS = {"sft": sft_result, "reward": reward_result, "ppo": ppo_result}

def paragraph(text: str) -> str:
    """The text in lines that fit a terminal of 80 columns."""
    return textwrap.fill(text, WIDTH)

# ------------------------------------------------------------ all three steps
def base_answers(prompts: list[str]) -> list[str]:
    """Answers of the base model, which has read questions and answers but has never seen the template."""
    check_toy("toy/made/base")
    return sampled(MADE / "base", prompts, seed=0)

def sampled(folder: str | Path, prompts: list[str], seed: int) -> list[str]:
    """An answer of a model to each prompt, at temperature 1."""
    tokenizer, model = Tokenizer(folder), Llama.from_pretrained(folder)
    ids, mask = collate_prompts([[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts])
    torch.manual_seed(seed)
    answers, answer_mask = model.generate(ids, mask, 24, eos_id=tokenizer.eos_ids)
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(answers, answer_mask, strict=True)]

def chosen_rows(prompts: list[str]) -> list[int]:
    """The rows of SHOWN questions, from all kinds in turn; of a question's four rows, the first."""
    kinds = {}
    for i, prompt in enumerate(prompts):
        question = question_of(prompt)
        kinds.setdefault(FACT_OF[question][0], {}).setdefault(question, i)
    turns = zip(*(rows.values() for rows in kinds.values()), strict=False)
    return [i for turn in turns for i in turn][:SHOWN]

def side_by_side(question: str, answers: dict[str, str]) -> str:
    """A question and, below it, the answer of each model with its true reward in brackets."""
    lines = [question]
    for name, answer in answers.items():
        printable = "".join(c for c in " ".join(answer.split()) if c.isprintable())
        lines += textwrap.wrap(f"{name:10} [{gold(question, answer):.1f}]  {printable}", WIDTH,
                               initial_indent="  ", subsequent_indent=" " * 20)
    return "\n".join(lines)

def table(golds: dict[str, float]) -> str:
    """What each step measured before and after; golds is the mean true reward of base, SFT and RLHF."""
    def measured(step, key):
        return before_and_after(read_lines(step, "metrics.jsonl"), key)

    rows = [("sft.py", "perplexity of the answers", *measured("sft", "eval_ppl")),
            ("sft.py", "true reward (gold) of an answer", golds["base"], golds["SFT"]),
            ("reward.py", f"share of pairs ranked as labelled ({NOISE:.0%} mislabelled)",
             *measured("reward", "accuracy")),
            ("ppo.py", "true reward (gold) of an answer", golds["SFT"], golds["RLHF"]),
            ("ppo.py", "KL to the reference, nats per answer", 0.0, measured("ppo", "eval_kl")[1])]
    lines = [f"{'step':10} {'measured on held-out questions':51} before   after"]
    lines += [f"{step:10} {what:50} {before:7.2f} {after:7.2f}" for step, what, before, after in rows]
    return "\n".join(lines)

def compare():
    """Prints the answers of the three models to some held-out questions, and the table."""
    samples = read_lines("ppo", "samples.jsonl")
    steps = (0, samples[-1]["step"])
    before, after = ([row for row in samples if row["step"] == step] for step in steps)
    prompts = [row["prompt"] for row in before]
    base = base_answers(prompts)
    print(paragraph("Answers to held-out questions, sampled at temperature 1, each with its true reward "
                    "(gold): right and friendly 1, right and curt 0.6, unsure 0.2, wrong 0.1, "
                    "rude or broken 0."))
    for i in chosen_rows(prompts):
        answers = {"base": base[i], "after SFT": before[i]["response"], "after RLHF": after[i]["response"]}
        print("\n" + side_by_side(question_of(prompts[i]), answers))
    golds = {"base": mean(map(gold, prompts, base)), "SFT": mean(row["gold"] for row in before),
             "RLHF": mean(row["gold"] for row in after)}
    print(f"\n{table(golds)}\n\nCurves: runs/toy/sft/curves.png, and so in runs/toy/reward and runs/toy/ppo.")

def main():
    parser = argparse.ArgumentParser(prog="python -m toy.show", description="What the steps did to the toy.")
    parser.add_argument("step", nargs="?", choices=RESULTS, help="in words, what came out of this step alone")
    step = parser.parse_args().step
    if step:
        print(paragraph("Result: " + RESULTS[step](read_lines(step, "metrics.jsonl"))))
    else:
        compare()

if __name__ == "__main__":
    exit_with_one_line(main)
