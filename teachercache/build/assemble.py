"""Pieces of a block into its chunks, with the rows that are taken over; which rows and texts can be used, and why not.

Writes nothing: see `store.write_block`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from teachercache.build.forward import NOT_FINITE
from teachercache.build.target import Job, Target
from teachercache.cache import store
from teachercache.data.manifest import Manifest

NO_TEXT, EMPTY = "the row has no text that is not empty", "empty text"


def collect(
    target: Target, job: Job, parts: Iterable[dict[str, Any]], tick: Callable[[int], None]
) -> tuple[dict[tuple[str, int], np.ndarray], list[dict[str, Any]]]:
    """All chunks of a block that are new, and all its unusable rows and texts."""
    cache, meta = target.cache, target.cache.meta
    rows = meta.block(job.block)
    copies = {"image": job.views, "text": job.texts, "pair": job.texts, "row": range(0)}
    chunks = {
        (name, copy): np.zeros((len(rows), *field.shape), field.dtype)
        for name, field in cache.fields.items()
        for copy in copies[field.per]
    }
    if job.source is not None:
        for (name, copy), values in chunks.items():
            values[job.kept - rows.start] = store.read_rows(job.source, name, copy, job.source_rows)
    problems = [entry for entry in job.problems if _is_fact(entry, target.manifest.has_images)]
    for part in parts:
        piece = part["piece"]
        places = np.array(piece.rows, int) - rows.start
        for at, values in part["chunks"].items():
            chunks[at][places] = values
        problems += part["problems"]
        tick(len(piece.rows) if piece.views[-1:] == job.views[-1:] else 0)
    keys = target.manifest.table["key"].slice(rows.start, len(rows)).to_pylist()
    chunks["key", 0] = np.array(keys, np.dtypes.StringDType())
    before = [k for k in range(meta.texts) if k not in job.texts]
    here = np.arange(rows.start, rows.stop)
    masks = {k: store.read_rows(cache, "text_valid", k, here) for k in before}
    masks |= {k: chunks["text_valid", k] for k in job.texts}
    text_valid = (
        np.stack([masks[k] for k in range(meta.texts)], 1) if masks else np.ones((len(rows), 1), bool)
    )
    chunks["valid", 0], invalid = _judge(target.manifest, rows, problems, text_valid)
    return chunks, invalid


def _is_fact(entry: dict[str, Any], has_images: bool) -> bool:
    """Whether an entry is about a picture or a NaN: those about empty texts follow from the manifest."""
    if entry["reason"].endswith(NOT_FINITE):
        return True
    return has_images and "text" not in entry and entry["reason"] != NO_TEXT


def _judge(
    manifest: Manifest, rows: range, problems: list[dict[str, Any]], text_valid: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Which rows of a block can be used, and every entry of its quarantine in order."""
    valid: np.ndarray = np.any(text_valid, axis=1)
    for entry in problems:
        if "text" not in entry:
            valid[entry["row"] - rows.start] = False
    entries = {tuple(sorted(entry.items())): entry for entry in problems}
    spoiled = {entry["row"] for entry in problems if "text" in entry}
    for i in np.flatnonzero(~text_valid.all(1)).tolist():
        sample = manifest.row(rows.start + i)
        about = {"row": rows.start + i, "key": sample.key}
        if not text_valid[i].any() and about["row"] not in spoiled:
            broken = sample.problem if not manifest.has_images else ""
            found = [{**about, "reason": broken or NO_TEXT}]
        else:
            found = [
                {**about, "text": k, "reason": EMPTY}
                for k, text in enumerate(sample.texts)
                if not text.strip()
            ]
        entries |= {tuple(sorted(entry.items())): entry for entry in found}
    return valid, sorted(entries.values(), key=_order)


def _order(entry: dict[str, Any]) -> tuple[int, int, int, str]:
    return entry["row"], entry.get("text", -1), entry.get("view", -1), entry["reason"]
