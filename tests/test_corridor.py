"""Which file imports which: the seven files, the cellar (runtime/) below them, and the toy.

Each of the seven imports only from runtime/ and from the files above it. runtime/ imports none of the seven,
and each of its files imports only from those above it in the list, so there are no circles.
"""
import ast
import subprocess
import sys

import pytest

from conftest import REPO

SEVEN = ["llama", "lora", "data", "sft", "reward", "ppo", "chat"]
CELLAR = ["errors", "gpu", "speed", "patterns", "foreign", "folders", "adapters", "tokenizer_read",
          "tokenizer_convert", "tokenizer_write", "rows", "votes", "screen", "kinds", "trackers", "flags",
          "ranks", "engine", "log", "checkpoint"]
ALLOWED = {**{name: SEVEN[:i] for i, name in enumerate(SEVEN)}, "chat": SEVEN[:3]}
# only inside the functions that use them
LATE = {"deepspeed", "matplotlib", "pyarrow", "tensorboard", "tokenizers", "wandb", "gradio", "fastapi",
        "uvicorn"}


def imported(nodes):
    """The modules that these statements import: runtime.errors as it is, others by their first name."""
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name if name.startswith("runtime") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", SEVEN)
def test_each_file_imports_only_from_runtime_and_those_above_it(name):
    tree = ast.parse((REPO / f"{name}.py").read_text())
    everywhere = imported(ast.walk(tree))
    assert everywhere & {*SEVEN, "toy", "web", "bench"} <= {*ALLOWED[name]}
    assert not imported(tree.body) & LATE and "deepspeed" not in everywhere


@pytest.mark.parametrize("name", CELLAR)
def test_each_file_of_the_cellar_imports_only_from_those_above_it(name):
    tree = ast.parse((REPO / "runtime" / f"{name}.py").read_text())
    everywhere = imported(ast.walk(tree))
    assert not everywhere & {*SEVEN, "toy", "web", "bench"}
    above = {f"runtime.{other}" for other in CELLAR[:CELLAR.index(name)]}
    assert {module for module in everywhere if module.startswith("runtime")} <= above
    assert not imported(tree.body) & LATE


def test_the_cellar_holds_these_files_and_no_others():
    assert {file.stem for file in (REPO / "runtime").glob("*.py")} == {*CELLAR, "__init__"}


@pytest.mark.parametrize("file", sorted((REPO / "toy").glob("*.py")), ids=lambda file: file.name)
def test_the_toy_imports_llama_and_data_only(file):
    assert imported(ast.walk(ast.parse(file.read_text()))) & {*SEVEN} <= {"llama", "data"}


@pytest.mark.parametrize("file", sorted((REPO / "web").glob("*.py")), ids=lambda file: file.name)
def test_the_page_imports_its_packages_late_and_nothing_of_the_toy(file):
    tree = ast.parse(file.read_text())
    assert not imported(tree.body) & LATE and not imported(ast.walk(tree)) & {"toy", "bench"}


def test_importing_the_files_prints_and_changes_nothing():
    code = (f"import os, sys; before = dict(os.environ); import {', '.join(SEVEN)}, web.__main__; "
            f"assert os.environ == before; assert not {LATE} & sys.modules.keys()")
    words = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
