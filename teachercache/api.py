"""The Python interface of phase 1: what `tc build` and `tc search` do, as functions.

They take the settings of the commands, raise UserError, return records and print nothing on stdout. Progress and notices
go to stderr.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from annotated_types import Interval

from teachercache.core.paths import as_path
from teachercache.core.progress import say, status
from teachercache.core.ranges import Name, Number, check_options

DEMO_DATA = "data/demo"


class BuildKeywords(TypedDict, total=False):
    """Further options of `build`, with the names of the options of `tc build`.

    Attributes:
        views: Augmented views to store per image; 0 for the unaugmented image.
        augment: How views are drawn: {"flip": 0}, or texts "flip=0".
        batch_size: Rows per forward pass.
        workers: Decoding processes; None for the spare cores.
        precision: auto, fp32, bf16 or fp16.
        device: auto or a torch device.
        prune: Follow data that lost or changed rows.
        retry: Compute the rows of quarantine.jsonl again.
        repair: Read every file of the cache first, and write damaged blocks again.
        wait: Wait for blocks that another builder writes; False leaves them to it.
    """

    views: Annotated[int, Interval(ge=0, le=1000)]
    augment: Mapping[str, object] | Sequence[str]
    batch_size: Number
    workers: Annotated[int, Interval(ge=0, le=256)] | None
    precision: Name
    device: Name
    prune: bool
    retry: bool
    repair: bool
    wait: bool


@dataclasses.dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        cache: The folder or URL of the cache.
        rows: The number of rows of the cache.
        rows_written: The number of rows that the teacher encoded now.
        quarantined: The number of entries in quarantine.jsonl.
        blocks_left: The number of blocks that another builder still writes; 0 once the cache is complete.
    """

    cache: Path
    rows: int
    rows_written: int
    quarantined: int
    blocks_left: int


def default_cache(data: str, teacher: str, views: int = 0) -> Path:
    """Return `caches/<data>/<teacher>.zarr`, for augmented views `<teacher>-views.zarr`."""
    from teachercache.data.read import cache_folder

    name = Path(teacher).name if Path(teacher).is_dir() else teacher.replace("/", "-").replace(":", "-")
    return cache_folder(data) / f"{name}{'-views' * bool(views)}.zarr"


def build(
    teacher: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    weights: str | Path = "pretrained",
    limit: int | None = None,
    **options: Unpack[BuildKeywords],
) -> Built:
    """Run a teacher over data and write a cache, or complete the one that is there.

    Args:
        teacher: A name of `tc teachers`, a folder or a run.
        data: What `--data` takes: a folder, shards, a manifest, ...
        out: The cache; default `caches/<data>/<teacher>.zarr`.
        outputs: What to store, as a sequence or comma-separated; default: the first of the teacher.
        weights: pretrained, a checkpoint, or random:SEED.
        limit: Only the first rows.
        **options: See `BuildKeywords`.

    Raises:
        UserError: The cache cannot be built; the message says what to change.
    """
    name, data, weights = str(teacher), str(data), str(weights)
    check_options({"limit": limit, **options}, BuildKeywords, limit=Number | None)

    from teachercache.build.options import choose_options
    from teachercache.data.read import read_manifest
    from teachercache.teachers.registry import find

    parts = outputs.split(",") if isinstance(outputs, str) else outputs
    wanted = None if parts is None else tuple(part.strip() for part in parts if part.strip())
    find(name)
    how = choose_options(limit=limit or 0, **_with_defaults(options))
    manifest = read_manifest(data, limit=limit)
    if weights.startswith("random:"):
        say(f"WARNING: --weights {weights}: the architecture of {name} with random weights, untrained")

    with status("importing libraries"):
        from teachercache.build.loop import build as run
    from teachercache.teachers.registry import load

    loaded = load(name, weights=weights, outputs=wanted)
    dtype = f"{how.precision.dtype} ({how.precision.reason})"
    say(f"{name} on {how.device} in {dtype}; {len(manifest):,} rows of {manifest.data}")
    folder = as_path(out) if out else default_cache(data, name, how.views)
    done = run(loaded, manifest, folder, how)
    return Built(done.cache.path, done.cache.meta.rows, done.rows_written, done.quarantined, done.blocks_left)


def _with_defaults(options: BuildKeywords) -> dict[str, Any]:
    """Return all options of a build; settings of views become texts as on the command line."""
    defaults: BuildKeywords = {"views": 0, "augment": (), "batch_size": 32, "workers": None}
    defaults |= {"precision": "auto", "device": "auto", "wait": True}
    defaults |= {"prune": False, "retry": False, "repair": False}
    chosen: dict[str, Any] = {**defaults, **options}
    drawn = chosen["augment"]
    texts = [f"{key}={value}" for key, value in drawn.items()] if isinstance(drawn, Mapping) else drawn
    return chosen | {"augment": tuple(texts)}


def search(
    cache: str | Path,
    text: str | None = None,
    *,
    images: Sequence[str | Path] = (),
    keys: Sequence[str] = (),
    field: str | None = None,
    top: int = 10,
    teacher: str | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a cache nearest to a text, to images, to rows, or to all of them together.

    Args:
        cache: The cache.
        text: A text to search by.
        images: Image files to search by.
        keys: Keys of rows to search by.
        field: The vector field; default: the one per image, else the one per text.
        top: The number of results.
        teacher: package.module:ENTRY of a teacher that is not installed.

    Returns:
        For each result its `key`, `score` (a cosine), `image` (the path) and `texts`.
    """
    check_options({"top": top}, top=Number)

    with status("importing libraries"):
        from teachercache.search.query import search_cache

    paths, names = tuple(map(Path, images)), tuple(keys)
    return search_cache(cache, text=text, images=paths, keys=names, field=field, top=top, teacher=teacher)
