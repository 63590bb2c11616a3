"""Extract plain prose from Python docstrings, as training text for small language models."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST, SHORTEST = 300, 15  # characters of a piece of text
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip")


def docstrings(folder: Path) -> Iterator[str]:
    """Yield every docstring of the Python files below a folder, in the order of the paths."""
    for path in sorted(folder.rglob("*.py")):
        if any(name in SKIPPED for name in path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def sentences(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, split between sentences if they are longer than LONGEST."""
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
    """Return whether a piece is prose: mostly letters, a capital first, of suitable length."""
    letters = sum(character.isalpha() or character == " " for character in piece)
    return SHORTEST <= len(piece) <= LONGEST and piece[0].isupper() and letters >= 0.93 * len(piece)
