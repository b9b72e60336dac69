"""chat.py: how text streams, what the model is asked, and the program as a user meets it in a terminal."""
import fcntl
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import chat
from conftest import REPO, real, run_script, tiny_config, tiny_llama
from data import Tokenizer, encode_sft, read_records
from llama import BadInput, Llama
from lora import add_lora, load_model, lora_layers, save_adapter
from reward import RewardModel
from runtime import flags, screen
from runtime.tokenizer_write import copy_tokenizer
from tokenizer_kinds import make

SHORT = ("--max-tokens", "12", "--temperature", "0")               # the tiny model's context is 256


@pytest.fixture(params=["sentencepiece", "converted", "byte-level", "prefix space", "llama 3", "llama2"],
                scope="module")
def tokenizer(request, tmp_path_factory, tokenizer_file):
    if request.param == "llama2":
        return Tokenizer(real("llama2-tokenizer"))
    return Tokenizer(make(request.param, tmp_path_factory.mktemp("tokenizer"), tokenizer_file))


def streamed(tokenizer, text, ended=True):
    """The pieces in which the ids of an answer come."""
    return list(chat.stream_text(tokenizer, iter(tokenizer.encode_answer(text) + [tokenizer.eos_id] * ended)))


# -------------------------------------------------------------------------------------- how text streams
# \u00a0 and \u3000 are spaces, \u200c is part of the spelling of Persian, \u200d joins the parts of an emoji
TEXTS = [
    "the cat sat on a red mat", "né 😀 日本語 end", "tab\tnew line\n\n- a list\n", "  two  spaces ",
    "Human: a", "a\n\nHumble man", "a\n\nHuman", "a\n\nHuman:b", "a genuine \ufffd sign", "ends in \ufffd",
    "10\u00a0km\u3000wide", "می\u200cخواهم 👩\u200d🔬",
]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_together_are_the_decoded_text(text, ended, tokenizer):
    expected = text.strip().split("\n\nHuman:")[0]
    assert "".join(streamed(tokenizer, text, ended)) == expected


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    pieces = streamed(tokenizer, "the cat sat on a red mat")
    assert len(pieces) == len(tokenizer.encode_answer("the cat sat on a red mat")) + 1 and all(pieces[:-1])


def test_a_character_of_several_tokens_is_never_shown_in_part(tokenizer):
    text = "a 😀 b 🦙🦙 c \U0001f9ff"
    assert len(tokenizer.encode("\U0001f9ff")) > 3                 # spelt in bytes
    assert not any("\ufffd" in piece for piece in streamed(tokenizer, text))


def test_an_answer_ends_where_the_model_begins_to_speak_for_the_human(tokenizer):
    ids = iter(tokenizer.encode_answer("so it is\n\nHuman: and why?\n\nAssistant: no"))
    shown = ""
    for piece in chat.stream_text(tokenizer, ids):
        shown += piece
        assert "so it is".startswith(shown)                        # not even a part of the stop is shown
    assert shown == "so it is"
    assert "why" in tokenizer.decode(list(ids))                    # and no token is asked for after it


def test_an_answer_ends_at_eos(tokenizer):
    ids = iter([*tokenizer.encode("so"), tokenizer.eos_id, *tokenizer.encode("never shown")])
    assert "".join(chat.stream_text(tokenizer, ids)) == "so"
    assert list(ids) == tokenizer.encode("never shown")
    assert "".join(chat.stream_text(tokenizer, iter([tokenizer.eos_id]))) == ""


def test_an_answer_ends_at_any_of_several_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = Tokenizer(make("byte-level", tmp_path, None))
    for end in (0, 2):
        assert "".join(chat.stream_text(tokenizer, iter([*tokenizer.encode_answer("so"), end, 9]))) == "so"


def test_control_characters_that_could_take_over_the_terminal_are_left_out(tokenizer):
    text = "a\x1b[31mred\x1b]0;title\x07\rb\x08\x7f\x9b\x00c\n\td"
    assert "".join(streamed(tokenizer, text)) == "a[31mred]0;titlebc\n\td"


def test_characters_that_turn_the_direction_of_a_line_are_left_out_and_joiners_kept(tokenizer):
    text = "".join(map(chr, [*range(0x2028, 0x2030), *range(0x2065, 0x206b), 0x200c, 0x200d, 0x200f]))
    assert chat.without_controls(text) == "\u2028\u2029\u202f\u2065\u206a\u200c\u200d\u200f"
    assert "".join(streamed(tokenizer, "a\u202eb\u2066c")) == "abc"


# -------------------------------------------------------------------------------------- on the screen
def interrupted(*pieces):
    """Pieces, then Ctrl-C."""
    yield from pieces
    raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(capsys):
    assert screen.one_column("Assistant", interrupted("one ", "two")) == ("one two", False)
    assert capsys.readouterr().out == "Assistant: one two\n"
    streams = interrupted("one ", "two"), iter(["1 ", "2 ", "3 ", "4 "])
    assert screen.two_columns(["a", "b"], streams, 43) == (["one two", "1 2 "], False)
    assert [row.split() for row in capsys.readouterr().out.splitlines()[2:]] == [
        ["one", "two", "|", "1", "2"]
    ]


def columns(shown, width=43):
    """The lines of both columns, each row checked: as wide as it should be, and the bar in its place."""
    rows = shown.splitlines()
    assert all(len(row) <= width and row[width // 2 - 1:width // 2 + 2] == " | " for row in rows)
    return [row[:width // 2 - 1].rstrip() for row in rows], [row[width // 2 + 2:] for row in rows]


@pytest.mark.parametrize("seed", range(8))
def test_two_columns_lose_and_add_nothing_however_the_pieces_come(seed, capsys):
    rng = random.Random(seed)
    words = [
        "a", "of", "mat", "well-known", "supercalifragilisticexpialidocious", " ", "\n", "\n\n", "\n  - ",
    ]
    texts = ["".join(rng.choice(words) + rng.choice([" ", ""]) for _ in range(n)) for n in (5, 80)]
    texts = texts[::rng.choice([1, -1])]
    cuts = [sorted(rng.randrange(len(text) + 1) for _ in range(60)) for text in texts]
    ends = [zip([0, *cut], [*cut, None], strict=True) for cut in cuts]
    streams = [iter([text[a:b] for a, b in pairs]) for text, pairs in zip(texts, ends, strict=True)]
    assert screen.two_columns(["runs/ppo", "a/very/long/name/of/runs/sft"], streams, 43) == (texts, True)
    shown = columns(capsys.readouterr().out)
    assert [column[0] for column in shown] == ["runs/ppo", "y/long/name/of/runs/sft"[-20:]]
    for column, text in zip(shown, texts, strict=True):
        assert "".join("".join(column[2:]).split()) == "".join(text.split())
        for word in text.split():                                  # a word is cut only where it is too wide
            assert any(word in line for line in column) or len(word) > 20 or "-" in word


def test_two_columns_keep_lines_and_indentation(capsys):
    code = "def f(x):\n    return x + 1\n\ndone"
    screen.two_columns(["a", "b"], (iter([code]), iter(code)), 43)  # in one piece, and character by character
    left, right = columns(capsys.readouterr().out)
    assert left[2:] == right[2:] == code.split("\n")


def test_a_row_is_printed_as_soon_as_both_its_columns_are_certain(capsys):
    shown = []

    def words(n):
        for i in range(n):
            yield f"{i:09d} "                                      # two fill a line of 20
            shown.append(capsys.readouterr().out.count("\n"))
    screen.two_columns(["a", "b"], (words(4), words(10)), 43)
    assert sum(shown) == 2 + 4 and max(shown) == 2                 # the heading, and row by row
    assert capsys.readouterr().out.count("\n") == 1                # the last line, which might have gone on


def test_wide_characters_and_accents_do_not_break_two_columns(capsys):
    text = "日本語" * 30 + " 👩\u200d🔬🦙 e\u0301 " * 9
    assert screen.two_columns(["日本", "b"], (iter(text), iter(["ok"])), 43)[0][0] == text


# -------------------------------------------------------------------------------------- folders to talk to
def adapter_folder(path, base, model, task="CAUSAL_LM"):
    """Writes an adapter that changes a lot."""
    add_lora(model, 4, 16, ["q_proj", "v_proj", "down_proj"])
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    save_adapter(model, path, "default", base, task)
    return path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    torch.manual_seed(0)
    return adapter_folder(tmp_path_factory.mktemp("adapter"), base, Llama.from_pretrained(base))


@pytest.fixture(scope="module")
def reward_folders(base, tmp_path_factory):
    """A full reward model, and a reward model's adapter."""
    full = tmp_path_factory.mktemp("reward")
    RewardModel(tiny_config()).save_pretrained(full)
    copy_tokenizer(base, full)
    part = adapter_folder(
        tmp_path_factory.mktemp("reward-adapter"), base, RewardModel.from_pretrained(base), "SEQ_CLS"
    )
    return {"full": full, "adapter": part}


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that runs chat.py here with these flags, and what is typed; returns what is printed, and
    keeps in talk.prompts the ids that the models were asked with, in talk.said the answers of each, question
    by question, and in talk.answers those of the first."""
    collate, ask = chat.collate_prompts, chat.ask

    def record(*args):
        texts, are_whole = ask(*args)
        run.said.append(texts)
        run.answers.append(texts[0])
        return texts, are_whole

    def run(*flags, typed=""):
        run.prompts, run.said, run.answers = [], [], []
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(chat, "collate_prompts", lambda rows: run.prompts.extend(rows) or collate(rows))
        monkeypatch.setattr(chat, "ask", record)
        monkeypatch.setattr(signal, "signal", lambda *args: None)  # --prompt would make Ctrl-C kill pytest
        chat.main()
        return capsys.readouterr().out
    return run


# -------------------------------------------------------------------------------------- what is asked
def test_the_prompt_is_id_for_id_the_one_sft_trains_on_traps_3_35(talk, base, tmp_path):
    talk("--model", base, *SHORT, typed="  why is the sky blue? \nand the cat?\n\nwho said so\n")
    turns = [
        "why is the sky blue?", talk.answers[0], "and the cat?", talk.answers[1], "who said so",
        talk.answers[2],
    ]
    row = {
        "messages": [{"role": ["user", "assistant"][i % 2], "content": turn} for i, turn in enumerate(turns)]
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    trained = [encode_sft(Tokenizer(base), record, 10**6) for record in read_records(tmp_path / "rows.json")]
    assert talk.prompts == [ids[:n_prompt] for ids, n_prompt in trained] and len(trained) == 3


def test_the_printed_answers_are_those_that_become_the_history(talk, base):
    shown = talk("--model", base, *SHORT, typed="why\nand\n")
    assert len(talk.answers) == 2 and all(len(answer) > 3 for answer in talk.answers)
    for answer in talk.answers:
        assert answer in shown
        shown = shown.partition(answer)[2]


def test_greedy_answers_and_seeded_ones_repeat(talk, base):
    def ask(*flags):
        return talk("--model", base, "--prompt", "why", "--max-tokens", 12, *flags)
    assert ask("--temperature", 0) == ask("--temperature", 0)
    assert ask("--seed", 1) == ask("--seed", 1) != ask("--seed", 2)


def test_a_history_that_grows_too_long_loses_its_oldest_turns_and_says_so(talk, base):
    question = "why is the sky blue today my friend " * 12
    shown = talk("--model", base, *SHORT, typed=f"{question}\n{question}\n")
    assert shown.count("too long") == 1 and "oldest turns" in shown
    shown = talk("--model", base, "--versus", base, *SHORT, typed=f"{question}\n{question}\n")
    assert shown.count("too long") == 1      # not once for each model


def test_one_thread_computes_where_all_models_are_small(talk, base, tmp_path, monkeypatch):
    wide = shutil.copytree(base, tmp_path / "wide")
    tiny_llama(intermediate_size=128).save_pretrained(wide)
    monkeypatch.setattr(chat, "SMALL_MODEL", 1 + sum(p.numel() for p in tiny_llama().parameters()))
    for models, n_threads in (([base, base], 1), ([base, wide], 2), ([wide, base], 2)):
        torch.set_num_threads(2)
        try:
            talk("--model", models[0], "--versus", models[1], "--prompt", "why", *SHORT)
            assert torch.get_num_threads() == n_threads
        finally:
            torch.set_num_threads(1)
    assert talk.prompts[1] == talk.prompts[0]                      # the last question alone, with BOS


def test_a_question_that_does_not_fit_says_so_and_the_conversation_goes_on(talk, base):
    shown = talk("--model", base, *SHORT, typed="why\n" + "blue " * 300 + "\nand\n")
    assert shown.count("[the question is too long") == 1
    assert len(talk.prompts) == 2 and talk.prompts[1][:len(talk.prompts[0])] == talk.prompts[0]


def test_an_answer_that_could_never_fit_is_bad_input_that_names_the_flag(talk, base):
    with pytest.raises(BadInput, match="--max-tokens"):
        talk("--model", base, "--prompt", "why", "--max-tokens", 256)


@pytest.mark.parametrize("flag, value", [("--max-tokens", -5), ("--max-tokens", 0), ("--temperature", -1),
                                         ("--temperature", "nan"), ("--temperature", "hot"), ("--top-p", 1.1),
                                         ("--max-tokens", 2.5), ("--seed", "x"), ("--sed", 1)])
def test_a_flag_out_of_its_range_is_bad_input_that_names_it(flag, value, talk, base):
    with pytest.raises(BadInput, match=f"{flag}.*-h"):
        talk("--model", base, "--prompt", "why", *SHORT, flag, value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that takes the place of the project's, with a toy/chat.args that a test writes."""
    monkeypatch.chdir(REPO)                  # so that the folder of before is restored after the test
    monkeypatch.setattr(flags, "PROJECT", tmp_path)
    (tmp_path / "toy").mkdir()
    return tmp_path


def test_without_any_flag_the_toys_are_taken_and_with_one_they_are_not(talk, base, project):
    (project / "toy" / "chat.args").write_text(f"--model {base} --prompt why {' '.join(SHORT)}")
    shown = talk()
    assert "@toy/chat.args" in shown and talk.answers[0] and Path.cwd() == project
    with pytest.raises(BadInput, match="--model"):
        talk("--seed", 1)


def test_the_toys_flags_name_the_model_and_a_missing_one_the_command_that_makes_it(
    talk, project, monkeypatch
):
    (project / "toy" / "chat.args").write_text((REPO / "toy" / "chat.args").read_text())
    with pytest.raises(BadInput, match="runs/toy/ppo.*deepspeed ppo.py"):
        talk()
    checked = []
    monkeypatch.setattr(flags, "check_toy", checked.append)
    args = chat.get_args()                   # sys.argv is still that of talk
    assert (args.model, args.max_tokens, args.temperature) == ("runs/toy/ppo", 40, 0.7)
    assert checked == ["runs/toy/ppo"]


def test_flags_are_read_from_a_file_too_and_those_that_follow_win(talk, base, tmp_path):
    (tmp_path / "flags").write_text(f"# why\n--model {base}  # a model\n\n--max-tokens 99\n--temperature 0\n")
    talk(f"@{tmp_path / 'flags'}", "--prompt", "why", "--max-tokens", 12)
    read = talk.answers
    talk("--model", base, "--prompt", "why", *SHORT)
    assert read == talk.answers
    with pytest.raises(BadInput, match="nowhere"):
        talk(f"@{tmp_path / 'nowhere'}")


def test_bytes_of_the_command_line_that_are_no_text_do_not_reach_the_tokenizer(talk, base):
    talk("--model", base, "--prompt", "why \udcff", *SHORT)       # how Python hands over the byte ff
    assert talk.answers[0]


# -------------------------------------------------------------------------------------- commands
def test_clear_forgets_the_conversation_and_undo_the_last_question(talk, base):
    talk("--model", base, *SHORT, typed="why\nand\n/clear\nwhy\nand\n/undo\nand\n/undo\n/undo\n/undo\nwhy\n")
    why, both, *rest = talk.prompts
    assert rest == [why, both, both, why] and both[:len(why)] == why and len(both) > len(why)


def test_retry_answers_the_last_question_again_in_place_of_its_answer(talk, base):
    talk("--model", base, "--max-tokens", 12, "--seed", 1, typed="why\nand\n/retry\nwho\n")
    why, both, again, last = talk.prompts
    assert again == both and talk.answers[1] != talk.answers[2]
    last = Tokenizer(base).decode(last)
    assert talk.answers[2] in last and talk.answers[1] not in last


def test_a_retry_that_does_not_fit_leaves_the_answer_that_there_is(talk, base):
    typed = "blue " * 20 + "\n/max_tokens 230\n/retry\n/max_tokens 12\nand\n"
    shown = talk("--model", base, *SHORT, typed=typed)
    assert shown.count("[the question is too long") == 1
    assert talk.answers[0] in Tokenizer(base).decode(talk.prompts[-1])


@pytest.mark.parametrize("command", ["/quit", "/QUIT", " /quit ", "/quit now"])
def test_quit_leaves_and_reads_no_further(command, talk, base):
    talk("--model", base, *SHORT, typed=f"why\n{command}\nnever asked\n")
    assert len(talk.prompts) == 1


def test_settings_are_shown_and_set(talk, base):
    shown = talk("--model", base, *SHORT, typed="/max_tokens\nwhy\n/max_tokens 3\n/retry\n/temperature\n"
                                                "/temperature 50\n/retry\n/top-p 0\n/retry\n/top_p\n")
    notes = re.findall(r"^(?:Human: )?\[(.* is .*)\]$", shown, re.M)
    assert notes == ["max_tokens is 12", "max_tokens is 3", "temperature is 0.0", "temperature is 50.0",
                     "top_p is 0.0", "top_p is 0.0"]
    greedy, cut, hot, narrow = talk.answers
    assert greedy.startswith(cut) and len(cut) < len(greedy)
    assert hot != cut and narrow == cut                        # of the likeliest share of 0 there is one word


@pytest.mark.parametrize(
    "line",
    [
        "/temperature -1",
        "/temperature nan",
        "/temperature hot",
        "/temperature \x1b[31m",
        "/top_p 1.1",
        "/top_p -1",
        "/max_tokens 0",
        "/max_tokens 2.5",
        "/max_tokens 256",
        "/max_tokens 1 2",
        "/",
        "/ clear",
        "/nonsense",
        "/etc/passwd says what?",
        "/undo",
        "/retry",
        "/save x",
        "/clear",
    ],
)
def test_what_makes_no_sense_gets_one_friendly_line_and_the_talk_goes_on(
    line, talk, base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before, after = (talk("--model", base, *SHORT, typed=t) for t in ("why\n", f"{line}\nwhy\n"))
    assert len(talk.prompts) == 1 and not list(tmp_path.iterdir())
    assert after.count("\n") == before.count("\n") + 2         # the line, and the empty one before a question
    note = after.splitlines()[2]
    assert note.startswith("Human: [") and note.endswith("]") and "\x1b" not in note
    if line.split()[0] in ("/", "/etc/passwd", "/nonsense"):
        assert "/help" in note
    if line.startswith("/max_tokens 256"):
        assert "255" in note                                       # the most that there is room for


def test_help_lists_every_command_that_there_is(talk, base):
    shown = talk("--model", base, *SHORT, typed="/help\n")
    settings = ["temperature_X", "top_p_X", "max_tokens_N"]
    for name in ["help", "retry", "undo", "clear", "save_FILE", *settings, "quit"]:
        assert len(re.findall("/" + name.replace("_", "[_ ]"), shown)) == 1      # /help in the greeting
    assert shown.count("Human: ") == 2


def test_a_saved_conversation_is_one_to_train_on(talk, base, tmp_path):
    file = tmp_path / "talk about it.jsonl"
    shown = talk("--model", base, *SHORT, typed=f'why "so" 日本\nand the cat?\n/save {file}\n')
    assert f"[saved to {file}]" in shown
    row, = map(json.loads, file.read_text().splitlines())
    assert row["model"] == str(base) and [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    trained = [encode_sft(Tokenizer(base), record, 10**6) for record in read_records(file)]
    assert [ids[:n_prompt] for ids, n_prompt in trained] == talk.prompts and len(trained) == 2
    assert [Tokenizer(base).decode(ids[n:-1]) for ids, n in trained] == talk.answers


@pytest.mark.parametrize("name", ["there.jsonl", "nowhere/a.jsonl", "", ".", "a\0b"])
def test_a_file_that_cannot_be_saved_to_gets_one_line_and_nothing_is_overwritten(name, talk, base, tmp_path,
                                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("precious")
    shown = talk("--model", base, *SHORT, typed=f"why\n/save {name}\nand\n")
    assert shown.count("[/save ") == 1 and "saved" not in shown and len(talk.prompts) == 2
    assert "File exists" in shown or name != "there.jsonl"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_a_tilde_in_the_name_of_a_file_is_the_home_folder(talk, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    talk("--model", base, *SHORT, typed="why\n/save ~/a.jsonl\n")
    assert read_records(tmp_path / "a.jsonl")


def test_a_small_model_runs_on_one_thread(talk, base, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    talk("--model", base, "--prompt", "why", *SHORT)
    assert threads == [1]


def test_an_answer_is_kept_without_the_space_around_it(monkeypatch):
    monkeypatch.setattr(chat, "answer", lambda *args: iter(["\n so ", "it is", " \n"]))
    args = Namespace(max_tokens=1, vote=None)
    assert chat.ask([chat.Speaker("", "", None, None)], [[]], args) == (["so it is"], True)


def test_without_readline_all_but_line_editing_is_there(talk, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "readline", None)             # import readline then fails
    talk("--model", base, *SHORT, typed="why\nand\n")
    assert len(talk.answers) == 2


# -------------------------------------------------------------------------------------- two models
@pytest.mark.parametrize("width", [60, 120])
def test_each_of_two_models_has_its_own_history(width, talk, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    alone = {}
    for model in (base, adapter):
        talk("--model", model, *SHORT, typed="why\nand\n")
        alone[model] = talk.prompts, talk.answers
    file = tmp_path / "both.jsonl"
    typed = f"why\nbut\n/undo\nand\n/save {file}\n/retry\n/clear\nwhy\n"
    talk("--model", base, "--versus", adapter, *SHORT, typed=typed)
    why, but, again, retry, new = zip(talk.prompts[::2], talk.prompts[1::2], strict=True)
    assert [why, again] == list(zip(alone[base][0], alone[adapter][0], strict=True)) and again[0] != again[1]
    assert retry == again and new == why
    assert talk.said[0] == [alone[model][1][0] for model in (base, adapter)] and talk.said[2] == talk.said[3]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in rows] == [str(base), str(adapter)]
    for i, row in enumerate(rows):
        assert [m["content"] for m in row["messages"]] == ["why", talk.said[0][i], "and", talk.said[2][i]]


def test_a_question_too_long_for_one_of_two_models_is_asked_of_neither(talk, base, tmp_path):
    torch.manual_seed(0)
    Llama(tiny_config(max_position_embeddings=64)).save_pretrained(tmp_path)
    copy_tokenizer(base, tmp_path)
    typed = "blue " * 60 + "\nwhy\n/max_tokens 64\n"
    shown = talk("--model", base, "--versus", tmp_path, *SHORT, typed=typed)
    assert shown.count("[the question is too long") == 1 and len(talk.said) == 1 and "63" in shown
    assert talk.prompts[-1] == talk.prompts[-2] and len(talk.prompts) in (2, 3)


@pytest.mark.parametrize("width", [60, 120])
def test_two_models_that_are_the_same_say_the_same_even_when_sampled(width, talk, base, tmp_path,
                                                                     monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    flags = "--model", base, "--seed", 3, "--max-tokens", 12
    shown = talk(*flags, "--versus", shutil.copytree(base, tmp_path / "copy"), typed="why\nand\n")
    said = talk.said
    assert all(a == b for a, b in said) and said[0] != said[1] and (" | " in shown) == (width == 120)
    talk(*flags, typed="why\nand\n")
    assert talk.answers == [a for a, _ in said]                    # and what the first would say alone


def test_a_model_versus_itself_is_loaded_once_and_answers_twice_one_after_the_other(talk, base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    loaded = []
    monkeypatch.setattr(chat, "load_model", lambda *args: loaded.append(args) or load_model(*args))
    shown = talk("--model", base, "--versus", f"{base}/../{base.name}", *SHORT, typed="why\n")
    assert len(loaded) == 1 and " | " not in shown and talk.said[0][0] == talk.said[0][1]


@pytest.mark.parametrize("width, bars", [(99, 0), (100, 1)])
def test_one_prompt_to_two_models_stands_in_two_columns_where_there_is_room(width, bars, talk, base, adapter,
                                                                            monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = talk("--model", base, "--versus", adapter, "--prompt", "why", *SHORT)
    names = f"{str(base)[-48:]} | {str(adapter)[-48:]}"
    assert (names.split() == shown.splitlines()[0].split()) == bool(bars)
    assert bars or re.search(f"^{base}: (?s:.*)^{adapter}: ", shown, re.M)
    for text in talk.said[0]:
        assert bars or text in shown


# -------------------------------------------------------------------------------------- folders
def test_an_adapter_folder_is_its_base_with_the_adapter(talk, base, adapter):
    plain = talk("--model", base, "--prompt", "why", *SHORT)
    adapted = talk("--model", adapter, "--prompt", "why", *SHORT)
    assert adapted != plain and adapted.strip()
    assert talk("--model", adapter, "--base", base, "--prompt", "why", *SHORT) == adapted


def test_base_is_that_of_the_adapters_and_refused_where_there_is_none(talk, base, adapter):
    plain = talk("--model", base, "--prompt", "why", *SHORT), talk.answers
    adapted = talk("--model", adapter, "--prompt", "why", *SHORT), talk.answers
    for models in ((base, adapter), (adapter, base)):           # the full folder beside the adapter gets none
        talk("--model", models[0], "--versus", models[1], "--base", base, "--prompt", "why", *SHORT)
        expected = [plain[1][0], adapted[1][0]]
        assert talk.said[0] == (expected if models[0] == base else expected[::-1])
    for models in (("--model", base), ("--model", base, "--versus", base)):
        with pytest.raises(BadInput, match=f"--base .*: {base} is a full folder, which has no base"):
            talk(*models, "--base", base, "--prompt", "why", *SHORT)
    with pytest.raises(BadInput, match="--base"):                 # and it is the adapter's, not only accepted
        talk("--model", base, "--versus", adapter, "--base", "nowhere", "--prompt", "why", *SHORT)


def test_words_that_only_the_network_has_are_never_said(talk, base):
    # the network has more words than the tokenizer, and an id beyond the tokenizer's cannot be decoded
    talk(
        "--model", base, "--prompt", "why", "--temperature", 50, "--top-p", 1, "--max-tokens", 150, "--seed",
        0,
    )
    assert len(talk.answers[0]) > 150


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reward_folder_is_bad_input_that_says_what_it_is(kind, talk, reward_folders):
    with pytest.raises(BadInput, match=f"{reward_folders[kind]}.*reward model"):
        talk("--model", reward_folders[kind], "--prompt", "why", *SHORT)


# -------------------------------------------------------------------------------------- the program
def test_one_prompt_gives_one_answer_and_status_0(base):
    done = run_script("chat.py", "--model", base, "--prompt", "why is the sky blue?", *SHORT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
    assert "Human: " not in done.stdout                        # an answer to use in a pipe, nothing around it


def test_questions_through_a_pipe_are_answered_until_the_input_ends(base):
    done = subprocess.run(
        [sys.executable, "chat.py", "--model", base, *SHORT], cwd=REPO, input="why\nand the cat?\n",
        text=True, capture_output=True, timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Human: ") == 3 and done.stdout.count("Assistant: ") == 2


@pytest.mark.parametrize("folder", ["nowhere", "reward"])
def test_a_folder_that_cannot_be_talked_to_gives_one_line_and_status_2(folder, tmp_path, reward_folders):
    path = reward_folders["full"] if folder == "reward" else tmp_path / folder
    done = run_script("chat.py", "--model", path, "--prompt", "why", *SHORT, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and str(path) in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_flag_gives_one_line_and_status_2():
    done = run_script("chat.py", "--model", "x", "--temperature", "hot", timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("error: .*--temperature.*hot.*\n", done.stderr)


# -------------------------------------------------------------------------------------- in a real terminal
def says(path, base, text, again=False):
    """A model that answers everything with this text, whose tokens all differ, once or on and on: embeddings
    are one-hot, layers add nothing, and the head leads from each token to the next."""
    tokenizer = Tokenizer(base)
    ids = [tokenizer.encode("\n\nAssistant:")[-1], *tokenizer.encode(text)]
    assert len(set(ids)) == len(ids)
    model = Llama(tiny_config(hidden_size=352, num_hidden_layers=1, max_position_embeddings=30000))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(parameter.ndim == 1)
        model.model.embed_tokens.weight.copy_(torch.eye(352))
        for this, following in zip(ids, [*ids[1:], ids[1] if again else tokenizer.eos_id], strict=True):
            model.lm_head.weight[following, this] = 1.0
    model.save_pretrained(path)
    copy_tokenizer(base, path)
    return path


LONG = "the cat sat on a red mat and asked why is sky so blue today my said it was nice"


@pytest.fixture(scope="module")
def parrots(base, tmp_path_factory):
    """Folders: "endless" never stops, "evil" says what may hurt a terminal, "long" fills two lines of a
    column, "accent" says what is no ASCII."""
    def folder(name, *args):
        return says(tmp_path_factory.mktemp(name), base, *args)
    return {"endless": folder("endless", "the cat sat on a red mat and asked why", True),
            "evil": folder("evil", "ab\x1b]0;\x07\u202e\x9b3\x08z"),
            "long": folder("long", LONG),
            "accent": folder("accent", "\u00e9")}


@pytest.fixture
def terminal():
    """A function that starts chat.py in a terminal of its own, and returns that terminal's file and the
    process."""
    started = []

    def start(*flags, width=80):
        ours, theirs = pty.openpty()
        resize(ours, width)
        env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        process = subprocess.Popen(
            [sys.executable, "chat.py", *map(str, flags)],
            cwd=REPO,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**env, "TERM": "xterm", "INPUTRC": os.devnull},
            preexec_fn=lambda: (
                fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # or Ctrl-C would be a mere character,
                signal.signal(signal.SIGINT, signal.SIG_DFL),  # or ignored, as in a background job
            ),
        )
        os.close(theirs)
        started.append((ours, process))
        return ours, process
    yield start
    for ours, process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def resize(ours, width):
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))


def type_in(ours, keys, until, timeout=20):
    """Types keys, and returns what the terminal shows from then on, up to a match of the pattern `until`."""
    os.write(ours, keys.encode())
    shown, end = b"", time.time() + timeout
    while not re.search(until, shown.decode(errors="replace"), re.S):
        ready = select.select([ours], [], [], max(0, end - time.time()))[0]
        try:
            new = os.read(ours, 65536) if ready else b""
        except OSError:                                            # Linux: the other side is closed
            new = b""
        assert new, f"waited for {until!r}, saw {shown[-1500:].decode(errors='replace')!r}"
        shown += new
    return shown.decode(errors="replace").replace("\r\n", "\n")


UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
PROMPT = "Human: $"                                                # nothing after it: the program waits


@pytest.mark.slow
def test_a_conversation_in_a_terminal(terminal, parrots):
    ours, process = terminal("--model", parrots["endless"], "--max-tokens", 20000, "--temperature", 0)
    type_in(ours, "", PROMPT)
    shown = type_in(ours, "tell me\n", "asked why the cat sat")    # it streams, long before it ends
    assert re.match("tell me\\s+Assistant: the cat sat", re.sub("\x1b\\[[?0-9]+[a-z]", "", shown))
    type_in(ours, CTRL_C, PROMPT)                                  # stops the answer, not the program
    shown = type_in(ours, UP, "tell me$")                          # readline recalls what was asked
    type_in(ours, "\n", "asked why the cat sat")
    type_in(ours, CTRL_C, PROMPT)
    type_in(ours, "no, nev", "nev$")
    time.sleep(0.3)          # input() misses a Ctrl-C in the microseconds after a key, until the next key
    assert "/quit" in type_in(ours, CTRL_C, PROMPT)                # abandons the line, says how to leave
    type_in(ours, "/max_tokens 4\n", "is 4.*" + PROMPT)
    shown = type_in(ours, "go on\n", PROMPT)                       # it still answers, and to the end
    assert shown.count("Assistant: the cat sat on\n") == 1 and "nev" not in shown
    os.write(ours, CTRL_D.encode())
    assert process.wait(20) == 0


@pytest.mark.slow
def test_two_models_in_a_terminal_that_changes_its_width_and_what_they_may_not_send(terminal, parrots):
    models = "--model", parrots["long"], "--versus", parrots["evil"]
    ours, process = terminal(*models, "--temperature", 0, width=120)
    shown = [type_in(ours, "", PROMPT), type_in(ours, "hello\n", PROMPT)]
    rows = [row for row in shown[1].splitlines() if " | " in row]
    assert all(len(row) <= 120 and row[58:61] == " | " for row in rows)
    names, _, *texts = [[row[:58].rstrip(), row[61:]] for row in rows]
    assert names == [str(parrots[name])[-58:] for name in ("long", "evil")]
    assert len(texts) == 2 and f"{texts[0][0]} {texts[1][0]}" == LONG and texts[0][1] == "ab]0;3z"
    resize(ours, 60)
    shown.append(type_in(ours, "and now\n", "ab.*" + PROMPT))  # readline too shows its prompt, at a new width
    assert " | " not in shown[2] and f"\n{parrots['evil']}: ab]0;3z\n" in shown[2]
    assert f"\n{parrots['long']}: {LONG}\n" in shown[2]
    for sign in ("\x1b]", "\x07", "\u202e", "\x9b", "\x08z"):
        assert not any(sign in text for text in shown)
    os.write(ours, b"/quit\n")
    assert process.wait(20) == 0


@pytest.mark.slow
def test_ctrl_c_in_a_single_answer_ends_the_program(terminal, parrots):
    ours, process = terminal("--model", parrots["endless"], "--prompt", "go", "--max-tokens", 20000)
    type_in(ours, "", "asked why the cat sat")
    os.write(ours, CTRL_C.encode())
    assert process.wait(20) == -signal.SIGINT                      # so that a loop of a shell ends too


@pytest.mark.slow
def test_a_character_that_the_terminal_lacks_is_a_question_mark(parrots):
    done = run_script("chat.py", "--model", parrots["accent"], "--prompt", "go", timeout=120,
                      env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")
