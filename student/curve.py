"""A picture of a run from its metrics.jsonl: every loss term, and evaluations where there were any. Not for numbers."""

from pathlib import Path
from typing import Any

from student.metrics import read_metrics

KNOWN = ("step", "lr", "loss", "seconds")


def draw_curve(run: Path) -> Path | None:
    """Write `curve.png` into a run folder; None where there are too few steps to draw."""
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval" in line]
    if len(steps) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + bool(evaluations), figsize=(7 + 5 * bool(evaluations), 4), squeeze=False)
    _draw_terms(axes[0][0], steps)
    if evaluations:
        _draw_evaluations(axes[0][1], evaluations)
    figure.suptitle(run.name)
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=120)
    plt.close(figure)
    return run / "curve.png"


def _draw_terms(axis: Any, lines: list[dict[str, Any]]) -> None:
    """The loss and its weighted terms over steps, each smoothed, its own values faint behind it."""
    at = [line["step"] for line in lines]
    names = ["loss", *lines[-1].get("terms", [])]
    for i, name in enumerate(names):
        values = [line[name] for line in lines if name in line]
        axis.plot(at[: len(values)], values, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axis.plot(at[: len(values)], smooth(values), color=f"C{i}", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("weighted term")
    axis.set_yscale("log" if min(line["loss"] for line in lines) > 0 else "linear")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)


def _draw_evaluations(axis: Any, lines: list[dict[str, Any]]) -> None:
    """Held-out metrics over steps."""
    for name in lines[-1]["eval"]:
        axis.plot([line["step"] for line in lines], [line["eval"].get(name) for line in lines], "o-", label=name)
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)


def smooth(values: list[float]) -> list[float]:
    """Mean over the last fiftieth of the values before each."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
