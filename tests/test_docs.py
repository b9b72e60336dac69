"""README.md and docs/: links into the code hit the line of the name that they show; all links lead somewhere.

    python tests/test_docs.py                # writes today's line numbers into these links
"""
import ast
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# [text](target), where text may hold `code`, but no brackets
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
# flags of the deepspeed launcher, of hf, of Slurm, of pip, of TensorBoard
FOREIGN = {"--num_gpus", "--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--master_port",
           "--repo-type", "--local-dir", "--nodes", "--ntasks-per-node", "--gpus-per-node",
           "--cpus-per-task", "--mem", "--time", "--signal", "--index-url", "--logdir", "--shm-size", "--ipc"}


def lines_of(source: str) -> dict[str, int]:
    """{name: line} of every function, class, method (as Class.method) and constant of a Python file."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno            # of "def" itself, below its decorators
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    found.setdefault(prefix + target.id, node.lineno)
    visit(ast.parse(source).body, "")
    return found


def mend(page: Path) -> tuple[str, list[str]]:
    """The text of a page with today's line numbers in its links into the code, such as [`gae`](ppo.py#L120);
    and what is wrong with these links: each must show a name, and its file must hold that name."""
    problems = []

    def mended(link):
        file, hash_sign, _ = link[2].partition("#L")
        if not file.endswith(".py") or not hash_sign:
            return link[0]
        name = re.search(r"`([\w.]+)(?:\(\))?`", link[1])
        line = name and lines_of((page.parent / file).read_text()).get(name[1])
        if not line:
            wrong = "names what is not there" if name else "shows no name in backticks"
            problems.append(f"{page.name}: {link[0]} {wrong}")
            return link[0]
        return f"[{link[1]}]({file}#L{line})"
    return LINK.sub(mended, page.read_text()), problems


def slugs(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_code_hit_their_line(page):
    text, problems = mend(page)
    assert not problems, "\n".join(problems)
    moved = [link[0] for link in LINK.finditer(page.read_text()) if link[0] not in text]
    assert not moved, "`python tests/test_docs.py` mends " + "\n".join(moved)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for _, target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in slugs(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page):
    sources = "".join(file.read_text() for part in (".", "runtime", "toy", "web", "bench", "tests")
                      for file in (REPO / part).glob("*.py") if file != Path(__file__))
    flags = set(re.findall(r'"(--[a-z][\w-]*)"', sources))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - FOREIGN
    assert {flag.replace("_", "-") for flag in named} <= flags


def test_the_readme_is_short():
    lines = (REPO / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 140]


def test_lines_of_finds_what_a_link_may_name():
    source = "import x\nA: int = 1\n@x.y\nclass B:\n  c = 2\n  @x.y\n  def d(self):\n    e = 3\ndef f(): pass"
    assert lines_of(source) == {"A": 2, "B": 4, "B.c": 5, "B.d": 7, "f": 9}


def main() -> int:
    """Rewrites the line numbers of all pages; 1 where a link names what its file does not hold."""
    problems = []
    for page in PAGES:
        text, wrong = mend(page)
        page.write_text(text)
        problems += wrong
    print("\n".join(problems) or "every link has its line")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
