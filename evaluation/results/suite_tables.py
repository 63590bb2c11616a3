"""Write the results of a suite: everything as JSON and CSV, and the numbers that papers report as a Markdown table."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.results.run import Result
from evaluation.results.suite import CAPTIONED, CLASSIFICATION, LABELED, Report
from evaluation.tasks.registry import TASKS
from evaluation.tasks.task import Metric
from teachercache.core.leftovers import sweep
from teachercache.core.paths import write_whole

# Metrics that the suite adds to classification, with their headings
ADDED = (
    ("acc1_imagenet_classes", "top-1 of ImageNet's classes"),
    ("aupr", "AUPR"),
    ("effective_robustness", "effective robustness"),
)
ACCURACIES = {heading for _, heading in TASKS[CLASSIFICATION].columns}


def write_suite(report: Report, out: Path) -> list[Path]:
    """Write the report as suite.json, suite.csv and suite.md.

    Args:
        report: The results of `run_suite`.
        out: The folder to write to. suite.csv has a line for each result, as `clip_benchmark build` writes it.

    Returns:
        The paths of the three files.
    """
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    contents = {
        "json": json.dumps({"results": report.results, "skipped": report.skipped}, indent=1) + "\n",
        "csv": _csv(report.results),
        "md": suite_table(report) + "\n",
    }
    for ending, content in contents.items():
        write_whole(out / f"suite.{ending}", content)
    return [out / f"suite.{ending}" for ending in contents]


def _csv(results: Sequence[Result]) -> str:
    lines = [
        result["metrics"] | {key: value for key, value in result.items() if key != "metrics"}
        for result in results
    ]
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: no_formula(value) for name, value in line.items()} for line in lines)
    return file.getvalue()


def no_formula(value: Any) -> Any:
    """Return a cell that no spreadsheet computes: a text that starts like a formula gets an apostrophe before it.

    Models and data sets have the names of folders, which others may have chosen.
    """
    starts = ("=", "+", "-", "@", "\t", "\r", "\n")
    return f"'{value}" if isinstance(value, str) and value.startswith(starts) else value


def suite_table(report: Report) -> str:
    """Format a report as Markdown.

    The table has a row for each data set and metric and a column for each model, in percent. Below it stands what was
    skipped, with the reasons.
    """
    models = list(dict.fromkeys((result["model"], result["pretrained"]) for result in report.results))
    rows: dict[tuple[str, str, str], dict[tuple[str, str], Metric]] = {}
    for result in report.results:
        for key, heading in reported(result["dataset"], result["task"]):
            if key in result["metrics"]:
                cells = rows.setdefault((result["task"], result["dataset"], heading), {})
                cells[result["model"], result["pretrained"]] = result["metrics"][key]
    lines = [["task", "data", "metric", *(name for name, _ in models)]]
    lines += [["---"] * 3 + ["---:"] * len(models)]
    lines += [[*row, *(_percent(cells.get(model)) for model in models)] for row, cells in rows.items()]
    accuracies = [
        [value for model in models if isinstance(value := cells.get(model), float)]
        for (task, _, heading), cells in rows.items()
        if task == CLASSIFICATION and heading in ACCURACIES
    ]
    complete = [values for values in accuracies if len(values) == len(models)]
    if len(complete) > 1:
        means = [_percent(statistics.mean(column)) for column in zip(*complete, strict=True)]
        lines.append([CLASSIFICATION, f"mean of {len(complete)}", "top-1 or mean per class", *means])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    skipped = [
        " ".join(filter(None, [f"- {entry['dataset']}", entry["task"], entry["model"]]))
        + f": {entry['reason']}"
        for entry in report.skipped
    ]
    return text + ("\n\nSkipped:\n\n" + "\n".join(skipped) if skipped else "")


def reported(dataset: str, task: str) -> list[tuple[str, str]]:
    """Return the keys and headings of the metrics that a table shows for a data set and a task."""
    columns = list(TASKS[task].columns)
    if dataset in LABELED:
        accuracy, mean_per_class = columns
        columns = [mean_per_class if LABELED[dataset].per_class else accuracy, *ADDED]
    elif dataset in CAPTIONED and CAPTIONED[dataset].fold:
        fold = CAPTIONED[dataset].fold
        columns += [(f"{fold}/{key}", f"{heading}, {fold // 1000}k folds") for key, heading in columns]
    return columns


def _percent(value: Metric) -> str:
    return f"{100 * value:.1f}" if isinstance(value, float) else "-"
