"""Benchmarks as ratios within one run; each writes docs/benchmarks/<theme>_<hardware>_<date>.md.

    python scripts/bench.py cache    reading a cache against np.memmap; tc build against the bare teacher
    python scripts/bench.py train    a distillation step against the same step without; the engine against bare torch

Measured in alternation and reported as the median with lowest and highest of several rounds. Not a test: nothing fails.
"""

import argparse
import copy
import dataclasses
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from teachercache import store
from teachercache.readers import read_manifest
from teachercache.runtime import Precision, keep_memory, say
from teachercache.samples import Sample, make_manifest
from teachercache.spec import CacheMeta, Field, TeacherSpec

DIM, SCATTERED = 512, 1024


def main() -> None:
    """Pick a theme."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("theme", choices=["cache", "train"])
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the synthetic cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", default="data/demo")
    options = parser.parse_args()
    keep_memory()
    lines = bench_cache(options) if options.theme == "cache" else bench_train(options)
    write(options.theme, lines)


def write(theme: str, lines: list[str]) -> None:
    """Print the report and keep it."""
    hardware = (
        f"{os.cpu_count()}cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name().replace(" ", "-")
    )
    path = Path("docs/benchmarks", f"{theme}_{hardware}_{datetime.date.today().isoformat()}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    head = [
        f"# {theme}",
        "",
        f"`{' '.join(['python', *sys.argv])}`; {platform.machine()}, {os.cpu_count()} cores, {versions}.",
        "",
    ]
    path.write_text("\n".join(head + lines) + "\n")
    print("\n".join(lines))
    say(f"written to {path}")


def alternate(rounds: int, **actions: Callable[[], float]) -> dict[str, list[float]]:
    """Each action's figure, in turn, `rounds` times after one that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds + 1):
        for name, action in actions.items():
            value = action()
            if i:
                figures[name].append(value)
    return figures


def ratio(figures: dict[str, list[float]], a: str, b: str) -> str:
    """Median, lowest and highest of a/b round by round."""
    ratios = [x / y for x, y in zip(figures[a], figures[b], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def middle(figures: dict[str, list[float]], name: str) -> str:
    """The median figure."""
    value = statistics.median(figures[name])
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ----------------------------------------------------------------------------------------------------
# cache


def bench_cache(options: argparse.Namespace) -> list[str]:
    """Reading and building."""
    lines = ["| what | rate | against | ratio | bar |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cache, flat = synthetic(Path(folder), options.rows)
        lines += reading(cache, flat, options)
    lines += building(options)
    return lines


def synthetic(folder: Path, rows: int) -> tuple[store.Cache, Path]:
    """A cache of random float16 vectors, written through the store, and the same in one .npy."""
    field = Field("image_emb", (DIM,), "image", "float16", "random")
    spec = TeacherSpec("bench", "random:0", "0" * 64, ("embeddings",), (field,), {}, {}, {})
    manifest = make_manifest("bench", folder, (Sample(f"{i:08d}", "x") for i in range(rows)))
    size = store.block_rows_for((field,), rows, 0)
    meta = CacheMeta(spec, "bench", manifest.digest, rows, 0, size, "float32", {})
    cache = store.create(folder / "bench.zarr", meta, manifest)
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", "float16", (rows, DIM))
    random = np.random.default_rng(0)
    for block in range(meta.num_blocks):
        part = meta.block(block)
        values = random.standard_normal((len(part), DIM), dtype=np.float32).astype(np.float16)
        flat[part.start : part.stop] = values
        keys = np.array([f"{i:08d}" for i in part], dtype=np.dtypes.StringDType())
        store.write_block(cache, block, {"image_emb": values, "valid": np.ones(len(part), bool), "key": keys}, [])
    flat.flush()
    return cache, folder / "flat.npy"


def reading(cache: store.Cache, flat: Path, options: argparse.Namespace) -> list[str]:
    """Scattered rows and whole blocks, against np.memmap; resident memory of the process that reads."""
    ours, memmap = store.read_field(cache, "image_emb"), np.load(flat, mmap_mode="r")
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
        rates = f"{middle(figures, 'ours')} rows/s", f"np.memmap, {middle(figures, 'memmap')} rows/s"
        title = f"{title} of {options.rows:,} x {DIM} float16"
        lines.append(f"| {title} | {rates[0]} | {rates[1]} | {ratio(figures, 'ours', 'memmap')} | >= 0.9 |")
    return lines


def building(options: argparse.Namespace) -> list[str]:
    """Pictures per second of a whole `tc build` against the teacher alone on tensors that are ready."""
    from teachercache.build import build, rows_for
    from teachercache.teachers import load

    teacher = load("clip-lite")
    manifest = read_manifest(options.data, limit=512)
    rows = rows_for(teacher, manifest)
    batches = [rows.__getitems__(list(range(i, i + 32))) for i in range(0, 512, 32)]
    module = teacher.module.to(memory_format=torch.channels_last)
    ready = [{"image": b["image"].to(memory_format=torch.channels_last), "text": b["text"]} for b in batches]

    def bare() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for inputs in ready:
                teacher.encode(module, inputs)
        return 512 / (time.perf_counter() - begin)

    def whole() -> float:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            begin = time.perf_counter()
            build(teacher, manifest, Path(folder, "c.zarr"), batch_size=32, workers=1, device="cpu",
                  precision=Precision("float32", "benchmark"))  # fmt: skip
            return 512 / (time.perf_counter() - begin)

    figures = alternate(max(2, options.rounds // 2), whole=whole, bare=bare)
    rates = f"{middle(figures, 'whole')} pictures/s", f"bare forward, {middle(figures, 'bare')} pictures/s"
    title = "tc build, clip-lite, decoding on the same cores"
    return [f"| {title} | {rates[0]} | {rates[1]} | {ratio(figures, 'whole', 'bare')} | >= 0.95 |"]


# ----------------------------------------------------------------------------------------------------
# train


def bench_train(options: argparse.Namespace) -> list[str]:
    """Seconds per step of one student: alone, distilled from a cache, with a live teacher, and in bare torch."""
    from student.engine import clamp_scales, parameter_groups, quiet_deepspeed, start_engine
    from student.models.two_tower import TINY
    from student.recipe import Now, Run
    from student.recipes import find
    from student.train import prepare

    TINY["bench"] = copy.deepcopy(TINY["vit-tiny"])
    TINY["bench"]["vision_cfg"] |= {"width": 384, "layers": 6}
    now, batch_size = Now(0, 100), 64

    def ready(name: str, *, live: bool = False):
        recipe = find(name)
        recipe = dataclasses.replace(recipe, batch=batch_size, steps=4,
                                     constants=dataclasses.replace(recipe.constants, model="bench"))  # fmt: skip
        run = Run(data=options.data, cache="caches/demo", out="unused", device="cpu", live=live)
        prepared = prepare(recipe, run)
        return recipe, run, prepared.step, prepared.batches[0]

    def engine_step(name: str, *, live: bool = False) -> Callable[[], float]:
        recipe, run, step, batch = ready(name, live=live)
        engine = start_engine(step, recipe.optim, run, batch_size)

        def once() -> float:
            begin = time.perf_counter()
            with quiet_deepspeed():
                loss, _, _ = engine(batch, now)
                engine.backward(loss)
                engine.step()
                clamp_scales(engine)
            return time.perf_counter() - begin

        return once

    def bare_step(name: str) -> Callable[[], float]:
        recipe, _, step, batch = ready(name)
        optimizer = torch.optim.AdamW(parameter_groups(step, recipe.optim.weight_decay), lr=recipe.optim.lr, fused=True)

        def once() -> float:
            begin = time.perf_counter()
            loss, _, _ = step(batch, now)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - begin

        return once

    actions = {"clip": engine_step("clip"), "clip_kd": engine_step("clip_kd"), "bare": bare_step("clip"),
               "live": engine_step("clip_kd", live=True)}  # fmt: skip
    figures = alternate(options.rounds, **actions)
    rows = [("clip_kd on a cache", "clip_kd", "clip", "clip alone", "<= 1.05"),
            ("clip_kd with clip-lite live", "live", "clip", "clip alone", "-"),
            ("DeepSpeed engine, clip", "clip", "bare", "bare torch loop", "<= 1.05")]  # fmt: skip
    size = sum(parameter.numel() for parameter in ready("clip")[2].parameters()) / 1e6
    lines = [f"A student of {size:.1f}M parameters, batch {batch_size}.", "",
             "| step | seconds | against | ratio | bar |", "|---|---|---|---|---|"]  # fmt: skip
    for title, a, b, other, bar in rows:
        lines.append(
            f"| {title} | {middle(figures, a)} | {other}, {middle(figures, b)} | {ratio(figures, a, b)} | {bar} |"
        )
    return lines


if __name__ == "__main__":
    main()
