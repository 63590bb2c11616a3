"""Evaluate a student during training, and keep the best one in <run>/best.

That folder is itself a run that `student eval` and `student export` accept.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from student.contract import Student
from student.distributed import on_first_rank
from student.models.run_file import WEIGHTS, write_tensors
from student.training.checkpoint import save_student
from student.training.engine import random_state, set_random_state
from student.training.telemetry.metrics import Metrics, read_metrics
from teachercache.core.digests import NAME, damage_of, write_proved
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

    def copy() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in (*RUN_FILES, *student.spec.files):
            if (run / name).exists():
                shutil.copy(run / name, folder)

    on_first_rank(copy)
    save_student(student, folder)
    on_first_rank(lambda: _compare(run, step, evaluate))


def is_evaluated(run: Path, step: int) -> bool:
    """Return whether evals.jsonl has a line of a step, that is, whether its evaluation ended well."""
    return any(line["step"] == step for line in read_metrics(run / "evals.jsonl"))


def _compare(run: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate the candidate, keep it if it is better, and append its metrics to evals.jsonl."""
    folder, best = run / "candidate", run / "best"
    state = random_state()
    try:
        score, metrics = evaluate(folder)
    finally:
        set_random_state(state)  # also for the checkpoint that is saved if the evaluation fails
    highest = best_score(run)
    if highest is None or score > highest:
        highest = score
        best.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in (WEIGHTS, NAME):
                write_proved(best / path.name, best, path.read_text())
        facts = {"step": str(step), "score": repr(score), "metrics": json.dumps(metrics)}
        write_tensors(load_file(folder / WEIGHTS), best / WEIGHTS, best, facts)
    # Last: without this line, a resume evaluates the step again
    Metrics(run / "evals.jsonl", start=step).write({"step": step, "score": score, **metrics})
    shutil.rmtree(folder)
    summary = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    say(f"step {step}: {summary}; best so far {highest:.4f}")


def best_score(run: Path) -> float | None:
    """Return the score of <run>/best, stored in the metadata of its weights; None without one or if it is damaged."""
    best = run / "best"
    path = best / WEIGHTS
    if not path.exists():
        return None
    try:
        if not damage_of(best, WEIGHTS):
            with safe_open(path, "pt") as file:
                return float(file.metadata()["score"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    say(f"WARNING: {path} is damaged: the student of this evaluation replaces it")
    return None
