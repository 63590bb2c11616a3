"""`tc build`: run a teacher over data and write a cache."""

from typing import TYPE_CHECKING, Any

import click

from teachercache.commands.next_steps import suggest_use
from teachercache.commands.options import (
    DEMO_DATA,
    NUMBER,
    any_path,
    cache_path,
    names_in,
    output_options,
    print_json,
    teacher_names,
)
from teachercache.core.command import UNFINISHED, place, text
from teachercache.core.process import world_size
from teachercache.core.progress import say

if TYPE_CHECKING:
    from teachercache.api import Built


@click.command()
@click.option(
    "--teacher",
    "name",
    required=True,
    type=text,
    help="A name of `tc teachers`.",
    shell_complete=names_in(teacher_names),
)
@click.option(
    "--data",
    type=place,
    shell_complete=any_path,
    default=DEMO_DATA,
    show_default=True,
    help="A folder of images, .tar shards, Parquet, captions, questions, texts, ...: see `tc manifest "
    "--help`. Several are separated by commas; each may be a quoted glob or a URL: "
    "s3://bucket/shards/*.tar",
)
@click.option(
    "--out",
    type=place,
    shell_complete=cache_path,
    help="The cache, a folder or a URL; default caches/<data>/<teacher>.zarr, "
    "<teacher>-views.zarr with --views.",
)
@click.option(
    "--outputs",
    help="What to store, comma-separated: embeddings, patches, hidden, hidden:3+7, tokens, random_tokens; regions of a "
    "regions teacher; text_states, latents, unet_features, scores of a diffusion teacher (tc teachers). Default: a "
    "teacher's first, embeddings or regions; text_states,latents.",
)
@click.option(
    "--weights",
    type=place,
    default="pretrained",
    show_default=True,
    help="pretrained, a checkpoint file or open_clip folder, or random:SEED (untrained).",
)
@click.option(
    "--views",
    default=0,
    show_default=True,
    type=click.IntRange(0, 1000),
    help="Augmented views of every image, stored with their parameters; 0 for the unaugmented image. "
    "A larger number later adds views.",
)
@click.option(
    "--augment",
    multiple=True,
    metavar="KEY=VALUE",
    help="How views are drawn, for example flip=0, scale_min=0.9 (docs/how-to/grow.md).",
)
@click.option("--batch-size", default=32, show_default=True, type=NUMBER)
@click.option(
    "--workers", type=click.IntRange(0, 256), help="Decoding processes; default: spare cores, at most 8."
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--device", default="auto", show_default=True)
@click.option("--limit", type=NUMBER, help="Only the first N rows.")
@click.option(
    "--prune",
    is_flag=True,
    help="Follow data that lost or changed rows; unchanged rows are not computed again.",
)
@click.option("--retry", is_flag=True, help="Compute the rows of quarantine.jsonl again.")
@click.option(
    "--repair", is_flag=True, help="Read every file of the cache first, and write damaged blocks again."
)
@click.option(
    "--no-wait",
    is_flag=True,
    help="Leave blocks that another builder writes to it, and return exit code 3; otherwise wait for them, and take "
    "them over if that builder dies.",
)
@output_options
def build(
    name: str,
    data: str,
    out: str | None,
    outputs: str | None,
    weights: str,
    limit: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Run a teacher over data and write a cache. A build that is killed resumes with the same command.

    Data that gained rows or texts, or a larger --views, extends an existing cache.

    \u0008
    tc build --teacher clip-lite
    tc build --teacher clip-lite --views 4
    tc build --teacher clip-vit-b16 --data photos/ --out caches/photos.zarr
    tc build --teacher clip-vit-b16 --weights random:0 --limit 100
    torchrun --nproc-per-node 8 -m teachercache build --teacher clip-vit-l14 --data shards/
    """
    from teachercache import api

    wait = not options.pop("no_wait")
    options |= {"outputs": outputs, "weights": weights, "limit": limit, "wait": wait}
    built = api.build(name, data, out, **options)
    if as_json:
        print_json(built)
    return announce(built)


def announce(built: "Built") -> int:
    """Print the result of a build and what to do next; return the exit code."""
    from teachercache.cache.store import open_cache

    if built.blocks_left:
        say(
            f"{built.blocks_left} blocks are being written by another builder; run the same command to check on them"
        )
        if world_size() > 1:
            return 0  # another rank of this job completes the cache
        suggest_use(open_cache(built.cache), done="build")
        return UNFINISHED
    if built.quarantined:
        say(
            f"{built.quarantined} entries in {built.cache / 'quarantine.jsonl'} (unusable rows or texts); once they are "
            "mended: the same command with --retry"
        )
    say(f"{built.cache} is complete: {built.rows:,} rows ({built.rows_written:,} written now)")
    suggest_use(open_cache(built.cache), done="build")
    return 0
