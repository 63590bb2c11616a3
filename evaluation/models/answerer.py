"""The contract of a model that chooses among answers, and what its scores mean: choices, ties, ensembles."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from teachercache.data.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A model under evaluation that scores the possible answers of rows.

    `score(manifest, rows, which)` returns float32 scores [n, choices] of n rows of the manifest, higher for better
    answers. `which` is "q2a" or "qa2r" for VCR and "" for other tasks; the result is None if the model was not trained
    for it. A row of NaN means that the row could not be scored (no image): it is left out and counted. A single NaN is a
    wrong answer.

    Attributes:
        name: The model's name in results and tables.
        pretrained: Where its weights come from; together with `name` it identifies the model.
        task: The name of the task that it answers.
        score: See above. Columns are the four choices for VCR, `LABELS` of `teachercache.data.readers.questions` for
            SNLI-VE, and `answers` for VQA.
        answers: The answer vocabulary of VQA, one for each column.
        clusters: Whether the columns are clusters of the scored rows themselves, named without labels (transductive).
    """

    name: str
    pretrained: str
    task: str
    score: Callable[[Manifest, np.ndarray, str], np.ndarray | None]
    answers: tuple[str, ...] = ()
    clusters: bool = False


def pick(scores: Float[np.ndarray, "n choices"]) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return the best column of each row, and whether the best score is a tie.

    The column is -1, which is never right, if the best score is a tie or a score is NaN.
    """
    best = scores.max(1, keepdims=True, initial=-np.inf)
    ties = (scores == best).sum(1) > 1
    unclear = ties | np.isnan(scores).any(1)
    return np.where(unclear, -1, scores.argmax(1)), ties


def scored_rows(scores: Float[np.ndarray, "n choices"]) -> Bool[np.ndarray, " n"]:
    """Return which rows could be scored: those that are not entirely NaN."""
    return ~np.isnan(scores).all(1)


def ensemble(answerers: Sequence[Answerer]) -> Answerer:
    """Return the mean of the softmax probabilities of those models that score a row.

    The vocabularies of VQA are joined; a model gives probability 0 to answers outside its own.
    """
    answers = tuple(dict.fromkeys(answer for answerer in answerers for answer in answerer.answers))

    def score(manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray | None:
        scores = [(answerer, answerer.score(manifest, rows, which)) for answerer in answerers]
        probabilities = [
            align_columns(softmax(values), answerer.answers, answers)
            for answerer, values in scores
            if values is not None
        ]
        return np.mean(probabilities, axis=0) if probabilities else None

    return Answerer(
        f"ensemble of {' + '.join(answerer.name for answerer in answerers)}",
        " + ".join(answerer.pretrained for answerer in answerers),
        answerers[0].task,
        score,
        answers,
        clusters=any(answerer.clusters for answerer in answerers),
    )


def softmax(scores: Float[np.ndarray, "n choices"]) -> Float[np.ndarray, "n choices"]:
    """Return the softmax of each row."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def align_columns(
    probabilities: Float[np.ndarray, "n choices"], answers: Sequence[str], all_answers: Sequence[str]
) -> Float[np.ndarray, "n all_choices"]:
    """Rearrange the columns of `answers` as those of `all_answers`, with 0 for new ones.

    Without a vocabulary (`all_answers` is empty) the columns stay as they are.
    """
    if not all_answers or tuple(answers) == tuple(all_answers):
        return probabilities
    column_of = {answer: i for i, answer in enumerate(all_answers)}
    out = np.zeros((len(probabilities), len(all_answers)), probabilities.dtype)
    out[:, [column_of[answer] for answer in answers]] = probabilities
    return out


def by_group(hits: np.ndarray, groups: Sequence[str | None], name: str) -> dict[str, float]:
    """Return the mean of `hits` in each group under the key `name=group`; rows whose group is None count in none."""
    rows_of: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group is not None:
            rows_of.setdefault(group, []).append(i)
    return {f"{name}={group}": float(hits[rows].mean()) for group, rows in sorted(rows_of.items())}
