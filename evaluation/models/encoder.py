"""What an evaluation sees of a model: pictures and texts to embeddings. Not for loading models."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from teachercache.build.decode import ImageInput, Rows, WorkItem, decoded
from teachercache.core.errors import UserError
from teachercache.core.process import default_workers
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest
from teachercache.teachers.clip.towers import image_tower
from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model under evaluation; a task knows nothing else of it."""

    name: str
    pretrained: str
    size: tuple[int, int]
    view: Callable[[Any], Tensor]  # RGB picture -> [3, *size]
    tokenize: Callable[[list[str]], Tensor]
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    device: str = "cpu"  # where both expect their input
    tower: Any = None  # open_clip's picture tower behind encode_image, for tasks that look inside
    mean: tuple[float, ...] = (
        0.0,
        0.0,
        0.0,
    )  # what `view` subtracts of a colour between 0 and 1, and divides by
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 100.0  # of cosines in a softmax; CLIP's, where the model has none of its own


def of_teacher(teacher: Teacher, *, device: str = "cpu") -> Encoder:
    """A teacher as an Encoder; UserError where it has no embeddings."""
    image_field, text_field = teacher.spec.image_vector, teacher.spec.text_vector
    if teacher.view is None or teacher.tokenize is None or not (image_field and text_field):
        raise UserError(
            f"{teacher.spec.name} has no embeddings to evaluate: name a CLIP teacher (`tc teachers`)"
        )
    teacher.module.to(device)
    return Encoder(
        name=teacher.spec.name,
        pretrained=teacher.spec.weights,
        size=tuple(teacher.spec.view["size"]),
        view=teacher.view,
        tokenize=teacher.tokenize,
        encode_image=lambda images: teacher.encode(teacher.module, {"image": images})[image_field],
        encode_text=lambda ids: teacher.encode(teacher.module, {"text": ids})[text_field],
        device=device,
        tower=image_tower(teacher.module),
        mean=tuple(teacher.spec.view["mean"]),
        std=tuple(teacher.spec.view["std"]),
        scale=math.exp(teacher.spec.constants.get("logit_scale", math.log(100))),
    )


def embed_images(
    encoder: Encoder, manifest: Manifest, rows: list[int], *, batch: int = 64
) -> tuple[Float[Tensor, "n dim"], list[int], list[dict]]:
    """Unit embeddings of the rows whose picture can be read, those rows, and the others with their reason."""
    embeddings, kept, skipped = features_of(encoder, manifest, rows, encoder.encode_image, batch=batch)
    return torch.nn.functional.normalize(embeddings, dim=1), kept, skipped


def features_of(
    encoder: Encoder,
    manifest: Manifest,
    rows: list[int],
    encode: Callable[[Tensor], Tensor],
    *,
    batch: int = 64,
) -> tuple[Float[Tensor, "n dim"], list[int], list[dict]]:
    """What `encode` says of each row whose picture can be read, those rows, and the others with their reason."""
    items = [WorkItem(tuple(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    images = ImageInput(encoder.view, encoder.size)
    loader = decoded(Rows(manifest, images=images), items, workers=default_workers())
    features, kept, skipped = [], [], []
    with torch.inference_mode(), ticker(len(rows), "pictures", encoder.name) as tick:
        for part in loader:
            usable, numbers = torch.from_numpy(part["usable"]), part["item"].rows
            features.append(
                encode(part["image"][0].to(encoder.device)).float().cpu()[part["image_at"]][usable]
            )
            kept += [row for row, good in zip(numbers, usable.tolist(), strict=True) if good]
            skipped += part["problems"]
            tick.step(len(numbers))
    if not kept:
        raise UserError(
            f"no picture of {manifest.data} can be read, the first because: {skipped[0]['reason']}"
        )
    return torch.cat(features), kept, skipped


def embed_texts(encoder: Encoder, texts: list[str], *, batch: int = 256) -> Float[Tensor, "n dim"]:
    """Unit embeddings of texts."""
    with torch.inference_mode():
        chunks = [
            encoder.tokenize(texts[i : i + batch]).to(encoder.device) for i in range(0, len(texts), batch)
        ]
        parts = [encoder.encode_text(ids).float().cpu() for ids in chunks]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)
