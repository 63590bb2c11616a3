"""Image-text retrieval: R@1/5/10 both ways. Any of an image's texts counts (Karpathy's protocol)."""

import statistics
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluation.metrics.ranking import recall_at, strict_ranks
from evaluation.models.encoder import Encoder, embed_images, embed_texts
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

CHUNK = 1024  # queries scored at once


def evaluate(
    encoder: Encoder, manifest: Manifest, split: str = "test", *, captions: int | None = None, fold: int = 0
) -> dict[str, Any]:
    """Recalls over a split; keys as clip-benchmark writes them, ties and counts beside them.

    `captions`: of each picture the first so many alone. `fold`: also the mean over that many pictures at a time, in the
    data's order, keys behind `<fold>/`; what is left over is in no fold.
    """
    rows = manifest.rows_of_split(split).tolist()
    texts = [[text for text in group if text.strip()][:captions] for group in manifest.column("texts")]
    rows = [row for row in rows if texts[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no {split} rows with texts: retrieval needs captions")
    images, kept, skipped = embed_images(encoder, manifest, rows)
    pairs = [(i, text) for i, row in enumerate(kept) for text in texts[row]]
    owner = torch.tensor([i for i, _ in pairs])
    sentences = embed_texts(encoder, [text for _, text in pairs])
    metrics = recalls(images, sentences, owner)
    folds = []
    for start in range(0, len(images) - fold + 1 if fold else 0, max(1, fold)):
        inside = (owner >= start) & (owner < start + fold)
        folds.append(recalls(images[start : start + fold], sentences[inside], owner[inside] - start))
    means = {f"{fold}/{key}": _mean([each[key] for each in folds]) for key in metrics} if folds else {}
    counts = {"num_images": len(images), "num_texts": len(sentences), "num_skipped": len(skipped)}
    return metrics | means | ({"num_folds": len(folds)} if fold else {}) | counts


def recalls(
    images: Float[Tensor, "images dim"], sentences: Float[Tensor, "texts dim"], owner: Int[Tensor, " texts"]
) -> dict[str, float | None]:
    """R@1/5/10 both ways and tie rates; `owner` is each text's picture.

    R@K is None where there are fewer than K wrong answers: every model would score 1.
    """

    def both(queries, items, positive_of):
        ranks, ties = [], []
        for start in range(0, len(queries), CHUNK):
            part = slice(start, start + CHUNK)
            found = strict_ranks(queries[part] @ items.T, positive_of(part))
            ranks.append(found[0])
            ties.append(found[1])
        return torch.cat(ranks), torch.cat(ties)

    image_ids = torch.arange(len(images))
    i2t, i2t_ties = both(images, sentences, lambda part: image_ids[part, None] == owner[None])
    t2i, t2i_ties = both(sentences, images, lambda part: owner[part, None] == image_ids[None])
    wrong_images, wrong_texts = len(images) - 1, len(sentences) - int(owner.bincount().max())
    metrics = {
        f"image_retrieval_recall@{k}": recall_at(t2i, k) if k <= wrong_images else None for k in (1, 5, 10)
    }
    metrics |= {
        f"text_retrieval_recall@{k}": recall_at(i2t, k) if k <= wrong_texts else None for k in (1, 5, 10)
    }
    return metrics | {
        "image_retrieval_tie_rate": float(t2i_ties.double().mean()),
        "text_retrieval_tie_rate": float(i2t_ties.double().mean()),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None
