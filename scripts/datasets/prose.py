"""Plain prose from Python's documentation."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST, SHORTEST = 300, 15  # characters of a piece of text


def docstrings(folder: Path) -> Iterator[str]:
    """Every docstring of the standard library, in the order of its files."""
    for path in sorted(folder.rglob("*.py")):
        if any(part in SKIPPED for part in path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def sentences(text: str) -> Iterator[str]:
    """Prose of a text: paragraphs without code, cut between sentences where they are long."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.replace("*", "").replace('"', "").replace("`", "").split())
        piece = ""
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", words):
            if piece and len(piece) + len(sentence) > LONGEST:
                yield piece
                piece = ""
            piece = f"{piece} {sentence}".strip()
        yield piece


def is_prose(piece: str) -> bool:
    """Mostly letters, beginning as a sentence does and no longer than the model reads."""
    letters = sum(character.isalpha() or character == " " for character in piece)
    return SHORTEST <= len(piece) <= LONGEST and piece[0].isupper() and letters >= 0.93 * len(piece)


SKIPPED = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip")
