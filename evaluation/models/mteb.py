"""An Encoder as a model of mteb: `mteb.evaluate(as_mteb(encoder), tasks=[...])`.

mteb hands over batches of pictures (PIL), of texts, or of both, which are added as its own CLIP models do, and asks
for arrays. Its numbers are its own: one prompt per class, and ties count as hits. Not for mteb's tasks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import normalize

from evaluation.models.encoder import Encoder, embed_texts
from teachercache.core.errors import UserError


def as_mteb(encoder: Encoder) -> Any:
    """What `mteb.evaluate` takes; UserError where mteb is missing."""
    try:
        from mteb.models import ModelMeta
        from mteb.similarity_functions import cos_sim, pairwise_cos_sim
    except ImportError as error:
        raise UserError(
            f"mteb is not there or another version ({error}): pip install 'mteb>=2.20'"
        ) from error
    meta = ModelMeta.create_empty(
        overwrites={
            "name": f"local/{encoder.name.replace('/', '-')}",
            "revision": "local",
            "modalities": ["image", "text"],
        }
    )
    return MtebModel(encoder, meta, cos_sim, pairwise_cos_sim)


class MtebModel:
    """mteb's protocol of an encoder, by names alone."""

    def __init__(self, encoder: Encoder, meta: Any, similarity: Any, similarity_pairwise: Any):
        self.encoder, self.mteb_model_meta = encoder, meta
        self.similarity, self.similarity_pairwise = similarity, similarity_pairwise

    def encode(self, inputs: Iterable[Mapping[str, Any]], **words: Any) -> Any:
        """Unit embeddings [n, dim], a numpy array."""
        parts = []
        for batch in inputs:
            found = [self._images(batch["image"])] if batch.get("image") is not None else []
            found += [embed_texts(self.encoder, list(batch["text"]))] if batch.get("text") is not None else []
            parts.append(normalize(torch.stack(found).sum(0), dim=1))
        return torch.cat(parts).numpy()

    def _images(self, pictures: Iterable[Any]) -> torch.Tensor:
        encoder = self.encoder
        batch = torch.stack([encoder.view(picture.convert("RGB")) for picture in pictures])
        with torch.inference_mode():
            return normalize(encoder.encode_image(batch.to(encoder.device)).float().cpu(), dim=1)
