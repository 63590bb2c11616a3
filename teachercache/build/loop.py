"""The loop of phase 1: decode | encode | write, overlapped, resumable, shared by any number of processes.

Worker processes decode, this process runs the teacher, and a thread writes. A batch never crosses a block, so that a
resumed build computes exactly what an uninterrupted one does.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from teachercache.build.assemble import Block, assemble_block
from teachercache.build.claims import claims, wait_for_others
from teachercache.build.decode import VIEWS_AT_ONCE, WorkItem, decoded
from teachercache.build.forward import forward, rows_for
from teachercache.build.probe import dtypes_of, probe_teacher, stored_meta, with_dtypes
from teachercache.build.target import BlockPlan, Target, open_target, plan_block, plan_blocks, replace_pruned
from teachercache.build.timings import Stages
from teachercache.cache import picture_bytes, store
from teachercache.cache.layout import block_rows_for
from teachercache.cache.lease import lease
from teachercache.cache.locks import has_locks
from teachercache.cache.spec import CacheMeta
from teachercache.core.device import Precision
from teachercache.core.errors import UserError
from teachercache.core.leftovers import sweep, sweep_beside
from teachercache.core.process import keep_memory, rank, terminable, world_size
from teachercache.core.progress import ticker
from teachercache.core.urls import explain_errors
from teachercache.data.manifest import Manifest
from teachercache.data.views import Augment, check_description
from teachercache.data.workers import report_deaths
from teachercache.search.index import extend_indexes
from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of a build; those of `tc build` have the same names.

    Attributes:
        batch_size: Rows per forward pass.
        workers: Decoding processes.
        device: The torch device.
        precision: The dtype of the forward pass.
        block_rows: Rows per block; None chooses a size for the data.
        views: Augmented views to store per image; 0 for unaugmented images.
        augment: How views are drawn; None for the defaults.
        prune: Follow data that lost or changed rows.
        retry: Compute unusable rows again.
        limit: The `--limit` that the manifest was read with, 0 for all rows.
        repair: Read every file of the cache first, and write damaged blocks again.
        wait: Wait for blocks that other builders write, and take them over if those builders die.
    """

    batch_size: int
    workers: int
    device: str
    precision: Precision
    block_rows: int | None = None
    views: int = 0
    augment: Augment | None = None
    prune: bool = False
    retry: bool = False
    limit: int = 0
    repair: bool = False
    wait: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a build.

    Attributes:
        cache: The cache.
        rows_written: The number of rows that the teacher encoded.
        blocks_left: The number of blocks that other builders still write.
        quarantined: The number of entries in quarantine.jsonl.
    """

    cache: store.Cache
    rows_written: int
    blocks_left: int
    quarantined: int


def build(teacher: Teacher, manifest: Manifest, out: Path, options: BuildOptions) -> Summary:
    """Run the teacher over every row that the cache at `out` lacks and that no other process writes."""
    with explain_errors(out, action="write"), terminable(), lease(out):
        teacher, options = _fitted(teacher, manifest, out, options)
        how = {name: getattr(options, name) for name in ("prune", "retry", "repair")}
        target = open_target(out, plan(teacher, manifest, options), manifest, **how)
        sweep(target.cache.path)
        sweep_beside(out)
        keep_memory()
        rows = _compute(target, teacher, options)
        while options.wait and wait_for_others(target):  # one died: take over its blocks
            rows += _compute(target, teacher, options)
        return _finish(target, rows)


def _fitted(
    teacher: Teacher, manifest: Manifest, out: Path, options: BuildOptions
) -> tuple[Teacher, BuildOptions]:
    """Return the teacher and the options with dtypes that fit the data: those of the cache, or of a probe."""
    meta = stored_meta(out)
    if meta is None:
        wanted = plan(teacher, manifest, options)
        teacher, precision = probe_teacher(teacher, manifest, wanted, options.device, options.precision)
    else:
        teacher, precision = with_dtypes(teacher, dtypes_of(meta, teacher)), options.precision
        if precision.proposed:
            precision = Precision(meta.precision, "that of the cache")
    return teacher, dataclasses.replace(options, precision=precision)


def _compute(target: Target, teacher: Teacher, options: BuildOptions) -> int:
    """Write every block that this process can claim; return the number of rows that the teacher encoded."""
    cache, meta = target.cache, target.cache.meta
    dtype = getattr(torch, options.precision.dtype)
    module = teacher.module.to(options.device, dtype)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plans = plan_blocks(target)
    mine = [block for block in plans if block % world_size() == rank()]
    shared = has_locks(cache.path)
    todo = mine + [block for block in plans if block not in mine and shared]
    stages, rows = Stages(cache, options.workers), 0
    decoder = rows_for(teacher, target.manifest, Augment(**meta.augment) if meta.views else None)
    with (
        report_deaths(RuntimeError),
        claims(cache, shared=shared) as claim,
        ThreadPoolExecutor(1, "write") as writer,
        contextlib.closing(
            decoded(
                decoder,
                _work_items(target, plans, todo, claim, options.batch_size),
                workers=options.workers,
                pin=options.device != "cpu",
            )
        ) as batches,
    ):
        pending: Future | None = None
        total = sum(len(plans[block].rows) for block in mine)
        with ticker(total, "rows", f"{meta.spec.name} on {meta.data}") as tick:
            computed = forward(teacher, module, cache, stages, batches, options.device, dtype)
            for block, group in itertools.groupby(computed, key=lambda piece: piece.item.block):
                block_plan = plans.pop(block)
                assembled = assemble_block(
                    target, block_plan, group, lambda count: tick.step(count, stages.line())
                )
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write, cache, block, assembled, stages)
                rows += len(block_plan.rows)
        if pending is not None:
            pending.result()
    return rows


def _finish(target: Target, rows: int) -> Summary:
    """Once all blocks are written: write quarantine.jsonl, put a pruned cache in its place, extend indexes."""
    cache = target.cache
    if target.old is None:  # another builder may have extended it meanwhile
        cache = store.open_cache(cache.path)
    elif not cache.path.exists():  # another builder has put it into its place
        cache = store.open_cache(target.old.path)
    blocks_left = cache.meta.num_blocks - len(store.done_blocks(cache))
    if blocks_left:
        return Summary(cache, rows, blocks_left, 0)
    quarantined = len(store.finish(cache))
    sweep(cache.path)  # another builder may have died meanwhile
    if target.old is not None:
        cache = replace_pruned(target)
    with store.growing(cache):  # one rank at a time: ranks finish in any order
        extend_indexes(cache)
    return Summary(cache, rows, 0, quarantined)


def plan(teacher: Teacher, manifest: Manifest, options: BuildOptions) -> CacheMeta:
    """Return the metadata of the cache of a teacher over some data.

    Raises:
        UserError: The data lacks what the teacher reads, or the options do not fit the teacher.
    """
    spec = teacher.spec
    has = {
        "image": manifest.has_images and "image" in spec.inputs,
        "text": manifest.texts > 0 and "text" in spec.inputs,
    }
    has["pair"] = has["image"] and has["text"]
    fields = tuple(field for field in spec.fields if has[field.per])
    if not fields:
        per = sorted({field.per for field in spec.fields})
        needed = " or ".join("images with texts" if kind == "pair" else f"{kind}s" for kind in per)
        raise UserError(
            f"--outputs {','.join(spec.outputs)} of {spec.name} needs {needed}, and {manifest.data} has none: "
            "pass other --outputs (`tc teachers`) or other --data"
        )
    if options.views:
        _check_views(teacher, manifest, options.views)
    packages = ("torch", "open_clip_torch", "zarr", "pillow")
    return CacheMeta(
        spec=dataclasses.replace(spec, fields=fields),
        data=manifest.data,
        manifest=manifest.digest,
        rows=len(manifest),
        texts=manifest.texts,
        block_rows=options.block_rows or block_rows_for(fields, len(manifest)),
        precision=options.precision.dtype,
        versions={name: importlib.metadata.version(name) for name in packages},
        views=options.views,
        augment=dataclasses.asdict(options.augment or Augment()) if options.views else {},
        limit=options.limit,
    )


def _check_views(teacher: Teacher, manifest: Manifest, views: int) -> None:
    """Raise UserError if augmented views cannot be stored."""
    if not manifest.has_images:
        raise UserError(f"--views {views}: {manifest.data} has no pictures; leave --views away")
    problems = {
        "words": "words are scored with the unaugmented image; leave --views or tokens away",
        "pairs": "fields per pair use the unaugmented image; leave --views or those --outputs away",
        "boxes": f"{teacher.spec.name} reads regions of the unaugmented image; leave --views away",
    }
    for name, problem in problems.items():
        if name in teacher.spec.inputs:
            raise UserError(f"--views {views}: {problem}")
    if "image" in teacher.spec.inputs:
        check_description(teacher.spec.view, f"--views {views}")
    else:
        raise UserError(f"--views {views}: {teacher.spec.name} reads no images; leave --views away")


# ----------------------------------------------------------------------------------------------------
# Blocks of this process


def _work_items(
    target: Target,
    plans: dict[int, BlockPlan],
    todo: list[int],
    claim: Callable[[int], bool],
    batch_size: int,
) -> Iterator[WorkItem]:
    """Yield the batches of each block that can be claimed; an empty one for a block without rows to compute."""
    for block in todo:
        if not claim(block):
            continue
        block_plan = plans[block] = plan_block(target, block)  # another builder may have died in it meanwhile
        rows = block_plan.rows.tolist()
        for start in range(0, max(len(rows), 1), batch_size):
            batch, views = tuple(rows[start : start + batch_size]), block_plan.views
            yield WorkItem(batch, views[:VIEWS_AT_ONCE], block_plan.texts, block)
            for first in range(VIEWS_AT_ONCE, len(views), VIEWS_AT_ONCE):
                yield WorkItem(batch, views[first : first + VIEWS_AT_ONCE], range(0), block)


def _write(cache: store.Cache, block: int, assembled: Block, stages: Stages) -> None:
    begin, rows = time.perf_counter(), len(cache.meta.block(block))
    beside = picture_bytes.digests_file(block, assembled.digests)
    store.write_block(cache, block, assembled.chunks, assembled.invalid, beside)
    picture_bytes.write_times(cache, block, assembled.times)
    stages.add("write", time.perf_counter() - begin, rows)
    stages.log(block, rows)
