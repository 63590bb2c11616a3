"""Several teachers in one batch: the fields of teacher k > 0 are called `name@k`. Not for losses; imports no torch."""

import math
from collections.abc import Mapping
from typing import Any

from teachercache.core.errors import UserError

ENSEMBLES = ("average", "concat")


def named(name: str, teacher: int) -> str:
    """`image_emb` of teacher 0, `image_emb@2` of teacher 2."""
    return f"{name}@{teacher}" if teacher else name


def plain_name(name: str) -> str:
    """The name without its teacher."""
    return name.partition("@")[0]


def num_teachers(names: Mapping[str, Any]) -> int:
    """How many teachers a batch, or a table of shapes, knows."""
    return 1 + max((int(name.partition("@")[2] or 0) for name in names), default=0)


def of_teacher(values: Mapping[str, Any], teacher: int) -> dict[str, Any]:
    """What belongs to one teacher, under plain names, beside what belongs to none."""
    shared = {name: value for name, value in values.items() if "@" not in name}
    own = {plain_name(name): value for name, value in values.items() if name.endswith(f"@{teacher}")}
    return shared | own


def check_ensemble(ensemble: str) -> None:
    """Whether it is one of ENSEMBLES."""
    if ensemble not in ENSEMBLES:
        raise UserError(f"--set ensemble={ensemble}: choose from {', '.join(ENSEMBLES)}")


def concat_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of fields behind `concat_teachers`: the widths add."""
    parts = [of_teacher(shapes, k) for k in range(num_teachers(shapes))]
    return {
        name: (*shape[:-1], sum(part[name][-1] for part in parts))
        for name, shape in parts[0].items()
        if shape and all(name in part for part in parts)
    }


def concat_teachers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """One wide teacher of several: unit rows side by side, each divided by sqrt(teachers), so that they are unit again.

    Its cosines are the mean of the teachers' cosines, its scale exp(logit_scale) the mean of their scales.
    """
    import torch
    from torch.nn.functional import normalize

    parts = [of_teacher(fields, k) for k in range(num_teachers(fields))]
    joined = {
        name: torch.cat([normalize(part[name], dim=-1) for part in parts], -1) / math.sqrt(len(parts))
        for name, value in parts[0].items()
        if value.ndim
    }
    if "logit_scale" in parts[0]:
        joined["logit_scale"] = torch.stack([part["logit_scale"].exp() for part in parts]).mean().log()
    return joined
