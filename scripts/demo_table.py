"""Compare clip_kd with clip on the demo data in a table: the same student, steps and seeds, and the teacher.

    python -m scripts.demo_table --seeds 0               as in scripts/demo
    python -m scripts.demo_table --seeds 0 1 2 --write   means over seeds, written to README.md and LOG.md

Existing runs and evaluations are reused. One process per core trains and evaluates a model, which is faster than all cores
for one of these small models.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from student.training.telemetry.metrics import read_metrics
from teachercache.core.progress import say, ticker

RECIPES = ("clip", "clip_kd")
TASKS = ("zeroshot_classification", "zeroshot_retrieval")
STEPS, BATCH = 220, 128
CACHE = "caches/demo/clip-lite.zarr"  # explicit, because other caches of the data may exist
SETTINGS = ("model=vit-demo", "optim.lr=1e-3", "run.save_every=100", "run.workers=0")
TEACHER = Path("runs/demo/clip-lite")
ROWS = {
    "zero-shot top-1": "acc1",
    "text->image R@1": "image_retrieval_recall@1",
    "text->image R@5": "image_retrieval_recall@5",
    "text->image R@10": "image_retrieval_recall@10",
    "image->text R@1": "text_retrieval_recall@1",
    "image->text R@5": "text_retrieval_recall@5",
    "image->text R@10": "text_retrieval_recall@10",
}
BEGIN, END = "<!-- demo table: scripts/demo_table.py -->", "<!-- end of demo table -->"


def main() -> None:
    """Train and evaluate the missing runs, print the table, and write it if requested."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md and LOG.md")
    options = parser.parse_args()
    text = show_table(options.seeds)
    if options.write:
        for name in ("README.md", "LOG.md"):
            replace_table(Path(name), text)


def show_table(seeds: Sequence[int]) -> str:
    """Train and evaluate the missing runs, and print and return the table."""
    runs = {recipe: [folder(recipe, seed) for seed in seeds] for recipe in RECIPES}
    make_missing([TEACHER, *(run for of_recipe in runs.values() for run in of_recipe)])
    text = table(results(TEACHER), {recipe: [results(run) for run in runs[recipe]] for recipe in RECIPES})
    print(text)
    return text


def folder(recipe: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path("runs/demo", f"{recipe}-seed{seed}")


def train_argv(run: Path) -> list[str]:
    """Return the arguments of `student train` for a run."""
    recipe, _, seed = run.name.rpartition("-seed")
    argv = ["train", "--recipe", recipe, "--seed", seed, "--data", "data/demo", "--cache", CACHE]
    argv += ["--steps", str(STEPS), "--batch-size", str(BATCH)]
    argv += [word for setting in SETTINGS for word in ("--set", setting)]
    return [*argv, "--out", str(run), "--resume", "auto"]


def results(model: Path) -> dict[str, float]:
    """Return the metrics of both tasks from their result files."""
    return {
        name: value
        for task in TASKS
        for name, value in json.loads(result_file(model, task).read_text())["metrics"].items()
    }


def result_file(model: Path, task: str) -> Path:
    """Return where the result of a task is kept."""
    return model / "eval" / f"demo_{task}.json"


def is_done(model: Path) -> bool:
    """Return whether a model is trained with the settings of this script, and measured.

    Raises:
        SystemExit: The run has other settings.
    """
    if model != TEACHER and (model / "run.json").exists():
        recorded = json.loads((model / "run.json").read_text())["recipe"]
        if (recorded["steps"], recorded["batch"]) != (STEPS, BATCH):
            sys.exit(f"error: {model} is a run with other settings: remove it")
    return all(result_file(model, task).exists() for task in TASKS)


def make_missing(models: Sequence[Path]) -> None:
    """Train and evaluate what is missing, in one process per core."""
    missing = [model for model in models if not is_done(model)]
    if not missing:
        return
    runs = [model for model in missing if model != TEACHER]
    for run in runs:
        say("$ student", *train_argv(run))
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = min(len(os.sched_getaffinity(0)), len(missing))
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, fresh, initializer=end_with, initargs=(os.getpid(),)) as pool:
        # The students first: the teacher, which is measured only, fills the core that is free first
        waiting = {pool.submit(make_one, model): model for model in [*runs, *set(missing) - set(runs)]}
        try:
            watch(waiting, runs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def watch(waiting: dict[Future[str], Path], runs: Sequence[Path]) -> None:
    """Show the steps of all runs until they are finished; exit with the error of one that fails."""
    with ticker(len(runs) * STEPS, "steps", "students") as tick:
        while not all(task.done() for task in waiting):
            time.sleep(0.5)
            tick.step(sum(steps_of(run) for run in runs) - tick.done)
    for task, model in waiting.items():
        if error := task.result():
            sys.exit(f"error: {model}: {error}")


def steps_of(run: Path) -> int:
    """Return how many steps a run has taken."""
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] + 1 if lines else 0


def make_one(model: Path) -> str:
    """Train a model if it is a run, evaluate it, and return the last line of an error or an empty string."""
    from student.cli import main as student

    with contextlib.redirect_stderr(io.StringIO()) as errors:
        if model != TEACHER and not (model / "model.safetensors").exists() and student(train_argv(model)):
            return (errors.getvalue().strip().splitlines() or ["?"])[-1]
        name = model.name if model == TEACHER else str(model)
        for task in TASKS:
            path = result_file(model, task)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                if not path.exists() and student(["eval", name, "--task", task, "--json"]):
                    return (errors.getvalue().strip().splitlines() or ["?"])[-1]
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(json.loads(output.getvalue())["results"][0]))
    return ""


def end_with(parent: int) -> None:
    """End this process soon after its parent was killed: it would hold the lock of its run."""

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=poll, daemon=True).start()


def table(teacher: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown with a row per metric: the mean and, for several seeds, the range."""
    seeds = len(next(iter(runs.values())))
    header = ["", *(f"student, `{recipe}`" for recipe in runs), "teacher clip-lite"]
    lines = [header, ["---"] * len(header)]
    for title, name in ROWS.items():
        cells = [cell([metrics[name] for metrics in seed_runs]) for seed_runs in runs.values()]
        lines.append([title, *cells, cell([teacher[name]]) if name in teacher else "-"])
    note = f"{STEPS} steps of {BATCH}, {seeds} seed{'s: mean (lowest to highest)' if seeds > 1 else ''}"
    note += f"; {teacher['num_images']} held-out pictures, {teacher['num_texts']} texts, {teacher['num_classes']} classes"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}."


def cell(values: list[float]) -> str:
    """Format the mean of values and, if there are several, their range."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def replace_table(path: Path, text: str) -> None:
    """Replace the table between its two marks in a file."""
    content = path.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(content):
        sys.exit(f"error: {path} has no marks for the table: add the lines {BEGIN} and {END}")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", content))


if __name__ == "__main__":
    main()
