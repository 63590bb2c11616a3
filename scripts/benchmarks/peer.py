"""Benchmark `tc build` against the inference of clip-retrieval, an unmodified package in a separate environment.

Both tools use the same pictures, the same file of random weights, and the same dtype, batch size and number of decoding
processes, each in a new process. The smallest cosine between their embeddings shows that they compute the same.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmarks.report import Line, alternate, compare
from teachercache.cache import store
from teachercache.core.device import pick_device
from teachercache.core.process import default_workers
from teachercache.core.progress import say
from teachercache.data.read import read_manifest

HOME = Path(".bench")
PACKAGES = ("clip-retrieval==2.45.0", "setuptools>=77,<81")  # one of its dependencies imports pkg_resources
ARCHITECTURE, BATCH = "ViT-B-32-quickgelu", 32
SMALL = 2 * BATCH  # number of pictures of the run that measures the startup


class Skipped(Exception):
    """The other tool is unavailable or fails; the message is the last line of its error output."""


def against_clip_retrieval(options: argparse.Namespace) -> tuple[list[Line], str]:
    """Return lines with the rows per second of both tools, with and without startup, or the reason for skipping."""
    what = f"tc build, pictures alone, {ARCHITECTURE}"
    try:
        return measured(what, options)
    except Skipped as error:
        return [Line(what, "-", f"clip-retrieval inference, skipped: {error}")], ""


def measured(what: str, options: argparse.Namespace) -> tuple[list[Line], str]:
    """Return the two lines and the note."""
    tool, weights = environment(), checkpoint()
    device, workers = pick_device(), default_workers()
    precision = "fp32" if device == "cpu" else "bf16"  # the precision of clip-retrieval on this device
    with tempfile.TemporaryDirectory(dir=HOME) as name:
        folder = Path(name).absolute()
        sizes = {"small": SMALL, "large": copy_pictures(options, folder)}

        def once(who: str, size: str) -> float:
            out = folder / f"{who}-{size}"
            shutil.rmtree(out, ignore_errors=True)
            say(f"{who}: {sizes[size]} pictures")
            if who == "ours":
                argv = our_argv(folder / size, out, weights, workers, precision)
                return seconds([sys.executable, "-m", "teachercache", *argv])
            return seconds([str(tool), *their_argv(folder / size, out, weights, workers)])

        once("ours", "small")  # load programs and pictures into the page cache
        once("theirs", "small")
        actions = {f"{who} {size}": partial(once, who, size) for size in sizes for who in ("ours", "theirs")}
        times = alternate(max(2, options.rounds // 3), actions, uncounted=0)
        cosine = smallest_cosine(folder / "ours-large", folder / "theirs-large")
    figures = {
        f"{who} whole": [sizes["large"] / large for large in times[f"{who} large"]]
        for who in ("ours", "theirs")
    }
    for who in ("ours", "theirs"):
        start = statistics.median(times[f"{who} small"])  # the median, because single rounds are too noisy
        figures[f"{who} steady"] = [
            (sizes["large"] - SMALL) / (large - start) for large in times[f"{who} large"]
        ]
    other = f"clip-retrieval {version(tool)}"
    unit: dict[str, Any] = {"unit": "rows/s", "other": other, "bar": ">= 1.0"}
    lines = [
        compare(
            f"{what}, {sizes['large']} rows, start included", figures, "ours whole", "theirs whole", **unit
        )
    ]
    if min(map(min, figures.values())) > 0:
        lines.append(compare(f"{what}, without the start", figures, "ours steady", "theirs steady", **unit))
    else:
        lines.append(
            Line(
                f"{what}, without the start", "skipped: the machine was too busy to measure the startup", "-"
            )
        )
    note = (
        f"against clip-retrieval: {precision} on {device}, batch {BATCH}, {workers} decoding processes, the same random "
        f"weights, each run in a new process; without the start: the difference to a run of {SMALL} pictures; "
        f"smallest cosine between the embeddings of both tools: {cosine:.5f}"
    )
    return lines, note


def our_argv(pictures: Path, out: Path, weights: Path, workers: int, precision: str) -> list[str]:
    """Return the arguments of `tc`."""
    return [
        "build",
        "--teacher",
        f"open_clip:{ARCHITECTURE}/file",
        "--weights",
        str(weights),
        "--data",
        str(pictures),
        "--out",
        str(out),
        "--batch-size",
        str(BATCH),
        "--workers",
        str(workers),
        "--precision",
        precision,
    ]


def their_argv(pictures: Path, out: Path, weights: Path, workers: int) -> list[str]:
    """Return the arguments of `clip-retrieval`, which chooses the precision by device."""
    return [
        "inference",
        "--input_dataset",
        str(pictures),
        "--output_folder",
        str(out),
        "--enable_text",
        "False",
        "--clip_model",
        f"open_clip:{ARCHITECTURE}/{weights}",
        "--batch_size",
        str(BATCH),
        "--num_prepro_workers",
        str(workers),
    ]


def environment() -> Path:
    """Install clip-retrieval into a separate environment if needed and return its command."""
    home = HOME / "clip-retrieval"
    done = home / "installed"
    if not (done.exists() and done.read_text() == " ".join(PACKAGES)):
        say(f"installing {PACKAGES[0]} into {home} (a few minutes, once) ...")
        venv.create(home, with_pip=True)
        run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES])
        done.write_text(" ".join(PACKAGES))
    return (home / "bin/clip-retrieval").absolute()


def version(tool: Path) -> str:
    """Return the installed version of clip-retrieval."""
    code = (
        "import importlib.metadata as m; print(m.version('clip-retrieval'), 'with torch', m.version('torch'))"
    )
    return run([str(tool.with_name("python")), "-c", code]).strip()


def checkpoint() -> Path:
    """Write a file of random weights for both tools if needed, so that no download is required."""
    import open_clip

    path = HOME / f"{ARCHITECTURE}-random.pt"
    if not path.exists():
        torch.manual_seed(0)
        partial = path.with_suffix(".partial")
        torch.save(open_clip.create_model(ARCHITECTURE, pretrained=None).state_dict(), partial)
        os.replace(partial, path)
    return path.absolute()


def copy_pictures(options: argparse.Namespace, folder: Path) -> int:
    """Copy pictures without captions to the folders `small` and `large`; return the number of pictures in `large`."""
    manifest = read_manifest(options.data, limit=options.pictures)
    samples = [manifest.row(i) for i in range(len(manifest))]
    samples = [sample for sample in samples if sample.image and sample.offset < 0]
    if len(samples) <= SMALL:
        raise Skipped(f"{options.data} has fewer than {SMALL + 1} picture files")
    for size, chosen in (("small", samples[:SMALL]), ("large", samples)):
        (folder / size).mkdir()
        for i, sample in enumerate(chosen):
            shutil.copy(manifest.root / sample.image, folder / size / f"{i:06d}{Path(sample.image).suffix}")
    return len(samples)


def seconds(command: list[str]) -> float:
    """Run a command and return the seconds it takes."""
    begin = time.perf_counter()
    run(command)
    return time.perf_counter() - begin


def run(command: list[str]) -> str:
    """Run a command and return its output.

    Raises:
        Skipped: if it fails, with the last line of its error output.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines()
        raise Skipped((lines or [f"exit {process.returncode}"])[-1])
    return process.stdout


def smallest_cosine(ours: Path, theirs: Path) -> float:
    """Return the smallest cosine between the embeddings of both tools, joined by file name."""
    import pyarrow.parquet as pq

    cache = store.open_complete(ours)
    embeddings = [np.load(path) for path in sorted(theirs.glob("img_emb/*.npy"))]
    their_vectors = np.concatenate(embeddings).astype(np.float32)
    paths = [
        path
        for file in sorted(theirs.glob("metadata/*.parquet"))
        for path in pq.read_table(file)["image_path"].to_pylist()
    ]
    rows = store.join(cache, [Path(path).stem for path in paths])
    if (rows < 0).any() or len(rows) != cache.meta.rows:
        raise Skipped(f"{len(paths)} of {cache.meta.rows} pictures were embedded, as {json.dumps(paths[:1])}")
    our_vectors = store.read_field(cache, "image_emb")[rows].astype(np.float32)
    our_vectors /= np.linalg.norm(our_vectors, axis=1, keepdims=True)
    their_vectors /= np.linalg.norm(their_vectors, axis=1, keepdims=True)
    return float((our_vectors * their_vectors).sum(1).min())
