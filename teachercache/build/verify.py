"""Check the files of a cache, and some of its values against a new computation by its teacher."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teachercache.build.compare import BAR, field_cosines
from teachercache.build.decode import VIEWS_AT_ONCE, WorkItem
from teachercache.build.forward import encode_batch, rows_for
from teachercache.build.target import compare
from teachercache.cache import store
from teachercache.cache.repair import damaged_blocks, damaged_files
from teachercache.core.errors import UserError
from teachercache.core.progress import status
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest
from teachercache.data.views import Augment
from teachercache.search.verify import damaged_indexes
from teachercache.teachers.of_cache import load_teacher
from teachercache.teachers.teacher import Teacher


def verify_cache(path: str | Path, *, samples: int, teacher: str | None = None) -> dict[str, Any]:
    """Verify a cache and the indexes beside it. Nothing is written.

    Args:
        path: The cache.
        samples: The number of rows to compute again; 0 checks the files only.
        teacher: The teacher that the user names, see `load_teacher`.

    Returns:
        `damaged` blocks and other damaged `files` with the reason, `indexes` that cannot be used with the reason and
        the command that makes them again, the minimum and mean `cosine` of each field, the `command` that repairs the
        cache, and whether all is `ok`.
    """
    cache = store.open_cache(path)
    damaged = damaged_blocks(cache)
    files = damaged_files(cache)
    whole = not damaged and not files and len(store.done_blocks(cache)) == cache.meta.num_blocks
    with status("checking indexes"):
        indexes = damaged_indexes(cache, compare=whole)
    report: dict[str, Any] = {
        "damaged": damaged,
        "files": files,
        "cosine": {},
        "command": f"{cache.command()}{' --repair' if damaged else ''}",
        "indexes": indexes,
        "ok": not damaged and not files and not indexes,
    }
    if not report["ok"]:
        return report
    store.open_complete(path)
    if not samples:
        return report
    loaded = load_teacher(cache, teacher)
    with status(f"computing {samples} rows again"):
        cosines = _live_cosines(cache, loaded, samples)
    report["cosine"] = {name: {"min": float(c.min()), "mean": float(c.mean())} for name, c in cosines.items()}
    report["ok"] = all(values["min"] >= BAR for values in report["cosine"].values())
    return report


def cached_data(cache: store.Cache) -> Manifest:
    """Read the present data of a cache in its order; raise UserError if rows were removed or changed."""
    manifest = read_manifest(cache.meta.data, limit=cache.meta.limit or None)
    change = compare(cache, manifest)
    if change.lost or change.changed:
        raise UserError(
            f"{manifest.data} has changed since {cache.path} was built ({len(change.lost)} rows are gone, "
            f"{len(change.changed)} changed): follow it with `{cache.command()} --prune`"
        )
    return dataclasses.replace(manifest, table=manifest.table.take(change.order[: cache.meta.rows]))


def _live_cosines(cache: store.Cache, teacher: Teacher, samples: int) -> dict[str, np.ndarray]:
    """Return the cosines of stored to recomputed values: evenly spread usable rows, all texts, the first views."""
    meta, manifest = cache.meta, cached_data(cache)
    usable = np.flatnonzero(store.read_field(cache, "valid"))
    if not len(usable):
        raise UserError(f"no usable row in {cache.path}: see {cache.path / 'quarantine.jsonl'}")
    rows = usable[np.linspace(0, len(usable) - 1, min(samples, len(usable))).round().astype(int)]
    item = WorkItem(tuple(rows.tolist()), range(min(meta.views, VIEWS_AT_ONCE) or 1), range(meta.texts))
    batch = rows_for(teacher, manifest, Augment(**meta.augment) if meta.views else None).__getitems__(item)
    outputs = encode_batch(teacher, teacher.module, cache, batch, "cpu", torch.float32)
    live = {(name, copy): tensor.float().numpy() for name, copy, tensor in outputs}
    stored = {key: store.read_rows(cache, *key, rows).astype(np.float32) for key in live}
    return field_cosines(cache.fields, live, stored, batch)
