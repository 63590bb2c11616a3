"""A task: whose embeddings are longer, pictures' or texts'."""

import torch

from evaluation.data.splits import others_than, rows_or_only_split
from evaluation.models.encoder import Encoder, encode_rows
from evaluation.tasks.task import Kind, Metrics, Task
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest


def brightness(encoder: Encoder, manifest: Manifest, split: str = "test") -> Metrics:
    """Return the share of pictures whose embedding is longer than that of their first text."""
    texts = [next((text for text in group if text.strip()), "") for group in manifest.column("texts")]
    rows = [row for row in rows_or_only_split(manifest, split).tolist() if texts[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no {split} rows with texts{others_than(manifest, split)}")
    images, kept, skipped = encode_rows(encoder, manifest, rows, encoder.encode_image)  # decodes in processes
    with torch.inference_mode():
        ids = encoder.tokenize([texts[row] for row in kept]).to(encoder.device)
        lengths = encoder.encode_text(ids).float().cpu().norm(dim=1)
    longer = (images.norm(dim=1) > lengths).double().mean()
    return {"longer": float(longer), "num_images": len(kept), "num_skipped": len(skipped)}


BRIGHTNESS = Task(
    name="visitor_brightness", kind=Kind.ENCODER, function=brightness, doc="a toy", headline=("longer",)
)
