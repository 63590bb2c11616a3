"""Write metrics.jsonl (on rank 0), and stop a run whose loss or weights are not finite."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from student.distributed import any_rank
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank

ADVICE = "try a smaller --set optim.lr or --set optim.max_grad_norm=1.0"


class Metrics:
    """Appends one JSON line per logged step.

    Args:
        path: The file.
        start: The step that a run starts or resumes from; lines of this and later steps are dropped.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        if rank() == 0:
            kept = [line for line in self._lines() if json.loads(line)["step"] < start]
            write_whole(path, "".join(line + "\n" for line in kept))

    def _lines(self) -> list[str]:
        """Return the complete lines of the file; a killed run may leave an incomplete one at the end."""
        text = self.path.read_text() if self.path.exists() else ""
        return text.split("\n")[:-1]

    def write(self, values: dict[str, Any]) -> None:
        """Append one line, on rank 0."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl, decoded."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plain(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Convert scalar tensors to Python floats, with a single device synchronization."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().reshape(-1)[0].float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def refuse_nan(loss: float, step: int) -> None:
    """Raise a UserError if the loss is not finite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: {ADVICE}")


def refuse_nan_weights(module: torch.nn.Module, step: int) -> None:
    """Raise a UserError if a weight is not finite, before a checkpoint replaces the last good one."""
    if any_rank(not all(bool(parameter.isfinite().all()) for parameter in module.parameters())):
        raise UserError(f"a weight is not finite after step {step}; the last checkpoint was kept: {ADVICE}")
