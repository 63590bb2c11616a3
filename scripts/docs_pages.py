"""Hooks of `mkdocs build`: generated parts of pages, and links to files outside of docs/.

Pages stay readable on a code host, where links to source files work as they are. On the site, a linked file is copied
below `source/`. Marks in pages (`<!-- settings: ... -->`) are replaced by generated text.
"""

import dataclasses
import inspect
import os
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


# ----------------------------------------------------------------------------------------------------
# Links that leave docs/


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add every file outside of docs/ that a page links to."""
    from mkdocs.structure.files import File

    for page in [file for file in files if file.is_documentation_page()]:
        for target in set(outside(f"docs/{page.src_uri}", page.content_string)):
            name = f"source/{target}.txt" if target.endswith(".md") else f"source/{target}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(ROOT / target).read_bytes()))
    return files


def outside(page: str, text: str) -> Iterator[str]:
    """Yield the files outside of docs/ that a page links to, relative to the root of the repository."""
    for match in LINK.finditer(FENCE.sub("", text)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        if not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Point links that leave docs/ to the copies, and fill in the generated parts."""
    home = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", home, match[1]))
        if target.startswith("docs/") or not (ROOT / target).is_file():
            return match[0]
        copy = f"source/{target}.txt" if target.endswith(".md") else f"source/{target}"
        return posixpath.relpath(copy, home or ".")

    markdown = LINK.sub(moved, markdown)
    for mark, generate in GENERATED.items():
        start, found, rest = markdown.partition(f"<!-- {mark}: scripts/docs_pages.py -->")
        markdown = start + generate() + rest if found else markdown
    return markdown


# ----------------------------------------------------------------------------------------------------
# Generated parts


def settings() -> str:
    """Return the tables of settings: of each recipe, of the optimizer and of a run."""
    from student.recipe import Optim, Run
    from student.recipes.registry import RECIPES

    parts = []
    for recipe in RECIPES.values():
        optim = {
            field.name: getattr(recipe.optim, field.name)
            for field in dataclasses.fields(Optim)
            if getattr(recipe.optim, field.name) != field.default
        }
        changed = "".join(f" `--set optim.{name}={value}`" for name, value in optim.items())
        parts += [
            f"## {recipe.name}",
            f"{recipe.paper}: {recipe.doc}.",
            f"Defaults: `--data {recipe.data}` `--steps {recipe.steps}` `--batch-size {recipe.batch}`{changed}",
            table(type(recipe.constants), recipe.constants),
        ]
    parts += ["## The optimizer", "Written as `--set optim.NAME=VALUE`.", table(Optim, Optim(), "optim.")]
    parts += ["## A run", "Written as `--set run.NAME=VALUE`.", table(Run, None, "run.")]
    return "\n\n".join(parts)


def table(record: type, values: Any, prefix: str = "") -> str:
    """Return the settings of a dataclass as a Markdown table: name, default, type and range, comment."""
    comments = comments_of(inspect.getsource(record))
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(record):
        default = getattr(values, field.name) if values is not None else field.default
        default = str(default).lower() if isinstance(default, bool) else default
        shown = "" if default is dataclasses.MISSING else f"`{default}`" if default != "" else "empty"
        allowed = words_of(typing.get_type_hints(record, include_extras=True)[field.name])
        cells = [f"`{prefix}{field.name}`", shown, allowed, escaped(comments.get(field.name, ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def words_of(kind: Any) -> str:
    """Return what a type allows, in words: `0 to 1`, `best, random or none`."""
    if typing.get_origin(kind) is typing.Literal:
        *others, last = (f"`{choice}`" for choice in typing.get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if typing.get_origin(kind) is not typing.Annotated:
        return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(kind, "")
    base, *limits = typing.get_args(kind)
    words = [words_of(base)]
    for limit in limits:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            bound = getattr(limit, name, None)
            if bound is not None and bound < 2**31 - 1:
                words.append(f"{sign} {bound:g}")
    return ", ".join(filter(None, words))


def comments_of(source: str) -> dict[str, str]:
    """Return the comments beside, or alone above, the fields of a class, by the name of the field."""
    comments: dict[str, str] = {}
    above: list[str] = []
    last = ""
    for line in source.splitlines():
        code, _, comment = line.strip().partition("#")
        field = re.match(r"(\w+)(?:: | = )", code)
        if field:
            words = " ".join([*above, comment.strip()]).strip()
            comments[field[1]] = words
            above, last = [], field[1]
        elif comment and not code:
            above.append(comment.strip())
        elif comment and code.startswith((")", "]")):  # a declaration over several lines
            comments[last] = comment.strip()
    return comments


def commands() -> str:
    """Return the help of both programs, with a heading for each command."""
    from student.cli import student
    from teachercache.cli import tc

    parts = []
    for program in (tc, student):
        context = program.make_context(program.name, [], resilient_parsing=True)
        parts += [f"## {program.name}", *help_of(program, context)]
        for name in program.list_commands(context):
            command = program.commands[name]
            inner = command.make_context(name, [], parent=context, resilient_parsing=True)
            parts += [f"### {program.name} {name}", *help_of(command, inner)]
    return "\n\n".join(parts)


def help_of(command: "click.Command", context: "click.Context") -> Iterator[str]:
    """Yield the help of a command as Markdown: description, examples, usage and a table of options."""
    for paragraph in (command.help or "").split("\n\n"):
        verbatim = paragraph.strip().startswith("\b")
        text = textwrap.dedent(paragraph.replace("\b", "").strip("\n"))
        yield f"```text\n{text}\n```" if verbatim else escaped(" ".join(text.split()))
    yield f"```text\n{' '.join(context.get_usage().removeprefix('Usage: ').split())}\n```"
    lines = ["| option | meaning |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and "--help" not in record[0]:
            names, words = (" ".join(text.split()) for text in record)
            lines.append(f"| `{names}` | {escaped(words)} |")
    if len(lines) > 2:
        yield "\n".join(lines)


def escaped(text: str) -> str:
    """Escape what Markdown would take for tags, emphasis and cells, outside of code."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")
    return "`".join(parts)


def reports() -> str:
    """Return a list of the benchmark reports with links."""
    names = sorted(path.name for path in (ROOT / "docs" / "benchmarks").glob("*.md"))
    return "\n".join(f"- [{name.removesuffix('.md')}](../benchmarks/{name})" for name in names)


GENERATED = {"commands": commands, "settings": settings, "reports": reports}
os.environ.setdefault("NO_COLOR", "1")  # of click's help texts
