"""Pairs of scenes whose captions have the same words in another order, with Winoground's tags. Draws nothing.

Object: phrases, or what is said of them, change places. Winoground too counts an attribute that moves between two
nouns as Object. Relation: the words between the phrases change places. Both: both at once. With two objects and one
predicate a relation can only move to the front ("Left of a red circle is a blue square."), for "a circle left of a
square" the other way round is already a swap of objects.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from scripts.datasets.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SIZES,
    TEXTURES,
    article,
    capital,
    describe,
    opposite_of,
    place_two,
    random_object,
)

ALIKE = ({"square", "rectangle"}, {"circle", "ring"})  # a square is a rectangle
VALUES = {"colour": sorted(COLOURS), "texture": TEXTURES, "size": sorted(SIZES)}
DEFAULTS = ("plain", "medium")  # these go unsaid
TOLD = "{} {relation} {}.", "{} is {relation} {}."  # how `captions_of` tells of two objects


class Pair(NamedTuple):
    """Caption k is true of scene k and false of the other."""

    captions: tuple[str, str]
    scenes: tuple[dict[str, Any], dict[str, Any]]
    tag: str  # what is swapped, as Winoground's `tag`
    note: str = ""  # as Winoground's `secondary_tag`


def draw_things(rng: random.Random, num: int, *, short: bool = False) -> list[dict[str, Any]]:
    """Objects of different colours and shapes, no two alike; `short`: plain and medium ones, told in two words."""
    found: list[dict[str, Any]] = []
    while len(found) < num:
        thing = random_object(rng)
        if short or rng.random() < 0.5:
            thing |= {"texture": "plain", "size": "medium"}
        if all(differ(thing, other) for other in found):
            found.append(thing)
    return found


def differ(first: dict, second: dict) -> bool:
    """Whether neither can be taken for the other by colour or by shape."""
    shapes = {first["shape"], second["shape"]}
    return first["colour"] != second["colour"] and len(shapes) == 2 and shapes not in ALIKE


def swapped(first: dict, second: dict, key: str) -> tuple[dict, dict]:
    """Both with the other's colour, texture or size."""
    return first | {key: second[key]}, second | {key: first[key]}


def scene_of(
    things: list[dict], centres: list[list[float]], relation: str | None, background: int
) -> dict[str, Any]:
    """A scene as `prepare_scenes.render` takes it; `relation` only where one word says all of it."""
    objects = [thing | {"centre": centre} for thing, centre in zip(things, centres, strict=True)]
    return {"objects": objects, "relation": relation, "background": background}


def same_words(tellings: list[tuple[str, list[dict]]]) -> tuple[str, str]:
    """Templates filled with "a" or "an" phrases, with "the" where the two captions would differ in "a" and "an"."""
    for determine in (article, lambda words: f"the {words}"):
        told = [
            capital(template.format(*(determine(describe(thing)) for thing in things)))
            for template, things in tellings
        ]
        if words_of(told[0]) == words_of(told[1]):
            break
    return told[0], told[1]


def words_of(caption: str) -> list[str]:
    """The words without capitals and full stop, in alphabetical order."""
    return sorted(caption.lower().rstrip(".").split())


# --- one predicate --------------------------------------------------------------------------------


def centres_of(relation: str, rng: random.Random) -> list[list[float]]:
    """Two places of which the first is `relation` the second."""
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    place_two(first, second, relation, rng)
    return [first["centre"], second["centre"]]


def one_relation(
    rng: random.Random, first: list[dict], second: list[dict], tag: str, *, moved: bool = False
) -> Pair:
    """Two pairs of objects in the same two places; `moved`: the second caption begins with its relation."""
    relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
    template = TOLD[1] if moved else rng.choice(TOLD)
    template = template.replace("{relation}", relation)
    captions = same_words([(template, first), (f"{relation} {{}} is {{}}." if moved else template, second)])
    centres = centres_of(relation, rng)
    told = second[::-1] if moved else second  # "left of a circle is a square": the square comes first
    scenes = scene_of(first, centres, relation, background), scene_of(told, centres, relation, background)
    return Pair(captions, scenes, tag)


def phrases(rng: random.Random) -> Pair:
    """A red circle left of a blue square. A blue square left of a red circle."""
    things = draw_things(rng, 2)
    return one_relation(rng, things, things[::-1], "Noun Phrase")


def attributes(rng: random.Random) -> Pair:
    """A red circle left of a blue square. A blue circle left of a red square."""
    key = rng.choice(("colour", "colour", "texture", "size"))
    first, second = draw_two(rng, key, unsaid=True)
    return one_relation(
        rng, [first, second], list(swapped(first, second, key)), f"Adjective-{key.capitalize()}"
    )


def draw_two(rng: random.Random, key: str, *, unsaid: bool) -> tuple[dict, dict]:
    """Two objects that differ in `key`; `unsaid`: one of them may be plain, or medium."""
    first, second = draw_things(rng, 2)
    values = [value for value in VALUES[key] if unsaid or value not in DEFAULTS]
    first[key], second[key] = rng.sample(values, 2)
    return first, second


def relation_moved(rng: random.Random) -> Pair:
    """A red circle is left of a blue square. Left of a red circle is a blue square."""
    things = draw_things(rng, 2)
    return one_relation(rng, things, things, "Preposition", moved=True)


def both_moved(rng: random.Random) -> Pair:
    """A red circle is left of a blue square. Left of a blue circle is a red square."""
    first, second = draw_two(rng, "colour", unsaid=False)
    changed = list(swapped(first, second, "colour"))
    return one_relation(rng, [first, second], changed, "Adjective-Colour, Preposition", moved=True)


# --- two predicates -------------------------------------------------------------------------------


def facts(rng: random.Random) -> Pair:
    """The circle is red and the square is blue. The circle is blue and the square is red."""
    key = rng.choice(("colour", "colour", "texture", "size"))
    first, second = draw_two(rng, key, unsaid=False)
    changed = swapped(first, second, key)
    template = "The {} is {} and the {} is {}."
    captions = tuple(
        template.format(a["shape"], a[key], b["shape"], b[key]) for a, b in ((first, second), changed)
    )
    relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
    centres = centres_of(relation, rng)
    scenes = [scene_of(list(things), centres, relation, background) for things in ((first, second), changed)]
    return Pair((captions[0], captions[1]), (scenes[0], scenes[1]), f"Adjective-{key.capitalize()}")


def two_axes(rng: random.Random) -> tuple[str, str]:
    """A relation along each axis, in either order."""
    axes = [rng.choice(("left of", "right of")), rng.choice(("above", "below"))]
    rng.shuffle(axes)
    return axes[0], axes[1]


def point(rng: random.Random, *sides: str) -> list[float]:
    """A place `left of`, `above`... the middle: one of the four corners, give or take."""
    steps = [RELATIONS[side] for side in sides]
    return [0.5 + 0.25 * sum(step[axis] for step in steps) + rng.uniform(-0.02, 0.02) for axis in (0, 1)]


def corners(rng: random.Random, *, objects: bool, relations: bool) -> Pair:
    """The circle is left of the square and the square is above the circle; which of both changes places is asked.

    Where both do, the objects exchange their colours: whole phrases and relations at once would say the same again.
    """
    first, second = draw_things(rng, 2, short=True)
    order = two_axes(rng)
    if objects:
        others = swapped(first, second, "colour") if relations or rng.random() < 0.5 else (second, first)
    else:
        others = (first, second)
    other_order = order[::-1] if relations else order
    template = "the {0} is {relations[0]} the {1} and the {1} is {relations[1]} the {0}."
    background, (seen_first, seen_second) = rng.randrange(len(BACKGROUNDS)), (rng.random(), rng.random())
    captions, scenes = [], []
    for (one, two), told in (((first, second), order), (others, other_order)):
        captions.append(capital(template.format(describe(one), describe(two), relations=told)))
        across = opposite_of(told[1])  # the second object is told[1] the first
        centres = [
            point(random.Random(seen_first), told[0], across),
            point(random.Random(seen_second), opposite_of(told[0]), told[1]),
        ]
        scenes.append(scene_of([one, two], centres, None, background))
    tag = "Adjective-Colour" if others[0]["shape"] == first["shape"] else "Noun Phrase"
    kinds = ([tag] if objects else []) + (["Preposition"] if relations else [])
    return Pair((captions[0], captions[1]), (scenes[0], scenes[1]), ", ".join(kinds))


def three(rng: random.Random, *, objects: bool, relations: bool) -> Pair:
    """A circle is left of a square and above a star: a third object, which `prepare_scenes.generate` never draws."""
    things = draw_things(rng, 3, short=True)
    order = two_axes(rng)
    others = [things[1], things[0], things[2]] if objects else things
    other_order = order[::-1] if relations else order
    template = "{{}} is {} {{}} and {} {{}}."
    captions = same_words([(template.format(*order), things), (template.format(*other_order), others)])
    background, jitter = rng.randrange(len(BACKGROUNDS)), rng.random()
    scenes = []
    for named, told in ((things, order), (others, other_order)):
        places = random.Random(jitter)
        centres = [
            point(places, *told),
            point(places, opposite_of(told[0]), told[1]),
            point(places, told[0], opposite_of(told[1])),
        ]
        scenes.append(scene_of(named, centres, None, background))
    kinds = (["Noun Phrase"] if objects else []) + (["Preposition"] if relations else [])
    return Pair(captions, (scenes[0], scenes[1]), ", ".join(kinds), "Three Objects")


class Kind(NamedTuple):
    """A way of swapping, with Winoground's `collapsed_tag` and `num_main_preds`."""

    draw: Callable[[random.Random], Pair]
    tag: str
    predicates: int


# A set goes through these in order, so any 16 examples have them all; 10 of 16 are told in one predicate.
KINDS = (
    Kind(phrases, "Object", 1),
    Kind(relation_moved, "Relation", 1),
    Kind(attributes, "Object", 1),
    Kind(lambda rng: corners(rng, objects=False, relations=True), "Relation", 2),
    Kind(both_moved, "Both", 1),
    Kind(facts, "Object", 2),
    Kind(phrases, "Object", 1),
    Kind(lambda rng: three(rng, objects=False, relations=True), "Relation", 2),
    Kind(attributes, "Object", 1),
    Kind(relation_moved, "Relation", 1),
    Kind(lambda rng: corners(rng, objects=True, relations=True), "Both", 2),
    Kind(phrases, "Object", 1),
    Kind(lambda rng: corners(rng, objects=True, relations=False), "Object", 2),
    Kind(relation_moved, "Relation", 1),
    Kind(lambda rng: three(rng, objects=True, relations=True), "Both", 2),
    Kind(attributes, "Object", 1),
)


def pair(number: int, seed: int) -> tuple[Pair, Kind]:
    """Example `number` of the set that a seed makes; the others have no say in it."""
    kind = KINDS[number % len(KINDS)]
    return kind.draw(random.Random(f"swaps {seed}-{number}")), kind
