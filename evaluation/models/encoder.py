"""The contract of a model that encodes images and texts into one space, and embeddings of a data set by it."""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from teachercache.build.decode import ImageInput, Rows, WorkItem, decoded
from teachercache.core.errors import UserError, calling
from teachercache.core.process import default_workers
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest
from teachercache.data.views import check_description
from teachercache.teachers.clip.towers import image_tower
from teachercache.teachers.teacher import Inputs, Teacher


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A dual encoder under evaluation: everything that tasks need from CLIP-like models.

    To evaluate another model, fill in the fields with functions of it; nothing has to be subclassed. Embeddings need
    not have unit length, because tasks normalize them. A task calls the functions under `torch.inference_mode()`, as
    `encode_rows`, `embed_images` and `embed_texts` do.

    Attributes:
        name: The model's name in results and tables.
        pretrained: Where its weights come from; together with `name` it identifies the model.
        size: Height and width of the image that `view` returns.
        view: Preprocesses one RGB image to a float tensor [3, height, width]. It runs in worker processes, so it must
            be picklable or survive a fork.
        tokenize: Converts n texts to token ids [n, length].
        encode_image: Encodes images [n, 3, height, width] on `device` to embeddings [n, dim].
        encode_text: Encodes token ids [n, length] on `device` to embeddings [n, dim].
        device: The device that both encoders expect their input on.
        tower: The open_clip image tower behind `encode_image`, for tasks that need its inner features; None if there
            is none.
        mean: Per-channel mean that `view` subtracts from colors in [0, 1].
        std: Per-channel standard deviation that `view` divides by.
        scale: Factor of cosines in a softmax (the inverse temperature); CLIP's 100 for models without one.
    """

    name: str
    pretrained: str
    size: tuple[int, int]
    view: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    device: str = "cpu"
    tower: nn.Module | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 100.0


def of_teacher(teacher: Teacher, *, device: str = "cpu") -> Encoder:
    """Return a teacher as an Encoder, and move it to the device.

    Raises:
        UserError: If the teacher does not embed images and texts into one space.
    """
    image_field, text_field = teacher.spec.image_vector, teacher.spec.text_vector
    if teacher.view is None or teacher.tokenize is None or not (image_field and text_field):
        raise UserError(
            f"{teacher.spec.name} has no embeddings to evaluate: name a CLIP teacher (`tc teachers`)"
        )
    check_description(teacher.spec.view, f"{teacher.spec.name} cannot be measured")
    teacher.module.to(device)
    return Encoder(
        name=teacher.spec.name,
        pretrained=teacher.spec.weights,
        size=tuple(teacher.spec.view["size"]),
        view=teacher.view,
        tokenize=teacher.tokenize,
        encode_image=lambda images: _vectors(teacher, {"image": images}, image_field),
        encode_text=lambda ids: _vectors(teacher, {"text": ids}, text_field),
        device=device,
        tower=image_tower(teacher.module),
        mean=tuple(teacher.spec.view["mean"]),
        std=tuple(teacher.spec.view["std"]),
        scale=math.exp(teacher.spec.constants.get("logit_scale", math.log(100))),
    )


def _vectors(teacher: Teacher, inputs: Inputs, field: str) -> Tensor:
    """Encode images alone or texts alone."""
    who = f"teacher {teacher.spec.name}: encode"
    with calling(who, teacher.encode):
        outputs = teacher.encode(teacher.module, inputs)
    if field not in outputs:
        raise UserError(
            f"{who} left out {field} of the inputs {', '.join(inputs)}, which a task encodes alone"
        )
    return outputs[field]


def embed_images(
    encoder: Encoder, manifest: Manifest, rows: list[int], *, batch: int = 64
) -> tuple[Float[Tensor, "n dim"], list[int], list[dict[str, str | int]]]:
    """Return unit embeddings of the images of rows; see `encode_rows`."""
    embeddings, kept, skipped = encode_rows(encoder, manifest, rows, encoder.encode_image, batch=batch)
    return normalize(embeddings, dim=1), kept, skipped


def encode_rows(
    encoder: Encoder,
    manifest: Manifest,
    rows: list[int],
    encode: Callable[[Tensor], Tensor],
    *,
    batch: int = 64,
) -> tuple[Float[Tensor, "n dim"], list[int], list[dict[str, str | int]]]:
    """Encode the images of rows by any function of preprocessed images.

    Args:
        encoder: Preprocesses the images.
        manifest: The data.
        rows: Rows of the manifest.
        encode: Encodes images [n, 3, height, width] to features [n, dim].
        batch: Images encoded at a time.

    Returns:
        Features of the rows with a readable image, float32 on the CPU; those rows; and row, key and reason of the others.

    Raises:
        UserError: If no image can be read.
    """
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
    """Return unit embeddings of texts, float32 on the CPU."""
    with torch.inference_mode():
        ids = [encoder.tokenize(texts[i : i + batch]).to(encoder.device) for i in range(0, len(texts), batch)]
        embeddings = [encoder.encode_text(chunk).float().cpu() for chunk in ids]
    return normalize(torch.cat(embeddings), dim=1)
