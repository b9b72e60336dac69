"""Regular expressions that stand in other people's files, matched within a limit of time and memory.

Python's `re` can take exponential time for a short pattern, and cannot be interrupted. So whatever is more
than a name is matched by a process of its own: this file, run as a script, which limits itself.
"""
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

SECONDS = 1                                  # of processor time; all patterns of an adapter take milliseconds
MEMORY = 2**30
NAME = re.compile(r"[\w.\\^$-]{0,200}")       # a pattern of these characters alone takes next to no time

def match_names(patterns: Iterable[str], names: list[str], form: str = "{}") -> dict[str, list[str]]:
    """For each pattern the names that it matches in full. form: the whole expression, with {} where the
    pattern stands. ValueError where a pattern is no regular expression or takes too long."""
    patterns = list(patterns)
    if len(patterns) < 1000 and all(NAME.fullmatch(pattern) for pattern in patterns):
        try:
            return match_here(patterns, names, form)
        except re.error as error:
            raise ValueError(f"{error}") from None
    task = json.dumps({"patterns": patterns, "names": names, "form": form})
    # -I -S: without the user's own start-up files, in hundredths of a second
    child = subprocess.run([sys.executable, "-I", "-S", __file__], input=task, capture_output=True, text=True,
                           errors="replace")
    if child.returncode == 0:
        return json.loads(child.stdout)
    why = (child.stderr.strip().splitlines() or [f"takes more than {SECONDS} s"])[-1]
    raise ValueError(f"the pattern {max(patterns, key=len)[:200]!r}: {why}")

def match_here(patterns: list[str], names: list[str], form: str) -> dict[str, list[str]]:
    whole = {pattern: re.compile(form.replace("{}", pattern)) for pattern in patterns}
    return {pattern: [name for name in names if whole[pattern].fullmatch(name)] for pattern in patterns}

def limit_this_process():
    """Lets the system end this process where it takes too much."""
    import resource  # not on Windows

    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
        with suppress(ValueError, OSError):  # a system may allow less already
            resource.setrlimit(kind, (most, most))

if __name__ == "__main__":
    limit_this_process()
    print(json.dumps(match_here(**json.load(sys.stdin))))
