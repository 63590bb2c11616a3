"""Image-text retrieval: R@1/5/10 both ways. Any of an image's texts counts (Karpathy's protocol)."""

from typing import Any

import torch

from evaluation.encoder import Encoder, embed_images, embed_texts
from evaluation.metrics import recall_at, strict_ranks
from teachercache.names import UserError
from teachercache.samples import Manifest

CHUNK = 1024  # queries scored at once


def evaluate(encoder: Encoder, manifest: Manifest, split: str = "test") -> dict[str, Any]:
    """Recalls over a split; keys as clip-benchmark writes them, ties and counts beside them."""
    rows = manifest.rows_of_split(split).tolist()
    texts = manifest.column("texts")
    rows = [row for row in rows if any(text.strip() for text in texts[row])]
    if not rows:
        raise UserError(f"{manifest.data} has no {split} rows with texts: retrieval needs captions")
    images, kept, skipped = embed_images(encoder, manifest, rows)
    pairs = [(i, text) for i, row in enumerate(kept) for text in texts[row] if text.strip()]
    owner = torch.tensor([i for i, _ in pairs])
    sentences = embed_texts(encoder, [text for _, text in pairs])

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
    metrics = {f"image_retrieval_recall@{k}": recall_at(t2i, k) for k in (1, 5, 10)}
    metrics |= {f"text_retrieval_recall@{k}": recall_at(i2t, k) for k in (1, 5, 10)}
    return metrics | {
        "image_retrieval_tie_rate": float(t2i_ties.double().mean()),
        "text_retrieval_tie_rate": float(i2t_ties.double().mean()),
        "num_images": len(images),
        "num_texts": len(sentences),
        "num_skipped": len(skipped),
    }
