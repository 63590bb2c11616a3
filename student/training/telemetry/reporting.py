"""Send the metrics of a run to metrics.jsonl and, on request, to TensorBoard and Weights & Biases.

Only rank 0 writes.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from student.recipe import Run
from student.training.telemetry.metrics import Metrics
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank
from teachercache.core.progress import say

Report = Callable[[int, dict[str, float]], None]
SINKS = ("tensorboard", "wandb")


def requested_sinks(run: Run) -> list[str]:
    """Return the names in `run.report_to`; raise a UserError if one is unknown or its package is missing."""
    names = [name for name in run.report_to.replace(" ", "").split(",") if name]
    for name in names:
        if name not in SINKS:
            raise UserError(
                f"--report-to {name}: choose from {', '.join(SINKS)}; metrics.jsonl is always written"
            )
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"--report-to {name} needs its package: pip install 'teachercache[track]'"
            ) from error
    return names


@contextlib.contextmanager
def reporting(run: Run, facts: dict[str, Any], *, start: int) -> Iterator[Report]:
    """Open metrics.jsonl and all requested sinks, and yield a function that writes to them.

    Args:
        run: Settings of the run.
        facts: The content of run.json.
        start: The step that the run starts or resumes from.
    """
    out = Path(run.out)
    metrics = Metrics(out / "metrics.jsonl", start=start)
    with contextlib.ExitStack() as stack:
        sinks = [
            stack.enter_context({"tensorboard": _tensorboard, "wandb": _wandb}[name](out, facts, start))
            for name in (requested_sinks(run) if rank() == 0 else [])
        ]

        def report(step: int, values: dict[str, float]) -> None:
            metrics.write({"step": step, **values})
            for sink in sinks:
                sink(step, values)

        yield report


@contextlib.contextmanager
def _tensorboard(out: Path, facts: dict[str, Any], start: int) -> Iterator[Report]:
    """Yield a function that writes to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=start) as writer:

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"train/{name}", value, step)

        say(f"tensorboard --logdir {out}")
        yield write


@contextlib.contextmanager
def _wandb(out: Path, facts: dict[str, Any], start: int) -> Iterator[Report]:
    """Yield a function that writes to Weights & Biases; a resumed run keeps its id."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    path = out / "wandb.id"  # tied to this folder, because run folders in other places may have the same name
    if not (start and path.exists()):
        write_whole(path, uuid.uuid4().hex)
    run = wandb.init(
        project="teachercache", name=out.name, id=path.read_text(), dir=out, config=facts, resume="allow"
    )
    try:
        yield lambda step, values: run.log(values, step=step)
    finally:
        run.finish()
