"""Draws captioned scenes of simple shapes: any number of image-text pairs, from a seed, with no download.

Not a stand-in for photographs: it is for compositional tests (which attribute belongs to which object, what
is left of what), for training a tiny diffusion teacher, and as a fallback where there is no Debian mirror.

    python -m scripts.datasets.scenes --out data/scenes --num 2000 --seed 0
"""

import argparse
import hashlib
import io
import json
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.progress import track

# Far apart in RGB, so that no two are confused at 64 pixels; no white, which the backgrounds come close to.
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (245, 215, 20),
    "green": (40, 150, 60),
    "blue": (35, 85, 215),
    "purple": (130, 50, 170),
    "pink": (250, 130, 190),
    "brown": (120, 72, 40),
    "gray": (125, 125, 125),
    "cyan": (30, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "rectangle", "diamond", "hexagon")
SIZES = {"small": 0.20, "medium": 0.30, "large": 0.42}  # longest side as a part of the canvas
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ((255, 255, 255), (240, 236, 225), (226, 236, 245), (232, 242, 228))
# Relation -> (unit step from the second object to the first, in image coordinates: y grows downwards).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PAIR = "pair"
OVERSAMPLING = 4  # PIL draws without antialiasing, so draw four times as large and shrink


def class_names() -> dict[str, str]:
    """Folder -> words that fit "a picture of {}."."""
    return {shape: f"a {shape}" for shape in SHAPES} | {PAIR: "two shapes"}


def generate(
    num: int, seed: int, size: int = 128
) -> Iterator[tuple[Image.Image, list[str], str, dict[str, Any]]]:
    """Yields (picture, captions, class, scene); scene i depends on the seed and i alone."""
    for i in range(num):
        rng = random.Random(f"{seed}-{i}")
        scene = draw_scene_values(rng)
        objects = scene["objects"]
        label = objects[0]["shape"] if len(objects) == 1 else PAIR
        yield render(scene, size), captions_of(scene, rng), label, scene


def draw_scene_values(rng: random.Random) -> dict[str, Any]:
    """Chooses what is in a scene: one object, or two that differ in shape or colour, with their relation."""
    first = random_object(rng)
    background = rng.randrange(len(BACKGROUNDS))
    if rng.random() < 0.5:
        first["centre"] = [rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)]
        return {"objects": [first], "relation": None, "background": background}
    second = random_object(rng)
    while (second["shape"], second["colour"]) == (first["shape"], first["colour"]):
        second = random_object(rng)  # otherwise the caption would not tell which is which
    relation = rng.choice(sorted(RELATIONS))
    place_two(first, second, relation, rng)
    return {"objects": [first, second], "relation": relation, "background": background}


def random_object(rng: random.Random) -> dict[str, Any]:
    """One object without a place."""
    return {
        "shape": rng.choice(SHAPES),
        "colour": rng.choice(sorted(COLOURS)),
        "size": rng.choice(sorted(SIZES)),
        "texture": rng.choice(TEXTURES),
    }


def place_two(first: dict, second: dict, relation: str, rng: random.Random) -> None:
    """Sets both centres so that the relation holds on its axis and the objects never touch."""
    step_x, step_y = RELATIONS[relation]
    apart = 0.25 + rng.uniform(
        -0.01, 0.03
    )  # half the distance: 0.5 > 0.42, two large ones stay clear of each other
    jitter = rng.uniform(
        -0.06, 0.06
    )  # across the axis; small beside `apart`, so that no second relation comes true
    across = (jitter if step_x == 0 else 0.0, jitter if step_y == 0 else 0.0)
    first["centre"] = [0.5 + apart * step_x + across[0], 0.5 + apart * step_y + across[1]]
    second["centre"] = [0.5 - apart * step_x - across[0], 0.5 - apart * step_y - across[1]]


def describe(thing: dict, *, full: bool = True) -> str:
    """The object in words; a plain texture and a medium size go unsaid, as a person would leave them out."""
    words = [thing["size"]] if full and thing["size"] != "medium" else []
    words += [thing["texture"]] if full and thing["texture"] != "plain" else []
    return " ".join([*words, thing["colour"], thing["shape"]])


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions_of(scene: dict, rng: random.Random) -> list[str]:
    """Two true captions in different phrasings; the first always names everything that can be named."""
    objects = scene["objects"]
    if len(objects) == 1:
        thing = article(describe(objects[0]))
        short = describe(objects[0], full=False)
        others = [f"There is {thing} in the picture.", f"The {short}.", f"A picture of {article(short)}."]
        return [capital(f"{thing}."), rng.choice(others)]
    first, second = (article(describe(thing)) for thing in objects)
    short_first, short_second = (describe(thing, full=False) for thing in objects)
    relation, opposite = scene["relation"], opposite_of(scene["relation"])
    others = [
        f"{second} is {opposite} {first}.",
        f"The {short_first} is {relation} the {short_second}.",
        f"The {short_second} is {opposite} the {short_first}.",
    ]
    return [capital(f"{first} {relation} {second}."), capital(rng.choice(others))]


def opposite_of(relation: str) -> str:
    """The relation seen from the other object."""
    step = RELATIONS[relation]
    return next(name for name, other in RELATIONS.items() if other == (-step[0], -step[1]))


def capital(sentence: str) -> str:
    """The sentence with a capital first letter, the rest untouched."""
    return sentence[0].upper() + sentence[1:]


def description_key(scene: dict) -> str:
    """What the scene says, without exact places: scenes with the same first caption have the same key."""
    things = [
        f"{thing['size']} {thing['texture']} {thing['colour']} {thing['shape']}" for thing in scene["objects"]
    ]
    if len(things) == 2 and scene["relation"] in ("right of", "below"):
        return f"{things[1]} {opposite_of(scene['relation'])} {things[0]}"  # "B left of A" is "A right of B"
    return f" {scene['relation']} ".join(things)


# --- drawing ------------------------------------------------------------------------------------


def render(scene: dict, size: int) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    for thing in scene["objects"]:
        mask = Image.new("L", (side, side), 0)
        draw_shape(ImageDraw.Draw(mask), thing, side)
        canvas.paste(texture(thing, side), (0, 0), mask)
    return canvas.resize((size, size), Image.Resampling.BOX)


def draw_shape(draw: ImageDraw.ImageDraw, thing: dict, side: int) -> None:
    """Fills the object's outline with 255."""
    radius = SIZES[thing["size"]] / 2 * side
    x, y = (value * side for value in thing["centre"])
    shape = thing["shape"]
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    draw.polygon([(x + px * radius, y + py * radius) for px, py in outline(shape)], fill=255)


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in [-1, 1] x [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "rectangle":
        return [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)]
    if shape == "diamond":
        return [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.8), (-1, 0.8)]
    if shape == "hexagon":
        return [(math.cos(math.pi * k / 3), math.sin(math.pi * k / 3)) for k in range(6)]
    if shape == "star":
        radii = (1.0, 0.42)
        angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        return [(radii[k % 2] * math.cos(a), radii[k % 2] * math.sin(a)) for k, a in enumerate(angles)]
    if shape == "cross":
        arm = 0.34
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm)]
        return [point for turn in range(4) for point in (rotate(corner, turn) for corner in quarter)]
    assert shape == "heart", shape
    angles = [2 * math.pi * k / 60 for k in range(60)]
    curve = [
        (16 * math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) for a in angles
    ]
    return [(x / 17, -(y - math.cos(4 * a)) / 17) for (x, y), a in zip(curve, angles, strict=True)]


def rotate(point: tuple[float, float], turns: int) -> tuple[float, float]:
    """The point after `turns` quarter turns about the origin."""
    x, y = point
    for _ in range(turns):
        x, y = -y, x
    return x, y


def texture(thing: dict, side: int) -> Image.Image:
    """A canvas of the object's colour; a texture is drawn over it in a lighter tone of the same colour."""
    colour = COLOURS[thing["colour"]]
    canvas = Image.new("RGB", (side, side), colour)
    if thing["texture"] == "plain":
        return canvas
    light = tuple(value + (255 - value) * 2 // 3 for value in colour)
    draw = ImageDraw.Draw(canvas)
    period = (
        side // 16
    )  # in pixels of the canvas, not of the object: a small striped star still shows three stripes
    for i, left in enumerate(range(0, side, period)):
        if thing["texture"] == "striped":
            draw.rectangle((left, 0, left + period // 2, side), fill=light)
            continue
        for j, top in enumerate(range(0, side, period)):
            box = (left, top, left + period - 1, top + period - 1)
            if thing["texture"] == "dotted":
                inset = period // 4
                draw.ellipse((box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset), fill=light)
            elif (i + j) % 2:
                draw.rectangle(box, fill=light)
    return canvas


# --- the image folder: also used by prepare_demo ----------------------------------------------------


def write_pair(folder: Path, name: str, picture: bytes, captions: list[str], *, suffix: str) -> None:
    """Writes folder/name.suffix and folder/name.txt, one caption per line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.{suffix}").write_bytes(picture)
    (folder / f"{name}.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")


def as_png(picture: Image.Image) -> bytes:
    """Lossless: scenes also train a diffusion model, which would learn the blocks of a JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_class_names(out: Path, names: dict[str, str]) -> None:
    """Writes classnames.txt for the classes that have a folder in train/."""
    lines = [
        f"{label}\t{words}\n" for label, words in sorted(names.items()) if (out / "train" / label).is_dir()
    ]
    (out / "classnames.txt").write_text("".join(lines), encoding="utf-8")


def held_out(scene: dict, *, seed: int, test: float) -> bool:
    """Whether a scene is a test scene: decided by what it says, so that no description is in both splits."""
    digest = hashlib.sha256(f"{seed} {description_key(scene)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test * 2**64


def write_scenes(out: Path, num: int, *, seed: int = 0, size: int = 128, test: float = 0.15) -> Counter:
    """Writes train/<class>/ and test/<class>/ under `out`; returns the number of pictures per split."""
    counts: Counter = Counter()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scenes = track(generate(num, seed, size), total=num, description="drawing")
    for i, (picture, captions, label, scene) in enumerate(scenes):
        split = "test" if held_out(scene, seed=seed, test=test) else "train"
        buffer = io.BytesIO()
        picture.save(
            buffer, "PNG"
        )  # lossless: these also train a diffusion model, which would learn JPEG's blocks
        write_pair(partial / split / label, f"scene_{i:06d}", buffer.getvalue(), captions, suffix="png")
        counts[split] += 1
    write_class_names(partial, class_names())
    about = {
        "source": "scenes",
        "seed": seed,
        "num": num,
        "size": size,
        "counts": dict(sorted(counts.items())),
    }
    (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.rename(out)
    return counts


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--num", type=int, default=2000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument("--test", type=float, default=0.15, help="part of the descriptions held out")
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    if options.num < 1 or options.size < 32 or not 0 <= options.test < 1:
        print("error: give --num 1 or more, --size 32 or more, and --test in [0, 1)", file=sys.stderr)
        return 2
    counts = write_scenes(options.out, options.num, seed=options.seed, size=options.size, test=options.test)
    print(f"{options.out}: {counts['train']} train and {counts['test']} test pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
