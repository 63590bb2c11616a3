"""The command line `student`: a group of the commands in `student.commands`."""

import click

from student.commands.evaluate import evaluate
from student.commands.export import export
from student.commands.generate import generate
from student.commands.recipes import recipes
from student.commands.train import train
from student.commands.verify import verify
from teachercache import __version__
from teachercache.core.command import run_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="student", message="%(prog)s %(version)s")
def student() -> None:
    """Train students on cached teacher outputs, evaluate them and export them.

    \u0008
    student train --recipe clip_kd        # with the cache of data/demo
    student eval runs/NAME --task retrieval
    student export runs/NAME --format open_clip

    --debug anywhere in a command shows the traceback of an error.
    """


student.add_command(recipes)
student.add_command(train)
student.add_command(evaluate)
student.add_command(generate)
student.add_command(export)
student.add_command(verify)


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 after one `error:` line, or 130 or 143 if the command was stopped.
    """
    return run_command(student, args)
