"""A cache as a model that answers: CLIP-TD's zero-shot baselines from embeddings alone. No teacher is loaded.

| task | score of a choice |
|---|---|
| VCR, IA | cosine of picture and answer; QA2R: of picture and rationale |
| VCR, IQA | cosine of picture and "question answer"; QA2R: of picture and "question right-answer rationale" |
| SNLI-VE | 3-means of the cosines of picture and hypothesis over the rows asked: low contradicts, high entails |
| VQA | cosine of picture and answer, for each answer of the vocabulary |

All times the teacher's scale. Not for students, which answer by heads of their own.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics.vqa_answers import normalise_answer, vocabulary
from evaluation.models.answerer import Answerer
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS
from teachercache.search.vectors import unit

CHUNK = 4096  # rows whose vectors are in memory at once
KINDS = {"IA": {"q2a": "choice", "qa2r": "rationale"}, "IQA": {"q2a": "pair", "qa2r": "rationale_pair"}}


def answerers(path: str | Path, task: str) -> list[Answerer]:
    """How the teacher of a cache does a task, each way as a model of its own."""
    cache = store.open_complete(path)
    widths = {name: cache.fields[name].shape for name in ("image_emb", "text_emb") if name in cache.fields}
    if len(widths) < 2 or len(set(widths.values())) > 1 or cache.meta.views:
        raise UserError(
            f"{path} has no pictures and texts in one space, seen plainly: zero-shot needs a cache of a "
            "CLIP teacher with --outputs embeddings and without --views"
        )
    spec = cache.meta.spec
    if task == "vcr":
        return [
            Answerer(f"{spec.name} {name}", str(path), task, functools.partial(_vcr, cache, kinds))
            for name, kinds in KINDS.items()
        ]
    if task == "snli_ve":
        return [
            Answerer(
                f"{spec.name} 3-means", str(path), task, functools.partial(_snli_ve, cache), clusters=True
            )
        ]
    words, vectors = answers_of(cache)
    score = functools.partial(_vqa, cache, vectors)
    return [Answerer(f"{spec.name} nearest answer", str(path), task, score, tuple(words))]


def scale_of(cache: store.Cache) -> float:
    """What the teacher multiplies its cosines by."""
    return float(np.exp(cache.meta.spec.constants.get("logit_scale", 0.0)))


def _vcr(
    cache: store.Cache, kinds: dict[str, str], manifest: Manifest, rows: np.ndarray, which: str
) -> np.ndarray:
    return scale_of(cache) * cosines(cache, manifest, rows, kinds[which], 4)


def _snli_ve(cache: store.Cache, manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray:
    similar = cosines(cache, manifest, rows, "hypothesis", 1)[:, 0]
    low, middle, high = anchors(similar[~np.isnan(similar)])
    place = {"contradiction": low, "neutral": middle, "entailment": high}
    return (-scale_of(cache) * np.abs(similar[:, None] - [[place[label] for label in LABELS]])).astype(
        np.float32
    )


def anchors(similar: np.ndarray) -> tuple[float, float, float]:
    """The three means of the cosines, lowest first; one for all where there are fewer than three different ones."""
    if len(np.unique(similar)) < 3:
        return (0.0, 0.0, 0.0)  # equally far from all: a tie, which is never a hit
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError("zero-shot SNLI-VE needs scikit-learn: pip install 'teachercache[eval]'") from error
    found = KMeans(n_clusters=3, n_init=10, random_state=0).fit(similar.astype(np.float64)[:, None])
    low, middle, high = sorted(found.cluster_centers_[:, 0].tolist())
    return low, middle, high


def _vqa(
    cache: store.Cache, vectors: np.ndarray, manifest: Manifest, rows: np.ndarray, which: str
) -> np.ndarray:
    at = places(cache, manifest, rows)
    scores = scale_of(cache) * (unit(store.read_field(cache, "image_emb")[at]) @ vectors.T)
    scores[~np.asarray(store.read_field(cache, "valid"))[at]] = np.nan
    return scores


def answers_of(cache: store.Cache) -> tuple[list[str], np.ndarray]:
    """VQA's vocabulary of the cached training rows (of all, where none are), and the answers' unit vectors."""
    manifest = store.cached_manifest(cache)
    rows = manifest.rows_of_split("train")
    rows = rows if len(rows) else np.arange(len(manifest))
    valid = np.asarray(store.read_field(cache, "text_valid"))
    first: dict[str, tuple[int, int]] = {}
    said: list[str] = []
    for row in rows.tolist():
        task, texts = (
            json.loads(manifest.table["task"][row].as_py() or "{}"),
            manifest.table["texts"][row].as_py(),
        )
        column = column_of(task, "answer")
        if column >= 0 and valid[row, column]:
            first.setdefault(normalise_answer(texts[column]), (row, column))
            said.append(texts[column])
    if not said:
        raise UserError(
            f"{cache.path} holds no answers: build it from VQA's questions with their annotations beside them"
        )
    words = vocabulary(said)
    stored = store.read_field(cache, "text_emb")
    return words, unit(np.stack([stored[first[word]] for word in words]))


def cosines(cache: store.Cache, manifest: Manifest, rows: np.ndarray, kind: str, num: int) -> np.ndarray:
    """Cosines of each row's picture and its texts of one kind, float32 [n, num]; NaN where one cannot be had."""
    out = np.full((len(rows), num), np.nan, np.float32)
    if not len(rows):
        return out
    at = places(cache, manifest, rows)
    images, texts = store.read_field(cache, "image_emb"), store.read_field(cache, "text_emb")
    usable, told = (
        np.asarray(store.read_field(cache, "valid")),
        np.asarray(store.read_field(cache, "text_valid")),
    )
    columns = np.array(
        [column_of(json.loads(manifest.table["task"][row].as_py() or "{}"), kind) for row in rows.tolist()]
    )
    for start in range(0, len(rows), CHUNK):
        part = start + np.flatnonzero(
            (columns[start : start + CHUNK] >= 0) & usable[at[start : start + CHUNK]]
        )
        if not len(part):
            continue
        pictures = unit(images[at[part]])
        for k in range(num):
            found = (pictures * unit(texts[at[part], columns[part] + k])).sum(1)
            out[part, k] = np.where(told[at[part], columns[part] + k], found, np.nan)
    return out


def column_of(task: dict[str, Any], kind: str) -> int:
    """Where a row's texts of a kind begin, -1 where it has none."""
    kinds = task.get("texts", [])
    return kinds.index(kind) if kind in kinds else -1


def places(cache: store.Cache, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """The cache's row of each row; UserError where one is missing or had other texts."""
    keys = manifest.table["key"].take(rows)
    at = store.join(cache, keys)
    if (at < 0).any():
        raise UserError(
            f"{(at < 0).sum()} of {len(rows)} rows of {manifest.data} are not in {cache.path}, the first is "
            f"'{keys[int(np.argmax(at < 0))]}': build a cache of it, {_other_cache(cache, manifest)}"
        )
    if manifest.digest != cache.meta.manifest:
        then = store.cached_manifest(cache).table["texts"].take(at)
        now = manifest.table["texts"].take(rows)
        changed = [
            i for i, (a, b) in enumerate(zip(then.to_pylist(), now.to_pylist(), strict=True)) if a != b
        ]
        if changed:
            raise UserError(
                f"{len(changed)} rows of {manifest.data} have other texts than in {cache.path}, the first is "
                f"'{keys[changed[0]]}': build a cache of it, {_other_cache(cache, manifest)}"
            )
    return at


def _other_cache(cache: store.Cache, manifest: Manifest) -> str:
    return f"`tc build --teacher {cache.meta.spec.name} --data {manifest.data}`"
