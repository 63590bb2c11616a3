"""`student export`: write a trained student for another library."""

from pathlib import Path

import click

from student.commands.options import local, run_path
from teachercache.commands.options import output_options, print_json
from teachercache.core.command import path
from teachercache.core.progress import say, show, suggest


@click.command()
@click.argument("run", type=path, shell_complete=run_path)
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["open_clip", "hf"]),
    help="The library that loads the folder: open_clip, or hf for transformers.",
)
@click.option("--out", type=local, help="The folder to write; default: exports/<run>-<format>.")
@output_options
def export(run: Path, form: str, out: Path | None, as_json: bool) -> None:
    """Export a trained student, without distillation heads, into a folder for open_clip or transformers.

    \u0008
    student export runs/NAME --format open_clip --out exports/mine
    student export runs/NAME --format hf
    """
    from student import api

    exported = api.export(run, form, out)
    for note in exported.notes:
        say(note)
    say(f"{exported.folder}: {exported.load}")
    print_json(exported) if as_json else show(exported.folder)
    suggest("student", "verify", exported.folder)
