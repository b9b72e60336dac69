"""The human in RLHF: you vote between answers of the toy's SFT model, the reward model learns your taste, and
PPO follows it. `./run.sh vote` runs this.

1. votes         chat.py shows two answers to each question, and you say which one is better
2. reward model  reward.py learns from the votes; a fifth of them is held out, or 100 more of a rule
3. PPO           ppo.py trains the SFT model against that reward model, with the demo's flags
4. comparison    what became of the answers, and what your votes say about your taste

    python -m toy.vote                # the reward model: the demo's, trained further on the votes
    python -m toy.vote --alone        # the SFT model with a new score head, which knows nothing but the votes
    python -m toy.vote --as sure      # a rule of toy/rules.py votes in your place

The demo's reward model already knows right answers from wrong ones, which 50 votes can hardly teach. It is
trained further on the votes alone: in one training with its own 9,060 pairs, 50 votes changed nothing
(docs/results.md).
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from runtime.errors import BadInput, exit_with_one_line
from runtime.flags import Flags, number
from runtime.votes import VoteFile, habits, in_share, standing_votes, wilson
from toy import MADE, world
from toy.gold import FACT_OF, gold, question_of
from toy.rules import HOPES, RULES, share_of_hoped, shuffled_questions, vote_by_rule
from toy.seeds import command
from toy.show import before_and_after, chosen_rows, paragraph, side_by_side

SFT, REWARD, RUNS = Path("runs/toy/sft"), Path("runs/toy/reward"), Path("runs/toy/vote")
SEED = 1234
MOST = sum(len(world.questions(fact)) for fact in world.FACTS)     # as many questions as are trained on
FEWEST_QUESTIONS = 10
FEWEST_VOTES = 5                             # for one of two answers, to learn from and to hold out
HELD_OUT = 100                               # votes of a rule on held-out questions

PERSON = """Step 1: your votes (some minutes)
The SFT model answers {n} questions, each of them twice, and you say which of the two answers is better. What
better means is for you to decide: choose a taste that you can keep to, such as short answers, or friendly
ones. Only a vote for one of the two answers teaches something. Type a or b, and Enter. t is a tie, s skips
the question, and u takes the last vote back. Ctrl-D leaves, and ./run.sh vote goes on there later."""
VOTED = """Step 1: your votes
You have voted on {n} questions already; the votes are in {votes}. To vote anew, delete {folder}."""
RULE = """Step 1: the votes of the rule "{rule}" (some seconds)
The SFT model answers questions, each of them twice, and the rule says which of the two answers is better,
until it has preferred one of them {n} times. {taste}"""
REWARD_MODEL = """Step 2: the reward model (some seconds)
{start} It learns to give the answer that was chosen a higher score than the other one. Measured: in how many
votes that are held out the chosen answer has the higher score."""
FURTHER = """The demo's reward model, which already prefers right and friendly answers, is trained further on
the votes alone. With --alone, the reward model knows nothing but the votes."""
ALONE = """A copy of the SFT model, which does not know yet which answers are right, becomes a reward model
that learns from the votes alone."""
PPO = """Step 3: reinforcement learning with PPO (about a minute)
The SFT model answers questions, the reward model scores the answers, and PPO makes answers with a high score
more likely. The KL term and the rates are the demo's. PPO does not see the true reward (gold)."""
COMPARISON = """Step 4: the comparison
Answers to held-out questions before PPO and after it, sampled at temperature 1, each with its true reward
(gold): right and friendly 1, right and curt 0.6, unsure 0.2, wrong 0.1, rude or broken 0. That is the demo's
taste; the votes may have another one."""

def get_args() -> Namespace:
    flags = Flags("A reward model learns from your votes, and PPO follows.")
    flags.prog = "python -m toy.vote"
    add = flags.group("votes")
    add("--votes", type=number(FEWEST_QUESTIONS, MOST, int), default=50, metavar="N",
        help="questions that you vote on")
    add("--as", dest="rule", choices=RULES, help="a rule that votes in your place, N times")
    add("--alone", action="store_true", help="learn from the votes alone, from the SFT model")
    return flags.parse_args()

# ------------------------------------------------------------ commands
def tell(text: str):
    """Prints what the next step is, or what came out of one: a line, and below it a paragraph."""
    lines = [paragraph(" ".join(part.split())) for part in text.split("\n", 1)]
    print("", *lines, "", sep="\n", flush=True)

def show(words: list[str]):
    """Prints a command, runs it, and prints how long it took. BadInput where it fails."""
    print("+ " + shlex.join(words), flush=True)
    start, stopped = time.monotonic(), None
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"         # of this environment
    process = subprocess.Popen(words, env={**os.environ, "PATH": programs})
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt as error:   # the command has got the Ctrl-C too; it may stop an answer only
            stopped = error
    if process.returncode:
        raise stopped or BadInput(f"{shlex.join(words)}: failed with exit status {process.returncode}")
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)

def make_missing(alone: bool):
    """Runs the steps of the demo that the lesson needs and that have not been run yet."""
    if not MADE.exists():
        tell("The toy's world and its base model are made first, once (a minute and a half).")
        show(["python", "-m", "toy"])
    if not (SFT / "model.safetensors").exists():
        tell("The demo's SFT model is trained first, once (half a minute).")
        show(command("sft", SEED, SFT.parent))
    if not (alone or (REWARD / "reward_stats.json").exists()):
        tell("The demo's reward model is trained first, once (two minutes).")
        show(command("reward", SEED, REWARD.parent))

# ------------------------------------------------------------ 1. the votes
def person_votes(n: int, folder: Path) -> bool:
    """Lets a person vote on n questions, and goes on where the person left. False where the person leaves
    again before the last question."""
    questions = shuffled_questions(MADE / "prompts.jsonl", SEED)[:n]         # a larger n adds questions
    file, votes = folder / "questions.jsonl", folder / "votes.jsonl"
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    if unasked(votes, questions):
        tell(PERSON.format(n=n))
        show(["python", "chat.py", "--model", str(SFT), "--versus", str(SFT), "--vote", str(votes),
              "--prompts", str(file), "--temperature", "1", "--top-p", "1", "--max-tokens", "40"])
    else:
        tell(VOTED.format(n=n, votes=votes, folder=folder))
    if left := unasked(votes, questions):
        said = f"{len(left)} of {n} questions have no vote yet. ./run.sh vote goes on with them."
        if left[0] >= FEWEST_QUESTIONS and len(decided(folder)) >= FEWEST_VOTES:
            said += f" With --votes {left[0]}, it learns from the votes so far."
        tell(said)
    return not left

def unasked(votes: Path, questions: list[str]) -> list[int]:
    """The places of the questions that have no vote, and have not been skipped either."""
    was_asked = VoteFile(str(votes)).was_asked
    return [i for i, question in enumerate(questions) if not was_asked([("Human", question)])]

def divide(folder: Path) -> int:
    """Deals the votes for one of two answers to two files, every fifth one to held-out.jsonl, the others to
    learn.jsonl. Returns their number; BadInput where they are too few."""
    votes = decided(folder)
    if len(votes) < FEWEST_VOTES:
        raise BadInput(f"{folder / 'votes.jsonl'}: holds {len(votes)} votes for one of two answers (ties and "
                       f"skips do not count), and {FEWEST_VOTES} are the fewest to learn from; vote on more "
                       f"questions, with a larger --votes")
    sides = {"held-out": votes[4::5], "learn": [vote for i, vote in enumerate(votes) if i % 5 != 4]}
    for name, dealt in sides.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in dealt))
    return len(votes)

def decided(folder: Path) -> list[dict]:
    """The votes for one of two answers, neither of which is empty: reward.py leaves such pairs out."""
    return [vote for vote in standing_votes(folder / "votes.jsonl")
            if vote["vote"] in ("a", "b") and vote["left"] and vote["right"]]

def rule_votes(rule: str, n: int, folder: Path, seed: int) -> int:
    """Lets a rule prefer one of two answers n times, to learn from, and HELD_OUT times on held-out questions.
    Returns how many pairs it took for the n votes."""
    for name in ("votes", "held-out"):       # of an earlier run
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    vote_by_rule(rule, MADE / "prompts-held-out.jsonl", HELD_OUT, SFT, folder / "held-out.jsonl", seed)
    shown = vote_by_rule(rule, MADE / "prompts.jsonl", n, SFT, folder / "votes.jsonl", seed)
    shutil.copy(folder / "votes.jsonl", folder / "learn.jsonl")
    return shown

# ------------------------------------------------------------ 2. and 3. the flags that differ from the demo's
def reward_flags(folder: Path, alone: bool) -> dict:
    """The batch is small, and the number of steps is the same for 10 votes as for 400."""
    return {"model": SFT if alone else REWARD, "data": folder / "learn.jsonl",
            "eval-data": folder / "held-out.jsonl", "steps": 100, "batch": 4, "eval-every": 100}

def ppo_flags(folder: Path) -> dict:
    """Scores are normalised by those of the SFT model's answers: the held-out votes are too few for it."""
    return {"reward": folder / "reward", "reward-norm": "rollout", "steps": 60}

# ------------------------------------------------------------ the results
def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

def taste(folder: Path) -> str:
    """What the votes say about the taste of the one who voted."""
    votes, unequal = decided(folder), []
    for vote in votes:
        question = vote["prompt"][-1]["content"]
        if question in FACT_OF:              # somebody may have voted on others in chat.py
            chosen, rejected = (gold(question, vote[side]) for side in ("chosen", "rejected"))
            if chosen != rejected:
                unequal.append(chosen > rejected)
    left, longer = habits(votes)
    return ("In the votes on answers with different true rewards (gold), the one with the higher true "
            f"reward was chosen in {in_share(sum(unequal), len(unequal))}. Answer A was chosen in "
            f"{in_share(*left)}, the longer one in {in_share(*longer)}. A reward model learns such habits.")

def agreement(folder: Path) -> tuple[int, int, int]:
    """In how many held-out votes the chosen answer has the higher score before training and after it, and the
    number of held-out votes."""
    n = json.loads((folder / "reward" / "reward_stats.json").read_text())["n"]
    before, after = before_and_after(read_lines(folder / "reward" / "metrics.jsonl"), "accuracy")
    return round(before * n), round(after * n), n

def in_words(before: int, after: int, n: int) -> str:
    """What came out of reward.py, from the numbers of agreement()."""
    said = (f"the reward model agreed with {before} of {n} held-out votes before the step, and after it with "
            f"{in_share(after, n)}. Guessing agrees with half of them.")
    if wilson(after, n)[0] < 0.5:
        said += " More votes are needed to see whether it does better than that."
    return said

def answers(folder: Path) -> tuple[list[dict], list[dict]]:
    """The answers to held-out questions before PPO and after it."""
    rows = read_lines(folder / "ppo" / "samples.jsonl")
    return tuple([row for row in rows if row["step"] == step] for step in (0, rows[-1]["step"]))

def measured(folder: Path, rule: str | None) -> list[tuple[str, float, float]]:
    """(what, before PPO, after it), all of them means over the answers to held-out questions."""
    lines = read_lines(folder / "ppo" / "metrics.jsonl")
    found = [(what, *before_and_after(lines, key)) for what, key in [
        ("score by this reward model (SFT: mean 0, spread 1)", "eval_score"), ("true reward (gold)", "gold"),
        ("length of an answer, tokens", "eval_length"), ("KL to the SFT model, nats per answer", "eval_kl")]]
    if rule:
        shares = [share_of_hoped(rule, rows) for rows in answers(folder)]
        found.insert(0, (f"share of answers that {HOPES[rule][0]}", *shares))
    return found

def compare(folder: Path, rule: str | None):
    """Prints answers before and after PPO, what was measured on all of them, and the taste of the voter."""
    before, after = answers(folder)
    for i in chosen_rows([row["prompt"] for row in before]):
        both = {"before": before[i]["response"], "after": after[i]["response"]}
        print(side_by_side(question_of(before[i]["prompt"]), both), end="\n\n")
    print(f"{'all answers to held-out questions, before PPO and after it':62} before   after")
    for what, *numbers in measured(folder, rule):
        print(f"{what:61} {numbers[0]:7.2f} {numbers[1]:7.2f}")
    print("\n" + paragraph(f"Of the votes: {in_words(*agreement(folder))} {taste(folder)}"))
    print("\nTo talk to the models before and after it (first: source .venv/bin/activate):\n\n"
          f"    python chat.py --model {SFT} --versus {folder / 'ppo'}\n")

# ------------------------------------------------------------ the lesson
def main():
    args = get_args()
    folder = RUNS / (args.rule or "you")
    make_missing(args.alone)
    folder.mkdir(parents=True, exist_ok=True)
    if args.rule:
        tell(RULE.format(rule=args.rule, n=args.votes, taste=RULES[args.rule].__doc__))
        shown = rule_votes(args.rule, args.votes, folder, SEED)
        tell(f"Result: {shown} pairs of answers were shown to the rule until it had preferred an answer "
             f"{args.votes} times. Its votes are in {folder / 'votes.jsonl'}.")
    else:
        if not person_votes(args.votes, folder):
            return
        tell(f"Result: {divide(folder)} votes for one of two answers. Every fifth of them is held out.")

    tell(REWARD_MODEL.format(start=ALONE if args.alone else FURTHER))
    show(command("reward", SEED, folder, **reward_flags(folder, args.alone)))
    tell("Result: " + in_words(*agreement(folder)))

    tell(PPO)
    show(command("ppo", SEED, folder, **ppo_flags(folder)))

    tell(COMPARISON)
    compare(folder, args.rule)

if __name__ == "__main__":
    exit_with_one_line(main)
