"""`student verify`: check the files of a run or an export."""

from pathlib import Path

import click

from student.commands.options import run_path
from teachercache.commands.options import output_options, print_json
from teachercache.core.errors import UserError
from teachercache.core.progress import status, suggest


@click.command()
@click.argument("folder", type=Path, shell_complete=run_path)
@output_options
def verify(folder: Path, as_json: bool) -> None:
    """Check that every file of a run or an export holds the bytes that were written; exit code 2 if one does not.

    \u0008
    student verify runs/NAME
    student verify exports/NAME-open_clip
    """
    from student.inference.verify import verify_folder

    with status(f"checking {folder}"):
        report = verify_folder(folder)
    if as_json:
        print_json(report)
    else:
        print(*report.lines(), sep="\n")
    if report.damaged:
        names = ", ".join(problem.file for problem in report.damaged)
        raise UserError(f"{len(report.damaged)} files of {folder} are damaged ({names}): {report.remedy}")
    suggest(*next_command(folder))


def next_command(folder: Path) -> tuple[str, ...]:
    """Return what to type after an undamaged run or export was checked."""
    from student.models.run_file import WEIGHTS, is_run

    if not is_run(folder) or not (folder / "run.json").exists():
        return "student", "recipes"
    if not (folder / WEIGHTS).exists():
        return "student", "train", "--config", str(folder / "run.json"), "--resume"
    return "student", "train", "--config", str(folder / "run.json"), "--print-config"
