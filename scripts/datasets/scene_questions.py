"""Generate questions with four answers and four rationales about a drawn scene, in the token format of VCR.

The right choice cannot be guessed without the picture. The choices are either four equally likely values of one fact or
the four combinations of two facts, so that no word occurs more often in right choices.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from scripts.datasets.scenes import COLORS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, article

Tokens = list[Any]  # words, and lists of indices into `objects`
# Fraction of one-object scenes that `count` uses. It balances the classes: one pair in ten has two equal shapes and
# is left out.
KEEP_ONE = 0.9
CATEGORIES = ("color", "texture", "size", "position", "shape", "count")


def usable(scene: Scene) -> bool:
    """Return whether all shapes are distinct. Questions refer to objects by their shape."""
    shapes = [thing["shape"] for thing in scene["objects"]]
    return len(set(shapes)) == len(shapes)


def questions_of(scene: Scene, rng: random.Random) -> list[dict[str, Any]]:
    """Return two or three questions of different categories: tokens, choices with labels, and rationales."""
    possible = [name for name in CATEGORIES if _can_ask(name, scene, rng)]
    chosen = rng.sample(possible, min(len(possible), rng.choice((2, 3))))
    if "position" in possible and "position" not in chosen and rng.random() < 0.3:
        chosen[-1] = "position"  # oversampled, because only pairs have positions
    return [_item(name, scene, rng) for name in chosen]


def _can_ask(name: str, scene: dict, rng: random.Random) -> bool:
    objects = scene["objects"]
    if name == "position":
        return len(objects) == 2
    if name == "shape":
        return len({thing["color"] for thing in objects}) == len(objects)
    return name != "count" or len(objects) == 2 or rng.random() < KEEP_ONE


def _item(name: str, scene: dict, rng: random.Random) -> dict[str, Any]:
    index = rng.randrange(len(scene["objects"]))
    question, answers, used_facts = ASK[name](scene, index, rng)
    answer_order = rng.sample(range(4), 4)
    rationales = _rationales(scene, index, used_facts, rng)
    rationale_order = rng.sample(range(4), 4)
    return {
        "category": name,
        "question": question,
        "answer_choices": [answers[i] for i in answer_order],
        "answer_label": answer_order.index(0),
        "rationale_choices": [rationales[i] for i in rationale_order],
        "rationale_label": rationale_order.index(0),
    }


# ----------------------------------------------------------------------------------------------------
# Each category: the question, four answers (the first one is right), and the facts that the answers mention


def _color(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [["The", [index], "is", color, "."] for color in values_of(scene, index, "color", rng)]
    return ["What", "color", "is", "the", [index], "?"], answers, {"color"}


def _texture(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [["The", [index], "is", value, "."] for value in values_of(scene, index, "texture", rng)]
    return ["What", "pattern", "does", "the", [index], "have", "?"], answers, {"texture"}


def _size(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    pairs = _combined(values_of(scene, index, "size", rng), values_of(scene, index, "texture", rng))
    answers = [["It", "is", "a", size, value, [index], "."] for size, value in pairs]
    return (
        ["How", "large", "is", "the", [index], "and", "how", "is", "it", "filled", "?"],
        answers,
        {"size", "texture"},
    )


def _position(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    answers = [
        ["The", [index], "is", *value.split(), "the", [1 - index], "."]
        for value in values_of(scene, index, "place", rng)
    ]
    return ["Where", "is", "the", [index], "?"], answers, {"place"}


def _shape(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    color = scene["objects"][index]["color"]
    # Plain words instead of references: a reference would reveal which shapes are in the scene
    answers = [["It", "is", *article(value).split(), "."] for value in values_of(scene, index, "shape", rng)]
    return ["What", "shape", "is", "the", color, "one", "?"], answers, {"shape", "color"}


def _count(scene: Scene, index: int, rng: random.Random) -> tuple[Tokens, list[Tokens], set[str]]:
    counts = ["is one shape", "are two shapes"][:: 1 if len(scene["objects"]) == 1 else -1]
    colors = [scene["objects"][index]["color"], rng.choice(absent(scene, "color"))]
    answers = [
        ["There", *count.split(), "and", "something", "is", color, "."]
        for count, color in _combined(counts, colors)
    ]
    return ["How", "many", "shapes", "are", "there", "?"], answers, {"color"}


ASK: dict[str, Callable[[Scene, int, random.Random], tuple[Tokens, list[Tokens], set[str]]]] = {
    "color": _color,
    "texture": _texture,
    "size": _size,
    "position": _position,
    "shape": _shape,
    "count": _count,
}


def _rationales(scene: Scene, index: int, used_facts: set[str], rng: random.Random) -> list[Tokens]:
    """Return four rationales about one or two facts that the answers do not mention; the first one is true."""
    facts = ["place"] if len(scene["objects"]) == 2 else ["size"]
    facts = [fact for fact in ("color", "texture", *facts) if fact not in used_facts][:3]
    facts = sorted(rng.sample(facts, min(2, len(facts))), key=["color", "size", "texture", "place"].index)
    if facts == ["size"]:
        facts = ["color"]  # there are only three sizes, too few for four choices
    values = [values_of(scene, index, fact, rng) for fact in facts]
    pairs = _combined(*values) if len(values) == 2 else [(value,) for value in values[0]]
    words = [" and ".join(pair).split() for pair in pairs]
    ending: Tokens = ["the", [1 - index]] if facts[-1] == "place" else []
    return [["I", "can", "see", "that", "the", [index], "is", *value, *ending, "."] for value in words]


# ----------------------------------------------------------------------------------------------------
# Values of a fact: the true value first, then a differing value of the other object, then other values


def values_of(scene: Scene, index: int, fact: str, rng: random.Random) -> list[str]:
    """Return four values of a fact, or all of them if there are fewer. The first one is true."""
    true = fact_of(scene, index, fact)
    values = [true]
    if len(scene["objects"]) == 2 and fact_of(scene, 1 - index, fact) != true:
        values.append(fact_of(scene, 1 - index, fact))
    domain: Sequence[str] = {
        "color": sorted(COLORS),
        "shape": SHAPES,
        "size": sorted(SIZES),
        "texture": TEXTURES,
        "place": sorted(RELATIONS),
    }[fact]
    others = [value for value in domain if value not in values]
    return [*values, *rng.sample(others, min(len(others), 4 - len(values)))]


def fact_of(scene: Scene, index: int, fact: str) -> str:
    """Return a fact of object `index`. The fact "place" is its relation to the other object."""
    if fact != "place":
        return scene["objects"][index][fact]
    step = RELATIONS[scene["relation"]]
    return next(
        name for name, to in RELATIONS.items() if to == (step if index == 0 else (-step[0], -step[1]))
    )


def absent(scene: Scene, fact: str) -> list[str]:
    """Return the values of a fact that no object of the scene has."""
    domain: Sequence[str] = {"color": sorted(COLORS), "shape": SHAPES}[fact]
    return [value for value in domain if all(thing[fact] != value for thing in scene["objects"])]


def _combined(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the four combinations of the first two values of each; the true one comes first."""
    return [(a, b) for a in first[:2] for b in second[:2]]
