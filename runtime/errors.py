"""What is said to a user who did something wrong."""
import unicodedata

def without_controls(text):
    """Leaves out what could take over the terminal: control characters, and those that turn a line around."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")
                   and not "\u202a" <= c <= "\u202e" and not "\u2066" <= c <= "\u2069")

class BadInput(ValueError):
    """What a user did: the message is one line that names the file or flag, what was found, and what to do."""
    def __init__(self, message):
        message = " ".join(without_controls(message).split("\n"))  # it may quote a file
        super().__init__(message if len(message) < 1000 else message[:1000] + "...")
