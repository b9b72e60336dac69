"""How many votes does the lesson need? A rule votes in it, for several numbers of votes and several seeds.

    python -m toy.how_many                       # both rules, 10 to 400 votes, three seeds: half an hour
    python -m toy.how_many --alone               # the reward model learns from the votes alone
    python -m toy.how_many --rules curt --votes 25 50 --seeds 1

A line of the table is the mean over the seeds, with the smallest and largest value in brackets. The line of 0
votes is where the lesson starts. A seed draws other questions, answers and held-out votes, and trains in
another order; the SFT model is always the demo's. Agreement is the reward model's with votes of the same rule
on fresh pairs of answers to held-out questions. The columns after it are about the answers after PPO to such
questions.
"""
import argparse
from statistics import mean

from runtime.errors import exit_with_one_line
from runtime.flags import check_toy
from toy.rules import RULES
from toy.seeds import step
from toy.vote import REWARD, RUNS, SFT, agreement, measured, ppo_flags, reward_flags, rule_votes

HEADER = ("rule", "votes", "pairs seen", "agreement", "as voted for", "gold", "tokens", "KL, nats")

def point(rule: str, n: int, seed: int, alone: bool) -> tuple[list[float], list[float]]:
    """What stands under HEADER behind the number of votes, before the lesson and after it."""
    folder = RUNS / "how-many" / f"{rule}-{n}-{seed}{'-alone' * alone}"
    folder.mkdir(parents=True, exist_ok=True)
    shown = rule_votes(rule, n, folder, seed)
    step("reward", seed, folder, **reward_flags(folder, alone))
    step("ppo", seed, folder, **ppo_flags(folder))
    before, after, held_out = agreement(folder)
    liked, _, gold, length, kl = (numbers for _, *numbers in measured(folder, rule))
    pairs = zip((0, shown), (before / held_out, after / held_out), liked, gold, length, kl, strict=True)
    return tuple(map(list, pairs))

def line(rule: str, n: int, points: list[list[float]]) -> str:
    """A line of the table: for each column the mean over the seeds, and the range where they differ."""
    cells = [rule, str(n)]
    for values in zip(*points, strict=True):
        digits = 0 if isinstance(values[0], int) else 1 if max(values) > 1.5 else 2
        low, middle, high = (f"{x:.{digits}f}" for x in (min(values), mean(values), max(values)))
        cells.append(middle if low == high else f"{middle} ({low} to {high})")
    return f"| {' | '.join(cells)} |"

def main():
    parser = argparse.ArgumentParser(prog="python -m toy.how_many", description="How many votes are needed?")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES])
    parser.add_argument("--votes", nargs="+", type=int, default=[10, 25, 50, 100, 400])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--alone", action="store_true", help="the reward model learns from the votes alone")
    args = parser.parse_args()
    for folder in (SFT, REWARD)[:1 if args.alone else 2]:
        check_toy(str(folder))
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for rule in args.rules:
        for n in args.votes:
            before, after = zip(*(point(rule, n, seed, args.alone) for seed in args.seeds), strict=True)
            if n == args.votes[0]:
                print(line(rule, 0, before), flush=True)
            print(line(rule, n, after), flush=True)

if __name__ == "__main__":
    exit_with_one_line(main)
