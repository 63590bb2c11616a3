"""A picture of a run from its metrics.jsonl: the loss and every term of it. Not for numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from student.training.telemetry.metrics import read_metrics


def draw_curve(run: Path, terms: Iterable[str]) -> Path | None:
    """Write `curve.png` into a run folder; None where there are too few steps to draw."""
    lines = read_metrics(run / "metrics.jsonl")
    if len(lines) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    _draw_terms(axis, lines, ["loss", *terms])
    if (run / "evals.jsonl").exists():
        _draw_scores(axis.twinx(), read_metrics(run / "evals.jsonl"))
    figure.suptitle(run.name)
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=120)
    plt.close(figure)
    return run / "curve.png"


def _draw_terms(axis: Any, lines: list[dict[str, Any]], names: list[str]) -> None:
    """The loss and its weighted terms over steps, each smoothed, its own values faint behind it."""
    for i, name in enumerate(names):
        shown = [line for line in lines if name in line]  # a term may have a part in some steps alone
        at, values = [line["step"] for line in shown], [line[name] for line in shown]
        axis.plot(at, values, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axis.plot(at, smooth(values), color=f"C{i}", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("weighted term")
    positive = all(line.get(name, 1) > 0 for line in lines for name in names)
    axis.set_yscale("log" if positive else "linear")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)


def _draw_scores(axis: Any, lines: list[dict[str, Any]]) -> None:
    """What the student scored on the way, on an axis of its own."""
    axis.plot([line["step"] for line in lines], [line["score"] for line in lines], "k.--", label="score")
    axis.set_ylabel("score of evaluations")
    axis.set_ylim(bottom=0)


def smooth(values: list[float]) -> list[float]:
    """Mean over the last fiftieth of the values before each."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
