"""What the program says to a user who did something wrong, or who should know something."""
import functools
import html
import os
import sys
import unicodedata
from collections.abc import Callable

MOST_CHARACTERS = 1000                       # of a message, which may quote a file

def without_controls(text: str) -> str:
    """The text without control characters and without those that reverse its direction: they could take over
    a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")
                   and not "\u202a" <= c <= "\u202e" and not "\u2066" <= c <= "\u2069")

def as_html(text: str) -> str:
    """The text as HTML that shows it and nothing more. Gradio would also fill in {{x}}, ${x}, @children."""
    return html.escape(without_controls(text)).translate({ord(c): f"&#{ord(c)};" for c in "{}$@`\\"})

@functools.cache
def note(text: str):
    """Says something once on rank 0's stderr that a user should know and that does not stop the run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {without_controls(text)}", file=sys.stderr)

class BadInput(ValueError):
    """A user's mistake, said in one line: the file or flag, what was found there, and what to do about it.
    `everywhere` is true where all ranks raise the same error, so that rank 0 alone has to print it."""

    def __init__(self, message: str, everywhere: bool = False):
        message = " ".join(without_controls(message).split("\n"))
        super().__init__(message if len(message) < MOST_CHARACTERS else message[:MOST_CHARACTERS] + "...")
        self.everywhere = everywhere

def is_out_of_ram(error: Exception) -> bool:
    """Whether is_out_of_memory, and it is not a GPU's memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)

def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on a GPU or CPU, raised the error because no memory is left."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")         # CUDA's, cuBLAS's, the CPU's
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and any(word in str(error) for word in words))

def first_line(error: Exception) -> str:
    """The first line of an error's text, and the cause that NCCL names further down, such as a /dev/shm that
    is too small."""
    text = str(error)
    cause = text.partition("Last error:")[2].strip().partition("\n")[0]
    return text.partition("\n")[0] + (f" ({cause})" if cause else "")

def exit_with_one_line(main: Callable[[], None]):
    """Runs main(). BadInput becomes one line on stderr and exit status 2, a lack of memory one line and 1,
    Ctrl-C exit status 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: the memory is not enough ({first_line(error)})", file=sys.stderr)
        sys.exit(1)
