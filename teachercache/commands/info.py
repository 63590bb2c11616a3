"""`tc info`: show what a cache holds."""

from typing import TYPE_CHECKING

import click

from teachercache.commands.next_steps import suggest_use
from teachercache.commands.options import cache_path, output_options, print_json
from teachercache.core.command import place
from teachercache.core.progress import show

if TYPE_CHECKING:
    from teachercache.cache.store import Cache


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@output_options
def info(cache: str, as_json: bool) -> None:
    """Show what a cache holds: teacher, fields, rows, finished blocks.

    \u0008
    tc info caches/demo/clip-lite.zarr
    tc info caches/demo/clip-lite.zarr --json
    """
    from teachercache.cache import store
    from teachercache.cache.spec import to_dict

    opened = store.open_cache(cache)
    meta, done = opened.meta, store.done_blocks(opened)
    records = [
        record for block in store.listed_blocks(opened) if (record := store.done_record(opened, block))
    ]
    invalid = [entry for record in records for entry in record["invalid"]]
    size = sum(path.stat().st_size for path in opened.path.rglob("*") if path.is_file())
    if as_json:
        facts = {
            "blocks_done": len(done),
            "blocks": meta.num_blocks,
            "quarantined": len(invalid),
            "bytes": size,
        }
        print_json({**to_dict(meta), **facts})
    else:
        print_info(opened, blocks_done=len(done), unusable=len(invalid), size=size)
    suggest_use(opened, done="info")


def print_info(opened: "Cache", *, blocks_done: int, unusable: int, size: int) -> None:
    """Print the metadata of a cache.

    Args:
        opened: The cache.
        blocks_done: The number of finished blocks.
        unusable: The number of entries in the quarantine.
        size: The bytes on disk.
    """
    meta = opened.meta
    show(
        f"teacher    {meta.spec.name} ({meta.spec.weights}), weights {meta.spec.digest[:12]}, {meta.precision}"
    )
    show(
        f"data       {meta.data}, {meta.rows:,} rows, {meta.texts} texts a row"
        + (f", {meta.views} augmented views a picture" if meta.views else "")
    )
    show(
        f"blocks     {blocks_done} of {meta.num_blocks} done, {meta.block_rows:,} rows each, {size / 1e6:,.1f} MB"
    )
    show(f"unusable   {unusable}")
    for field in opened.fields.values():
        shape = "x".join(map(str, field.array_shape(meta.rows, meta.texts, meta.views)))
        show(f"  {field.name:18} {shape:>18} {field.dtype:8} {field.doc}")
    for name, value in meta.spec.constants.items():
        show(f"  {name:12} {value:.6g}")
