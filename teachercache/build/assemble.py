"""Assemble the chunks of a block from its work items and from rows that are copied; decide which rows are usable."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from teachercache.build.forward import OF_TEACHER, Computed
from teachercache.build.target import EMPTY, NO_TEXT, BlockPlan, Target
from teachercache.cache import picture_bytes, store
from teachercache.cache.store import Problem
from teachercache.data.manifest import Manifest


class Block(NamedTuple):
    """What is written for a block.

    Attributes:
        chunks: The new chunks.
        invalid: All entries of its quarantine.
        digests: The digests of its rows' pictures, see `picture_bytes`.
        times: The times of their files.
    """

    chunks: dict[tuple[str, int], np.ndarray]
    invalid: list[Problem]
    digests: np.ndarray
    times: np.ndarray


def assemble_block(
    target: Target, plan: BlockPlan, computed: Iterable[Computed], tick: Callable[[int], None]
) -> Block:
    """Put together what is written for a block.

    Args:
        target: The cache and its data.
        plan: What the block needs.
        computed: The work items of the block.
        tick: Called with the number of rows of each work item that completes them.
    """
    cache, meta = target.cache, target.cache.meta
    rows = meta.block(plan.block)
    copies = {"image": plan.views, "text": plan.texts, "pair": plan.texts, "row": range(0)}
    chunks = {
        (name, copy): np.zeros((len(rows), *field.shape), field.dtype)
        for name, field in cache.fields.items()
        for copy in copies[field.per]
    }
    if plan.source is not None:
        for (name, copy), values in chunks.items():
            values[plan.kept - rows.start] = store.read_rows(plan.source, name, copy, plan.source_rows)
    digests, times = picture_bytes.stored(cache, np.arange(rows.start, rows.stop))
    if plan.source is not None:
        kept = plan.kept - rows.start
        digests[kept], times[kept] = picture_bytes.stored(plan.source, plan.source_rows)
    problems = [problem for problem in plan.problems if _stays(problem, target.manifest.has_images)]
    for piece in computed:
        places = np.array(piece.item.rows, int) - rows.start
        for name_and_copy, values in piece.chunks.items():
            chunks[name_and_copy][places] = values
        problems += piece.problems
        if piece.pictures is not None:
            digests[places], times[places] = piece.pictures
        tick(len(piece.item.rows) if piece.item.views[-1:] == plan.views[-1:] else 0)
    keys = target.manifest.table["key"].slice(rows.start, len(rows)).to_pylist()
    chunks["key", 0] = np.array(keys, np.dtypes.StringDType())
    old_texts = [k for k in range(meta.texts) if k not in plan.texts]
    all_rows = np.arange(rows.start, rows.stop)
    masks = {k: store.read_rows(cache, "text_valid", k, all_rows) for k in old_texts}
    masks |= {k: chunks["text_valid", k] for k in plan.texts}
    text_valid = (
        np.stack([masks[k] for k in range(meta.texts)], 1) if masks else np.ones((len(rows), 1), bool)
    )
    chunks["valid", 0], invalid = _usable_rows(target.manifest, rows, problems, text_valid)
    return Block(chunks, invalid, digests, times)


def _stays(problem: Problem, has_images: bool) -> bool:
    """Whether an earlier entry is kept: an unreadable image or a value that the teacher computed. Entries about empty
    texts are made again.
    """
    if any(f" {reason}" in problem["reason"] for reason in OF_TEACHER):
        return True
    return has_images and "text" not in problem and problem["reason"] != NO_TEXT


def _usable_rows(
    manifest: Manifest, rows: range, problems: list[Problem], text_valid: np.ndarray
) -> tuple[np.ndarray, list[Problem]]:
    """Return which rows of a block are usable, and all entries of its quarantine in order."""
    valid: np.ndarray = np.any(text_valid, axis=1)
    for problem in problems:
        if "text" not in problem:
            valid[problem["row"] - rows.start] = False
    entries = {tuple(sorted(problem.items())): problem for problem in problems}
    with_bad_texts = {problem["row"] for problem in problems if "text" in problem}
    for i in np.flatnonzero(~text_valid.all(1)).tolist():
        sample = manifest.row(rows.start + i)
        about = {"row": rows.start + i, "key": sample.key}
        if not text_valid[i].any() and about["row"] not in with_bad_texts:
            broken = sample.problem if not manifest.has_images else ""
            added = [{**about, "reason": broken or NO_TEXT}]
        else:
            empty = [k for k, text in enumerate(sample.texts) if not text.strip()]
            added = [{**about, "text": k, "reason": EMPTY} for k in empty]
        entries |= {tuple(sorted(problem.items())): problem for problem in added}
    return valid, sorted(entries.values(), key=_order)


def _order(problem: Problem) -> tuple[int, int, int, str]:
    return problem["row"], problem.get("text", -1), problem.get("view", -1), problem["reason"]
