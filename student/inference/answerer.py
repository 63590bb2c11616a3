"""A trained student of questions as an Answerer: rows to scores of their answers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.models.answerer import Answerer
from evaluation.models.cache_answerer import answerers
from student.contract import Capability, Student, require
from student.inference.load import load_run
from student.inputs.caches import Wanted, find_by_field, open_source
from student.inputs.question_rows import QuestionReader
from student.inputs.questions import Task, read_question
from student.models.run_file import is_run, read_run
from student.models.single_stream.tokenizer import load_tokenizer
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.read import cache_folder

ROWS = 64  # at a time
HINT_TEACHER = "clip-lite"


class TaskModel(NamedTuple):
    """A run on questions: its task, its student, and the function that scores rows.

    `score(manifest, rows, which)` returns logits [n, classes], or None for a question that it was not trained on.
    """

    task: Task
    student: Student
    score: Callable[[Manifest, np.ndarray, str], np.ndarray | None]


def is_task_run(run: Path) -> bool:
    """Return whether a run folder holds a student of questions."""
    return is_run(run) and bool(read_run(run).get("questions"))


def load_task_model(run: Path, *, device: str, cache: str = "") -> TaskModel:
    """Load the student of a run on questions; the fields that it reads come from the cache of the data asked."""
    questions = read_run(run)["questions"]
    task = Task(**{**questions["task"], "answers": tuple(questions["task"]["answers"])})
    student = load_run(run)
    require(student, Capability.ANSWERS, str(run))
    student.to(device)
    rows_of = RowsOfRun(task, student, load_tokenizer(run), questions["max_text"], cache)

    def score(manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray | None:
        if which != task.which:
            return None
        batches = rows_of.read(manifest, rows)
        with torch.inference_mode():
            logits = [
                student({name: value.to(device) for name, value in batch.items()})["logits"]
                for batch in batches
            ]
        return torch.cat(logits).float().cpu().numpy()

    return TaskModel(task, student, score)


class RowsOfRun(NamedTuple):
    """Reads rows as the student of a run does."""

    task: Task
    student: Student
    tokenizer: Any
    max_text: int
    cache: str

    def read(self, manifest: Manifest, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Yield batches of rows; UserError names the `tc build` of a cache that is missing."""
        inputs = self.student.row_inputs
        wanted = Wanted(
            self.cache or str(cache_folder(manifest.data)), manifest.data, inputs.fields, HINT_TEACHER
        )
        sources = [
            open_source(cache, manifest, rows, tuple(name for name in inputs.fields if name in cache.fields))
            for cache in find_by_field(wanted)
        ]
        for source in sources:
            missing = (source.at[rows] < 0).sum()
            if missing:
                raise UserError(f"{missing} rows of {manifest.data} are not in the cache: extend it")
        reader = QuestionReader(manifest, self.task, sources, inputs, self.tokenizer, self.max_text)
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            yield reader.read(part, [read_question(self.task, manifest.row(row)) for row in part.tolist()])


def run_answerer(run: Path, task: str, data: str) -> Answerer:
    """Return an Answerer for a run that was trained on a task."""
    if not is_task_run(run):
        raise UserError(
            f"{run} was not trained to answer: pass a run of clip_td, or a CACHE.zarr for zero-shot"
        )
    trained = read_run(run)["run"]
    cache = trained["cache"] if trained["data"] == data else ""  # of other data: caches/<data>
    model = load_task_model(run, device=pick_device(), cache=cache)
    if model.task.name != task:
        raise UserError(
            f"{run} was trained on {model.task.name}: pass --task {model.task.name} and its --data"
        )
    return Answerer(run.name, str(run), task, model.score, model.task.answers)


def find_answerers(model: str, task: str, data: str) -> tuple[list[Answerer], Path | None]:
    """Return how a cache or a run answers a task, each way as a model of its own; and the run folder."""
    if model.rstrip("/").endswith(".zarr"):
        return answerers(model, task), None
    path = Path(model)
    if not is_run(path):
        raise UserError(
            f"{model} is neither a run nor a cache: --task {task} measures a run trained on it, or the "
            "embeddings of a CACHE.zarr as they are"
        )
    return [run_answerer(path, task, data)], path
