"""What the tests of the web page share: sites with made-up answers, and a server in a thread.

    python tests/web_page.py TOKENIZER       # a server of its own, for the test of the load
"""
import socket
import sys
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import chat
from chat import Speaker
from data import Tokenizer
from runtime.votes import VoteFile
from web.__main__ import make_server
from web.talk import Site

ARGS = {"model": "runs/ppo", "versus": "runs/sft", "vote": None, "prompt": None, "temperature": 0.7,
        "top_p": 0.9, "max_tokens": 40, "seed": 5, "max_len": 64, "data": None, "password": None}


def made_up_site(tokenizer, votes=None, two=True, **changes):
    """A Site whose speakers have no network; chat.answer must be replaced, as `answers` does it."""
    args = Namespace(**ARGS | {"vote": votes and str(votes), "versus": "runs/sft" if two else None} | changes)
    folders = [args.model, args.versus] if two else [args.model]
    speakers = [Speaker(folder, folder, SimpleNamespace(config=SimpleNamespace(context=256)),
                        Tokenizer(tokenizer)) for folder in folders]
    return Site(args, speakers, VoteFile(votes) if votes else None, None, None)


def made_up_answer(say, pause=0.0):
    """Takes the place of chat.answer: say(folder, question) is the text, which comes word by word."""
    def answer(speaker, turns, args, uniforms, tell=print):
        text = say(speaker.folder, turns[-1][1])

        def pieces():
            for word in text.split(" "):
                time.sleep(pause)
                yield f"{word} "
        return pieces()
    return answer


def answers(monkeypatch, say, pause=0.0):
    monkeypatch.setattr(chat, "answer", made_up_answer(say, pause))


@contextmanager
def served(site):
    """The address of the page of a site."""
    port = socket.create_server(("127.0.0.1", 0))
    server = make_server(site)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(condition, seconds=30):
    """Waits until condition() is true, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it has not become true"
        time.sleep(0.05)
    return value


def main():
    chat.answer = made_up_answer(lambda folder, question: f"{folder} says {question}")
    with served(made_up_site(sys.argv[1])) as address:
        print(address, flush=True)
        sys.stdin.read()                     # until the test closes it


if __name__ == "__main__":
    main()
