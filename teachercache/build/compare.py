"""Compare two computations of the fields of some rows, by a cosine of each row."""

import math
from collections.abc import Mapping

import numpy as np

from teachercache.build.decode import Batch
from teachercache.cache.spec import Field

BAR = 0.999  # the least cosine of a stored float16 value to the recomputed one
# A relative error of 0.01 has the cosine BAR: the vectors (0, 1) and (STEEP * 0.01, 1) enclose that angle
STEEP = 100 * math.tan(math.acos(BAR))
Values = dict[tuple[str, int], np.ndarray]  # field and copy (text or view) -> [rows, ...]


def field_cosines(
    fields: Mapping[str, Field], live: Values, stored: Values, batch: Batch
) -> dict[str, np.ndarray]:
    """Return the cosines of each field's usable values, by the comparison that its `Field` declares.

    Args:
        fields: The fields of the cache.
        live: The values of one computation.
        stored: Those of the other.
        batch: The decoded rows of both, with the masks of usable ones.
    """
    cosines: dict[str, list[np.ndarray]] = {}
    for name, copy in live:
        pair = [
            comparable(values, fields[name], copy, live, stored).reshape(len(batch["key"]), -1)
            for values in (live, stored)
        ]
        valid = batch["text_valid"][:, copy] if fields[name].per_text else batch["usable"]
        norms = np.prod([np.linalg.norm(values, axis=1) for values in pair], axis=0)
        with np.errstate(invalid="ignore"):
            cosine = (pair[0] * pair[1]).sum(1) / np.maximum(norms, 1e-30)
        same = (pair[0] == pair[1]).all(1)  # also if both are zero, as feature maps after a ReLU can be
        cosines.setdefault(name, []).append(np.where(same, 1.0, cosine)[valid])
    return {name: np.concatenate(values) for name, values in cosines.items()}


def comparable(values: Values, field: Field, copy: int, live: Values, stored: Values) -> np.ndarray:
    """Convert the live or the stored `values` of a field to vectors that a cosine compares: see `Field`."""
    array = values[field.name, copy]
    if field.compare == "relative_error":
        scale = np.abs(stored[field.beside or field.name, copy])
        return np.stack([STEEP * (array - stored[field.name, copy]), scale], -1)
    if field.compare == "same_choice":
        index, scores = array.astype(int), live[field.beside, copy]
        return np.where(index >= 0, np.take_along_axis(scores, np.maximum(index, 0), -1), -1)
    if field.beside:
        same = live[field.beside, copy] == stored[field.beside, copy]
        return array * same.reshape(*same.shape, *[1] * (array.ndim - same.ndim))
    return array
