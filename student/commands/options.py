"""Options that several commands of `student` share, and what a shell completes behind them."""

from collections.abc import Iterable
from pathlib import Path

from teachercache.commands.options import paths_of, teacher_names
from teachercache.core.command import place
from teachercache.core.paths import local_path

run_path = paths_of("runs/*", marker="run.json")


def local(text: str | Path) -> Path:
    """Return the path of an option that writes files; click reports a URL as a wrong value."""
    return local_path(place(str(text)), "the path")


def recipe_names() -> Iterable[str]:
    """Return the names of our recipes and of installed ones."""
    from student.recipes.registry import RECIPES, installed

    return [*RECIPES, *installed()]


def task_names() -> Iterable[str]:
    """Return what --task takes."""
    from evaluation.tasks.registry import SHORT, TASKS, installed

    return [*SHORT, *TASKS, *installed(), "all"]


def model_names() -> Iterable[str]:
    """Return the runs and exports of the current folder, and the names of teachers."""
    folders = (path for pattern in ("runs/*", "exports/*") for path in sorted(Path().glob(pattern)))
    return [*(str(path) for path in folders if path.is_dir()), *teacher_names()]
