"""What the three steps did to the toy: answers of base, SFT and RLHF side by side with their true worth, and a table.

    python -m toy.show            # after sft.py, reward.py and ppo.py without flags
"""
import json
import sys
import textwrap
from pathlib import Path

import torch

from data import Tokenizer, collate_prompts
from llama import BadInput, Llama
from toy import MADE, MADE_BY
from toy.gold import FACT_OF, gold

SHOWN, WIDTH = 8, 30


def read_lines(run, name):
    path = Path("runs/toy") / run / name
    if not path.exists():
        raise BadInput(f"{path}: is not there yet; `{MADE_BY[f'runs/toy/{run}']}` makes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


def base_answers(prompts):
    """What the base model says, which has seen questions and answers, but never the template."""
    tokenizer, model = Tokenizer(MADE / "base"), Llama.from_pretrained(MADE / "base")
    ids, mask = collate_prompts([[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts])
    torch.manual_seed(0)
    answers, answer_mask = model.generate(ids, mask, 24, eos_id=tokenizer.eos_id)
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(answers, answer_mask)]


def columns(*cells):
    """Prints cells side by side, each wrapped to WIDTH."""
    printable = ["".join(c for c in " ".join(cell.split()) if c.isprintable()) for cell in cells]     # no controls
    wrapped = [textwrap.wrap(cell, WIDTH) or [""] for cell in printable]
    for n in range(max(map(len, wrapped))):
        print(" | ".join((lines[n] if n < len(lines) else "").ljust(WIDTH) for lines in wrapped).rstrip())
    print("-+-".join("-" * WIDTH for _ in cells))


def main():
    samples = read_lines("ppo", "samples.jsonl")
    before, after = ([row for row in samples if row["step"] == step] for step in (0, samples[-1]["step"]))
    prompts = [row["prompt"] for row in before]
    base = base_answers(prompts)
    columns("held-out question", "base", "after SFT", "after RLHF")
    kinds = {}                               # questions of all kinds, in turn
    for i, prompt in enumerate(prompts):
        question = prompt.rpartition("Human:")[2].rpartition("Assistant:")[0].strip()
        kinds.setdefault(FACT_OF[question][0], {}).setdefault(question, i)   # its first answer of four
    for question, i in [q for turn in zip(*(asked.items() for asked in kinds.values())) for q in turn][:SHOWN]:
        said = [base[i], before[i]["response"], after[i]["response"]]
        columns(question, *(f"{text} [{gold(question, text):.1f}]" for text in said))

    mean = {"base": sum(map(gold, prompts, base)) / len(base)}
    mean |= {name: sum(row["gold"] for row in rows) / len(rows) for name, rows in (("SFT", before), ("RLHF", after))}
    perplexity = [line["eval_ppl"] for line in read_lines("sft", "metrics.jsonl") if "eval_ppl" in line]
    accuracy = [line["accuracy"] for line in read_lines("reward", "metrics.jsonl") if "accuracy" in line]
    last = [line for line in read_lines("ppo", "metrics.jsonl") if "eval_kl" in line][-1]
    print(f"""
step        measured on held-out questions            before    after
sft.py      perplexity of the answers               {perplexity[0]:8.2f} {perplexity[-1]:8.2f}
sft.py      gold, the true worth of an answer       {mean['base']:8.2f} {mean['SFT']:8.2f}
reward.py   pairs ranked as the labels say (5 % lie){accuracy[0]:8.2f} {accuracy[-1]:8.2f}
ppo.py      gold                                    {mean['SFT']:8.2f} {mean['RLHF']:8.2f}
ppo.py      KL to the reference, nats per answer    {0:8.2f} {last['eval_kl']:8.2f}

pictures: runs/toy/sft/curves.png runs/toy/reward/curves.png runs/toy/ppo/curves.png""")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
