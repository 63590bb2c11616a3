"""Questions with four answers and four rationales about a drawn scene, in VCR's tokens. Not for writing files.

No choice can be told from the others without the picture. Its words are either four values of one fact, all equally
likely before one looks, or two facts in their four combinations, so that the right words are not said more often.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from scripts.datasets.scenes import COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES, article

Tokens = list[Any]  # words, and lists of places in `objects`
KEEP_ONE = 0.9  # of the scenes with one shape, for `count`: pairs of one shape are left out, which are one pair in ten
CATEGORIES = ("color", "texture", "size", "position", "shape", "count")


def usable(scene: dict) -> bool:
    """Objects go by their shape, so two of one shape would not be told apart."""
    shapes = [thing["shape"] for thing in scene["objects"]]
    return len(set(shapes)) == len(shapes)


def questions_of(scene: dict, rng: random.Random) -> list[dict[str, Any]]:
    """Two or three questions of different categories: tokens, choices with the right one's place, rationales."""
    asked = [name for name in CATEGORIES if _can_ask(name, scene, rng)]
    chosen = rng.sample(asked, min(len(asked), rng.choice((2, 3))))
    if "position" in asked and "position" not in chosen and rng.random() < 0.3:
        chosen[-1] = "position"  # only pairs can be asked for it
    return [_item(name, scene, rng) for name in chosen]


def _can_ask(name: str, scene: dict, rng: random.Random) -> bool:
    objects = scene["objects"]
    if name == "position":
        return len(objects) == 2
    if name == "shape":
        return len({thing["colour"] for thing in objects}) == len(objects)
    return name != "count" or len(objects) == 2 or rng.random() < KEEP_ONE


def _item(name: str, scene: dict, rng: random.Random) -> dict[str, Any]:
    at = rng.randrange(len(scene["objects"]))
    question, answers, told = ASK[name](scene, at, rng)
    places = rng.sample(range(4), 4)
    reasons = _rationales(scene, at, told, rng)
    reason_places = rng.sample(range(4), 4)
    return {
        "category": name,
        "question": question,
        "answer_choices": [answers[place] for place in places],
        "answer_label": places.index(0),
        "rationale_choices": [reasons[place] for place in reason_places],
        "rationale_label": reason_places.index(0),
    }


# ----------------------------------------------------------------------------------------------------
# Each category: the question, four answers of which the first is right, and the facts that they tell


def _color(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [["The", [at], "is", colour, "."] for colour in values_of(scene, at, "colour", rng)]
    return ["What", "color", "is", "the", [at], "?"], answers, {"colour"}


def _texture(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [["The", [at], "is", value, "."] for value in values_of(scene, at, "texture", rng)]
    return ["What", "pattern", "does", "the", [at], "have", "?"], answers, {"texture"}


def _size(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    pairs = _combined(values_of(scene, at, "size", rng), values_of(scene, at, "texture", rng))
    answers = [["It", "is", "a", size, value, [at], "."] for size, value in pairs]
    return (
        ["How", "large", "is", "the", [at], "and", "how", "is", "it", "filled", "?"],
        answers,
        {"size", "texture"},
    )


def _position(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [
        ["The", [at], "is", *value.split(), "the", [1 - at], "."]
        for value in values_of(scene, at, "place", rng)
    ]
    return ["Where", "is", "the", [at], "?"], answers, {"place"}


def _shape(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    colour = scene["objects"][at]["colour"]
    # Plain words even where the shape is an object's: a reference would say which of the shapes are there
    answers = [["It", "is", *article(value).split(), "."] for value in values_of(scene, at, "shape", rng)]
    return ["What", "shape", "is", "the", colour, "one", "?"], answers, {"shape", "colour"}


def _count(scene: dict, at: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    counts = ["is one shape", "are two shapes"][:: 1 if len(scene["objects"]) == 1 else -1]
    colours = [scene["objects"][at]["colour"], rng.choice(absent(scene, "colour"))]
    answers = [
        ["There", *count.split(), "and", "something", "is", colour, "."]
        for count, colour in _combined(counts, colours)
    ]
    return ["How", "many", "shapes", "are", "there", "?"], answers, {"colour"}


ASK: dict[str, Callable[..., tuple[Tokens, list[Tokens], set[str]]]] = {
    "color": _color,
    "texture": _texture,
    "size": _size,
    "position": _position,
    "shape": _shape,
    "count": _count,
}


def _rationales(scene: dict, at: int, told: set[str], rng: random.Random) -> list[Tokens]:
    """Four that describe what the answer does not; the first is true. Two facts where there are two, else one."""
    facts = ["place"] if len(scene["objects"]) == 2 else ["size"]
    facts = [fact for fact in ("colour", "texture", *facts) if fact not in told][:3]
    facts = sorted(rng.sample(facts, min(2, len(facts))), key=["colour", "size", "texture", "place"].index)
    if facts == ["size"]:
        facts = ["colour"]  # three sizes do not make four choices
    values = [values_of(scene, at, fact, rng) for fact in facts]
    pairs = _combined(*values) if len(values) == 2 else [(value,) for value in values[0]]
    words = [" and ".join(pair).split() for pair in pairs]
    ending: Tokens = ["the", [1 - at]] if facts[-1] == "place" else []
    return [["I", "can", "see", "that", "the", [at], "is", *said, *ending, "."] for said in words]


# ----------------------------------------------------------------------------------------------------
# Values of a fact: the true one first, then the other object's where it is another, then any


def values_of(scene: dict, at: int, fact: str, rng: random.Random) -> list[str]:
    """Four values of a fact, or all there are."""
    true = fact_of(scene, at, fact)
    found = [true]
    if len(scene["objects"]) == 2 and fact_of(scene, 1 - at, fact) != true:
        found.append(fact_of(scene, 1 - at, fact))
    known = {
        "colour": sorted(COLOURS),
        "shape": SHAPES,
        "size": sorted(SIZES),
        "texture": TEXTURES,
        "place": sorted(RELATIONS),
    }[fact]
    rest = [value for value in known if value not in found]
    return [*found, *rng.sample(rest, min(len(rest), 4 - len(found)))]


def fact_of(scene: dict, at: int, fact: str) -> str:
    """A fact of object `at`; `place` is its relation to the other one."""
    if fact != "place":
        return scene["objects"][at][fact]
    step = RELATIONS[scene["relation"]]
    return next(name for name, to in RELATIONS.items() if to == (step if at == 0 else (-step[0], -step[1])))


def absent(scene: dict, fact: str) -> list[str]:
    """Values that no object of the scene has."""
    known: Sequence[str] = {"colour": sorted(COLOURS), "shape": SHAPES}[fact]
    return [value for value in known if all(thing[fact] != value for thing in scene["objects"])]


def _combined(one: Sequence[str], other: Sequence[str]) -> list[tuple[str, ...]]:
    """Two values of each, in the four combinations, the true one first."""
    return [(a, b) for a in one[:2] for b in other[:2]]
