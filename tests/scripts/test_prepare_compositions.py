"""Scenes as Winoground and ARO: each caption fits its picture and not the other one, with the same words."""

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


def things_described(words: str, scene: dict) -> list[dict]:
    """Return the objects that have every attribute in a phrase. Omitted attributes may have any value."""
    *adjectives, shape = words.split()
    attributes = {next(key for key in KNOWN if word in KNOWN[key]): word for word in adjectives} | {
        "shape": shape
    }
    return [thing for thing in scene["objects"] if attributes.items() <= thing.items()]


def related(first: dict, relation: str, second: dict) -> bool:
    """Return whether a relation holds. A borderline case fails the test."""
    step = scenes.RELATIONS[relation]
    away = sum(s * (a - b) for s, a, b in zip(step, first["center"], second["center"], strict=True))
    assert away > 0.4 or away < 0.13, away
    return away > 0.4


def true_of(caption: str, scene: dict) -> bool:
    """Return whether a caption is true, by an independent parser for all templates."""
    text = caption.lower().rstrip(".")
    claims: list[tuple[str, str, str]] = []
    if match := re.fullmatch(rf"{PHRASE} (?:is )?{RELATION} {PHRASE}", text):
        claims = [match.groups()]
    elif match := re.fullmatch(rf"{RELATION} {PHRASE} is {PHRASE}", text):
        claims = [(match[3], match[1], match[2])]
    elif match := re.fullmatch(rf"{PHRASE} is {RELATION} {PHRASE} and {RELATION} {PHRASE}", text):
        claims = [(match[1], match[2], match[3]), (match[1], match[4], match[5])]
    elif match := re.fullmatch(rf"{PHRASE} is {RELATION} {PHRASE} and {PHRASE} is {RELATION} {PHRASE}", text):
        claims = [match.groups()[:3], match.groups()[3:]]
    elif match := re.fullmatch(r"the (\w+) is (\w+) and the (\w+) is (\w+)", text):
        return all(things_described(f"{match[k + 1]} {match[k]}", scene) for k in (1, 3))
    elif match := re.fullmatch(rf"{PHRASE} and {PHRASE}", text):
        return all(things_described(words, scene) for words in match.groups())
    assert claims, caption
    answers = []
    for first, relation, second in claims:
        firsts, seconds = things_described(first, scene), things_described(second, scene)
        assert max(len(firsts), len(seconds)) <= 1, caption
        answers.append(bool(firsts and seconds) and related(firsts[0], relation, seconds[0]))
    return all(answers)


def test_the_parser_of_captions_rejects_false_ones():
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
        assert max(map(len, words)) <= 21
        for k in (0, 1):
            assert [true_of(caption, pair.scenes[k]) for caption in pair.captions] == [k == 0, k == 1], pair
        nouns, relations = (
            [[word for word in caption if (word in relation_words) == wanted] for caption in words]
            for wanted in (False, True)
            for relation_words in [{"left", "right", "of", "above", "below"}]
        )
        assert (nouns[0] != nouns[1]) == (named.tag != "Relation")
        moved = relations[0] != relations[1] or words[1][0] not in ("a", "an", "the")
        assert moved == (named.tag != "Object")
        predicates = sum(word == "is" for word in words[0]) if pair.note == "" else 2
        assert named.predicates == max(predicates, 1)
        sides = [sorted(thing["size"] for thing in scene["objects"]) for scene in pair.scenes]
        assert sides[0] == sides[1]
        assert pair.scenes[0]["background"] == pair.scenes[1]["background"]
    combinations = {(kind.tag, kind.predicates) for kind in swaps.KINDS}
    assert combinations == {(tag, preds) for tag in ("Object", "Relation", "Both") for preds in (1, 2)}


def test_true_captions_of_aro_fit_the_crop_and_false_ones_the_rest():
    for kind in (compositions.relations, compositions.attributions):
        for right, wrong, line in kind(120, seed=5):
            captions = line["true_caption"], line["false_caption"]
            assert [true_of(caption, right) for caption in captions] == [True, False], line
            assert [true_of(caption, wrong) for caption in captions] == [False, True], line
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
    for line, (right, _, _) in zip(
        json.loads((aro / "visual_genome_relation.json").read_text()), drawn, strict=True
    ):
        picture = opened(aro / "images" / line["image_path"])
        x, y, width, height = (line[f"bbox_{key}"] for key in "xywh")
        crop = picture.crop((x, y, x + width, y + height))
        assert (picture.size, crop.size) == ((64, 64), (32, 32))
        assert crop.tobytes() == scenes.render(right, 32).tobytes()
    for name in ("coco_karpathy_test.json", "flickr30k_test.json"):
        for line in json.loads((aro / name).read_text()):
            assert len(line["caption"]) == 5
            assert opened(aro / line["image"]).size == (32, 32)
    about = json.loads((tmp_path / "a/about.json").read_text())
    assert set(about["descriptions"]) == compositions.descriptions(20, 1)
    assert compositions.descriptions(20, 1) != compositions.descriptions(20, 2)
