"""Talk to a model in a terminal: any folder that sft.py or ppo.py wrote, full or adapter, or any LLaMA folder.

The prompt is id for id the one the model was trained on: the conversation in the one template, BOS in front. An
answer streams word by word, to EOS or where the model begins to speak for the human. A conversation that grows too
long for the model loses its oldest turns.

    python chat.py --model runs/ppo                            # /clear begins anew, /quit or end of input leaves
    python chat.py --model runs/ppo --prompt "How are you?"    # one answer, then exit
"""
import argparse
import sys
import unicodedata
from collections import Counter

import torch

from data import clean_turns, collate_prompts, encode_prompt, open_tokenizer, render
from llama import BadInput
from lora import load_model

def get_args():
    parser = argparse.ArgumentParser(description="Talk to a model in a terminal.")
    parser.add_argument("--model", required=True, help="model folder, full or adapter")
    parser.add_argument("--base", help="base model of an adapter, if not where its config says")
    parser.add_argument("--prompt", help="answer this one question and exit")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest word each time")
    parser.add_argument("--top-p", type=float, default=0.9, help="sample from the likeliest words of this share")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of an answer, at most")
    parser.add_argument("--seed", type=int, help="for the same answers every time")
    return parser.parse_args()

def stream_text(tokenizer, ids, stop="\n\nHuman:"):
    """Yields the text of ids (an iterator of ints) piece by piece, up to EOS or `stop`; holds back what may become
    a longer character or `stop`. Control characters are left out: they could take over the terminal."""
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

def without_controls(text):
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))

def answer(model, tokenizer, turns, args):
    """Prints the model's answer to a conversation as it comes, and returns it; None for a question too long."""
    tally = Counter()
    ids = encode_prompt(tokenizer, {"prompt": render(clean_turns(turns))},
                        model.config.max_position_embeddings - args.max_tokens, tally)
    if ids is None:
        print("[the question is too long for this model, and is forgotten]")
        return None
    if tally["prompts that lost their oldest turns"]:
        print("[the conversation is too long for this model; its oldest turns are left out]")
    prompt = [x.to(model.lm_head.weight.device) for x in collate_prompts([ids])]          # ids and mask (1, P)
    steps = model.decode(*prompt, args.max_tokens, args.temperature, top_p=args.top_p, eos_id=tokenizer.eos_id)
    text = ""
    for piece in stream_text(tokenizer, (int(step) for step in steps)):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text.strip()

def main():
    args = get_args()
    if args.max_tokens < 1 or not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise BadInput("--max-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    tokenizer, config, _ = open_tokenizer(args.model, args.base, args.max_tokens + 1)
    cuda = torch.cuda.is_available()
    dtype = torch.float32 if not cuda else torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    model = load_model(args.model, dtype, "cuda" if cuda else "cpu", args.base).eval()
    model.n_words = tokenizer.vocab_size
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.prompt is not None:
        answer(model, tokenizer, [("Human", args.prompt)], args)
        return
    turns = []
    while True:
        try:
            question = input("\nHuman: ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if question == "/quit":
            return
        if question == "/clear":
            turns = []
        elif question:
            print("Assistant: ", end="", flush=True)
            reply = answer(model, tokenizer, turns + [("Human", question)], args)
            if reply is not None:
                turns += [("Human", question), ("Assistant", reply)]

if __name__ == "__main__":
    try:
        sys.stdin.reconfigure(errors="replace")
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
