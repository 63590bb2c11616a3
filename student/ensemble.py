"""Field names and joined fields for several teachers in one batch. Imports no torch at import time.

The fields of teacher 0 keep their names; those of teacher k > 0 are called `name@k`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ENSEMBLES = ("average", "concat")
T = TypeVar("T")


def named(name: str, teacher: int) -> str:
    """Return the batch name of a teacher's field: `image_emb` for teacher 0, `image_emb@2` for teacher 2."""
    return f"{name}@{teacher}" if teacher else name


def plain_name(name: str) -> str:
    """Return a field's name without the suffix of its teacher."""
    return name.partition("@")[0]


def num_teachers(names: Iterable[str]) -> int:
    """Return the number of teachers whose fields occur among the names of a batch."""
    return 1 + max((int(name.partition("@")[2] or 0) for name in names), default=0)


def of_teacher(values: Mapping[str, T], teacher: int) -> dict[str, T]:
    """Return the entries of one teacher under plain names, plus all entries without a suffix."""
    shared = {name: value for name, value in values.items() if "@" not in name}
    suffixed = {plain_name(name): value for name, value in values.items() if name.endswith(f"@{teacher}")}
    return shared | suffixed


def check_ensemble(ensemble: str) -> None:
    """Raise a UserError unless the name is one of ENSEMBLES."""
    if ensemble not in ENSEMBLES:
        raise UserError(f"--set ensemble={ensemble}: choose from {', '.join(ENSEMBLES)}")


def concat_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that `concat_teachers` produces: the last dimensions are summed over teachers."""
    teachers = [of_teacher(shapes, k) for k in range(num_teachers(shapes))]
    return {
        name: (*shape[:-1], sum(teacher[name][-1] for teacher in teachers))
        for name, shape in teachers[0].items()
        if shape and all(name in teacher for teacher in teachers)
    }


def concat_teachers(fields: Mapping[str, "Tensor"]) -> "dict[str, Tensor]":
    """Join several teachers into one wide teacher.

    Each teacher's rows are normalized, concatenated, and divided by sqrt(number of teachers), so that the
    result has unit length. Its cosines are the mean of the teachers' cosines; exp(logit_scale) is the mean of
    their scales.
    """
    import torch
    from torch.nn.functional import normalize

    teachers = [of_teacher(fields, k) for k in range(num_teachers(fields))]
    joined = {
        name: torch.cat([normalize(teacher[name], dim=-1) for teacher in teachers], -1)
        / math.sqrt(len(teachers))
        for name, value in teachers[0].items()
        if value.ndim
    }
    if "logit_scale" in teachers[0]:
        joined["logit_scale"] = (
            torch.stack([teacher["logit_scale"].exp() for teacher in teachers]).mean().log()
        )
    return joined
