"""GLUE by fine-tuning (VLKD, table 5): a head on the last token that BART's decoder reads. Not for pictures.

`--data` is a folder with CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI and RTE as GLUE's own TSV files, some of them, or
one of these folders itself. Measured on dev: the test files have no labels. WNLI is left out, as in the paper.
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.probes.finetune_text import Options, Row, batches, encode_texts, fine_tune, load_text_model
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.core.progress import say


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Where a task's columns are, by their names in the header, and what is measured."""

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]  # none: a number, to be predicted as one
    metrics: tuple[str, ...]
    dev: tuple[tuple[str, str], ...] = (("dev.tsv", ""),)  # files, and what stands behind the task's name
    header: tuple[str, ...] = ()  # of files without one


NLI = ("entailment", "not_entailment")
BINARY = ("0", "1")
GLUE = {
    "CoLA": GlueTask(
        ("sentence",), "label", BINARY, ("mcc",), header=("source", "label", "mark", "sentence")
    ),
    "SST-2": GlueTask(("sentence",), "label", BINARY, ("acc",)),
    "MRPC": GlueTask(("#1 String", "#2 String"), "Quality", BINARY, ("acc", "f1")),
    "QQP": GlueTask(("question1", "question2"), "is_duplicate", BINARY, ("acc", "f1")),
    "STS-B": GlueTask(("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "MNLI": GlueTask(
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("acc",),
        (("dev_matched.tsv", ""), ("dev_mismatched.tsv", "-mm")),
    ),
    "QNLI": GlueTask(("question", "sentence"), "label", NLI, ("acc",)),
    "RTE": GlueTask(("sentence1", "sentence2"), "label", NLI, ("acc",)),
}
PAPER = tuple(name for name in GLUE if name != "STS-B")  # table 5's mean


def evaluate(folder: str, data: str, options: Options | None = None) -> dict[str, Any]:
    """`CoLA/mcc`, `SST-2/acc`, ... of each task that is there, and their mean as GLUE takes it.

    `average` is of the tasks that are there (of a task's two metrics the mean; MNLI matched), `average_vlkd` of table
    5's seven. `RTE/majority` and the like: what always saying the most frequent label of train gets.
    """
    options, _ = options or Options(), _sklearn()  # before an hour of training
    found = find_tasks(data)
    metrics: dict[str, Any] = {}
    means: dict[str, float] = {}
    for name, where in found.items():
        scores = _one(name, where, folder, options)
        metrics |= scores
        means[name] = statistics.mean(scores[f"{name}/{metric}"] for metric in GLUE[name].metrics)
    metrics["average"] = statistics.mean(means.values())
    if set(PAPER) <= set(means):
        metrics["average_vlkd"] = statistics.mean(means[name] for name in PAPER)
    lacking = {name: f"skipped: {data} has no {name}" for name in GLUE if name not in found}
    return metrics | lacking | {"num_tasks": len(found), **dataclasses.asdict(options)}


def find_tasks(data: str) -> dict[str, Path]:
    """Folders of the tasks that are there."""
    root = Path(data)
    names = {name.lower(): name for name in GLUE}
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    there = {
        names[path.name.lower()]: path
        for path in places
        if path.name.lower() in names and (path / "train.tsv").exists()
    }
    if not there:
        raise UserError(
            f"no GLUE at {data}: a folder of {', '.join(GLUE)} is expected, each with train.tsv, dev.tsv"
        )
    return {name: there[name] for name in GLUE if name in there}


def read_tsv(path: Path, task: GlueTask) -> tuple[list[Row], int]:
    """Texts and labels of a GLUE file, and how many lines were left out as broken or unlabelled.

    Quotes mean nothing in these files. A line whose label is none of the task's (MNLI's `-`) is left out.
    """
    if not path.exists():
        raise UserError(f"there is no {path}: GLUE's own files are expected")
    lines = path.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    header = list(task.header) or lines.pop(0).split("\t") if lines else []
    missing = [name for name in (*task.texts, task.label) if name not in header]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: GLUE's own files are expected")
    rows, lost = [], 0
    places, at = [header.index(name) for name in task.texts], header.index(task.label)
    for line in lines:
        cells = line.split("\t")
        label = _label(cells[at], task) if len(cells) > max(*places, at) else None
        if label is None or len(cells) > len(header):
            lost += 1
        else:
            rows.append((tuple(cells[place] for place in places), label))
    if not rows:
        raise UserError(
            f"no line of {path} has a label: measure the file `dev`, GLUE's test labels are not public"
        )
    return rows, lost


def _label(cell: str, task: GlueTask) -> Any:
    """A label's place or its number; None where it is neither."""
    try:
        return float(cell) if not task.labels else task.labels.index(cell)
    except ValueError:
        return None


def _one(name: str, where: Path, folder: str, options: Options) -> dict[str, Any]:
    """A task from its files to its metrics."""
    task = GLUE[name]
    train, lost = read_tsv(where / "train.tsv", task)
    dev = {
        f"{name}{suffix}": read_tsv(where / file, task)
        for file, suffix in task.dev
        if (where / file).exists()
    }
    if name not in dev:
        raise UserError(f"there is no {where / task.dev[0][0]}: GLUE's own files are expected")
    say(f"{name}: fine-tuning {folder} on {len(train):,} rows, {options.epochs} epochs")
    predict = trained(folder, train, len(task.labels) or 1, options, name)
    found: dict[str, Any] = {}
    for shown, (rows, broken) in dev.items():
        truth = np.array([label for _, label in rows])
        said = predict(rows)
        found |= {f"{shown}/{metric}": METRICS[metric](truth, said) for metric in task.metrics}
        if task.labels:
            usual = statistics.mode(label for _, label in train)
            found[f"{shown}/majority"] = float((truth == usual).mean())
        found[f"{shown}/num_dev"] = len(rows)
        lost += broken
    return found | {f"{name}/num_train": len(train), f"{name}/num_left_out": lost}


def trained(
    folder: str, rows: list[Row], outputs: int, options: Options, title: str
) -> Callable[[list[Row]], np.ndarray]:
    """Fine-tune a model of a folder; what it then predicts: classes [n], or numbers [n] where there is one output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # the head, and dropout
        kind = "regression" if outputs == 1 else "single_label_classification"
        model, tokenizer = load_text_model(
            "SequenceClassification", folder, num_labels=outputs, problem_type=kind
        )
        model.to(pick_device())

        def collate(part: Any) -> dict[str, torch.Tensor]:
            labels = torch.tensor(
                [label for _, label in part], dtype=torch.float32 if outputs == 1 else torch.int64
            )
            return encode_texts(tokenizer, part, options.longest) | {"labels": labels}

        fine_tune(model, rows, collate, options, title)

    def predict(asked: list[Row]) -> np.ndarray:
        device, logits = next(model.parameters()).device, []
        with torch.inference_mode():
            for part in batches(asked, 4 * options.batch):
                inputs = encode_texts(tokenizer, part, options.longest)
                logits.append(
                    model(**{key: value.to(device) for key, value in inputs.items()}).logits.float().cpu()
                )
        found = torch.cat(logits)
        return (found[:, 0] if outputs == 1 else found.argmax(1)).numpy()

    return predict


def _mcc(truth: np.ndarray, said: np.ndarray) -> float:
    return float(_sklearn().matthews_corrcoef(truth, said))


def _f1(truth: np.ndarray, said: np.ndarray) -> float:
    return float(_sklearn().f1_score(truth, said, zero_division=0.0))


def _sklearn() -> Any:
    """scikit-learn's metrics; it comes with scipy."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UserError("GLUE needs scikit-learn: try `pip install -e .[language]`") from error
    return metrics


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(truth: np.ndarray, said: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(said) == 0 or np.ptp(truth) == 0:
            return 0.0  # a constant follows nothing; scipy says NaN
        return float(getattr(stats, name)(truth, said).statistic)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "acc": lambda truth, said: float((truth == said).mean()),
    "mcc": _mcc,
    "f1": _f1,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
