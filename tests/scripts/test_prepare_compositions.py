"""Scenes as Winoground and ARO: each caption true of its picture and false of the other, in the same words."""

import importlib
import json
import re
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

scenes = importlib.import_module("scripts.datasets.scenes")
swaps = importlib.import_module("scripts.datasets.scene_swaps")
compositions = importlib.import_module("scripts.datasets.scene_winoground_aro")

KNOWN = {"size": set(scenes.SIZES), "texture": set(scenes.TEXTURES), "color": set(scenes.COLORS)}
ADJECTIVES = "|".join(sorted(set().union(*KNOWN.values())))
PHRASE = rf"(?:an?|the) ((?:(?:{ADJECTIVES}) )*(?:{'|'.join(scenes.SHAPES)}))"
RELATION = "(left of|right of|above|below)"


def things_told(words: str, scene: dict) -> list[dict]:
    """The scene's objects that have every attribute told of them; what goes unsaid is open."""
    *said, shape = words.split()
    told = {next(key for key in KNOWN if word in KNOWN[key]): word for word in said} | {"shape": shape}
    return [thing for thing in scene["objects"] if told.items() <= thing.items()]


def related(first: dict, relation: str, second: dict) -> bool:
    """From the centers alone; a relation that nearly holds fails the test that asks."""
    step = scenes.RELATIONS[relation]
    away = sum(s * (a - b) for s, a, b in zip(step, first["center"], second["center"], strict=True))
    assert away > 0.4 or away < 0.13, away
    return away > 0.4


def true_of(caption: str, scene: dict) -> bool:
    """A reader of its own for all that the captions may say."""
    text = caption.lower().rstrip(".")
    claims: list[tuple[str, str, str]] = []
    if found := re.fullmatch(rf"{PHRASE} (?:is )?{RELATION} {PHRASE}", text):
        claims = [found.groups()]
    elif found := re.fullmatch(rf"{RELATION} {PHRASE} is {PHRASE}", text):
        claims = [(found[3], found[1], found[2])]
    elif found := re.fullmatch(rf"{PHRASE} is {RELATION} {PHRASE} and {RELATION} {PHRASE}", text):
        claims = [(found[1], found[2], found[3]), (found[1], found[4], found[5])]
    elif found := re.fullmatch(rf"{PHRASE} is {RELATION} {PHRASE} and {PHRASE} is {RELATION} {PHRASE}", text):
        claims = [found.groups()[:3], found.groups()[3:]]
    elif found := re.fullmatch(r"the (\w+) is (\w+) and the (\w+) is (\w+)", text):
        return all(things_told(f"{found[k + 1]} {found[k]}", scene) for k in (1, 3))
    elif found := re.fullmatch(rf"{PHRASE} and {PHRASE}", text):
        return all(things_told(words, scene) for words in found.groups())
    assert claims, caption
    answers = []
    for first, relation, second in claims:
        firsts, seconds = things_told(first, scene), things_told(second, scene)
        assert max(len(firsts), len(seconds)) <= 1, caption
        answers.append(bool(firsts and seconds) and related(firsts[0], relation, seconds[0]))
    return all(answers)


def test_the_reader_of_captions_can_say_no():
    thing = {"shape": "circle", "color": "red", "size": "small", "texture": "plain", "center": [0.25, 0.5]}
    other = {"shape": "star", "color": "blue", "size": "medium", "texture": "dotted", "center": [0.75, 0.5]}
    scene = {"objects": [thing, other]}
    assert true_of("A red circle left of a blue star.", scene)
    assert true_of("Right of the circle is a dotted star.", scene)
    for wrong in (
        "A red circle right of a blue star.",
        "A red circle above a blue star.",
        "The star is red and the circle is blue.",
        "A red star left of a blue circle.",
        "Left of the circle is a star.",
        "the large circle and the star",
    ):
        assert not true_of(wrong, scene), wrong


@pytest.mark.parametrize("kind", range(len(swaps.KINDS)))
def test_a_pair_has_the_same_words_and_each_picture_one_true_caption(kind):
    for turn in range(60):
        pair, named = swaps.pair(kind + turn * len(swaps.KINDS), seed=5)
        words = [re.findall(r"\w+", caption.lower()) for caption in pair.captions]
        assert sorted(words[0]) == sorted(words[1])
        assert words[0] != words[1]
        assert max(len(told) for told in words) <= 21
        for k in (0, 1):
            assert [true_of(caption, pair.scenes[k]) for caption in pair.captions] == [k == 0, k == 1], pair
        nouns, relations = (
            [[word for word in told if (word in relation_words) == wanted] for told in words]
            for wanted in (False, True)
            for relation_words in [{"left", "right", "of", "above", "below"}]
        )
        assert (nouns[0] != nouns[1]) == (named.tag != "Relation")
        moved = relations[0] != relations[1] or words[1][0] not in ("a", "an", "the")
        assert moved == (named.tag != "Object")
        told = sum(word == "is" for word in words[0]) if pair.note == "" else 2
        assert named.predicates == max(told, 1)
        sides = [sorted(thing["size"] for thing in scene["objects"]) for scene in pair.scenes]
        assert sides[0] == sides[1]
        assert pair.scenes[0]["background"] == pair.scenes[1]["background"]
    combinations = {(found.tag, found.predicates) for found in swaps.KINDS}
    assert combinations == {(tag, preds) for tag in ("Object", "Relation", "Both") for preds in (1, 2)}


def test_aro_asks_of_the_crop_what_the_rest_contradicts():
    for kind in (compositions.relations, compositions.attributions):
        for told, other, line in kind(120, seed=5):
            captions = line["true_caption"], line["false_caption"]
            assert [true_of(caption, told) for caption in captions] == [True, False], line
            assert [true_of(caption, other) for caption in captions] == [False, True], line
            assert sorted(captions[0].split()) == sorted(captions[1].split())
    pairs = Counter(tuple(line["attributes"]) for _, _, line in compositions.attributions(200, seed=5))
    assert min(pairs.values()) >= 25  # ARO's macro average leaves rarer pairs out


def test_five_true_captions_of_every_ordered_picture():
    for name in ("coco", "flickr"):
        for scene, captions in compositions.captioned(name, 60, seed=5):
            assert len(set(captions)) == 5
            assert all(true_of(caption, scene) for caption in captions), captions


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def test_the_files_are_those_of_the_published_sets(tmp_path):
    compositions.write_compositions(tmp_path / "a", 20, seed=1, size=32)
    compositions.write_compositions(tmp_path / "b", 20, seed=1, size=32)
    paths = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.is_file()]
    assert len(paths) == 3 + 4 + 2 * 20 + 2 * 4
    for path in paths:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    lines = [
        json.loads(line) for line in (tmp_path / "a/winoground/data/examples.jsonl").read_text().splitlines()
    ]
    assert [line["id"] for line in lines] == list(range(20))
    with zipfile.ZipFile(tmp_path / "a/winoground/data/images.zip") as archive:
        for line in lines:
            pictures = [Image.open(BytesIO(archive.read(f"images/{line[f'image_{k}']}.png"))) for k in (0, 1)]
            assert pictures[0].size == pictures[1].size == (32, 32)
            assert pictures[0].tobytes() != pictures[1].tobytes()
    aro = tmp_path / "a/aro"
    drawn = list(compositions.relations(20, 1))
    for line, (told, _, _) in zip(
        json.loads((aro / "visual_genome_relation.json").read_text()), drawn, strict=True
    ):
        picture = opened(aro / "images" / line["image_path"])
        x, y, width, height = (line[f"bbox_{key}"] for key in "xywh")
        crop = picture.crop((x, y, x + width, y + height))
        assert (picture.size, crop.size) == ((64, 64), (32, 32))
        assert crop.tobytes() == scenes.render(told, 32).tobytes()
    for name in ("coco_karpathy_test.json", "flickr30k_test.json"):
        for line in json.loads((aro / name).read_text()):
            assert len(line["caption"]) == 5
            assert opened(aro / line["image"]).size == (32, 32)
    about = json.loads((tmp_path / "a/about.json").read_text())
    assert set(about["descriptions"]) == compositions.descriptions(20, 1)
    assert compositions.descriptions(20, 1) != compositions.descriptions(20, 2)
