"""Recipes as values: `--set`, recipes of the user's own, terms and weights, projection heads."""

import dataclasses
import json
import textwrap
from pathlib import Path

import pytest
import torch
from small import train_here

import student.recipe
import student.training.loop
from student import losses
from student.cli import main
from student.models.heads import TeacherSpace
from student.models.two_tower.loading import build_two_tower
from student.recipe import Optim, Progress, Recipe, Run
from student.recipes.clip import CLIP
from student.recipes.clip_kd import CLIP_KD
from student.recipes.registry import RECIPES, find
from student.settings import override
from student.training.step import TrainStep
from teachercache.core.errors import UserError

RUN = Run(data="d", cache="c", out="o")
NOW = Progress(0, 1)


# ----------------------------------------------------------------------------------------------------
# --set


def test_override_sets_constants_optim_and_run():
    settings = [
        "fd=10",
        "crd=.5",
        "model=vit-micro",
        "optim.lr=1e-4",
        "optim.warmup=0",
        "run.zero=2",
        "run.online_teacher=true",
    ]
    recipe, run = override(CLIP_KD, RUN, settings)
    assert recipe.constants == dataclasses.replace(CLIP_KD.constants, fd=10.0, crd=0.5, model="vit-micro")
    assert type(recipe.constants.fd) is float  # an int where a float is expected is one
    assert recipe.optim == dataclasses.replace(CLIP_KD.optim, lr=1e-4, warmup=0.0)
    assert run == dataclasses.replace(RUN, zero=2, online_teacher=True)
    assert CLIP_KD.constants.fd == 2000.0  # the recipe itself is as it was


def test_the_last_of_two_settings_wins_and_text_is_taken_as_it_is():
    recipe, run = override(CLIP, RUN, ["model=a", "model=b=c", "init=", "run.out=1"])
    assert (recipe.constants.model, recipe.constants.init, run.out) == ("b=c", "", "1")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("fd", "KEY=VALUE"),
        ("fd=much", "fd=much: a value of type float"),
        ("fd=True", "type float"),
        ("fd=", "type float"),
        ("run.zero=1.5", "type int"),
        ("run.zero=__import__('os')", "type int"),
        ("run.online_teacher=1", "type bool"),
        ("run.online_teacher=maybe", "type bool"),
        ("optim.lr=[1]", "type float"),
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("ice=1", "did you mean 'icl'"),
        ("run.zeero=1", "did you mean 'run.zero'"),
        ("optimizer.lr=1", "did you mean 'optim.lr'"),
        ("a.b.c=1", "choose from task, crd, fd, icl"),
        ("steps=4", "choose from"),
    ],
)
def test_a_wrong_setting_says_what_to_type(setting, words):
    with pytest.raises(UserError) as error:
        override(CLIP_KD, RUN, [setting])
    assert words in str(error.value)
    assert str(error.value).startswith(f"--set {setting.split('=')[0]}")


def test_the_choices_name_every_setting_that_can_be_set():
    with pytest.raises(UserError) as error:
        override(CLIP_KD, RUN, ["nothing=1"])
    listed = str(error.value).rpartition("choose from ")[2].split(", ")
    for name in listed:
        group, _, field = name.rpartition(".")
        record = {"optim": Optim(), "run": RUN, "": CLIP_KD.constants}[group]
        value = getattr(record, field)
        override(CLIP_KD, RUN, [f"{name}={value}"])
    fields = {field.name for field in dataclasses.fields(CLIP_KD.constants)}
    fields |= {f"optim.{field.name}" for field in dataclasses.fields(Optim)}
    by_options = (
        "data",
        "cache",
        "out",
        "seed",
        "online_teacher",
        "micro_batch",
        "eval_every",
        "report_to",
    )  # options of `student train`
    fields |= {f"run.{field.name}" for field in dataclasses.fields(Run) if field.name not in by_options}
    assert fields == set(listed)


def test_every_setting_of_a_run_is_read_somewhere():
    """A setting that is ignored is an error or a warning, never silence."""
    package = Path(student.recipe.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.name != "recipe.py"]
    text = "\n".join(path.read_text() for path in sources)
    assert [field.name for field in dataclasses.fields(Run) if f"run.{field.name}" not in text] == []


@pytest.mark.parametrize(
    "setting", ["run.precision=fp32", "run.precision=bf16", "run.precision=float64", "run.zero=7"]
)
def test_a_value_that_would_be_ignored_is_refused(setting, squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--dry-run", "--set", setting) == 2
    assert "error: --set run." in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# Recipes by name


def test_recipes_by_name():
    assert find("clip") is CLIP
    assert find("clip_kd") is CLIP_KD
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    with pytest.raises(UserError, match="unknown recipe 'clipkd': did you mean 'clip_kd'"):
        find("clipkd")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own with a recipe, on the path."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_recipe.py").write_text(
        textwrap.dedent("""
        import dataclasses
        from student.recipes.clip_kd import CLIP_KD

        @dataclasses.dataclass(frozen=True)
        class Constants:
            depth: int = 3
            model: str = "vit-micro"
            init: str = ""

        RECIPE = dataclasses.replace(CLIP_KD, name="mine", constants=Constants(), steps=7, loss=lambda *_: ({}, {}))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_package.my_recipe:RECIPE"


def test_a_recipe_of_ones_own(own):
    recipe = find(own)
    assert isinstance(recipe, Recipe)
    assert (recipe.name, recipe.steps) == ("mine", 7)
    changed, _ = override(recipe, RUN, ["depth=5"])
    assert changed.constants.depth == 5
    with pytest.raises(UserError, match=r"no such setting of mine.*depth, model, init"):
        override(recipe, RUN, ["fd=1"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_package.my_recipe:RECIPES", "has no attribute 'RECIPES'"),
        ("my_package.nothing:RECIPE", "No module named 'my_package.nothing'"),
        ("my_package.my_recipe:Constants", "is a type, not a student.recipe.Recipe"),
        ("my_package.my_recipe", "unknown recipe"),
    ],
)
def test_a_recipe_that_is_not_there(own, name, words):
    with pytest.raises(UserError) as error:
        find(name)
    assert words in str(error.value)


def test_recipes_shows_one_of_ones_own(own, capsys):
    assert main(["recipes", own]) == 0
    assert "--set depth=3" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------
# Terms


def outputs(width: int = 6, teacher_width: int = 4, count: int = 5) -> tuple[dict, dict]:
    """What student and heads give, and what a cache gives: raw rows, not normalised."""
    torch.manual_seed(0)
    student = {name: 3 * torch.randn(count, width) for name in ("image", "text")}
    student |= {
        f"{name}_in_teacher_space": 3 * torch.randn(count, teacher_width) for name in ("image", "text")
    }
    student |= {"scale": torch.tensor(8.0), "icl_scale": torch.tensor(11.0)}
    batch = {f"{name}_emb": 5 * torch.randn(count, teacher_width) for name in ("image", "text")}
    return student, batch | {"logit_scale": torch.tensor(2.5)}


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_clip_is_clip_loss_of_unit_rows():
    student, _ = outputs()
    terms, notes = CLIP.loss(student, {}, CLIP.constants, NOW)
    expected = losses.clip_loss(unit(student["image"]), unit(student["text"]), 8.0)
    torch.testing.assert_close(terms, {"task": expected})
    assert notes["scale"] == 8


def test_clip_kd_terms_are_the_losses_called_by_hand():
    student, batch = outputs()
    V, S, V_, S_ = (
        unit(student[name]) for name in ("image", "text", "image_in_teacher_space", "text_in_teacher_space")
    )
    V_T, S_T = unit(batch["image_emb"]), unit(batch["text_emb"])
    constants = dataclasses.replace(CLIP_KD.constants, task=0.5, crd=2.0, fd=3.0, icl=0.25)
    terms, notes = CLIP_KD.loss(student, batch, constants, NOW)
    expected = {
        "task": 0.5 * losses.clip_loss(V, S, 8.0),  # the unprojected rows
        "crd": 2.0 * losses.crd_loss(V, S, 8.0, V_T, S_T, float(torch.exp(torch.tensor(2.5)))),
        "fd": 3.0 * losses.fd_loss(V_, S_, V_T, S_T),
        "icl": 0.25 * losses.icl_loss(V_, S_, V_T, S_T, 11.0),
    }
    torch.testing.assert_close(terms, expected)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert (notes["scale"], notes["icl_scale"]) == (8, 11)
    torch.testing.assert_close(notes["cos_image"], (V_ * V_T).sum(1).mean())


def test_the_weights_of_the_paper():
    constants = CLIP_KD.constants
    assert (constants.task, constants.crd, constants.fd, constants.icl) == (1.0, 1.0, 2000.0, 1.0)


@pytest.mark.parametrize("name", ["task", "crd", "fd", "icl"])
def test_a_weight_of_zero_skips_the_term(name, monkeypatch):
    function = {"task": "clip"}.get(name, name) + "_loss"
    monkeypatch.setattr(losses, function, lambda *_: pytest.fail(f"{function} was computed"))
    student, batch = outputs()
    recipe, _ = override(CLIP_KD, RUN, [f"{name}=0"])
    terms, _ = recipe.loss(student, batch, recipe.constants, NOW)
    assert set(terms) == {"task", "crd", "fd", "icl"} - {name}


def test_all_weights_zero_is_refused_in_one_line(squares, cache, tmp_path, capsys):
    zeros = [word for name in ("task", "crd", "fd", "icl") for word in ("--set", f"{name}=0")]
    assert train_here(squares, cache, tmp_path / "run", "--dry-run", *zeros) == 2
    assert "error: " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# Heads


def heads_for(image_width: int, text_width: int) -> TeacherSpace:
    student = build_two_tower("vit-micro")
    return CLIP_KD.distill_heads(
        CLIP_KD.constants, student, {"image_emb": (image_width,), "text_emb": (text_width,)}
    )


@pytest.mark.parametrize(
    ("widths", "projected"),
    [((64, 64), set()), ((16, 16), {"image", "text"}), ((16, 64), {"image"}), ((64, 16), {"text"})],
)
def test_projections_exist_where_widths_differ(widths, projected):
    heads = heads_for(*widths)
    assert {name.split(".")[0] for name, _ in heads.named_parameters()} == projected | {"icl_logit_scale"}
    raw = {"image": torch.randn(3, 64), "text": torch.randn(3, 64)}
    found = heads(raw)
    assert (found["image_in_teacher_space"].shape, found["text_in_teacher_space"].shape) == (
        (3, widths[0]),
        (3, widths[1]),
    )
    for name in {"image", "text"} - projected:
        assert torch.equal(found[f"{name}_in_teacher_space"], raw[name])
    torch.testing.assert_close(found["icl_scale"], torch.tensor(1 / 0.07))  # g has CLIP's start


def batch_of(count: int = 4, teacher_width: int = 16) -> dict:
    torch.manual_seed(1)
    batch = {"image": torch.randn(count, 3, 32, 32), "text": torch.randint(1, 1000, (count, 16))}
    fields = {name: torch.randn(count, teacher_width) for name in ("image_emb", "text_emb")}
    return batch | fields | {"logit_scale": torch.tensor(3.0)}


def test_the_step_sums_its_terms_and_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    step = TrainStep(CLIP_KD, build_two_tower("vit-micro"), heads_for(16, 16))
    total, terms, _ = step(batch_of(), NOW)
    torch.testing.assert_close(total, sum(terms.values()).reshape(()))
    total.backward()
    without = [name for name, parameter in step.named_parameters() if parameter.grad is None]
    zero = [name for name, p in step.named_parameters() if p.grad is not None and not p.grad.abs().sum()]
    assert (without, zero) == ([], [])
    assert any(name.startswith("heads.image") for name, _ in step.named_parameters())


def test_heads_learn_from_fd_and_icl_alone():
    torch.manual_seed(0)
    recipe, _ = override(CLIP_KD, RUN, ["fd=0", "icl=0"])
    step = TrainStep(recipe, build_two_tower("vit-micro"), heads_for(16, 16))
    step(batch_of(), NOW)[0].backward()
    assert all(parameter.grad is None for parameter in step.heads.parameters())


def test_the_teacher_scale_matters_as_the_parameter_before_exp():
    torch.manual_seed(0)
    step = TrainStep(CLIP_KD, build_two_tower("vit-micro"), heads_for(16, 16))
    _, low, _ = step(batch_of() | {"logit_scale": torch.tensor(0.0)}, NOW)
    _, high, _ = step(batch_of() | {"logit_scale": torch.tensor(4.0)}, NOW)
    assert (low["crd"] - high["crd"]).abs() > 1e-2
    assert torch.equal(low["task"], high["task"])


# ----------------------------------------------------------------------------------------------------
# --print-config


def test_print_config_is_the_resolved_recipe_and_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--recipe",
        "clip_kd",
        "--steps",
        "12",
        "--batch-size",
        "4",
        "--seed",
        "3",
        "--data",
        "some/birds/",
    ]
    assert main(["train", *words, "--set", "fd=7", "--set", "optim.lr=2e-4", "--print-config"]) == 0
    captured = capsys.readouterr()
    config = json.loads(captured.out)
    recipe, run = config["recipe"], config["run"]
    assert (recipe["name"], recipe["steps"], recipe["batch"]) == ("clip_kd", 12, 4)
    assert recipe["constants"] == dataclasses.asdict(dataclasses.replace(CLIP_KD.constants, fd=7.0))
    assert recipe["optim"] == dataclasses.asdict(Optim(lr=2e-4))
    assert (run["data"], run["cache"], run["seed"]) == ("some/birds/", "caches/birds", 3)
    assert run["out"].startswith("runs/clip_kd-")
    assert list(tmp_path.iterdir()) == []  # it says, and does nothing


def test_a_device_that_was_asked_for_is_taken(monkeypatch):
    """`--set run.device=cpu` on a machine with a GPU."""
    taken, made = [], student.training.loop.Trained(Path("runs/none"), None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        student.training.loop, "train", lambda recipe, run, **_: taken.append(run.device) or made
    )
    monkeypatch.setattr(student.training.loop, "next_command", lambda *_: ("student", "recipes"))
    assert main(["train", "--recipe", "clip", "--dry-run", "--set", "run.device=cpu"]) == 0
    assert main(["train", "--recipe", "clip", "--dry-run"]) == 0
    assert taken == ["cpu", "cuda:0"]
