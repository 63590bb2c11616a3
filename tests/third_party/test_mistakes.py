"""Mistakes in a stranger's package end in one line that names the stranger's object, with exit code 2."""

import dataclasses
import functools
import json
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from small import contained, make_folder
from torch import nn
from visitor import recipes, students, teachers

from evaluation.models.encoder import of_teacher
from evaluation.results.run import measure
from evaluation.tasks import registry as tasks
from evaluation.tasks.task import Kind, Selection, Task
from student.cli import main as student
from student.inputs.hints import free_path
from student.models.run_file import weights_of
from student.recipe import Progress
from student.recipes.registry import find as find_recipe
from student.training.prepare import check_spec
from student.training.step import TrainStep, call_loss
from teachercache.cli import main as tc
from teachercache.core import installed
from teachercache.core.errors import UserError, is_ours
from teachercache.data.views import check_view
from teachercache.teachers.clip.towers import image_tower
from teachercache.teachers.teacher import Entry

ROWS = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("mistakes") / "pairs", ROWS)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of a stranger."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def error_of(capsys: pytest.CaptureFixture, command, *words: object) -> str:
    """The error line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert command([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


BOTH = ("grid", "color")
encode_grid = functools.partial(teachers.encode_grid, outputs=BOTH)


def grid_entry(encode=encode_grid, **changes: object) -> Entry:
    """The visitors' teacher of pictures with another `encode` or other members."""

    def load(name, *, weights, outputs):
        teacher = teachers.load_grid(name, weights=weights, outputs=BOTH)
        return dataclasses.replace(teacher, encode=encode, **changes)

    return Entry("mistaken", load, BOTH, default=2)


def without_color(module, inputs):
    return {"grid": module(inputs["image"])}


def raising(module, inputs):
    raise RuntimeError("no such layer")


def changed(change):
    def encode(module, inputs):
        return change(encode_grid(module, inputs))

    return encode


# ----------------------------------------------------------------------------------------------------
# Teachers


@pytest.mark.parametrize(
    ("encode", "words"),
    [
        (without_color, "encode left out color of the inputs image"),
        (raising, "encode raised RuntimeError: no such layer"),
        (changed(lambda fields: fields | {"color": fields["color"][:, :2]}), "color with the shape [6, 2]"),
        (changed(lambda fields: fields | {"color": fields["color"][:4]}), "color with the shape [4, 3]"),
        (changed(lambda fields: fields | {"color": fields["color"].numpy()}), "a ndarray as color"),
        (changed(lambda fields: fields | {"edges": fields["color"]}), "'edges', which is none of its fields"),
        (changed(lambda fields: fields["color"]), "returned a Tensor: return a dict"),
    ],
)
def test_encode(pairs, mine, tmp_path, capsys, encode, words):
    mine.BAD = grid_entry(encode)
    out = tmp_path / "c.zarr"
    error = error_of(capsys, tc, "build", "--teacher", "mine:BAD", "--data", pairs, "--out", out)
    assert error.startswith("error: teacher mine:BAD: encode ")
    assert words in error


def test_debug_shows_where_encode_failed(pairs, mine, tmp_path, capsys):
    mine.BAD = grid_entry(raising)
    words = ["build", "--teacher", "mine:BAD", "--data", pairs, "--out", tmp_path / "c.zarr", "--debug"]
    assert tc([*map(str, words)]) == 2
    assert "in raising" in capsys.readouterr().err


def test_verify_misses_a_field_that_encode_leaves_out(pairs, mine, tmp_path, capsys):
    mine.GRID = grid_entry()
    out = tmp_path / "c.zarr"
    assert tc(["build", "--teacher", "mine:GRID", "--data", str(pairs), "--out", str(out)]) == 0
    mine.GRID = grid_entry(without_color)
    assert "left out color" in error_of(capsys, tc, "verify", out, "--teacher", "mine:GRID")


def test_load(pairs, mine, tmp_path, capsys):
    mine.BAD = Entry("no weights", lambda name, outputs: None)
    words = ["build", "--teacher", "mine:BAD", "--data", pairs, "--out", tmp_path / "c.zarr"]
    assert "teacher mine:BAD: load(name, *, weights, outputs) raised TypeError" in error_of(
        capsys, tc, *words
    )
    mine.BAD = Entry("nothing", lambda name, *, weights, outputs: None)
    assert "load returned a NoneType" in error_of(capsys, tc, *words)


def test_an_error_of_the_machine_stays_one(pairs, mine, tmp_path, capsys):
    def full(module, inputs):
        raise RuntimeError("CUDA out of memory")

    mine.BAD = grid_entry(full)
    words = ["build", "--teacher", "mine:BAD", "--data", str(pairs), "--out", str(tmp_path / "c.zarr")]
    assert tc(words) == 75
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pixels: pixels[0], "float32 [16, 16]: return float32 [3, 16, 16]"),
        (lambda pixels: (pixels * 255).byte(), "uint8 [3, 16, 16]: return float32"),
        (lambda pixels: pixels.numpy(), "a ndarray: return float32"),
    ],
)
def test_view(pairs, mine, tmp_path, capsys, change, words):
    mine.BAD = grid_entry(view=lambda picture: change(teachers.image_view(teachers.VIEW)(picture)))
    error = error_of(
        capsys, tc, "build", "--teacher", "mine:BAD", "--data", pairs, "--out", tmp_path / "c.zarr"
    )
    assert words in error
    assert "<lambda> returned" in error


def test_a_view_of_a_student_may_have_any_size():
    assert check_view(torch.zeros(3, 5, 7), None, "a").shape == (3, 5, 7)
    with pytest.raises(UserError, match=r"a returned float32 \[5, 7\]: return float32 \[3, height, width\]"):
        check_view(torch.zeros(5, 7), None, "a")


def test_augmented_views_and_tasks_need_a_description(pairs, mine, tmp_path, capsys):
    bare = {"size": teachers.VIEW["size"]}
    grid = teachers.load_grid("g", weights="pretrained", outputs=BOTH).spec
    mine.BAD = grid_entry(spec=dataclasses.replace(grid, view=bare))
    words = [
        "build",
        "--teacher",
        "mine:BAD",
        "--data",
        pairs,
        "--out",
        tmp_path / "c.zarr",
        "--views",
        2,
    ]
    assert "--views 2: the teacher's spec lacks mean, std in `view`" in error_of(capsys, tc, *words)
    teacher = teachers.load_pairs("p", weights="pretrained", outputs=("pairs",))
    teacher = dataclasses.replace(teacher, spec=dataclasses.replace(teacher.spec, view=bare))
    with pytest.raises(UserError, match="p cannot be measured: the teacher's spec lacks mean, std"):
        of_teacher(teacher)


def test_a_module_without_image_tower_is_asked_for_no_attribute():
    assert image_tower(teachers.Affinity()) is None


def test_info_suggests_a_verify_that_finds_the_teacher(pairs, mine, tmp_path, capsys):
    mine.GRID = grid_entry()
    out = str(tmp_path / "c.zarr")
    assert tc(["build", "--teacher", "mine:GRID", "--data", str(pairs), "--out", out]) == 0
    capsys.readouterr()
    assert tc(["info", out]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: tc ")]
    assert line == f"next: tc verify {out} --teacher mine:GRID"
    assert tc(line.removeprefix("next: tc ").split()) == 0


# ----------------------------------------------------------------------------------------------------
# Entry points


def points(*values: str, group: str) -> dict[str, EntryPoint]:
    return {name: EntryPoint(name, value, group) for name, value in (text.split("=") for text in values)}


@pytest.mark.parametrize(
    ("command", "group"),
    [
        (lambda: tc(["build", "--teacher", "lost"]), "teachercache.teachers"),
        (lambda: student(["train", "--recipe", "lost"]), "student.recipes"),
        (lambda: student(["eval", "none", "--task", "lost"]), "evaluation.tasks"),
    ],
)
def test_an_entry_point_of_a_missing_module(monkeypatch, capsys, command, group):
    monkeypatch.setattr(
        installed, "entry_points", lambda group: [EntryPoint("lost", "no_such_module:X", group)]
    )
    assert command() == 2
    assert f"the entry point 'lost = no_such_module:X' of {group}" in capsys.readouterr().err


def test_recipes_of_installed_packages_are_choices():
    with pytest.raises(
        UserError, match=r"did you mean 'visitor_pairs'\? choose from clip, .*visitor_questions"
    ):
        find_recipe("visitor_pair")


def test_the_short_name_and_the_selection_of_an_installed_task(mine, monkeypatch):
    mine.TASK = Task(
        name="spread",
        kind=Kind.ENCODER,
        function=lambda encoder, manifest: {"spread": 1.0},
        doc="a toy",
        short="spr",
        headline=("spread",),
        selection=Selection(lambda manifest: [True] * len(manifest), "text"),
    )
    both = points("spread=mine:TASK", "broken=no_such_module:X", group="evaluation.tasks")
    monkeypatch.setattr(tasks, "installed", lambda: both)
    assert tasks.find("spr") is mine.TASK
    with pytest.raises(UserError, match="did you mean 'spr'"):
        tasks.find("sprr")
    with pytest.raises(UserError, match=r"has no `selection`: .*choose from zeroshot, retrieval, spr"):
        tasks.selection_of(dataclasses.replace(mine.TASK, selection=None))


def test_the_function_of_a_task(pairs):
    def broken(encoder, manifest):
        raise IndexError("no row 7")

    task = Task(name="spread", kind=Kind.ENCODER, function=broken, doc="a toy", headline=("spread",))
    with pytest.raises(UserError, match="task spread: function raised IndexError: no row 7"):
        list(measure(task, [object()], str(pairs)))
    assert is_ours(functools.partial(tasks.TASKS["glue"].function, lr=1.0))
    assert not is_ours(functools.partial(broken))


# ----------------------------------------------------------------------------------------------------
# Recipes and students


def loss_result(result, **changes):
    recipe = dataclasses.replace(
        recipes.PAIRS, name="bad", loss=lambda outputs, fields, constants, progress: result(outputs, fields)
    )
    outputs = {"image": torch.ones(4, 2)}
    return call_loss(recipe, outputs, {"affinity": torch.ones(4, 3)}, Progress(0, 1))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda outputs, fields: ({"a": outputs["image"].mean(1)}, {}), r"the term a has the shape \[4\]"),
        (lambda outputs, fields: {"a": outputs["image"].mean()}, "returned a dict: return a tuple"),
        (lambda outputs, fields: ({"a": 1.0}, {}), "a float as a"),
        (
            lambda outputs, fields: ({"a": fields["label"].mean()}, {}),
            "reads 'label'; the outputs are image, the loss fields affinity: add an entry of the batch to .*loss_fields",
        ),
        (lambda outputs, fields: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_loss(result, words):
    with pytest.raises(UserError, match=f"recipe bad: loss.*{words}"):
        loss_result(result)


def test_an_exception_of_our_own_recipe_stays_a_fault_of_ours():
    from student.recipes.clip import CLIP

    with pytest.raises(KeyError):
        call_loss(CLIP, {}, {}, Progress(0, 1))


class Extra(students.Two):
    """A student whose output `extra` has three entries."""

    def forward(self, batch):
        return super().forward(batch) | {"extra": torch.zeros(3)}


def test_an_output_has_one_entry_per_row():
    step = TrainStep(recipes.PAIRS, Extra(4), None)
    batch = {
        "image": torch.zeros(8, 3, 8, 8),
        "text": torch.zeros(8, 12, dtype=torch.int64),
        "mask_noise": torch.zeros(8, 1),
    }
    with pytest.raises(UserError, match=r"Extra: forward returned extra with the shape \[3\] for 8 rows"):
        step.outputs(batch)


class Scalar(students.Two):
    """A student with a parameter that has no dimensions."""

    def __init__(self, width: int):
        super().__init__(width)
        self._bias = nn.Parameter(torch.tensor(0.5))


class Unregistered(students.Two):
    """A student of a family that no entry point names."""

    @property
    def spec(self):
        return dataclasses.replace(super().spec, family="nowhere")


@pytest.fixture(scope="module")
def cache(pairs: Path) -> Path:
    out = pairs.parent / "pairs.zarr"
    assert tc(["build", "--teacher", "visitor-pairs", "--data", str(pairs), "--out", str(out)]) == 0
    return out


def train_words(pairs: Path, cache: Path, *words: object) -> list[str]:
    fixed = ["train", "--recipe", "mine:RECIPE", "--data", pairs, "--cache", cache, "--batch-size", 2]
    return [*map(str, (*fixed, *words))]


def test_a_parameter_without_dimensions(pairs, cache, mine, tmp_path, capsys):
    mine.RECIPE = dataclasses.replace(recipes.PAIRS, student=lambda constants, setting: Scalar(4))
    with contained():
        error = error_of(capsys, student, *train_words(pairs, cache, "--out", tmp_path / "run"))
    assert "the parameter student._bias has no dimensions" in error
    assert not (tmp_path / "run").exists()


def test_a_family_that_is_not_installed_is_told_before_the_first_step(pairs, cache, mine, tmp_path, capsys):
    mine.RECIPE = dataclasses.replace(recipes.PAIRS, student=lambda constants, setting: Unregistered(6))
    with contained():
        assert student(train_words(pairs, cache, "--steps", 1, "--out", tmp_path / "run")) == 0
    err = capsys.readouterr().err
    assert "WARNING: the run trains, but student eval and export will not load it" in err
    assert err.index("of the family nowhere") < err.index("student of ")


def test_a_student_that_cannot_be_built_and_a_config_that_is_no_json(pairs, cache, mine, tmp_path, capsys):
    def broken(constants, setting):
        raise ZeroDivisionError("no width")

    mine.RECIPE = dataclasses.replace(recipes.PAIRS, student=broken)
    with contained():
        error = error_of(capsys, student, *train_words(pairs, cache, "--out", tmp_path / "run"))
    assert "recipe visitor_pairs: student raised ZeroDivisionError: no width" in error
    spec = students.Two(4).spec
    with pytest.raises(UserError, match=r"config\['weight'\] is a Tensor: run.json holds JSON types"):
        check_spec(dataclasses.replace(spec, config={"width": 4, "weight": torch.ones(1)}))


def test_constants_that_are_not_frozen(mine):
    @dataclasses.dataclass
    class Loose:
        width: int = 4

    mine.RECIPE = dataclasses.replace(recipes.PAIRS, constants=Loose())
    with pytest.raises(UserError, match=r"its constants are a Loose: make it a dataclass with .*frozen=True"):
        find_recipe("mine:RECIPE")


def test_the_command_for_an_unfinished_run_of_a_recipe_by_path(tmp_path):
    for recipe, words in (
        ("mine_siglip", "--config {0}/run.json --recipe PACKAGE.MODULE:RECIPE --resume"),
        ("clip_kd", "--recipe clip_kd --resume --out {0}"),
        ("visitor_pairs", "--recipe visitor_pairs --resume --out {0}"),
    ):
        folder = tmp_path / recipe
        folder.mkdir()
        record = {"format": 2, "student": {"family": "two_tower"}, "recipe": {"name": recipe}}
        (folder / "run.json").write_text(json.dumps(record))
        with pytest.raises(UserError) as error:
            weights_of(folder)
        assert f"go on with `student train {words.format(folder)}`" in str(error.value)


def test_a_cache_with_other_outputs_is_not_written_over(pairs, mine, tmp_path, capsys):
    out = tmp_path / "caches" / "visitor-pairs.zarr"
    grid = ["build", "--teacher", "visitor-grid", "--data", str(pairs), "--out", str(out)]
    assert tc(grid) == 0
    mine.RECIPE = recipes.PAIRS
    error = error_of(capsys, student, *train_words(pairs, out, "--out", tmp_path / "run"))
    assert f"--out {tmp_path}/caches/visitor-pairs-2.zarr` and pass that as --cache" in error
    command = error.partition("run `tc ")[2].partition("`")[0]
    assert tc(command.split()) == 0
    assert free_path(out).name == "visitor-pairs-3.zarr"
