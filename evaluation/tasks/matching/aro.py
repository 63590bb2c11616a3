"""ARO (Yuksekgonul et al. 2023): relations and attributes of an image crop, and the word order of captions.

A hit is a true caption with a strictly higher score than every wrong one. A tie, which ARO's argmax gives to whichever
caption comes first, is a miss and is counted. Macro is the mean over relations, or over ordered pairs of attributes with
at least 25 cases as in ARO's code; micro is the mean over cases. `relation_macro_asymmetric` leaves out symmetric
relations: a few obvious ones, or those in `symmetric_relations.json` beside the data (ARO's notebook has a list, most of
which is rare rather than symmetric). `aro_overall` is the mean of the two macros; SDS-CLIP does not define its own.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from evaluation.data.compositional import Case, Read, read_attributions, read_captioned, read_relations
from evaluation.data.files import file_json
from evaluation.data.word_orders import stored_options, wrong_options
from evaluation.metrics.ranking import bootstrap_interval
from evaluation.models.matcher import Matcher, MatchScores, Question, score_questions, total_cost
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError

SYMMETRIC = ("around", "beside", "by", "close to", "near", "next to", "touching", "with")
MIN_COUNT = 25  # cases of a pair of attributes in the macro mean
RELATION, ATTRIBUTION = "relation", "attribution"
CASES: dict[str, tuple[str, Callable[[Path], list[Case]]]] = {
    RELATION: ("visual_genome_relation.json", read_relations),
    ATTRIBUTION: ("visual_genome_attribution.json", read_attributions),
}
ORDERS = {
    "coco_order": ("coco_karpathy_test.json", "coco"),
    "flickr_order": ("flickr30k_test.json", "flickr30k"),
}


def evaluate(matcher: Matcher, data: Path, *, min_count: int = MIN_COUNT, seed: int = 0) -> Metrics:
    """Measure the sets whose files exist.

    Args:
        matcher: The model.
        data: The folder with the files; order sets may also be in its coco/ and flickr30k/.
        min_count: Cases of a pair of attributes in the macro mean.
        seed: Seed of the wrong orders.

    Raises:
        UserError: If no file exists, or one is malformed.
    """
    metrics: Metrics = {}
    measured: list[MatchScores] = []
    for name, (file, read) in CASES.items():
        if (data / file).is_file():
            symmetric = symmetric_relations(data) if name == RELATION else None
            least = min_count if name == ATTRIBUTION else 1
            values, scores = cases_metrics(
                matcher, name, read(data / file), min_count=least, symmetric=symmetric
            )
            metrics |= values
            measured.append(scores)
    for name, (file, folder) in ORDERS.items():
        path = next((path for path in (data / file, data / folder / file) if path.is_file()), None)
        if path is not None:
            order_values, scores = order_metrics(matcher, name, path, seed=seed)
            metrics |= order_values
            measured.append(scores)
    if not measured:
        files = ", ".join(file for file, *_ in (*CASES.values(), *ORDERS.values()))
        raise UserError(f"no set of ARO in {data}: put one or more of {files} there")
    macros = [macro for name in CASES if isinstance(macro := metrics.get(f"{name}_macro"), float)]
    if len(macros) == len(CASES):
        metrics["aro_overall"] = sum(macros) / len(macros)
    return metrics | total_cost(measured)


def cases_metrics(
    matcher: Matcher,
    name: str,
    cases: Sequence[Case],
    *,
    min_count: int = 1,
    symmetric: Collection[str] | None = None,
) -> tuple[dict[str, float | str], MatchScores]:
    """Compute macro and micro accuracy of true against false captions.

    Args:
        matcher: The model.
        name: Prefix of the metrics' keys.
        cases: The cases; the options are in ARO's order [false, true].
        min_count: Cases that a group needs for the macro mean.
        symmetric: Groups to leave out of the additional mean over asymmetric groups; None for no such mean.

    Returns:
        The metrics, and the scores.
    """
    measured = score_questions(matcher, [Question(case.picture, (case.false, case.true)) for case in cases])
    readable = [
        (case.group, scores)
        for case, scores in zip(cases, measured.scores["score"], strict=True)
        if scores is not None
    ]
    hits = np.array([bool(scores[1] > scores[0]) for _, scores in readable])
    ties = np.array([bool(scores[1] == scores[0]) for _, scores in readable])
    rows_of: dict[str, list[int]] = {}
    for i, (group, _) in enumerate(readable):
        rows_of.setdefault(group, []).append(i)
    shares = {
        group: float(hits[rows].mean()) for group, rows in sorted(rows_of.items()) if len(rows) >= min_count
    }
    metrics: dict[str, float | str] = {
        f"{name}_macro": mean_or_reason(shares, f"none of its groups comes {min_count} times")
    }
    metrics |= accuracy(f"{name}_micro", hits)
    if symmetric is not None:
        asymmetric = {group: share for group, share in shares.items() if group not in symmetric}
        metrics[f"{name}_macro_asymmetric"] = mean_or_reason(asymmetric, "all its relations hold both ways")
        metrics |= {f"{name}={group}": share for group, share in shares.items()}
    metrics |= {f"{name}_groups": len(shares), f"{name}_ties": float(ties.mean()), f"{name}_n": len(hits)}
    return metrics, measured


def mean_or_reason(shares: Mapping[str, float], reason: str) -> float | str:
    """Return the mean over groups, or why there is none; it is never 0 then."""
    return sum(shares.values()) / len(shares) if shares else f"skipped: {reason}"


def accuracy(name: str, hits: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """Return the share of hits and its bootstrap interval of 95 %."""
    low, high = bootstrap_interval(hits)
    return {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high}


def symmetric_relations(data: Path) -> Collection[str]:
    """Return the relations in symmetric_relations.json beside the data, or SYMMETRIC if there is no such file.

    Raises:
        UserError: If the file is not a list of names.
    """
    path = data / "symmetric_relations.json"
    if not path.exists():
        return SYMMETRIC
    names = file_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of relations' names")
    return set(names)


def order_metrics(
    matcher: Matcher, name: str, path: Path, *, seed: int = 0
) -> tuple[dict[str, float | str], MatchScores]:
    """Compute the precision at 1 of a caption among its wrong orders.

    Args:
        matcher: The model.
        name: Prefix of the metrics' keys.
        path: Images with captions; wrong orders are stored beside it.
        seed: Seed of the wrong orders.

    Returns:
        The metrics, and the scores. Wrong orders that equal the caption are dropped and counted.

    Raises:
        UserError: If no caption has a wrong order.
    """
    images = read_captioned(path)
    captions = [caption for _, group in images for caption in group]
    options = stored_options(path.with_name(f"{path.stem}_options.json"), captions, seed=seed)
    wrong = [wrong_options(group) for group in options.texts]
    num_dropped = 4 * len(captions) - sum(map(len, wrong))
    groups = iter([(group[0], *others) for group, others in zip(options.texts, wrong, strict=True)])
    per_image: list[tuple[Read, list[tuple[str, ...]]]] = []
    for read, image_captions in images:
        usable = [group for group in (next(groups) for _ in image_captions) if len(group) > 1]
        per_image += [(read, usable)] if usable else []
    if not per_image:
        raise UserError(f"{path}: no caption has words that can change places")
    questions = [
        Question(read, tuple(text for group in usable for text in group)) for read, usable in per_image
    ]
    measured = score_questions(matcher, questions)
    hits, ties = [], []
    for (_, usable), scores in zip(per_image, measured.scores["score"], strict=True):
        for of_group in scores.split([len(group) for group in usable]) if scores is not None else ():
            hits.append(bool((of_group[0] > of_group[1:]).all()))
            ties.append(bool(of_group[0] == of_group[1:].max()))
    metrics: dict[str, float | str] = {**accuracy(name, np.array(hits))}
    metrics |= {
        f"{name}_ties": float(np.mean(ties)),
        f"{name}_n": len(hits),
        f"{name}_dropped_options": num_dropped,
        f"{name}_tagger": options.tagger,
        f"{name}_seed": options.seed,
    }
    return metrics, measured
