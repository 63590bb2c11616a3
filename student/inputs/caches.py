"""Find the caches of a run, the rows that it can train on, and the fields that it reads.

Caches are joined to the data by key. Batches are made in `pairs` and `question_batches`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from student.distributed import from_all_ranks
from student.ensemble import concat_shapes, named
from student.inputs.hints import Wanted, build_command, field_groups
from teachercache.cache import store
from teachercache.cache.picture_bytes import replaced_pictures
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path, closest_path
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say, ticker
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

# ----------------------------------------------------------------------------------------------------
# Which caches


def find_ensemble(wanted: Wanted) -> list[store.Cache]:
    """Return the caches of several teachers, each with all fields; return [] if no field is read."""
    folders = parts_of(wanted.cache) if wanted.fields else []
    caches = [
        find_cache(folder, wanted.fields, build_command(wanted, wanted.fields, folder)) for folder in folders
    ]
    if len({cache.meta.spec.digest for cache in caches}) < len(caches):
        raise UserError(
            f"--cache {wanted.cache} names one teacher twice: several caches are for several teachers"
        )
    return caches


def find_by_field(wanted: Wanted) -> list[store.Cache]:
    """Return a cache for each group of fields that one teacher writes; return [] if no field is read."""
    return [_find_among(wanted, fields) for fields in field_groups(wanted.fields, wanted.teacher)]


def _find_among(wanted: Wanted, fields: tuple[str, ...]) -> store.Cache:
    """Return the first cache of `--cache` with the fields; raise a UserError if none has them."""
    folders = parts_of(wanted.cache)
    for i, folder in enumerate(folders):
        try:
            return find_cache(folder, fields, build_command(wanted, fields, folder))
        except SeveralCaches:
            raise
        except UserError:
            if i == len(folders) - 1:
                raise
    raise AssertionError("parts_of returns at least one path")


class SeveralCaches(UserError):
    """Several caches fit, and the user must name one of them."""


def parts_of(folders: str) -> list[str]:
    """Split --cache at its commas. An existing path is not split, because its name may contain commas."""
    if "," not in folders or as_path(folders).exists():
        return [folders]
    parts = [folder.strip() for folder in folders.split(",") if folder.strip()]
    twice = next((part for i, part in enumerate(parts) if as_path(part) in map(as_path, parts[:i])), None)
    if twice is not None:
        raise UserError(f"--cache {folders} names {twice} twice: write it once")
    return parts or [folders]


def find_cache(folder: str, reads: tuple[str, ...], build_hint: str) -> store.Cache:
    """Open the cache at `folder`, or the cache inside it that has the fields a recipe reads.

    Caches of trained teachers are preferred to those of random ones. Among caches of one teacher, those with
    augmented views are preferred.

    Args:
        folder: A cache or a folder of caches.
        reads: Names of the fields.
        build_hint: The command that builds a missing cache, for the error message.

    Raises:
        UserError: No cache has all fields.
        SeveralCaches: More than one cache fits.
    """
    path = as_path(folder)
    caches = caches_in(folder)
    fitting = [cache for cache in caches if all(name in cache.fields for name in reads)]
    if caches and caches[0].path == path and not fitting:
        missing = [name for name in reads if name not in caches[0].fields]
        raise UserError(
            f"{path} has no field {', '.join(missing)}: run `{build_hint}` and pass that as --cache"
        )
    fitting = [cache for cache in fitting if not cache.meta.spec.weights.startswith("random:")] or fitting
    if len({cache.meta.spec.digest for cache in fitting}) == 1:
        fitting = [cache for cache in fitting if cache.meta.views] or fitting
    if not fitting:
        near = "" if path.exists() else closest_path(folder)
        raise UserError(f"no cache with {', '.join(reads)} in {folder}: {near}run `{build_hint}`")
    if len(fitting) > 1:
        names = ", ".join(str(cache.path) for cache in fitting)
        raise SeveralCaches(f"several caches fit, pass one as --cache: {names}")
    return store.open_complete(fitting[0].path)


def same_data_cache(folder: str, manifest: Manifest) -> store.Cache | None:
    """Return a complete cache of exactly this data, or None; it stores which rows can be read.

    Caches with augmented views are preferred.
    """
    same_data = [
        cache
        for path in parts_of(folder)
        for cache in caches_in(path)
        if cache.meta.manifest == manifest.digest
    ]
    complete = [cache for cache in same_data if len(store.done_blocks(cache)) == cache.meta.num_blocks]
    return next((cache for cache in complete if cache.meta.views), complete[0] if complete else None)


def caches_in(folder: str) -> list[store.Cache]:
    """Open the cache at `folder`, or all caches inside it, sorted by name."""
    path = as_path(folder)
    if (path / "zarr.json").exists():
        return [store.open_cache(path)]
    return [store.open_cache(entry.parent) for entry in sorted(path.glob("*.zarr/zarr.json"))]


# ----------------------------------------------------------------------------------------------------
# Which rows


def training_rows(manifest: Manifest, cache: store.Cache | None) -> np.ndarray:
    """Return the indices of the training rows that have a text and no problem, and that the cache marks as valid.

    Args:
        manifest: All rows of the data.
        cache: A cache of the data; None to check texts only.

    Raises:
        UserError: No training row has a text, rows are missing in the cache, or rows have changed since it
            was built.
    """
    rows = manifest.rows_of_split("train")
    rows = rows[manifest.has_text()[rows]]
    unusable = (
        [row for row in rows.tolist() if manifest.row(row).picture_problem] if _problems(manifest) else []
    )
    if unusable and cache is None:
        first = manifest.row(unusable[0])
        say(
            f"left out {len(unusable):,} training rows with a problem, the first {first.key}: {first.problem}"
        )
    rows = rows[~np.isin(rows, unusable)]
    if not len(rows):
        splits = sorted({name for name in manifest.column("split") if name} - {"train"})
        others = f"; its rows are in the splits {', '.join(splits)}" if splits else ""
        raise UserError(f"{manifest.data} has no training rows with a text{others}")
    if cache is None:
        return rows
    keys = manifest.table["key"].take(rows)
    cache_rows = store.join(cache, keys)
    missing = cache_rows < 0
    if missing.any():
        raise UserError(
            f"{missing.sum()} of {len(rows)} training rows of {manifest.data} are not in {cache.path}, the "
            f"first is '{keys[int(np.argmax(missing))]}': extend it with "
            f"`{cache.command(data=manifest.data)}`"
        )
    _same_rows(manifest, cache, rows, cache_rows)
    return rows[np.asarray(store.read_field(cache, "valid"))[cache_rows]]


def _problems(manifest: Manifest) -> bool:
    """Return whether a reader found a problem in any row."""
    import pyarrow.compute as pc

    return bool(pc.any(pc.not_equal(manifest.table["problem"], "")).as_py())


def _same_rows(manifest: Manifest, cache: store.Cache, rows: np.ndarray, cache_rows: np.ndarray) -> None:
    """Raise a UserError if the texts or the picture of a row have changed since it was cached."""
    changed: set[int] = set()
    if manifest.digest != cache.meta.manifest:
        before = store.cached_manifest(cache).table.take(cache_rows)
        now = manifest.table.take(rows)
        for name in ("texts", "size"):
            pairs = zip(before[name].to_pylist(), now[name].to_pylist(), strict=True)
            changed |= {i for i, (a, b) in enumerate(pairs) if a != b}
    if not changed:
        own = np.arange(len(rows))[rank() :: world_size()]
        replaced = own[replaced_pictures(cache, cache_rows[own], manifest, rows[own])].tolist()
        changed = {i for of_rank in from_all_ranks(replaced) for i in of_rank}
    if changed:
        raise UserError(
            f"{len(changed)} rows of {manifest.data} changed since {cache.path} was built, the first is "
            f"'{manifest.row(int(rows[min(changed)])).key}': update the cache with "
            f"`{cache.command(data=manifest.data)} --prune`"
        )


def readable_rows(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return the rows whose picture can be decoded, and print the others. Each is read on one rank."""
    kept: list[int] = []
    left_out: list[str] = []
    rows_of_rank = rows[rank() :: world_size()].tolist()
    with ticker(len(rows_of_rank), "pictures", "checking pictures") as tick:
        for row in rows_of_rank:
            sample = manifest.row(row)
            try:
                read_image(manifest, sample)
            except BadSample as error:
                left_out.append(f"left out {sample.key}: {error}")
            else:
                kept.append(row)
            tick.step(1)
    for line in [line for lines in from_all_ranks(left_out) for line in lines]:
        say(line)
    return np.array(sorted(row for rank_rows in from_all_ranks(kept) for row in rank_rows), int)


# ----------------------------------------------------------------------------------------------------
# Which fields


class Source(NamedTuple):
    """The fields of one cache, for rows of the manifest."""

    at: np.ndarray  # manifest row -> cache row, -1 for rows that are not used
    fields: dict[str, np.ndarray]
    per: dict[str, str]  # field name -> row, image, text or pair
    constants: dict[str, float]  # such as logit_scale
    text_valid: np.ndarray  # bool [cache rows, texts]


def open_source(cache: store.Cache, manifest: Manifest, rows: np.ndarray, reads: tuple[str, ...]) -> Source:
    """Open the fields named in `reads` for the given rows of the manifest."""
    fields = {name: store.read_field(cache, name) for name in reads}
    per = {name: cache.fields[name].per for name in reads}
    valid = store.read_field(cache, "text_valid")
    return Source(places(cache, manifest, rows), fields, per, dict(cache.meta.spec.constants), valid)


def places(cache: store.Cache, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return an array that maps manifest rows to cache rows, with -1 outside of `rows`."""
    cache_rows = np.full(len(manifest), -1)
    cache_rows[rows] = store.join(cache, manifest.table["key"].take(rows))
    return cache_rows


def same_views(caches: Sequence[store.Cache], manifest: Manifest, rows: np.ndarray) -> None:
    """Raise a UserError if the caches hold different augmented views of the same pictures."""
    for other in caches[1:]:
        first = caches[0]
        same = first.meta.views == other.meta.views
        if same and first.meta.views:
            params, other_params = (
                store.read_field(cache, "view_params")[places(cache, manifest, rows)[rows]]
                for cache in (first, other)
            )
            same = np.array_equal(params, other_params)
        if not same:
            raise UserError(
                f"{first.path} and {other.path} hold different views: build both with the same --views "
                "and --augment"
            )


def field_shapes(caches: Sequence[store.Cache], ensemble: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the fields under their names in a batch, for building heads."""
    shapes = {
        named(name, k): field.shape for k, cache in enumerate(caches) for name, field in cache.fields.items()
    }
    return concat_shapes(shapes) if ensemble == "concat" and len(caches) > 1 else shapes
