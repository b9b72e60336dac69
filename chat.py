"""Talk to a model in a terminal: any folder that sft.py or ppo.py wrote, full or adapter, or any LLaMA one.

The prompt is id for id the one the model was trained on: the conversation in the one template, after BOS. The
answer streams until EOS, or until the model begins to write the human's next turn. A conversation that grows
too long loses its oldest turns. With --versus two models answer, side by side where the terminal is wide.

    python chat.py --model runs/ppo [--versus runs/sft]        # with no flags: the toy, by toy/chat.args
    python chat.py --model runs/ppo --prompt "How are you?"    # one answer, then exit

In the conversation (/help lists this):
    /retry             answer the last question again
    /undo              forget the last question and its answer
    /clear             begin a new conversation
    /save FILE         write the conversation as JSON lines that sft.py can train on
    /temperature X     set --temperature from here on, or show it where no X is given; alike:
    /top_p X, /max_tokens N
    /quit              leave, as Ctrl-D does; Ctrl-C only stops an answer
"""
import json
import os
import shutil
import signal
import sys
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from data import Record, Tokenizer, collate_prompts, encode_prompt, open_tokenizer
from llama import Llama
from lora import load_model
from runtime.errors import BadInput, exit_with_one_line, without_controls
from runtime.flags import Flags, number
from runtime.gpu import gpu_is_usable
from runtime.kinds import clean_turns

SETTINGS = {"temperature": number(0, 100), "top_p": number(0, 1), "max_tokens": number(1, 10**6, int)}
STOP = "\n\nHuman:"                          # an answer ends where the model writes this
SMALL_MODEL = 3e7                            # parameters
WIDE = 100                                   # characters: a terminal where two answers stand side by side

def get_args() -> Namespace:
    flags = Flags("Talk to a model in a terminal.")
    add = flags.group("chat")
    add("--model", help="model folder, full or adapter")
    add("--versus", metavar="FOLDER", help="a second model, which answers every question too")
    add("--base", help="base model of an adapter, if not where its config says")
    add("--prompt", help="answer this one question and exit")
    add("--temperature", type=SETTINGS["temperature"], default=0.7,
        help="0 takes the likeliest word each time")
    add("--top-p", type=SETTINGS["top_p"], default=0.9, help="sample from the likeliest words of this share")
    add("--max-tokens", type=SETTINGS["max_tokens"], default=256, help="tokens of an answer, at most")
    add("--seed", type=int, help="for the same answers every time")
    return flags.parse("model")

@dataclass
class Speaker:
    """One of the models that answer. `name` stands before its answers; `folder` is where it was read."""
    name: str
    folder: str
    model: Llama
    tokenizer: Tokenizer

# A conversation: for each question, the answers of all speakers.
History = list[tuple[str, list[str]]]

# ------------------------------------------------------------ answers
def answer(speaker: Speaker, turns: list[tuple[str, str]], args: Namespace,
           uniforms: Tensor) -> Iterator[str]:
    """The model's answer to the turns (role, text), piece by piece. uniforms (1,max_tokens) are its random
    numbers. BadInput where the question is too long."""
    tally, context = Counter(), speaker.model.config.context
    ids = encode_prompt(speaker.tokenizer, Record(clean_turns(turns)), context - args.max_tokens, tally)
    if ids is None:
        raise BadInput(f"the question is too long for this model, and is forgotten: of its {context} tokens "
                       f"--max-tokens keeps {args.max_tokens} for the answer")
    if tally["prompts that lost their oldest turns"]:
        print("[the conversation is too long for this model; its oldest turns are left out]")
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

def ask(speakers: list[Speaker], history: History, question: str, args: Namespace) -> list[str]:
    """Prints and returns the answer of each speaker. BadInput before anything is printed where one of them
    cannot answer."""
    uniforms = torch.rand(1, args.max_tokens)    # for all speakers: answers differ only where models do
    streams = [answer(speaker, [*turns_of(history, i), ("Human", question)], args, uniforms)
               for i, speaker in enumerate(speakers)]
    names, width = [speaker.name for speaker in speakers], shutil.get_terminal_size().columns
    if len(speakers) == 2 and width >= WIDE:
        texts = two_columns(names, streams, width)
    else:
        texts = [one_column(name, stream) for name, stream in zip(names, streams, strict=True)]
    return [text.strip() for text in texts]

def turns_of(history: History, i: int) -> list[tuple[str, str]]:
    """A conversation as turns (role, text) of the human and speaker i."""
    turns = []
    for question, answers in history:
        turns += [("Human", question), ("Assistant", answers[i])]
    return turns

# ------------------------------------------------------------ on the screen
def one_column(name: str, pieces: Iterable[str]) -> str:
    """Prints the pieces as they come, and returns their text. Ctrl-C stops the answer, not the program."""
    text = ""
    with suppress(KeyboardInterrupt):
        print(f"{name}: " if name else "", end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    print()
    return text

def two_columns(names: list[str], streams: Iterable[Iterator[str]], width: int) -> list[str]:
    """one_column for two answers side by side. A row is printed as soon as no later piece can change it."""
    width = (width - 3) // 2                 # of one column, with " | " between them
    texts = ["", ""]
    lines = [[name[-width:], "-" * width, ""] for name in names]   # of each column, those not printed yet

    def print_rows(n):
        for _ in range(n):
            left, right = (column.pop(0).rstrip() if column else "" for column in lines)
            print(f"{left:<{width}} | {right}", flush=True)

    with suppress(KeyboardInterrupt):
        for pieces in zip_longest(*streams):                       # None from an answer that has ended
            unfinished = [i for i in (0, 1) if pieces[i] is not None]
            for i in unfinished:
                texts[i] += pieces[i]
                lines[i] += wrap(lines[i].pop() + pieces[i], width)
            print_rows(min(len(lines[i]) - 1 for i in unfinished))  # the last line may still grow
    print_rows(max(map(len, lines)))
    return texts

def wrap(text: str, width: int) -> list[str]:
    """The lines of a text. Spaces at the end of the text stay, because the next piece may continue the
    line."""
    lines = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width, replace_whitespace=False) or [""]
    lines[-1] += text[len(text.rstrip(" ")):]
    return lines

# ------------------------------------------------------------ commands
def run_command(line: str, speakers: list[Speaker], history: History, args: Namespace):
    """Does what a line that begins with "/" asks for, and prints what was done. BadInput where it makes no
    sense."""
    name, _, value = line[1:].partition(" ")
    name, value = name.lower().replace("-", "_"), value.strip()
    if name in SETTINGS:
        if value:
            setattr(args, name, read_setting(name, value, speakers))
        print(f"[{name} is {getattr(args, name)}]")
    elif name == "help":
        print(__doc__[__doc__.index("    /"):].rstrip())
    elif name == "quit":
        raise EOFError                       # talk leaves, as it does when the input ends
    elif name not in ("retry", "undo", "clear", "save"):
        raise BadInput(f"there is no command {line.split()[0]}; /help lists those there are")
    elif not history:
        raise BadInput("nothing has been said yet")
    elif name == "save":
        save(value, speakers, history)
    elif name == "retry":                    # the old answer stays if the question cannot be answered again
        *before, (question, _) = history
        history[-1] = (question, ask(speakers, before, question, args))
    else:
        del history[0 if name == "clear" else -1:]
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
    except ValueError:
        raise BadInput(f"/{name}: {value} is not a {'whole ' * (name == 'max_tokens')}number") from None

def save(file: str, speakers: list[Speaker], history: History):
    """Writes {"model", "messages"} of each speaker as a line for data.py. BadInput where the file exists
    already, or cannot be written."""
    roles, rows = {"Human": "user", "Assistant": "assistant"}, []
    for i, speaker in enumerate(speakers):
        messages = [{"role": roles[role], "content": text} for role, text in turns_of(history, i)]
        rows.append(json.dumps({"model": speaker.folder, "messages": messages}) + "\n")
    try:
        with open(os.path.expanduser(file), "x") as out:
            out.writelines(rows)
    except (OSError, ValueError) as error:                         # ValueError: a null character in the name
        why = f"{error.args[-1]}; name a file that can be written and is not there yet"
        raise BadInput(f"/save {file}: {why}") from None
    print(f"[saved to {without_controls(file)}]")

# ------------------------------------------------------------ the program
def talk(speakers: list[Speaker], args: Namespace):
    """Reads questions and commands until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401        # lets input() edit lines, and recall earlier ones
    history = []
    print("[/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves]")
    while True:
        try:
            print()
            line = input("Human: ").strip()  # input() prints it, so that readline knows the prompt's width
            if line.startswith("/"):
                run_command(line, speakers, history, args)
            elif line:
                history.append((line, ask(speakers, history, line, args)))
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
        model = load_network(folder, base, tokenizer)
        speakers.append(Speaker(without_controls(name), folder, model, tokenizer))
    return speakers

def base_of_each(folders: list[str], base: str | None) -> list[str | None]:
    """--base for every folder that is an adapter, None for the others. Where no folder is an adapter, all get
    it, and lora.resolve refuses it."""
    is_adapter = [(Path(folder) / "adapter_config.json").exists() for folder in folders]
    return [base if adapter or not any(is_adapter) else None for adapter in is_adapter]

def load_network(folder: str, base: str | None, tokenizer: Tokenizer) -> Llama:
    """A model ready to answer, on the GPU where there is one."""
    if gpu_is_usable():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype = "cuda", torch.bfloat16 if has_bfloat16 else torch.float16
    else:
        device, dtype = "cpu", torch.float32
    model = load_model(folder, dtype, device, base).eval()
    model.n_words = tokenizer.vocab_size
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)             # on a busy machine: 3 ms a token, and 80 ms with two threads
    return model

def main():
    args = get_args()
    speakers = load_speakers(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.prompt is None:
        talk(speakers, args)
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends the program, not only the answer
        ask(speakers, [], args.prompt, args)

if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")  # "?" where the terminal lacks a character
    exit_with_one_line(main)
