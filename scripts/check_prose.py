"""Check docstrings, comments, messages and pages for British spelling and for verbs of speech with tensors as subjects.

    python -m scripts.check_prose                   # the folders in CLEAN and all pages
    python -m scripts.check_prose FILE ...          # those of the files that it covers

In Python files the check covers docstrings, comments, identifiers, and string literals that contain a space. Literals
without a space are keys and names of data on disk, which keep their spelling. In Markdown files it covers the text outside
of code and of generated tables.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CLEAN = (
    "teachercache",
    "evaluation",
    "student",
    "scripts",
    "examples",
)  # folders whose Python files must pass
PAGES = ("README.md", "CONTRIBUTING.md", "data/README.md", "examples/README.md")
FOLDERS_OF_PAGES = ("docs",)  # with all pages below

BRITISH = re.compile(
    r"\w*(?:"
    r"colour|greys?\b|greyscale|centre|neighbour|behaviour|favour|honour|catalogue|artefact|judgement|licence|learnt\b"
    r"|(?:normal|initial|optim|minim|maxim|regular|organ|recogn|token|quant|serial|vector|general|visual|character)"
    r"is(?:e|ed|er|es|ing|ation|ations)\b"
    r"|(?:summar|parametr|categor|custom|penal|random|standard|synchron)"  # codespell:ignore
    r"is(?:e|ed|er|es|ing|ation|ations)\b"
    r"|labell(?:ed|ing|er)"
    r"|modell(?:ed|ing)"  # codespell:ignore
    r"|per\scent\b"
    r")\w*",
    re.IGNORECASE,
)

# Teachers predict, fields store, functions return: they do not speak. People, papers and messages may be the subject of
# these verbs, and "asked for" is fine for what a user has requested.
SUBJECTS = (
    r"(?:tensor|function|method|module|model|teacher|student|cache|row|field|loss|recipe|task|layer|block|encoder"
    r"|decoder|network|unet|tower|manifest|picture|record|checkpoint|run|batch|step|index|digest|spec|scale|weight"
    r"|logit|embedding|vector|score|mask|column|entry|output|store|setting)(?:e?s)?"
)
SPEECH = (
    re.compile(
        rf"\b{SUBJECTS}\s+(?:(?:never|also|only|alone|itself)\s+)?(?:say|says|said|tell|tells|told|hear|hears|heard|know|knows|knew|asks)\b",
        re.I,
    ),
    re.compile(r"\b(?:is|are|was|were|be|been)\s+(?:said|told|heard)\s+(?:of|about|to|by|in)\b", re.I),
    re.compile(
        r"\b(?:what|which|who|whoever)\s+(?:is|are|was|were)\s+(?:said|told|asked|heard)\b(?!\s+for\b)", re.I
    ),
    re.compile(r"\b(?:said|told)\s+of\b", re.I),
    re.compile(r"\bit\s+(?:says|knows|hears)\b", re.I),
    re.compile(r"\bknows?\s+(?:no|nothing|of|neither)\b", re.I),
    re.compile(r"`\s+(?:says|tells|knows|hears)\b", re.I),
    re.compile(r"\bunless\s+told\b", re.I),
)


class Finding(NamedTuple):
    """A violation with its place."""

    path: Path
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


def problems(text: str) -> Iterator[tuple[str, int, str]]:
    """Yield (rule, offset, matched words) for every violation in a piece of prose."""
    for match in BRITISH.finditer(text):
        yield "British spelling", match.start(), match[0]
    for pattern in SPEECH:
        for match in pattern.finditer(text):
            yield "verb of speech", match.start(), " ".join(match[0].split())


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring and of each string literal that contains a space."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each comment. Consecutive comments are joined."""
    first, last, lines = 0, -1, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and lines:
            yield first, "\n".join(lines)
            lines = []
        first = first if lines else token.start[0]
        lines.append(token.string.lstrip("# "))
        last = token.start[0]
    if lines:
        yield first, "\n".join(lines)


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each identifier."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def page_text(source: str) -> str:
    """Blank the code and the generated parts of a Markdown page. Line numbers stay the same."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    source = re.sub(r"<!-- (?!end of).*?<!-- end of .*?-->", blank, source, flags=re.DOTALL)
    source = re.sub(r"^```.*?^```", blank, source, flags=re.DOTALL | re.MULTILINE)
    source = re.sub(r"^    .*$", "", source, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", "`", source)


def findings(path: Path) -> list[Finding]:
    """Return the violations in a Python or Markdown file, sorted by line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        prose = [(1, page_text(source))]
    else:
        prose = [*strings(source), *comments(source), *identifiers(source)]
    violations = {
        Finding(path, line + text.count("\n", 0, offset), rule, words)
        for line, text in prose
        for rule, offset, words in problems(text)
    }
    return sorted(violations)


def checked_files(names: Iterable[str] = ()) -> list[Path]:
    """Return the files to check: all code in CLEAN and all pages, or those of them that `names` contains."""
    files = {path for folder in CLEAN for path in (ROOT / folder).rglob("*.py")}
    files |= {ROOT / page for page in PAGES}
    files |= {path for folder in FOLDERS_OF_PAGES for path in (ROOT / folder).rglob("*.md")}
    wanted = {Path(name).resolve() for name in names}
    return sorted(path for path in files if not wanted or path.resolve() in wanted)


def main() -> int:
    """Print the violations and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="files to check (default: all)")
    violations = [finding for path in checked_files(parser.parse_args().files) for finding in findings(path)]
    print(*violations, sep="\n", end="\n" if violations else "")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
