"""A task: whose embeddings are longer, pictures' or texts'."""

from typing import Any

import numpy as np
import torch

from evaluation.models.encoder import Encoder
from evaluation.tasks.task import Kind, Metrics, Task
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image


def brightness(encoder: Encoder, manifest: Manifest) -> Metrics:
    """Return the share of pictures whose embedding is longer than their row's text embedding."""
    rows = range(len(manifest))
    samples = [manifest.row(row) for row in rows]
    images = torch.stack([encoder.view(read_image(manifest, sample)) for sample in samples])
    with torch.no_grad():
        lengths: Any = encoder.encode_image(images.to(encoder.device)).norm(dim=1)
        texts: Any = encoder.encode_text(encoder.tokenize([sample.texts[0] for sample in samples])).norm(
            dim=1
        )
    return {"longer": float(np.mean((lengths > texts).cpu().numpy())), "num_rows": len(manifest)}


BRIGHTNESS = Task(
    name="visitor_brightness", kind=Kind.ENCODER, function=brightness, doc="a toy", headline=("longer",)
)
