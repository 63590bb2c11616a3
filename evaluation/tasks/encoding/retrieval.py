"""Image-text retrieval: R@1, R@5 and R@10 in both directions. Any text of an image counts (Karpathy's protocol)."""

import statistics
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evaluation.data.same_pictures import by_picture
from evaluation.data.splits import others_than, rows_or_only_split
from evaluation.metrics.ranking import recall_at, strict_ranks
from evaluation.models.encoder import Encoder, embed_images, embed_texts
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

CHUNK = 1024  # queries scored at a time


def evaluate(
    encoder: Encoder, manifest: Manifest, split: str = "test", *, captions: int | None = None, fold: int = 0
) -> Metrics:
    """Compute recalls over a split, with clip-benchmark's keys, and rates of ties.

    Args:
        encoder: The model.
        manifest: Images with texts; empty texts and rows without texts are left out. Rows that show the same picture
            count as one, with the texts of all.
        split: The split to measure; if the data have one other split and no training rows, that one is measured.
        captions: Use only the first so many captions of each image.
        fold: Also average the recalls over folds of that many images in the data's order, with keys `<fold>/...`.
            Images after the last full fold are in none.

    Raises:
        UserError: If the split has no rows with texts, or no image can be read.
    """
    rows = rows_or_only_split(manifest, split).tolist()
    texts = [[text for text in group if text.strip()] for group in manifest.column("texts")]
    rows = [row for row in rows if texts[row]]
    if not rows:
        raise UserError(
            f"{manifest.data} has no {split} rows with texts{others_than(manifest, split)}: retrieval needs captions"
        )
    groups = by_picture(manifest, rows)
    rows = [group[0] for group in groups]
    for group in groups:
        texts[group[0]] = [text for row in group for text in texts[row]][:captions]
    images, kept, skipped = embed_images(encoder, manifest, rows)
    pairs = [(i, text) for i, row in enumerate(kept) for text in texts[row]]
    owner = torch.tensor([i for i, _ in pairs])
    sentences = embed_texts(encoder, [text for _, text in pairs])
    whole = recalls(images, sentences, owner)
    metrics: Metrics = {**whole}
    if fold:
        folds = []
        for start in range(0, len(images) - fold + 1, fold):
            inside = (owner >= start) & (owner < start + fold)
            folds.append(recalls(images[start : start + fold], sentences[inside], owner[inside] - start))
        if folds:
            metrics |= {f"{fold}/{key}": _mean([values[key] for values in folds]) for key in whole}
        metrics["num_folds"] = len(folds)
    return metrics | {
        "num_images": len(images),
        "num_texts": len(sentences),
        "num_skipped": len(skipped),
    }


def recalls(
    images: Float[Tensor, "images dim"], sentences: Float[Tensor, "texts dim"], owner: Int[Tensor, " texts"]
) -> dict[str, float | None]:
    """Compute R@1, R@5, R@10 in both directions and the rates of ties.

    Args:
        images: Unit embeddings.
        sentences: Unit embeddings.
        owner: The image of each text.

    Returns:
        The metrics. R@K is None if there are fewer than K wrong answers, because every model would score 1.
    """
    image_ids = torch.arange(len(images))
    i2t, i2t_ties = _ranks(images, sentences, lambda chunk: image_ids[chunk, None] == owner[None])
    t2i, t2i_ties = _ranks(sentences, images, lambda chunk: owner[chunk, None] == image_ids[None])
    wrong_images, wrong_texts = len(images) - 1, len(sentences) - int(owner.bincount().max())
    metrics: dict[str, float | None] = {}
    for k in (1, 5, 10):
        metrics[f"image_retrieval_recall@{k}"] = recall_at(t2i, k) if k <= wrong_images else None
    for k in (1, 5, 10):
        metrics[f"text_retrieval_recall@{k}"] = recall_at(i2t, k) if k <= wrong_texts else None
    return metrics | {
        "image_retrieval_tie_rate": float(t2i_ties.double().mean()),
        "text_retrieval_tie_rate": float(i2t_ties.double().mean()),
    }


def _ranks(
    queries: Float[Tensor, "queries dim"],
    items: Float[Tensor, "items dim"],
    positive: Callable[[slice], Bool[Tensor, "chunk items"]],
) -> tuple[Int[Tensor, " queries"], Bool[Tensor, " queries"]]:
    """Strict ranks and ties of all queries; `positive` returns which items are right for a slice of queries."""
    ranks, ties = [], []
    for start in range(0, len(queries), CHUNK):
        chunk = slice(start, start + CHUNK)
        chunk_ranks, chunk_ties = strict_ranks(queries[chunk] @ items.T, positive(chunk))
        ranks.append(chunk_ranks)
        ties.append(chunk_ties)
    return torch.cat(ranks), torch.cat(ties)


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if len(numbers) == len(values) else None
