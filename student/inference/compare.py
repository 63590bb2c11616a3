"""`student compare`: compare runs by their settings, their losses and what was measured of them."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.results.suite_tables import no_formula
from evaluation.tasks.registry import find as find_task
from evaluation.tasks.task import Task
from student.inference.compare_figure import draw_curves
from student.inference.run_facts import RunFacts, read_facts
from teachercache.core.errors import UserError
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import write_whole
from teachercache.core.progress import printable

Cell = float | int | str | None
MISSING = "-"
LONGEST = 32  # letters of a cell on a terminal


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the comparison.

    Args:
        part: run, setting, loss or metric.
        name: What is compared.
        label: The name in tables for a person.
        cells: One value for each run; None where a run has none.
        best: The places of the best values of a metric.
        shown: Whether the tables for a person have it; compare.csv and --json have all.
    """

    part: str
    name: str
    cells: tuple[Cell, ...]
    best: tuple[int, ...] = ()
    shown: bool = True
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        names: A short name for each run, all different.
        runs: Their facts.
        rows: The lines of the comparison.
        notes: What a reader should know: unfinished runs, different recipes, missing logs.
    """

    names: tuple[str, ...]
    runs: tuple[RunFacts, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare two or more runs.

    Raises:
        UserError: There are fewer than two, one is named twice, or one is no run.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs two runs: student compare RUN ANOTHER")
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f"{folders[place]} is named twice: pass each run once")
    runs = tuple(read_facts(folder) for folder in folders)
    rows = (*_about(runs), *_settings(runs), *_losses(runs), *_metrics(runs))
    return Comparison(_short_names(folders), runs, rows, tuple(_notes(runs)))


# ----------------------------------------------------------------------------------------------------
# Rows


def _about(runs: Sequence[RunFacts]) -> Iterable[Row]:
    """Yield what each run is, whether or not the runs differ in it."""
    yield Row("run", "recipe", tuple(run.recipe for run in runs))
    yield Row("run", "student", tuple(run.student for run in runs))
    yield Row("run", "parameters", tuple(run.parameters for run in runs))
    yield Row("run", "teacher", tuple(", ".join(run.teachers) or None for run in runs))
    yield Row("run", "steps", tuple(run.steps or None for run in runs))
    for name in dict.fromkeys(name for run in runs for name in run.speed):
        speed = tuple(run.speed.get(name) for run in runs)
        yield Row("run", name, speed, shown=name == "samples_per_second", label="samples/s")


def _settings(runs: Sequence[RunFacts]) -> Iterable[Row]:
    """Yield the settings that differ. Tables leave out those that differ only because a recipe lacks them."""
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [_typed(run.settings.get(name)) for run in runs]
        present = {value for value in values if value is not None}
        if len(present) > 1 or None in values:
            yield Row("setting", name, tuple(values), shown=len(present) > 1)


def _losses(runs: Sequence[RunFacts]) -> Iterable[Row]:
    """Yield the last and the best value of the loss and its terms, and the last of the other logged values."""
    terms = ["loss", *(name for name in dict.fromkeys(name for run in runs for name in run.terms))]
    for name in terms:
        logged = [run.logged(name) for run in runs]
        yield Row("loss", f"{name}, last", tuple(None if value is None else value.last for value in logged))
        yield Row("loss", f"{name}, best", tuple(None if value is None else value.best for value in logged))
        yield Row(
            "loss",
            f"{name}, best at step",
            tuple(None if value is None else value.best_step for value in logged),
            shown=False,
        )
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    for name in [name for name in names if name not in (*terms, "step")]:
        logged = [run.logged(name) for run in runs]
        yield Row(
            "loss",
            f"{name}, last",
            tuple(None if value is None else value.last for value in logged),
            shown=False,
        )
    scores = [max(run.evals, key=lambda line: line["score"], default=None) for run in runs]
    if any(scores):
        yield Row(
            "loss",
            "best score in training",
            tuple(None if line is None else line["score"] for line in scores),
        )
        yield Row(
            "loss",
            "best score, step",
            tuple(None if line is None else line["step"] for line in scores),
            shown=False,
        )


def _metrics(runs: Sequence[RunFacts]) -> Iterable[Row]:
    """Yield the metrics of each data set and task that a run was measured on, with the best values marked."""
    for dataset, task_name in dict.fromkeys(key for run in runs for key in run.measured):
        results = [run.measured.get((dataset, task_name), {}) for run in runs]
        task = _task(task_name)
        headings = dict(task.columns) if task else {}
        scores = {*headings, *task.headline} if task else set()
        short = task_name.replace(task.name, task.short, 1) if task and task.short else task_name
        for metric in dict.fromkeys(name for result in results for name in result):
            cells = tuple(result.get(metric) for result in results)
            best = best_of(cells, lower=bool(task and metric in task.lower)) if metric in scores else ()
            label = f"{dataset} {short}: {headings.get(metric, metric)}"
            shown = metric in scores or not scores
            yield Row("metric", f"{dataset} {task_name} {metric}", cells, best, shown, label)


def best_of(cells: Sequence[float | None], *, lower: bool = False) -> tuple[int, ...]:
    """Return the places of the best values; none if fewer than two runs have a value or all values are equal."""
    values = [value for value in cells if value is not None]
    if len(set(values)) < 2:
        return ()
    best = min(values) if lower else max(values)
    return tuple(place for place, value in enumerate(cells) if value == best)


def _task(name: str) -> Task | None:
    """Return the task of a result; None for one that is neither ours nor installed. Nothing is imported by path."""
    try:
        return find_task(name.partition(":")[0])
    except UserError:
        return None


def _typed(value: Any) -> str | None:
    """Return a setting as a user types it; None for one that a run does not have."""
    if value is None:
        return None
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _short_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the folders, or their paths as they were typed where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return tuple(
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    )


def _notes(runs: Sequence[RunFacts]) -> Iterable[str]:
    for run in runs:
        if not run.finished:
            yield f"{run.folder} is unfinished: {run.steps:,} of {run.planned:,} steps"
        elif not run.lines:
            yield f"{run.folder} has no log: its losses are missing"
        if not run.measured:
            yield f"{run.folder} was not measured: student eval {run.folder} --task TASK"
    recipes = dict.fromkeys(run.recipe for run in runs)
    if len(recipes) > 1:
        yield f"losses of different recipes ({', '.join(recipes)}) are not comparable; metrics are"


# ----------------------------------------------------------------------------------------------------
# Output


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values for JSON."""
    return {
        "runs": [str(run.folder) for run in comparison.runs],
        "names": list(comparison.names),
        "finished": [run.finished for run in comparison.runs],
        "rows": [
            {"part": row.part, "name": row.name, "values": list(row.cells), "best": list(row.best)}
            for row in comparison.rows
        ],
        "notes": list(comparison.notes),
    }


def table(comparison: Comparison) -> str:
    """Format a comparison as text for a terminal; the best values have a star."""
    lines = [["", *comparison.names]]
    part = ""
    for row in comparison.rows:
        if not row.shown:
            continue
        if row.part != part:
            part = row.part
            lines += [[], [HEADINGS[part]]]
        marks = [" *" if place in row.best else "" for place in range(len(row.cells))]
        lines.append(
            [
                row.label or row.name,
                *(text_of(cell) + mark for cell, mark in zip(row.cells, marks, strict=True)),
            ]
        )
    lines = [
        [_shortened(printable(cell), LONGEST if i else 2 * LONGEST) for i, cell in enumerate(line)]
        for line in lines
    ]
    widths = [
        max((len(line[place]) for line in lines if len(line) > max(place, 1)), default=0)
        for place in range(len(lines[0]))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


HEADINGS = {
    "run": "runs",
    "setting": "settings that differ",
    "loss": "losses (running mean)",
    "metric": "metrics (* best)",
}


def text_of(cell: Cell) -> str:
    """Return a value as text: four decimals of a number, fewer of a large one."""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return MISSING if cell is None else str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4f}" if 1e-3 <= abs(cell) < 100 or cell == 0 else f"{cell:.4g}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"


def markdown(comparison: Comparison) -> str:
    """Format a comparison as Markdown, with the best values in bold."""
    lines = [f"# {', '.join(comparison.names)}", "", "![curves](compare.png)"]
    for part, heading in HEADINGS.items():
        rows = [row for row in comparison.rows if row.part == part and row.shown]
        if not rows:
            continue
        lines += ["", f"## {heading.replace('(* best)', '(best in bold)')}", ""]
        lines += [_line(["", *comparison.names]), _line(["---"] * (1 + len(comparison.names)))]
        for row in rows:
            cells = [text_of(cell) for cell in row.cells]
            cells = [f"**{cell}**" if place in row.best else cell for place, cell in enumerate(cells)]
            lines.append(_line([row.label or row.name, *cells]))
    lines += ["", *(f"- {_escaped(note)}" for note in comparison.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Return a text of others as one that ends no cell and starts no tag."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write compare.png, compare.csv and compare.md into a folder, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes | str] = {
        "compare.png": draw_curves(comparison.names, comparison.runs),
        "compare.csv": _csv(comparison),
        "compare.md": markdown(comparison),
    }
    for name, content in contents.items():
        sweep_beside(out / name)
        write_whole(out / name, content)
    return [out / name for name in contents]


def _csv(comparison: Comparison) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["part", "name", *map(no_formula, comparison.names)])
    for row in comparison.rows:
        writer.writerow([row.part, *map(no_formula, (row.name, *row.cells))])
    return file.getvalue()
