"""Reading a cache against np.memmap; `tc build` against the bare teacher. Not for other tools: see scripts/benchmarks/peer.py."""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.memory import DIM, empty_cache, put_block, vectors
from scripts.benchmarks.report import HEAD, Figures, Line, alternate, compare, cores, middle, number
from teachercache.build.decode import WorkItem, decoded
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
from teachercache.teachers.teacher import Teacher

SCATTERED = 1024
BAR = 0.95  # of the bare forward, where the teacher is the bottleneck


def bench_cache(options: argparse.Namespace) -> list[str]:
    """Every part that is asked for."""
    lines, notes = [], []
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

        found, note = against_clip_retrieval(options)
        lines += found
        notes.append(note)
    if "memory" in options.only:
        from scripts.benchmarks.memory import memory

        found, note = memory(options)
        lines += found
        notes.append(note)
    return [*HEAD, *map(str, lines), "", *(f"- {note}" for note in notes if note)]


# ----------------------------------------------------------------------------------------------------
# Reading


def synthetic(folder: Path, rows: int) -> tuple[store.Cache, Path]:
    """A cache of random float16 vectors, written through the store, and the same in one .npy."""
    cache = empty_cache(folder / "bench.zarr", rows)
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", "float16", (rows, DIM))
    for block in range(cache.meta.num_blocks):
        part = cache.meta.block(block)
        flat[part.start : part.stop] = values = vectors(len(part), seed=block)
        put_block(cache, block, {("text_emb", 0): values})
    flat.flush()
    return cache, folder / "flat.npy"


def reading(cache: store.Cache, flat: Path, options: argparse.Namespace) -> list[Line]:
    """Scattered rows and whole blocks, against np.memmap."""
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
        figures = alternate(options.rounds, ours=lambda a=action: a(ours), memmap=lambda a=action: a(memmap))
        title = f"reading {title} of {options.rows:,} x {DIM} float16"
        lines.append(
            compare(title, figures, "ours", "memmap", unit="rows/s", other="np.memmap", bar=">= 0.9")
        )
    return lines


# ----------------------------------------------------------------------------------------------------
# Building


@dataclasses.dataclass(frozen=True)
class Case:
    """One build: a teacher, how it computes, and how much of `--pictures` it gets."""

    teacher: str
    weights: str
    dtype: str
    part: float
    batch: int
    spare: bool  # leave the decoders' cores to them, as on a machine with an accelerator


CASES = (
    Case("clip-vit-b16", "random:0", "bfloat16", 0.5, 32, spare=False),
    Case("clip-lite", "pretrained", "float32", 1.0, 32, spare=False),
    Case("clip-lite", "pretrained", "float32", 1.0, 32, spare=True),
)


def building(case: Case, options: argparse.Namespace) -> tuple[Line, str]:
    """A whole `tc build` against the teacher alone on tensors that are ready: same threads, dtype and batches."""
    device, workers, threads = pick_device(), default_workers(), torch.get_num_threads()
    used = max(1, cores() - workers) if case.spare else threads
    what = f"tc build, {case.teacher} {case.weights} {case.dtype}, batch {case.batch}"
    what += f", {used} of {cores()} cores compute" if device == "cpu" else f" on {device}"
    try:
        teacher = load(case.teacher, weights=case.weights)
    except UserError as error:
        return Line(what, f"skipped: {error}", "-"), ""
    say(what)
    manifest = read_manifest(options.data, limit=max(2 * case.batch, int(options.pictures * case.part)))
    torch.set_num_threads(used)
    try:
        figures = rates(teacher, manifest, case, device, workers, max(2, options.rounds // 2))
    finally:
        torch.set_num_threads(threads)
    spare = cores() - (used if device == "cpu" else 1)
    bottleneck, judgement = judge_bottleneck(figures, spare=spare, workers=workers)
    line = compare(
        what,
        figures,
        "whole",
        "bare",
        unit="rows/s",
        other="bare forward",
        bar=f">= {BAR}",
        reason="" if bottleneck else judgement,
    )
    alone = ", ".join(
        f"{name} {middle(figures, key)}"
        for name, key in (("decode", "decode"), ("forward", "bare"), ("write", "write"))
    )
    note = (
        f"{what}: {len(manifest)} rows, counted from the second batch on, {middle(figures, 'start')} s "
        f"after the start; each alone, rows/s: {alone}; {workers} decoding processes; {judgement}"
    )
    return line, note


def judge_bottleneck(figures: Figures, *, spare: int, workers: int) -> tuple[bool, str]:
    """Whether the teacher is what a build waits for, and the sentence that says so."""
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
    """Rows per second: whole build, bare forward, decoding alone, writing alone; and seconds before the first batch."""
    dtype, rows = getattr(torch, case.dtype), len(manifest)
    precision = Precision(case.dtype, "benchmark")
    keep_memory()
    module = teacher.module.to(device, dtype).to(memory_format=torch.channels_last)
    options = BuildOptions(batch_size=case.batch, workers=workers, device=device, precision=precision)
    rows_in = rows_for(teacher, manifest)
    ready = [
        on_device(part, device, dtype)
        for part in decoded(rows_in, pieces(manifest, case.batch), workers=workers)
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

    def encode(module: torch.nn.Module, inputs: dict) -> dict:
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
        starts.append(
            began[1] - begin
        )  # once in a build of any size: the first batch shares its cores with decoders
        return (rows - case.batch) / (end - began[1])  # that fill their queue, and memory is new to it

    def decode() -> float:
        batches = decoded(rows_in, pieces(manifest, case.batch), workers=workers)
        next(batches)  # the processes are up
        begin = time.perf_counter()
        return sum(len(batch["key"]) for batch in batches) / (time.perf_counter() - begin)

    def write() -> float:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            cache = store.create(Path(folder, "c.zarr"), plan(teacher, manifest, options), manifest)
            begin = time.perf_counter()
            for block in range(cache.meta.num_blocks):
                put_block(cache, block, {})
            return rows / (time.perf_counter() - begin)

    bare()  # the only warming up: a whole build that does not count costs too much
    figures = alternate(rounds, uncounted=0, whole=whole, bare=bare)
    return figures | alternate(rounds, uncounted=0, decode=decode, write=write) | {"start": starts}


def pieces(manifest: Manifest, batch_size: int) -> Iterator[WorkItem]:
    """Batches of all rows."""
    for start in range(0, len(manifest), batch_size):
        rows = range(start, min(start + batch_size, len(manifest)))
        yield WorkItem(tuple(rows), texts=range(manifest.texts))


def on_device(batch: dict, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a batch as the build moves them."""
    inputs = {}
    if "image" in batch:
        inputs["image"] = batch["image"][0].to(device, dtype, memory_format=torch.channels_last)
    if "text" in batch:
        inputs["text"] = batch["text"].to(device)
    return inputs
