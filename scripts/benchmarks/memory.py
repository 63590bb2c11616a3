"""Measure the memory of building and reading a cache at three sizes, each job in a new process.

    python -m scripts.benchmarks.memory JOB ROWS FOLDER    one job; prints a JSON line

Only anonymous memory (RssAnon) counts: pages of mapped chunk files belong to the page cache and can be reclaimed. The
Arrow table of the manifest grows with the rows by design, so it is loaded before the baseline of a job.
"""

import argparse
import contextlib
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow
import torch

from scripts.benchmarks.report import Line, judge, resident
from teachercache.cache import store
from teachercache.cache.layout import block_rows_for
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core.device import Precision
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest, load_manifest, make_manifest, write_manifest
from teachercache.data.sample import Sample
from teachercache.teachers.teacher import Teacher

DIM, BLOCK = 512, 4096  # the same block size at every size, because block buffers are bounded
BATCHES, BATCH = 3000, 1024
WRITES = {"write": ("written.zarr",), "build": ("built.zarr",)}
BAR = "<= 16"  # growth of a job in bytes per row; a vector has 1,024 bytes
# Other bars: the manifest is a table of rows; training has an index of rows (order, cache row, keys to join)
BARS = {"manifest": "-", "join": "<= 128"}
Start = Callable[[], None]  # a job calls it when counting starts
FIELD = Field("text_emb", (DIM,), "text", "float16", "random")
SPEC = TeacherSpec("bench", "random:0", "0" * 64, ("embeddings",), (FIELD,), {}, {}, {}, inputs=("text",))


# ----------------------------------------------------------------------------------------------------
# Synthetic rows, written by the store


def short_texts(folder: Path, rows: int) -> Manifest:
    """Return a manifest of short texts without pictures."""
    return make_manifest(
        "bench", folder, (Sample(f"{i:08d}", "", (f"a picture of {i}",)) for i in range(rows))
    )


def empty_cache(
    path: Path, rows: int, manifest: Manifest | None = None, *, block_rows: int = 0
) -> store.Cache:
    """Create a cache of vectors without blocks."""
    manifest = manifest or short_texts(path.parent, rows)
    size = block_rows or block_rows_for((FIELD,), rows)
    meta = CacheMeta(SPEC, "bench", manifest.digest, rows, 1, size, "float32", {})
    return store.create(path, meta, manifest)


def put_block(cache: store.Cache, block: int, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Write a block. Missing chunks are filled with ones."""
    rows = cache.meta.block(block)
    whole = {
        (name, copy): np.ones((len(rows), *field.shape), field.dtype)
        for name, field in cache.fields.items()
        for copy in range(cache.copies(name))
    }
    keys = np.array([f"{i:08d}" for i in rows], dtype=np.dtypes.StringDType())
    store.write_block(cache, block, {**whole, **chunks, ("key", 0): keys}, [])


def vectors(rows: int, *, seed: int) -> np.ndarray:
    """Return random float16 vectors [rows, DIM]."""
    return np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32).astype(np.float16)


class Table(torch.nn.Module):
    """A minimal teacher: it looks up a vector by the last digits of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.from_numpy(vectors(256, seed=0)).float(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids [n, 1] to vectors [n, DIM]."""
        return self.vectors[ids[:, 0]]


def cheap_teacher() -> Teacher:
    """Return a teacher with negligible compute."""
    return Teacher(
        SPEC,
        Table(),
        lambda module, inputs: {"text_emb": module(inputs["text"])},
        None,
        lambda texts: torch.tensor([[int(text.rpartition(" ")[2] or 0) % 256] for text in texts]),
    )


# ----------------------------------------------------------------------------------------------------
# Jobs: each gets its folder, which contains the manifest, and a function to call when counting starts


def job_manifest(folder: Path, rows: int, start: Start) -> None:
    """Make a manifest and write it to disk."""
    start()
    write_manifest(short_texts(folder, rows), folder / "manifest.parquet")


def job_write(folder: Path, rows: int, start: Start) -> None:
    """Write a store block by block from precomputed vectors."""
    manifest = load_manifest(folder / "manifest.parquet")
    values = vectors(BLOCK, seed=0)
    start()
    cache = empty_cache(folder / "written.zarr", rows, manifest, block_rows=BLOCK)
    for block in range(cache.meta.num_blocks):
        put_block(cache, block, {("text_emb", 0): values[: len(cache.meta.block(block))]})
    store.finish(cache)


def job_build(folder: Path, rows: int, start: Start) -> None:
    """Run the build loop with the minimal teacher and one decoding process."""
    from teachercache.build.loop import BuildOptions, build

    manifest = load_manifest(folder / "manifest.parquet")
    start()
    build(
        cheap_teacher(),
        manifest,
        folder / "built.zarr",
        BuildOptions(
            batch_size=1024,
            workers=1,
            device="cpu",
            precision=Precision("float32", "benchmark"),
            block_rows=BLOCK,
        ),
    )


def job_read(folder: Path, rows: int, start: Start) -> None:
    """Read scattered rows of a memory-mapped field."""
    start()
    values = store.read_field(store.open_complete(folder / "written.zarr"), "text_emb")
    random = np.random.default_rng(0)
    for _ in range(BATCHES):
        values[random.integers(0, rows, BATCH)]


def job_join(folder: Path, rows: int, start: Start) -> None:
    """Select usable rows, join by key and make shuffled batches, as training does, for a student without inputs."""
    from student.contract import RowInputs
    from student.inputs.caches import training_rows
    from student.inputs.order import StepPlan
    from student.inputs.pairs import PairBatches, TeacherFields

    manifest = load_manifest(folder / "manifest.parquet")
    start()
    cache = store.open_complete(folder / "written.zarr")
    usable = training_rows(manifest, cache)
    fields = TeacherFields((cache,), ("text_emb",))
    batches = PairBatches(manifest, usable, RowInputs(), StepPlan(BATCH, 20, 0), teachers=fields)
    for step in range(len(batches)):
        batches[step]


JOBS = {
    "manifest": (job_manifest, "making the manifest (its table counted)"),
    "write": (job_write, "writing a store block by block"),
    "build": (job_build, "the build loop, a teacher that costs nothing"),
    "read": (job_read, f"{BATCHES} batches of {BATCH} scattered rows"),
    "join": (job_join, "a training's join by key and its batches"),
}


# ----------------------------------------------------------------------------------------------------
# Measuring


def anonymous(process: str = "self") -> int:
    """Return the anonymous resident bytes of a process, or 0 if it has exited."""
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class Mallinfo(ctypes.Structure):
    """The struct that glibc's mallinfo2 returns."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in names.split()]


def free_in_malloc() -> int:
    """Return the free bytes that malloc retains: `keep_memory` keeps freed activations, up to a plateau."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # not glibc, or older than 2.33
        return 0
    mallinfo.restype = Mallinfo
    return mallinfo().fordblks


def written_by_children() -> int:
    """Return the private dirty bytes of the largest child: after a fork, only the pages that it has written."""
    children = [
        child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()
    ]
    sizes = [0]
    for child in children:
        with contextlib.suppress(OSError):
            lines = Path("/proc", child, "smaps_rollup").read_text().splitlines()
            sizes.append(
                sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))
            )
    return max(sizes)


def current_memory() -> dict[str, int]:
    """Return the bytes that are resident in this process, in use in it, and private in its largest child."""
    resident = anonymous()
    return {"resident": resident, "used": resident - free_in_malloc(), "children": written_by_children()}


def measure(job: str, rows: int, folder: Path) -> dict[str, int]:
    """Run a job in this process and return the peaks of `current_memory` above the baseline."""
    peak = dict.fromkeys(current_memory(), 0)
    before = dict(peak)
    over = threading.Event()

    def start() -> None:
        pyarrow.default_memory_pool().release_unused()
        before.update(current_memory())

    def update_peak() -> None:
        peak.update({name: max(peak[name], now) for name, now in current_memory().items()})

    def watch() -> None:
        while not over.wait(0.02):
            update_peak()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        JOBS[job][0](folder, rows, start)
        update_peak()
    finally:
        over.set()
        watcher.join()
    extra = {name: max(0, peak[name] - before[name]) for name in peak}
    return extra | {"rss": resident("VmHWM")}


def memory(options: argparse.Namespace) -> tuple[list[Line], str]:
    """Run every job at three sizes. Growth is measured between the last two, when buffers are filled.

    Returns:
        The lines of the report and a note.
    """
    sizes = sorted(options.memory_rows)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folders = [Path(name, str(rows)) for rows in sizes]
        for folder in folders:
            folder.mkdir()
        for job, (_, title) in JOBS.items():
            say(f"memory: {title}")
            try:
                figures = [
                    median_of(job, rows, folder, options.memory_times)
                    for rows, folder in zip(sizes, folders, strict=True)
                ]
            except subprocess.CalledProcessError as error:
                reason = (error.stderr.strip().splitlines() or [f"exit {error.returncode}"])[-1]
                lines.append(Line(f"memory, {title}", f"skipped: {reason}", "-"))
                continue
            lines.append(growth(f"memory, {title}", figures, sizes, "used", bar=BARS.get(job, BAR)))
            if figures[-1]["children"]:
                lines.append(growth("memory, its decoding process", figures, sizes, "children", bar=BAR))
        table = load_manifest(folders[-1] / "manifest.parquet").table.nbytes
    note = (
        f"memory: peak of the anonymous bytes above the baseline, without free memory that malloc retains; vectors of "
        f"{DIM} float16, blocks of {BLOCK}; the ratio is the growth in bytes per row from {sizes[1]:,} rows on. The table "
        f"of the manifest has {table / 1e6:,.0f} MB at {sizes[2]:,} rows; all jobs except the first load it before the "
        "baseline"
    )
    return lines, note


def growth(what: str, figures: list[dict[str, int]], sizes: list[int], name: str, *, bar: str) -> Line:
    """Return the line of a job: megabytes at every size, and growth between the last two sizes in bytes per row."""
    per_row = (figures[-1][name] - figures[-2][name]) / (sizes[-1] - sizes[-2])
    cells = []
    for rows, values in zip(sizes, figures, strict=True):
        rest = f" ({values['resident'] / 1e6:,.0f} resident, {values['rss'] / 1e6:,.0f} peak RSS)"
        cells.append(f"{rows:,} rows: {values[name] / 1e6:,.0f} MB{rest if name == 'used' else ''}")
    return Line(
        what, cells[-1], "; ".join(cells[:-1]), f"{per_row:.0f} bytes a row", bar, judge(per_row, bar)
    )


def median_of(job: str, rows: int, folder: Path, times: int) -> dict[str, int]:
    """Return the medians over several new processes. The content of buffers at the peak is random."""
    figures = [in_process(job, rows, folder) for _ in range(times)]
    return {name: statistics.median_low([values[name] for values in figures]) for name in figures[0]}


def in_process(job: str, rows: int, folder: Path) -> dict[str, int]:
    """Return `measure` of a new process."""
    for written in WRITES.get(job, ()):
        shutil.rmtree(folder / written, ignore_errors=True)
    command = [sys.executable, "-m", "scripts.benchmarks.memory", job, str(rows), str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
