"""Winoground (Thrush et al. 2022, Eq. 1 to 3): match two images and two captions made of the same words.

    text:  s(c0, i0) > s(c1, i0) and s(c1, i1) > s(c0, i1)
    image: s(c0, i0) > s(c0, i1) and s(c1, i1) > s(c1, i0)
    group: both

Comparisons are strict, so a model with constant scores gets 0; chance is 1/4, 1/4 and 1/6. SDS-CLIP's table 1 reports the
text score, also by collapsed tag and number of main predicates. The errors of a diffusion model differ more between
images than between captions. Metrics with the prefix NORMALIZED are its scores for d(x, "") - d(x, c); the text score is
the same for both.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from evaluation.data.compositional import Example, read_winoground
from evaluation.metrics.ranking import bootstrap_interval
from evaluation.models.matcher import NORMALIZED, Matcher, Question, score_questions
from evaluation.tasks.task import Metrics

SCORES = ("text", "image", "group")
KEPT = ("image", "group", "ties")  # metrics that the normalized scores change
# Keys of groups, and the attribute of an example that decides its group
GROUPS: tuple[tuple[str, Callable[[Example], str | int]], ...] = (
    ("{}", lambda example: example.tag.lower()),
    ("{}_pred", lambda example: example.predicates),
    ("secondary={}", lambda example: example.note),
)


def evaluate(matcher: Matcher, data: Path) -> Metrics:
    """Compute the three scores with bootstrap intervals, by tag and number of predicates; ties and cost.

    Raises:
        UserError: If the folder holds no Winoground, or no image can be read.
    """
    examples = read_winoground(data)
    questions = [Question(image, example.captions) for example in examples for image in example.pictures]
    measured = score_questions(matcher, questions, normalize=True)
    metrics: Metrics = {}
    for name, values in measured.scores.items():
        pairs = zip(examples, values[::2], values[1::2], strict=True)
        complete = [
            (example, [first.tolist(), second.tolist()])
            for example, first, second in pairs
            if first is not None and second is not None
        ]
        if not complete:
            reason = "skipped: no example has two pictures that can be read"
            return {"text_score": reason, **measured.cost()}
        scores = np.array([pair for _, pair in complete])
        of_name = metrics_of(scores, [example for example, _ in complete])
        if name == NORMALIZED:
            of_name = {f"{name}/{key}": value for key, value in of_name.items() if key.startswith(KEPT)}
        metrics |= of_name
    return metrics | measured.cost()


def metrics_of(
    scores: Float[np.ndarray, "n pictures=2 captions=2"], examples: Sequence[Example]
) -> dict[str, float | int]:
    """Compute the shares of hits of all examples and of each group.

    `ties` is the share of examples in which one of the comparisons is a tie.
    """
    hits, ties = hits_of(scores)
    metrics: dict[str, float | int] = {}
    for name in SCORES:
        metrics[f"{name}_score"] = float(hits[name].mean())
        metrics[f"{name}_score_low"], metrics[f"{name}_score_high"] = bootstrap_interval(hits[name])
    metrics |= {"ties": float(ties.mean()), "n": len(examples)}
    for template, group_of in GROUPS:
        for value in sorted({group_of(example) for example in examples} - {""}, key=str):
            key = "/" + template.format(value) + ("s" if value == 2 else "")
            inside = np.array([group_of(example) == value for example in examples])
            metrics |= {f"{name}_score{key}": float(hits[name][inside].mean()) for name in SCORES}
            metrics[f"n{key}"] = int(inside.sum())
    return metrics


def hits_of(
    scores: Float[np.ndarray, "n pictures=2 captions=2"],
) -> tuple[dict[str, Bool[np.ndarray, " n"]], Bool[np.ndarray, " n"]]:
    """Return for each example whether text, image and group are right, and whether a comparison is a tie."""
    s = {(caption, image): scores[:, image, caption] for caption in (0, 1) for image in (0, 1)}
    text = (s[0, 0] > s[1, 0]) & (s[1, 1] > s[0, 1])
    image = (s[0, 0] > s[0, 1]) & (s[1, 1] > s[1, 0])
    ties = (s[0, 0] == s[1, 0]) | (s[1, 1] == s[0, 1]) | (s[0, 0] == s[0, 1]) | (s[1, 1] == s[1, 0])
    return {"text": text, "image": image, "group": text & image}, ties
