"""bench/gpu.py finds what is wrong. There is no GPU here: its checks run on the CPU, at toy size, and a part
of the code is broken for each of them."""
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sft
from conftest import REPO, metrics, tiny_config, tiny_llama
from data import encode_pair, open_tokenizer, read_records
from llama import Llama, LlamaConfig, rotate, sample
from lora import load_model
from reward import load_reward_model
from runtime import speed
from runtime.errors import exit_with_one_line
from training import train

sys.path.append(str(REPO / "bench"))
import gpu  # noqa: E402
import gpu_correct  # noqa: E402
import gpu_memory  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_tools  # noqa: E402
from gpu_tools import Check, Finding, Place  # noqa: E402

@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, torch.device("cpu"), small=True)


@pytest.fixture
def one_network(monkeypatch):
    """One kind of network, to save time."""
    monkeypatch.setattr(gpu_correct, "HEADS", {"grouped queries": 2})


def verdicts(findings):
    return [finding.ok for finding in findings if finding.ok is not None]


# ------------------------------------------------------------------------------------------------ figures
@pytest.mark.parametrize("x, ok", [(0.9, True), (1.0, True), (1.1, False), (math.nan, False),
                                   (math.inf, False)])
def test_a_figure_is_judged_by_its_bound(x, ok):
    assert gpu_tools.at_most("x", x, 1.0).ok is ok
    assert gpu_tools.within("x", x, 0.5, 1.0).ok is ok


def test_the_worst_of_some_numbers_is_nan_where_there_is_one():
    assert gpu_tools.worst([1.0, 3.0, 2.0]) == 3
    assert all(math.isnan(gpu_tools.worst(xs)) for xs in ([1.0, math.nan], [math.nan, 1.0]))


def test_an_error_is_relative_to_the_reference():
    reference = torch.tensor([3.0, 4.0])
    assert gpu_tools.relative_error(reference + torch.tensor([0.3, 0.4]), reference) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------ a part
def run_apart(program, monkeypatch, tmp_path, limit=60.0, deadline=60.0):
    """The findings of a check whose process runs this program."""
    file = tmp_path / "program.py"
    file.write_text(program)
    monkeypatch.setattr(gpu, "__file__", str(file))
    args = Namespace(part="a", limit=gpu.SECONDS, cpu=True)
    result = gpu.run_apart(Check("some", None, limit), args, tmp_path, time.monotonic() + deadline, 1, set())
    return [(finding["what"], finding["measured"], finding["ok"]) for finding in result["findings"]]


SAY = "import os, sys; from pathlib import Path; Path({file!r}).write_text({line!r} + chr(10)); "


@pytest.mark.parametrize("end, why", [
    ("print('all is lost'); sys.exit(3)", ("exit status 3", "all is lost", False)),
    ("os.kill(os.getpid(), 11)", ("exit status -11", "", False))])
def test_what_a_check_has_found_stays_found_when_its_process_dies(end, why, monkeypatch, tmp_path):
    line = json.dumps({"what": "x", "measured": 1.0, "unit": "", "expected": "", "ok": True, "details": None})
    program = SAY.format(file=str(tmp_path / "some.jsonl"), line=line) + end
    assert run_apart(program, monkeypatch, tmp_path) == [("x", 1.0, True), why]


def test_a_check_that_takes_too_long_or_finds_nothing_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    start = time.monotonic()
    assert run_apart("import time; time.sleep(60)", monkeypatch, tmp_path, limit=1.0) == [
        ("stopped after 1 s", "", False)]
    assert time.monotonic() - start < 30
    assert run_apart("pass", monkeypatch, tmp_path) == [("found nothing", "", False)]
    assert run_apart("pass", monkeypatch, tmp_path, deadline=0.0)[0][0] == "not run"


def test_a_check_is_one_rank_and_knows_whether_it_is_small(monkeypatch, tmp_path):
    """Whatever started the script; and a check on the CPU of a GPU machine has full size."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    check = Check("some", None, cpu=True)
    found = gpu.environment(Namespace(cpu=False), check, jobs=1)
    assert not {"RANK", "WORLD_SIZE"} & found.keys() and found["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in (set(gpu.environment(Namespace(cpu=False), Check("x", None), 1))
                                          - set(os.environ))
    places = []

    def run(place):
        places.append(place)
        yield Finding("x", 1.0)

    monkeypatch.setattr(gpu.os, "_exit", lambda status: None)
    for small in (False, True):
        gpu.run_here(Check("some", run), tmp_path, small)
    assert [place.small for place in places] == [False, True]


def test_an_exception_is_a_finding_with_its_words(monkeypatch, tmp_path):
    left = []
    monkeypatch.setattr(gpu.os, "_exit", left.append)

    def run(place):
        yield Finding("x", 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    gpu.run_here(Check("some", run), tmp_path, True)
    found = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert [finding["what"] for finding in found] == ["x", "OutOfMemoryError"] and left == [1]
    assert found[1]["measured"] == "CUDA out of memory. Tried to allocate 2 GiB" and found[1]["ok"] is False


def outcome(words, monkeypatch, capsys):
    """(exit status, output, what is on standard error) of the script with these words; a check finds 1."""
    def run_apart(check, **_):
        return {"check": check.name, "seconds": 1.0, "findings": [gpu.asdict(Finding("x", 1.0, ok=True))]}

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        exit_with_one_line(lambda: sys.exit(gpu.main()))
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("words, said", [
    ("", "--part"), ("--part d", "invalid choice: 'd'"),
    ("--part a --only machine nonexistent", "nonexistent: is no check of part a, which has "),
    ("--part a --jobs 0", "--jobs: 0 is not from 1"), ("--part a --jobs -5", "--jobs: -5 is not from 1"),
    ("--part a --limit 0", "--limit: 0 is not from 5"), ("--part a --limit nan", "--limit: nan is not from"),
    ("--part a --out {}/none/x.json", "--out {}/none/x.json: cannot be written (No such file"),
    ("--part a --out {}", "--out {}: cannot be written (Is a directory)"),
    ("--part a --folder {}/file", "--folder {}/file/a: cannot be written (Not a directory)"),
    ("--part a --folder /proc/x", "--folder /proc/x/a: cannot be written"),
    ("--part a --check machine", "--check has no effect without --folder"),
    ("--part a --check foo --folder {}", "foo: is no check of part a")])
def test_what_is_refused_is_one_line_and_no_check_runs_before(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    words = words.format(tmp_path).split() + ["--cpu"]
    status, out, err = outcome(words, monkeypatch, capsys)
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert said.format(tmp_path) in err


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    words = ["--part", "a", "--cpu", "--only", "machine", "--folder", tmp_path / "new", "--out",
             tmp_path / "a.json"]
    assert outcome(words, monkeypatch, capsys)[0] == 0
    assert [x["check"] for x in json.loads((tmp_path / "a.json").read_text())["checks"]] == ["machine"]
    (tmp_path / "new" / "a" / "thesis.txt").write_text("mine")
    status, out, err = outcome(words, monkeypatch, capsys)
    assert status == 2 and not out and "holds files already; name another folder" in err
    assert (tmp_path / "new" / "a" / "thesis.txt").read_text() == "mine"


def test_a_check_that_is_named_brings_what_it_needs():
    assert gpu.names("a", ["sft-full-bf16-zero2"]) == {"sft-full-bf16-zero2", "cpu-sft-full", "prepare"}
    assert gpu.names("a", ["networks"]) == {"networks"}
    for part, groups in gpu.PARTS.items():
        checks = [check for group in groups for check in group]
        done = set()
        assert gpu.names(part, None) == {check.name for check in checks} and len(checks) == len(
            {check.name for check in checks})
        for group in groups:                 # what a check needs is in a group before
            assert all({*check.needs} - {"prepare"} <= done for check in group)
            done |= {check.name for check in group}


def run_script(*words, limit=600):
    done = subprocess.run([sys.executable, "bench/gpu.py", *map(str, words)], cwd=REPO, text=True,
                          capture_output=True, timeout=limit)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_writes_a_table_and_json_and_its_status_says_what_failed(tmp_path):
    out = tmp_path / "c.json"
    status, text = run_script("--part", "c", "--cpu", "--only", "card", "--out", out)
    found = json.loads(out.read_text())
    assert status == 0 and "all as expected" in text and found["failed"] == []
    assert [check["check"] for check in found["checks"]] == ["prepare", "card"]
    status, text = run_script("--part", "a", "--cpu", "--only", "chat", "--limit", 5.5, "--out", out)
    assert status == 1 and "FAILED" in text and "chat" in json.loads(out.read_text())["failed"]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_a_whole_part_at_toy_size(part, tmp_path):
    status, text = run_script("--part", part, "--cpu", "--limit", 2400, "--jobs", 2, limit=2500)
    print(text)
    assert status == 0, text


# ------------------------------------------------------------------------------------------------ networks
def test_networks_in_bfloat16_agree_and_one_that_forgets_the_mask_does_not(place, one_network, monkeypatch):
    assert verdicts(gpu_correct.check_networks(place)) == [True] * 4
    attention = torch.nn.functional.scaled_dot_product_attention

    def forgetful(q, k, v, attn_mask=None, **more):
        return attention(q, k, v, attn_mask=None if q.dtype == torch.bfloat16 else attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forgetful)
    assert verdicts(gpu_correct.check_networks(place)) == [True, False] * 2


def test_the_likeliest_words_are_those_of_transformers_unless_the_positions_are_wrong(place, one_network,
                                                                                     monkeypatch):
    assert verdicts(gpu_correct.check_greedy(place)) == [True, True]
    monkeypatch.setattr("llama.rotate", lambda x, cos, sin: rotate(x, cos, -sin * 0.9))
    assert verdicts(gpu_correct.check_greedy(place)) == [False, True]      # wrong on the CPU in the same way


def captured(change):
    """faster_step as on a GPU, but the "graph" is run anew each time; `change` breaks something."""
    def capture(self):
        self.logits = self.run().clone()
        self.graph = SimpleNamespace(replay=lambda: self.logits.copy_(self.run()))

    def faster_step(model, device):
        step = speed.CapturedStep(model.next_logits, None, block=16)
        step.capture = partial(capture, step)
        return change(step)

    return faster_step


def forgets_new_rows(step):
    """The mask of a captured graph hides what comes after it."""
    capture = step.capture

    def broken():
        step.mask[:, -3:] = False
        capture()

    step.capture = broken
    return step


def repeats_old_logits(step):
    """A replay that was not waited for shows the logits of the step before."""
    before = []

    def broken(*inputs):
        before.append(step(*inputs).clone())
        return before[-2] if len(before) > 1 and len(before[-2]) == len(before[-1]) else before[-1]

    return broken


@pytest.mark.parametrize("change, ok", [(lambda step: step, True), (forgets_new_rows, False),
                                        (repeats_old_logits, False)])
def test_graphs_give_the_logits_of_plain_steps(change, ok, place, one_network, monkeypatch):
    monkeypatch.setattr(gpu_correct, "ROUNDING", {torch.float32: 1e-4})
    monkeypatch.setattr("llama.faster_step", captured(change))
    assert verdicts(gpu_correct.check_decoding(place)) == [ok]


def test_a_word_of_probability_0_is_noticed(place, monkeypatch):
    assert verdicts(gpu_correct.check_sampling(place)) == [True] * 4
    monkeypatch.setattr(gpu_correct, "sample", lambda *args: (sample(*args) + 1).clamp(max=1_999))
    assert False in verdicts(gpu_correct.check_sampling(place))


# ------------------------------------------------------------------------------------------------ trainers
def test_a_training_is_as_far_from_the_cpus_as_its_worst_step():
    first, second = {"step": 1, "loss": 2.0, "kl": 0.0}, {"step": 2, "loss": 1.0}
    evaluation = {"step": 2, "margin": 1.0}
    reference = [first, second, evaluation]
    assert gpu_correct.distances(reference, reference) == {"loss": 0, "margin": 0, "kl": 0}
    share, more = gpu_correct.BOUNDS["loss"]
    far = {**second, "loss": 1.0 + 2 * (share + more)}
    for lines, distance in (([first, far, evaluation], 2), ([first], math.inf),        # a line is missing
                            ([first, {**second, "loss": None}], math.inf)):
        assert gpu_correct.distances(lines, reference)["loss"] == pytest.approx(distance)


def test_a_wrong_loss_is_noticed(base, pairs_file, tmp_path, monkeypatch):
    words = ["--model", base, "--data", pairs_file, "--split", "none", "--steps", 4, "--batch", 8,
             "--lr", 0.3, "--log-every", 1, "--max-len", 48]
    training = gpu_correct.Training("sft")
    train(sft, words, tmp_path / training.reference, monkeypatch)
    again = train(sft, words, tmp_path / "again", monkeypatch)
    assert gpu_correct.compare(metrics(again.out), tmp_path, training).ok is True
    without_norm = [{key: x for key, x in line.items() if key != "grad_norm"} for line in metrics(again.out)]
    assert gpu_correct.compare(without_norm, tmp_path, training).ok is False
    assert gpu_correct.compare(without_norm, tmp_path, gpu_correct.Training("sft", stage=0)).ok is True
    monkeypatch.setattr(sft, "n_labels", lambda rows: 1.1 * sum(len(ids) - n for ids, n in rows))
    wrong = train(sft, words, tmp_path / "wrong", monkeypatch)
    assert gpu_correct.compare(metrics(wrong.out), tmp_path, training).ok is False


def test_a_run_goes_on_with_the_answers_of_the_first(tmp_path):
    model, ids = tiny_llama(), torch.randint(3, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    mask, uniforms = torch.ones_like(ids, dtype=torch.bool), torch.rand(4, 9)

    def generate(model, rows):
        return model.generate(ids[rows], mask[rows], 9, eos_id=[*range(40)], uniforms=uniforms[rows])

    first = gpu_correct.Answers(tmp_path / "answers", replay=False)
    expected, real = generate(model, slice(4))
    first.close()
    second = gpu_correct.Answers(tmp_path / "answers", replay=True)
    same, _ = generate(model, slice(4))
    assert torch.equal(same, expected) and (second.n, second.n_different) == (4, 0)
    for rows in (slice(1), slice(1, 4)):     # in two pieces, from another network
        response, response_mask = generate(tiny_llama(seed=1), rows)
        for found, found_mask, row, row_mask in zip(response, response_mask, expected[rows], real[rows],
                                                    strict=True):
            assert torch.equal(found[found_mask], row[row_mask])
    second.close()
    assert (second.n, second.n_different) == (8, 4) and Llama.generate is first.generate

    twice = gpu_correct.Answers(tmp_path / "answers", replay=False)        # as in two evaluations
    for _ in range(2):
        generate(model, slice(4))
    twice.close()
    third = gpu_correct.Answers(tmp_path / "answers", replay=True)
    own, _ = generate(tiny_llama(seed=1), slice(4))
    third.close()
    assert third.n == 0 and not torch.equal(own, expected)


# ------------------------------------------------------------------------------------------------ memory
def test_networks_with_drawn_weights_are_like_any_others(tmp_path, monkeypatch):
    for module in ("llama", "reward"):
        monkeypatch.setattr(f"{module}.load_weights", gpu_tools.draw_weights)
    folder, config = tmp_path / "base", tiny_config(vocab_size=32_000)
    gpu_tools.write_llama(folder, config)
    for name, task in (("actor", "CAUSAL_LM"), ("judge", "SEQ_CLS")):
        gpu_tools.write_adapter(tmp_path / name, folder, task, 2, ["q_proj", "up_proj"])
    ids = torch.randint(3, 30_000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        base, again, adapted = (load_model(tmp_path / name)(ids, mask) for name in ("base", "base", "actor"))
        assert torch.equal(base, again) and not torch.equal(base, adapted)
        assert load_reward_model(tmp_path / "judge")(ids, mask).shape == ids.shape
    tokenizer = open_tokenizer(str(tmp_path / "actor"), None, 64)[0]
    gpu_tools.write_rows(tmp_path / "rows.jsonl", 3, 20, 10)
    rows = [encode_pair(tokenizer, record, 64) for record in read_records(tmp_path / "rows.jsonl")]
    assert all((n_prompt, len(chosen)) == (20, 29) for chosen, _, n_prompt in rows)


def test_the_runs_on_a_card_of_24_gb_are_those_of_the_page():
    sft_flags, ppo_flags = (gpu_memory.documented(step) for step in ("sft", "ppo"))
    assert "--checkpointing" in sft_flags and "--lora-rank" in sft_flags and "--checkpointing" in ppo_flags
    assert not {"--model", "--out", "LLAMA-7B", "runs/sft", "--num_gpus"} & {*sft_flags, *ppo_flags}


@pytest.mark.parametrize("found, reserved, oks", [(1.0, 22.0, [True, True]), (1.2, 22.0, [False, True]),
                                                  (0.5, 22.0, [False, True]), (1.0, 23.5, [True, False])])
def test_a_run_must_take_what_is_computed_and_what_the_card_has(found, reserved, oks, place, monkeypatch):
    job = gpu_memory.JOBS[0]
    monkeypatch.setattr(gpu_memory, "computed", lambda job, place: {"the rest": 1e9})
    monkeypatch.setattr(gpu_memory, "measured", lambda job, place: (
        {"the rest": found * 1e9}, {"reserved": reserved * 1e9, "besides": 0.5e9}))
    assert verdicts(gpu_memory.check_job(job, place)) == [*oks, True]


def test_the_peak_of_a_phase_is_its_own():
    owner = SimpleNamespace(work=lambda: torch.zeros(10_000).sum())
    peaks = gpu_memory.Peaks(torch.device("cpu"))
    peaks.inside(owner, "work", "work")
    with peaks.live:
        kept = torch.zeros(1000)
        owner.work()
        kept = kept + torch.zeros(1000)
    peaks.end()
    assert peaks.most["work"] == pytest.approx(44_000, abs=100)
    assert peaks.most["the rest"] == pytest.approx(12_000, abs=100)


def test_what_pytorch_has_reserved_at_most_outlives_the_phases(monkeypatch):
    now = {"allocated": 5, "reserved": 9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.update(allocated=2, reserved=4))
    peaks = gpu_memory.Peaks(torch.device("cuda"))
    peaks.end()
    peaks.end()
    assert peaks.reserved == 9 and peaks.most == {"the rest": 5}


# ------------------------------------------------------------------------------------------------ speed
def test_the_operations_of_a_forward_pass_are_those_that_pytorch_counts():
    config = LlamaConfig(vocab_size=352, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4)
    model, (B, T) = Llama(config), (3, 16)
    ids = torch.zeros(B, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(ids, torch.ones_like(ids))
    causal_half = 2 * B * T * 2 * 32 * T     # PyTorch counts all of attention
    assert gpu_speed.operations(config, B * T, T, B * T) == counter.get_total_flops() - causal_half


def test_the_limit_of_a_token_reads_weights_and_cache_once():
    config = LlamaConfig(vocab_size=352, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    weights = sum(p.numel() for p in Llama(config).parameters()) - 352 * 32
    cache = 5 * 100 * 2 * 2 * 2 * 8          # texts, tokens, keys and values, layers, KV heads, head size
    assert gpu_speed.decoding_limit(config, 5, 100, 2, 1e6) == pytest.approx(2 * (weights + cache) / 1e6)


def test_a_share_above_the_limit_means_that_the_clock_did_not_wait(place):
    place.small = False
    found = [gpu_speed.share_of_limit("x", 1.0, seconds, (0.3, 1.05), place) for seconds in (0.5, 1.5, 5.0)]
    assert verdicts(found) == [False, True, False]


def test_transformers_has_the_same_weights_and_says_the_same():
    model, ids = tiny_llama(), torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    peer = gpu_speed.peer_of(model)
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, model(ids, torch.ones_like(ids)), atol=1e-4, rtol=1e-4)
    assert peer.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
