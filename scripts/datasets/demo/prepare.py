"""Make data/demo: about 3,000 pictures with captions in class folders, from three Debian packages.

    python -m scripts.datasets.demo.prepare [--out data/demo] [--source auto|debian|pip] [--seed 0] [--force]

The packages are downloaded and read without being installed. Without apt-get the pictures come from the PyPI package
easy-vqa and from our scene generator. The data is small and mostly clip art; it is not a benchmark.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps
from rich.progress import track

from scripts.datasets import scenes as prepare_scenes
from scripts.datasets.demo.debian import Pair, SourceError, fetch_packages, package_version, read_packages
from scripts.datasets.demo.rules import CLASSES, caption_key

NUM_TEST = 500
MIN_TRAIN = 20  # smaller classes are dropped
LONGEST_SIDE = 256
SHORTEST_CONTENT = 32  # pixels; smaller drawings are illegible
WORK_SIDE = 1536  # pixels; resolution of the processing, larger than the output
THUMBNAIL = 16
SAME_PICTURE = 0.02  # root mean square difference of thumbnails in [0, 1]
SAME_DRAWING = 0.985  # correlation of gray thumbnails: the same drawing in two colors
NUM_VQA = 1500
NUM_SCENES = 4500

# --- pictures ----------------------------------------------------------------------------------------


def render(picture: Path) -> tuple[bytes, np.ndarray] | str:
    """Return (JPEG of at most 256 pixels, thumbnail), or the reason why the picture is unusable."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            source = Image.open(picture).convert("RGBA")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):  # over 89 and 179 million pixels
        return "too large"
    source.thumbnail((WORK_SIDE, WORK_SIDE))
    canvas = Image.new("RGB", source.size, "white")
    canvas.paste(source, mask=source.getchannel("A"))
    box = visible_box(canvas)
    if box is None:
        return "blank"
    canvas = canvas.crop(box)  # many drawings are tiny and centered on an empty page
    if max(canvas.size) < SHORTEST_CONTENT or min(canvas.size) < SHORTEST_CONTENT // 4:
        return "too small"
    canvas = ImageOps.expand(canvas, border=max(canvas.size) // 20, fill="white")
    canvas.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=92)
    small = canvas.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return buffer.getvalue(), np.asarray(small, dtype=np.float32).reshape(-1) / 255


def visible_box(canvas: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the bounding box of the non-white pixels, or None if all are white."""
    difference = ImageChops.difference(canvas, Image.new("RGB", canvas.size, "white")).convert("L")
    return difference.point([255 if value > 12 else 0 for value in range(256)]).getbbox()


def render_all(pairs: list[Pair]) -> list[tuple[bytes, np.ndarray] | str]:
    """Render all pictures in order, on all cores."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(render, [pair.picture for pair in pairs], chunksize=16)
        return list(track(results, total=len(pairs), description="rendering"))


# --- duplicates and the split -----------------------------------------------------------------------


def distinct_captions(pairs: list[Pair]) -> list[Pair]:
    """Remove repeated captions. A pair with a repeated title keeps its other caption and joins the title's group."""
    taken = {caption_key(pair.captions[0]) for pair in pairs}
    seen: set[str] = set()
    groups: dict[str, int] = {}
    kept = []
    for pair in pairs:
        first, *others = pair.captions
        others = [caption for caption in others if caption_key(caption) not in taken]
        # A second "Heart" keeps its caption "Heart: valentines, love"
        captions = others if caption_key(first) in seen else [first, *others]
        if captions:
            group = groups.setdefault(caption_key(re.sub(r"\(black and white\)", "", first)), len(groups))
            kept.append(replace(pair, captions=tuple(captions), group=group))
        seen.add(caption_key(first))
        taken.update(caption_key(caption) for caption in others)
    return kept


def distinct_pictures(thumbnails: np.ndarray, groups: np.ndarray) -> tuple[list[int], list[int]]:
    """Remove near-duplicates and group recolored drawings.

    Args:
        thumbnails: float32 [n, THUMBNAIL * THUMBNAIL * 3] in [0, 1].
        groups: group of each row, [n].

    Returns:
        The rows to keep and their groups.
    """
    squares = (thumbnails**2).sum(1)
    distance = squares[:, None] + squares[None] - 2 * thumbnails @ thumbnails.T
    gray = thumbnails.reshape(len(thumbnails), -1, 3).mean(2)
    gray = gray - gray.mean(1, keepdims=True)
    gray /= np.maximum(np.linalg.norm(gray, axis=1, keepdims=True), 1e-6)
    same_drawing = gray @ gray.T > SAME_DRAWING
    # Both conditions: line drawings are nearly white, so any two of them have a small distance
    same_picture = same_drawing & (distance < SAME_PICTURE**2 * thumbnails.shape[1])
    kept: list[int] = []
    for row in range(len(thumbnails)):
        if not same_picture[row, kept].any():
            kept.append(row)
    return kept, components(same_drawing[kept][:, kept] | (groups[kept][:, None] == groups[kept]))


def components(joined: np.ndarray) -> list[int]:
    """Return the connected component of every row of a symmetric boolean matrix, as its smallest row."""
    group = list(range(len(joined)))
    for row in range(len(joined)):
        for other in np.flatnonzero(joined[row, :row]):
            old, new = sorted((group[row], group[other]), reverse=True)
            if old != new:
                group = [new if value == old else value for value in group]
    return group


def choose_test(pairs: list[Pair], num_test: int, seed: int) -> set[int]:
    """Sample the test rows: the same fraction of every class, and only rows that are alone in their group."""
    group_sizes = Counter(pair.group for pair in pairs)
    alone: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        if group_sizes[pair.group] == 1:
            alone.setdefault(pair.label, []).append(row)
    totals = Counter(pair.label for pair in pairs)
    shares = {label: num_test * totals[label] / len(pairs) for label in sorted(alone)}
    quota = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (quota[label] - shares[label], label))
    for label in by_remainder[: num_test - sum(quota.values())]:
        quota[label] += 1
    rng = random.Random(seed)
    return {
        row
        for label in sorted(alone)
        for row in rng.sample(alone[label], min(quota[label], len(alone[label])))
    }


# --- the two sources ----------------------------------------------------------------------------------


def write_debian(partial: Path, *, downloads: Path, seed: int) -> dict[str, Any]:
    """Fill `partial` from the Debian packages and return their entries of about.json."""
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix="partial-") as scratch:
        debs = fetch_packages(downloads, Path(scratch))
        pairs = read_packages(Path(scratch))
        about = write_pairs(partial, pairs, num_test=NUM_TEST, seed=seed)
    return {"packages": {package: package_version(deb) for package, deb in debs.items()}} | about


def write_pairs(
    partial: Path, pairs: list[Pair], *, num_test: int, seed: int, min_train: int = MIN_TRAIN
) -> dict[str, Any]:
    """Remove duplicates, split the pairs, write them, and return the counts for about.json."""
    removed = Counter(candidates=len(pairs))
    pairs = distinct_captions(pairs)
    removed["same caption"] = removed["candidates"] - len(pairs)
    rendered = render_all(pairs)
    removed.update(result for result in rendered if isinstance(result, str))
    drawn = [
        (pair, *result) for pair, result in zip(pairs, rendered, strict=True) if not isinstance(result, str)
    ]
    thumbnails = np.stack([thumbnail for _, _, thumbnail in drawn])
    kept, groups = distinct_pictures(thumbnails, np.array([pair.group for pair, _, _ in drawn]))
    removed["same picture"] = len(drawn) - len(kept)
    pairs = [replace(drawn[row][0], group=group) for row, group in zip(kept, groups, strict=True)]
    removed["in groups, train only"] = sum(n for n in Counter(groups).values() if n > 1)
    test = choose_test(pairs, num_test, seed)
    num_train = Counter(pair.label for row, pair in enumerate(pairs) if row not in test)
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for row, pair in enumerate(pairs):
        if num_train[pair.label] < min_train:
            removed["class too small"] += 1
            continue
        split = "test" if row in test else "train"
        folder = partial / split / pair.label
        prepare_scenes.write_pair(folder, pair.name, drawn[kept[row]][1], list(pair.captions), suffix="jpg")
        counts[split].update(["all", f"class {pair.label}", f"source {pair.source}"])
    prepare_scenes.write_class_names(partial, CLASSES)
    return {
        "counts": {split: dict(sorted(c.items())) for split, c in counts.items()},
        "selection": dict(removed),
    }


def write_pip(
    partial: Path, *, seed: int, num_vqa: int = NUM_VQA, num_scenes: int = NUM_SCENES
) -> dict[str, Any]:
    """Fill `partial` without apt-get: easy-vqa pictures (train only) and generated scenes."""
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for name, path, caption, label in easy_vqa_pictures(num_vqa):
        # easy-vqa has only 24 distinct captions, so all its pictures are in the training split
        folder = partial / "train" / label
        prepare_scenes.write_pair(folder, name, path.read_bytes(), [caption], suffix="png")
        counts["train"].update(["all", f"class {label}", "source easy-vqa"])
    test_captions: set[str] = set()
    scenes = track(prepare_scenes.generate(num_scenes, seed), total=num_scenes, description="drawing")
    for i, (picture, captions, label, scene) in enumerate(scenes):
        split = "test" if prepare_scenes.held_out(scene, seed=seed, test=0.15) else "train"
        if split == "test":
            captions = captions[:1]  # the second caption is less specific and may match several pictures
            if captions[0] in test_captions:
                continue
            test_captions.update(captions)
        folder, name = partial / split / label, f"scene_{i:05d}"
        prepare_scenes.write_pair(folder, name, prepare_scenes.as_png(picture), captions, suffix="png")
        counts[split].update(["all", f"class {label}", "source scenes"])
    prepare_scenes.write_class_names(partial, prepare_scenes.class_names())
    return {
        "packages": {"easy-vqa": version("easy-vqa")},
        "counts": {split: dict(sorted(c.items())) for split, c in counts.items()},
    }


def easy_vqa_pictures(num: int) -> list[tuple[str, Path, str, str]]:
    """Return (name, path, caption, shape) of the first `num` pictures. Captions come from questions and answers."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SourceError("the package easy-vqa is not installed; try `pip install easy-vqa`")
    folder = Path(spec.origin).parent / "data" / "train"
    facts: dict[int, dict[str, str]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        if answer not in ("yes", "no"):  # the other answers are colors or shapes
            facts.setdefault(image, {})["color" if "color" in question else "shape"] = answer
    pictures: list[tuple[str, Path, str, str]] = []
    for image, fact in sorted(facts.items()):
        if len(fact) == 2 and len(pictures) < num:
            words = prepare_scenes.article(f"{fact['color']} {fact['shape']}")
            caption = prepare_scenes.capital(f"{words}.")
            pictures.append((f"vqa_{image:05d}", folder / "images" / f"{image}.png", caption, fact["shape"]))
    return pictures


# --- the command line -----------------------------------------------------------------------------------


def prepare(out: Path, *, source: str, seed: int, downloads: Path) -> dict[str, Any]:
    """Write `out` atomically and return the content of its about.json.

    Args:
        out: folder to create; an existing folder is replaced.
        source: "debian", "pip", or "auto" to fall back from the first to the second.
        seed: seed of the test split.
        downloads: folder of the .deb files.

    Raises:
        SourceError: if the source is unavailable.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if source == "pip":
            content = write_pip(partial, seed=seed)
        else:
            content = write_debian(partial, downloads=downloads, seed=seed)
            source = "debian"
    except SourceError as reason:
        if source != "auto":
            raise
        print(f"no Debian packages ({reason}); using easy-vqa and generated scenes instead", flush=True)
        content = write_pip(partial, seed=seed)
        source = "pip"
    about = {"source": source, "seed": seed, "pillow": version("pillow")} | content
    (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return about


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/demo"), help="folder to create (default: data/demo)"
    )
    parser.add_argument("--source", choices=("auto", "debian", "pip"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test split")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    return parser.parse_args()


def main() -> int:
    """Run the command line and return the exit status."""
    options = parse_options()
    if options.out.exists() and not options.force:
        print(f"{options.out} exists; pass --force to replace it")
        return 0
    start = time.perf_counter()
    downloads = options.out.parent / ".downloads"
    try:
        about = prepare(options.out, source=options.source, seed=options.seed, downloads=downloads)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_train, num_test = (about["counts"][split]["all"] for split in ("train", "test"))
    seconds = time.perf_counter() - start
    source = "Debian packages" if about["source"] == "debian" else "easy-vqa and generated scenes"
    print(f"{options.out}: {num_train} train and {num_test} test pictures from {source} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
