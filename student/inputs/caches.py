"""Which caches a run reads and which rows they let it train on. Caches join by key. Not for batches: see `batches`."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from student.distributed import from_all_ranks
from student.ensemble import concat_shapes, named
from student.inputs.hints import build_command, field_groups
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say, ticker
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

# ----------------------------------------------------------------------------------------------------
# Which caches


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run looks for among its caches.

    Args:
        cache: `--cache`: a cache, a folder of caches, or several with commas between them.
        data: `--data`, for hints.
        fields: Cached fields that recipe and student read.
        teacher: The teacher that hints tell to build, where it writes the fields.
    """

    cache: str
    data: str
    fields: tuple[str, ...]
    teacher: str

    def hint(self, fields: tuple[str, ...], cache: str) -> str:
        """Return a `tc build` command that writes `fields` at a part of --cache."""
        return build_command(self.data, fields, self.teacher, cache)


def find_ensemble(wanted: Wanted) -> list[store.Cache]:
    """Return the caches of several teachers, each with all fields; [] if no field is read."""
    parts = parts_of(wanted.cache) if wanted.fields else []
    caches = [find_cache(part, wanted.fields, wanted.hint(wanted.fields, part)) for part in parts]
    if len({cache.meta.spec.digest for cache in caches}) < len(caches):
        raise UserError(
            f"--cache {wanted.cache} names one teacher twice: several caches are for several teachers"
        )
    return caches


def find_by_field(wanted: Wanted) -> list[store.Cache]:
    """Return one cache for each group of fields that one teacher writes; [] if no field is read."""
    return [_find_among(wanted, fields) for fields in field_groups(wanted.fields, wanted.teacher)]


def _find_among(wanted: Wanted, fields: tuple[str, ...]) -> store.Cache:
    """Return the first cache of `--cache` that holds the fields; UserError names a `tc build` that makes one."""
    parts = parts_of(wanted.cache)
    for i, part in enumerate(parts):
        try:
            return find_cache(part, fields, wanted.hint(fields, part))
        except SeveralCaches:
            raise
        except UserError:
            if i == len(parts) - 1:
                raise
    raise AssertionError("parts_of returns one part at least")


class SeveralCaches(UserError):
    """More than one cache fits; the user has to name one."""


def parts_of(folders: str) -> list[str]:
    """What stands between the commas of --cache; a path that is there may have some itself."""
    if "," not in folders or as_path(folders).exists():
        return [folders]
    return [part.strip() for part in folders.split(",") if part.strip()]


def find_cache(folder: str, reads: tuple[str, ...], build_hint: str) -> store.Cache:
    """The cache at `folder`, or the one inside it that holds what the recipe reads.

    Trained teachers come before random ones, and of one teacher the cache of augmented views before the plain one.
    """
    path = as_path(folder)
    there = caches_in(folder)
    found = [cache for cache in there if all(name in cache.fields for name in reads)]
    if there and there[0].path == path and not found:
        missing = [name for name in reads if name not in there[0].fields]
        raise UserError(f"{path} has no field {', '.join(missing)}: run `{build_hint}`")
    found = [cache for cache in found if not cache.meta.spec.weights.startswith("random:")] or found
    if len({cache.meta.spec.digest for cache in found}) == 1:
        found = [cache for cache in found if cache.meta.views] or found
    if not found:
        raise UserError(f"no cache with {', '.join(reads)} in {folder}: run `{build_hint}`")
    if len(found) > 1:
        names = ", ".join(str(cache.path) for cache in found)
        raise SeveralCaches(f"several caches fit, pass one as --cache: {names}")
    return store.open_complete(found[0].path)


def same_data_cache(folder: str, manifest: Manifest) -> store.Cache | None:
    """Any finished cache of exactly this data, one with augmented views first: it knows which rows can be read."""
    found = [
        cache
        for part in parts_of(folder)
        for cache in caches_in(part)
        if cache.meta.manifest == manifest.digest
    ]
    whole = [cache for cache in found if len(store.done_blocks(cache)) == cache.meta.num_blocks]
    return next((cache for cache in whole if cache.meta.views), whole[0] if whole else None)


def caches_in(folder: str) -> list[store.Cache]:
    """The cache at `folder`, or those inside it in order of their names."""
    path = as_path(folder)
    if (path / "zarr.json").exists():
        return [store.open_cache(path)]
    return [store.open_cache(entry.parent) for entry in sorted(path.glob("*.zarr/zarr.json"))]


# ----------------------------------------------------------------------------------------------------
# Which rows


def training_rows(manifest: Manifest, cache: store.Cache | None) -> np.ndarray:
    """Rows of the training split that have a text and that the cache holds and calls usable."""
    rows = manifest.rows_of_split("train")
    rows = rows[manifest.has_text()[rows]]
    if not len(rows):
        raise UserError(f"{manifest.data} has no training rows with a text")
    if cache is None:
        return rows
    keys = manifest.table["key"].take(rows)
    at = store.join(cache, keys)
    if (at < 0).any():
        raise UserError(
            f"{(at < 0).sum()} of {len(rows)} training rows of {manifest.data} are not in {cache.path}, the first is "
            f"'{keys[int(np.argmax(at < 0))]}': extend it with `{cache.command(data=manifest.data)}`"
        )
    _same_rows(manifest, cache, rows, at)
    return rows[np.asarray(store.read_field(cache, "valid"))[at]]


def _same_rows(manifest: Manifest, cache: store.Cache, rows: np.ndarray, at: np.ndarray) -> None:
    """Refuse a cache whose rows of the same keys had other texts or another picture file."""
    if manifest.digest == cache.meta.manifest:
        return
    then = store.cached_manifest(cache).table.take(at)
    now = manifest.table.take(rows)
    for name in ("texts", "size"):
        changed = [
            i
            for i, (a, b) in enumerate(zip(then[name].to_pylist(), now[name].to_pylist(), strict=True))
            if a != b
        ]
        if changed:
            raise UserError(
                f"{len(changed)} rows of {manifest.data} changed since {cache.path} was built, the first is "
                f"'{now['key'][changed[0]].as_py()}': follow them with `{cache.command(data=manifest.data)} --prune`"
            )


def readable_rows(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Rows whose picture can be read, by reading each once on one rank; the others are named with their reason."""
    kept, left_out = [], []
    mine = rows[rank() :: world_size()].tolist()
    with ticker(len(mine), "pictures", "checking pictures") as tick:
        for row in mine:
            sample = manifest.row(row)
            try:
                read_image(manifest, sample)
            except BadSample as error:
                left_out.append(f"left out {sample.key}: {error}")
            else:
                kept.append(row)
            tick.step(1)
    for line in [line for part in from_all_ranks(left_out) for line in part]:
        say(line)
    return np.array(sorted(row for part in from_all_ranks(kept) for row in part), int)


# ----------------------------------------------------------------------------------------------------
# What is read of them


class Source(NamedTuple):
    """One teacher's cache beside the manifest's rows."""

    at: np.ndarray  # manifest row -> cache row, -1 for rows that are not trained on
    fields: dict[str, np.ndarray]
    per: dict[str, str]
    constants: dict[str, float]
    text_valid: np.ndarray


def open_source(cache: store.Cache, manifest: Manifest, rows: np.ndarray, reads: tuple[str, ...]) -> Source:
    """The fields that a recipe reads of a cache."""
    fields = {name: store.read_field(cache, name) for name in reads}
    per = {name: cache.fields[name].per for name in reads}
    valid = store.read_field(cache, "text_valid")
    return Source(places(cache, manifest, rows), fields, per, dict(cache.meta.spec.constants), valid)


def places(cache: store.Cache, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Manifest row -> cache row, -1 for rows that are not trained on."""
    at = np.full(len(manifest), -1)
    at[rows] = store.join(cache, manifest.table["key"].take(rows))
    return at


def same_views(caches: Sequence[store.Cache], manifest: Manifest, rows: np.ndarray) -> None:
    """Refuse teachers that saw different augmented views of the same pictures."""
    first, *others = caches or (None,)
    for other in others:
        same = first.meta.views == other.meta.views
        if same and first.meta.views:
            here, there = (
                store.read_field(cache, "view_params")[places(cache, manifest, rows)[rows]]
                for cache in (first, other)
            )
            same = np.array_equal(here, there)
        if not same:
            raise UserError(
                f"{first.path} and {other.path} hold different views: build both with the same --views "
                "and --augment"
            )


def field_shapes(caches: Sequence[store.Cache], ensemble: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields as a batch names them, for heads."""
    shapes = {
        named(name, k): field.shape for k, cache in enumerate(caches) for name, field in cache.fields.items()
    }
    return concat_shapes(shapes) if ensemble == "concat" and len(caches) > 1 else shapes
