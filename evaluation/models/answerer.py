"""What an evaluation sees of a model that chooses answers: scores of a row's choices. Not for loading models."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

SPLITS = ("val", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A model under evaluation; a task knows nothing else of it.

    `which` is "q2a" or "qa2r" for VCR, "" otherwise. Columns of SNLI-VE are the readers' LABELS. A row of NaN is one
    that could not be asked (no picture): it is left out and counted, while a single NaN is a wrong answer.
    """

    name: str
    pretrained: str
    task: str  # "vcr", "snli_ve" or "vqa"
    score: Callable[
        [Manifest, np.ndarray, str], np.ndarray | None
    ]  # float32 [n, choices]; None: not made for `which`
    answers: tuple[str, ...] = ()  # vqa: what the columns of score are
    clusters: bool = False  # columns are clusters of the very rows asked, named without labels


def pick(scores: Float[np.ndarray, "n choices"]) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The best column of each row, -1 where two share the best score or one is NaN; and where two share it."""
    best = scores.max(1, keepdims=True, initial=-np.inf)
    ties = (scores == best).sum(1) > 1
    unclear = ties | np.isnan(scores).any(1)
    return np.where(unclear, -1, scores.argmax(1)), ties


def asked(scores: Float[np.ndarray, "n choices"]) -> Bool[np.ndarray, " n"]:
    """Which rows could be asked: those not NaN from end to end."""
    return ~np.isnan(scores).all(1)


def ensemble(answerers: Sequence[Answerer]) -> Answerer:
    """The mean of the softmax of those that answer; a VQA answer that a model does not know has no chance with it."""
    answers = tuple(dict.fromkeys(answer for one in answerers for answer in one.answers))

    def score(manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray | None:
        found = [(one, one.score(manifest, rows, which)) for one in answerers]
        parts = [spread(softmax(part), one.answers, answers) for one, part in found if part is not None]
        return np.mean(parts, axis=0) if parts else None

    first = answerers[0]
    name, pretrained = (" + ".join(getattr(one, key) for one in answerers) for key in ("name", "pretrained"))
    return Answerer(
        f"ensemble of {name}",
        pretrained,
        first.task,
        score,
        answers,
        clusters=any(one.clusters for one in answerers),
    )


def softmax(scores: Float[np.ndarray, "n choices"]) -> Float[np.ndarray, "n choices"]:
    """Each row's softmax."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def spread(chances: np.ndarray, own: Sequence[str], all_answers: Sequence[str]) -> np.ndarray:
    """Columns of a model's own answers as columns of all answers; unchanged where there are none."""
    if not all_answers or tuple(own) == tuple(all_answers):
        return chances
    place = {answer: i for i, answer in enumerate(all_answers)}
    out = np.zeros((len(chances), len(all_answers)), chances.dtype)
    out[:, [place[answer] for answer in own]] = chances
    return out


def rows_to_measure(manifest: Manifest) -> np.ndarray:
    """Rows of the only split, else of val, else of test."""
    there = set(manifest.column("split"))
    if len(there) == 1:
        return np.arange(len(manifest))
    found = next((split for split in SPLITS if split in there), None)
    if found is None:
        raise UserError(
            f"{manifest.data} has the splits {', '.join(sorted(there))} but neither val nor test: pass the "
            "file of one split"
        )
    return manifest.rows_of_split(found)


def by_group(hits: np.ndarray, groups: Sequence[str | None], name: str) -> dict[str, float]:
    """`name=group` -> mean of the hits of its rows; rows of no group are in none."""
    places: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group is not None:
            places.setdefault(group, []).append(i)
    return {f"{name}={group}": float(hits[rows].mean()) for group, rows in sorted(places.items())}
