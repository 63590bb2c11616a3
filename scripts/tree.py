"""Write the map of files in CONTRIBUTING.md from the first sentence of each module's docstring.

python -m scripts.tree            rewrite the map
python -m scripts.tree --check    exit 1 if the map is out of date
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("teachercache", "evaluation", "student", "scripts")
BEGIN, END = "<!-- map of files: scripts/tree.py -->", "<!-- end of the map -->"
COLUMN = 40  # where the descriptions start


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring or of a shell script's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
        text = " ".join(comments[:1])
    paragraph = " ".join(text.split("\n\n")[0].split())
    # A period ends the sentence unless it belongs to an abbreviation
    return re.split(r"(?<=\.)(?<!et al\.)(?<!e\.g\.)(?<!i\.e\.)\s", f"{paragraph} ")[0].strip().rstrip(":.")


def lines_of(folder: Path, depth: int) -> Iterator[str]:
    """Yield the lines of a folder: the folder itself, its modules, then its subfolders."""
    indent = "  " * depth
    package = folder / "__init__.py"
    yield f"{indent + folder.name + '/':{COLUMN}}{first_sentence(package)}".rstrip()
    for path in sorted(folder.iterdir()):
        is_command = path.is_file() and not path.suffix
        if (path.suffix == ".py" or is_command) and path.name not in ("__init__.py", "__main__.py"):
            yield f"{indent + '  ' + path.name:{COLUMN}}{first_sentence(path)}".rstrip()
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            yield from lines_of(path, depth + 1)


def map_of_files() -> str:
    """Return the whole map as a block of text."""
    return "\n".join(line for package in PACKAGES for line in lines_of(ROOT / package, 0))


def replaced(text: str) -> str:
    """Return the text of CONTRIBUTING.md with an updated map between the two marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n```text\n{map_of_files()}\n```\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the map or check it, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the map is out of date")
    check = parser.parse_args().check
    page = ROOT / "CONTRIBUTING.md"
    old = page.read_text(encoding="utf-8")
    new = replaced(old)
    if check:
        print("up to date" if new == old else "out of date: run `python -m scripts.tree`")
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
