"""Run the teacher over decoded batches: one forward pass per view, values in the stored dtype, NaN and overflow checked.

Gradients are off: in online distillation the training step calls the teacher itself.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from teachercache.build.decode import Batch, ImageInput, Rows, TextInput, WorkItem
from teachercache.build.timings import Stages
from teachercache.cache.layout import Cache
from teachercache.cache.spec import Field
from teachercache.cache.store import Chunks, Problem
from teachercache.data.manifest import Manifest
from teachercache.data.views import Augment, replay_view
from teachercache.teachers.encode import encode
from teachercache.teachers.teacher import Inputs, Teacher

NOT_FINITE, IS_ZERO = "is not finite", "is zero"  # reasons, behind the name of the field
TOO_LARGE, TOO_SMALL = "is too large for", "is too small for"  # and behind these its dtype
LEAST_NORM = 1e-12  # of `vectors.unit` and of torch's normalize
OF_TEACHER = (NOT_FINITE, IS_ZERO, TOO_LARGE, TOO_SMALL)
Values = list[tuple[str, int, torch.Tensor]]  # field, copy (text or view), values [n, *shape]


@dataclasses.dataclass(frozen=True)
class Computed:
    """The chunks of one work item, its entries of the quarantine, and digests and times of the rows' pictures, None if
    no picture was read.
    """

    item: WorkItem
    chunks: Chunks
    problems: list[Problem]
    pictures: tuple[np.ndarray, np.ndarray] | None = None


def forward(
    teacher: Teacher,
    module: nn.Module,
    cache: Cache,
    stages: Stages,
    batches: Iterable[Batch],
    device: str,
    dtype: torch.dtype,
) -> Iterator[Computed]:
    """Yield the fields of each batch. A GPU computes the next batch while one is copied to the host."""
    waiting: list[tuple[Batch, Values]] = []
    for batch in stages.waited(batches):
        begin = time.perf_counter()
        waiting.append((batch, encode_batch(teacher, module, cache, batch, device, dtype)))
        computed = _fetch(cache, *waiting.pop(0)) if len(waiting) == 2 else None
        stages.add("forward", time.perf_counter() - begin, len(batch["key"]))
        if computed is not None:
            yield computed
    for batch, values in waiting:
        yield _fetch(cache, batch, values)


def encode_batch(
    teacher: Teacher, module: nn.Module, cache: Cache, batch: Batch, device: str, dtype: torch.dtype
) -> Values:
    """Encode a batch on the device with one forward pass per view; the texts go with the first view."""
    item, outputs = batch["item"], Values()
    images, text = batch.pop("image", None), batch.pop("text", None)
    image_at, text_at = batch.pop("image_at", None), batch.pop("text_at", None)
    passes = max(0 if images is None else len(images), int(text is not None))
    for i in range(passes if item.rows else 0):
        inputs: Inputs = {}
        if images is not None:
            moved = images[i].to(
                device, non_blocking=True
            )  # from pinned memory in float32: a cast would block
            inputs["image"] = moved.to(dtype).contiguous(memory_format=torch.channels_last)
            if "boxes" in batch:
                inputs["boxes"], inputs["num_boxes"] = (
                    batch["boxes"].to(device),
                    batch["num_boxes"].to(device),
                )
        if text is not None and i == 0:
            inputs["text"] = text.to(device, non_blocking=True)
            if "words" in batch:
                inputs["words"] = batch["words"]
        pair_valid = torch.from_numpy(batch["usable"]).to(device)[:, None].expand(-1, len(item.texts))
        if teacher.spec.reads_pairs and image_at is not None and text_at is not None and i == 0:
            inputs["pair_image"] = image_at.to(device)[:, None].expand(-1, len(item.texts))
            inputs["pair_text"] = text_at.to(device).unflatten(0, (len(item.rows), len(item.texts)))
            inputs["pair_valid"] = pair_valid
        with torch.inference_mode():
            fields = encode(teacher, module, inputs, cache.fields)
            for name, values in fields.items():
                field = cache.fields[name]
                if field.per == "image":
                    outputs.append((name, item.views[i], _per_row(values, image_at)))
                    continue
                if field.per == "text":
                    values = _per_row(values, text_at)
                elif field.per == "pair":
                    valid = pair_valid.flatten().view(-1, *[1] * (values.ndim - 1))
                    values = torch.where(valid.to(values.device), values, 0)
                values = values.unflatten(0, (len(item.rows), len(item.texts)))
                outputs += [(name, k, values[:, j]) for j, k in enumerate(item.texts)]
    return outputs


def _per_row(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Expand values of distinct images or texts to all rows or texts."""
    if index is None or len(index) == len(values):  # equal numbers: nothing was de-duplicated
        return values
    return values[index.to(values.device)]


def _fetch(cache: Cache, batch: Batch, outputs: Values) -> Computed:
    """Copy values to the host in their stored dtype. One that is of no use becomes an entry of the quarantine."""
    item, usable = batch["item"], batch["usable"]
    text_valid = batch.get("text_valid", usable[:, None])
    chunks: dict[tuple[str, int], np.ndarray] = {}
    for name, copy, tensor in outputs:
        field = cache.fields[name]
        floating = np.dtype(field.dtype).kind == "f"
        values = (tensor.float() if floating else tensor).cpu().numpy()
        valid = text_valid[:, copy - item.texts.start] if field.per_text else usable
        if floating or not field.per_text:  # integers per text mark an empty text themselves (-1)
            values[~valid] = 0
        if floating:
            _quarantine(batch, field, copy, values, valid, views=cache.meta.views)
        chunks[name, copy] = values.astype(field.dtype)
    if "text_valid" in batch:
        chunks |= {("text_valid", k): text_valid[:, j] for j, k in enumerate(item.texts)}
    if "view_params" in batch:
        chunks |= {("view_params", v): batch["view_params"][:, i] for i, v in enumerate(item.views)}
    pictures = (batch["digests"], batch["times"]) if "digests" in batch else None
    return Computed(item, chunks, batch["problems"], pictures)


def _quarantine(
    batch: Batch, field: Field, copy: int, values: np.ndarray, valid: np.ndarray, *, views: int
) -> None:
    """Replace values of no use by zeros, and add an entry to the problems of the batch for each."""
    copies = {"text": copy} if field.per_text else {"view": copy} if views else {}
    reasons = problems_of(field, values, valid)
    for place, reason in sorted(reasons.items()):
        values[place] = 0
        if field.per_text:
            valid[place] = False
        row, key = batch["item"].rows[place], batch["key"][place]
        batch["problems"].append({"row": row, "key": key, "reason": f"{field.name} {reason}", **copies})


def problems_of(field: Field, values: np.ndarray, valid: np.ndarray) -> dict[int, str]:
    """Return why values of a field [n, ...] are of no use, by their place.

    A vector without a direction has no cosine: zeros, or values so small that the stored dtype changes the direction.
    Feature maps may be zero.
    """
    inner = tuple(range(1, values.ndim))
    largest = float(np.finfo(field.dtype).max)
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(values).all(axis=inner)
        too_large = finite & (np.abs(values) > largest).any(axis=inner)
        masks = {NOT_FINITE: ~finite, f"{TOO_LARGE} {field.dtype}": too_large}
        if field.is_vector and field.compare == "cosine":
            zero = ~values.any(axis=inner)
            size = np.sqrt(np.square(values, dtype=np.float64).mean(axis=inner))
            masks[IS_ZERO] = zero & valid
            masks[f"{TOO_SMALL} {field.dtype}"] = (size < least_size(field.dtype)) & ~zero & valid
    return {
        place: reason for reason, mask in reversed(masks.items()) for place in np.flatnonzero(mask).tolist()
    }


def least_size(dtype: str) -> float:
    """Return the root mean square of the smallest vector whose stored values have its direction.

    Below the smallest normal number all steps have one size. Rounding errs by 0.29 steps on average, so that at 16 steps
    the cosine to the stored vector is 0.9998. In float32 the limit is the norm 1e-12 that readers divide by at least.
    """
    return max(16 * float(np.finfo(dtype).smallest_subnormal), LEAST_NORM)


def rows_for(teacher: Teacher, manifest: Manifest, augment: Augment | None = None) -> Rows:
    """Return the dataset that decodes rows for a teacher, with augmented views if `augment` is given."""
    view, images = teacher.spec.view, None
    if teacher.view is not None:
        images = ImageInput(
            view=teacher.view,
            size=tuple(view["size"]),
            at_least=view.get("at_least", 0),
            num_boxes=view["boxes"] if "boxes" in teacher.spec.inputs else 0,
            augment=augment,
            replay=replay_view(view) if augment else None,
        )
    return Rows(manifest, images=images, texts=TextInput(teacher.tokenize, teacher.find_words))
