"""A trained task student as a function from rows to scores, what `student eval` measures. Knows no metrics."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from student.inputs.caches import open_source
from student.inputs.question_batches import TaskBatches
from student.inputs.questions import Task, read_question
from student.models.clip_baselines import Adapter, TunedClip
from student.models.single_stream.model import rebuild
from student.models.single_stream.tokenizer import load_tokenizer
from student.models.two_tower.model import TwoTower
from student.recipe import Run
from student.training.prepare_questions import find_task_caches
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.read import cache_folder
from teachercache.teachers.clip.loading import build_module, tokenizer_of

ROWS = 64  # at a time


class TaskModel(NamedTuple):
    """A run on questions: its task, and the function that scores rows."""

    task: Task
    student: Any
    score: Callable[[Manifest, np.ndarray, str], np.ndarray | None]  # None: it was not made for that


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a TaskBatches asks of a recipe's constants when nothing is distilled."""

    max_text: int
    stage: str = "task"


def is_task_run(run: Path) -> bool:
    """Whether a run folder holds a student of questions."""
    made = json.loads((run / "run.json").read_text()).get("student") or {}
    return "task" in made


def load_task_model(run: Path, *, device: str, cache: str = "") -> TaskModel:
    """The student of a run folder, from that folder alone; its regions come from the cache of what it is asked."""
    made = json.loads((run / "run.json").read_text())["student"]
    if not (run / "model.safetensors").exists():
        raise UserError(f"{run} is not a finished run: go on with `student train --resume --out {run}`")
    task = Task(**{**made["task"], "answers": tuple(made["task"]["answers"])})
    student: Any = _baseline(made) if "adapter" in made else rebuild(made)
    if not hasattr(student, "answer") and "adapter" not in made:
        raise UserError(
            f"{run} is a stage=adapt run without answers: train on with `--set init={run}`, then evaluate"
        )
    student.load_state_dict(load_file(run / "model.safetensors"))
    student = student.to(device).eval()
    tokenizer = load_tokenizer(run)

    def score(manifest: Manifest, rows: np.ndarray, which: str) -> np.ndarray | None:
        if which != task.which:
            return None
        parts = batches_of(task, student, tokenizer, manifest, rows, made["max_text"], cache)
        with torch.inference_mode():
            found = [
                student({name: value.to(device) for name, value in part.items()})["logits"] for part in parts
            ]
        return torch.cat(found).float().cpu().numpy()

    return TaskModel(task, student, score)


def _baseline(made: dict[str, Any]) -> Any:
    """An adapter, or a CLIP tuned as a whole."""
    shape = made["adapter"]
    sizes = {"inputs": shape["inputs"], "classes": shape["classes"]}
    if "tuned" not in made:
        return Adapter(shape["kind"], shape["fusion"], tuple(shape["widths"]), **sizes)
    cfg = made["tuned"]["model_cfg"]
    model, preprocess = build_module(cfg, made["tuned"]["preprocess"])
    return TunedClip(TwoTower(model, cfg, preprocess, tokenizer_of(cfg)), **sizes)


def batches_of(
    task: Task, student: Any, tokenizer: Any, manifest: Manifest, rows: np.ndarray, max_text: int, cache: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Rows as the student reads them, some at a time; UserError names the `tc build` of a cache that is missing."""
    fields = tuple(name for name in student.inputs if name not in ("text", "image", "pair_text"))
    run = Run(data=manifest.data, cache=cache or str(cache_folder(manifest.data)), out="")
    sources = [
        open_source(cache, manifest, rows, tuple(name for name in fields if name in cache.fields))
        for cache in find_task_caches(run, fields)
    ]
    for source in sources:
        if (source.at[rows] < 0).any():
            raise UserError(
                f"{(source.at[rows] < 0).sum()} rows of {manifest.data} are not in the cache: extend it"
            )
    reader = TaskBatches(
        manifest,
        task,
        sources=sources,
        order=None,
        labelled=np.empty(0),
        tokenizer=tokenizer,
        constants=Reading(max_text),
        student=student,
        steps=0,
        seed=0,
    )
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        yield reader.read(part, [read_question(task, manifest.row(row)) for row in part.tolist()])


def run_answerer(run: Path, task: str, data: str):
    """An Answerer for a run that was trained on a task."""
    from evaluation.models.answerer import Answerer
    from teachercache.core.device import pick_device

    if not is_task_run(run):
        raise UserError(
            f"{run} was not trained to answer: pass a run of clip_td, or a CACHE.zarr for zero-shot"
        )
    trained = json.loads((run / "run.json").read_text())["run"]
    cache = trained["cache"] if trained["data"] == data else ""  # of other data: caches/<data>
    model = load_task_model(run, device=pick_device(), cache=cache)
    if model.task.name != task:
        raise UserError(
            f"{run} was trained on {model.task.name}: pass --task {model.task.name} and its --data"
        )
    return Answerer(run.name, str(run), task, model.score, model.task.answers)


def find_answerers(model: str, task: str, data: str):
    """How a cache or a run answers a task, each way as a model of its own; and the folder where results are kept."""
    if model.rstrip("/").endswith(".zarr"):
        from evaluation.models.cache_answerer import answerers

        return answerers(model, task), None
    path = Path(model)
    if not (path / "run.json").exists():
        raise UserError(
            f"{model} is neither a run nor a cache: --task {task} measures a run trained on it, or the "
            "embeddings of a CACHE.zarr as they are"
        )
    return [run_answerer(path, task, data)], path
