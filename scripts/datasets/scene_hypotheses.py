"""Generate entailed, neutral and contradicted hypotheses about a drawn scene, as lines of SNLI-VE.

The text alone does not reveal a contradiction: half of the contradictions are phrased like entailments and half like
neutral hypotheses. A text-only model therefore has an accuracy of at most two thirds.
"""

import random
from typing import Any

from scripts.datasets.scene_questions import absent, fact_of, values_of
from scripts.datasets.scenes import Scene, article

# Statements that a picture cannot confirm
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


def hypotheses_of(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Return one (sentence, label) pair for each label."""
    contradiction = _visible if rng.random() < 0.5 else _open
    return [
        (_visible(scene, rng, true=True), "entailment"),
        (_open(scene, rng, true=True), "neutral"),
        (contradiction(scene, rng, true=False), "contradiction"),
    ]


def _visible(scene: Scene, rng: random.Random, *, true: bool) -> str:
    """Return a sentence that the picture confirms or, if not `true`, contradicts in one detail."""
    index = rng.randrange(len(scene["objects"]))
    kinds = ("color", "shape", "texture", "count") + (
        ("place", "place") if len(scene["objects"]) == 2 else ()
    )
    kind = rng.choice(kinds)
    thing = scene["objects"][index]
    if kind == "count":
        is_single = (len(scene["objects"]) == 1) == true
        return "There is only one shape." if is_single else "There are two shapes."
    if kind == "color":
        return f"The {thing['shape']} is {_value(scene, index, 'color', rng, true=true)}."
    if kind == "shape":
        return f"There is {_thing(scene, index, rng, true=true)}."
    if kind == "texture":
        return f"The {thing['color']} {thing['shape']} is {_value(scene, index, 'texture', rng, true=true)}."
    other = scene["objects"][1 - index]
    relation = _value(scene, index, "place", rng, true=true)
    return f"The {thing['color']} {thing['shape']} is {relation} the {other['color']} {other['shape']}."


def _open(scene: Scene, rng: random.Random, *, true: bool) -> str:
    """Return an unverifiable statement about an object that is in the scene or, if not `true`, is absent."""
    thing = _thing(scene, rng.randrange(len(scene["objects"])), rng, true=true)
    return f"There is {thing} that {rng.choice(OPEN)}."


def _value(scene: Scene, index: int, fact: str, rng: random.Random, *, true: bool) -> str:
    """Return the value of a fact, or a wrong value: preferably that of the other object."""
    values = values_of(scene, index, fact, rng)
    return values[0] if true else values[1] if rng.random() < 0.5 else rng.choice(values[1:])


def _thing(scene: Scene, index: int, rng: random.Random, *, true: bool) -> str:
    """Return color and shape of an object; if not `true`, change one of them so that no object matches."""
    facts = {name: fact_of(scene, index, name) for name in ("color", "shape")}
    if not true:
        name = rng.choice(("color", "shape"))
        present = {(thing["color"], thing["shape"]) for thing in scene["objects"]}
        wrong = [
            value
            for value in values_of(scene, index, name, rng)[1:]
            if _pair(facts, name, value) not in present
        ]
        facts[name] = (wrong or absent(scene, name))[0]
    return article(f"{facts['color']} {facts['shape']}")


def _pair(facts: dict[str, str], name: str, value: str) -> tuple[str, str]:
    changed = facts | {name: value}
    return changed["color"], changed["shape"]


def snli_ve_lines(image: str, premise: str, hypotheses: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the SNLI-VE lines of one picture. The parses are right-branching placeholders."""
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
