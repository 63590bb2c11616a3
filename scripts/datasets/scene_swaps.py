"""Generate pairs of scenes whose captions contain the same words in a different order, with Winoground's tags.

Object: noun phrases or their attributes are swapped (Winoground also tags a swapped attribute as Object). Relation: the
words between the noun phrases are swapped. Both: both swaps at once. With two objects and one predicate, a relation swap
moves the relation to the front ("Left of a red circle is a blue square."), because swapping the sides of "a circle left
of a square" would be an object swap.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from scripts.datasets.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    article,
    capital,
    describe,
    opposite_of,
    place_two,
    random_object,
)

ALIKE = ({"square", "rectangle"}, {"circle", "ring"})  # a square is a rectangle
VALUES = {"color": sorted(COLORS), "texture": TEXTURES, "size": sorted(SIZES)}
DEFAULTS = ("plain", "medium")  # values that captions omit
TEMPLATES = "{} {relation} {}.", "{} is {relation} {}."  # the phrasings of `captions_of` for two objects


class Pair(NamedTuple):
    """Two captions and two scenes. Caption k describes scene k and contradicts the other scene."""

    captions: tuple[str, str]
    scenes: tuple[Scene, Scene]
    tag: str  # Winoground's `tag`: which words are swapped
    note: str = ""  # Winoground's `secondary_tag`


def draw_things(rng: random.Random, num: int, *, short: bool = False) -> list[Thing]:
    """Sample objects with distinct colors and shapes. `short` objects are plain and medium: two words describe them."""
    things: list[Thing] = []
    while len(things) < num:
        thing = random_object(rng)
        if short or rng.random() < 0.5:
            thing |= {"texture": "plain", "size": "medium"}
        if all(differ(thing, other) for other in things):
            things.append(thing)
    return things


def differ(first: Thing, second: Thing) -> bool:
    """Return whether two objects have different colors and distinguishable shapes."""
    shapes = {first["shape"], second["shape"]}
    return first["color"] != second["color"] and len(shapes) == 2 and shapes not in ALIKE


def swapped(first: Thing, second: Thing, key: str) -> tuple[Thing, Thing]:
    """Return copies of two objects that exchange their color, texture or size."""
    return first | {key: second[key]}, second | {key: first[key]}


def scene_of(things: list[Thing], centers: list[list[float]], relation: str | None, background: int) -> Scene:
    """Return a scene for `scenes.render`. `relation` is None if a single relation does not describe the scene."""
    objects = [thing | {"center": center} for thing, center in zip(things, centers, strict=True)]
    return {"objects": objects, "relation": relation, "background": background}


def definite(words: str) -> str:
    """Prefix words with "the"."""
    return f"the {words}"


def same_words(filled_templates: list[tuple[str, list[Thing]]]) -> tuple[str, str]:
    """Fill two templates with "a"/"an" phrases, or with "the" phrases if the captions would differ in "a" and "an"."""
    for determine in (article, definite):
        captions = [
            capital(template.format(*(determine(describe(thing)) for thing in things)))
            for template, things in filled_templates
        ]
        if words_of(captions[0]) == words_of(captions[1]):
            break
    return captions[0], captions[1]


def words_of(caption: str) -> list[str]:
    """Return the sorted lower-case words without the final period."""
    return sorted(caption.lower().rstrip(".").split())


# --- one predicate --------------------------------------------------------------------------------


def centers_of(relation: str, rng: random.Random) -> list[list[float]]:
    """Sample two centers such that the first is `relation` the second."""
    first: Thing = {}
    second: Thing = {}
    place_two(first, second, relation, rng)
    return [first["center"], second["center"]]


def one_relation(
    rng: random.Random, first: list[Thing], second: list[Thing], tag: str, *, moved: bool = False
) -> Pair:
    """Place two pairs of objects at the same two centers. If `moved`, the second caption starts with its relation."""
    relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
    template = TEMPLATES[1] if moved else rng.choice(TEMPLATES)
    template = template.replace("{relation}", relation)
    captions = same_words([(template, first), (f"{relation} {{}} is {{}}." if moved else template, second)])
    centers = centers_of(relation, rng)
    placed = second[::-1] if moved else second  # "left of a circle is a square": the square comes first
    scenes = scene_of(first, centers, relation, background), scene_of(placed, centers, relation, background)
    return Pair(captions, scenes, tag)


def phrases(rng: random.Random) -> Pair:
    """A red circle left of a blue square. A blue square left of a red circle."""
    things = draw_things(rng, 2)
    return one_relation(rng, things, things[::-1], "Noun Phrase")


def attributes(rng: random.Random) -> Pair:
    """A red circle left of a blue square. A blue circle left of a red square."""
    key = rng.choice(("color", "color", "texture", "size"))
    first, second = draw_two(rng, key, defaults=True)
    return one_relation(
        rng, [first, second], list(swapped(first, second, key)), f"Adjective-{key.capitalize()}"
    )


def draw_two(rng: random.Random, key: str, *, defaults: bool) -> tuple[Thing, Thing]:
    """Sample two objects that differ in `key`. If `defaults`, the value may be one that captions omit."""
    first, second = draw_things(rng, 2)
    values = [value for value in VALUES[key] if defaults or value not in DEFAULTS]
    first[key], second[key] = rng.sample(values, 2)
    return first, second


def relation_moved(rng: random.Random) -> Pair:
    """A red circle is left of a blue square. Left of a red circle is a blue square."""
    things = draw_things(rng, 2)
    return one_relation(rng, things, things, "Preposition", moved=True)


def both_moved(rng: random.Random) -> Pair:
    """A red circle is left of a blue square. Left of a blue circle is a red square."""
    first, second = draw_two(rng, "color", defaults=False)
    changed = list(swapped(first, second, "color"))
    return one_relation(rng, [first, second], changed, "Adjective-Color, Preposition", moved=True)


# --- two predicates -------------------------------------------------------------------------------


def facts(rng: random.Random) -> Pair:
    """The circle is red and the square is blue. The circle is blue and the square is red."""
    key = rng.choice(("color", "color", "texture", "size"))
    first, second = draw_two(rng, key, defaults=False)
    changed = swapped(first, second, key)
    template = "The {} is {} and the {} is {}."
    captions = tuple(
        template.format(a["shape"], a[key], b["shape"], b[key]) for a, b in ((first, second), changed)
    )
    relation, background = rng.choice(sorted(RELATIONS)), rng.randrange(len(BACKGROUNDS))
    centers = centers_of(relation, rng)
    scenes = [scene_of(list(things), centers, relation, background) for things in ((first, second), changed)]
    return Pair((captions[0], captions[1]), (scenes[0], scenes[1]), f"Adjective-{key.capitalize()}")


def two_axes(rng: random.Random) -> tuple[str, str]:
    """Sample a horizontal and a vertical relation, in random order."""
    axes = [rng.choice(("left of", "right of")), rng.choice(("above", "below"))]
    rng.shuffle(axes)
    return axes[0], axes[1]


def point(rng: random.Random, *sides: str) -> list[float]:
    """Sample a point on the given sides of the middle, such as `left of` and `above`: near one of the corners."""
    steps = [RELATIONS[side] for side in sides]
    return [0.5 + 0.25 * sum(step[axis] for step in steps) + rng.uniform(-0.02, 0.02) for axis in (0, 1)]


def corners(rng: random.Random, *, objects: bool, relations: bool) -> Pair:
    """The circle is left of the square and the square is above the circle; swap the objects, the relations or both.

    If both are swapped, the objects exchange only their colors: swapping whole phrases and relations would give a caption
    with the same meaning.
    """
    first, second = draw_things(rng, 2, short=True)
    order = two_axes(rng)
    if objects:
        others = swapped(first, second, "color") if relations or rng.random() < 0.5 else (second, first)
    else:
        others = (first, second)
    other_order = order[::-1] if relations else order
    template = "the {0} is {relations[0]} the {1} and the {1} is {relations[1]} the {0}."
    background, (first_seed, second_seed) = rng.randrange(len(BACKGROUNDS)), (rng.random(), rng.random())
    captions, scenes = [], []
    for (subject, target), sides in (((first, second), order), (others, other_order)):
        captions.append(capital(template.format(describe(subject), describe(target), relations=sides)))
        across = opposite_of(sides[1])  # the second object is sides[1] the first
        centers = [
            point(random.Random(first_seed), sides[0], across),
            point(random.Random(second_seed), opposite_of(sides[0]), sides[1]),
        ]
        scenes.append(scene_of([subject, target], centers, None, background))
    tag = "Adjective-Color" if others[0]["shape"] == first["shape"] else "Noun Phrase"
    kinds = ([tag] if objects else []) + (["Preposition"] if relations else [])
    return Pair((captions[0], captions[1]), (scenes[0], scenes[1]), ", ".join(kinds))


def three(rng: random.Random, *, objects: bool, relations: bool) -> Pair:
    """A circle is left of a square and above a star. `scenes.generate` never draws three objects."""
    things = draw_things(rng, 3, short=True)
    order = two_axes(rng)
    others = [things[1], things[0], things[2]] if objects else things
    other_order = order[::-1] if relations else order
    template = "{{}} is {} {{}} and {} {{}}."
    captions = same_words([(template.format(*order), things), (template.format(*other_order), others)])
    background, jitter = rng.randrange(len(BACKGROUNDS)), rng.random()
    scenes = []
    for named, sides in ((things, order), (others, other_order)):
        noise = random.Random(jitter)
        centers = [
            point(noise, *sides),
            point(noise, opposite_of(sides[0]), sides[1]),
            point(noise, sides[0], opposite_of(sides[1])),
        ]
        scenes.append(scene_of(named, centers, None, background))
    kinds = (["Noun Phrase"] if objects else []) + (["Preposition"] if relations else [])
    return Pair(captions, (scenes[0], scenes[1]), ", ".join(kinds), "Three Objects")


class Kind(NamedTuple):
    """A way to swap words, with Winoground's `collapsed_tag` and `num_main_preds`."""

    draw: Callable[[random.Random], Pair]
    tag: str
    predicates: int


# Examples cycle through these kinds, so any 16 consecutive examples contain all of them; 10 of 16 have one predicate.
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
    """Return example `number` of the set of a seed. It is independent of the other examples."""
    kind = KINDS[number % len(KINDS)]
    return kind.draw(random.Random(f"swaps {seed}-{number}")), kind
