"""Turn a trained student of question rows into an Answerer, which scores the answers of a row."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.models.answerer import Answerer
from evaluation.models.cache_answerer import answerers
from student.contract import Capability, Student, require
from student.inference.load import load_run
from student.inputs.caches import find_by_field, open_source
from student.inputs.hints import Wanted
from student.inputs.question_rows import QuestionReader
from student.inputs.questions import Task, read_question
from student.models.run_file import is_run, read_run
from student.models.single_stream.tokenizer import load_tokenizer
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.read import cache_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 64  # rows per forward pass
HINT_TEACHER = "clip-lite"  # the teacher in hints about missing caches


class TaskModel(NamedTuple):
    """A run on question rows: its task, its student, and a function that scores rows.

    `score(manifest, rows, which)` returns logits [n, classes], or None if the run was trained on another of
    the task's questions than `which`.
    """

    task: Task
    student: Student
    score: Callable[[Manifest, np.ndarray, str], np.ndarray | None]


def is_task_run(run: Path) -> bool:
    """Return whether a run folder holds a student that was trained on question rows."""
    return is_run(run) and bool(read_run(run).get("questions"))


def load_task_model(run: Path, *, device: str, cache: str = "") -> TaskModel:
    """Load the student of a run on question rows.

    Args:
        run: The run folder.
        device: Where the student computes.
        cache: The cache or folder of caches with the fields that the student reads; "" for the default folder
            of whatever data are scored.

    Raises:
        UserError: The student cannot answer questions.
    """
    questions = read_run(run)["questions"]
    task = Task(**{**questions["task"], "answers": tuple(questions["task"]["answers"])})
    student = load_run(run)
    require(student, Capability.ANSWERS, str(run))
    student.to(device)
    run_rows = RowsOfRun(task, student, load_tokenizer(run), questions["max_text"], cache)

    def score(manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray | None:
        if which != task.which:
            return None
        batches = run_rows.read(manifest, rows)
        with torch.inference_mode():
            logits = [
                student({name: value.to(device) for name, value in batch.items()})["logits"]
                for batch in batches
            ]
        return torch.cat(logits).float().cpu().numpy()

    return TaskModel(task, student, score)


class RowsOfRun(NamedTuple):
    """Reads rows of any data in the form that the student of a run was trained on."""

    task: Task
    student: Student
    tokenizer: "Tokenizer"
    max_text: int
    cache: str

    def read(self, manifest: Manifest, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of some rows, in order.

        Raises:
            UserError: A cache is missing (the message ends in the `tc build` that makes it), or rows are not
                in it.
        """
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
                raise UserError(
                    f"{missing} rows of {manifest.data} are not in the cache: extend it with `tc build`"
                )
        reader = QuestionReader(manifest, self.task, sources, inputs, self.tokenizer, self.max_text)
        for start in range(0, len(rows), BATCH):
            batch_rows = rows[start : start + BATCH]
            questions = [read_question(self.task, manifest.row(row)) for row in batch_rows.tolist()]
            yield reader.read(batch_rows, questions)


def run_answerer(run: Path, task: str, data: str) -> Answerer:
    """Return the student of a run as an Answerer.

    Args:
        run: The run folder.
        task: The task to be measured.
        data: `--data`; if the run was trained on the same data, its cache is used.

    Raises:
        UserError: The run was not trained on question rows, or on another task.
    """
    if not is_task_run(run):
        raise UserError(
            f"{run} was not trained to answer: pass a run of a question recipe, such as clip_td, or a CACHE.zarr for zero-shot"
        )
    trained = read_run(run)["run"]
    cache = trained["cache"] if trained["data"] == data else ""  # other data: caches/<data>
    model = load_task_model(run, device=pick_device(), cache=cache)
    if model.task.name != task:
        raise UserError(
            f"{run} was trained on {model.task.name}: pass --task {model.task.name} and its --data"
        )
    return Answerer(run.name, str(run), task, model.score, model.task.answers)


def find_answerers(model: str, task: str, data: str) -> tuple[list[Answerer], Path | None]:
    """Return the ways in which a cache or a run answers a task, and the run folder if it is a run.

    Args:
        model: A run folder, or CACHE.zarr for zero-shot answers from its embeddings.
        task: The task to be measured.
        data: `--data`.
    """
    if model.rstrip("/").endswith(".zarr"):
        return answerers(model, task), None
    path = Path(model)
    if not is_run(path):
        raise UserError(
            f"{model} is neither a run nor a cache: --task {task} measures a run trained on it, or the "
            "embeddings of a CACHE.zarr as they are"
        )
    return [run_answerer(path, task, data)], path
