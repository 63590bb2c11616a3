"""metrics.jsonl, always; what a person sees while training. Rank 0 writes."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from student.distributed import any_rank
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank

CALMER = "try a smaller --set optim.lr or --set optim.clip=1.0"


class Metrics:
    """Appends one JSON line per logged step; on resume, lines at or behind the resumed step are dropped."""

    def __init__(self, path: Path, *, start: int):
        self.path = path
        if rank() == 0:
            kept = [line for line in self._lines() if json.loads(line)["step"] < start]
            write_whole(path, "".join(line + "\n" for line in kept))

    def _lines(self) -> list[str]:
        """Whole lines of the file; a line that a kill cut short is not one."""
        text = self.path.read_text() if self.path.exists() else ""
        return text.split("\n")[:-1]

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plain(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars as Python floats, exactly."""
    if not values:
        return {}
    numbers = torch.stack(
        [value.detach().reshape(-1)[0].float() for value in values.values()]
    ).tolist()  # one wait
    return dict(zip(values, numbers, strict=True))


def refuse_nan(loss: float, step: int) -> None:
    """Stop with a reason where the loss is no number any more."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: {CALMER}")


def refuse_nan_weights(module: torch.nn.Module, step: int) -> None:
    """Before a checkpoint replaces the last good one: stop where a weight is no number any more."""
    if any_rank(not all(bool(parameter.isfinite().all()) for parameter in module.parameters())):
        raise UserError(
            f"a weight is no finite number after step {step}, the last checkpoint was kept: {CALMER}"
        )
