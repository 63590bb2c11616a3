"""`student compare`: runs side by side."""

from pathlib import Path

import click

from student.commands.options import local
from teachercache.commands.options import output_options, print_json
from teachercache.core.command import path
from teachercache.core.progress import say, show, suggest


@click.command()
@click.argument("runs", nargs=-1, type=path, required=True, metavar="RUN...")
@click.option(
    "--out", type=local, metavar="FOLDER", help="Also write compare.png (curves), compare.csv and compare.md."
)
@output_options
def compare(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs: settings that differ, losses, and the metrics of `student eval` with the best marked.

    \u0008
    student compare runs/A runs/B
    student compare runs/* --out compare
    """
    from student.inference import compare as comparing

    comparison = comparing.compare(runs)
    for note in comparison.notes:
        say(f"note: {note}")
    files = comparing.write(comparison, out) if out else []
    if as_json:
        print_json(comparing.as_json(comparison) | {"files": files})
    else:
        show(comparing.table(comparison))
    if files:
        say(f"wrote {', '.join(map(str, files))}")
        suggest("python", "-m", "webbrowser", files[0])
    else:
        suggest("student", "compare", *runs, "--out", "compare")
