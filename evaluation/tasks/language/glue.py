"""GLUE by fine-tuning (VLKD, table 5): a classification head on the last token of BART's decoder.

`--data` is a folder with CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI and RTE as GLUE's own TSV files, some of them, or one
of these folders. Measured on dev, because the test files have no labels. WNLI is left out, as in the paper.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from evaluation.data.files import file_text
from evaluation.probes.finetune_text import (
    Label,
    Options,
    Row,
    batches,
    encode_texts,
    fine_tune,
    load_text_model,
)
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.progress import say

Predict = Callable[[Sequence[Row]], np.ndarray]  # rows -> classes [n], or numbers [n] for regression


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """The files of one of GLUE's tasks, and its metrics.

    Attributes:
        texts: Columns of the texts.
        label: Column of the label.
        labels: The possible labels; empty for regression.
        metrics: Keys of METRICS.
        dev: Dev files, each with a suffix of the task's name in results.
        header: Column names of files without a header.
    """

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[tuple[str, str], ...] = (("dev.tsv", ""),)
    header: tuple[str, ...] = ()


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


def evaluate(folder: str, data: str, options: Options | None = None) -> Metrics:
    """Fine-tune and measure the tasks of a folder: `CoLA/mcc`, `SST-2/acc`, ... and their means.

    Args:
        folder: A transformers folder.
        data: GLUE's folder.
        options: The hyperparameters; None for the defaults.

    Returns:
        The metrics. `average` is the mean over the existing tasks, with the mean of a task's two metrics and MNLI
        matched; `average_vlkd` is the mean over the seven tasks of table 5. `RTE/majority` and the like are the accuracy
        of always predicting the most frequent label of train.

    Raises:
        UserError: If the data, the model or scikit-learn is missing.
    """
    options = options or Options()
    _sklearn()  # an error before an hour of training
    folders = find_tasks(data)
    metrics: Metrics = {}
    means: dict[str, float] = {}
    for name, where in folders.items():
        scores = _measure(name, where, folder, options)
        metrics |= scores
        means[name] = statistics.mean(scores[f"{name}/{metric}"] for metric in GLUE[name].metrics)
    metrics["average"] = statistics.mean(means.values())
    if set(PAPER) <= set(means):
        metrics["average_vlkd"] = statistics.mean(means[name] for name in PAPER)
    metrics |= {name: f"skipped: {data} has no {name}" for name in GLUE if name not in folders}
    return metrics | {"num_tasks": len(folders), **dataclasses.asdict(options)}


def find_tasks(data: str) -> dict[str, Path]:
    """Return the folders of the tasks that exist, in the order of GLUE.

    Raises:
        UserError: If there is none.
    """
    root = Path(data)
    names = {name.lower(): name for name in GLUE}
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    folders = {
        names[path.name.lower()]: path
        for path in places
        if path.name.lower() in names and (path / "train.tsv").exists()
    }
    if not folders:
        raise UserError(
            f"no GLUE at {data}: a folder of {', '.join(GLUE)} is expected, each with train.tsv, dev.tsv"
        )
    return {name: folders[name] for name in GLUE if name in folders}


def read_tsv(path: Path, task: GlueTask) -> tuple[list[Row], int]:
    """Read a GLUE file.

    Args:
        path: The file; quotes have no meaning in it.
        task: Its columns and labels.

    Returns:
        The rows, and the number of lines left out because they are malformed or have none of the task's labels (MNLI's
        `-`).

    Raises:
        UserError: If the file or a column is missing, or no line has a label.
    """
    if not path.exists():
        raise UserError(f"there is no {path}: GLUE's own files are expected")
    lines = file_text(path).split("\n")
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    header = list(task.header) or [name.strip() for name in lines.pop(0).split("\t")] if lines else []
    missing = [name for name in (*task.texts, task.label) if name not in header]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: GLUE's own files are expected")
    rows: list[Row] = []
    num_left_out = 0
    text_columns, label_column = [header.index(name) for name in task.texts], header.index(task.label)
    for line in lines:
        cells = line.split("\t")
        label = _label(cells[label_column], task) if len(cells) > max(*text_columns, label_column) else None
        if label is None or len(cells) > len(header):
            num_left_out += 1
        else:
            rows.append((tuple(cells[column] for column in text_columns), label))
    if not rows:
        raise UserError(
            f"no line of {path} has a label: measure the file `dev`, GLUE's test labels are not public"
        )
    return rows, num_left_out


def _label(cell: str, task: GlueTask) -> float | None:
    """The index of a label, or its value for regression; None if it is neither."""
    try:
        value = float(cell) if not task.labels else task.labels.index(cell)
        return value if math.isfinite(value) else None
    except ValueError:
        return None


def _measure(name: str, where: Path, folder: str, options: Options) -> dict[str, float]:
    """Fine-tune and measure one task."""
    task = GLUE[name]
    train, num_left_out = read_tsv(where / "train.tsv", task)
    dev = {
        f"{name}{suffix}": read_tsv(where / file, task)
        for file, suffix in task.dev
        if (where / file).exists()
    }
    if name not in dev:
        raise UserError(f"there is no {where / task.dev[0][0]}: GLUE's own files are expected")
    say(f"{name}: fine-tuning {folder} on {len(train):,} rows, {options.epochs} epochs")
    predict = train_predictor(folder, train, len(task.labels) or 1, options, name)
    scores: dict[str, float] = {}
    for shown, (rows, left_out) in dev.items():
        truth = np.array([label for _, label in rows])
        predicted = predict(rows)
        scores |= {f"{shown}/{metric}": METRICS[metric](truth, predicted) for metric in task.metrics}
        if task.labels:
            most_frequent = statistics.mode(label for _, label in train)
            scores[f"{shown}/majority"] = float((truth == most_frequent).mean())
        scores[f"{shown}/num_dev"] = len(rows)
        num_left_out += left_out
    return scores | {f"{name}/num_train": len(train), f"{name}/num_left_out": num_left_out}


def train_predictor(folder: str, rows: list[Row], outputs: int, options: Options, title: str) -> Predict:
    """Fine-tune a model of a folder, and return its predictions as a function of rows.

    Args:
        folder: A transformers folder.
        rows: Training rows.
        outputs: Number of classes, or 1 for regression.
        options: The hyperparameters.
        title: Shown with the progress.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # the head, and dropout
        kind = "regression" if outputs == 1 else "single_label_classification"
        model, tokenizer = load_text_model(
            "SequenceClassification", folder, num_labels=outputs, problem_type=kind
        )

        def collate(batch: Sequence[Row]) -> dict[str, torch.Tensor]:
            targets: list[Label] = [label for _, label in batch]
            labels = torch.tensor(targets, dtype=torch.float32 if outputs == 1 else torch.int64)
            return encode_texts(tokenizer, batch, options.longest) | {"labels": labels}

        fine_tune(model, rows, collate, options, title)

    def predict(rows_to_predict: Sequence[Row]) -> np.ndarray:
        device, logits = next(model.parameters()).device, []
        with torch.inference_mode():
            for batch in batches(rows_to_predict, 4 * options.batch):
                inputs = encode_texts(tokenizer, batch, options.longest)
                logits.append(
                    model(**{key: value.to(device) for key, value in inputs.items()}).logits.float().cpu()
                )
        scores = torch.cat(logits)
        return (scores[:, 0] if outputs == 1 else scores.argmax(1)).numpy()

    return predict


def _mcc(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(_sklearn().matthews_corrcoef(truth, predicted))


def _f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(_sklearn().f1_score(truth, predicted, zero_division=0.0))


def _sklearn() -> ModuleType:
    """scikit-learn's metrics; scipy is installed with it."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UserError("GLUE needs scikit-learn: try `pip install -e .[language]`") from error
    return metrics


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(truth: np.ndarray, predicted: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
            return 0.0  # of a constant; scipy returns NaN
        return float(getattr(stats, name)(truth, predicted).statistic)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "acc": lambda truth, predicted: float((truth == predicted).mean()),
    "mcc": _mcc,
    "f1": _f1,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
