"""Compute a few rows before a cache is created: which dtype holds the vectors, and whether half precision is exact enough."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from teachercache.build.compare import BAR, Values, field_cosines
from teachercache.build.decode import Batch, WorkItem
from teachercache.build.forward import encode_batch, least_size, rows_for
from teachercache.cache import store
from teachercache.cache.spec import CacheMeta, Field
from teachercache.core.device import Precision
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.teachers.teacher import Teacher

ROWS = 8  # evenly spread over the data
MARGIN = 4  # a vector of some other row may be so many times larger or smaller than those of the probe
CLOSER = 0.5  # other rows may lie twice as far from their values in float32, in 1 - cosine


def stored_meta(out: Path) -> CacheMeta | None:
    """Return the metadata of the cache at a path, None if there is none."""
    try:
        return store.open_cache(out).meta if store.is_there(out) else None
    except UserError:
        return None  # opening it for the build explains what is wrong


def probe_teacher(
    teacher: Teacher, manifest: Manifest, meta: CacheMeta, device: str, precision: Precision
) -> tuple[Teacher, Precision]:
    """Return the teacher with dtypes that hold its vectors, and the precision of its forward pass.

    A field of vectors is stored in float32 where float16 would not hold them: its largest number is 65,504, and below
    1e-6 nothing of a direction is left. A precision that was not requested must come close to float32, or `tc verify`
    would refuse the cache that it computes.

    Args:
        teacher: The teacher.
        manifest: The data.
        meta: The metadata of the new cache.
        device: The torch device.
        precision: The precision of the forward pass; measured if it is a proposal.
    """
    half = [field for field in meta.spec.fields if _is_half_vector(field)]
    if not half and not precision.proposed:
        return teacher, precision
    rows = np.unique(np.linspace(0, len(manifest) - 1, min(ROWS, len(manifest))).round().astype(int))
    item = WorkItem(tuple(rows.tolist()), texts=range(min(meta.texts, 1)))
    batch = rows_for(teacher, manifest).__getitems__(item)
    cache = store.Cache(Path(), dataclasses.replace(meta, views=0))
    exact = _values(teacher, cache, batch, device, torch.float32)
    wide = {field.name for field in half if _needs_float32(field, exact, batch)}
    if wide:
        say(
            f"{', '.join(sorted(wide))} of {meta.spec.name}: float16 does not hold these values, float32 is stored"
        )
    teacher = with_dtypes(teacher, dict.fromkeys(wide, "float32"))
    if precision.proposed:
        rounded = _values(teacher, cache, batch, device, getattr(torch, precision.dtype))
        cosines = {
            name: float(values.min(initial=1.0))
            for name, values in field_cosines(cache.fields, exact, rounded, batch).items()
        }
        name = min(cosines, key=lambda name: cosines[name] if cosines[name] == cosines[name] else -1.0)
        if not cosines[name] >= 1 - CLOSER * (1 - BAR):
            reason = f"{name} in {precision.dtype} has a cosine of {cosines[name]:.4f} to float32"
            say(f"{meta.spec.name} runs in float32: {reason}")
            precision = Precision("float32", reason)
    return teacher, precision


def with_dtypes(teacher: Teacher, dtypes: Mapping[str, str]) -> Teacher:
    """Return the teacher with other dtypes of some fields."""
    fields = tuple(
        dataclasses.replace(field, dtype=dtypes.get(field.name, field.dtype)) for field in teacher.spec.fields
    )
    return dataclasses.replace(teacher, spec=dataclasses.replace(teacher.spec, fields=fields))


def dtypes_of(meta: CacheMeta, teacher: Teacher) -> dict[str, str]:
    """Return the dtypes of vectors that an existing cache stores in float32 and the teacher declares as float16."""
    half = {field.name for field in teacher.spec.fields if _is_half_vector(field)}
    return {
        field.name: "float32" for field in meta.spec.fields if field.name in half and field.dtype == "float32"
    }


def _is_half_vector(field: Field) -> bool:
    return field.is_vector and field.dtype == "float16" and field.compare == "cosine"


def _needs_float32(field: Field, values: Values, batch: Batch) -> bool:
    """Whether a usable vector of the probe is near the ends of float16."""
    valid = batch["text_valid"][:, 0] if field.per_text else batch["usable"]
    vectors = values[field.name, 0][valid] if (field.name, 0) in values else np.zeros((0, 1))
    vectors = vectors[np.isfinite(vectors).all(1) & vectors.any(1)]
    if not len(vectors):
        return False
    sizes = np.sqrt(np.square(vectors, dtype=np.float64).mean(1))
    too_large = np.abs(vectors).max() * MARGIN > np.finfo(field.dtype).max
    return bool(too_large or sizes.min() < MARGIN * least_size(field.dtype))


def _values(teacher: Teacher, cache: store.Cache, batch: Batch, device: str, dtype: torch.dtype) -> Values:
    """Compute the fields of a batch; another dtype than float32 with a copy of the teacher, which keeps its weights."""
    module = teacher.module if dtype == torch.float32 else copy.deepcopy(teacher.module)
    outputs = encode_batch(teacher, module.to(device, dtype), cache, Batch(**batch), device, dtype)
    return {(name, number): tensor.float().cpu().numpy() for name, number, tensor in outputs}
