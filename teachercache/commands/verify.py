"""`tc verify`: check the files and some values of a cache."""

from collections.abc import Mapping
from typing import Any

import click

from teachercache.commands.next_steps import suggest_use
from teachercache.commands.options import cache_path, output_options, print_json, teacher_option
from teachercache.core.command import place
from teachercache.core.errors import UserError
from teachercache.core.progress import say, show, status
from teachercache.core.ranges import MOST


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(0, MOST),
    help="Rows to compute again with the teacher; 0 checks the files only.",
)
@teacher_option
@output_options
def verify(cache: str, samples: int, teacher: str | None, as_json: bool) -> None:
    """Check the checksum of every file, and recompute some rows with the teacher (cosine at least 0.999).

    Damaged blocks, files and indexes are listed with the command that makes them again. Nothing is written.

    \u0008
    tc verify caches/demo/clip-lite.zarr
    tc verify caches/demo/clip-lite.zarr --samples 0
    """
    with status("importing libraries"):
        from teachercache.build.verify import verify_cache
    from teachercache.cache.store import open_cache

    report = verify_cache(cache, samples=samples, teacher=teacher)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    refuse_damage(report)
    say(f"{cache} is complete and undamaged")
    suggest_use(open_cache(cache), done="verify")


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `verify_cache` returned."""
    for block, reason in report["damaged"].items():
        show(f"block {block}: {reason}")
    for name, reason in report["files"].items():
        show(f"{name}: {reason}")
    for name, found in report["indexes"].items():
        show(f"{name}: {found['reason']}")
    for name, values in report["cosine"].items():
        show(f"{name}: cosine to the recomputed values min {values['min']:.6f}, mean {values['mean']:.6f}")


def refuse_damage(report: Mapping[str, Any]) -> None:
    """Raise a UserError for what `verify_cache` found, with the command that mends it."""
    if report["damaged"]:
        raise UserError(
            f"{len(report['damaged'])} damaged blocks: run `{report['command']}` to write them again"
        )
    if report["files"]:
        raise UserError(f"{' and '.join(report['files'])}: damaged, run `{report['command']}` to repair")
    for name, found in report["indexes"].items():
        raise UserError(
            f"{name} cannot be used ({found['reason']}): run `{found['command']}` to make it again"
        )
    if not report["ok"]:
        raise UserError("the teacher computes different values: was the data or the teacher changed?")
