"""Answer questions from the embeddings of a cache alone: the zero-shot baselines of CLIP-TD. No teacher is loaded.

| task | score of a choice |
|---|---|
| VCR, IA | cosine of image and answer; QA2R: of image and rationale |
| VCR, IQA | cosine of image and "question answer"; QA2R: of image and "question right-answer rationale" |
| SNLI-VE | distance to the anchor of the label; anchors are 3-means of the cosines of image and hypothesis over all rows |
| VQA | cosine of image and answer, for each answer of the vocabulary |

All scores are multiplied by the teacher's logit scale.
"""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from evaluation.data.splits import rows_in
from evaluation.metrics.vqa_answers import normalize_answer, vocabulary
from evaluation.models.anchors import three_means
from evaluation.models.answerer import Answerer
from teachercache.cache import layout, store
from teachercache.cache.picture_bytes import replaced_pictures
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS
from teachercache.search.vectors import unit

CHUNK = 4096  # rows whose vectors are in memory at a time
# For each way to answer VCR the texts whose cosine counts
VCR_TEXTS = {"IA": {"q2a": "choice", "qa2r": "rationale"}, "IQA": {"q2a": "pair", "qa2r": "rationale_pair"}}


def answerers(path: str | Path, task: str) -> list[Answerer]:
    """Return the ways in which a cache answers the questions of a task, each as an Answerer.

    Args:
        path: A complete cache of a CLIP teacher, with image and text embeddings and without views.
        task: "vcr", "snli_ve" or "vqa".

    Raises:
        UserError: If the cache has no such embeddings, or no cache answers this task.
    """
    if task not in WAYS:
        raise UserError(f"{path}: a cache answers {', '.join(WAYS)}: pass a run trained on {task}")
    cache = store.open_complete(path)
    widths = {name: cache.fields[name].shape for name in ("image_emb", "text_emb") if name in cache.fields}
    if len(widths) < 2 or len(set(widths.values())) > 1 or cache.meta.views:
        raise UserError(
            f"{path} has no plain image and text embeddings in one space: zero-shot needs the fields "
            "image_emb and text_emb of a CLIP teacher (--outputs embeddings), of one width and without --views"
        )
    return WAYS[task](cache, str(path), task)


def _vcr_answerers(cache: store.Cache, pretrained: str, task: str) -> list[Answerer]:
    return [
        Answerer(f"{cache.meta.spec.name} {name}", pretrained, task, functools.partial(_vcr, cache, kinds))
        for name, kinds in VCR_TEXTS.items()
    ]


def _snli_ve_answerers(cache: store.Cache, pretrained: str, task: str) -> list[Answerer]:
    score = functools.partial(_snli_ve, cache)
    return [Answerer(f"{cache.meta.spec.name} 3-means", pretrained, task, score, clusters=True)]


def _vqa_answerers(cache: store.Cache, pretrained: str, task: str) -> list[Answerer]:
    words, vectors = answers_of(cache)
    score = functools.partial(_vqa, cache, vectors)
    return [Answerer(f"{cache.meta.spec.name} nearest answer", pretrained, task, score, tuple(words))]


WAYS: dict[str, Callable[[store.Cache, str, str], list[Answerer]]] = {
    "vcr": _vcr_answerers,
    "snli_ve": _snli_ve_answerers,
    "vqa": _vqa_answerers,
}


# ----------------------------------------------------------------------------------------------------
# Scores


def logit_scale(cache: store.Cache) -> float:
    """Return the factor of cosines in the teacher's softmax."""
    return float(np.exp(cache.meta.spec.constants.get("logit_scale", 0.0)))


def _vcr(
    cache: store.Cache, kinds: dict[str, str], manifest: Manifest, rows: np.ndarray, which: str
) -> np.ndarray:
    return logit_scale(cache) * cosines(cache, manifest, rows, kinds[which], 4)


def _snli_ve(cache: store.Cache, manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray:
    similar = cosines(cache, manifest, rows, "hypothesis", 1)[:, 0]
    means = three_means(similar[~np.isnan(similar)].astype(np.float64))
    # Without three distinct values all labels are equally far away: a tie, which is never a hit
    low, middle, high = (0.0, 0.0, 0.0) if means is None else means.tolist()
    anchor = {"contradiction": low, "neutral": middle, "entailment": high}
    distances = np.abs(similar[:, None] - [[anchor[label] for label in LABELS]])
    return (-logit_scale(cache) * distances).astype(np.float32)


def _vqa(
    cache: store.Cache, vectors: np.ndarray, manifest: Manifest, rows: np.ndarray, which: str
) -> np.ndarray:
    places = cache_rows(cache, manifest, rows)
    scores = logit_scale(cache) * (unit(store.read_field(cache, "image_emb")[places]) @ vectors.T)
    scores[~np.asarray(store.read_field(cache, "valid"))[places]] = np.nan
    return scores


def answers_of(cache: store.Cache) -> tuple[list[str], Float[np.ndarray, "answers dim"]]:
    """Return the answer vocabulary of a cache and the unit vectors of its answers.

    The vocabulary is that of the training rows, or of all rows if there are no training rows.

    Raises:
        UserError: If the cache holds no answers.
    """
    manifest = store.cached_manifest(cache)
    rows = rows_in(manifest, "train")
    rows = rows if len(rows) else np.arange(len(manifest))
    valid = np.asarray(store.read_field(cache, "text_valid"))
    first: dict[str, tuple[int, int]] = {}  # row and column of the first occurrence
    answers: list[str] = []
    for row in rows.tolist():
        texts = manifest.table["texts"][row].as_py()
        column = column_of(_task_of(manifest, row), "answer")
        if column >= 0 and valid[row, column]:
            first.setdefault(normalize_answer(texts[column]), (row, column))
            answers.append(texts[column])
    if not answers:
        raise UserError(
            f"{cache.path} holds no answers: build it from VQA's questions with their annotations beside them"
        )
    words = vocabulary(answers)
    stored = store.read_field(cache, "text_emb")
    return words, unit(np.stack([stored[first[word]] for word in words]))


def cosines(
    cache: store.Cache, manifest: Manifest, rows: Int[np.ndarray, " n"], kind: str, num: int
) -> Float[np.ndarray, "n num"]:
    """Return the cosines of each row's image and its texts of one kind, float32.

    Args:
        cache: The cache.
        manifest: The data that `rows` belong to; their keys must be in the cache.
        rows: Rows of the manifest.
        kind: A kind of texts, as the task column names it: "choice", "rationale", "hypothesis", ...
        num: How many texts of that kind a row has.

    Returns:
        Cosines; NaN for a missing image or text.
    """
    out = np.full((len(rows), num), np.nan, np.float32)
    if not len(rows):
        return out
    places = cache_rows(cache, manifest, rows)
    image_field, text_field = store.read_field(cache, "image_emb"), store.read_field(cache, "text_emb")
    image_valid: Bool[np.ndarray, " rows"] = np.asarray(store.read_field(cache, "valid"))
    text_valid: Bool[np.ndarray, "rows texts"] = np.asarray(store.read_field(cache, "text_valid"))
    columns = np.array([column_of(_task_of(manifest, row), kind) for row in rows.tolist()])
    for start in range(0, len(rows), CHUNK):
        span = slice(start, start + CHUNK)
        chunk = start + np.flatnonzero((columns[span] >= 0) & image_valid[places[span]])
        if not len(chunk):
            continue
        images = unit(image_field[places[chunk]])
        for k in range(num):
            products = (images * unit(text_field[places[chunk], columns[chunk] + k])).sum(1)
            out[chunk, k] = np.where(text_valid[places[chunk], columns[chunk] + k], products, np.nan)
    return out


def _task_of(manifest: Manifest, row: int) -> dict[str, Any]:
    return json.loads(manifest.table["task"][row].as_py() or "{}")


def column_of(task: dict[str, Any], kind: str) -> int:
    """Return the column of a row's first text of a kind, -1 if there is none."""
    kinds = task.get("texts", [])
    return kinds.index(kind) if kind in kinds else -1


# ----------------------------------------------------------------------------------------------------
# Rows


def cache_rows(cache: store.Cache, manifest: Manifest, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the cache's row for each row of the manifest, joined by their keys.

    Raises:
        UserError: If a row is missing in the cache, or had other texts or another picture when the cache was built.
    """
    keys = manifest.table["key"].take(rows)
    places = store.join(cache, keys)
    if (places < 0).any():
        raise UserError(
            f"{(places < 0).sum()} of {len(rows)} rows of {manifest.data} are not in {cache.path}, the first is "
            f"'{keys[int(np.argmax(places < 0))]}': build a cache of it, {_build_command(cache, manifest)}"
        )
    replaced = replaced_pictures(cache, places, manifest, rows)
    if manifest.digest != cache.meta.manifest:
        before = store.cached_manifest(cache).table["texts"].take(places).to_pylist()
        now = manifest.table["texts"].take(rows).to_pylist()
        replaced |= np.array([a != b for a, b in zip(before, now, strict=True)])
    if replaced.any():
        raise UserError(
            f"{replaced.sum()} rows of {manifest.data} have other texts or pictures than in {cache.path}, the first is "
            f"'{keys[int(np.argmax(replaced))]}': build a cache of it, {_build_command(cache, manifest)}"
        )
    return places


def _build_command(cache: store.Cache, manifest: Manifest) -> str:
    words = [
        "tc",
        "build",
        "--teacher",
        layout.printed_teacher(cache.meta.spec.name),
        "--data",
        manifest.data,
    ]
    return f"`{shlex.join(words)}`"
