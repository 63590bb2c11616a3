"""`tc index`: build or extend a FAISS index beside a cache."""

import dataclasses

import click

from teachercache.commands.next_steps import suggest_use
from teachercache.commands.options import cache_path, field_option, output_options, print_json
from teachercache.core.command import place
from teachercache.core.progress import say, status


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@field_option
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    help="flat (exact), ivf, hnsw, or auto: flat up to 50,000 vectors, ivf above.",
)
@output_options
def index(cache: str, field: str | None, kind: str, as_json: bool) -> None:
    """Build a FAISS index over a field, beside the cache; add the new rows of a cache that grew.

    Prints the measured recall@10 against exact search; nprobe or efSearch is raised until it is 0.95.

    \u0008
    tc index caches/demo/clip-lite.zarr
    tc index caches/demo/clip-lite.zarr --field text_emb --kind hnsw
    """
    from teachercache.cache.store import open_complete

    with status("importing libraries"):
        from teachercache.search.index import changing, describe, update_index

    opened = open_complete(cache)
    with changing(opened):
        path, record, done = update_index(opened, field=field, kind=kind)
    say(f"{path} {done}: {describe(record)}")
    if as_json:
        print_json({"index": path, "done": done, **dataclasses.asdict(record)})
    suggest_use(opened, done="index")
