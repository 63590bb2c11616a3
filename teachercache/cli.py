"""The command line `tc`: a group of the commands in `teachercache.commands`."""

import click

from teachercache import __version__
from teachercache.commands.analyze import analyze
from teachercache.commands.build import build
from teachercache.commands.index import index
from teachercache.commands.info import info
from teachercache.commands.manifest import manifest
from teachercache.commands.search import search
from teachercache.commands.teachers import teachers
from teachercache.commands.verify import verify
from teachercache.core.command import run_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tc", message="%(prog)s %(version)s")
def tc() -> None:
    """Run a frozen vision-language teacher once and store its outputs.

    \u0008
    tc build --teacher clip-lite          embeddings of data/demo into caches/demo/clip-lite.zarr
    tc index caches/demo/clip-lite.zarr   then search in them:
    tc search caches/demo/clip-lite.zarr "a red bird"

    --debug anywhere in a command shows the traceback of an error.
    """


tc.add_command(teachers)
tc.add_command(manifest)
tc.add_command(build)
tc.add_command(info)
tc.add_command(verify)
tc.add_command(index)
tc.add_command(search)
tc.add_command(analyze)


def main(args: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one `error:` line."""
    return run_command(tc, args)
