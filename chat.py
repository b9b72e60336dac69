"""Talk to a model in a terminal: any folder that sft.py or ppo.py wrote, full or adapter, or any LLaMA one.

The prompt is id for id the one the model was trained on: the conversation in the one template, after BOS. The
answer streams until EOS, or until the model begins to write the human's next turn. A conversation that grows
too long loses its oldest turns. With --versus two models answer, side by side where the terminal is wide.
With --vote their names are hidden until you have said which answer is better. reward.py learns from votes.

    python chat.py --model runs/ppo [--versus runs/sft]        # with no flags: the toy, by toy/chat.args
    python chat.py --model runs/ppo --prompt "How are you?"    # one answer, then exit
    python chat.py --model runs/ppo --versus runs/sft --vote votes.jsonl [--prompts questions.jsonl]

In the conversation (/help lists this):
    /retry             answer the last question again
    /undo              go back to before the last answer; where you vote, u does too
    /clear             begin a new conversation
    /save FILE         write the conversation as JSON lines, which sft.py can read
    /votes             which model the votes in the file of --vote prefer
    /temperature X     set --temperature from here on; without X, show it; so do
                       /top_p X and /max_tokens N
    /quit              leave, as Ctrl-D does; Ctrl-C only stops an answer
"""
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from data import STOP, Record, Tokenizer, collate_prompts, encode_prompt, open_tokenizer, read_records
from llama import Llama
from lora import load_model
from runtime.adapters import base_of_each
from runtime.errors import BadInput, exit_with_one_line, without_controls
from runtime.flags import Flags, number
from runtime.gpu import gpu_is_usable
from runtime.kinds import Turns, clean_turns
from runtime.screen import ask_for_vote, print_tally, save, show
from runtime.votes import Conversation, Pair, VoteFile, as_messages, check_vote, hidden, open_votes, winner

SETTINGS = {"temperature": number(0, 100), "top_p": number(0, 1), "max_tokens": number(1, 10**6, int)}
SMALL_MODEL = 3e7                            # parameters

def add_flags(flags: Flags) -> Callable:
    """The flags of a chat, here and on the web page. Returns what adds more to their group."""
    add = flags.group("chat")
    add("--model", help="model folder, full or adapter")
    add("--versus", metavar="FOLDER", help="a second model, which answers every question too")
    add("--base", help="base model of an adapter, if not where its config says")
    add("--vote", metavar="FILE", help="say which of the two answers is better; votes are added to this file")
    add("--temperature", type=SETTINGS["temperature"], default=0.7, help="0 takes the likeliest word")
    add("--top-p", type=SETTINGS["top_p"], default=0.9, help="sample from the likeliest words of this share")
    add("--max-tokens", type=SETTINGS["max_tokens"], default=256, help="tokens of an answer, at most")
    add("--seed", type=int, help="for the same answers every time")
    return add

def get_args() -> Namespace:
    flags = Flags("Talk to a model in a terminal.")
    add = add_flags(flags)
    add("--prompt", help="answer this one question and exit")
    add("--prompts", metavar="FILE", help="vote on answers to the questions of this file (docs/data.md)")
    return flags.parse("model")

@dataclass
class Speaker:
    """One of the models that answer. `name` stands before its answers; `folder` is where it was read."""
    name: str
    folder: str
    model: Llama
    tokenizer: Tokenizer

# ------------------------------------------------------------ answers
def answer(speaker: Speaker, turns: Turns, args: Namespace, uniforms: Tensor,
           tell: Callable[[str], object] = print) -> Iterator[str]:
    """The model's answer to the turns (role, text), piece by piece. uniforms (1,max_tokens) are its random
    numbers. BadInput where the question is too long; where the conversation is, tell gets a note."""
    tally, context = Counter(), speaker.model.config.context
    ids = encode_prompt(speaker.tokenizer, Record(clean_turns(turns)), context - args.max_tokens, tally)
    if ids is None:
        raise BadInput(f"the question is too long for this model: of its {context} tokens --max-tokens keeps "
                       f"{args.max_tokens} for the answer")
    if tally["prompts that lost their oldest turns"]:
        tell("[the conversation is too long for this model; its oldest turns are left out]")
    ids, mask = (x.to(speaker.model.lm_head.weight.device) for x in collate_prompts([ids]))       # (1, P)
    steps = speaker.model.decode(ids, mask, args.max_tokens, args.temperature, top_p=args.top_p,
                                 eos_id=speaker.tokenizer.eos_ids, uniforms=uniforms.to(ids.device))
    return stream_text(speaker.tokenizer, (int(step) for step in steps))

def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yields the text of ids piece by piece, up to EOS or STOP. The end of the text waits as long as the next
    ids can change it: they may complete a character, or STOP."""
    answer_ids, shown = [], 0                # shown: how many characters have been yielded
    for token in ids:
        is_eos = token in tokenizer.eos_ids
        if not is_eos:
            answer_ids.append(token)
        text = tokenizer.decode(answer_ids)
        if is_eos or STOP in text:
            yield without_controls(text.split(STOP)[0][shown:])
            return
        certain = min(len(text) - length_of_partial_stop(text), len(text.rstrip("\ufffd")))
        yield without_controls(text[shown:certain])
        shown = max(shown, certain)          # what is shown stays, though a later token may change the text
    yield without_controls(tokenizer.decode(answer_ids)[shown:])   # --max-tokens has cut the answer

def length_of_partial_stop(text: str) -> int:
    """How many characters at the end of the text are the beginning of STOP."""
    return next((n for n in range(len(STOP) - 1, 0, -1) if text.endswith(STOP[:n])), 0)

def start_answers(speakers: list[Speaker], conversations: list[Turns], args: Namespace,
                  tell: Callable[[str], object] = print) -> tuple[list[Iterator[str]], bool]:
    """The answer of each speaker to its conversation, and whether they may be read at once: one model answers
    twice one after the other. BadInput where one of them cannot answer."""
    # the same numbers for all speakers: answers differ only where models do, except in a vote
    uniforms = torch.rand(len(speakers) if args.vote else 1, args.max_tokens).expand(len(speakers), -1)
    tell = cache(tell)                       # a note for both of them is said once
    streams = [answer(speaker, turns, args, row[None], tell)
               for speaker, turns, row in zip(speakers, conversations, uniforms, strict=True)]
    return streams, len({id(speaker.model) for speaker in speakers}) == len(speakers)

def ask(speakers: list[Speaker], conversations: list[Turns], args: Namespace) -> tuple[list[str], bool]:
    """Prints all answers. Returns them, and whether they are whole: Ctrl-C stops an answer."""
    names, needs_all = [speaker.name for speaker in speakers], args.vote is not None
    return show(names, *start_answers(speakers, conversations, args), needs_all)

def reply(speakers: list[Speaker], conversation: Conversation, question: str, args: Namespace,
          is_again: bool = False):
    """Prints the answers to a question, and goes on with them: each speaker with its own, or all of them with
    the one that won the vote. is_again: it is the last question once more."""
    turns = [conversation.turns(i, question, is_again) for i in range(len(speakers))]
    if conversation.votes is None:
        conversation.go_on(question, ask(speakers, turns, args)[0], None, is_again)
    elif vote := vote_on(speakers, turns[0], args, conversation.votes):
        better = winner(vote)
        answers = None if better is None else [better] * len(speakers)
        conversation.go_on(question, answers, vote, is_again)

# ------------------------------------------------------------ votes
def vote_on(speakers: list[Speaker], turns: Turns, args: Namespace, votes: VoteFile) -> dict | None:
    """Prints two answers without their models' names, and asks which one is better. Returns the vote, which
    is written; None where an answer was stopped."""
    sides = hidden(speakers)
    texts, are_whole = ask(sides, [turns, turns], args)
    if not are_whole:
        print("[stopped: there is no vote]")
        return None
    pair = Pair(turns, texts, [side.folder for side in sides])
    if texts[0] == texts[1]:
        print("[both answers are the same: this counts as a skip]")
        return votes.add(pair, "s", args.temperature, args.seed)
    vote = ask_for_vote(pair, votes, args)
    if names := pair.names():
        print(f"[{names}]")
    return vote

def vote_on_each(prompts: list[Record], speakers: list[Speaker], args: Namespace, votes: VoteFile):
    """Votes on answers to the prompts that have no vote yet. One whose vote is taken back comes again."""
    left, voted = [record for record in prompts if not votes.was_asked(record.turns)], []
    print(f"[{len(left)} of {len(prompts)} questions are left; Ctrl-D leaves]")
    with suppress(EOFError):
        while left:
            record = left.pop(0)
            text = "\n\n".join(f"{role}: {text}" for role, text in record.turns)
            print(f"\n[{len(prompts) - len(left)} of {len(prompts)}]  {without_controls(text)}\n")
            try:
                vote_on(speakers, record.turns, args, votes)
            except BadInput as error:
                print(f"[{error}]")
            while voted and not votes.was_asked(voted[-1].turns):
                left.insert(0, voted.pop())
            if votes.was_asked(record.turns):                      # not where it is too long, or was stopped
                voted.append(record)
    print()
    print_tally(votes)

# ------------------------------------------------------------ commands
def run_command(line: str, speakers: list[Speaker], conversation: Conversation, args: Namespace):
    """Does what a line that begins with "/" asks for, and prints what was done. BadInput where it makes no
    sense."""
    name, _, value = line[1:].partition(" ")
    name, value = name.lower().replace("-", "_"), value.strip()
    if name in SETTINGS:
        if value:
            read = read_setting(name, value, speakers)
            check_vote(Namespace(**{**vars(args), name: read}))
            setattr(args, name, read)
        print(f"[{name} is {getattr(args, name)}]")
    elif name == "help":
        print(__doc__[__doc__.index("    /"):].rstrip())
    elif name == "quit":
        raise EOFError                       # talk leaves, as it does when the input ends
    elif name == "votes":
        print_tally(conversation.votes)
    elif name == "undo":
        print(f"[{conversation.undo()}]")
    elif name not in ("retry", "clear", "save"):
        raise BadInput(f"there is no command {line.split()[0]}; /help lists those there are")
    elif not conversation.history:
        raise BadInput("nothing has been said yet")
    elif name == "save":
        save(value, [{"model": speaker.folder, "messages": as_messages(conversation.turns(i))}
                     for i, speaker in enumerate(speakers)])
    elif name == "retry":                    # the old answer stays if the question cannot be answered again
        reply(speakers, conversation, conversation.history[-1][0], args, is_again=True)
    else:
        conversation.clear()
        print("[forgotten]")

def read_setting(name: str, value: str, speakers: list[Speaker]) -> float:
    """The value of a setting that was typed. BadInput where it is no number, or out of range."""
    read: Callable[[str], float] = SETTINGS[name]
    if name == "max_tokens":                 # the prompt needs room in every model's context
        read = number(1, min(speaker.model.config.context for speaker in speakers) - 1, int)
    try:
        return read(value)
    except ArgumentTypeError as error:
        raise BadInput(f"/{name}: {error}") from None

# ------------------------------------------------------------ the program
def talk(speakers: list[Speaker], args: Namespace, votes: VoteFile | None):
    """Reads questions and commands until the input ends."""
    conversation = Conversation(votes)
    print("[/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves]")
    while True:
        try:
            print()
            line = input("Human: ").strip()  # input() prints it, so that readline knows the prompt's width
            if votes and line.lower() in ("u", "undo"):            # after the vote that it is meant for
                line = "/undo"
            if line.startswith("/"):
                run_command(line, speakers, conversation, args)
            elif line:
                reply(speakers, conversation, line, args)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit leaves]")
        except BadInput as error:
            print(f"[{error}]")

def load_speakers(args: Namespace) -> list[Speaker]:
    """The model of --model, and that of --versus where it is given. The tokenizers and configs of both are
    read and checked before any weights load."""
    folders = [args.model, args.versus] if args.versus else [args.model]
    bases = base_of_each(folders, args.base)
    tokenizers = [open_tokenizer(folder, base, args.max_tokens + 1)[0]
                  for folder, base in zip(folders, bases, strict=True)]
    speakers = []
    for folder, base, tokenizer in zip(folders, bases, tokenizers, strict=True):
        name = folder if args.versus else "Assistant" if args.prompt is None else ""
        is_loaded = speakers and Path(folder).resolve() == Path(speakers[0].folder).resolve()
        model = speakers[0].model if is_loaded else load_network(folder, base, tokenizer)
        speakers.append(Speaker(without_controls(name), folder, model, tokenizer))
    if all(sum(p.numel() for p in speaker.model.parameters()) < SMALL_MODEL for speaker in speakers):
        torch.set_num_threads(1)             # on a busy machine: 3 ms a token, and 80 ms with two threads
    return speakers

def load_network(folder: str, base: str | None, tokenizer: Tokenizer) -> Llama:
    """A model ready to answer, on the GPU where there is one."""
    if gpu_is_usable():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype = "cuda", torch.bfloat16 if has_bfloat16 else torch.float16
    else:
        device, dtype = "cpu", torch.float32
    model = load_model(folder, dtype, device, base).eval()
    model.n_words = tokenizer.vocab_size
    return model

def read_prompts(args: Namespace) -> list[Record]:
    """The prompts of --prompts, each once."""
    records = read_records(args.prompts) if args.prompts else []
    return list({record.prompt: record for record in records if record.turns}.values())

def main():
    args = get_args()
    votes, prompts = open_votes(args), read_prompts(args)
    speakers = load_speakers(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    with suppress(ImportError):
        import readline  # noqa: F401        # lets input() edit lines, and recall earlier ones
    if args.prompts:
        vote_on_each(prompts, speakers, args, votes)
    elif args.prompt is None:
        talk(speakers, args, votes)
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the program, not only the answer
        ask(speakers, [[("Human", args.prompt)]] * len(speakers), args)

if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")  # "?" where the terminal lacks a character
    exit_with_one_line(main)
