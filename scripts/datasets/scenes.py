"""Draw captioned scenes of simple shapes: any number of image-text pairs from a seed, without a download.

    python -m scripts.datasets.scenes --out data/scenes --num 2000 --seed 0

Uses: compositional tests (which attribute belongs to which object, which object is left of which), training data for a
tiny diffusion teacher, and a fallback for the demo data where there is no Debian mirror.
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

Thing = dict[str, Any]  # one object: shape, color, size, texture, center
Scene = dict[str, Any]  # objects (one or two things), relation, background

# Far apart in RGB, so that they can be distinguished at 64 pixels. White is excluded: the backgrounds are near-white.
COLORS = {
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
SIZES = {"small": 0.20, "medium": 0.30, "large": 0.42}  # longest side as a fraction of the canvas
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ((255, 255, 255), (240, 236, 225), (226, 236, 245), (232, 242, 228))
# Relation -> (unit step from the second object to the first, in image coordinates: y grows downwards).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PAIR = "pair"
OVERSAMPLING = 4  # PIL draws without antialiasing: draw four times as large and downsample


def class_names() -> dict[str, str]:
    """Return {class folder: words that fit "a picture of {}."}."""
    return {shape: f"a {shape}" for shape in SHAPES} | {PAIR: "two shapes"}


def generate(num: int, seed: int, size: int = 128) -> Iterator[tuple[Image.Image, list[str], str, Scene]]:
    """Yield (picture, captions, class, scene) tuples. Scene i depends only on the seed and i."""
    for i in range(num):
        rng = random.Random(f"{seed}-{i}")
        scene = draw_scene_values(rng)
        objects = scene["objects"]
        label = objects[0]["shape"] if len(objects) == 1 else PAIR
        yield render(scene, size), captions_of(scene, rng), label, scene


def draw_scene_values(rng: random.Random) -> Scene:
    """Sample the content of a scene: one object, or two objects with a relation and a different shape or color."""
    first = random_object(rng)
    background = rng.randrange(len(BACKGROUNDS))
    if rng.random() < 0.5:
        first["center"] = [rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)]
        return {"objects": [first], "relation": None, "background": background}
    second = random_object(rng)
    while (second["shape"], second["color"]) == (first["shape"], first["color"]):
        second = random_object(rng)  # otherwise the caption would be ambiguous
    relation = rng.choice(sorted(RELATIONS))
    place_two(first, second, relation, rng)
    return {"objects": [first, second], "relation": relation, "background": background}


def random_object(rng: random.Random) -> Thing:
    """Sample an object without a center."""
    return {
        "shape": rng.choice(SHAPES),
        "color": rng.choice(sorted(COLORS)),
        "size": rng.choice(sorted(SIZES)),
        "texture": rng.choice(TEXTURES),
    }


def place_two(first: Thing, second: Thing, relation: str, rng: random.Random) -> None:
    """Set both centers so that the relation holds along its axis and the objects do not touch."""
    step_x, step_y = RELATIONS[relation]
    # Half the distance between the centers: 0.5 > 0.42, so two large objects do not touch
    apart = 0.25 + rng.uniform(-0.01, 0.03)
    # Offset along the other axis, small compared to `apart`: no second relation holds
    jitter = rng.uniform(-0.06, 0.06)
    across = (jitter if step_x == 0 else 0.0, jitter if step_y == 0 else 0.0)
    first["center"] = [0.5 + apart * step_x + across[0], 0.5 + apart * step_y + across[1]]
    second["center"] = [0.5 - apart * step_x - across[0], 0.5 - apart * step_y - across[1]]


def describe(thing: Thing, *, full: bool = True) -> str:
    """Describe an object in words. A plain texture and a medium size are omitted."""
    words = [thing["size"]] if full and thing["size"] != "medium" else []
    words += [thing["texture"]] if full and thing["texture"] != "plain" else []
    return " ".join([*words, thing["color"], thing["shape"]])


def article(words: str) -> str:
    """Prefix words with "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions_of(scene: Scene, rng: random.Random) -> list[str]:
    """Return two true captions with different phrasings. The first one names every attribute."""
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
    """Return the inverse relation."""
    step = RELATIONS[relation]
    return next(name for name, other in RELATIONS.items() if other == (-step[0], -step[1]))


def capital(sentence: str) -> str:
    """Capitalize the first letter of a sentence."""
    return sentence[0].upper() + sentence[1:]


def description_key(scene: Scene) -> str:
    """Return a key of the scene without exact positions: scenes with equivalent first captions share a key."""
    things = [
        f"{thing['size']} {thing['texture']} {thing['color']} {thing['shape']}" for thing in scene["objects"]
    ]
    if len(things) == 2 and scene["relation"] in ("right of", "below"):
        return f"{things[1]} {opposite_of(scene['relation'])} {things[0]}"  # "B left of A" is "A right of B"
    return f" {scene['relation']} ".join(things)


# --- drawing ------------------------------------------------------------------------------------


def render(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as an RGB picture of size x size pixels."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    for thing in scene["objects"]:
        mask = Image.new("L", (side, side), 0)
        draw_shape(ImageDraw.Draw(mask), thing, side)
        canvas.paste(texture(thing, side), (0, 0), mask)
    return canvas.resize((size, size), Image.Resampling.BOX)


def draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    """Fill the outline of an object with 255."""
    radius = SIZES[thing["size"]] / 2 * side
    x, y = (value * side for value in thing["center"])
    shape = thing["shape"]
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    draw.polygon([(x + px * radius, y + py * radius) for px, py in outline(shape)], fill=255)


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in [-1, 1] x [-1, 1], y pointing down."""
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
    """Rotate a point about the origin by quarter turns."""
    x, y = point
    for _ in range(turns):
        x, y = -y, x
    return x, y


def texture(thing: Thing, side: int) -> Image.Image:
    """Return a canvas in the color of the object, with its texture drawn in a lighter tone."""
    color = COLORS[thing["color"]]
    canvas = Image.new("RGB", (side, side), color)
    if thing["texture"] == "plain":
        return canvas
    light = tuple(value + (255 - value) * 2 // 3 for value in color)
    draw = ImageDraw.Draw(canvas)
    period = side // 16  # relative to the canvas: a small striped star still shows three stripes
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


# --- the image folder: also used by scripts/datasets/demo/prepare.py --------------------------------


def write_pair(folder: Path, name: str, picture: bytes, captions: list[str], *, suffix: str) -> None:
    """Write folder/name.suffix and folder/name.txt with one caption per line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.{suffix}").write_bytes(picture)
    (folder / f"{name}.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")


def as_png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG. Scenes also train a diffusion model, which would learn JPEG artifacts."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_class_names(out: Path, names: dict[str, str]) -> None:
    """Write classnames.txt for the classes that have a folder in train/."""
    lines = [
        f"{label}\t{words}\n" for label, words in sorted(names.items()) if (out / "train" / label).is_dir()
    ]
    (out / "classnames.txt").write_text("".join(lines), encoding="utf-8")


def held_out(scene: Scene, *, seed: int, test: float) -> bool:
    """Return whether a scene is a test scene. The split depends on the description, so the splits share none."""
    digest = hashlib.sha256(f"{seed} {description_key(scene)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test * 2**64


def write_scenes(out: Path, num: int, *, seed: int = 0, size: int = 128, test: float = 0.15) -> Counter[str]:
    """Write train/<class>/ and test/<class>/ below `out` and return the number of pictures per split."""
    counts: Counter[str] = Counter()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scenes = track(generate(num, seed, size), total=num, description="drawing")
    for i, (picture, captions, label, scene) in enumerate(scenes):
        split = "test" if held_out(scene, seed=seed, test=test) else "train"
        write_pair(partial / split / label, f"scene_{i:06d}", as_png(picture), captions, suffix="png")
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
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--num", type=int, default=2000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument("--test", type=float, default=0.15, help="fraction of descriptions to hold out")
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
