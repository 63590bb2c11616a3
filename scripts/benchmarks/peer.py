"""`tc build` beside clip-retrieval's inference: its own package, unmodified, in an environment of its own.

Both tools get the same pictures, the same random weights from one file, dtype, batch size and number of decoding
processes, each in a fresh process. Not for a comparison of results beyond the cosine that shows they are the same.
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
from pathlib import Path

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
SMALL = 2 * BATCH  # pictures of the run that tells starting up apart


class Skipped(Exception):
    """The other tool cannot be had or does not run; the message is the last line of its error."""


def against_clip_retrieval(options: argparse.Namespace) -> tuple[list[Line], str]:
    """Rows per second of both tools, with and without their start; `skipped` with the reason where one cannot run."""
    what = f"tc build, pictures alone, {ARCHITECTURE}"
    try:
        return measured(what, options)
    except Skipped as error:
        return [Line(what, "-", f"clip-retrieval inference, skipped: {error}")], ""


def measured(what: str, options: argparse.Namespace) -> tuple[list[Line], str]:
    """Both lines and the note."""
    tool, weights = environment(), checkpoint()
    device, workers = pick_device(), default_workers()
    precision = "fp32" if device == "cpu" else "bf16"  # what clip-retrieval computes in there
    with tempfile.TemporaryDirectory(dir=HOME) as name:
        folder = Path(name).absolute()
        sizes = {"small": SMALL, "large": copy_pictures(options, folder)}

        def once(who: str, size: str) -> float:
            out = folder / f"{who}-{size}"
            shutil.rmtree(out, ignore_errors=True)
            words = (our_words if who == "ours" else their_words)(
                folder / size, out, weights, workers, precision
            )
            say(f"{who}: {sizes[size]} pictures")
            return seconds([sys.executable, "-m", "teachercache"] if who == "ours" else [str(tool)], words)

        (
            once("ours", "small"),
            once("theirs", "small"),
        )  # programs and pictures are in the page cache from here on
        actions = {
            f"{who} {size}": lambda who=who, size=size: once(who, size)
            for size in sizes
            for who in ("ours", "theirs")
        }
        times = alternate(max(2, options.rounds // 3), uncounted=0, **actions)
        cosine = smallest_cosine(folder / "ours-large", folder / "theirs-large")
    figures = {
        f"{who} whole": [sizes["large"] / large for large in times[f"{who} large"]]
        for who in ("ours", "theirs")
    }
    for who in ("ours", "theirs"):
        start = statistics.median(times[f"{who} small"])  # and a few pictures; round by round it is too noisy
        figures[f"{who} steady"] = [
            (sizes["large"] - SMALL) / (large - start) for large in times[f"{who} large"]
        ]
    other = f"clip-retrieval {version(tool)}"
    unit = {"unit": "rows/s", "other": other, "bar": ">= 1.0"}
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
                f"{what}, without the start", "skipped: the machine was too busy to tell the start apart", "-"
            )
        )
    note = (
        f"beside clip-retrieval: {precision} on {device}, batch {BATCH}, {workers} decoding processes, the same random "
        f"weights, each run in a fresh process; without the start: by the difference to a run of {SMALL} pictures; "
        f"smallest cosine between both tools' embeddings of a picture: {cosine:.5f}"
    )
    return lines, note


def our_words(pictures: Path, out: Path, weights: Path, workers: int, precision: str) -> list[str]:
    """Behind `tc`."""
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


def their_words(pictures: Path, out: Path, weights: Path, workers: int, precision: str) -> list[str]:
    """Behind `clip-retrieval`; its precision follows from the device."""
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
    """The command of clip-retrieval, installed once into an environment of its own."""
    home = HOME / "clip-retrieval"
    done = home / "installed"
    if not (done.exists() and done.read_text() == " ".join(PACKAGES)):
        say(f"installing {PACKAGES[0]} into {home} (a few minutes, once) ...")
        venv.create(home, with_pip=True)
        run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES])
        done.write_text(" ".join(PACKAGES))
    return (home / "bin/clip-retrieval").absolute()


def version(tool: Path) -> str:
    """The installed version of clip-retrieval."""
    code = (
        "import importlib.metadata as m; print(m.version('clip-retrieval'), 'with torch', m.version('torch'))"
    )
    return run([str(tool.with_name("python")), "-c", code]).strip()


def checkpoint() -> Path:
    """A file of random weights that both tools read: no hub is asked."""
    import open_clip

    path = HOME / f"{ARCHITECTURE}-random.pt"
    if not path.exists():
        torch.manual_seed(0)
        partial = path.with_suffix(".partial")
        torch.save(open_clip.create_model(ARCHITECTURE, pretrained=None).state_dict(), partial)
        os.replace(partial, path)
    return path.absolute()


def copy_pictures(options: argparse.Namespace, folder: Path) -> int:
    """Two folders of pictures without captions, `small` and `large`; how many are in the large one."""
    manifest = read_manifest(options.data, limit=options.pictures)
    samples = [manifest.row(i) for i in range(len(manifest))]
    samples = [sample for sample in samples if sample.image and sample.offset < 0]
    if len(samples) <= SMALL:
        raise Skipped(f"{options.data} has no {SMALL + 1} pictures in files of their own")
    for size, chosen in (("small", samples[:SMALL]), ("large", samples)):
        (folder / size).mkdir()
        for i, sample in enumerate(chosen):
            shutil.copy(manifest.root / sample.image, folder / size / f"{i:06d}{Path(sample.image).suffix}")
    return len(samples)


def seconds(command: list[str], words: list[str]) -> float:
    """How long a command takes, from its start to its end."""
    begin = time.perf_counter()
    run([*command, *words])
    return time.perf_counter() - begin


def run(command: list[str]) -> str:
    """Its output; Skipped with the last line of its error."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Skipped(((done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return done.stdout


def smallest_cosine(ours: Path, theirs: Path) -> float:
    """Between both tools' embeddings of one picture, joined by file name."""
    import pyarrow.parquet as pq

    cache = store.open_complete(ours)
    found = np.concatenate([np.load(path) for path in sorted(theirs.glob("img_emb/*.npy"))]).astype(
        np.float32
    )
    paths = [
        path
        for part in sorted(theirs.glob("metadata/*.parquet"))
        for path in pq.read_table(part)["image_path"].to_pylist()
    ]
    at = store.join(cache, [Path(path).stem for path in paths])
    if (at < 0).any() or len(at) != cache.meta.rows:
        raise Skipped(f"{len(paths)} of {cache.meta.rows} pictures came out, as {json.dumps(paths[:1])}")
    mine = store.read_field(cache, "image_emb")[at].astype(np.float32)
    mine /= np.linalg.norm(mine, axis=1, keepdims=True)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return float((mine * found).sum(1).min())
