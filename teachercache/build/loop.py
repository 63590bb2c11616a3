"""THE phase-1 loop: decode | teacher | write, overlapped, resumable, shared by any number of processes.

Decoding runs in worker processes, the teacher here, writing in a thread. Batches never cross a block, so a resumed
build computes exactly what an undisturbed one does. Not for deciding what a teacher says: see `teachers/`.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from teachercache.build.assemble import collect
from teachercache.build.decode import VIEWS_AT_ONCE, Piece, deaths_told, decoded
from teachercache.build.forward import forward, rows_for
from teachercache.build.target import Job, Target, job_for, jobs_for, replace_pruned, settle
from teachercache.build.timings import Stages
from teachercache.cache import store
from teachercache.cache.layout import block_rows_for
from teachercache.cache.lease import lease
from teachercache.cache.spec import CacheMeta
from teachercache.core.device import Precision
from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.process import keep_memory, rank, terminable, world_size
from teachercache.core.progress import say, ticker
from teachercache.core.urls import asking
from teachercache.data.manifest import Manifest
from teachercache.data.views import Augment
from teachercache.search.index import extend_indexes
from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a build did."""

    cache: store.Cache
    rows_written: int  # rows that the teacher ran over
    blocks_left: int  # in the hands of other builders
    quarantined: int


def build(
    teacher: Teacher,
    manifest: Manifest,
    out: Path,
    *,
    batch_size: int,
    workers: int,
    device: str,
    precision: Precision,
    block_rows: int | None = None,
    views: int = 0,
    augment: Augment | None = None,
    prune: bool = False,
    limit: int = 0,
) -> Summary:
    """Run the teacher over everything that is not there yet and that no other process writes."""
    with asking(out, what="write"), terminable(), lease(out):
        meta = plan(teacher, manifest, precision, block_rows, views=views, augment=augment, limit=limit)
        target = settle(out, meta, manifest, prune=prune)
        keep_memory()
        rows = _compute(
            target, teacher, batch_size=batch_size, workers=workers, device=device, dtype=precision.dtype
        )
        return _finish(target, rows)


def _compute(
    target: Target, teacher: Teacher, *, batch_size: int, workers: int, device: str, dtype: str
) -> int:
    """Write every block that this process gets hold of; the rows that the teacher ran over."""
    cache, meta = target.cache, target.cache.meta
    computed = getattr(torch, dtype)
    module = teacher.module.to(device, computed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    jobs = jobs_for(target)
    mine = [block for block in jobs if block % world_size() == rank()]
    todo = mine + [block for block in jobs if block not in mine and not is_url(cache.path)]
    stages, rows = Stages(cache, workers), 0
    decoder = rows_for(teacher, target.manifest, Augment(**meta.augment) if meta.views else None)
    with (
        deaths_told(RuntimeError),
        claims(cache) as claim,
        ThreadPoolExecutor(1, "write") as writer,
        contextlib.closing(
            decoded(
                decoder, _pieces(target, jobs, todo, claim, batch_size), workers=workers, pin=device != "cpu"
            )
        ) as batches,
    ):
        pending: Future | None = None
        total = sum(len(jobs[block].rows) for block in mine)
        with ticker(total, "rows", f"{meta.spec.name} on {meta.data}") as tick:
            parts = forward(teacher, module, cache, stages, batches, device, computed)
            for block, group in itertools.groupby(parts, key=lambda part: part["piece"].block):
                job = jobs.pop(block)
                chunks, invalid = collect(target, job, group, lambda count: tick.step(count, stages.line()))
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write, cache, block, chunks, invalid, stages)
                rows += len(job.rows)
        if pending is not None:
            pending.result()
    return rows


def _finish(target: Target, rows: int) -> Summary:
    """What is due once all blocks are there: quarantine.jsonl, the pruned cache in its place, indexes."""
    cache = target.cache
    if target.old is None:  # another builder may have made it grow meanwhile
        cache = store.open_cache(cache.path)
    blocks_left = cache.meta.num_blocks - len(store.done_blocks(cache))
    if blocks_left:
        return Summary(cache, rows, blocks_left, 0)
    quarantined = len(store.finish(cache))
    if target.old is not None:
        cache = replace_pruned(target)
    with store.growing(cache):  # of several ranks, which finish in any order, one
        extend_indexes(cache)
    return Summary(cache, rows, 0, quarantined)


def plan(
    teacher: Teacher,
    manifest: Manifest,
    precision: Precision,
    block_rows: int | None = None,
    *,
    views: int = 0,
    augment: Augment | None = None,
    limit: int = 0,
) -> CacheMeta:
    """The CacheMeta of this teacher over this data."""
    has = {"image": manifest.has_images, "text": manifest.texts > 0, "row": True}
    has["pair"] = has["image"] and has["text"]
    fields = tuple(field for field in teacher.spec.fields if has[field.per])
    if not fields:
        per = sorted({field.per for field in teacher.spec.fields})
        needed = " or ".join("images with texts" if kind == "pair" else f"{kind}s" for kind in per)
        raise UserError(
            f"--outputs {','.join(teacher.spec.outputs)} of {teacher.spec.name} needs {needed}, and "
            f"{manifest.data} has none: pass other --outputs (`tc teachers`) or other --data"
        )
    if views and not has["image"]:
        raise UserError(f"--views {views}: {manifest.data} has no pictures; leave --views away")
    if views and teacher.tokens is not None:
        raise UserError(
            f"--views {views}: words are weighed beside the plain picture; leave --views or tokens away"
        )
    if views and teacher.pair is not None:
        raise UserError(
            f"--views {views}: scores and UNet features are of the plain picture; leave --views or those --outputs away"
        )
    if views and "boxes" in teacher.spec.view:
        raise UserError(
            f"--views {views}: {teacher.spec.name} looks at regions of the plain picture; leave --views away"
        )
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "zarr", "pillow")
    }
    return CacheMeta(
        spec=dataclasses.replace(teacher.spec, fields=fields),
        data=manifest.data,
        manifest=manifest.digest,
        rows=len(manifest),
        texts=manifest.texts,
        block_rows=block_rows or block_rows_for(fields, len(manifest)),
        precision=precision.dtype,
        versions=versions,
        views=views,
        augment=dataclasses.asdict(augment or Augment()) if views else {},
        limit=limit,
    )


# ----------------------------------------------------------------------------------------------------
# Which blocks are ours


@contextlib.contextmanager
def claims(cache: store.Cache) -> Iterator[Callable[[int], bool]]:
    """A function that takes a block for this process, or says no: the kernel frees it when we die."""

    def unfinished(block: int) -> bool:
        return not store.covers(cache, store.done_record(cache, block))

    if is_url(
        cache.path
    ):  # no locks there, one job at a time (`lease.py`): its ranks take their own blocks alone
        yield unfinished
        return
    descriptor = store.open_lock(cache)

    def claim(block: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
        except OSError:
            return False
        return unfinished(block)

    try:
        yield claim
    finally:
        os.close(descriptor)


def _pieces(
    target: Target, jobs: dict[int, Job], todo: list[int], claim: Callable[[int], bool], batch_size: int
) -> Iterator[Piece]:
    """One batch at a time, block by block, claiming each block when its turn comes; an empty one where none is left."""
    for block in todo:
        if not claim(block):
            continue
        job = jobs[block] = job_for(target, block)  # anew: another builder may have died over it meanwhile
        rows = job.rows.tolist()
        for start in range(0, max(len(rows), 1), batch_size):
            part, views = tuple(rows[start : start + batch_size]), job.views
            yield Piece(part, views[:VIEWS_AT_ONCE], job.texts, block)
            for first in range(VIEWS_AT_ONCE, len(views), VIEWS_AT_ONCE):
                yield Piece(part, views[first : first + VIEWS_AT_ONCE], range(0), block)


def _write(
    cache: store.Cache, block: int, chunks: store.Chunks, invalid: list[dict[str, Any]], stages: Stages
) -> None:
    begin, rows = time.perf_counter(), len(cache.meta.block(block))
    store.write_block(cache, block, chunks, invalid)
    stages.add("write", time.perf_counter() - begin, rows)
    stages.log(block, rows)


def announce(summary: Summary) -> None:
    """Say what the build did and what comes next."""
    cache = summary.cache
    if summary.blocks_left:
        say(
            f"{summary.blocks_left} blocks are in the hands of another builder; run the same command to check on them"
        )
        return
    if summary.quarantined:
        say(
            f"{summary.quarantined} entries in {cache.path / 'quarantine.jsonl'} (rows or texts that cannot be used)"
        )
    say(f"{cache.path} is complete: {cache.meta.rows:,} rows ({summary.rows_written:,} written now)")
