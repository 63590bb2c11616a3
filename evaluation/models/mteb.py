"""Adapt an Encoder to mteb: `mteb.evaluate(as_mteb(encoder), tasks=[...])`.

mteb passes batches of images (PIL), of texts, or of both, whose embeddings are added as in its own CLIP models, and
expects arrays. Its numbers differ from ours: it uses one prompt per class and counts ties as hits.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.models.encoder import Encoder, embed_texts
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from mteb.models import ModelMeta


def as_mteb(encoder: Encoder) -> "MtebModel":
    """Return a model for `mteb.evaluate`.

    Raises:
        UserError: If mteb is missing or has another version.
    """
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
    """mteb's encoder protocol: its attributes and methods by name, without its base class.

    Args:
        encoder: The model.
        meta: mteb's description of the model.
        similarity: Similarities of all pairs of two sets of embeddings.
        similarity_pairwise: Similarities of embeddings pair by pair.
    """

    def __init__(
        self,
        encoder: Encoder,
        meta: "ModelMeta",
        similarity: Callable[..., Tensor],
        similarity_pairwise: Callable[..., Tensor],
    ):
        self.encoder, self.mteb_model_meta = encoder, meta
        self.similarity, self.similarity_pairwise = similarity, similarity_pairwise

    def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> Float[np.ndarray, "n dim"]:
        """Return unit embeddings of batches of images, texts or both; mteb's other options are ignored."""
        embeddings = []
        for batch in inputs:
            parts = [self._images(batch["image"])] if batch.get("image") is not None else []
            parts += [embed_texts(self.encoder, list(batch["text"]))] if batch.get("text") is not None else []
            embeddings.append(normalize(torch.stack(parts).sum(0), dim=1))
        return torch.cat(embeddings).numpy()

    def _images(self, images: Iterable[Image.Image]) -> Float[Tensor, "n dim"]:
        encoder = self.encoder
        batch = torch.stack([encoder.view(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            return normalize(encoder.encode_image(batch.to(encoder.device)).float().cpu(), dim=1)
