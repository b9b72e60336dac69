"""The seven files read in one order, and each imports only from those above it (DESIGN: a straight corridor)."""
import ast
import subprocess
import sys

import pytest

from conftest import REPO

ORDER = ["llama", "lora", "data", "sft", "reward", "ppo", "chat"]
ALLOWED = {**{name: ORDER[:i] for i, name in enumerate(ORDER)}, "chat": ORDER[:3]}


def imported(nodes):
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names + [n.module for n in nodes if isinstance(n, ast.ImportFrom)]}


@pytest.mark.parametrize("name", ORDER)
def test_each_file_imports_only_from_those_above_it(name):
    tree = ast.parse((REPO / f"{name}.py").read_text())
    assert imported(list(ast.walk(tree))) & {*ORDER} <= {*ALLOWED[name]}
    # what takes seconds to import, and the toy, only inside the functions that use it; deepspeed only in runtime/
    assert not imported(tree.body) & {"deepspeed", "matplotlib", "toy", "transformers"}
    assert "deepspeed" not in imported(list(ast.walk(tree)))


@pytest.mark.parametrize("file", sorted((REPO / "toy").glob("*.py")), ids=lambda file: file.name)
def test_the_toy_imports_llama_and_data_only(file):
    assert imported(list(ast.walk(ast.parse(file.read_text())))) & {*ORDER} <= {"llama", "data"}


def test_importing_the_files_prints_and_changes_nothing():
    code = (f"import os, sys; before = dict(os.environ); import {', '.join(ORDER)}; assert os.environ == before; "
            "assert 'deepspeed' not in sys.modules and 'matplotlib' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
