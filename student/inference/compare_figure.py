"""Draw the curves of several runs over each other: the loss, each of its terms, and the scores of evaluations."""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from student.inference.run_facts import RunFacts
from student.training.telemetry.curve import smooth
from teachercache.core.progress import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
SCORE = "score of evaluations"
Points = tuple[list[int], list[float]]


def draw_curves(names: Sequence[str], runs: Sequence[RunFacts]) -> bytes:
    """Return a PNG with a panel for the loss and each term; every run has one color in all panels."""
    from matplotlib.figure import Figure  # not pyplot, which would replace the backend of a notebook

    terms = ["loss", *dict.fromkeys(name for run in runs for name in run.terms)]
    panels: list[tuple[str, Callable[[RunFacts], Points]]] = [
        (term, functools.partial(points_of, name=term)) for term in terms
    ]
    if any(run.evals for run in runs):
        panels.append((SCORE, _scores))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, points) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, title, names, [points(run) for run in runs])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def points_of(run: RunFacts, name: str) -> Points:
    """Return the steps and the values of a logged name; values that are not finite are left out."""
    lines = [line for line in run.lines if name in line and math.isfinite(line[name])]
    return [line["step"] + 1 for line in lines], [float(line[name]) for line in lines]


def _scores(run: RunFacts) -> Points:
    return [line["step"] for line in run.evals], [float(line["score"]) for line in run.evals]


def _draw_panel(axis: "Axes", title: str, names: Sequence[str], curves: Sequence[Points]) -> None:
    """Draw one value of all runs: smoothed, with the raw values faintly behind; scores as points."""
    for place, (name, (steps, values)) in enumerate(zip(names, curves, strict=True)):
        color, label = f"C{place % 10}", printable(name).replace("$", r"\$").lstrip("_")
        style = ("-", "--", ":")[place // 10 % 3]
        if title == SCORE:
            axis.plot(steps, values, color=color, linestyle=style, marker=".", label=label)
            continue
        axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(steps, smooth(values), color=color, linestyle=style, label=label)
    axis.set_title(title.replace("$", r"\$"))
    axis.set_xlabel("step")
    everything = [value for _, values in curves for value in values] if title != SCORE else []
    wide = bool(everything) and 0 < 10 * min(everything) < max(everything)
    axis.set_yscale("log" if wide else "linear")
    axis.grid(alpha=0.2)
