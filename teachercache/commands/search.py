"""`tc search`: find the rows nearest to a text, an image or a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from teachercache.commands.options import (
    NUMBER,
    any_path,
    cache_path,
    field_option,
    output_options,
    print_json,
    teacher_option,
)
from teachercache.core.command import path, place
from teachercache.core.command import text as text_type
from teachercache.core.progress import printable, show, suggest


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@click.argument("text", type=text_type, required=False)
@click.option(
    "--image",
    "images",
    type=path,
    multiple=True,
    shell_complete=any_path,
    help="Search by an image; may be repeated.",
)
@click.option(
    "--key", "keys", type=text_type, multiple=True, help="Search by a row of the cache; may be repeated."
)
@field_option
@click.option("--top", default=10, show_default=True, type=NUMBER)
@teacher_option
@output_options
def search(
    cache: str,
    text: str | None,
    images: tuple[Path, ...],
    keys: tuple[str, ...],
    field: str | None,
    top: int,
    teacher: str | None,
    as_json: bool,
) -> None:
    """Find the images nearest to a text, an image, a row, or all of them together.

    \u0008
    tc search caches/demo/clip-lite.zarr "a bird"
    tc search caches/demo/clip-lite.zarr --image cat.jpg --top 5
    tc search caches/demo/clip-lite.zarr --key train/cat/0012 "in the snow"   # this image, but snowy
    """
    from teachercache import api

    results = api.search(cache, text, images=images, keys=keys, field=field, top=top, teacher=teacher)
    if as_json:
        query = " + ".join([*filter(None, [text]), *map(str, images), *keys])
        print_json({"query": query, "results": results})
    else:
        print_results(results)
    if results and not keys:
        more = ["--field", field] if field else []
        suggest("tc", "search", cache, *more, "--key", results[0]["key"])
    else:
        suggest("tc", "info", cache)


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """Print what `search_cache` returned, a line per row."""
    for result in results:
        texts = "; ".join(result["texts"])
        show(printable(f"{result['score']:.3f}  {result['image'] or result['key']}  {texts}"))
