"""Write drawn scenes as VCR and SNLI-VE data sets in the published file formats, from a seed, without a download.

    python -m scripts.datasets.scene_vcr_snli_ve --out data/scenes --num 3000 --seed 0

Writes `data/scenes/vcr1/{train,val}.jsonl` with `vcr1images/`, and `data/scenes/snli_ve/snli_ve_{train,dev}.jsonl` with
`flickr30k-images/`. Each VCR line has an additional key `category`. The sets exercise readers, training and evaluation
with questions that need the picture; they are not a benchmark.
"""

import argparse
import io
import itertools
import json
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from scripts.datasets import scenes as prepare_scenes
from scripts.datasets.scene_hypotheses import hypotheses_of, snli_ve_lines
from scripts.datasets.scene_questions import Tokens, questions_of, usable
from scripts.datasets.scenes import Scene, Thing

PICTURES_PER_MOVIE = 1000
DEV = {"train": "train", "val": "dev"}  # split of VCR -> split of SNLI-VE


def write_tasks(out: Path, num: int, *, seed: int = 0, size: int = 96, test: float = 0.15) -> Counter[str]:
    """Write both sets below `out` atomically and return the number of lines per file."""
    lines: dict[str, list[dict[str, Any]]] = {f"vcr1/{split}.jsonl": [] for split in DEV}
    lines |= {f"snli_ve/snli_ve_{split}.jsonl": [] for split in DEV.values()}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scenes = (row for row in prepare_scenes.generate(2 * num + 100, seed, size) if usable(row[-1]))
    for i, (picture, captions, _, scene) in enumerate(track(itertools.islice(scenes, num), "drawing", num)):
        split = "val" if prepare_scenes.held_out(scene, seed=seed, test=test) else "train"
        rng, jpeg = random.Random(f"tasks {seed}-{i}"), as_jpeg(picture)
        movie = f"scenes_{i // PICTURES_PER_MOVIE:04d}"
        name = f"{movie}/{movie}_{i:06d}@0"
        write(partial / f"vcr1/vcr1images/{name}.jpg", jpeg)
        write(partial / f"vcr1/vcr1images/{name}.json", json.dumps(metadata(scene, size)).encode())
        questions = questions_of(scene, rng)
        vcr_lines = lines[f"vcr1/{split}.jsonl"]
        first = len(vcr_lines)
        vcr_lines += [
            vcr_line(item, scene, name, split, image=i, number=k, index=first + k)
            for k, item in enumerate(questions)
        ]
        write(partial / f"snli_ve/flickr30k-images/{1_000_000 + i}.jpg", jpeg)
        hypotheses = snli_ve_lines(str(1_000_000 + i), captions[0], hypotheses_of(scene, rng))
        lines[f"snli_ve/snli_ve_{DEV[split]}.jsonl"] += hypotheses
    for name, rows in lines.items():
        write(partial / name, "".join(json.dumps(line) + "\n" for line in rows).encode())
    counts = Counter({name: len(rows) for name, rows in lines.items()})
    about = {"source": "scenes", "seed": seed, "num": num, "size": size, "lines": dict(counts)}
    write(partial / "about.json", (json.dumps(about, indent=2) + "\n").encode())
    partial.rename(out)
    return counts


def write(path: Path, content: bytes) -> None:
    """Write a file and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def as_jpeg(picture: Image.Image) -> bytes:
    """Encode a picture as JPEG without chroma subsampling, which would blur thin stripes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def vcr_line(
    item: dict[str, Any], scene: Scene, name: str, split: str, *, image: int, number: int, index: int
) -> dict[str, Any]:
    """Return a line of VCR with all keys of the published files, and `category`.

    Args:
        item: question, choices and labels of `questions_of`.
        scene: the scene of the picture.
        name: picture without suffix.
        split: split of VCR.
        image: number of the picture.
        number: number of the question within the picture.
        index: number of the line within the split.
    """
    objects = [thing["shape"] for thing in scene["objects"]]
    answer = item["answer_choices"][item["answer_label"]]
    rationale = item["rationale_choices"][item["rationale_label"]]
    return {
        "movie": name.split("/")[0],
        "objects": objects,
        "interesting_scores": [0],
        "answer_likelihood": "likely",
        "img_fn": f"{name}.jpg",
        "metadata_fn": f"{name}.json",
        "answer_orig": as_written(answer),
        "question_orig": as_written(item["question"]),
        "rationale_orig": as_written(rationale),
        "question": item["question"],
        "answer_match_iter": [0, 1, 2, 3],
        "answer_sources": [index] * 4,
        "answer_choices": item["answer_choices"],
        "answer_label": item["answer_label"],
        "rationale_choices": item["rationale_choices"],
        "rationale_sources": [index] * 4,
        "rationale_match_iter": [0, 1, 2, 3],
        "rationale_label": item["rationale_label"],
        "img_id": f"{split}-{image}",
        "question_number": number,
        "annot_id": f"{split}-{index}",
        "match_fold": f"{split}-{image % 10}",
        "match_index": index,
        "category": item["category"],
    }


def as_written(tokens: Tokens) -> str:
    """Return tokens as the text of an annotator, who refers to objects by numbers from 1."""
    words = [
        token if isinstance(token, str) else " and ".join(str(index + 1) for index in token)
        for token in tokens
    ]
    return " ".join(words).replace(" .", ".").replace(" ?", "?")


def metadata(scene: Scene, size: int) -> dict[str, Any]:
    """Return the content of VCR's metadata file: boxes with a score, polygons, names and size, in pixels."""
    polygons = [polygon(thing, size) for thing in scene["objects"]]
    boxes = [
        [*map(min, zip(*points, strict=True)), *map(max, zip(*points, strict=True)), 1.0]
        for points in polygons
    ]
    return {
        "boxes": boxes,
        "segms": [[points] for points in polygons],
        "names": [thing["shape"] for thing in scene["objects"]],
        "width": size,
        "height": size,
    }


def polygon(thing: Thing, size: int) -> list[list[float]]:
    """Return the (outer) outline of an object in pixels."""
    radius = prepare_scenes.SIZES[thing["size"]] / 2
    if thing["shape"] in ("circle", "ring"):
        points = [(math.cos(math.pi * k / 16), math.sin(math.pi * k / 16)) for k in range(32)]
    else:
        points = prepare_scenes.outline(thing["shape"])
    x, y = thing["center"]
    return [[round((x + px * radius) * size, 2), round((y + py * radius) * size, 2)] for px, py in points]


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--num", type=int, default=3000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of a picture in pixels")
    parser.add_argument("--test", type=float, default=0.15, help="fraction of descriptions to hold out")
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    if options.num < 1 or options.size < 32 or not 0 <= options.test < 1:
        print("error: give --num 1 or more, --size 32 or more, and --test in [0, 1)", file=sys.stderr)
        return 2
    counts = write_tasks(options.out, options.num, seed=options.seed, size=options.size, test=options.test)
    for name, count in counts.items():
        print(f"{options.out / name}: {count} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
