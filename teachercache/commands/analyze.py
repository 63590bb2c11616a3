"""`tc analyze`: write the report of a cache, or of two."""

from pathlib import Path

import click

from teachercache.commands.options import any_path, cache_path, output_options
from teachercache.core.command import path, place
from teachercache.core.paths import as_path
from teachercache.core.progress import show, status, suggest
from teachercache.core.ranges import MOST


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@click.option(
    "--against",
    metavar="CACHE",
    type=place,
    shell_complete=cache_path,
    help="A second cache of the same rows, of a student or another teacher.",
)
@click.option(
    "--out", type=path, shell_complete=any_path, help="A folder; default <cache>.report beside the cache."
)
@click.option(
    "--map", "kind", default="pca", show_default=True, help="pca, or umap (pip install 'teachercache[umap]')."
)
@click.option(
    "--points",
    default=20_000,
    show_default=True,
    type=click.IntRange(10, MOST),
    help="Rows on the map, a random sample of larger caches; numbers are of all rows.",
)
@output_options
def analyze(cache: str, against: str | None, out: Path | None, kind: str, points: int, as_json: bool) -> None:
    """Analyze a cache: a page with map, likely wrong captions, duplicates, outliers, groups; and all numbers.

    --json prints the content of report.json.

    \u0008
    tc analyze caches/demo/clip-lite.zarr
    tc build --teacher runs/mine --out caches/demo/mine.zarr       # a student over the same rows
    tc analyze caches/demo/clip-lite.zarr --against caches/demo/mine.zarr --out report
    """
    with status("importing libraries"):
        from teachercache.analysis.report.write import analyze as run
        from teachercache.analysis.report.write import default_out

    out = out or default_out(as_path(cache), against)
    report, written = run(
        as_path(cache), against=as_path(against) if against else None, out=out, kind=kind, points=points
    )
    if as_json:
        from teachercache.analysis.report.as_json import as_json as json_of

        print(json_of(report))
    else:
        for line in written:
            show(line)
    suggest("python", "-m", "webbrowser", out / "report.html")
