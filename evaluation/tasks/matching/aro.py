"""ARO (Yuksekgonul et al. 2023): relations and attributes of a crop, and captions with their words in the right order.

Right is a true caption that scores strictly higher than every wrong one: a tie, which ARO's argmax gives to whichever
comes first, is a miss and is counted. Macro is the mean over relations, or over ordered pairs of attributes that come
25 times, as ARO's code has it; micro is the mean over cases. `relation_macro_asymmetric` leaves out relations that hold
both ways: a few that plainly do, or those in `symmetric_relations.json` beside the data (ARO's notebook has a list,
most of it rare rather than symmetric). `aro_overall` is the mean of the two macros: SDS-CLIP does not define its own.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from evaluation.data.compositional import Case, Read, read_attributions, read_captioned, read_relations
from evaluation.data.word_orders import stored_options, wrong_options
from evaluation.metrics.ranking import bootstrap_interval
from evaluation.models.matcher import Matcher, MatchScores, Question, score_questions, total_cost
from teachercache.core.errors import UserError

SYMMETRIC = ("around", "beside", "by", "close to", "near", "next to", "touching", "with")
MIN_COUNT = 25  # of a pair of attributes in the macro mean
CASES: dict[str, tuple[str, Callable[[Path], list[Case]]]] = {
    "relation": ("visual_genome_relation.json", read_relations),
    "attribution": ("visual_genome_attribution.json", read_attributions),
}
ORDERS = {
    "coco_order": ("coco_karpathy_test.json", "coco"),
    "flickr_order": ("flickr30k_test.json", "flickr30k"),
}


def evaluate(matcher: Matcher, data: Path, *, min_count: int = MIN_COUNT, seed: int = 0) -> dict[str, Any]:
    """The sets whose files are in `data` (order sets also in its coco/ and flickr30k/); `seed` draws wrong orders."""
    metrics: dict[str, Any] = {}
    heard: list[MatchScores] = []
    for name, (file, read) in CASES.items():
        if (data / file).is_file():
            symmetric = symmetric_relations(data) if name == "relation" else None
            least = min_count if name == "attribution" else 1
            found, cost = cases_metrics(
                matcher, name, read(data / file), min_count=least, symmetric=symmetric
            )
            metrics |= found
            heard.append(cost)
    for name, (file, folder) in ORDERS.items():
        path = next((path for path in (data / file, data / folder / file) if path.is_file()), None)
        if path is not None:
            found, cost = order_metrics(matcher, name, path, seed=seed)
            metrics |= found
            heard.append(cost)
    if not heard:
        files = ", ".join(file for file, *_ in (*CASES.values(), *ORDERS.values()))
        raise UserError(f"no set of ARO in {data}: put one or more of {files} there")
    macros = [metrics.get(f"{name}_macro") for name in CASES]
    known = [macro for macro in macros if isinstance(macro, float)]
    if len(known) == len(macros):
        metrics["aro_overall"] = sum(known) / len(known)
    return metrics | total_cost(heard)


def cases_metrics(
    matcher: Matcher,
    name: str,
    cases: Sequence[Case],
    *,
    min_count: int = 1,
    symmetric: Collection[str] | None = None,
) -> tuple[dict[str, Any], MatchScores]:
    """Macro and micro accuracy of true against false captions, options in ARO's order [false, true]."""
    heard = score_questions(matcher, [Question(case.picture, (case.false, case.true)) for case in cases])
    asked = [
        (case, scores)
        for case, scores in zip(cases, heard.scores["score"], strict=True)
        if scores is not None
    ]
    hits = np.array([bool(scores[1] > scores[0]) for _, scores in asked])
    ties = np.array([bool(scores[1] == scores[0]) for _, scores in asked])
    places: dict[str, list[int]] = {}
    for i, (case, _) in enumerate(asked):
        places.setdefault(case.group, []).append(i)
    shares = {
        group: float(hits[rows].mean()) for group, rows in sorted(places.items()) if len(rows) >= min_count
    }
    metrics: dict[str, Any] = {
        f"{name}_macro": mean_or_reason(shares, f"none of its groups comes {min_count} times")
    }
    metrics |= accuracy(f"{name}_micro", hits)
    if symmetric is not None:
        left = {group: share for group, share in shares.items() if group not in symmetric}
        metrics[f"{name}_macro_asymmetric"] = mean_or_reason(left, "all its relations hold both ways")
        metrics |= {f"{name}={group}": share for group, share in shares.items()}
    return metrics | {
        f"{name}_groups": len(shares),
        f"{name}_ties": float(ties.mean()),
        f"{name}_n": len(hits),
    }, heard


def mean_or_reason(shares: dict[str, float], reason: str) -> float | str:
    """The mean over groups; a metric that is not there says why and is never 0."""
    return sum(shares.values()) / len(shares) if shares else f"skipped: {reason}"


def accuracy(name: str, hits: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """A share of hits and its bootstrap interval of 95 %."""
    low, high = bootstrap_interval(hits)
    return {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high}


def symmetric_relations(data: Path) -> Collection[str]:
    """The names beside the data, else SYMMETRIC."""
    path = data / "symmetric_relations.json"
    if not path.exists():
        return SYMMETRIC
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of relations' names")
    return set(names)


def order_metrics(
    matcher: Matcher, name: str, path: Path, *, seed: int = 0
) -> tuple[dict[str, Any], MatchScores]:
    """Precision at 1 of a caption among its wrong orders; an order that is no other is dropped and counted."""
    pictures = read_captioned(path)
    captions = [caption for _, group in pictures for caption in group]
    options = stored_options(path.with_name(f"{path.stem}_options.json"), captions, seed=seed)
    groups = iter([(group[0], *wrong_options(group)) for group in options.texts])
    dropped = 4 * len(captions) - sum(len(wrong_options(group)) for group in options.texts)
    per_picture: list[tuple[Read, list[tuple[str, ...]]]] = []
    for read, own in pictures:
        usable = [group for group in (next(groups) for _ in own) if len(group) > 1]
        per_picture += [(read, usable)] if usable else []
    if not per_picture:
        raise UserError(f"{path}: no caption has words that can change places")
    heard = score_questions(
        matcher, [Question(read, tuple(text for group in own for text in group)) for read, own in per_picture]
    )
    hits, ties = [], []
    for (_, asked), scores in zip(per_picture, heard.scores["score"], strict=True):
        for part in scores.split([len(group) for group in asked]) if scores is not None else ():
            hits.append(bool((part[0] > part[1:]).all()))
            ties.append(bool(part[0] == part[1:].max()))
    metrics: dict[str, Any] = accuracy(name, np.array(hits))
    metrics |= {
        f"{name}_ties": float(np.mean(ties)),
        f"{name}_n": len(hits),
        f"{name}_dropped_options": dropped,
    }
    return metrics | {f"{name}_tagger": options.tagger, f"{name}_seed": options.seed}, heard
