"""Options that several commands share, and what a shell completes behind them."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from teachercache.api import DEMO_DATA as DEMO_DATA
from teachercache.core.command import text
from teachercache.core.process import rank
from teachercache.core.progress import quiet
from teachercache.core.ranges import MOST

NUMBER, SEED = click.IntRange(1, MOST), click.IntRange(0, 2**63 - 1)
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names_in(table: Callable[[], Iterable[str]]) -> Complete:
    """Return a `shell_complete` of click that completes the names of a table, which is opened when a shell asks."""

    def complete(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in table() if name.startswith(start)]

    return complete


def paths_of(*patterns: str, marker: str = "") -> Complete:
    """Return a `shell_complete` of click that completes the paths of some patterns, or any path if none fits.

    Args:
        *patterns: Patterns of pathlib, below the current folder.
        marker: A file that a folder must hold; the folder is completed.
    """

    def complete(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
        found = sorted(str(path) for pattern in patterns for path in Path().glob(pattern))
        if marker:
            found = [name for name in found if Path(name, marker).exists()]
        fitting = [CompletionItem(name) for name in found if name.startswith(start)]
        return fitting or [CompletionItem(start, type="file")]

    return complete


def teacher_names() -> Iterable[str]:
    """Return the names of our teachers and of installed ones."""
    from teachercache.teachers.registry import TEACHERS, installed_teachers

    return [*TEACHERS, *installed_teachers()]


any_path = paths_of()
cache_path = paths_of("caches/*/*.zarr", "*.zarr")


def _quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.with_resource(quiet())


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
quiet_option = click.option(
    "--quiet",
    "-q",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_quiet,
    help="No progress and no notices, only results, warnings and errors.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --json and --quiet, which every command has."""
    return json_option(quiet_option(command))


field_option = click.option(
    "--field", type=text, help="The vector field; default: the one per image, else the one per text."
)
teacher_option = click.option(
    "--teacher",
    metavar="MODULE:ENTRY",
    type=text,
    help="The teacher of the cache, if it was built with a teacher that is not installed: package.module:ENTRY.",
)


def print_json(value: object) -> None:
    """Print a record, or anything that JSON has, as one JSON document on rank 0; paths become texts."""
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if rank() == 0:
        print(json.dumps(dataclasses.asdict(value) if is_record else value, default=str))
