"""Winoground (Thrush et al. 2022, Eq. 1 to 3): two pictures, two captions of the same words, which goes with which.

    text:  s(c0, i0) > s(c1, i0) and s(c1, i1) > s(c0, i1)
    image: s(c0, i0) > s(c0, i1) and s(c1, i1) > s(c1, i0)
    group: both

Strictly greater, so a model that says the same of everything scores 0; chance is 1/4, 1/4, 1/6. SDS-CLIP's table 1 has
the text score, per collapsed tag and number of main predicates. A diffusion model's errors differ between pictures more
than between captions: its scores are also given for d(x, "") - d(x, c), as `normalised/`; text is the same for both.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from evaluation.data.compositional import Example, read_winoground
from evaluation.metrics.ranking import bootstrap_interval
from evaluation.models.matcher import NORMALIZED, Matcher, Question, score_questions

SCORES = ("text", "image", "group")


def evaluate(matcher: Matcher, data: Path) -> dict[str, Any]:
    """The three scores with bootstrap intervals, per tag and number of predicates; ties and cost beside them."""
    examples = read_winoground(data)
    questions = [Question(picture, example.captions) for example in examples for picture in example.pictures]
    heard = score_questions(matcher, questions, normalize=True)
    metrics: dict[str, Any] = {}
    for name, values in heard.scores.items():
        both = zip(examples, values[::2], values[1::2], strict=True)
        asked = [
            (example, [a.tolist(), b.tolist()]) for example, a, b in both if a is not None and b is not None
        ]
        if not asked:
            return {"text_score": "skipped: no example has two pictures that can be read"} | heard.cost()
        found = metrics_of(np.array([scores for _, scores in asked]), [example for example, _ in asked])
        kept = [key for key in found if name != NORMALIZED or key.startswith(("image", "group", "ties"))]
        metrics |= {f"{name}/{key}" if name == NORMALIZED else key: found[key] for key in kept}
    return metrics | heard.cost()


def metrics_of(
    scores: Float[np.ndarray, "n pictures=2 captions=2"], examples: list[Example]
) -> dict[str, Any]:
    """Shares of hits, all and per group; `ties` is the share of examples where a comparison was undecided."""
    hits, ties = hits_of(scores)
    groups = {"": np.ones(len(examples), bool)}
    for name, of in (
        ("{}", lambda example: example.tag.lower()),
        ("{}_pred", lambda example: example.predicates),
        ("secondary={}", lambda example: example.note),
    ):
        for value in sorted({of(example) for example in examples} - {""}, key=str):
            key = "/" + name.format(value) + ("s" if value == 2 else "")
            groups[key] = np.array([of(example) == value for example in examples])
    metrics: dict[str, Any] = {}
    for name in SCORES:
        metrics[f"{name}_score"] = float(hits[name].mean())
        metrics[f"{name}_score_low"], metrics[f"{name}_score_high"] = bootstrap_interval(hits[name])
    metrics |= {"ties": float(ties.mean()), "n": len(examples)}
    for key, inside in list(groups.items())[1:]:
        metrics |= {f"{name}_score{key}": float(hits[name][inside].mean()) for name in SCORES}
        metrics[f"n{key}"] = int(inside.sum())
    return metrics


def hits_of(
    scores: Float[np.ndarray, "n pictures=2 captions=2"],
) -> tuple[dict[str, Bool[np.ndarray, " n"]], Bool[np.ndarray, " n"]]:
    """Per example whether text, image and group are right, and whether any of the four comparisons is a tie."""
    s = {(caption, picture): scores[:, picture, caption] for caption in (0, 1) for picture in (0, 1)}
    text = (s[0, 0] > s[1, 0]) & (s[1, 1] > s[0, 1])
    image = (s[0, 0] > s[0, 1]) & (s[1, 1] > s[1, 0])
    ties = (s[0, 0] == s[1, 0]) | (s[1, 1] == s[0, 1]) | (s[0, 0] == s[0, 1]) | (s[1, 1] == s[1, 0])
    return {"text": text, "image": image, "group": text & image}, ties
