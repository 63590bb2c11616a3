"""Open the cache that a build writes into: a new one, the existing one, perhaps with more rows, texts or views, or a
pruned copy. Then plan what each block still needs.

A cache never reorders its rows: new rows are appended, so that row numbers stay valid. If rows were removed or changed,
only `--prune` continues: it builds a second cache beside the first, copies the rows that are unchanged, and replaces the
first one.
"""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from teachercache.cache import store
from teachercache.cache.disk_space import check_space
from teachercache.cache.layout import block_rows_for, metadata
from teachercache.cache.picture_bytes import replaced_pictures
from teachercache.cache.repair import forget_damaged, mend_files
from teachercache.cache.spec import CacheMeta, differences
from teachercache.cache.store import Problem
from teachercache.core.errors import UserError
from teachercache.core.paths import is_url, write_whole
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest, row_digests, write_manifest

NO_TEXT, EMPTY = "the row has no text that is not empty", "empty text"  # reasons in the quarantine
MAY_DIFFER = ("data", "versions", "block_rows", "manifest", "rows", "texts", "views", "limit")


class Target(NamedTuple):
    """Where a build writes, and which values it can copy.

    Attributes:
        cache: The cache to write.
        manifest: The data in the order of the cache.
        old: The cache that is pruned, if there is one.
        old_rows: The number of each row in `old`, -1 for a row to compute.
        old_done: The finished blocks of `old`.
    """

    cache: store.Cache
    manifest: Manifest
    old: store.Cache | None = None
    old_rows: np.ndarray | None = None
    old_done: np.ndarray = np.empty(0, np.int64)


class Change(NamedTuple):
    """How a manifest differs from the rows of a cache.

    Attributes:
        order: The rows of the manifest in the order of the cache, new ones last.
        lost: The keys that the manifest no longer has.
        changed: The keys whose image, texts or task changed.
        old_rows: For each row of `order` its number in the cache, -1 if it is new or changed.
    """

    order: np.ndarray
    lost: list[str]
    changed: list[str]
    old_rows: np.ndarray


def open_target(
    path: Path,
    meta: CacheMeta,
    manifest: Manifest,
    *,
    prune: bool = False,
    retry: bool = False,
    repair: bool = False,
) -> Target:
    """Open or create the cache at `path` for a build of `meta`.

    Args:
        path: The cache.
        meta: Its metadata once it is built.
        manifest: The data.
        prune: Follow data that lost or changed rows.
        retry: Compute unusable rows again.
        repair: Read every file, to find damaged blocks; otherwise only files that are newer than their record.

    Raises:
        UserError: The existing cache does not fit the build; the message contains what to type instead.
    """
    _recover(path)
    if not store.is_there(path):
        check_space(store.Cache(path, meta))
        cache = store.create(path, meta, manifest)
        if cache.meta == meta:
            return Target(cache, manifest)
    cache = store.open_cache(path)
    _check_same_build(cache, meta)
    mend_files(cache, manifest)
    forget_damaged(cache, every=repair)
    change = compare(cache, manifest, remember=True)
    if len(change.lost) == cache.meta.rows:
        raise UserError(
            f"{cache.path} holds another build, {manifest.data} has none of its rows: pass another --out"
        )
    if (change.lost or change.changed) and not prune:
        raise UserError(
            f"{_describe(cache, manifest, change)}: run the same command with --prune to follow the data, or pass "
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
    if retry:
        retry_blocks(cache)
    if change.lost or change.changed:
        return _start_pruning(cache, dataclasses.replace(wanted, texts=meta.texts), ordered, change)
    check_space(store.Cache(path, wanted))
    return Target(_extend(cache, wanted, ordered), ordered)


def compare(cache: store.Cache, manifest: Manifest, *, remember: bool = False) -> Change:
    """Compare the rows of a cache with a manifest, by key; `remember` writes new times of unchanged pictures."""
    import pyarrow.compute as pc

    stored = store.cached_manifest(cache)
    keys, now = stored.table["key"].combine_chunks(), manifest.table["key"].combine_chunks()
    places = pc.index_in(keys, value_set=now).fill_null(-1).to_numpy().astype(np.int64)
    kept = np.flatnonzero(places >= 0)
    new = np.setdiff1d(np.arange(len(manifest)), places)
    changed = (
        _changed(stored, manifest, kept, places[kept])
        if stored.digest != manifest.digest
        else np.array([], np.int64)
    )
    replaced = kept[replaced_pictures(cache, kept, manifest, places[kept], remember=remember)]
    changed = np.union1d(changed, replaced)
    old_rows = np.concatenate([np.where(np.isin(kept, changed), -1, kept), np.full(len(new), -1)])
    lost = keys.take(np.flatnonzero(places < 0)).to_pylist()
    return Change(np.concatenate([places[kept], new]), lost, keys.take(changed).to_pylist(), old_rows)


def _changed(stored: Manifest, now: Manifest, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the rows whose content changed. Texts appended to those in the cache are not a change."""
    before, after = row_digests(stored.table.take(rows)), row_digests(now.table.take(places))
    changed = []
    for i in np.flatnonzero(before != after).tolist():
        old, new = stored.row(int(rows[i])), now.row(int(places[i]))
        first = dataclasses.replace(new, texts=new.texts[: len(old.texts)])
        same = all(
            getattr(old, name) == getattr(first, name)
            for name in ("image", "offset", "size", "task", "texts")
        )
        if not (same and len(old.texts) == stored.texts):
            changed.append(rows[i])
    return np.array(changed, np.int64)


def _check_same_build(cache: store.Cache, meta: CacheMeta) -> None:
    if bool(cache.meta.views) != bool(meta.views):
        raise UserError(
            f"{cache.path} holds another build (views: {cache.meta.views} stored, {meta.views} requested): pass "
            "another --out"
        )
    changed = differences(cache.meta, meta, ignore=MAY_DIFFER)
    if changed:
        raise UserError(
            f"{cache.path} holds another build ({'; '.join(changed)}): pass another --out, or remove that folder"
        )


def _describe(cache: store.Cache, manifest: Manifest, change: Change) -> str:
    """Describe the removed and changed rows in one sentence."""
    parts = [
        f"{len(keys)} rows {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for keys, what in ((change.lost, "are gone"), (change.changed, "changed"))
        if keys
    ]
    return f"{' and '.join(parts)} in {manifest.data} since {cache.path} was built"


def _extend(cache: store.Cache, meta: CacheMeta, manifest: Manifest) -> store.Cache:
    """Extend the metadata of a cache to the rows, texts and views of `meta`; write nothing if there are no more."""
    with store.growing(cache):
        cache = store.open_cache(cache.path)  # another builder may have been first
        if cache.meta == meta:
            return cache
        gained = {
            name: (getattr(cache.meta, name), getattr(meta, name)) for name in ("rows", "texts", "views")
        }
        changes = [f"{name} {old:,} -> {new:,}" for name, (old, new) in gained.items() if old != new]
        if changes:
            say(f"{cache.path} grows: {', '.join(changes)}")
        write_manifest(manifest, cache.path / "manifest.parquet")
        for name, content in metadata(meta).items():  # the group's own file last: readers follow it
            write_whole(cache.path / name, content)
        return store.Cache(cache.path, meta)


# ----------------------------------------------------------------------------------------------------
# Pruning


def _beside(path: Path, word: str) -> Path:
    return Path(f"{path}.{word}")


def _start_pruning(old: store.Cache, meta: CacheMeta, manifest: Manifest, change: Change) -> Target:
    if is_url(old.path):
        raise UserError(f"--prune works on local caches: build {old.path} again into another --out")
    path = _beside(old.path, "pruning")
    meta = dataclasses.replace(meta, block_rows=block_rows_for(meta.spec.fields, meta.rows))
    if store.is_there(path) and store.open_cache(path).meta != meta:  # of data that has changed since
        shutil.rmtree(path)
    check_space(store.Cache(path, meta))
    cache = store.open_cache(path) if store.is_there(path) else store.create(path, meta, manifest)
    say(f"pruning {old.path}: {len(change.lost):,} rows are gone, {len(change.changed):,} changed")
    return Target(cache, manifest, old, change.old_rows, np.array(sorted(store.done_blocks(old)), np.int64))


def replace_pruned(target: Target) -> store.Cache:
    """Replace the old cache by the complete pruned one. A build that is killed here resumes at any point."""
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
    """Finish the renames of a builder that was killed between them."""
    if is_url(path) or not _beside(path, "old").exists():
        return
    if not path.exists():
        os.rename(
            _beside(path, "pruning"), path
        )  # it is complete, otherwise the old one would still be in its place
    with contextlib.suppress(FileNotFoundError):  # another builder removes it too
        shutil.rmtree(_beside(path, "old"))


# ----------------------------------------------------------------------------------------------------
# Unusable rows


def retry_blocks(cache: store.Cache) -> None:
    """Mark the finished blocks of this process that have unusable rows: they are unfinished until these are retried.

    The mark stays in a block's done record until the block is written, so that a build that is killed, or any other
    build, goes on with the rest.
    """
    for block in range(cache.meta.num_blocks):
        record = store.done_record(cache, block)
        if block % world_size() != rank() or record is None or not store.covers(cache, record):
            continue
        if len(rows_to_retry(record)):
            store.write_record(cache, {**record, "retry": True})


def rows_to_retry(record: store.Record) -> np.ndarray:
    """Return the rows of a done record with an entry that another try may change: all but those about empty texts."""
    entries = [entry for entry in record["invalid"] if entry["reason"] not in (NO_TEXT, EMPTY)]
    return np.array(sorted({entry["row"] for entry in entries}), np.int64)


# ----------------------------------------------------------------------------------------------------
# Plans of blocks


class BlockPlan(NamedTuple):
    """What one block needs.

    Attributes:
        block: The number of the block.
        rows: The rows to compute.
        views: The views to compute.
        texts: The texts to compute.
        kept: The rows whose values are copied from `source`.
        source: The cache to copy from.
        source_rows: The numbers of the kept rows in `source`.
        problems: Earlier entries of the quarantine about rows that are not computed again.
    """

    block: int
    rows: np.ndarray
    views: range
    texts: range
    kept: np.ndarray
    source: store.Cache | None
    source_rows: np.ndarray
    problems: list[Problem]


def plan_blocks(target: Target) -> dict[int, BlockPlan]:
    """Return the plan of every block that is not finished."""
    done = store.done_blocks(target.cache)
    return {
        block: plan_block(target, block) for block in range(target.cache.meta.num_blocks) if block not in done
    }


def plan_block(target: Target, block: int) -> BlockPlan:
    """Return what a block still needs, given its done record or the cache that is pruned."""
    cache, meta = target.cache, target.cache.meta
    rows = np.arange(meta.block(block).start, meta.block(block).stop)
    none, texts = rows[:0], range(meta.texts)
    reads_images = target.manifest.has_images and "image" in meta.spec.inputs
    views = range(meta.views or 1) if reads_images else range(0)
    record, old = store.done_record(cache, block), target.old
    if record is not None and record.get("retry"):
        if (record["views"], record["texts"]) != (meta.views, meta.texts):
            return BlockPlan(block, rows, views, texts, none, None, none, [])
        again = np.isin(rows, rows_to_retry(record)) | (rows >= record["rows"][1])
        kept = rows[~again]
        problems = _renumber(record["invalid"], kept, kept)
        return BlockPlan(block, rows[again], views, texts, kept, cache, kept, problems)
    if record is not None and record["rows"][1] == rows[-1] + 1:  # texts or views were added
        texts = range(record["texts"], meta.texts)
        if not meta.spec.reads_pairs:  # otherwise new texts need the images again
            views = range(record["views"], meta.views)
        return BlockPlan(
            block, rows, views, texts, none, None, none, _renumber(record["invalid"], rows, rows)
        )
    if record is not None and (record["views"], record["texts"]) == (
        meta.views,
        meta.texts,
    ):  # rows were added
        kept, new = rows[rows < record["rows"][1]], rows[rows >= record["rows"][1]]
        problems = _renumber(record["invalid"], kept, kept)
        return BlockPlan(block, new, views, texts, kept, cache, kept, problems)
    if old is None or target.old_rows is None or (old.meta.views, old.meta.texts) != (meta.views, meta.texts):
        return BlockPlan(block, rows, views, texts, none, None, none, [])
    places = target.old_rows[rows]
    have = (places >= 0) & np.isin(np.maximum(places, 0) // old.meta.block_rows, target.old_done)
    kept, source = rows[have], places[have]
    records = [store.done_record(old, b) for b in np.unique(source // old.meta.block_rows).tolist()]
    problems = [problem for record in records if record for problem in record["invalid"]]
    return BlockPlan(block, rows[~have], views, texts, kept, old, source, _renumber(problems, source, kept))


def _renumber(problems: list[Problem], rows: np.ndarray, new_rows: np.ndarray) -> list[Problem]:
    """Renumber the entries of the rows that were kept, and drop the others."""
    number = dict(zip(rows.tolist(), new_rows.tolist(), strict=True))
    return [{**problem, "row": number[problem["row"]]} for problem in problems if problem["row"] in number]
