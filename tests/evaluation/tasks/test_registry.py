"""Names of tasks: ours, installed ones, options behind a name, and what a stranger may read from the table."""

import subprocess
import sys

import pytest
from own_encoder import ENCODER

from evaluation.results.run import MEASURES, headline, measure, scorer
from evaluation.tasks.registry import SHORT, TASKS, find, installed
from evaluation.tasks.task import Kind
from student.cli import main
from teachercache.core.errors import UserError

MODULE = """
from evaluation.tasks.task import Kind, Option, Task

def count(encoder, manifest, most=100):
    return {"rows": float(min(len(manifest), most))}

TASK = Task(
    name="count", kind=Kind.ENCODER, function=count, doc="Counts rows.", options={"most": Option(int)},
    headline=("rows",),
)
"""


@pytest.fixture
def installed_task(tmp_path, monkeypatch):
    """A package with a task, installed as pip would: a module and a dist-info with an entry point."""
    (tmp_path / "counting_tasks.py").write_text(MODULE)
    info = tmp_path / "counting_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evaluation.tasks]\ncount = counting_tasks:TASK\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "count"
    sys.modules.pop("counting_tasks", None)


def test_every_kind_of_model_has_a_task_and_a_way_to_be_measured():
    assert {task.kind for task in TASKS.values()} == set(Kind) == set(MEASURES)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_describes_itself(name):
    task = TASKS[name]
    assert task.name == name
    assert task.doc.endswith(".")
    assert task.columns
    assert find(name) is task
    assert (task.selection is None) or task.headline


def test_short_names_are_the_tasks():
    assert {find(short).name for short in SHORT} == set(SHORT.values())


def test_an_installed_task_is_found_by_its_name_and_loaded_then(installed_task, squares):
    assert installed_task in installed()
    assert "counting_tasks" not in sys.modules
    (result,) = measure(find("count:most=3"), [ENCODER], str(squares))
    assert (result["task"], result["metrics"]) == ("count:most=3", {"rows": 3.0})


def test_an_installed_task_on_the_command_line(installed_task, squares, teacher_folder, capsys):
    assert main(["eval", str(teacher_folder), "--task", "count", "--data", str(squares)]) == 0
    assert "rows" in capsys.readouterr().out
    assert main(["eval", str(teacher_folder), "--task", "coutn", "--data", str(squares)]) == 2
    assert "did you mean 'count'" in capsys.readouterr().err


def test_a_task_by_its_import_path(installed_task):
    assert find("counting_tasks:TASK").name == "count"


@pytest.mark.parametrize(
    "name",
    [
        "count:TASK",
        "nothing:TASK",
        "evaluation.tasks.registry:TASKS",
        "retrieval:",
        "glue:epochs=0",
        "captions:masks=-1",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(UserError):
        find(name)


def test_only_tasks_with_a_selection_choose_checkpoints(squares):
    for task in TASKS.values():
        if task.selection is None:
            with pytest.raises(UserError, match="choose from zeroshot, retrieval"):
                scorer(task, str(squares))


def test_a_headline_is_the_mean_of_what_could_be_computed():
    task = TASKS["vcr"]
    assert headline(task, {"q2a": 0.5, "qa2r": 0.25}) == (0.375, {"q2a": 0.5, "qa2r": 0.25})
    assert headline(task, {"q2a": 0.5, "qa2r": "skipped: no labels"}) == (0.5, {"q2a": 0.5})
    with pytest.raises(UserError, match="no value for q2a, qa2r"):
        headline(task, {"q2a": None})


def test_the_table_of_tasks_imports_no_torch():
    code = (
        "import sys, evaluation.tasks.registry; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
