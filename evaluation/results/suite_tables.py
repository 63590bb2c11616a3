"""A suite's results: everything as JSON and CSV, what papers report as one Markdown table. Not for measuring."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.results.suite import Report
from teachercache.core.paths import write_whole

MEAN_PER_CLASS = ("caltech101", "pets")  # what CLIP reports of these; accuracy of the others
WAYS = (("image", "T2I"), ("text", "I2T"))
RETRIEVAL = tuple(
    (f"{way}_retrieval_recall@{k}", f"{short} R@{k}") for way, short in WAYS for k in (1, 5, 10)
)


def write_suite(report: Report, out: Path) -> list[Path]:
    """suite.json, suite.csv with a line per result as `clip_benchmark build` has it, suite.md with the table."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "json": json.dumps({"results": report.results, "skipped": report.skipped}, indent=1) + "\n",
        "csv": _csv(report.results),
        "md": suite_table(report) + "\n",
    }
    for ending, content in contents.items():
        write_whole(out / f"suite.{ending}", content)
    return [out / f"suite.{ending}" for ending in contents]


def _csv(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        result["metrics"] | {key: value for key, value in result.items() if key != "metrics"}
        for result in results
    ]
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def suite_table(report: Report) -> str:
    """Markdown: a row per data set and metric, a column per model, per cent; then what was skipped and why."""
    models = list(dict.fromkeys((result["model"], result["pretrained"]) for result in report.results))
    rows: dict[tuple[str, str, str], dict[tuple[str, str], Any]] = {}
    for result in report.results:
        for key, name in reported(result["dataset"], result["task"]):
            if key in result["metrics"]:
                cells = rows.setdefault((result["task"], result["dataset"], name), {})
                cells[result["model"], result["pretrained"]] = result["metrics"][key]
    lines = [["task", "data", "metric", *(name for name, _ in models)]]
    lines += [["---"] * 3 + ["---:"] * len(models)]
    lines += [[*row, *(_per_cent(cells.get(model)) for model in models)] for row, cells in rows.items()]
    means = [
        cells for (task, _, name), cells in rows.items() if task == "zeroshot_classification" and name in TOP1
    ]
    whole = [cells for cells in means if all(cells.get(model) is not None for model in models)]
    if len(whole) > 1:
        average = [_per_cent(statistics.mean(cells[model] for cells in whole)) for model in models]
        lines.append(
            ["zeroshot_classification", f"mean of {len(whole)}", "top-1 or mean per class", *average]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    skipped = [
        " ".join(filter(None, [f"- {each['dataset']}", each["task"], each["model"]])) + f": {each['reason']}"
        for each in report.skipped
    ]
    return text + ("\n\nSkipped:\n\n" + "\n".join(skipped) if skipped else "")


COMPOSED = {
    "winoground": ("text_score", "image_score", "group_score"),
    "aro": ("relation_macro", "attribution_macro", "aro_overall", "coco_order", "flickr_order"),
    "sugar_crepe": ("add", "replace", "swap", "acc"),
}
TOP1 = ("top-1", "mean per class")


def reported(dataset: str, task: str) -> list[tuple[str, str]]:
    """Keys and names of what a table of that task shows."""
    if task == "zeroshot_retrieval":
        folds = [(f"1000/{key}", f"{name}, 1k folds") for key, name in RETRIEVAL]
        return [*RETRIEVAL, *(folds if dataset == "mscoco_captions" else [])]
    if task in COMPOSED:
        return [(key, key.replace("_", " ")) for key in COMPOSED[task]]
    prefix = "lp_" if task == "linear_probe" else ""
    key, name = ("mean_per_class_recall", TOP1[1]) if dataset in MEAN_PER_CLASS else ("acc1", TOP1[0])
    more = [
        ("acc1_imagenet_classes", "top-1 of ImageNet's classes"),
        ("aupr", "AUPR"),
        ("effective_robustness", "effective robustness"),
    ]
    return [(prefix + key, name), *([] if prefix else more)]


def _per_cent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, float) else "-"
