"""Write drawn scenes as Winoground and ARO data sets in the published file formats, from a seed, without a download.

    python -m scripts.datasets.scene_winoground_aro --out data/compositions --num 400 --seed 1

Writes `winoground/data/examples.jsonl` with `images.zip`; `aro/visual_genome_relation.json` and `..._attribution.json`
with `aro/images/`, where the crop shows the two objects of the caption and the rest of the picture shows them swapped;
`aro/coco_karpathy_test.json` and `aro/flickr30k_test.json` with five captions per picture. The sets pose the questions
of Winoground and ARO with the words and shapes that a tiny model trained on `scenes` has seen; they are not a benchmark.
"""

import argparse
import io
import json
import random
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from scripts.datasets.scene_swaps import centers_of, draw_things, pair, scene_of, swapped
from scripts.datasets.scenes import (
    BACKGROUNDS,
    RELATIONS,
    Scene,
    article,
    as_png,
    capital,
    describe,
    description_key,
    opposite_of,
    render,
)

# Few pairs, so that 200 examples contain 25 of each: ARO's mean over attribute pairs excludes rarer pairs.
ATTRIBUTES = (
    ("color", "red", "blue"),
    ("color", "green", "pink"),
    ("color", "yellow", "purple"),
    ("color", "orange", "cyan"),
    ("color", "brown", "gray"),
    ("color", "blue", "yellow"),
    ("texture", "striped", "dotted"),
    ("size", "small", "large"),
)
EPOCH = (1980, 1, 1, 0, 0, 0)  # constant time of the zip members, so that the bytes depend only on the seed


# --- content of the sets: scenes and captions -----------------------------------------------------


def relations(num: int, seed: int) -> Iterator[tuple[Scene, Scene, dict[str, Any]]]:
    """Yield the scene of the crop, a scene that the false caption describes, and the line of ARO's relation set."""
    for i in range(num):
        rng = random.Random(f"relation {seed}-{i}")
        first, second = draw_things(rng, 2, short=True)
        relation, background = sorted(RELATIONS)[i % len(RELATIONS)], rng.randrange(len(BACKGROUNDS))
        right, wrong = (
            scene_of(things, centers_of(relation, rng), relation, background)
            for things in ([first, second], [second, first])
        )
        template = f"the {{}} is {relation} the {{}}"
        line = {
            "true_caption": template.format(describe(first), describe(second)),
            "false_caption": template.format(describe(second), describe(first)),
            "relation_name": relation,
        }
        yield right, wrong, line


def attributions(num: int, seed: int) -> Iterator[tuple[Scene, Scene, dict[str, Any]]]:
    """Yield the same as `relations` for ARO's attribution set: the objects exchange an attribute."""
    for i in range(num):
        rng = random.Random(f"attribution {seed}-{i}")
        key, *values = ATTRIBUTES[i % len(ATTRIBUTES)]
        first, second = draw_things(rng, 2, short=True)
        first[key], second[key] = values
        relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
        right, wrong = (
            scene_of(list(things), centers_of(relation, rng), relation, background)
            for things in ((first, second), swapped(first, second, key))
        )
        names = first["shape"], second["shape"]
        line = {
            "true_caption": f"the {values[0]} {names[0]} and the {values[1]} {names[1]}",
            "false_caption": f"the {values[1]} {names[0]} and the {values[0]} {names[1]}",
            "attributes": values,
            "obj1_name": names[0],
            "obj2_name": names[1],
        }
        yield right, wrong, line


def captioned(name: str, num: int, seed: int) -> Iterator[tuple[Scene, list[str]]]:
    """Yield scenes of two objects, each with five true captions."""
    for i in range(num):
        rng = random.Random(f"{name} {seed}-{i}")
        first, second = draw_things(rng, 2)
        relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
        opposite, (a, b) = opposite_of(relation), (article(describe(thing)) for thing in (first, second))
        short_a, short_b = (describe(thing, full=False) for thing in (first, second))
        captions = [
            f"{a} {relation} {b}.",
            f"{b} is {opposite} {a}.",
            f"{a} is {relation} {b}.",
            f"The {short_a} is {relation} the {short_b}.",
            f"The {short_b} is {opposite} the {short_a}.",
        ]
        scene = scene_of([first, second], centers_of(relation, rng), relation, background)
        yield scene, [capital(caption) for caption in captions]


def descriptions(num: int, seed: int) -> set[str]:
    """Return the `description_key` of every scene in the questions. Training sets exclude these scenes."""
    scenes = [scene for i in range(num) for scene in pair(i, seed)[0].scenes if scene["relation"]]
    scenes += [right for kind in (relations, attributions) for right, _, _ in kind(num, seed)]
    scenes += [scene for name in ("coco", "flickr") for scene, _ in captioned(name, pictures(num), seed)]
    return {description_key(scene) for scene in scenes}


def pictures(num: int) -> int:
    """Return the number of pictures of an order set: five captions per picture give `num` questions."""
    return max(1, num // 5)


# --- the files ------------------------------------------------------------------------------------


def write_winoground(folder: Path, num: int, *, seed: int, size: int) -> None:
    """Write data/examples.jsonl and data/images.zip, which contains images/ex_<id>_img_<0 or 1>.png."""
    data = folder / "data"
    data.mkdir(parents=True)
    with zipfile.ZipFile(data / "images.zip", "w") as archive, open(data / "examples.jsonl", "w") as lines:
        for i in track(range(num), "winoground"):
            example, kind = pair(i, seed)
            names = [f"ex_{i}_img_{k}" for k in (0, 1)]
            for name, scene in zip(names, example.scenes, strict=True):
                archive.writestr(zipfile.ZipInfo(f"images/{name}.png", EPOCH), as_png(render(scene, size)))
            line = {
                "id": i,
                "caption_0": example.captions[0],
                "caption_1": example.captions[1],
                "image_0": names[0],
                "image_1": names[1],
                "tag": example.tag,
                "secondary_tag": example.note,
                "num_main_preds": kind.predicates,
                "collapsed_tag": kind.tag,
            }
            lines.write(json.dumps(line) + "\n")


def write_aro(folder: Path, num: int, *, seed: int, size: int) -> None:
    """Write the four files of ARO and their pictures. Pictures with a crop are twice as wide and high as the crop."""
    (folder / "images").mkdir(parents=True)
    for kind, name in ((relations, "relation"), (attributions, "attribution")):
        lines = []
        for i, (right, wrong, line) in enumerate(track(kind(num, seed), f"aro {name}", num)):
            rng = random.Random(f"crop {name} {seed}-{i}")
            picture, box = with_crop(right, wrong, size, rng)
            path = f"{name}_{i:06d}.png"
            (folder / "images" / path).write_bytes(as_png(picture))
            lines.append({"image_id": i, "image_path": path, **box, **line})
        write_json(folder / f"visual_genome_{name}.json", lines)
    for name, path, pattern in (
        ("coco", "coco_karpathy_test.json", "val2014/COCO_val2014_{:012d}.jpg"),
        ("flickr", "flickr30k_test.json", "flickr30k-images/{}.jpg"),
    ):
        lines = []
        for i, (scene, captions) in enumerate(captioned(name, pictures(num), seed)):
            lines.append({"image": pattern.format(1_000_000 + i), "caption": captions})
            (folder / lines[-1]["image"]).parent.mkdir(exist_ok=True)
            (folder / lines[-1]["image"]).write_bytes(as_jpeg(render(scene, size)))
        write_json(folder / path, lines)


def with_crop(
    right: Scene, wrong: Scene, size: int, rng: random.Random
) -> tuple[Image.Image, dict[str, int]]:
    """Draw both scenes into random quarters of a picture; return it with the box of `right` in ARO's format."""
    quarters = [(x, y) for x in (0, size) for y in (0, size)]
    (x, y), wrong_corner = rng.sample(quarters, 2)
    canvas = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[right["background"]])
    canvas.paste(render(wrong, size), wrong_corner)
    canvas.paste(render(right, size), (x, y))
    return canvas, {"bbox_x": x, "bbox_y": y, "bbox_w": size, "bbox_h": size}


def as_jpeg(picture: Image.Image) -> bytes:
    """Encode a picture as JPEG without chroma subsampling, which would blur thin stripes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a JSON file that ends with a newline."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_compositions(out: Path, num: int, *, seed: int = 1, size: int = 64) -> None:
    """Write both folders below `out` atomically."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_winoground(partial / "winoground", num, seed=seed, size=size)
    write_aro(partial / "aro", num, seed=seed, size=size)
    about = {
        "source": "scenes",
        "seed": seed,
        "num": num,
        "size": size,
        "descriptions": sorted(descriptions(num, seed)),
    }
    write_json(partial / "about.json", about)
    partial.rename(out)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--num", type=int, default=400, help="examples of each set; Winoground has 400")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="side of a picture or of its crop in pixels")
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    if options.num < 1 or options.size < 32:
        print("error: give --num 1 or more and --size 32 or more", file=sys.stderr)
        return 2
    write_compositions(options.out, options.num, seed=options.seed, size=options.size)
    print(f"{options.out}: winoground and aro, {options.num} examples of each set")
    return 0


if __name__ == "__main__":
    sys.exit(main())
