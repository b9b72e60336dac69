"""The three tabs in Gradio, and what happens at each button. talk.py, run.py and rows.py do the work."""
from collections.abc import Callable, Iterator
from functools import partial

from runtime.errors import BadInput, as_html
from runtime.votes import standing_votes, tally_lines
from web.rows import STEPS, rows_as_html
from web.run import last_change, run_as_html
from web.talk import Site, Talk, settings

SECONDS_BETWEEN_LOOKS = 2                    # at the files of a training
VOTES = {"a": "A is better (a)", "b": "B is better (b)", "t": "Tie (t)", "s": "Skip (s)"}
BUTTONS = {"send": "Send", "stop": "Stop", "retry": "Retry", "undo": "Undo (u)", "clear": "New"}
QUICK = {"show_progress": "hidden", "queue": False}
QUEUED = {"show_progress": "minimal", "concurrency_id": "network", "concurrency_limit": 1}
FOCUS = "() => window.focusNext()"           # page.js

def build(site: Site):
    """The page, a gradio.Blocks."""
    import gradio as gr
    with gr.Blocks(title="alpaca-rlhf", analytics_enabled=False, fill_width=True) as page:
        for name, tab in (("chat", ChatTab), ("run", run_tab), ("data", data_tab)):
            with gr.Tab(name):
                tab(site)
    return page

class ChatTab:
    """The parts of the tab, and what each event does. Every browser has its own Talk; `site` is shared."""

    def __init__(self, site: Site):
        import gradio as gr
        args, context = site.args, min(speaker.model.config.context for speaker in site.speakers)
        self.site, self.talk = site, gr.State(Talk(site.votes))
        with gr.Column(elem_id="talk"):
            self.past, self.now = gr.HTML(past_as_html(site, Talk(None))), gr.HTML()
        self.message = gr.HTML(elem_id="message")
        with gr.Row(visible=False) as self.row:
            self.votes = {key: gr.Button(VOTES[key], elem_id=f"vote-{key}", size="md", min_width=120)
                          for key in VOTES}
        self.box = gr.Textbox(label="Question", show_label=False, container=False, placeholder="Question",
                              max_lines=8, max_length=10**6, autofocus=True, elem_id="question")
        with gr.Row(elem_id="buttons"):
            self.buttons = {key: gr.Button(BUTTONS[key], elem_id=key, size="sm", min_width=0,
                                           variant="primary" if key == "send" else "secondary")
                            for key in BUTTONS}
        with gr.Accordion("Sampling", open=False):
            top = max(2, args.temperature)
            self.sampling = [gr.Slider(0, top, args.temperature, step=0.05, label="temperature"),
                             gr.Slider(0, 1, args.top_p, step=0.01, label="top_p"),
                             gr.Slider(1, context - 1, args.max_tokens, step=1, label="max_tokens")]
        self.tally = gr.HTML(tally_as_html(site), visible=site.votes is not None)
        self.connect()

    def connect(self):
        talk, box, buttons, seed = self.talk, self.box, self.buttons, self.site.args.seed
        outputs = [self.past, self.now, self.message, self.row, self.tally, box]
        for event, inputs, name in ((buttons["send"].click, [talk, box], "ask"),
                                    (box.submit, [talk, box], "enter"),
                                    (buttons["retry"].click, [talk], "retry")):
            event(self.doing(Talk.begin), inputs, outputs, api_name=name, **QUICK).then(
                self.answer, [talk, *self.sampling], outputs, api_name=f"answer_{name}", **QUEUED).then(
                None, js=FOCUS)
        for name, act in (("undo", Talk.undo), ("clear", Talk.clear)):
            buttons[name].click(self.doing(act), talk, outputs, api_name=name, **QUICK)
        buttons["stop"].click(lambda talk: setattr(talk, "is_stopped", True), talk, api_name="stop", **QUICK)
        for key, button in self.votes.items():
            vote = self.doing(lambda talk, key=key: talk.vote(key, seed))
            button.click(vote, talk, outputs, api_name=f"vote_{key}", **QUICK).then(None, js=FOCUS)

    def shown(self, talk: Talk) -> dict:
        """All that the page shows of a conversation."""
        import gradio as gr
        return {self.past: past_as_html(self.site, talk), self.now: talk.as_html() if talk.question else "",
                self.message: as_html(talk.message), self.row: gr.Row(visible=talk.pair is not None),
                self.tally: tally_as_html(self.site)}

    def doing(self, act: Callable) -> Callable:
        """The event of act(talk), or of act(talk, text of the box). What is wrong is said."""
        def event(talk, *text):
            try:
                act(talk, *text)
            except BadInput as error:
                return self.shown(talk) | {self.message: as_html(str(error))}
            return self.shown(talk) | ({self.box: ""} if text else {})
        return event

    def answer(self, talk: Talk, temperature: float, top_p: float, max_tokens: float) -> Iterator[dict]:
        """Streams the answers to the question that has been taken in, if one has."""
        import gradio as gr
        if not talk.is_busy:                 # it was refused, or empty: the page stays as it is
            yield gr.skip()
            return
        question = talk.question
        try:
            args = settings(self.site, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
            for _ in talk.answer(self.site, args):
                yield {self.now: talk.as_html()}
        except BadInput as error:
            talk.message, talk.is_busy, talk.question = str(error), False, ""
            yield {self.box: question}
        yield self.shown(talk)

def past_as_html(site: Site, talk: Talk) -> str:
    who = "Two models, under the names A and B," if site.votes else " and ".join(
        dict.fromkeys(speaker.folder for speaker in site.speakers))
    return "".join(talk.past[:-1] if talk.question and talk.is_again else talk.past) or (
        "" if talk.question else f'<p class="empty">{as_html(who)} will answer. Type a question.</p>')

def tally_as_html(site: Site) -> str:
    """What chat.py shows at /votes."""
    try:
        lines = tally_lines(standing_votes(site.votes.path)) if site.votes else []
    except BadInput as error:                # another program has written something else
        lines = [f"no tally: {error}"]
    return f'<ul class="faint">{"".join(f"<li>{as_html(line)}</li>" for line in lines)}</ul>'

def run_tab(site: Site):
    import gradio as gr
    curves, drawn = gr.HTML(), gr.State()    # drawn: the page and the state of the files that are shown
    page = gr.Number(1, label="page of questions", precision=0, visible=site.run is not None, elem_id="page")
    samples = gr.HTML()

    def draw(page, before):
        if before == (after := [page, *last_change(site.run)]):
            return [gr.skip()] * 3
        return *run_as_html(site.run, page), after

    gr.on([gr.Timer(SECONDS_BETWEEN_LOOKS).tick, page.change], draw, [page, drawn], [curves, samples, drawn],
          api_name="run", **QUICK)

def data_tab(site: Site):
    import gradio as gr
    length, show = min(site.args.max_len, site.speakers[0].model.config.context), partial(rows_as_html, site)
    with gr.Row(visible=site.records is not None):
        inputs = [gr.Radio([*STEPS], value="sft", label="step", min_width=320),
                  gr.Number(length, label="--max-len, --max-prompt", precision=0, min_width=200),
                  gr.Number(1, label="page", precision=0)]
    rows = gr.HTML(show("sft", length, 1))
    gr.on([part.change for part in inputs], show, inputs, rows, api_name="rows", **QUICK)
