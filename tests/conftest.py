"""What the tests share: real data where there is some, tiny models and files, and a way to run scripts."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from llama import Llama, LlamaConfig
from runtime.tokenizer_write import copy_tokenizer

torch.set_num_threads(1)                     # tiny matrices: threads would only wait for each other

REPO = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("RLHF_TEST_DATA", REPO.parent / "shared" / "data"))

CASES = REAL.parent / "cases"                # files and folders as they were found in public reports


def real(name):
    """Path of a piece of real data; skips the test where it is absent."""
    if not (REAL / name).exists():
        pytest.skip(f"no real data: {name} is neither in $RLHF_TEST_DATA nor in ../shared/data "
                    "(README, tests)")
    return REAL / name


@pytest.fixture(scope="session")
def stories():
    """A real pre-trained LLaMA of 260K parameters, with greedy.txt, its published greedy text."""
    return real("stories260k")


@pytest.fixture(scope="session")
def hh():
    """2,312 real preference pairs."""
    return real("hh-harmless-test.jsonl.gz")


WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "asked", "why", "is", "the", "sky", "so",
         "blue", "today", "my", "friend", "said", "it", "was", "nice", "to", "see", "you"]


def sentence(rng, n=6):
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A small SentencePiece BPE tokenizer with byte fallback, laid out as LLaMA's (unk 0, BOS 1, EOS 2)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(sentence(rng, 12) + " Human: Assistant:" for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=340, byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False)
    return folder / "tokenizer.model"


def tiny_config(**changes):
    """A LLaMA of some thousand parameters, by default with grouped-query attention."""
    return LlamaConfig(**{"vocab_size": 352, "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                          "max_position_embeddings": 256, **changes})


def tiny_llama(seed=0, std=0.3, **changes):
    """A random tiny Llama whose weights are large enough for logits that differ."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_file):
    """A folder with a random tiny LLaMA and its tokenizer, which has a dozen fewer words than the model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(std=0.05).save_pretrained(folder)
    copy_tokenizer(tokenizer_file.parent, folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """240 made-up preference pairs in which the chosen answer says "blue" and the rejected one does not."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(240):
            prompt = f"\n\nHuman: {sentence(rng, rng.randint(2, 9))} {i}\n\nAssistant:"
            chosen = f" blue {sentence(rng, rng.randint(1, 8))} blue"
            rejected = f" {sentence(rng, rng.randint(1, 8)).replace('blue', 'red')}"
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def run_script(script, *args, ranks=0, timeout=300, env=None):
    """Runs a script of the repository: ranks 0 as `python script`, otherwise through the deepspeed
    launcher. Returns the CompletedProcess with text output; a run over the timeout is killed with all its
    children and fails the test."""
    python, port = Path(sys.executable), random.randint(20000, 40000)
    launcher = [python.parent / "deepspeed", "--num_gpus", ranks, "--master_port", port]
    command = [str(word) for word in [*(launcher if ranks else [python]), script, *args]]
    process = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, **(env or {})}, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{script} took longer than {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def metrics(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ faults
def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="tests of faults too, with many kills and damages")
    parser.addoption("--sample", type=int, metavar="N", help="nothing but N tests of faults, drawn at random")


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests that are marked `faults`: they repeat an invariant for another trainer, number of
    ranks or damage."""
    if config.getoption("--full"):
        return
    faults = [item for item in items if item.get_closest_marker("faults")]
    n = config.getoption("--sample")
    others = [item for item in items if item not in faults]
    kept = random.sample(faults, min(n, len(faults))) if n else others
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def full(request):
    """Whether the long tests of faults are asked for (./run.sh faults)."""
    return request.config.getoption("--full")
