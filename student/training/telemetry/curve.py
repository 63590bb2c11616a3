"""Draw the loss curve of a run, with all terms and evaluation scores, from its metrics.jsonl."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student.training.telemetry.metrics import read_metrics
from teachercache.core.digests import write_proved

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curve(run: Path, terms: Iterable[str]) -> Path | None:
    """Write `curve.png` into a run folder.

    Args:
        run: The run folder.
        terms: Names of the loss terms.

    Returns:
        Path of the file, or None if there are fewer than two steps.
    """
    lines = read_metrics(run / "metrics.jsonl")
    if len(lines) < 2:
        return None
    from matplotlib.figure import Figure  # not pyplot, which would replace the backend of a notebook

    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    _draw_terms(axis, lines, ["loss", *terms])
    if (run / "evals.jsonl").exists():
        _draw_scores(axis.twinx(), read_metrics(run / "evals.jsonl"))
    figure.suptitle(run.name)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_proved(run / "curve.png", run, content.getvalue())
    return run / "curve.png"


def _draw_terms(axis: "Axes", lines: list[dict[str, Any]], names: list[str]) -> None:
    """Plot the loss and its weighted terms over steps, smoothed, with the raw values faintly behind."""
    for i, name in enumerate(names):
        with_term = [line for line in lines if name in line]  # a term may be missing in some steps
        steps, values = [line["step"] for line in with_term], [line[name] for line in with_term]
        axis.plot(steps, values, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axis.plot(steps, smooth(values), color=f"C{i}", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("weighted term")
    positive = all(line.get(name, 1) > 0 for line in lines for name in names)
    axis.set_yscale("log" if positive else "linear")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)


def _draw_scores(axis: "Axes", lines: list[dict[str, Any]]) -> None:
    """Plot the scores of the evaluations on a second axis."""
    axis.plot([line["step"] for line in lines], [line["score"] for line in lines], "k.--", label="score")
    axis.set_ylabel("score of evaluations")
    axis.set_ylim(bottom=0)


def smooth(values: list[float]) -> list[float]:
    """Return a running mean over a fiftieth of the values."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
