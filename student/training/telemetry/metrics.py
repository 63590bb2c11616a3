"""Write metrics.jsonl (on rank 0), and stop a run whose loss or weights are not finite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from student.distributed import any_rank
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank
from teachercache.core.progress import say

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
            kept = [line for line in read_metrics(path) if line["step"] < start]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line, on rank 0."""
        if rank() == 0:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:  # write() does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl or evals.jsonl, decoded.

    A log never stops a run: lines that cannot be read are skipped with a message. A killed run may leave an
    incomplete one at the end, which is skipped in silence.
    """
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines, skipped = [], 0
    for line in text.split("\n")[:-1]:
        try:
            values = json.loads(line)
            if type(values["step"]) is not int or not all(type(v) in (int, float) for v in values.values()):
                raise ValueError(line)
            lines.append(values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped += 1
    if skipped:
        say(f"WARNING: {skipped} lines of {path} cannot be read and are skipped")
    return lines


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


def terms_of(lines: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names of the loss terms: the values behind `loss` in each line of a log that add up to it.

    Notes, such as the learning rate, follow the terms in a line.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    names = [name for name in names if name not in ("step", "loss")]
    for count in range(1, len(names) + 1):
        if all(_adds_up(line, names[:count]) for line in lines if "loss" in line):
            return tuple(names[:count])
    return ()


def _adds_up(line: Mapping[str, Any], names: list[str]) -> bool:
    values = [float(line[name]) for name in names if name in line]
    size = max(1.0, *map(abs, values)) if values else 1.0
    return bool(values) and math.isclose(sum(values), line["loss"], rel_tol=0, abs_tol=1e-4 * size)
