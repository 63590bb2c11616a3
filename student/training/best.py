"""Evaluate a student during training, and keep the best one in <run>/best.

That folder is itself a run that `student eval` and `student export` accept.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from student.contract import Student
from student.distributed import any_rank
from student.models.run_file import write_tensors
from student.training.accumulate import random_state, set_random_state
from student.training.checkpoint import save_student
from student.training.telemetry.metrics import Metrics
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank
from teachercache.core.progress import say

RUN_FILES = ("run.json", "tokenizer.json")  # besides the files that the student itself names
Evaluate = Callable[[Path], tuple[float, dict[str, float]]]  # run folder -> score, metrics


def keep_best(student: Student, run: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate the current student, and save it as <run>/best if its score is higher than all before.

    The student is written first and evaluated from its file, so that the score belongs to the file. Ties keep
    the older student. The random state of training is restored.

    Args:
        student: The student in training.
        run: The run folder.
        step: Number of steps taken.
        evaluate: Returns score and metrics of a run folder.
    """
    folder = run / "candidate"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        for name in (*RUN_FILES, *student.spec.files):
            if (run / name).exists():
                shutil.copy(run / name, folder)
    save_student(student, folder / "model.safetensors")
    failure: Exception | None = None
    if rank() == 0:
        try:
            _compare(run, step, evaluate)
        except Exception as error:  # the other ranks wait in any_rank, so that all of them stop
            failure = error
    if any_rank(failure is not None):
        raise failure or UserError("the evaluation failed in the first process")


def _compare(run: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate the candidate, append its metrics to evals.jsonl, and keep it if it is better."""
    folder, best = run / "candidate", run / "best"
    state = random_state()
    score, metrics = evaluate(folder)
    set_random_state(state)
    Metrics(run / "evals.jsonl", start=step).write({"step": step, "score": score, **metrics})
    highest = best_score(run)
    if highest is None or score > highest:
        best.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name != "model.safetensors":
                write_whole(best / path.name, path.read_text())
        facts = {"step": str(step), "score": repr(score), "metrics": json.dumps(metrics)}
        write_tensors(load_file(folder / "model.safetensors"), best / "model.safetensors", facts)
    shutil.rmtree(folder)
    summary = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    say(f"step {step}: {summary}; best so far {best_score(run):.4f}")


def best_score(run: Path) -> float | None:
    """Return the score of <run>/best, stored in the metadata of its weights, or None without one."""
    path = run / "best" / "model.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return float(file.metadata()["score"])
