"""Evaluation while a run goes on, and the best student so far in <run>/best, itself a run that eval and export take."""

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

WITH_IT = ("run.json", "tokenizer.json")  # what a student needs besides its weights
Evaluate = Callable[[Path], tuple[float, dict[str, float]]]  # a run folder -> score, metrics


def keep_best(student: Student, run: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate the student as it is after `step` steps; it becomes <run>/best where its score beats all before.

    What is evaluated is what was written, so that the file is what the score says; ties keep the older one. Random
    numbers of the training go on as if nothing had been.
    """
    folder = run / "candidate"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        for name in WITH_IT:
            if (run / name).exists():
                shutil.copy(run / name, folder)
    save_student(student, folder / "model.safetensors")
    failed = None
    if rank() == 0:
        try:
            _compare(run, step, evaluate)
        except Exception as error:  # the others wait: all of them leave, or none
            failed = error
    if any_rank(failed is not None):
        raise failed or UserError("the evaluation failed in the first process")


def _compare(run: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate the candidate, write what was found, and keep it where it is better."""
    folder, best = run / "candidate", run / "best"
    before = random_state()
    score, metrics = evaluate(folder)
    set_random_state(before)
    Metrics(run / "evals.jsonl", start=step).write({"step": step, "score": score, **metrics})
    highest = best_score(run)
    if highest is None or score > highest:
        best.mkdir(exist_ok=True)
        for name in WITH_IT:
            if (run / name).exists():
                write_whole(best / name, (run / name).read_text())
        facts = {"step": str(step), "score": repr(score), "metrics": json.dumps(metrics)}
        write_tensors(load_file(folder / "model.safetensors"), best / "model.safetensors", facts)
    shutil.rmtree(folder)
    found = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    say(f"step {step}: {found}; best so far {best_score(run):.4f}")


def best_score(run: Path) -> float | None:
    """The score of <run>/best, which lies in its weights' file."""
    path = run / "best" / "model.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return float(file.metadata()["score"])
