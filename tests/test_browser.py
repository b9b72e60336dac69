"""The web page in a real browser, Chromium, driven by Selenium."""
import json
import os
import shutil
import time
from argparse import Namespace

import pytest

import chat
from data import Record, read_records
from runtime.log import Log
from runtime.votes import standing_votes
from test_web import HOSTILE, a_run
from web_page import answers, made_up_site, served, wait_for

pytestmark = pytest.mark.slow
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--no-proxy-server"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser for all tests of this file. SeleniumManager would download one: it must not."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -r web/requirements.txt")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: ./run.sh test installs it")
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not driver or not binary:
        pytest.skip("there is no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    service = webdriver.ChromeService(driver, env={**os.environ, "SE_OFFLINE": "true"})
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


class Page:
    """A page of a site in the browser, as a person uses it."""

    def __init__(self, chromium, address, width=1200, height=900, dark=False):
        self.chromium, self.address = chromium, address
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        chromium.get_log("performance")
        chromium.get(address)
        self.until("document.querySelector('#question textarea')")

    def js(self, code):
        return self.chromium.execute_script(f"return {code}")

    def until(self, code, seconds=60):
        return wait_for(lambda: self.js(code), seconds)

    def press(self, keys):
        from selenium.webdriver import ActionChains
        ActionChains(self.chromium).send_keys(keys).perform()

    def ask(self, question):
        self.chromium.find_element("css selector", "#question textarea").send_keys(question + "\n")

    def tab(self, name):
        tabs = self.chromium.find_elements("css selector", "button[role=tab]")
        next(tab for tab in tabs if tab.text.strip() == name and tab.is_displayed()).click()

    def texts(self, selector=".reply .text"):
        return self.js(f"[...document.querySelectorAll('{selector}')].map(x => x.textContent)")

    def requests(self):
        """The addresses of all requests since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.chromium.get_log("performance")]
        return [message["params"]["request"]["url"] for message in messages
                if message["method"] == "Network.requestWillBeSent"]


IS_VOTE = "document.getElementById('vote-a')?.offsetParent && true"


def test_both_columns_grow_and_a_vote_by_key_lands_in_the_file(
        tokenizer_file, tmp_path, monkeypatch, chromium):
    answers(monkeypatch, lambda folder, question: f"{folder} says " + "word " * 30, pause=0.05)
    site = made_up_site(tokenizer_file, tmp_path / "votes.jsonl")
    with served(site) as address:
        page = Page(chromium, address)
        page.ask("why is the sky blue")
        seen = []
        wait_for(lambda: seen.append(page.texts()) or page.js(IS_VOTE))
        lengths = [[len(text.rstrip()) for text in texts] for texts in seen if len(texts) == 2]
        left, right = zip(*lengths, strict=True)
        assert len({*left}) > 4 < len({*right}) and [*left] == sorted(left) and [*right] == sorted(right)
        assert page.js("document.querySelectorAll('.reply').length === 2 && document.querySelector('.reply')"
                       ".getBoundingClientRect().top === document.querySelectorAll('.reply')[1]"
                       ".getBoundingClientRect().top")             # side by side
        assert page.texts(".reply .faint") == ["A", "B"]
        shown = page.texts()
        page.press("b")
        page.until("document.querySelector('.won')")
        vote, = standing_votes(site.votes.path)
        assert (vote["vote"], [vote["left"], vote["right"]]) == ("b", shown)
        assert page.texts(".reply .faint") == vote["models"]
        assert "better than" in page.js("document.body.innerText")   # the tally
        page.until("document.activeElement.tagName === 'TEXTAREA'")   # ready for the next question
        page.ask("u and a are letters here")
        page.until(IS_VOTE)
        shown = page.texts()
        page.ask("and now")                                        # refused, and nothing is lost
        page.until("document.body.innerText.includes('say first which')")
        page.until("document.activeElement.tagName === 'BODY'")     # the keys vote again
        assert page.texts() == shown and page.js("document.querySelector('#question textarea').value") == (
            "and now") and "better than" in page.js("document.body.innerText")
        page.press("u")                                            # takes the first vote back
        wait_for(lambda: not standing_votes(site.votes.path))
        page.press("s")
        wait_for(lambda: [vote["vote"] for vote in standing_votes(site.votes.path)] == ["s"])


def test_hostile_answers_show_as_text_and_nothing_is_asked_of_another_host(
        tokenizer_file, monkeypatch, chromium, tmp_path):
    answers(monkeypatch, lambda folder, question: "\n".join(HOSTILE))
    site = made_up_site(tokenizer_file)
    site.run = a_run(tmp_path / "run")
    lines = [{"step": step, "prompt": "\n".join(HOSTILE), "response": "\n".join(HOSTILE), "score": 1.0}
             for step in (0, 1)]
    (site.run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    site.records = [Record([("Human", bad)], bad, f"{bad}!") for bad in HOSTILE]
    site.args.max_len = 250
    expected = chat.without_controls("\n".join(HOSTILE))
    with served(site) as address:
        page = Page(chromium, address)
        page.ask("<b>why</b> ${1+1} {{value}}")
        page.until("document.querySelectorAll('.reply').length === 2 && !document.querySelector('.running')")
        assert page.texts() == [expected] * 2 and page.texts(".question") == ["<b>why</b> ${1+1} {{value}}"]
        page.tab("run")
        page.until("document.querySelector('.samples td')")
        assert page.texts(".samples td .text") == [expected] * 2
        page.tab("data")
        page.until("document.querySelector('.tokens')")
        page.js("document.querySelectorAll('details').forEach(x => x.open = true)")
        assert page.texts(".turn .text")[:3] == [HOSTILE[0], HOSTILE[0], f"{HOSTILE[0]}!"]
        assert page.js("document.querySelectorAll('.text *, .t *, img[src=x], #talk script').length") == 0
        asked = page.requests()
    assert len(asked) > 20 and any("queue" in url for url in asked)
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))]
    assert not foreign
    errors = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "Content Security" in message or "Uncaught" in message]


def test_curves_and_samples_follow_a_training(tokenizer_file, monkeypatch, chromium, tmp_path):
    site = made_up_site(tokenizer_file)
    site.run = tmp_path
    with served(site) as address:
        page = Page(chromium, address)
        page.tab("run")
        page.until("document.body.innerText.includes('no measurements yet')")
        log = Log(Namespace(out=str(tmp_path), log_every=1), 100, 0, {"score": ["score"]})
        for step in range(1, 6):
            log.write({"step": step, "score": float(step), "kl": 0.1})
        page.until("document.body.innerText.includes('step 5,')")
        assert page.js("document.querySelectorAll('figure')[0].querySelectorAll('circle').length") == 5
        line = "getComputedStyle(document.querySelector('polyline'))"
        assert page.js(f"{line}.fill") == "none" and page.js(f"{line}.stroke") not in ("none", "rgb(0, 0, 0)")
        log.write({"step": 6, "score": 6.0})
        (tmp_path / "samples.jsonl").write_text('{"step": 0, "prompt": "p", "response": "first"}\n')
        page.until("document.body.innerText.includes('step 6,') && document.querySelector('.samples')")
        assert page.texts(".samples td .text") == ["first"]
        log.close()


def test_the_data_tab_shows_transcripts_step_by_step(tokenizer_file, chromium, tmp_path):
    said = "\n\nHuman: why is the sky\n\nAssistant: my friend said so\n\nHuman: and the cat\n\nAssistant:"
    rows = [{"chosen": f"{said} the cat sat {i}", "rejected": f"{said} no"} for i in range(9)]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = made_up_site(tokenizer_file, data=str(tmp_path / "hh.jsonl"), max_len=100)
    site.records = read_records(site.args.data)
    with served(site) as address:
        page = Page(chromium, address)
        page.tab("data")
        page.until("document.querySelectorAll('.tokens').length === 6")
        assert page.js("document.querySelectorAll('.tokens .answer').length") > 6
        for step, kind, n in (("reward", "score", 12), ("ppo", "answer", 6), ("sft", "EOS", 6)):
            labels = chromium.find_elements("css selector", "label")
            next(label for label in labels if label.text.strip() == step).click()
            page.until(f"document.querySelectorAll('.tokens .{kind}').length === {n}")


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_page_is_not_cut_and_a_dark_one_is_dark(
        dark, tokenizer_file, chromium, monkeypatch, tmp_path):
    answers(monkeypatch, lambda *_: "supercalifragilistic" * 20 + " word" * 40)
    site = made_up_site(tokenizer_file, tmp_path / "votes.jsonl", data="x")
    site.run, site.records = a_run(tmp_path / "run"), [Record([("Human", "why " * 30)], "so " * 9, "no")]
    with served(site) as address:
        page = Page(chromium, address, width=360, height=740, dark=dark)
        page.ask("x" * 300)
        page.until("document.querySelector('.reply') && !document.querySelector('.running')")
        tops = page.js("[...document.querySelectorAll('#buttons button')].map(x => x.offsetTop)")
        assert len(tops) == 5 and len({*tops}) == 1                # in one row
        for tab, part in (("chat", ".reply"), ("run", ".samples"), ("data", ".tokens")):
            page.tab(tab)
            page.until(f"document.querySelector('{part}')?.offsetParent")
            assert page.js("document.documentElement.scrollWidth <= innerWidth")
            assert page.js(f"document.querySelector('{part}').getBoundingClientRect().right <= innerWidth")
        boxes = page.js("[...document.querySelectorAll('.tokens .t')].map(x => x.getClientRects().length)")
        assert {*boxes} == {1}                                     # no token goes over two lines
        paper, ink = (page.js(f"getComputedStyle(document.querySelector('{part}')).{name}"
                              ".match(/[\\d.]+/g).slice(0, 3).map(Number)")
                      for part, name in (("body", "backgroundColor"), (".legend", "color")))
        assert (max(paper) < 60 and min(ink) > 180) if dark else (min(paper) > 200 and max(ink) < 90)


def test_the_keyboard_alone_is_enough(tokenizer_file, chromium, monkeypatch, tmp_path):
    answers(monkeypatch, lambda folder, question: f"{folder} " + "word " * 200, pause=0.03)
    site = made_up_site(tokenizer_file)
    with served(site) as address:
        page = Page(chromium, address)
        page.ask("why")
        page.until("document.querySelector('.running .text')?.textContent.length > 20")
        page.press("\ue00c")                                       # Escape stops
        page.until("document.querySelector('.reply') && !document.querySelector('.running')")
        assert not site.lock.locked() and 10 < len(page.texts()[0]) < 900
        reached = set()
        for _ in range(12):
            page.press("\ue004")                                   # Tab
            reached.add(page.js("document.activeElement.id || document.activeElement.tagName"))
        assert {"send", "stop", "retry", "undo", "clear"} <= reached


def test_closing_the_page_stops_the_answer_and_frees_the_network(tokenizer_file, chromium, monkeypatch):
    answers(monkeypatch, lambda *_: "word " * 9000, pause=0.01)
    site = made_up_site(tokenizer_file)
    with served(site) as address:
        page = Page(chromium, address)
        page.ask("why")
        page.until("document.querySelector('.running .text')?.textContent.length > 20")
        assert site.lock.locked()
        chromium.get("about:blank")
        start = time.monotonic()
        wait_for(lambda: not site.lock.locked(), 30)
        assert time.monotonic() - start < 20
