"""Which cache a build writes into: a new one, the one that is there, that one with more rows, texts or views, or a
pruned copy. Not for computing: see `build.py`.

A cache keeps its rows in their order for ever: what a manifest gained comes behind them, so ids keep their meaning.
When rows were lost or changed only `--prune` goes on: it builds a second cache beside the first, takes over every row
that is still the same, and puts it in the first one's place.
"""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from teachercache.cache import store
from teachercache.cache.disk_space import ask_space
from teachercache.cache.layout import block_rows_for, metadata
from teachercache.cache.repair import mend_files
from teachercache.cache.spec import CacheMeta, differences
from teachercache.core.errors import UserError
from teachercache.core.paths import is_url, write_whole
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest, row_digests, write_manifest

MAY_DIFFER = ("data", "versions", "block_rows", "manifest", "rows", "texts", "views", "limit")


class Target(NamedTuple):
    """Where a build writes, and what it need not compute."""

    cache: store.Cache
    manifest: Manifest  # in the cache's order
    old: store.Cache | None  # the cache that is pruned
    at: np.ndarray | None  # each row's place in `old`, -1 where it must be computed
    old_done: np.ndarray = np.empty(0, np.int64)  # finished blocks of `old`


class Change(NamedTuple):
    """How a manifest differs from the rows of a cache."""

    order: np.ndarray  # manifest rows in the cache's order, those that the cache lacks behind
    lost: list[str]  # keys that the manifest has no more
    changed: list[str]  # keys whose picture, texts or task are others
    at: np.ndarray  # each row of `order`'s place in the cache, -1 where it is new or changed


def settle(path: Path, meta: CacheMeta, manifest: Manifest, *, prune: bool = False) -> Target:
    """The cache to build `meta` into; UserError names what does not fit and what to type."""
    _recover(path)
    if not store.is_there(path):
        ask_space(store.Cache(path, meta))
        cache = store.create(path, meta, manifest)
        if cache.meta == meta:
            return Target(cache, manifest, None, None)
    cache = store.open_cache(path)
    _same_teacher(cache, meta)
    mend_files(cache, manifest)
    change = compare(cache, manifest)
    if len(change.lost) == cache.meta.rows:
        raise UserError(
            f"{cache.path} holds another build, no row of it is in {manifest.data}: pass another --out"
        )
    if (change.lost or change.changed) and not prune:
        raise UserError(
            f"{_tell(cache, manifest, change)}: the same command with --prune follows the data, or pass "
            "another --out"
        )
    ordered = dataclasses.replace(manifest, table=manifest.table.take(change.order))
    wanted = dataclasses.replace(
        meta,
        block_rows=cache.meta.block_rows,
        versions=cache.meta.versions,
        views=max(meta.views, cache.meta.views),
        texts=max(meta.texts, cache.meta.texts),
    )
    if change.lost or change.changed:
        return _start_pruning(cache, dataclasses.replace(wanted, texts=meta.texts), ordered, change)
    ask_space(store.Cache(path, wanted))
    return Target(_extend(cache, wanted, ordered), ordered, None, None)


def compare(cache: store.Cache, manifest: Manifest) -> Change:
    """What became of a cache's rows in a manifest, by key."""
    import pyarrow.compute as pc

    then = store.cached_manifest(cache)
    keys, now = then.table["key"].combine_chunks(), manifest.table["key"].combine_chunks()
    found = pc.index_in(keys, value_set=now).fill_null(-1).to_numpy().astype(np.int64)
    kept = np.flatnonzero(found >= 0)
    new = np.setdiff1d(np.arange(len(manifest)), found)
    changed = (
        _changed(then, manifest, kept, found[kept])
        if then.digest != manifest.digest
        else np.array([], np.int64)
    )
    at = np.concatenate([np.where(np.isin(kept, changed), -1, kept), np.full(len(new), -1)])
    lost = keys.take(np.flatnonzero(found < 0)).to_pylist()
    return Change(np.concatenate([found[kept], new]), lost, keys.take(changed).to_pylist(), at)


def _changed(then: Manifest, now: Manifest, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Those of `rows` whose content differs; more texts behind as many as the cache holds are no difference."""
    before, after = row_digests(then.table.take(rows)), row_digests(now.table.take(places))
    changed = []
    for i in np.flatnonzero(before != after).tolist():
        old, new = then.row(int(rows[i])), now.row(int(places[i]))
        first = dataclasses.replace(new, texts=new.texts[: len(old.texts)])
        same = all(
            getattr(old, name) == getattr(first, name)
            for name in ("image", "offset", "size", "task", "texts")
        )
        if not (same and len(old.texts) == then.texts):
            changed.append(rows[i])
    return np.array(changed, np.int64)


def _same_teacher(cache: store.Cache, meta: CacheMeta) -> None:
    if bool(cache.meta.views) != bool(meta.views):
        there, asked = cache.meta.views, meta.views
        raise UserError(
            f"{cache.path} holds another build (views: {there} stored, {asked} requested): pass another --out"
        )
    changed = differences(cache.meta, meta, ignore=MAY_DIFFER)
    if changed:
        raise UserError(
            f"{cache.path} holds another build ({'; '.join(changed)}): pass another --out, or remove that folder"
        )


def _tell(cache: store.Cache, manifest: Manifest, change: Change) -> str:
    """Lost and changed rows in words."""
    named = [
        f"{len(keys)} rows {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for keys, what in ((change.lost, "are gone"), (change.changed, "changed"))
        if keys
    ]
    return f"{' and '.join(named)} in {manifest.data} since {cache.path} was built"


def _extend(cache: store.Cache, meta: CacheMeta, manifest: Manifest) -> store.Cache:
    """The same cache with room for what `meta` has more; nothing is written where it has nothing more."""
    with store.growing(cache):
        cache = store.open_cache(cache.path)  # another builder may have been first
        there = cache.meta
        if there == meta:
            return cache
        gained = {name: (getattr(there, name), getattr(meta, name)) for name in ("rows", "texts", "views")}
        words = [f"{name} {old:,} -> {new:,}" for name, (old, new) in gained.items() if old != new]
        if words:
            say(f"{cache.path} grows: {', '.join(words)}")
        write_manifest(manifest, cache.path / "manifest.parquet")
        for name, content in metadata(meta).items():  # the group's own last: it says what counts
            write_whole(cache.path / name, content)
        return store.Cache(cache.path, meta)


# ----------------------------------------------------------------------------------------------------
# Pruning


def _beside(path: Path, word: str) -> Path:
    return Path(f"{path}.{word}")


def _start_pruning(old: store.Cache, meta: CacheMeta, manifest: Manifest, change: Change) -> Target:
    if is_url(old.path):
        raise UserError(f"--prune is for local caches: build {old.path} anew into another --out")
    path = _beside(old.path, "pruning")
    meta = dataclasses.replace(meta, block_rows=block_rows_for(meta.spec.fields, meta.rows))
    if store.is_there(path) and store.open_cache(path).meta != meta:  # of other data than there is now
        shutil.rmtree(path)
    ask_space(store.Cache(path, meta))
    cache = store.open_cache(path) if store.is_there(path) else store.create(path, meta, manifest)
    say(f"pruning {old.path}: {len(change.lost):,} rows are gone, {len(change.changed):,} changed")
    return Target(cache, manifest, old, change.at, np.array(sorted(store.done_blocks(old)), np.int64))


def replace_pruned(target: Target) -> store.Cache:
    """Put a whole pruned cache in the old one's place; a killed build goes on from any point of it."""
    assert target.old is not None
    path, pruned = target.old.path, target.cache.path
    with contextlib.suppress(FileNotFoundError), store.growing(target.cache):
        if pruned.exists():
            shutil.rmtree(_beside(path, "old"), ignore_errors=True)
            os.rename(path, _beside(path, "old"))
            os.rename(pruned, path)
            shutil.rmtree(_beside(path, "old"))
    return store.open_cache(path)


def _recover(path: Path) -> None:
    """Finish what a builder that was killed between two renames had begun."""
    if is_url(path) or not _beside(path, "old").exists():
        return
    if not path.exists():
        os.rename(_beside(path, "pruning"), path)  # it was whole, else the old one were still in its place
    with contextlib.suppress(FileNotFoundError):  # another builder removes it too
        shutil.rmtree(_beside(path, "old"))


# ----------------------------------------------------------------------------------------------------
# What a block still needs


class Job(NamedTuple):
    """One block: which rows, views and texts to compute, and where the other rows' values lie."""

    block: int
    rows: np.ndarray  # to compute
    views: range
    texts: range
    kept: np.ndarray  # rows whose values are taken over
    source: store.Cache | None
    source_rows: np.ndarray
    problems: list[dict[str, Any]]  # what an earlier builder found of rows that are not computed again


def jobs_for(target: Target) -> dict[int, Job]:
    """What there is to do for every block that is not finished."""
    done = store.done_blocks(target.cache)
    return {
        block: job_for(target, block) for block in range(target.cache.meta.num_blocks) if block not in done
    }


def job_for(target: Target, block: int) -> Job:
    """What the done record of a block, or the cache that is pruned, leaves to do."""
    cache, meta = target.cache, target.cache.meta
    rows = np.arange(meta.block(block).start, meta.block(block).stop)
    none, texts = rows[:0], range(meta.texts)
    views = range(meta.views or 1) if target.manifest.has_images else range(0)
    record, old = store.done_record(cache, block), target.old
    if record is not None and record["rows"][1] == rows[-1] + 1:  # texts or views were added
        texts = range(record["texts"], meta.texts)
        if not meta.spec.reads_pairs:  # otherwise new texts need the images again
            views = range(record["views"], meta.views)
        return Job(block, rows, views, texts, none, None, none, _facts(record["invalid"], rows, rows))
    if record is not None and (record["views"], record["texts"]) == (
        meta.views,
        meta.texts,
    ):  # rows were added
        kept, new = rows[rows < record["rows"][1]], rows[rows >= record["rows"][1]]
        return Job(block, new, views, texts, kept, cache, kept, _facts(record["invalid"], kept, kept))
    if old is None or target.at is None or (old.meta.views, old.meta.texts) != (meta.views, meta.texts):
        return Job(block, rows, views, texts, none, None, none, [])
    places = target.at[rows]
    have = (places >= 0) & np.isin(np.maximum(places, 0) // old.meta.block_rows, target.old_done)
    kept, source = rows[have], places[have]
    records = [store.done_record(old, b) for b in np.unique(source // old.meta.block_rows).tolist()]
    problems = [entry for found in records if found for entry in found["invalid"]]
    return Job(block, rows[~have], views, texts, kept, old, source, _facts(problems, source, kept))


def _facts(problems: list[dict[str, Any]], rows: np.ndarray, now: np.ndarray) -> list[dict[str, Any]]:
    """Entries of `rows` under the numbers that they have now."""
    number = dict(zip(rows.tolist(), now.tolist(), strict=True))
    return [{**entry, "row": number[entry["row"]]} for entry in problems if entry["row"] in number]
