"""Print text of foreign origin (captions, keys, file names) on any terminal.

Such text may hold escape sequences that recolor, retitle or clear a terminal, and letters that the terminal's
encoding lacks.
"""

import contextlib
import io
import re
import sys

# C0 and C1 controls (ESC, BEL, CR, ...), line separators, embeddings, overrides and isolates of bidirectional text,
# and halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return the text of an object on one line, with control characters written as escapes such as \x1b."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def printable_lines(text: object) -> str:
    """Return the text of an object as `printable` does, with its line breaks."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def show(*words: object) -> None:
    """Print lines for a person to stdout. Not for JSON, whose escapes are its own."""
    print(printable_lines(" ".join(map(str, words))))


def write_any_letter() -> None:
    """Make stdout and stderr write letters that their encoding lacks as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # a stream that is closed
                stream.reconfigure(errors="backslashreplace")
