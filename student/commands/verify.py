"""`student verify`: check the files of a run or an export."""

import dataclasses
import json
from pathlib import Path

import click

from teachercache.commands.options import json_option
from teachercache.core.errors import UserError


@click.command()
@click.argument("folder", type=Path)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check that every file of a run or an export holds the bytes that were written; exit code 2 if one does not.

    \u0008
    student verify runs/NAME
    student verify exports/NAME-open_clip
    """
    from student.inference.verify import verify_folder

    report = verify_folder(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(*report.lines(), sep="\n")
    if report.damaged:
        names = ", ".join(problem.file for problem in report.damaged)
        raise UserError(f"{len(report.damaged)} files of {folder} are damaged ({names}): {report.remedy}")
