"""The teacher over decoded pieces: one forward for every view; values in the stored dtype, NaN and overflow found.

Not for gradients: a live teacher in training is called by the student's step itself.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from teachercache.build.decode import Piece, Rows
from teachercache.build.timings import Stages
from teachercache.cache.layout import Cache
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.views import Augment, replay_view
from teachercache.teachers.teacher import Teacher

NOT_FINITE = "is not finite"  # how the reason of a NaN or inf ends


def forward(
    teacher: Teacher,
    module: nn.Module,
    cache: Cache,
    stages: Stages,
    batches: Iterable[dict[str, Any]],
    device: str,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """Batches with what the teacher said of them; a batch is fetched while a GPU works on the next."""
    waiting: list[tuple[dict[str, Any], Any]] = []
    for batch in stages.waited(batches):
        begin = time.perf_counter()
        waiting.append((batch, launch(teacher, module, cache, batch, device, dtype)))
        part = _fetch(cache, *waiting.pop(0)) if len(waiting) == 2 else None
        stages.add("forward", time.perf_counter() - begin, len(batch["key"]))
        if part is not None:
            yield part
    for batch, outputs in waiting:
        yield _fetch(cache, batch, outputs)


def launch(
    teacher: Teacher, module: nn.Module, cache: Cache, batch: dict[str, Any], device: str, dtype: torch.dtype
) -> list[tuple[str, int, torch.Tensor]]:
    """Field, copy and values [n, *shape] on the device, one forward for every view; texts go with the first."""
    piece: Piece = batch["piece"]
    outputs: list[tuple[str, int, torch.Tensor]] = []
    images, text = batch.pop("image", None), batch.pop("text", None)
    places = {"image": batch.pop("image_at", None), "text": batch.pop("text_at", None)}
    for i in range(max(0 if images is None else len(images), int(text is not None)) if piece.rows else 0):
        inputs = {}
        if images is not None:
            moved = images[i].to(
                device, non_blocking=True
            )  # as float32 from pinned memory: the cast would block
            inputs["image"] = moved.to(dtype).contiguous(memory_format=torch.channels_last)
            inputs |= {name: batch[name].to(device) for name in ("boxes", "num_boxes") if name in batch}
        if text is not None and i == 0:
            inputs["text"] = text.to(device, non_blocking=True)
        with torch.inference_mode():
            distinct = teacher.encode(module, inputs)
            said = {
                name: _each(values, places.get(cache.fields[name].per)) for name, values in distinct.items()
            }
            if "words" in batch and i == 0 and teacher.tokens is not None:
                pictures = _pictures_of_texts(said.get("image_emb"), batch["usable"], len(piece.texts))
                said |= teacher.tokens.weigh(module, batch["words"], pictures)
            if teacher.pair is not None and {"image", "text"} <= inputs.keys():
                paired = teacher.pair(module, {**inputs, **distinct}, places)
                said |= {
                    name: _of_usable(values, batch["usable"], len(piece.texts))
                    for name, values in paired.items()
                }
        for name, values in said.items():
            if cache.fields[name].per_text:
                values = values.unflatten(0, (len(piece.rows), len(piece.texts)))
                outputs += [(name, k, values[:, j]) for j, k in enumerate(piece.texts)]
            else:
                outputs.append((name, piece.views[i], values))
    return outputs


def _each(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """What was said of each distinct picture or text, for every row or text that has it."""
    return values if places is None or len(places) == len(values) else values[places.to(values.device)]


def _pictures_of_texts(
    embeddings: torch.Tensor | None, usable: np.ndarray, texts: int
) -> torch.Tensor | None:
    """The embedding of each text's picture [n * texts, dim], zeros where it cannot be used."""
    if embeddings is None:
        return None
    return _of_usable(embeddings.repeat_interleave(texts, 0), usable, texts)


def _of_usable(values: torch.Tensor, usable: np.ndarray, texts: int) -> torch.Tensor:
    """Values [n * texts, ...] with zeros where the row's picture cannot be used."""
    known = torch.from_numpy(usable).to(values.device).repeat_interleave(texts)
    return torch.where(known.view(-1, *[1] * (values.ndim - 1)), values, 0)


def _fetch(
    cache: Cache, batch: dict[str, Any], outputs: list[tuple[str, int, torch.Tensor]]
) -> dict[str, Any]:
    """`chunks` of a piece in the stored dtypes; NaN is noted in `problems`, float16 overflow names the row."""
    piece, usable = batch["piece"], batch["usable"]
    text_valid: np.ndarray = batch.get("text_valid", usable[:, None])
    chunks: dict[tuple[str, int], np.ndarray] = {}
    for name, copy, tensor in outputs:
        field = cache.fields[name]
        floating = np.dtype(field.dtype).kind == "f"
        values = (tensor.float() if floating else tensor).cpu().numpy()
        known = usable if not field.per_text else text_valid[:, copy - piece.texts.start]
        if floating or not field.per_text:  # of a text that cannot be used integers say that there is no word
            values[~known] = 0
        inner = tuple(range(1, values.ndim))
        which = {"text": copy} if field.per_text else {"view": copy} if cache.meta.views else {}
        for place in np.flatnonzero(~np.isfinite(values).all(axis=inner)).tolist():
            values[place] = 0
            if field.per_text:
                known[place] = False
            batch["problems"].append(
                {
                    "row": piece.rows[place],
                    "key": batch["key"][place],
                    "reason": f"{name} {NOT_FINITE}",
                    **which,
                }
            )
        limit = np.finfo(field.dtype).max if floating else np.inf
        for place in np.flatnonzero((np.abs(values) > limit).any(axis=inner)).tolist():
            raise UserError(
                f"{name} of row '{batch['key'][place]}' is above {limit:g} and does not fit into {field.dtype}"
            )
        chunks[name, copy] = values.astype(field.dtype)
    if "text_valid" in batch:
        chunks |= {("text_valid", k): text_valid[:, j] for j, k in enumerate(piece.texts)}
    if "view_params" in batch:
        chunks |= {("view_params", v): batch["view_params"][:, i] for i, v in enumerate(piece.views)}
    return {"piece": piece, "chunks": chunks, "problems": batch["problems"]}


def rows_for(teacher: Teacher, manifest: Manifest, augment: Augment | None = None) -> Rows:
    """Rows as the teacher sees them, in augmented views where `augment` is given."""
    view = teacher.spec.view
    return Rows(
        manifest,
        view=teacher.view,
        size=tuple(view["size"]),
        at_least=view.get("at_least", 0),
        num_boxes=view.get("boxes", 0),
        tokenize=teacher.tokenize,
        augment=augment,
        find=teacher.tokens.find if teacher.tokens else None,
        replay=replay_view(view) if augment else None,
    )
