"""Drawn scenes as a Winoground set and the four sets of ARO in those data sets' own files, from a seed, no download.

Not a benchmark: it asks what those ask, in words and of shapes that a tiny model trained on `prepare_scenes` knows.

    python -m scripts.datasets.scene_winoground_aro --out data/compositions --num 400 --seed 1

`winoground/data/examples.jsonl` with `images.zip`; `aro/visual_genome_relation.json` and `..._attribution.json` with
`aro/images/`, where a crop has the two objects told of and the rest of the picture has them the wrong way round;
`aro/coco_karpathy_test.json` and `aro/flickr30k_test.json`, five captions a picture.
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

from scripts.datasets.scene_swaps import centres_of, draw_things, pair, scene_of, swapped
from scripts.datasets.scenes import (
    BACKGROUNDS,
    RELATIONS,
    article,
    as_png,
    capital,
    describe,
    description_key,
    opposite_of,
    render,
)

# Few, so that 200 examples have 25 of each: ARO's mean over attribute pairs leaves rarer ones out.
ATTRIBUTES = (
    ("colour", "red", "blue"),
    ("colour", "green", "pink"),
    ("colour", "yellow", "purple"),
    ("colour", "orange", "cyan"),
    ("colour", "brown", "gray"),
    ("colour", "blue", "yellow"),
    ("texture", "striped", "dotted"),
    ("size", "small", "large"),
)
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's members have a time; a set of the same seed has the same bytes


# --- what is in the sets: scenes and captions -----------------------------------------------------


def relations(num: int, seed: int) -> Iterator[tuple[dict, dict, dict[str, Any]]]:
    """The scene of the crop, the one beside it of which the false caption is true, and ARO's line."""
    for i in range(num):
        rng = random.Random(f"relation {seed}-{i}")
        first, second = draw_things(rng, 2, short=True)
        relation, background = sorted(RELATIONS)[i % len(RELATIONS)], rng.randrange(len(BACKGROUNDS))
        told, other = (
            scene_of(things, centres_of(relation, rng), relation, background)
            for things in ([first, second], [second, first])
        )
        template = f"the {{}} is {relation} the {{}}"
        line = {
            "true_caption": template.format(describe(first), describe(second)),
            "false_caption": template.format(describe(second), describe(first)),
            "relation_name": relation,
        }
        yield told, other, line


def attributions(num: int, seed: int) -> Iterator[tuple[dict, dict, dict[str, Any]]]:
    """The same of attributes: both objects are there, with each other's."""
    for i in range(num):
        rng = random.Random(f"attribution {seed}-{i}")
        key, *values = ATTRIBUTES[i % len(ATTRIBUTES)]
        first, second = draw_things(rng, 2, short=True)
        first[key], second[key] = values
        relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
        told, other = (
            scene_of(list(things), centres_of(relation, rng), relation, background)
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
        yield told, other, line


def captioned(name: str, num: int, seed: int) -> Iterator[tuple[dict, list[str]]]:
    """Scenes of two objects, each with five captions that are true of it."""
    for i in range(num):
        rng = random.Random(f"{name} {seed}-{i}")
        first, second = draw_things(rng, 2)
        relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
        opposite, (one, two) = opposite_of(relation), (article(describe(thing)) for thing in (first, second))
        short_one, short_two = (describe(thing, full=False) for thing in (first, second))
        captions = [
            f"{one} {relation} {two}.",
            f"{two} is {opposite} {one}.",
            f"{one} is {relation} {two}.",
            f"The {short_one} is {relation} the {short_two}.",
            f"The {short_two} is {opposite} the {short_one}.",
        ]
        scene = scene_of([first, second], centres_of(relation, rng), relation, background)
        yield scene, [capital(caption) for caption in captions]


def descriptions(num: int, seed: int) -> set[str]:
    """The `description_key` of every scene that a model is asked about, for training sets to leave out."""
    scenes = [scene for i in range(num) for scene in pair(i, seed)[0].scenes if scene["relation"]]
    scenes += [told for kind in (relations, attributions) for told, _, _ in kind(num, seed)]
    scenes += [scene for name in ("coco", "flickr") for scene, _ in captioned(name, pictures(num), seed)]
    return {description_key(scene) for scene in scenes}


def pictures(num: int) -> int:
    """Pictures of an order set: five captions each make `num` questions."""
    return max(1, num // 5)


# --- the files ------------------------------------------------------------------------------------


def write_winoground(folder: Path, num: int, *, seed: int, size: int) -> None:
    """data/examples.jsonl and data/images.zip, which holds images/ex_<id>_img_<0 or 1>.png."""
    data = folder / "data"
    data.mkdir(parents=True)
    with zipfile.ZipFile(data / "images.zip", "w") as archive, open(data / "examples.jsonl", "w") as lines:
        for i in track(range(num), "winoground"):
            found, kind = pair(i, seed)
            names = [f"ex_{i}_img_{k}" for k in (0, 1)]
            for name, scene in zip(names, found.scenes, strict=True):
                archive.writestr(zipfile.ZipInfo(f"images/{name}.png", EPOCH), as_png(render(scene, size)))
            line = {
                "id": i,
                "caption_0": found.captions[0],
                "caption_1": found.captions[1],
                "image_0": names[0],
                "image_1": names[1],
                "tag": found.tag,
                "secondary_tag": found.note,
                "num_main_preds": kind.predicates,
                "collapsed_tag": kind.tag,
            }
            lines.write(json.dumps(line) + "\n")


def write_aro(folder: Path, num: int, *, seed: int, size: int) -> None:
    """ARO's four files and their pictures; those with a crop are twice as wide and high as it."""
    (folder / "images").mkdir(parents=True)
    for kind, name in ((relations, "relation"), (attributions, "attribution")):
        lines = []
        for i, (told, other, line) in enumerate(track(kind(num, seed), f"aro {name}", num)):
            rng = random.Random(f"crop {name} {seed}-{i}")
            picture, box = with_crop(told, other, size, rng)
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


def with_crop(told: dict, other: dict, size: int, rng: random.Random) -> tuple[Image.Image, dict[str, int]]:
    """Four quarters: `told` in one, `other` in another, two empty; and the box of the first as ARO writes it."""
    quarters = [(x, y) for x in (0, size) for y in (0, size)]
    (x, y), wrong = rng.sample(quarters, 2)
    canvas = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[told["background"]])
    canvas.paste(render(other, size), wrong)
    canvas.paste(render(told, size), (x, y))
    return canvas, {"bbox_x": x, "bbox_y": y, "bbox_w": size, "bbox_h": size}


def as_jpeg(picture: Image.Image) -> bytes:
    """COCO's and Flickr30K's pictures are JPEGs; full colour resolution, for thin stripes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_json(path: Path, content: Any) -> None:
    """A JSON file that ends with a newline."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_compositions(out: Path, num: int, *, seed: int = 1, size: int = 64) -> None:
    """Writes both folders below `out`, whole or not at all."""
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
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--num", type=int, default=400, help="examples of each set; Winoground has 400")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="side of a picture, or of its crop, in pixels")
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
