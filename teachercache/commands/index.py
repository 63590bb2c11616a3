"""`tc index`: build or extend a FAISS index beside a cache."""

import click

from teachercache.commands.options import field_option
from teachercache.core.command import place
from teachercache.core.progress import say


@click.command()
@click.argument("cache", type=place)
@field_option
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    help="flat (exact), ivf, hnsw, or auto: flat up to 50,000 vectors, ivf above.",
)
def index(cache: str, field: str | None, kind: str) -> None:
    """Build a FAISS index over a field, beside the cache; add the new rows of a cache that grew.

    Prints the measured recall@10 against exact search; nprobe or efSearch is raised until it is 0.95.
    """
    from teachercache.cache.store import open_complete
    from teachercache.search.index import changing, describe, update_index

    opened = open_complete(cache)
    with changing(opened):
        path, record, done = update_index(opened, field=field, kind=kind)
    say(f"{path} {done}: {describe(record)}")
