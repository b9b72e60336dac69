"""Talk to a model in a terminal: any folder that sft.py or ppo.py wrote, full or adapter, or any LLaMA one.

The prompt is id for id the one the model was trained on: the conversation in the one template, after BOS. An
answer streams to EOS, or to where the model begins to speak for the human. A conversation that grows too long
loses its oldest turns. With --versus two models answer, in a wide terminal side by side.

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
import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from itertools import zip_longest

import torch

from data import clean_turns, collate_prompts, encode_prompt, open_tokenizer, render
from llama import BadInput
from lora import load_model
from runtime.errors import without_controls

def number(kind, low, high):
    """Reads a number from low to high, both included: argparse's type of a flag, and what a command takes."""
    def read(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a number ({kind.__name__}) from {low} to {high}")
    return read

SETTINGS = {"temperature": number(float, 0, 100), "top_p": number(float, 0, 1),
            "max_tokens": number(int, 1, 10**6)}

def get_args():
    parser = argparse.ArgumentParser(description="Talk to a model in a terminal.", fromfile_prefix_chars="@")
    add, kinds = parser.add_argument, SETTINGS
    add("--model", required=True, help="model folder, full or adapter")
    add("--versus", metavar="FOLDER", help="a second model, which answers every question too")
    add("--base", help="base model of an adapter, if not where its config says")
    add("--prompt", help="answer this one question and exit")
    add("--temperature", type=kinds["temperature"], default=0.7, help="0 takes the likeliest word each time")
    add("--top-p", type=kinds["top_p"], default=0.9, help="sample from the likeliest words of this share")
    add("--max-tokens", type=kinds["max_tokens"], default=256, help="tokens of an answer, at most")
    add("--seed", type=int, help="for the same answers every time")

    def fail(message):
        raise BadInput(f"{message} (see {parser.prog} -h)")        # one line instead of the whole usage
    parser.error = fail
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)    # of @FILE
    import toy                               # whose flags are taken where there are none
    args = parser.parse_args(sys.argv[1:] or toy.flags("chat"))
    toy.prepare(None, args.model, args.versus)
    return args

def stream_text(tokenizer, ids, stop="\n\nHuman:"):
    """Yields the text of ids (an iterator of ints) piece by piece, up to EOS or `stop`; holds back what may
    become a longer character or `stop`."""
    so_far, shown = [], 0
    for token in ids:
        ended = token == tokenizer.eos_id
        so_far += [] if ended else [token]
        text = tokenizer.decode(so_far)
        ended = ended or stop in text
        text = text.split(stop)[0]
        safe = len(text)
        if not ended:
            safe -= next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
            safe = min(safe, len(text.rstrip("\ufffd")))
        yield without_controls(text[shown:safe])
        shown = max(shown, safe)
        if ended:
            return
    yield without_controls(tokenizer.decode(so_far)[shown:])

def answer(model, tokenizer, turns, args, uniforms):
    """The pieces of the model's answer to a conversation; BadInput where the question is too long."""
    tally, context = Counter(), model.config.max_position_embeddings
    record = {"prompt": render(clean_turns(turns))}
    ids = encode_prompt(tokenizer, record, context - args.max_tokens, tally)
    if ids is None:
        raise BadInput(f"the question is too long for this model, and is forgotten: of its {context} tokens "
                       f"--max-tokens keeps {args.max_tokens} for the answer")
    if tally["prompts that lost their oldest turns"]:
        print("[the conversation is too long for this model; its oldest turns are left out]")
    ids, mask = (x.to(model.lm_head.weight.device) for x in collate_prompts([ids]))       # (1, P)
    steps = model.decode(ids, mask, args.max_tokens, args.temperature, top_p=args.top_p,
                         eos_id=tokenizer.eos_id, uniforms=uniforms.to(ids.device))
    return stream_text(tokenizer, (int(step) for step in steps))

def one_column(name, pieces):
    """Prints the pieces as they come, and returns their text. Ctrl-C stops the answer, not the program."""
    text = ""
    with suppress(KeyboardInterrupt):
        print(f"{name}: " if name else "", end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    print()
    return text

def two_columns(names, streams, width):
    """one_column for two, side by side: a row is printed as soon as nothing that comes can change it."""
    width = (width - 3) // 2
    texts, lines = ["", ""], [[name[-width:], "-" * width, ""] for name in names]

    def print_rows(n):
        for _ in range(n):
            left, right = (column.pop(0).rstrip() if column else "" for column in lines)
            print(f"{left:<{width}} | {right}", flush=True)

    with suppress(KeyboardInterrupt):
        for pieces in zip_longest(*streams):                       # None from an answer that has ended
            going = [i for i in (0, 1) if pieces[i] is not None]
            for i in going:
                texts[i] += pieces[i]
                lines[i] += wrap(lines[i].pop() + pieces[i], width)
            print_rows(min(len(lines[i]) - 1 for i in going))
    print_rows(max(map(len, lines)))
    return texts

def wrap(text, width):
    """The lines of a text, the last with the spaces at its end, which stand before what comes next."""
    lines = [textwrap.wrap(line, width, replace_whitespace=False) or [""] for line in text.split("\n")]
    lines[-1][-1] += text[len(text.rstrip(" ")):]
    return sum(lines, [])

def turns_of(history, i):
    """A history [(question, [answer of each speaker])] as turns (role, text) of the human and speaker i."""
    return [turn for question, said in history for turn in (("Human", question), ("Assistant", said[i]))]

def ask(speakers, history, question, args):
    """Prints and returns the answer of each speaker (name, model, tokenizer); BadInput before any speaks."""
    uniforms = torch.rand(1, args.max_tokens)       # the same for all: answers differ only where models do
    streams = [answer(model, tokenizer, [*turns_of(history, i), ("Human", question)], args, uniforms)
               for i, (_, model, tokenizer) in enumerate(speakers)]
    names, width = [name for name, _, _ in speakers], shutil.get_terminal_size().columns
    wide = len(speakers) == 2 and width >= 100
    texts = two_columns(names, streams, width) if wide else map(one_column, names, streams)
    return [text.strip() for text in texts]

def save(file, history, args):
    """Writes {"model", "messages"} of each model as a line for data.py; never over a file that exists."""
    roles, rows = {"Human": "user", "Assistant": "assistant"}, []
    for i, folder in enumerate(filter(None, [args.model, args.versus])):
        messages = [{"role": roles[role], "content": text} for role, text in turns_of(history, i)]
        rows.append(json.dumps({"model": folder, "messages": messages}) + "\n")
    try:
        with open(os.path.expanduser(file), "x") as out:
            out.writelines(rows)
    except (OSError, ValueError) as error:                         # ValueError: a null character in the name
        why = f"{error.args[-1]}; name a file that can be written and is not there yet"
        raise BadInput(f"/save {file}: {why}") from None
    print(f"[saved to {without_controls(file)}]")

def command(line, speakers, history, args):
    """Does what a line that begins with "/" asks for, and says so; BadInput where there is no sense in it."""
    name, _, value = line[1:].partition(" ")
    name, value = name.lower().replace("-", "_"), value.strip()
    if name in SETTINGS:
        context = min(model.config.max_position_embeddings for _, model, _ in speakers)
        read = number(int, 1, context - 1) if name == "max_tokens" else SETTINGS[name]
        setattr(args, name, read(value) if value else getattr(args, name))
        print(f"[{name} is {getattr(args, name)}]")
    elif name == "help":
        print(__doc__[__doc__.index("    /"):].rstrip())
    elif name == "quit":
        raise EOFError                       # as if the input had ended
    elif name not in ("retry", "undo", "clear", "save"):
        raise BadInput(f"there is no command {line.split()[0]}; /help lists those there are")
    elif not history:
        raise BadInput("nothing has been said yet")
    elif name == "save":
        save(value, history, args)
    elif name == "retry":                    # the old answer goes only once there is a new one
        *before, (question, _) = history
        history[-1] = (question, ask(speakers, before, question, args))
    else:
        del history[0 if name == "clear" else -1:]
        print("[forgotten]")

def talk(speakers, args):
    """Reads questions and commands until the input ends."""
    with suppress(ImportError):
        import readline                      # gives input() line editing, and recall by the arrow keys
    history = []
    print("[/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves]")
    while True:
        try:
            print()
            line = input("Human: ").strip()  # only this in the prompt: readline must know its width
            if line.startswith("/"):
                command(line, speakers, history, args)
            elif line:
                history.append((line, ask(speakers, history, line, args)))
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit leaves]")
        except (BadInput, argparse.ArgumentTypeError) as error:
            print(f"[{without_controls(str(error))}]")

def load(folder, base, tokenizer):
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float16 if cuda else torch.float32
    model = load_model(folder, dtype, "cuda" if cuda else "cpu", base).eval()
    model.n_words = tokenizer.vocab_size
    if sum(p.numel() for p in model.parameters()) < 3e7:
        torch.set_num_threads(1)             # two take 80 ms a token on a busy machine, where one takes 3
    return model

def main():
    args = get_args()
    folders = [args.model, args.versus] if args.versus else [args.model]
    names = folders if args.versus else ["Assistant" if args.prompt is None else ""]
    # what is wrong with any small file is said before weights load
    tokenizers = [open_tokenizer(folder, args.base, args.max_tokens + 1)[0] for folder in folders]
    speakers = [(without_controls(name), load(folder, args.base, tokenizer), tokenizer)
                for name, folder, tokenizer in zip(names, folders, tokenizers)]
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.prompt is None:
        return talk(speakers, args)
    signal.signal(signal.SIGINT, signal.SIG_DFL)                   # here Ctrl-C does end the program
    ask(speakers, [], args.prompt, args)

if __name__ == "__main__":
    try:
        sys.stdin.reconfigure(errors="replace")
        sys.stdout.reconfigure(errors="replace")                   # where the terminal lacks a character
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
