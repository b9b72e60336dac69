"""Small faults of the code, one at a time, each of which the fast tests must notice.

A test that cannot fail proves nothing. So this program puts a fault into a copy of the project, runs the
tests of the file that has the fault, and expects one of them to fail. A fault that no test notices survives.

    python tests/mutants.py                          # all of them, about a quarter of an hour
    python tests/mutants.py --sample 6 --seed 3      # six random ones
    python tests/mutants.py --only gae               # those whose file, old or new text holds "gae"

A new fault is one line in FAULTS: the file, a text that the file holds exactly once, and the text that takes
its place. Every fault must change a result. tests/test_mutants.py checks the rest of this.
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TIMEOUT = 300                                # seconds: a fault that makes the tests hang is noticed too

# The test files that matter for a file with a fault; those of all files where it is not named here.
TESTS = {
    "data.py": ["test_data.py", "test_tokenizer.py", "test_votes.py"],
    "llama.py": ["test_llama.py", "test_reward.py"],
    "lora.py": ["test_lora.py", "test_tokenizer.py"],
    "sft.py": ["test_sft.py"],
    "reward.py": ["test_reward.py"],
    "ppo.py": ["test_ppo.py", "test_runtime.py"],
    "runtime/patterns.py": ["test_adapters.py"],
    "runtime/foreign.py": ["test_foreign.py"],
    "runtime/folders.py": ["test_foreign.py", "test_llama.py"],
    "runtime/adapters.py": ["test_adapters.py"],
    "runtime/checkpoint.py": ["test_runtime.py"],
    "runtime/engine.py": ["test_runtime.py", "test_gpu.py"],
    "runtime/flags.py": ["test_runtime.py"],
    "runtime/kinds.py": ["test_kinds.py", "test_data.py"],
    "runtime/rows.py": ["test_kinds.py", "test_data.py"],
    "runtime/votes.py": ["test_votes.py"],
    "runtime/screen.py": ["test_votes.py", "test_chat.py"],
    "chat.py": ["test_votes.py", "test_chat.py"],
    "runtime/gpu.py": ["test_gpu.py"],
    "runtime/ranks.py": ["test_runtime.py", "test_gpu.py"],
    "runtime/speed.py": ["test_llama.py"],
    "runtime/trackers.py": ["test_trackers.py"],
    **{f"runtime/tokenizer_{part}.py": ["test_tokenizer.py"] for part in ("read", "convert", "write")},
    **{f"bench/gpu{part}.py": ["test_gpu_script.py"]
       for part in ("", "_tools", "_correct", "_memory", "_speed")},
    "bench/memory.py": ["test_memory.py", "test_clusters.py"],
    **{f"toy/{name}.py": ["test_vote_lesson.py"] for name in ("rules", "vote")},
    "runtime/errors.py": ["test_runtime.py", "test_web.py"],
    "runtime/log.py": ["test_runtime.py", "test_web.py"],
    **{f"web/{name}.py": ["test_web.py"] for name in ("__main__", "talk", "rows", "run", "page")},
}


@dataclass(frozen=True)
class Fault:
    """`old` in the file becomes `new`. slow: the pytest -k expression of a slow test, for a fault that no
    fast test can notice."""
    file: str
    old: str
    new: str
    slow: str = ""


llama, lora, data, sft, reward, ppo, chat = (
    partial(Fault, f"{name}.py") for name in ("llama", "lora", "data", "sft", "reward", "ppo", "chat"))
votes, screen = (partial(Fault, f"runtime/{name}.py") for name in ("votes", "screen"))
(gpu, patterns, foreign, folders, adapters, kinds, rows, ranks, engine, checkpoint, speed, trackers, read,
 convert, write) = (
    partial(Fault, f"runtime/{name}.py")
    for name in ("gpu", "patterns", "foreign", "folders", "adapters", "kinds", "rows", "ranks", "engine",
                 "checkpoint", "speed", "trackers", "tokenizer_read", "tokenizer_convert", "tokenizer_write"))
memory = partial(Fault, "bench/memory.py")
rules, vote = (partial(Fault, f"toy/{name}.py") for name in ("rules", "vote"))
program, talk, shown_rows, page, log, errors = (
    partial(Fault, name) for name in ("web/__main__.py", "web/talk.py", "web/rows.py", "web/page.py",
                                      "runtime/log.py", "runtime/errors.py"))

on_gpu, tools, correct, peaks, speed_of = (
    partial(Fault, f"bench/gpu{part}.py") for part in ("", "_tools", "_correct", "_memory", "_speed"))

FAULTS = [
    # masks: the prompt has no loss, EOS belongs to the answer, padding reaches nothing
    data("~mask | (torch.arange(ids.shape[1]) < n_prompt)", "~mask"),
    data("(torch.arange(ids.shape[1]) < n_prompt)", "(torch.arange(ids.shape[1]) <= n_prompt)"),
    data("~mask | (torch.arange", "(torch.arange"),
    data("return ids + [tokenizer.eos_id]", "return ids"),
    llama("ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0"),
    llama("& mask[:, None, None, :]", "& torch.ones_like(mask)[:, None, None, :]"),
    llama("(columns <= rows)", "(columns <= rows + 1)"),
    reward("chosen_mask | rejected_mask", "chosen_mask & rejected_mask"),
    ppo("return (logp - ref_logp) * mask", "return logp - ref_logp"),
    ppo("return rewards * mask", "return rewards"),
    ppo("rewards, values = rewards * mask, values * mask", "rewards = rewards * mask"),
    ppo("n = mask.sum().clamp(min=1)", "n = mask.numel()"),
    ppo("1 + clip)) * mask", "1 + clip))"),
    ppo("(clipped - returns) ** 2) * mask", "(clipped - returns) ** 2)"),
    ppo("(ratio * mask).sum()", "ratio.sum()"),
    ppo("(returns - values)[mask].double()", "(returns - values).double()"),
    ppo("= values * mb.response_mask", "= values"),
    ppo("(is_eos(response, tokenizer.eos_ids) & response_mask).any(1)", "~response_mask.all(1)"),

    # shifts: column t predicts token t + 1, a value stands before its token, a score at the last token
    sft("at=F.pad(has_label, (0, 1))", "at=F.pad(has_label, (1, 0))"),
    sft("labels[:, 1:][has_label]", "labels[:, :-1][has_label]"),
    ppo("F.pad(mb.response_mask, (mb.start - 1, 1))", "F.pad(mb.response_mask, (mb.start, 0))"),
    ppo("[:, mb.start - 1:-1]", "[:, mb.start:]"),
    ppo("F.pad(values, (0, 1))[:, 1:]", "F.pad(values, (1, 0))[:, :-1]"),
    ppo("mask.long().sum(1) - 1", "mask.long().sum(1) - 2"),
    ppo("self.start - first", "self.start"),
    reward("mask.shape[1] - 1 - mask.long().flip(1).argmax(1)", "mask.long().sum(1) - 1"),
    reward("columns >= starts[:, None]", "columns > starts[:, None]"),
    reward("torch.minimum(columns, last_column(mask)[:, None])", "columns.expand_as(mask)"),
    data("if a != b)", "if a == b)"),

    # signs
    sft("return math.exp(", "return math.exp(-"),
    reward("chosen.float() - rejected.float()", "rejected.float() - chosen.float()"),
    reward("[chosen > rejected,", "[chosen < rejected,"),
    reward("[chosen > rejected,", "[chosen >= rejected,"),
    reward("chosen - rejected, chosen,", "rejected - chosen, chosen,"),
    reward("mean_square - mean**2", "mean_square"),
    ppo("rewards = -kl_coef", "rewards = kl_coef"),
    ppo("score.clamp(-clip, clip) - penalty", "score.clamp(-clip, clip) + penalty"),
    ppo("gamma * next_values - values", "gamma * next_values + values"),
    ppo("return adv, adv + values", "return adv, adv - values"),
    ppo("maximum(-adv * ratio, -adv", "maximum(adv * ratio, adv"),
    ppo("maximum(-adv * ratio, -adv", "minimum(-adv * ratio, -adv"),
    ppo("((new_logp - old_logp) * mask).exp()", "((old_logp - new_logp) * mask).exp()"),
    ppo("-(logp.exp() * logp)", "(logp.exp() * logp)"),
    ppo("(ratio - 1 - log_ratio)", "(ratio - 1 + log_ratio)"),
    ppo('score - stats["mean"]', 'score + stats["mean"]'),
    ppo("loss + args.ptx_coef", "loss - args.ptx_coef"),

    # normalisers: a loss is a mean over all tokens, or pairs, of all ranks and micro-batches
    sft("n_labels(rows) / (world * accumulation)", "n_labels(rows) / world"),
    sft("n_labels(rows) / (world * accumulation)", "n_labels(rows) / accumulation"),
    sft("sum(len(ids) - n_prompt", "sum(len(ids)"),
    sft("[0] / n_labels(rows)", "[0] / len(rows)"),
    sft("sum_over_ranks(loss_sum)[0] / (world * accumulation)", "loss_sum / accumulation"),
    reward("total=len(micro)", "total=len(rows)"),
    reward("sum_over_ranks(loss_sum)[0] / (world * accumulation)", "loss_sum / accumulation"),
    reward("sum(1) / mask.sum(1).clamp(min=1)", "sum(1) / mask.shape[1]"),
    reward("x / len(rows)", "x / len(order)"),
    ppo("mask[rows].sum() / (world * len(my_micros))", "mask.sum() / (world * len(my_micros))"),
    ppo("mask[rows].sum() / (world * len(my_micros))", "mask[rows].sum() / len(my_micros)"),
    ppo("mask[rows].sum() / (world * len(my_micros))", "mask[rows].sum() / world"),
    ppo("n_labels(texts) / (world * len(my_micros))", "n_labels(texts) / len(my_micros)"),
    ppo("x / dist.get_world_size()", "x"),
    ppo("float(torch.stack(x).mean())", "float(torch.stack(x).sum())"),
    ppo("return whiten(adv, mask), returns", "return adv, returns"),
    ppo('/ stats["std"]', '* stats["std"]'),
    ppo('"mean": float(score.mean())', '"mean": float(score.sum())'),
    ppo("0.5 * torch.maximum(", "torch.maximum("),
    ppo("kl.mean()", "kl.sum()"),

    # roles
    ppo('("actor", mine.old_logp), ("ref", mine', '("ref", mine.old_logp), ("actor", mine'),
    ppo('actor, at_once = roles["actor"]', 'actor, at_once = roles["ref"]'),
    ppo('response_values(roles["critic"]', 'response_values(roles["reward"]'),
    ppo('last_scores(roles["reward"]', 'last_scores(roles["critic"]'),
    ppo('"ref": Role(actor, "ref")', '"ref": Role(actor, "actor")'),
    ppo('"ref": Role(ref)}', '"ref": Role(actor)}'),
    ppo("critic.score.load_state_dict(reward.score.state_dict())", "critic.score = reward.score"),
    ppo("critic.score.load_state_dict(reward.score.state_dict())", "pass"),
    ppo("and reward_adapter and reward_base == base", "and reward_adapter"),
    ppo('return name == "score.weight" or (', "return ("),
    ppo("role.activate()\n    for mb in my_micros", "for mb in my_micros"),
    ppo("role.network.eval()", "role.network.train()"),

    # ranks: each has its share, and what fills up is not counted
    data("mine = rows[rank::world]", "mine = rows[rank:]"),
    sft("[(rows[0][0], len(rows[0][0]))]", "[rows[0]]"),
    reward("[:, real].sum(1)", ".sum(1)"),
    ppo("x[rank * share:(rank + 1) * share]", "x[rank::world]"),
    ppo("fillers = -len(prompts) % world", "fillers = 0"),
    ppo("gather(x)[:n]", "gather(x)"),
    ppo("longest = int(max_over_ranks(int(response_mask.any(0).sum()))[0])", "longest = args.max_new"),
    ppo("longest = int(max_over_ranks(int(response_mask.any(0).sum()))[0])",
        "longest = int(response_mask.any(0).sum())"),
    ppo("uniforms=piece_uniforms", "uniforms=uniforms"),
    engine("rows = -int(max_over_ranks(-mine)[0])", "rows = mine"),
    engine("bytes_of_whole(p) - p.nbytes", "0"),
    engine("if not moments_of(engine) for p", "for p"),
    engine("bytes_of_whole(p) for p", "p.nbytes for p"),
    Fault("runtime/flags.py", "except ValueError:", "except KeyError:"),
    ranks("cores() // int(", "cores() + 0 * int("),
    ranks("[is_out_of_ram(error)]", "[False]"),
    ranks("if args.offload and not cuda:", "if False:"),
    gpu("0.8 * free", "1.0 * free"),
    gpu("max(1, int(", "max(0, int("),
    gpu("* columns * width", "* prompt * width"),
    gpu("if usable or not (has_gpu or warned)", "if True"),
    gpu("has_gpu or warned", "has_gpu"),
    gpu('os.environ["CUDA_VISIBLE_DEVICES"] = ""', "return False"),
    gpu('in ("", "-1"):', 'in ("",):'),
    ranks('args.zero_stage == 0 and args.dtype == "fp16"', 'args.dtype == "fp16"'),
    ranks("args.zero_stage == 0 and args.offload", "False"),
    ranks("reduced(numbers, dist.ReduceOp.SUM)", "reduced(numbers, dist.ReduceOp.MAX)"),
    ranks("reduced(numbers, dist.ReduceOp.MAX)", "reduced(numbers, dist.ReduceOp.SUM)"),
    ranks("[error for error in from_all(mine) if error]", "[error for error in [mine] if error]"),
    engine("        fail_if_another_did() ", "        pass "),

    # splits and seeds
    data("sum(weights[:phase + 1])", "sum(weights[:phase + 2])"),
    data('f"{seed}:{first_question(record)}"', 'f"{first_question(record)}"'),
    data('f"{seed} held out"', "seed"),
    data("split_records(records, sides, 1, other_seed)", "split_records(records, sides, 0, other_seed)"),
    data("bool(split) and is_for_all_steps(file, of_file)", "bool(split)"),
    data('random.Random(f"{seed} {epoch}")', 'random.Random(f"{seed}")'),
    data("pool = 50 * batch", "pool = len(lengths)"),
    sft("PHASE = 0 ", "PHASE = 1 "),
    reward("PHASE = 1 ", "PHASE = 0 "),
    ppo("PHASE = 2 ", "PHASE = 1 "),
    ppo("seed * 1_000_003 + step", "seed * 1_000_003"),
    ppo("rng = random_numbers(args.seed, step)", "rng = random_numbers(args.seed, 1)"),
    ppo("torch.randperm(args.rollout_batch, generator=rng)", "torch.arange(args.rollout_batch)"),
    ppo("generator=random_numbers(args.seed, HELD_OUT)", "generator=None"),

    # temperature, clips, penalties and other numbers of the algorithm
    llama("else logits / temperature", "else logits * temperature"),
    ppo("logits.float() / temperature", "logits.float() * temperature"),
    ppo("at_temperature(rows, temperature)", "at_temperature(rows, 1)"),
    ppo("answer_logps(model, mb, args.temperature", "answer_logps(model, mb, 1.0"),
    ppo("answer_logps(role.engine, mb, args.temperature", "answer_logps(role.engine, mb, 1.0"),
    ppo("args.temperature, n_words)", "args.temperature, n_words + 9)"),
    ppo("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(0, 1 + clip)"),
    ppo("old + (new - old).clamp(-clip, clip)", "new"),
    ppo("mb.response_mask, args.value_clip, total", "mb.response_mask, args.clip, total"),
    ppo("score.clamp(-clip, clip) - penalty", "(score - penalty).clamp(-clip, clip)"),
    ppo("torch.where(batch.ended, 0.0", "torch.where(~batch.ended, 0.0"),
    ppo("deltas[:, t] + gamma * lam * next_adv", "deltas[:, t] + lam * next_adv"),
    ppo("args.gamma, args.lam)", "args.lam, args.gamma)"),
    ppo("kl / target - 1", "1 - kl / target"),
    ppo("min(0.2, ", "min(2.0, "),
    ppo("torch.float32), 1 - decay)", "torch.float32), decay)"),
    ppo("is_first=(ppo_epoch, n) == (0, 0)", "is_first=n == 0"),
    ppo("updates = args.ppo_epochs * args.rollout_batch", "updates = args.rollout_batch"),

    # LoRA
    lora("(x) * self.scale[self.active]", "(x)"),
    lora("rank, alpha / rank, dropout)", "rank, alpha, dropout)"),
    lora("alpha / rank ** 0.5 if", "alpha / rank if"),
    lora("layer.scale[name] * ranks[layer_path]", "layer.scale[name]"),
    lora("layer.weight.float() + delta", "layer.weight.float() - delta"),
    lora(".weight.float() * layer.scale[name]", ".weight.float()"),
    lora("nn.init.zeros_(self.lora_B[name].weight)", "nn.init.ones_(self.lora_B[name].weight)"),
    lora("self.dropout[self.active], self.training", "self.dropout[self.active], True"),
    lora('and not key.startswith("score.")', ""),
    lora("name if name in layer.lora_A else None", "name if name in layer.lora_A else layer.active"),

    # other people's adapters: which layers, which alpha, and what would change the result
    adapters("for pattern in reversed(patterns)", "for pattern in patterns"),
    adapters("path in targets or number(path) in layers", "number(path) in layers"),
    adapters('- chosen(config.get("exclude_modules") or [])', ""),
    adapters('- chosen(config.get("modules_to_save") or [])', ""),
    adapters('{*linears} - {"lm_head"}', "{*linears}"),
    adapters("layers not in (None, [])", "layers"),
    adapters('"orthogonal", "mica"}', '"orthogonal", "mica", "pissa"}'),
    adapters("torch.equal(tensor.to(own), own)", "True"),
    adapters("own = torch.zeros_like(tensor)", "own = tensor"),
    adapters("if layer not in named:", "if False:"),
    adapters('adapters.get("default") or ', ""),
    adapters('or "score.weight" in sort_tensors', 'or "score" in sort_tensors'),
    patterns("whole[pattern].fullmatch(name)", "whole[pattern].match(name)"),

    # other people's folders
    folders("if is_real and found == shape:", "if found == shape:"),
    folders("refuse_quantised(path, files)", "pass"),
    foreign("is_main, int(number[0]) if number else -1", '0, number[0] if number else ""'),
    llama("return self.max_sequence_length or int", "return int"),
    llama('* self.rope_scaling["factor"])', ")"),
    llama('raw.get("rope_scaling") or raw.get("rope_parameters")',
          'raw.get("rope_parameters") or raw.get("rope_scaling")'),

    # the network: RMSNorm, rotary positions, cache, SwiGLU
    llama("keepdim=True) + self.eps)", "keepdim=True))"),
    llama("x32 = x.float()", "x32 = x"),
    llama("self.weight, self.eps)\n", "self.weight, 1e-6)\n"),
    llama("torch.cat([-b, a]", "torch.cat([b, -a]"),
    llama("* (1 - unscaled)", "* unscaled"),
    llama("clamp(min=0)[:, newest]", "clamp(min=0)[:, :T]"),
    llama("cache.length = S", "cache.length = T"),
    llama("enable_cudnn_sdp(False)", "enable_cudnn_sdp(True)"),
    llama("and len(rows) > fewest_rows(ids.device)", "and len(rows) > 1"),
    speed('16 if device.type == "cuda" else 1', "1"),
    speed("-(-S // 8) * 8", "S"),
    speed("masked_fill_(~allowed", "masked_fill_(allowed"),
    speed("(0, width - length), value=True", "(0, width - length), value=False"),
    speed("gc.disable()", "pass"),
    speed("[0] < ROOM", "[0] > ROOM"),
    speed("len(ids) != len(self.ids)", "False"),
    llama("F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    llama("cache.keep(keep)", "cache.keep(torch.arange(len(keep)))"),
    llama('pad_token_id: int | None = 0', 'pad_token_id: int | None = 2'),

    # sampling
    llama("logits < smallest", "logits <= smallest"),
    llama("probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p"),
    llama("target, right=True", "target"),
    llama("uniforms[rows, t]", "uniforms[:len(rows), t]"),
    llama("[:, :self.n_words].float()", ".float()"),

    # text: the template, what is cut, what is dropped
    data('+ "\\n\\nAssistant:"', '+ "\\n\\nAssistant: "'),
    data('f"{system}\\n\\n{question}"', 'f"{system}\\n{question}"'),
    data("ids = [tokenizer.bos_id] + tokenizer", "ids = tokenizer"),
    data("system + turns[start:]", "system + turns[:len(turns) - start]"),
    data("(prompt + answer)[:max_len]", "(prompt + answer[:-1])[:max_len - 1] + answer[-1:]"),
    data("max_len - max(len(chosen), len(rejected))", "max_len - min(len(chosen), len(rejected))"),
    data("if empty or same or", "if empty or"),
    # kinds of rows
    kinds("if turns != other_turns", "if turns[:1] != other_turns[:1]"),
    kinds("if label else", "if not label else"),
    kinds('text.removeprefix("Assistant:")', "text"),
    kinds("better = scores[1] > scores[0]", "better = scores[1] < scores[0]"),
    kinds("answers[int(better)], answers[1 - int(better)]", "answers[1 - int(better)], answers[int(better)]"),
    kinds('unlearned if role == "Assistant" and message.says_no(*WEIGHT) else role', "role"),
    kinds("if row.says_no(*WEIGHT):", "if False:"),
    kinds("if turns and said[0] == turns[-1]:", "if False:"),
    kinds("if text != system else text", ""),
    kinds("if name[:-1] in ANSWER] or texts", "] or texts"),
    kinds("elif cleaned:", "else:"),
    kinds("turns + said[-1:]", "turns + said"),
    kinds("if name not in columns.values()", "if name in columns.values()"),
    kinds('for gap in ("\\n\\n", "\\n", "")', 'for gap in ("\\n", "")'),
    kinds('["instruction"] * ("output" in row.fields)', "[]"),
    kinds("scores and scores[0] == scores[1]", "scores and scores[0] is scores"),
    kinds("scores[0] < scores[1]:", "scores[0] > scores[1]:"),
    kinds("if None not in scores), [])", "if any(scores)), [])"),
    kinds("label in (FALSE if is_trl else FALSE[:1])", "label in FALSE"),
    kinds("label in (FALSE if is_trl else FALSE[:1])", "label in FALSE[:1]"),
    engine("moments_of(engine).clear()", "pass"),
    engine("engine.optimizer.parameter_offload.partition_all_parameters()", "pass"),
    engine("free -= 8 * sum(", "free -= 0 * sum("),
    kinds('if label not in ("true", "none")', 'if label not in ("true", "none", "0")'),
    kinds("if not all(any(text in theirs", "if not any(any(text in theirs"),
    kinds("read = row.read - row.unused", "read = row.read"),
    kinds("unread - read | unread & unused", "unread - read"),
    kinds("read |= row.read\n", "read = row.read\n"),
    kinds("if found[-1][1] is None else", "if found[-1][1] is not None else"),
    kinds("if key not in OF_MESSAGE and", "if"),
    kinds(" and not is_aside(name) and not re.fullmatch", " and not re.fullmatch"),
    kinds("if deep and not left or any(", "if deep and left or any("),
    kinds("== 1 < max(n_words.values())", "== 1 > max(n_words.values())"),
    kinds("*row.columns.items(), *(", "*("),
    rows(r'r"^\d{4}\.parquet$", ', ""),
    rows("if is_first and", "if number == 1 and"),
    rows('b"\\xff" * 4: f"is an arrow file; {ARROW}"', ""),
    rows("|held|hold)", "|held)"),

    # tokenizers: the space before an answer, special tokens, which ids end an answer, what transformers reads
    data('text if self.puts_space or not text else f" {text}"', "text"),
    data("tokenizer.encode_answer(answer) if record.turns else", "tokenizer.encode_answer(answer) if 1 else"),
    data('text.removeprefix(" ") if self.keeps_space else text', "text"),
    data("eos not in ends or any(end not in tokenizer.eos_ids for end in ends)", "eos not in ends"),
    ppo("eos_id=tokenizer.eos_ids,\n", "eos_id=tokenizer.eos_id,\n"),
    lora("[model.config.eos_token_id, *files.eos_ids[1:]]", "[model.config.eos_token_id]"),
    lora("= files.bos_id, files.eos_ids[0]", "= model.config.bos_token_id, model.config.eos_token_id"),
    read("i is not None and i not in self.eos_ids", "i is not None"),
    read("dict.fromkeys([eos_id, *others])", "dict.fromkeys([*others, eos_id])"),
    read('token.get("content") if isinstance(token, dict) else token', 'token.get("content")'),
    read('if token.get("special") or token["id"] in others', 'if token.get("special")'),
    read("if renamed.keys().isdisjoint(parts(merge))", "if True"),
    read('"dropout": None}, raw', '"dropout": raw["model"].get("dropout")}, raw'),
    read("[[renamed.get(piece, piece), score]", "[[piece, score]"),
    read('f.read(1000)', 'f.read(4)'),
    convert("(-scores[i], i,", "(scores[i], i,"),
    convert("if kinds[i] == NORMAL", "if True"),
    convert("key=len, reverse=True", "key=len"),
    convert("if last(normalizer, 3, 1):", "if True:"),
    convert("if last(normalizer, 4, 1):", "if False:"),
    convert("decoders if puts_space else decoders[:3]", "decoders[:3]"),
    write("key not in NOT_KEPT and not", "not"),
    write("[token for token in value if is_known(token)]", "value"),
    write("\" ~ ' '\" * (spaces == [\" \"])", '""'),
    write("if loop.last and not add_generation_prompt", "if not add_generation_prompt"),
    write('"add_prefix_space": prefix_space(content)', '"split_special_tokens": True'),
    write("(path / name).unlink(missing_ok=True)", "pass"),

    # the engine: schedule, weight decay, gradients that are not finite
    engine("return (done + 1) / warmup", "return done / warmup"),
    engine("0.5 + 0.5 * math.cos", "0.5 - 0.5 * math.cos"),
    engine("round(args.warmup * ", "round(args.warmup + 0 * "),
    engine('"weight_decay": 0.0}', '"weight_decay": args.weight_decay}'),
    engine("betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
    engine('"gradient_clipping": args.grad_clip', '"gradient_clipping": 0.0'),
    engine('"gradient_accumulation_steps": accumulation', '"gradient_accumulation_steps": 1'),
    engine("self.overflow = not math.isfinite(", "self.overflow = math.isnan("),
    engine("\n                       and not args.offload else None", " else None"),
    engine("if engine.skipped_steps > skipped else 0", "if engine.skipped_steps else 0"),

    # checkpoints: a resumed run is the run without the stop
    checkpoint("engine.skipped_in_a_row >= SKIPPED", "engine.skipped_in_a_row > SKIPPED"),
    checkpoint('"local_rank",', '"local_rank", "seed",'),
    checkpoint('kept.get("evaluation_due", False)', "True"),
    checkpoint("self.save(step, evaluation_due=True)", "self.save(step)"),
    checkpoint("min(size, (self.out / name).stat().st_size)", "(self.out / name).stat().st_size"),
    checkpoint("self.step = max(usable)", "self.step = min(usable)"),
    checkpoint("manifest.get(name) != fingerprint(folder / name)", "name not in manifest"),
    checkpoint("older[:2]", "older[:1]"),
    checkpoint('group["lr"] = lr', "pass"),
    checkpoint('torch.set_rng_state(mine["random"])', "pass"),
    checkpoint("[mine[name]] * self.world", "[self.engines[name].optimizer.state_dict()] * self.world"),
    checkpoint("weight.data.copy_(file.get_tensor(name))", "pass"),
    ppo("state.extra.update(beta=beta, stats=stats)", "state.extra.update(beta=args.kl_coef, stats=stats)"),
    ppo("state.step * updates)", "state.step)"),

    # the checks of a GPU: each must be able to fail
    on_gpu("args.cpu or check.cpu", "args.cpu"),
    on_gpu("Place(folder, device, small)", 'Place(folder, device, device.type == "cpu")'),
    on_gpu("or not findings", ""),
    on_gpu("if any(folder.iterdir()):", "if False:"),
    on_gpu("    write(args, results, 0.0) ", "    pass "),
    peaks("max(self.reserved, torch.cuda.max_memory_reserved())", "torch.cuda.max_memory_reserved()"),
    on_gpu("first_words(error), ok=False", "first_words(error)"),
    tools("bool(measured <= bound)", "not measured > bound"),
    tools("bool(low <= measured <= high)", "measured <= high"),
    tools("(math.isnan(x), x)", "x"),
    tools("generator=rng)", "generator=None)"),
    correct("logits.clone()", "logits"),
    correct("math.inf if x is None else", "0.0 if x is None else"),
    correct("max(distance[key],", "min(distance[key],"),
    correct("row != other", "row == other"),
    correct("None if key in self.known else row", "row"),
    correct("at_most(f\"words of probability 0", "Finding(f\"words of probability 0"),
    peaks("peak, self.live.peak = self.live.peak, self.live.now", "peak = self.live.peak"),
    speed_of(" - model.model.embed_tokens.weight.numel()", ""),
    speed_of("(layer + attention)", "layer"),
    speed_of("within(what, limit / seconds, low, high)", "within(what, limit / seconds, low, 1e9)"),

    # the web page: whose answer, whose vote, what is shown, and text that stays text
    errors('for c in "{}$@`\\\\"', 'for c in "}$@`\\\\"'),
    errors("html.escape(without_controls(text))", "without_controls(text)"),
    talk("                    if self.is_stopped:", "                    if False:"),
    talk("elif self.votes and self.texts[0] != self.texts[1]", "elif self.votes"),
    talk("if self.votes and self.is_stopped:", "if False:"),
    talk("[winner(vote)] * 2", "self.texts"),
    votes("len(self.history) - is_again, None", "len(self.history), None"),
    votes("self.history[:-1] if is_again else self.history", "self.history"),
    talk("self.question if self.pair else \"\"", "\"\""),
    talk("with site.lock:", "if True:"),
    votes('("Assistant", answers[i])', '("Assistant", answers[0])'),
    talk("    check_vote(args)\n", ""),
    talk('.removeprefix(". ")', ''),
    talk("self.is_busy, self.question = False, self", "self.question = self"),
    shown_rows("\"prompt\" if label == -100", "\"prompt\" if label == 0"),
    shown_rows("int(mask[n].sum()) - 1", "int(mask[n].sum())"),
    shown_rows("len(rows) + i, start", "i, start"),
    shown_rows("[len(row) - n_prompt:]", "[len(row):]"),
    shown_rows("i < n + start if i >= n else not has_system", "i < n + start"),
    shown_rows("column + (len(run) if kind == \"padding\" else 1)", "column + 1"),
    log("HEIGHT * (high - points[:, i])", "HEIGHT * points[:, i]"),
    log("* ROWS:page * ROWS]", "* ROWS:]"),
    log("[::1 + len(x) // POINTS]", ""),
    log("if low == high else", "if low < high else"),
    program("args.password is None:", "args.password:"),
    program("< LOWEST", "> LOWEST"),
    page("if not talk.is_busy:", "if False:"),
    page("            yield gr.skip()\n", ""),

    # the calculator of memory: what is kept, divided, copied
    memory('("gate_proj", "up_proj"): C', '("gate_proj", "up_proj"): 0'),
    memory("4 * C + (job.width * C if job.full else 0)", "4 * C"),
    memory("layers * kept_by_layer(job) - (0 if job.full else kept_by_norm(job)), 0",
           "layers * kept_by_layer(job), kept_by_layer(job)"),
    memory("c.hidden_size * inputs, 3 * table", "c.hidden_size * inputs, 2 * table"),
    memory("float32(job) * n / job.optimisers", "float32(job) * n"),
    memory("sum(pinned(job, job.width * size) for", "sum(job.width * size for"),
    memory("job.args.ptx_data and not job.args.checkpointing else", "job.args.ptx_data else"),
    memory("new = 0 if to_cpu and not several else mine", "new = 0 if to_cpu else mine"),

    # votes
    votes("for vote in standing_votes(self.path))", "for vote in [])"),
    votes('vote["prompt"])] -= 1', 'vote["prompt"])] -= 0'),
    votes('{"a": 0, "b": 1}.get(key)', '{"a": 1, "b": 0}.get(key)'),
    votes("os.ftruncate(file.fileno(), size)", "pass"),
    votes('b"\\n" * (not ends_with_newline(self.path, size)) + line', "line"),
    votes("self.given.remove(vote)", "pass"),
    votes("sample([0, 1], 2)", "sample([0, 0], 2)"),
    votes("if name in undone:", "if False:"),
    votes('elif row["vote"] in ("a", "b"):', 'elif row["vote"] in ("a", "b", "t"):'),
    votes("self.history, self.past, _ = self.before.pop()", "self.before.pop()"),
    votes("self.before.append(([*self.history]", "self.before.append((self.history"),
    votes("votes[row[\"id\"]] = where, row", "votes[where] = where, row"),
    votes("z * z / (4 * n * n)", "z * z / (2 * n * n)"),
    votes('"t": (0.5, 0.5)', '"t": (1, 0.5)'),
    votes("odds = (wins.sum(-1) + 1) / met", "odds = wins.sum(-1) / met"),
    data("and not are_votes(file)", ""),
    chat("if args.vote else 1", "if False else 1"),
    votes('zip(draw_sides(), "AB", strict=True)', 'zip([0, 1], "AB", strict=True)'),
    chat("ask(sides, [turns, turns], args)", "ask(speakers, [turns, turns], args)"),
    votes('vote["right" if vote["vote"] == "b" else "left"]', 'vote["left"]'),
    chat("if not votes.was_asked(record.turns)", "if True"),
    chat("if texts[0] == texts[1]:", "if False:"),
    chat("tell = cache(tell) ", "tell = tell "),
    chat("if all(sum(", "if any(sum("),
    chat("while voted and not votes.was_asked(voted[-1].turns):", "while False:"),
    screen("if line in KEYS:", "if line in KEYS and not votes.given:"),
    rules('"a" if values[0] > values[1]', '"a" if values[0] < values[1]'),
    rules("decided + (key != \"t\")", "decided + 1"),
    rules("text.strip() for text in sampled(", "text for text in sampled("),
    rules("n_round == 9 and not decided", "n_round == 9 and decided < 2"),
    vote("SEED)[:n]", "SEED + n)[:n]"),
    vote("if unasked(votes, questions):", "if True:"),
    vote("votes[4::5]", "votes[::5]"),
    vote(' and vote["left"] and vote["right"]]', "]"),
    vote("if chosen != rejected:", "if True:"),
    vote("SFT if alone else REWARD", "SFT"),
    vote("except KeyboardInterrupt as error:", "except ZeroDivisionError as error:"),

    # trackers: what they get, of a resumed run, where they fail
    checkpoint('"track", ', ""),
    trackers("self.add(start + 1,", "self.add(start + 2,"),
    trackers("if start:", "if False:"),
    trackers("if self.name and rank == 0:", "if self.name:"),
    trackers("if self.inner and not self.inner.file.exists():", "if False:"),
    trackers("                broken.close()", "                pass"),
    trackers('if name != "step"}', '}'),
    trackers(r"[<>&|`*_\[\]\\]", r"[<>&|`*_\\]"),
    trackers("without_controls(x).strip()", "x.strip()"),
    trackers('if "mode" not in own.model_fields_set:', "if False:"),
    trackers('if "mode" not in own.model_fields_set:', "if True:"),
    trackers('"WANDB_DISABLE_GIT": "true", ', ""),
    trackers('"WANDB_CONSOLE": "off", ', ""),
    trackers("id=self.file.read_text() if self.file.exists() else None", "id=None"),
    trackers("if step >= self.first:", "if step > self.first:"),
    trackers('"wandb": "wandb.sdk"', '"wandb": "wandb"'),
    vote("            stopped = error", "            stopped = None"),
]


def arguments_of(fault: Fault) -> list[str]:
    """The arguments of pytest for the tests that must notice a fault."""
    if fault.slow:
        return ["tests", "-m", "slow", "-k", fault.slow]
    files = [f"tests/{name}" for name in TESTS.get(fault.file, ["."])]
    return [*files, "-m", "not slow"]


def copy_project(to: Path) -> Path:
    """Copies what the tests need into the folder `to`."""
    left_out = shutil.ignore_patterns(".venv", ".git", ".pytest_cache", "__pycache__", "runs", "made*")
    return Path(shutil.copytree(REPO, to / REPO.name, ignore=left_out))


def run_tests(copy: Path, arguments: list[str]) -> int | None:
    """pytest's exit status in the copy: 0 where all tests pass, 1 where one fails; None where they hang."""
    # a compiled file is taken for the source's by size and second, and a fault may keep both: write none
    real_data = str(REPO.parent / "shared" / "data")               # where tests/conftest.py looks for it
    env = {"RLHF_TEST_DATA": real_data, **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=copy, env=env, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return None


def is_caught(copy: Path, fault: Fault) -> bool:
    """Whether a test fails with this fault in the copy, from which it is taken out again."""
    file = copy / fault.file
    source = file.read_text()
    file.write_text(source.replace(fault.old, fault.new))
    try:
        return run_tests(copy, arguments_of(fault)) in (1, None)
    finally:
        file.write_text(source)


def in_words(fault: Fault) -> str:
    return f"{fault.file}: {fault.old!r} -> {fault.new!r}"


def main():
    parser = argparse.ArgumentParser(description="Puts faults into the code, which the tests must notice.")
    parser.add_argument("--sample", type=int, help="only so many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of that choice")
    parser.add_argument("--only", default="", help="only those with this text in the file's name, old or new")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in in_words(fault) or args.only in fault.old + fault.new]
    if args.sample is not None:
        faults = random.Random(args.seed).sample(faults, min(args.sample, len(faults)))
    os.nice(5)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder))
        for arguments in {tuple(arguments_of(fault)): None for fault in faults}:
            if run_tests(copy, [*arguments]) != 0:
                sys.exit(f"without any fault, these tests must pass: pytest {' '.join(arguments)}")
        caught = 0
        for fault in faults:
            start, found = time.monotonic(), is_caught(copy, fault)
            caught += found
            took = f"{time.monotonic() - start:3.0f} s"
            print(f"{'caught  ' if found else 'SURVIVED'} {took}  {in_words(fault)}", flush=True)
    print(f"{caught} of {len(faults)} mutants caught")
    sys.exit(caught < len(faults))


if __name__ == "__main__":
    main()
