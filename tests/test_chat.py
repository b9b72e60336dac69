"""chat.py: how text streams, what the model is asked, and the program as a user meets it."""
import io
import json
import subprocess
import sys

import pytest
import torch

import chat
from conftest import REPO, real, run_script, tiny_config
from data import Tokenizer, encode_sft, read_records
from llama import BadInput, Llama, copy_tokenizer
from lora import add_lora, lora_layers, save_adapter
from reward import RewardModel

SHORT = ("--max-tokens", "12", "--temperature", "0")               # the tiny model's context is 256


@pytest.fixture(params=["tiny", "llama2"], scope="module")
def tokenizer(request):
    return Tokenizer(request.getfixturevalue("tokenizer_file") if request.param == "tiny" else real("llama2-tokenizer"))


def streamed(tokenizer, text, ended=True):
    """The pieces in which the ids of a text come."""
    return list(chat.stream_text(tokenizer, iter(tokenizer.encode(text) + [tokenizer.eos_id] * ended)))


# ------------------------------------------------------------------------------------------------ how text streams
# \u00a0 and \u3000 are spaces, \u200c is part of the spelling of Persian, \u200d joins the parts of an emoji
TEXTS = ["the cat sat on a red mat", "né 😀 日本語 end", "tab\tnew line\n\n- a list\n", "  two  spaces ", "Human: a",
         "a\n\nHumble man", "a\n\nHuman", "a\n\nHuman:b", "a genuine \ufffd sign", "ends in \ufffd",
         "10\u00a0km\u3000wide", "می\u200cخواهم 👩\u200d🔬"]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_together_are_the_decoded_text(text, ended, tokenizer):
    expected = tokenizer.decode(tokenizer.encode(text)).split("\n\nHuman:")[0]
    assert "".join(streamed(tokenizer, text, ended)) == expected


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    pieces = streamed(tokenizer, "the cat sat on a red mat")
    assert len(pieces) == len(tokenizer.encode("the cat sat on a red mat")) + 1 and all(pieces[:-1])


def test_a_character_of_several_tokens_is_never_shown_in_part(tokenizer):
    text = "a 😀 b 🦙🦙 c \U0001f9ff"
    assert len(tokenizer.encode("\U0001f9ff")) > 3                 # spelt in bytes
    assert not any("\ufffd" in piece for piece in streamed(tokenizer, text))


def test_an_answer_ends_where_the_model_begins_to_speak_for_the_human(tokenizer):
    ids = iter(tokenizer.encode("so it is\n\nHuman: and why?\n\nAssistant: no"))
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


def test_control_characters_that_could_take_over_the_terminal_are_left_out(tokenizer):
    text = "a\x1b[31mred\x1b]0;title\x07\rb\x08\x7f\x9b\x00c\n\td"
    assert "".join(streamed(tokenizer, text)) == "a[31mred]0;titlebc\n\td"


# ------------------------------------------------------------------------------------------------ folders to talk to
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
    part = adapter_folder(tmp_path_factory.mktemp("reward-adapter"), base, RewardModel.from_pretrained(base), "SEQ_CLS")
    return {"full": full, "adapter": part}


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that runs chat.py here with these flags, and what is typed; returns what is printed, and keeps in
    talk.prompts the ids that the model was asked with, in talk.answers what it answered."""
    collate, answer = chat.collate_prompts, chat.answer

    def run(*flags, typed=""):
        run.prompts, run.answers = [], []
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(chat, "collate_prompts", lambda rows: run.prompts.extend(rows) or collate(rows))
        monkeypatch.setattr(chat, "answer", lambda *args: run.answers.append(answer(*args)) or run.answers[-1])
        chat.main()
        return capsys.readouterr().out
    return run


# ------------------------------------------------------------------------------------------------ what is asked
def test_the_prompt_is_id_for_id_the_one_sft_trains_on_traps_3_35(talk, base, tmp_path):
    talk("--model", base, *SHORT, typed="  why is the sky blue? \nand the cat?\n\nwho said so\n")
    turns = ["why is the sky blue?", talk.answers[0], "and the cat?", talk.answers[1], "who said so", talk.answers[2]]
    row = {"messages": [{"role": ["user", "assistant"][i % 2], "content": turn} for i, turn in enumerate(turns)]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    trained = [encode_sft(Tokenizer(base), record, 10**6) for record in read_records(tmp_path / "rows.json")]
    assert talk.prompts == [ids[:n_prompt] for ids, n_prompt in trained] and len(trained) == 3


def test_the_printed_answers_are_those_that_become_the_history(talk, base):
    shown = talk("--model", base, *SHORT, typed="why\nand\n")
    assert len(talk.answers) == 2 and all(len(answer) > 3 for answer in talk.answers)
    for answer in talk.answers:
        assert answer in shown
        shown = shown.partition(answer)[2]


def test_clear_forgets_the_conversation(talk, base):
    talk("--model", base, *SHORT, typed="why\nand\n/clear\nwhy\n")
    first, second, third = talk.prompts
    assert third == first and second[:len(first)] == first and len(second) > len(first)


def test_quit_leaves_and_reads_no_further(talk, base):
    talk("--model", base, *SHORT, typed="why\n/quit\nnever asked\n")
    assert len(talk.prompts) == 1


def test_greedy_answers_and_seeded_ones_repeat(talk, base):
    def ask(*flags):
        return talk("--model", base, "--prompt", "why", "--max-tokens", 12, *flags)
    assert ask("--temperature", 0) == ask("--temperature", 0)
    assert ask("--seed", 1) == ask("--seed", 1) != ask("--seed", 2)


def test_a_history_that_grows_too_long_loses_its_oldest_turns_and_says_so(talk, base):
    question = "why is the sky blue today my friend " * 12
    shown = talk("--model", base, *SHORT, typed=f"{question}\n{question}\n")
    assert shown.count("too long") == 1 and "oldest turns" in shown
    assert talk.prompts[1] == talk.prompts[0]                      # the last question alone, with BOS


def test_a_question_that_does_not_fit_says_so_and_the_conversation_goes_on(talk, base):
    shown = talk("--model", base, *SHORT, typed="why\n" + "blue " * 300 + "\nand\n")
    assert shown.count("[the question is too long") == 1
    assert len(talk.prompts) == 2 and talk.prompts[1][:len(talk.prompts[0])] == talk.prompts[0]


def test_an_answer_that_could_never_fit_is_bad_input_that_names_the_flag(talk, base):
    with pytest.raises(BadInput, match="--max-tokens"):
        talk("--model", base, "--prompt", "why", "--max-tokens", 256)


@pytest.mark.parametrize("flag, value", [("--max-tokens", -5), ("--max-tokens", 0), ("--temperature", -1),
                                         ("--temperature", "nan")])
def test_a_flag_out_of_its_range_is_refused(flag, value, talk, base):
    with pytest.raises((BadInput, SystemExit)):                    # argparse leaves with SystemExit, and says why
        talk("--model", base, "--prompt", "why", *SHORT, flag, value)


def test_bytes_of_the_command_line_that_are_no_text_do_not_reach_the_tokenizer(talk, base):
    talk("--model", base, "--prompt", "why \udcff", *SHORT)       # how Python hands over the byte ff
    assert talk.answers[0]


# ------------------------------------------------------------------------------------------------ folders
def test_an_adapter_folder_is_its_base_with_the_adapter(talk, base, adapter):
    plain = talk("--model", base, "--prompt", "why", *SHORT)
    adapted = talk("--model", adapter, "--prompt", "why", *SHORT)
    assert adapted != plain and adapted.strip()
    assert talk("--model", adapter, "--base", base, "--prompt", "why", *SHORT) == adapted


def test_words_that_only_the_network_has_are_never_said(talk, base):
    # the network has more words than the tokenizer: sampled from all of them, an id that cannot be decoded would come
    talk("--model", base, "--prompt", "why", "--temperature", 50, "--top-p", 1, "--max-tokens", 150, "--seed", 0)
    assert len(talk.answers[0]) > 150


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reward_folder_is_bad_input_that_says_what_it_is(kind, talk, reward_folders):
    with pytest.raises(BadInput, match=f"{reward_folders[kind]}.*reward model"):
        talk("--model", reward_folders[kind], "--prompt", "why", *SHORT)


# ------------------------------------------------------------------------------------------------ the program
def test_one_prompt_gives_one_answer_and_status_0(base):
    done = run_script("chat.py", "--model", base, "--prompt", "why is the sky blue?", *SHORT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
    assert "Human: " not in done.stdout                            # an answer to use in a pipe, nothing around it


def test_questions_through_a_pipe_are_answered_until_the_input_ends(base):
    done = subprocess.run([sys.executable, "chat.py", "--model", base, *SHORT], cwd=REPO, input="why\nand the cat?\n",
                          text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Human: ") == 3 and done.stdout.count("Assistant: ") == 2


@pytest.mark.parametrize("folder", ["nowhere", "reward"])
def test_a_folder_that_cannot_be_talked_to_gives_one_line_and_status_2(folder, tmp_path, reward_folders):
    path = reward_folders["full"] if folder == "reward" else tmp_path / folder
    done = run_script("chat.py", "--model", path, "--prompt", "why", *SHORT, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and str(path) in done.stderr and done.stderr.count("\n") == 1
