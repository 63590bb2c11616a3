"""`tc teachers`: list the names that `--teacher` takes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from teachercache.commands.next_steps import suggest_first_build
from teachercache.commands.options import DEMO_DATA, output_options, print_json
from teachercache.core.progress import show

if TYPE_CHECKING:
    from teachercache.teachers.teacher import Entry


@click.command()
@output_options
def teachers(as_json: bool) -> None:
    """List the teachers that `--teacher` takes.

    \u0008
    tc teachers
    tc teachers --json
    """
    from teachercache.teachers.registry import TEACHERS, installed_teachers

    installed = {
        name: f"{point.value} of the installed package {point.dist.name if point.dist else '?'}"
        for name, point in installed_teachers().items()
    }
    if as_json:
        ours = {name: {"doc": entry.doc, "outputs": entry.outputs} for name, entry in TEACHERS.items()}
        print_json({**{name: {"doc": doc} for name, doc in installed.items()}, **ours})
    else:
        print_teachers(TEACHERS, installed)
    suggest_first_build(DEMO_DATA, DEMO_DATA)


def print_teachers(ours: "Mapping[str, Entry]", installed: Mapping[str, str]) -> None:
    """Print the names that `--teacher` takes: ours, those of installed packages by name and origin, and other forms."""
    for name, entry in ours.items():
        show(f"{name:18} {entry.doc}  [{', '.join(entry.outputs)}]")
    for name, doc in installed.items():
        show(f"{name:18} {doc}")
    show(
        "and open_clip:MODEL/TAG, hf:ORG/NAME, diffusers:ORG/NAME, a folder of open_clip or diffusers, a run of "
        "`student train`, package.module:entry"
    )
