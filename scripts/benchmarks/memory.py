"""Memory of building and reading at three sizes, each job in a process of its own. Not for speed.

    python -m scripts.benchmarks.memory JOB ROWS FOLDER    one job; prints a JSON line

Counted is anonymous memory (RssAnon): pages of mapped chunk files are the kernel's cache and leave when others need
room. The manifest's Arrow table grows with the rows by design: it is loaded before a job begins to count.
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
import types
from collections.abc import Mapping
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

DIM, BLOCK = (
    512,
    4096,
)  # blocks of one size at both sizes: their buffers are bounded, and not what is asked here
BATCHES, BATCH = 3000, 1024
WRITES = {"write": ("written.zarr",), "build": ("built.zarr",)}
BAR = "<= 16"  # bytes a row that a job may grow by; the vectors themselves have 1,024
# Other bars: the manifest is a table of rows; a training has an index of them (order, place in the cache, keys to join)
BARS = {"manifest": "-", "join": "<= 128"}
FIELD = Field("text_emb", (DIM,), "text", "float16", "random")
SPEC = TeacherSpec("bench", "random:0", "0" * 64, ("embeddings",), (FIELD,), {"size": [1, 1]}, {}, {})


# ----------------------------------------------------------------------------------------------------
# Synthetic rows, through the store


def short_texts(folder: Path, rows: int) -> Manifest:
    """A manifest of short texts, without pictures."""
    return make_manifest(
        "bench", folder, (Sample(f"{i:08d}", "", (f"a picture of {i}",)) for i in range(rows))
    )


def empty_cache(
    path: Path, rows: int, manifest: Manifest | None = None, *, block_rows: int = 0
) -> store.Cache:
    """A cache for vectors whose blocks are still to be written."""
    manifest = manifest or short_texts(path.parent, rows)
    size = block_rows or block_rows_for((FIELD,), rows)
    meta = CacheMeta(SPEC, "bench", manifest.digest, rows, 1, size, "float32", {})
    return store.create(path, meta, manifest)


def put_block(cache: store.Cache, block: int, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Write a block; chunks that are not given are all valid, or ones."""
    rows = cache.meta.block(block)
    whole = {
        (name, copy): np.ones((len(rows), *field.shape), field.dtype)
        for name, field in cache.fields.items()
        for copy in range(cache.copies(name))
    }
    keys = np.array([f"{i:08d}" for i in rows], dtype=np.dtypes.StringDType())
    store.write_block(cache, block, {**whole, **chunks, ("key", 0): keys}, [])


def vectors(rows: int, *, seed: int) -> np.ndarray:
    """Random float16 vectors."""
    return np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32).astype(np.float16)


class Table(torch.nn.Module):
    """The cheapest teacher: a vector by the text's last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.from_numpy(vectors(256, seed=0)).float(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [n, 1] to vectors [n, DIM]."""
        return self.vectors[ids[:, 0]]


def cheap_teacher() -> Teacher:
    """A teacher that costs next to nothing."""
    return Teacher(
        SPEC,
        Table(),
        lambda module, inputs: {"text_emb": module(inputs["text"])},
        lambda picture: picture,
        lambda texts: torch.tensor([[int(text.rpartition(" ")[2] or 0) % 256] for text in texts]),
    )


# ----------------------------------------------------------------------------------------------------
# Jobs: each gets its folder and a function that says when counting begins; the manifest is there before that


def job_manifest(folder: Path, rows: int, start) -> None:
    """A reader's rows into a manifest, and to disk."""
    start()
    write_manifest(short_texts(folder, rows), folder / "manifest.parquet")


def job_write(folder: Path, rows: int, start) -> None:
    """A store, block by block, from vectors that are ready."""
    manifest = load_manifest(folder / "manifest.parquet")
    values = vectors(BLOCK, seed=0)
    start()
    cache = empty_cache(folder / "written.zarr", rows, manifest, block_rows=BLOCK)
    for block in range(cache.meta.num_blocks):
        put_block(cache, block, {("text_emb", 0): values[: len(cache.meta.block(block))]})
    store.finish(cache)


def job_build(folder: Path, rows: int, start) -> None:
    """The real build loop with a teacher that costs nothing, one decoding process."""
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


def job_read(folder: Path, rows: int, start) -> None:
    """Scattered rows of a mapped field."""
    start()
    values = store.read_field(store.open_complete(folder / "written.zarr"), "text_emb")
    random = np.random.default_rng(0)
    for _ in range(BATCHES):
        values[random.integers(0, rows, BATCH)]


def job_join(folder: Path, rows: int, start) -> None:
    """What a training does: usable rows, the join by key, shuffled batches; the student takes no inputs."""
    from student.inputs.caches import training_rows
    from student.inputs.pairs import Batches

    manifest = load_manifest(folder / "manifest.parquet")
    start()
    cache = store.open_complete(folder / "written.zarr")
    usable = training_rows(manifest, cache)
    batches = Batches(
        manifest,
        usable,
        student=types.SimpleNamespace(inputs=()),
        cache=cache,
        reads=("text_emb",),
        batch=BATCH,
        steps=20,
        seed=0,
    )
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
    """Anonymous resident bytes of a process, 0 where it is gone."""
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in names.split()]


def free_in_malloc() -> int:
    """Bytes that malloc holds free for later: freed activations stay (runtime.keep_memory), up to a plateau."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # not glibc, or before 2.33
        return 0
    ask.restype = Mallinfo
    return ask().fordblks


def written_by_children() -> int:
    """Bytes of the largest child that it does not share: after a fork only what it wrote itself."""
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


def look() -> dict[str, int]:
    """Bytes now: resident here, of these in use, and of the largest child."""
    resident = anonymous()
    return {"resident": resident, "used": resident - free_in_malloc(), "children": written_by_children()}


def measure(job: str, rows: int, folder: Path) -> dict[str, int]:
    """Run a job here: bytes resident and in use at their peaks, beyond those when it began to count."""
    peak = dict.fromkeys(look(), 0)
    before = dict(peak)
    over = threading.Event()

    def start() -> None:
        pyarrow.default_memory_pool().release_unused()
        before.update(look())

    def note() -> None:
        peak.update({name: max(peak[name], now) for name, now in look().items()})

    def watch() -> None:
        while not over.wait(0.02):
            note()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        JOBS[job][0](folder, rows, start)
        note()
    finally:
        over.set()
        watcher.join()
    extra = {name: max(0, peak[name] - before[name]) for name in peak}
    return extra | {"rss": resident("VmHWM")}


def memory(options: argparse.Namespace) -> tuple[list[Line], str]:
    """Every job at three sizes; growth is asked between the last two, after what a first minute of work fills."""
    sizes, lines = sorted(options.memory_rows), []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folders = [Path(name, str(rows)) for rows in sizes]
        for folder in folders:
            folder.mkdir()
        for job, (_, title) in JOBS.items():
            say(f"memory: {title}")
            try:
                at = [
                    middle_of(job, rows, folder, options.memory_times)
                    for rows, folder in zip(sizes, folders, strict=True)
                ]
            except subprocess.CalledProcessError as error:
                reason = (error.stderr.strip().splitlines() or [f"exit {error.returncode}"])[-1]
                lines.append(Line(f"memory, {title}", f"skipped: {reason}", "-"))
                continue
            lines.append(growth(f"memory, {title}", at, sizes, "used", bar=BARS.get(job, BAR)))
            if at[-1]["children"]:
                lines.append(growth("memory, its decoding process", at, sizes, "children", bar=BAR))
        table = load_manifest(folders[-1] / "manifest.parquet").table.nbytes
    note = (
        f"memory: anonymous bytes at the peak beyond those at the start, without what malloc holds free; vectors of "
        f"{DIM} float16, blocks of {BLOCK}; the ratio is growth in bytes per row from {sizes[1]:,} rows on. The "
        f"manifest's table has {table / 1e6:,.0f} MB at {sizes[2]:,} rows; every job but the first has it before "
        "counting begins"
    )
    return lines, note


def growth(what: str, at: list[dict[str, int]], sizes: list[int], name: str, *, bar: str) -> Line:
    """The line of a job: megabytes at every size, and growth between the last two in bytes per row."""
    each = (at[-1][name] - at[-2][name]) / (sizes[-1] - sizes[-2])
    cells = []
    for rows, found in zip(sizes, at, strict=True):
        rest = f" ({found['resident'] / 1e6:,.0f} resident, {found['rss'] / 1e6:,.0f} peak RSS)"
        cells.append(f"{rows:,} rows: {found[name] / 1e6:,.0f} MB{rest if name == 'used' else ''}")
    return Line(what, cells[-1], "; ".join(cells[:-1]), f"{each:.0f} bytes a row", bar, judge(each, bar))


def middle_of(job: str, rows: int, folder: Path, times: int) -> dict[str, int]:
    """Each figure's median over some fresh processes: what lies in buffers at the peak is chance."""
    found = [in_process(job, rows, folder) for _ in range(times)]
    return {name: statistics.median_low([one[name] for one in found]) for name in found[0]}


def in_process(job: str, rows: int, folder: Path) -> dict[str, int]:
    """A job's figures from a fresh process."""
    for written in WRITES.get(job, ()):
        shutil.rmtree(folder / written, ignore_errors=True)
    command = [sys.executable, "-m", "scripts.benchmarks.memory", job, str(rows), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
