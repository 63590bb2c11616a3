"""Benchmark reading a cache against np.memmap, and `tc build` against the bare teacher.

scripts/benchmarks/peer.py compares with another tool.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.memory import DIM, empty_cache, put_block, vectors
from scripts.benchmarks.report import HEAD, Figures, Line, alternate, compare, cores, middle, number
from teachercache.build.decode import Batch, WorkItem, decoded
from teachercache.build.forward import rows_for
from teachercache.build.loop import BuildOptions, build, plan
from teachercache.cache import store
from teachercache.core.device import Precision, pick_device
from teachercache.core.errors import UserError
from teachercache.core.process import default_workers, keep_memory
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Inputs, Teacher

SCATTERED = 1024
BAR = 0.95  # relative to the bare forward pass, if the teacher is the bottleneck


def bench_cache(options: argparse.Namespace) -> list[str]:
    """Run the parts in `options.only` and return their table."""
    lines: list[Line] = []
    notes: list[str] = []
    if "reading" in options.only:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            lines += reading(*synthetic(Path(folder), options.rows), options)
    if "building" in options.only:
        for case in CASES:
            line, note = building(case, options)
            lines.append(line)
            notes.append(note)
    if "peer" in options.only:
        from scripts.benchmarks.peer import against_clip_retrieval

        more, note = against_clip_retrieval(options)
        lines += more
        notes.append(note)
    if "memory" in options.only:
        from scripts.benchmarks.memory import memory

        more, note = memory(options)
        lines += more
        notes.append(note)
    return [*HEAD, *map(str, lines), "", *(f"- {note}" for note in notes if note)]


# ----------------------------------------------------------------------------------------------------
# Reading


def synthetic(folder: Path, rows: int) -> tuple[store.Cache, Path]:
    """Write random float16 vectors to a cache and to a .npy file, and return both."""
    cache = empty_cache(folder / "bench.zarr", rows)
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", "float16", (rows, DIM))
    for block in range(cache.meta.num_blocks):
        block_rows = cache.meta.block(block)
        flat[block_rows.start : block_rows.stop] = values = vectors(len(block_rows), seed=block)
        put_block(cache, block, {("text_emb", 0): values})
    flat.flush()
    return cache, folder / "flat.npy"


def reading(cache: store.Cache, flat: Path, options: argparse.Namespace) -> list[Line]:
    """Measure reading scattered rows and whole blocks against np.memmap."""
    ours, memmap = store.read_field(cache, "text_emb")[:, 0], np.load(flat, mmap_mode="r")
    random = np.random.default_rng(1)
    batches = [random.integers(0, options.rows, SCATTERED) for _ in range(100)]
    size = cache.meta.block_rows

    def scattered(values: np.ndarray) -> float:
        begin = time.perf_counter()
        for rows in batches:
            values[rows]
        return len(batches) * SCATTERED / (time.perf_counter() - begin)

    def blocks(values: np.ndarray) -> float:
        begin = time.perf_counter()
        for start in range(0, options.rows, size):
            np.array(values[start : start + size])
        return options.rows / (time.perf_counter() - begin)

    lines = []
    for title, action in ((f"{SCATTERED} scattered rows", scattered), ("whole blocks", blocks)):
        actions = {"ours": partial(action, ours), "memmap": partial(action, memmap)}
        figures = alternate(options.rounds, actions)
        title = f"reading {title} of {options.rows:,} x {DIM} float16"
        lines.append(
            compare(title, figures, "ours", "memmap", unit="rows/s", other="np.memmap", bar=">= 0.9")
        )
    return lines


# ----------------------------------------------------------------------------------------------------
# Building


@dataclasses.dataclass(frozen=True)
class Case:
    """A build: a teacher, its precision and batch size, and the fraction of `--pictures`."""

    teacher: str
    weights: str
    dtype: str
    fraction: float
    batch: int
    spare: bool  # reserve cores for the decoders, as on a machine with an accelerator


CASES = (
    Case("clip-vit-b16", "random:0", "bfloat16", 0.5, 32, spare=False),
    Case("clip-lite", "pretrained", "float32", 1.0, 32, spare=False),
    Case("clip-lite", "pretrained", "float32", 1.0, 32, spare=True),
)


def building(case: Case, options: argparse.Namespace) -> tuple[Line, str]:
    """Measure a whole `tc build` against the bare teacher on decoded tensors, with the same threads, dtype and batches."""
    device, workers, threads = pick_device(), default_workers(), torch.get_num_threads()
    used = max(1, cores() - workers) if case.spare else threads
    what = f"tc build, {case.teacher} {case.weights} {case.dtype}, batch {case.batch}"
    what += f", {used} of {cores()} cores compute" if device == "cpu" else f" on {device}"
    try:
        teacher = load(case.teacher, weights=case.weights)
    except UserError as error:
        return Line(what, f"skipped: {error}", "-"), ""
    say(what)
    manifest = read_manifest(options.data, limit=max(2 * case.batch, int(options.pictures * case.fraction)))
    torch.set_num_threads(used)
    try:
        figures = rates(teacher, manifest, case, device, workers, max(2, options.rounds // 2))
    finally:
        torch.set_num_threads(threads)
    spare = cores() - (used if device == "cpu" else 1)
    bottleneck, judgment = judge_bottleneck(figures, spare=spare, workers=workers)
    line = compare(
        what,
        figures,
        "whole",
        "bare",
        unit="rows/s",
        other="bare forward",
        bar=f">= {BAR}",
        reason="" if bottleneck else judgment,
    )
    alone = ", ".join(
        f"{name} {middle(figures, key)}"
        for name, key in (("decode", "decode"), ("forward", "bare"), ("write", "write"))
    )
    note = (
        f"{what}: {len(manifest)} rows, counted from the second batch on, {middle(figures, 'start')} s "
        f"after the start; each alone, rows/s: {alone}; {workers} decoding processes; {judgment}"
    )
    return line, note


def judge_bottleneck(figures: Figures, *, spare: int, workers: int) -> tuple[bool, str]:
    """Return whether the teacher is the bottleneck of a build, and a sentence about the bottleneck."""
    decode, forward = (float(np.median(figures[name])) for name in ("decode", "bare"))
    if spare >= 1:
        decode *= min(1, spare / workers)
        bottleneck = decode > forward
        what = "the teacher is" if bottleneck else "decoding is"
        return bottleneck, f"{what} the bottleneck: {number(decode)} rows/s decoded on {spare} spare cores"
    limit = 1 / (1 + forward / (decode / workers * cores()))
    bottleneck = limit >= BAR
    what = "the teacher is the bottleneck" if bottleneck else "no spare core"
    return (
        bottleneck,
        f"{what}: decoding takes its time from the same cores, which leaves {limit:.2f} at best",
    )


def rates(
    teacher: Teacher, manifest: Manifest, case: Case, device: str, workers: int, rounds: int
) -> Figures:
    """Measure rows per second of the build, the bare forward pass, decoding and writing, and the start in seconds."""
    dtype, rows = getattr(torch, case.dtype), len(manifest)
    precision = Precision(case.dtype, "benchmark")
    keep_memory()
    module = teacher.module.to(device, dtype).to(memory_format=torch.channels_last)
    options = BuildOptions(batch_size=case.batch, workers=workers, device=device, precision=precision)
    rows_in = rows_for(teacher, manifest)
    ready = [
        on_device(batch, device, dtype)
        for batch in decoded(rows_in, pieces(manifest, case.batch), workers=workers)
    ]

    def bare() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for inputs in ready:
                outputs = teacher.encode(module, inputs)
        for tensor in outputs.values():
            tensor.cpu()  # waits for an accelerator
        return rows / (time.perf_counter() - begin)

    began: list[float] = []
    starts: list[float] = []

    def encode(module: torch.nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
        began.append(time.perf_counter())
        return teacher.encode(module, inputs)

    def whole() -> float:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            begin = time.perf_counter()
            began.clear()
            build(
                dataclasses.replace(teacher, encode=encode),
                manifest,
                Path(folder, "c.zarr"),
                options,
            )
            end = time.perf_counter()
        # The first batch is excluded: the decoders fill their queue on the same cores, and memory is not yet allocated
        starts.append(began[1] - begin)
        return (rows - case.batch) / (end - began[1])

    def decode() -> float:
        batches = decoded(rows_in, pieces(manifest, case.batch), workers=workers)
        next(batches)  # wait until the processes have started
        begin = time.perf_counter()
        return sum(len(batch["key"]) for batch in batches) / (time.perf_counter() - begin)

    def write() -> float:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            cache = store.create(Path(folder, "c.zarr"), plan(teacher, manifest, options), manifest)
            begin = time.perf_counter()
            for block in range(cache.meta.num_blocks):
                put_block(cache, block, {})
            return rows / (time.perf_counter() - begin)

    bare()  # the only warmup: a whole uncounted build takes too long
    figures = alternate(rounds, {"whole": whole, "bare": bare}, uncounted=0)
    figures |= alternate(rounds, {"decode": decode, "write": write}, uncounted=0)
    return figures | {"start": starts}


def pieces(manifest: Manifest, batch_size: int) -> Iterator[WorkItem]:
    """Batches of all rows."""
    for start in range(0, len(manifest), batch_size):
        rows = range(start, min(start + batch_size, len(manifest)))
        yield WorkItem(tuple(rows), texts=range(manifest.texts))


def on_device(batch: Batch, device: str, dtype: torch.dtype) -> Inputs:
    """Move the tensors of a decoded batch to the device, as the build does."""
    inputs: Inputs = {}
    if "image" in batch:
        inputs["image"] = batch["image"][0].to(device, dtype, memory_format=torch.channels_last)
    if "text" in batch:
        inputs["text"] = batch["text"].to(device)
    return inputs
