"""A page in the browser: talk to models, vote on answers, watch a run, and see data as the trainers see it.

    python -m web --model runs/ppo [--versus runs/sft] [--vote FILE] [--run runs/ppo] [--data pairs.jsonl]
    python -m web                            # with no flags: the toy, by toy/web.args

The page asks no other host for anything. Other machines reach the page only where --host lets them.
"""
import os
import secrets
import socket
from argparse import Namespace
from pathlib import Path

import torch

from chat import add_flags, load_speakers
from data import read_records
from runtime.errors import BadInput, exit_with_one_line, note
from runtime.flags import AsDictionary, Flags, column, number, positive
from runtime.kinds import check_columns
from runtime.votes import open_votes
from web.page import build
from web.talk import Site

LOWEST = (6, 20)                             # Gradio's version; web/requirements.txt says why
# A browser may load nothing from another host. Gradio's own scripts need the two "unsafe" words.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'"

def get_args() -> Namespace:
    flags = Flags("Talk to models, vote, watch a run and see data, in a browser.", "python -m web")
    add_flags(flags)
    add = flags.group("run and data")
    add("--run", metavar="OUT", help="folder of a training, finished or not; by default that of --model")
    add("--data", metavar="FILE", help="a data file or folder, shown as the trainers see it (docs/data.md)")
    add("--max-len", type=positive, default=512, needs="--data", help="tokens of a row, at most")
    add("--columns", type=column, nargs="+", action=AsDictionary, metavar="NAME=FIELD", needs="--data",
        help="names of fields of the data, as in prompt=question chosen=best rejected=worst")
    add = flags.group("server")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines use the page")
    add("--port", type=number(1, 65535, int), default=7860, help="of the page's address")
    add("--password", help="ask everyone who opens the page for this password")
    args = flags.parse("model")
    if args.password == "":
        raise BadInput("--password: is empty")
    args.prompt = args.prompts = None        # flags of chat.py
    return args

def run_folder(args: Namespace) -> Path | None:
    """The folder of --run. Without it that of --model, or the toy's, if a trainer has written it."""
    folders = map(Path, [args.run] if args.run else [args.model, "runs/toy/ppo"])
    runs = [folder for folder in folders
            if (folder / "args.json").exists() or (folder / "metrics.jsonl").exists()]
    if args.run and not runs:
        raise BadInput(f"--run {args.run}: has no args.json, so it is not the --out folder of a training")
    return runs[0] if runs else None

def check_gradio():
    """BadInput where Gradio is missing or too old. Switches off its analytics and its record of runs."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio
        found = gradio.__version__
    except ImportError as error:
        found = str(error)
    if not found[:1].isdigit() or tuple(map(int, found.split(".")[:2])) < LOWEST:
        raise BadInput(f"the page needs the package gradio, {LOWEST[0]}.{LOWEST[1]} or newer ({found}): "
                       f"pip install -r web/requirements.txt")

def listen(args: Namespace) -> socket.socket:
    """Takes the port, before the weights load. BadInput where it is busy, or no port of this machine."""
    if args.host not in ("127.0.0.1", "localhost") and args.password is None:
        note(f"--host {args.host}: without --password, everyone who reaches this machine can use the page")
    try:
        return socket.create_server((args.host, args.port))
    except OSError as error:
        raise BadInput(f"--host {args.host}, --port {args.port}: cannot be used ({error.strerror}); another "
                       f"page may be open there, choose another port") from None

def make_server(site: Site):
    """The page's server, a uvicorn.Server, which is then run on a socket."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    password, css = site.args.password, Path(__file__).with_name("page.css")
    auth = password and (lambda _, word: secrets.compare_digest(word.encode(), password.encode()))
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None), build(site), "/", footer_links=[], auth=auth, max_file_size=1,
        auth_message="Any name will do.", ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, show_error=False, theme=gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=css, head=f"<script type=module>{css.with_suffix('.js').read_text()}</script>")
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1,
                                         headers=[("Content-Security-Policy", POLICY)]))

def main():
    args = get_args()
    votes, run = open_votes(args), run_folder(args)
    if args.data:
        check_columns(args.columns or {}, [args.data])
    records = read_records(args.data, columns=args.columns) if args.data else None
    port = listen(args)
    check_gradio()
    site = Site(args, load_speakers(args), votes, run, records)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    server = make_server(site)
    print(f"The page: http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[port])

if __name__ == "__main__":
    exit_with_one_line(main)
