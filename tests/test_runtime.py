"""The cellar: command lines, what ranks agree on, signals, what is printed (faults are in test_faults.py)."""
import math
import signal
import sys
import time
from argparse import ArgumentTypeError
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import chat
import ppo
import reward
import runtime.checkpoint
import runtime.ranks
import sft
from conftest import metrics, tiny_llama
from llama import Llama
from lora import add_lora, save_adapter
from runtime.checkpoint import Run, Stopped, on_signal, stoppable
from runtime.engine import (
    backward_and_step,
    divide_frozen,
    engine_metrics,
    made_whole,
    make_engine,
    moments_of,
    rate_share,
    save_whole,
)
from runtime.errors import BadInput, exit_with_one_line, without_controls
from runtime.flags import number, shares
from runtime.log import Log
from runtime.ranks import (
    fail_together,
    from_all,
    lost_touch,
    max_over_ranks,
    run,
    say,
    start_group,
    sum_over_ranks,
)
from training import on_ranks, prepare, save_talker

HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\x07e"


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None           # or its next engine in this process would use the destroyed one


@pytest.fixture(autouse=True)
def no_signal():
    yield
    runtime.checkpoint.seen.update(signal=0, at=0.0)


# ------------------------------------------------------------------------------------------------ flags
@pytest.fixture
def parsed(monkeypatch):
    """parsed(script, words) -> its flags."""
    def parse(script, words=""):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words.split()])
        return script.get_args()
    return parse


SFT, PPO = "--model m --data d --out o ", "--actor a --reward r --data d --out o "


def test_flags_are_taken_with_underscores_and_with_hyphens(parsed):
    args = parsed(sft, SFT + "--micro_batch 2 --lora_rank=4 --lora-targets q_proj,up_proj --local_rank=1")
    assert (args.micro_batch, args.lora_rank, args.lora_targets) == (2, 4, ["q_proj", "up_proj"])


@pytest.mark.parametrize("word, near", [("--lora-rnk", "--lora-rank"), ("--xyzzy", None),
                                        ("--learning_rates", None)])
def test_an_unknown_flag_names_the_nearest(word, near, parsed):
    with pytest.raises(BadInput, match="unknown argument") as error:
        parsed(sft, f"{SFT} {word} 3")
    says = str(error.value)
    assert word.replace("_", "-") in says
    assert f"did you mean {near}?" in says if near else "did you mean" not in says


@pytest.mark.parametrize("script, words, says", [
    (sft, SFT + "--lora-targets q_proj", "--lora-targets has no effect without --lora-rank"),
    (sft, SFT + "--lora-rank 0 --lora-dropout 0.1", "--lora-dropout has no effect without --lora-rank"),
    (reward, SFT + "--lora-alpha 3", "--lora-alpha has no effect without --lora-rank"),
    (reward, SFT + "--eval-data x --eval-share 0.1", "--eval-share has no effect beside --eval-data"),
    (ppo, PPO + "--kl-gain 0.2", "--kl-gain has no effect without --kl-target"),
    (ppo, PPO + "--norm-prompts 9", "--norm-prompts has no effect without --reward-norm rollout"),
    (ppo, PPO + "--norm-prompts 9 --reward-norm none",
     "--norm-prompts has no effect without --reward-norm rollout"),
    (ppo, PPO + "--ptx-coef 1", "--ptx-coef has no effect without --ptx-data"),
])
def test_a_flag_without_effect_is_refused(script, words, says, parsed):
    with pytest.raises(BadInput, match=says):
        parsed(script, words)


def test_flags_that_depend_on_others_get_their_defaults(parsed):
    args = parsed(ppo, PPO)
    assert (args.lora_alpha, args.lora_targets) == (16.0, ["q_proj", "k_proj"])
    assert (args.kl_gain, args.norm_prompts) == (0.1, 256)
    assert parsed(ppo, PPO + "--reward-norm rollout --norm-prompts 9").norm_prompts == 9
    assert parsed(sft, SFT + "--eval-data x").eval_share == 0.05


def test_help_shows_every_default_and_each_trainer_has_the_flags_that_mean_the_same(parsed, capsys):
    for script in (sft, reward, ppo, chat):
        with pytest.raises(SystemExit) as end:
            parsed(script, "-h")
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0
        if script is not chat:
            assert "(q_proj,k_proj)" in text and "(4,4,2)" in text and "(0.03)" in text and "(1800.0)" in text
            assert "--local" not in text     # the launcher's own


def test_a_file_holds_flags_with_comments(parsed, tmp_path):
    (tmp_path / "my.args").write_text("# mine\n--model m   # a comment\n--lora_rank 4\n--data 'a b' c\n")
    args = parsed(sft, f"@{tmp_path / 'my.args'} --out o --lora-rank 8")
    assert (args.model, args.data, args.lora_rank) == ("m", ["a b", "c"], 8)


def test_types_of_flags():
    assert number(0, 1)("0.5") == 0.5 and number(1, kind=int)("7") == 7
    assert shares("4,4,2") == [4, 4, 2] and shares("none") is None
    for wrong in ("2", "nan", "-0.1", "inf"):
        with pytest.raises(ArgumentTypeError, match="is not from 0 to 1"):
            number(0, 1)(wrong)
    for kind, wrong, name in ((int, "1.5", "whole number"), (int, "1e3", "whole number"),
                              (float, "auto", "number")):
        with pytest.raises(ArgumentTypeError, match=f"{wrong} is not a {name}"):
            number(1, kind=kind)(wrong)
    for wrong in ("4,x,2", "4,4", "0,0,0", "nan,1,1", "-1,1,1", "", "1,1,inf"):
        with pytest.raises(ArgumentTypeError, match=f"{wrong} is not three shares"):
            shares(wrong)


# ------------------------------------------------------------------------------------------------ schedule
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    rates = [rate_share(done, 4, 20) for done in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.02 and rates[11] == pytest.approx(0.5 + 0.5 * math.cos(8 * math.pi / 17))


# ------------------------------------------------------------------------------------------------ ranks
def test_bad_input_inside_fail_together_is_everybodys():
    with pytest.raises(BadInput, match="no such file") as error, fail_together():
        raise BadInput("no such file")
    assert error.value.everywhere
    with pytest.raises(ZeroDivisionError), fail_together():        # other errors are left alone
        raise ZeroDivisionError
    assert from_all({"a": 1}) == [{"a": 1}] and sum_over_ranks(1.5, 2) == [1.5, 2.0]


@pytest.mark.parametrize("error, status, says", [
    (BadInput("x.json: is not JSON"), 2, "error: x.json: is not JSON\n"),
    (BadInput("unknown flag", everywhere=True), 2, "error: unknown flag\n"),
    (SystemExit(143), 143, ""), (KeyboardInterrupt(), 130, ""),
    (ArithmeticError("this one"), 1, "rank 0 failed:\nTraceback"),
])
def test_run_ends_with_the_status_and_the_words_of_what_happened(error, status, says, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(runtime.ranks, "leave", ends.append)
    monkeypatch.setattr(runtime.ranks, "finish", lambda: None)     # others need the group

    def main():
        raise error
    run(main)
    err = capsys.readouterr().err
    assert ends == [status] and err.startswith(says) and (says != "" or err == "")


def test_a_rank_beyond_the_first_leaves_the_words_to_rank_0(monkeypatch, capsys):
    ends, slept = [], []
    monkeypatch.setattr(runtime.ranks, "leave", ends.append)
    monkeypatch.setattr(runtime.ranks, "finish", lambda: None)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("RANK", "1")

    def main(error):
        raise error
    run(lambda: main(BadInput("of all", everywhere=True)))
    assert capsys.readouterr().err == "" and len(slept) == 1       # rank 0 has time to print the line
    run(lambda: main(BadInput("of this rank alone")))
    assert capsys.readouterr().err == "error: of this rank alone\n" and len(slept) == 1
    run(lambda: main(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")))
    assert "lost touch" in capsys.readouterr().err and len(slept) == 2 and ends == [2, 2, 1]


def test_a_users_own_runtime_error_is_not_taken_for_a_lost_rank():
    assert not lost_touch(RuntimeError("shapes do not match")) and not lost_touch(ValueError("gloo"))
    assert lost_touch(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))


def test_exit_with_one_line(capsys):
    def bad():
        raise BadInput("no file")
    with pytest.raises(SystemExit) as end:
        exit_with_one_line(bad)
    assert end.value.code == 2 and capsys.readouterr().err == "error: no file\n"


# ------------------------------------------------------------------------------------------------ signals
def test_a_signal_stops_an_evaluation_at_the_next_item():
    taken = []
    with pytest.raises(Stopped):
        for item in stoppable(range(9), "items"):
            taken.append(item)
            if item == 3:
                on_signal(signal.SIGTERM, None)
    assert taken == [0, 1, 2, 3]
    with pytest.raises(Stopped):             # and one that comes before an evaluation lets it not begin
        next(stoppable(range(9), "items"))


def test_without_a_signal_everything_is_yielded():
    assert list(stoppable(iter("abc"), "letters")) == ["a", "b", "c"] and list(stoppable([], "none")) == []


def test_ranks_with_fewer_items_look_on_until_all_have_ended(monkeypatch):
    others = iter([(0, 1), (0, 1), (0, 1), (0, 1), (0, 0)])        # what another rank with four items says
    looked = []

    def together(number, going):
        other_number, other_going = next(others)
        looked.append(bool(going))
        return max(number, other_number), max(going, other_going)
    monkeypatch.setattr(runtime.checkpoint, "max_over_ranks", together)
    assert list(stoppable("ab", "letters")) == ["a", "b"]
    assert looked == [True, True, False, False, False]


def test_a_second_signal_counts_only_after_five_seconds():
    on_signal(signal.SIGINT, None)
    on_signal(signal.SIGTERM, None)          # the launcher sends two
    assert runtime.checkpoint.seen["signal"] == signal.SIGINT
    runtime.checkpoint.seen["at"] -= 6
    with pytest.raises(SystemExit) as end:
        on_signal(signal.SIGTERM, None)
    assert end.value.code == 128 + signal.SIGTERM


def test_a_flag_that_an_older_checkpoint_did_not_know_counts_as_its_default(parsed):
    args = parsed(ppo, PPO + "--gamma 0.9")
    now = {name: value for name, value in vars(args).items() if name != "defaults"}
    old = {name: now[name] for name in now.keys() - {"kl_gain", "score_clip", "lora_targets"}}
    here = SimpleNamespace(args=args, out="o", flags=now)
    assert Run.changed_flags(here, old) == {} == Run.changed_flags(here, {})
    here.flags["score_clip"] = 3.0
    with pytest.raises(BadInput, match="score_clip 5.0 -> 3.0 would make it another run"):
        Run.changed_flags(here, old)
    here.flags.update(score_clip=5.0, log_every=7)
    assert Run.changed_flags(here, old) == {"log_every": "log_every 1 -> 7"}


def test_a_resumed_run_may_have_another_tracker_or_none(parsed):
    args = parsed(sft, SFT)
    now = {name: value for name, value in vars(args).items() if name != "defaults"}
    here = SimpleNamespace(args=args, out="o", flags=now)
    assert Run.changed_flags(here, {**now, "track": "wandb"}) == {"track": "track 'wandb' -> None"}
    here.flags = {**now, "track": "tensorboard"}
    del now["track"]                         # of a run that did not know the flag
    assert Run.changed_flags(here, now) == {"track": "track None -> 'tensorboard'"}


# -------------------------------------------------------------------------------------------- what is printed
def test_no_text_of_a_file_or_a_model_can_take_over_the_terminal(capsys):
    assert str(BadInput(f"{HOSTILE}\nsecond")) == "a[2Jb31mcde second"
    say(HOSTILE)
    assert capsys.readouterr().out == "a[2Jb31mcde\n" and without_controls("a\n\tb") == "a\n\tb"


@pytest.fixture
def log(tmp_path):
    log = Log(SimpleNamespace(out=tmp_path, log_every=2), 4, 0, sft.CURVES)
    yield log
    log.close()


def test_in_a_pipe_every_logged_step_is_a_line_and_on_a_terminal_only_evaluations_are(log, capsys):
    for _ in range(2):
        log.step(10, loss=2.0, lr=0.1)
    log.line(step=2, eval_ppl=3.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2", "step 2"]
    shown = []
    log.bar = SimpleNamespace(disable=False, update=lambda: None, close=lambda: None,
                              set_postfix_str=shown.append)
    for _ in range(2):
        log.step(10, loss=1.5, lr=0.1)
    log.line(step=4, eval_ppl=2.5)
    assert capsys.readouterr().out == "step 4  eval_ppl 2.5\n" and shown == ["loss 1.5"]
    lines = (log.out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5                   # the file has them all


def test_an_evaluation_breaks_between_metrics_where_the_terminal_is_narrow(log, capsys, monkeypatch):
    narrow, whole = "step 2\n  eval_score 0.1235\n  gold 0.5\n", "step 2  eval_score 0.1235  gold 0.5\n"
    for columns, shown in ((40, whole), (25, narrow), (5, narrow),
                           (30, "step 2  eval_score 0.1235\n  gold 0.5\n")):
        monkeypatch.setenv("COLUMNS", str(columns))
        for is_terminal in (True, False):    # a file has lines of any length
            monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
            log.line(step=2, eval_score=0.123456, gold=0.5)
            assert capsys.readouterr().out == (shown if is_terminal else whole)


def test_tokens_per_second_count_the_steps_alone(log, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(log, "draw", lambda: None)
    log.restart_clock()
    written = []
    monkeypatch.setattr(log, "write", written.append)
    for seconds, tokens in ((2, 10), (1, 10), (3, 20)):
        clock[0] += seconds
        log.step(tokens, loss=1.0)
        clock[0] += 50                       # an evaluation
        log.line(step=log.n, eval_ppl=1.0)
    assert [x["tokens_per_s"] for x in written if "tokens_per_s" in x] == [5.0, 10.0]
    clock[0] += 3
    log.step(4, loss=1.0)
    assert written[-1]["tokens_per_s"] == pytest.approx(24 / 6)


# ------------------------------------------------------------------------------------------ the engine
SETTINGS = {"weight_decay": 0.5, "warmup": 0.5, "micro_batch": 1, "grad_clip": 0.0, "zero_stage": 2,
            "offload": False}


@pytest.fixture
def deepspeed(monkeypatch):
    """DeepSpeed on the group of this process, as setup would start it."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"): # they are left as they are
        monkeypatch.setattr(dist.distributed_c10d, name, getattr(dist.distributed_c10d, name))
    start_group(False, timedelta(seconds=60))


def small_engine(accumulation=1, dtype=torch.float32, is_adapter=False, **changes):
    """DeepSpeed's engine of a matrix and a bias, for 8 updates. is_adapter: beside many frozen weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    trained = [*model.parameters()]
    if is_adapter:
        model.base = torch.nn.Linear(20, 20).requires_grad_(False)
    args = SimpleNamespace(**{**SETTINGS, **changes})
    return make_engine(args, model.to(dtype), trained, 0.1, 8, accumulation, dtype), model


def update(engine, model, x):
    """Weights after one update whose loss is x times their sum, so that each entry's gradient is x."""
    trained = [p for p in model.parameters() if p.requires_grad]
    backward_and_step(engine, x * sum(p.sum() for p in trained))
    return [p.detach().clone() for p in trained]


def test_adam_has_its_betas_and_weight_decay_is_of_matrices_alone(deepspeed):
    engine, model = small_engine()
    matrix, bias = (p.detach().clone() for p in model.parameters())
    assert {group["betas"] for group in engine.optimizer.param_groups} == {(0.9, 0.95)}
    new_matrix, new_bias = update(engine, model, 1.0)              # Adam's first update is the rate, 0.1 / 4
    assert torch.allclose(new_bias, bias - 0.025, atol=1e-5)
    assert torch.allclose(new_matrix, matrix * (1 - 0.025 * 0.5) - 0.025, atol=1e-5)


def test_the_rate_of_an_engine_rises_over_the_share_of_steps_that_warmup_is(deepspeed):
    engine, model = small_engine()
    rates = []
    for _ in range(8):
        rates.append(engine.get_lr()[0])
        update(engine, model, 1.0)
    assert rates == pytest.approx([0.1 * rate_share(done, 4, 8) for done in range(8)])


def test_an_update_is_the_mean_over_its_micro_batches_and_its_norm_is_clipped(deepspeed):
    for clip, share in ((0.0, 1.0), (1.0, 1 / (3 * 8 ** 0.5))):
        engine, model = small_engine(accumulation=2, grad_clip=clip)
        before = [p.detach().clone() for p in model.parameters()]
        assert all(map(torch.equal, update(engine, model, 2.0), before))
        update(engine, model, 4.0)
        assert engine_metrics(engine)["grad_norm"] == pytest.approx(3 * 8 ** 0.5, rel=1e-4)
        moment = engine.optimizer.optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.allclose(moment, torch.full_like(moment, 0.1 * 3 * share), rtol=1e-4)


@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage, offload", [(0, False), (1, False), (2, False), (1, True), (2, True)])
def test_a_gradient_that_is_not_finite_changes_nothing_and_those_in_a_row_are_counted(
        stage, offload, dtype, is_adapter, deepspeed):
    engine, model = small_engine(dtype=dtype, is_adapter=is_adapter, zero_stage=stage, offload=offload)
    counts = []
    for x in (1.0, math.inf, math.nan, 1.0, math.nan):
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        after = update(engine, model, x)
        assert all(map(torch.equal, before, after)) == (not math.isfinite(x))
        counts.append((engine.skipped_in_a_row, engine.skipped_steps))
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]


@pytest.mark.parametrize("stage, dtype", [(0, torch.float32), (0, torch.bfloat16), (2, torch.bfloat16)])
def test_the_moments_are_there_from_the_first_update_on_and_in_a_resumed_run(stage, dtype, deepspeed):
    engine, model = small_engine(zero_stage=stage, dtype=dtype)
    assert not moments_of(engine) and sum(p.numel() for p in engine.trained) == 8
    update(engine, model, 1.0)
    assert sum(x["exp_avg"].numel() for x in moments_of(engine).values()) == 8
    resumed, state = small_engine(zero_stage=stage, dtype=dtype)[0], engine.optimizer.state_dict()
    if stage:
        resumed.optimizer.load_state_dict([state], load_from_fp32_weights=True)
    else:
        resumed.optimizer.load_state_dict(state)
    assert moments_of(resumed)


def test_an_engine_says_nothing_but_what_it_trains(deepspeed, capsys):
    for stage in (0, 1, 2):
        small_engine(dtype=torch.bfloat16, is_adapter=True, zero_stage=stage)
        assert capsys.readouterr().out == "training 8 of 428 weights in 8 updates\n"


def test_under_zero_3_a_full_disk_is_told_with_the_bytes_of_the_whole_weights(deepspeed, tmp_path):
    model = torch.nn.Linear(1, 1)
    for p in model.parameters():             # as ZeRO-3 leaves a large weight
        p.ds_numel, p.data = 10**6, torch.empty(0)

    def write(model, out):
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match=r"No space left on device\); 8 MB are needed"):
        save_whole(model, tmp_path, write)


def resident(network):
    """How many numbers of the network's weights lie in memory whole."""
    return sum(p.numel() for p in network.parameters())


def test_under_zero_3_a_network_is_whole_while_it_generates_and_trains_afterwards(deepspeed):
    model = tiny_llama(std=0.05)
    ids, whole = torch.tensor([[1, 5, 9], [1, 7, 4]]), resident(model)
    mask, uniforms = torch.ones_like(ids, dtype=torch.bool), torch.rand(2, 6)
    expected = model.generate(ids, mask, 6, uniforms=uniforms)
    args = SimpleNamespace(**{**SETTINGS, "zero_stage": 3})
    engine = make_engine(args, model, [*model.parameters()], 0.1, 8, 1, torch.float32)
    gathers = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: gathers.append(resident(model)))
    for _ in range(2):                       # the hooks come back, and are taken off again
        with made_whole(model, [engine]):
            assert resident(model) == whole
            found = model.generate(ids, mask, 6, uniforms=uniforms)
            offload = engine.optimizer.parameter_offload
            assert not offload.forward_hooks and not offload.backward_hooks
        assert resident(model) < whole and set(gathers) == {whole} and len(gathers) == 6
        assert offload.forward_hooks and offload.backward_hooks
        gathers.clear()
        if expected is not None:
            assert all(map(torch.equal, expected, found))
        loss = engine(ids, mask).float().pow(2).mean()
        backward_and_step(engine, loss)
        expected = None                      # the weights have moved
        gathers.clear()
    assert engine_metrics(engine)["grad_norm"] > 0


def test_made_whole_puts_the_hooks_back_where_a_signal_ends_it(deepspeed):
    model = tiny_llama()
    args = SimpleNamespace(**{**SETTINGS, "zero_stage": 3})
    engine = make_engine(args, model, [*model.parameters()], 0.1, 8, 1, torch.float32)
    with pytest.raises(Stopped), made_whole(model, [engine]):
        raise Stopped
    assert engine.optimizer.parameter_offload.forward_hooks


@pytest.mark.parametrize("stage", [2, 3])
def test_a_frozen_network_is_divided_under_zero_3_alone_and_says_the_same(stage, deepspeed):
    model = tiny_llama(std=0.05)
    ids, whole = torch.tensor([[1, 5, 9]]), resident(model)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids, mask)
        args = SimpleNamespace(micro_batch=1, zero_stage=stage)
        assert divide_frozen(model, args, torch.float32) is model
        between_calls = 0 if stage == 3 else whole
        assert resident(model) == between_calls
        assert torch.equal(model(ids, mask), expected) and resident(model) == between_calls
    assert any(p.requires_grad for p in model.parameters()) == (stage == 2)


@pytest.fixture
def few_layers_at_a_time(deepspeed, monkeypatch):
    """DeepSpeed with ZeRO-3's bounds so small that a toy's layers come and go as those of a 7B do."""
    module = sys.modules.get("deepspeed") or __import__("deepspeed")
    initialize = module.initialize

    def smaller(config, **more):
        bounds = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
        if config["zero_optimization"].get("stage3_prefetch_bucket_size"):
            bounds["stage3_prefetch_bucket_size"] = 3000
        config = {**config, "zero_optimization": config["zero_optimization"] | bounds}
        return initialize(config=config, **more)

    monkeypatch.setattr(module, "initialize", smaller)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forward_passes_before_a_backward_pass_leave_a_network_whole(checkpointing, few_layers_at_a_time):
    """As in update_actor with --ptx-data, and as bench/memory.py counts it (fetched)."""
    model = tiny_llama(std=0.05, num_hidden_layers=8)
    whole, found, model.model.checkpointing = resident(model), [], checkpointing
    args = SimpleNamespace(**{**SETTINGS, "zero_stage": 3})
    engine = make_engine(args, model, [*model.parameters()], 0.1, 8, 1, torch.float32)
    model.model.layers[0].register_forward_hook(
        lambda *texts: texts[-1].register_hook(lambda _: found.append(resident(model))) and None)
    ids = torch.tensor([[1, 5, 9, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    backward_and_step(engine, sum(engine(ids, mask).float().pow(2).mean() for _ in range(2)))
    assert (max(found) > 0.8 * whole) == (not checkpointing) and resident(model) < 0.5 * whole


@pytest.mark.parametrize("job", ["sft-full", "ppo"])
def test_under_zero_3_what_is_saved_after_an_evaluation_is_whole(job, start, few_layers_at_a_time, tmp_path):
    expected = start(job, tmp_path / "whole", "--zero-stage 2")
    found = start(job, tmp_path / "divided", "--zero-stage 3")
    for line, other in zip(found[0], expected[0], strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)
    sizes = [[len(content) for content in record[2]] for record in (found, expected)]
    assert sizes[0] == sizes[1]
    with pytest.raises(SystemExit):          # a signal in an evaluation saves a checkpoint
        start(job, tmp_path / "run", "--zero-stage 3",
              at_evaluation=lambda n: n == 2 and on_signal(signal.SIGTERM, None))
    runtime.checkpoint.seen.update(signal=0, at=0.0)
    assert start(job, tmp_path / "run", "--zero-stage 3 --resume") == found


def test_a_checkpoint_under_zero_3_makes_one_weight_whole_at_a_time(start, tmp_path, monkeypatch):
    gathered, together = runtime.checkpoint.gathered, []

    def counting(parameters):
        together.append(len([*parameters]))
        return gathered(parameters)

    monkeypatch.setattr(runtime.checkpoint, "gathered", counting)
    start("sft-full", tmp_path / "run", "--zero-stage 3")
    assert set(together) == {1} and len(together) > 20             # the weights of the network, at each step


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_first_update_in_bf16_is_adams_first_in_every_stage(stage, deepspeed):
    engine, model = small_engine(dtype=torch.bfloat16, zero_stage=stage, warmup=0.0)
    before = [p.detach().float().clone() for p in model.to(torch.bfloat16).parameters()]
    after = update(engine, model, 1.0)
    bias = after[1].float() - before[1]
    assert torch.allclose(bias, torch.full_like(bias, -0.1), atol=0.005)       # its whole rate


def test_the_optimiser_of_offload_lies_on_the_cpu_and_trains_alike(deepspeed):
    after = []
    for offload in (False, True):
        engine, model = small_engine(offload=offload)
        after.append([update(engine, model, x) for x in (1.0, -2.0, 0.5)][-1])
        assert engine.optimizer.cpu_offload is offload
    assert all(map(torch.equal, *after))


def test_five_gradients_in_a_row_that_are_not_finite_end_the_run_and_four_do_not(tmp_path):
    engine = SimpleNamespace(fp16_enabled=lambda: False, skipped_in_a_row=4)
    here = SimpleNamespace(engines={"model": engine}, args=SimpleNamespace(save_every=100), rank=0,
                           steps_on_disk=lambda: [7])
    Run.end_step(here, 9, [5, 6], None)
    engine.skipped_in_a_row = 5
    with pytest.raises(BadInput, match=r"step 9: the last 5 gradients of the model.*\[5, 6\].*step-7"):
        Run.end_step(here, 9, [5, 6], None)


# ------------------------------------------------------------------------------------------ resume
class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def jobs(tokenizer_file, pairs_file, tmp_path_factory):
    """{name: (script, its command line, the function that evaluates)} of short runs that save every step."""
    root = tmp_path_factory.mktemp("jobs")
    talker = save_talker(root / "talker", tokenizer_file)
    for name, kind, task in (("actor", Llama, "CAUSAL_LM"), ("reward", reward.RewardModel, "SEQ_CLS")):
        torch.manual_seed(7)
        model = kind.from_pretrained(talker)
        add_lora(model, 2, 4, ["q_proj", "v_proj"])
        save_adapter(model, root / name, "default", talker, task)
    (root / "text.jsonl").write_text("".join(f'{{"text": "the sky is blue {i}"}}\n' for i in range(20)))
    steps = f"--data {pairs_file} --steps 5 --save-every 1 --eval-every 2 --log-every 1 --weight-decay 1"
    full = f"--model {talker} {steps} --max-len 64 --batch 8 --micro-batch 2 --lr 1e-3"
    return {
        "sft": (sft, f"{full} --lora-rank 2 --lora-dropout 0.3", "perplexity"),
        "sft-full": (sft, full, "perplexity"),
        "ppo": (ppo, f"--actor {root}/actor --reward {root}/reward {steps} --max-prompt 32 --max-new 8 "
                     "--rollout-batch 8 --mini-batch 4 --micro-batch 2 --ppo-epochs 2 --eval-prompts 4 "
                     "--actor-lr 1e-2 --critic-lr 1e-2 --kl-target 0.01 --kl-gain 0.5 --ema 0.9 "
                     "--reward-norm rollout --norm-prompts 8 "
                     f"--ptx-data {root}/text.jsonl --ptx-coef 0.5", "answer_held_out")}


@pytest.fixture
def start(jobs, deepspeed, monkeypatch):
    """start(job, out, more flags, at_evaluation): runs it; at_evaluation(n) begins the n-th evaluation."""
    def run(job, out, more="", at_evaluation=lambda n: None):
        script, words, name = jobs[job]
        evaluate, n = getattr(script, name), [0]

        def evaluating(*arguments):
            n[0] += 1
            at_evaluation(n[0])
            return evaluate(*arguments)

        with monkeypatch.context() as patches:
            prepare(script, f"{words} --out {out} {more}".split(), patches)
            patches.setattr(script, name, evaluating)
            script.main()
        runtime.checkpoint.seen.update(signal=0, at=0.0)
        return record(out)
    return run


def record(out):
    """What a run leaves: its lines but for times, its samples, and its weights."""
    lines = [{**line, "tokens_per_s": 0} for line in metrics(out)]
    samples = (out / "samples.jsonl").read_text() if (out / "samples.jsonl").exists() else None
    files = sorted([*out.glob("**/adapter_model.safetensors"), *out.glob("model.safetensors")])
    return lines, samples, [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def done():
    """The records of runs that nobody disturbed, by job."""
    return {}


def steps_saved(out):
    return sorted(int(folder.name[5:]) for folder in out.glob("checkpoints/*"))


def kill_in_third(n):
    if n == 3:
        raise Killed


@pytest.mark.parametrize("job, more", [("sft", ""), ("ppo", ""), ("ppo", "--zero-stage 3 --offload ")])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(job, more, start, done, tmp_path, capsys):
    done[job + more] = start(job, tmp_path / "whole", more)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        start(job, out, more, at_evaluation=kill_in_third)         # step 4 is in the log, and not saved
    assert steps_saved(out) == [2, 3] and metrics(out)[-1]["step"] == 4
    capsys.readouterr()
    assert start(job, out, more + "--resume") == done[job + more]
    assert "after step 3\n" in capsys.readouterr().out and steps_saved(out) == [3, 4]


def test_a_checkpoint_that_is_damaged_is_passed_over(start, done, tmp_path, capsys):
    expected = done.get("sft") or start("sft", tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(Killed):
        start("sft", out, at_evaluation=kill_in_third)
    file = out / "checkpoints" / "step-3" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert start("sft", out, "--resume") == expected
    said = capsys.readouterr()
    assert "after step 2\n" in said.out and "step-3" in said.err and "damaged" in said.err


def test_an_evaluation_that_a_signal_stops_is_made_up_for(start, done, tmp_path):
    expected = done.get("sft") or start("sft", tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        start("sft", out, at_evaluation=lambda n: n == 2 and on_signal(signal.SIGTERM, None))
    assert end.value.code == 143 and steps_saved(out) == [1, 2]
    assert [line["step"] for line in metrics(out)] == [0, 1, 2]    # the evaluation after step 2 has no line
    runtime.checkpoint.seen.update(signal=0, at=0.0)
    assert start("sft", out, "--resume") == expected


def test_a_resumed_run_may_not_have_another_seed_and_may_log_less(start, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        start("sft", out, at_evaluation=kill_in_third)
    with pytest.raises(BadInput, match="seed 1234 -> 5 would make it another run"):
        start("sft", out, "--resume --seed 5")
    lines, *_ = start("sft", out, "--resume --log-every 5")
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 5, 5]


def test_where_the_moments_start_anew_the_rate_does_not(start, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        start("sft", out, at_evaluation=kill_in_third)
    lines, *_ = start("sft", out, "--resume --zero-stage 0")
    said = capsys.readouterr().out
    assert "zero_stage 2 -> 0" in said and "the optimisers' moments start anew" in said
    rates = [line["lr"] for line in lines if "lr" in line]         # DeepSpeed reads them in the optimiser
    assert rates == pytest.approx([1e-3 * rate_share(done, 1, 5) for done in range(5)])


# ------------------------------------------------------------------------------------------ several ranks
def test_sums_and_largest_numbers_are_over_all_ranks(monkeypatch):
    found = on_ranks(3, lambda rank: (sum_over_ranks(rank, 1.5), max_over_ranks(-rank, rank)), monkeypatch)
    assert found == [([3.0, 4.5], [0.0, 2.0])] * 3


def test_what_is_wrong_on_one_rank_ends_all_of_them(monkeypatch):
    def work(rank):
        with pytest.raises(BadInput, match="of rank 1") as error, fail_together():
            if rank == 1:
                raise BadInput("of rank 1")
        return error.value.everywhere
    assert on_ranks(3, work, monkeypatch) == [True] * 3


def test_a_network_that_one_rank_cannot_read_is_divided_by_none(monkeypatch):
    """Dividing it would wait for that rank until --timeout."""
    monkeypatch.setattr("deepspeed.initialize", lambda **_: pytest.fail("waits for a rank that has gone"))

    def work(rank):
        with pytest.raises(BadInput, match="of rank 1") as error, fail_together():
            if rank == 1:
                raise BadInput("of rank 1")
            divide_frozen(tiny_llama(), SimpleNamespace(micro_batch=1, zero_stage=3), torch.float32)
        return error.value.everywhere
    assert on_ranks(3, work, monkeypatch) == [True] * 3
