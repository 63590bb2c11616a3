"""Hypotheses about a drawn scene that it entails, contradicts or leaves open, in SNLI-VE's lines. Not for files.

The words alone cannot tell a contradiction: half of the contradictions are phrased as entailments are, half as
neutral hypotheses are. Whoever sees no picture is right in two of three cases at most.
"""

import random
from typing import Any

from scripts.datasets.scene_questions import absent, fact_of, values_of
from scripts.datasets.scenes import article

# What no picture of the scene can show
OPEN = (
    "belongs to a child",
    "belongs to a teacher",
    "is very heavy",
    "weighs nothing",
    "is used as a sign",
    "is part of a game",
    "was drawn in a hurry",
    "has another one behind the edge of the picture",
    "is for sale",
)


def hypotheses_of(scene: dict, rng: random.Random) -> list[tuple[str, str]]:
    """(sentence, label), one of each label."""
    contradiction = _visible if rng.random() < 0.5 else _open
    return [
        (_visible(scene, rng, true=True), "entailment"),
        (_open(scene, rng, true=True), "neutral"),
        (contradiction(scene, rng, true=False), "contradiction"),
    ]


def _visible(scene: dict, rng: random.Random, *, true: bool) -> str:
    """A sentence that the picture decides; a false one has one thing wrong in it."""
    at = rng.randrange(len(scene["objects"]))
    kinds = ("colour", "shape", "texture", "count") + (
        ("place", "place") if len(scene["objects"]) == 2 else ()
    )
    kind = rng.choice(kinds)
    thing = scene["objects"][at]
    if kind == "count":
        one = (len(scene["objects"]) == 1) == true
        return "There is only one shape." if one else "There are two shapes."
    if kind == "colour":
        return f"The {thing['shape']} is {_said(scene, at, 'colour', rng, true=true)}."
    if kind == "shape":
        return f"There is {_thing(scene, at, rng, true=true)}."
    if kind == "texture":
        return f"The {thing['colour']} {thing['shape']} is {_said(scene, at, 'texture', rng, true=true)}."
    other = scene["objects"][1 - at]
    relation = _said(scene, at, "place", rng, true=true)
    return f"The {thing['colour']} {thing['shape']} is {relation} the {other['colour']} {other['shape']}."


def _open(scene: dict, rng: random.Random, *, true: bool) -> str:
    """A sentence that says what cannot be seen, of a thing that is there or (a contradiction) is not."""
    thing = _thing(scene, rng.randrange(len(scene["objects"])), rng, true=true)
    return f"There is {thing} that {rng.choice(OPEN)}."


def _said(scene: dict, at: int, fact: str, rng: random.Random, *, true: bool) -> str:
    """The value of a fact, or a wrong one; the other object's more often than any."""
    values = values_of(scene, at, fact, rng)
    return values[0] if true else values[1] if rng.random() < 0.5 else rng.choice(values[1:])


def _thing(scene: dict, at: int, rng: random.Random, *, true: bool) -> str:
    """Colour and shape of an object; where it must not be there, with a colour or a shape that is not its own."""
    facts = {name: fact_of(scene, at, name) for name in ("colour", "shape")}
    if not true:
        name = rng.choice(("colour", "shape"))
        present = {(thing["colour"], thing["shape"]) for thing in scene["objects"]}
        wrong = [
            value for value in values_of(scene, at, name, rng)[1:] if _pair(facts, name, value) not in present
        ]
        facts[name] = (wrong or absent(scene, name))[0]
    return article(f"{facts['colour']} {facts['shape']}")


def _pair(facts: dict[str, str], name: str, value: str) -> tuple[str, str]:
    changed = facts | {name: value}
    return changed["colour"], changed["shape"]


def snli_ve_lines(image: str, premise: str, hypotheses: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """SNLI-VE's lines of one picture; its parses branch to the right, they are not from a parser."""
    return [
        {
            "annotator_labels": [label] * 5,
            "captionID": f"{image}.jpg#0",
            "gold_label": label,
            "pairID": f"{image}.jpg#0r1{label[0]}",
            "sentence1": premise,
            "sentence1_parse": _parse(premise),
            "sentence1_binary_parse": _binary(premise),
            "sentence2": sentence,
            "sentence2_parse": _parse(sentence),
            "sentence2_binary_parse": _binary(sentence),
            "Flickr30K_ID": image,
        }
        for sentence, label in hypotheses
    ]


def _words(sentence: str) -> list[str]:
    return sentence.replace(".", " .").split()


def _parse(sentence: str) -> str:
    return "(ROOT (S " + " ".join(f"(X {word})" for word in _words(sentence)) + "))"


def _binary(sentence: str) -> str:
    *first, last = _words(sentence)
    for word in reversed(first):
        last = f"( {word} {last} )"
    return last
