"""`student train --config`: the settings of a run once more, with options and settings on top."""

import json
import shutil
from pathlib import Path

import pytest
from small import contained, read_lines

from student import api
from student.cli import main
from teachercache.core.errors import UserError


@pytest.fixture
def config(finished_run, tmp_path) -> Path:
    """The run.json of a run, in a place of its own."""
    return Path(shutil.copy(finished_run / "run.json", tmp_path / "settings.json"))


def change(config: Path, **parts: dict) -> Path:
    """Edit the record in a file."""
    record = json.loads(config.read_text())
    for name, values in parts.items():
        record[name] = record[name] | values if isinstance(values, dict) else values
    config.write_text(json.dumps(record))
    return config


def test_the_same_settings_give_the_same_bits(finished_run, tmp_path):
    trained = api.train(config=finished_run, out=tmp_path / "again")
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished_run / name).read_bytes()
    assert trained.steps == 4


def test_options_and_settings_come_on_top(config, squares, tmp_path, capsys):
    change(config, run={"seed": 3, "precision": "bfloat16", "device": "cuda:7", "eval_every": 2})
    saved = json.loads(config.read_text())
    words = ["train", "--config", str(config), "--set", "fd=7", "--set", "optim.lr=0.5", "--steps", "9"]
    assert main([*words, "--print-config"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["name"] == "clip_kd"
    assert found["recipe"]["constants"] == saved["recipe"]["constants"] | {"fd": 7.0}
    assert found["recipe"]["optim"] == saved["recipe"]["optim"] | {"lr": 0.5}
    assert (found["recipe"]["steps"], found["recipe"]["batch"]) == (9, 8)
    of_the_machine = {name: found["run"][name] for name in ("device", "workers", "out")}
    assert found["run"] == saved["run"] | of_the_machine
    assert of_the_machine["device"] == "auto"
    assert of_the_machine["out"].startswith("runs/clip_kd-")
    assert main([*words, "--seed", "0", "--data", "photos", "--print-config"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert (run["seed"], run["data"], run["cache"]) == (0, "photos", "caches/photos")


def test_resume_goes_on_with_the_run_of_the_file(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "model.safetensors").unlink()
    with contained():
        assert main(["train", "--config", str(run / "run.json"), "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()
    assert len(read_lines(run)) == 4
    assert "resuming from step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"format": 1}, "has format 1, this version reads 2: pass --recipe clip_kd instead"),
        (
            {"recipe": {"name": "os:system"}},
            "'os:system', which is not installed: pass --recipe PACKAGE.MODULE",
        ),
        ({"recipe": {"name": "nowhere"}}, "'nowhere', which is not installed"),
        ({"recipe": {"constants": {"fdd": 1}}}, "clip_kd has no setting 'fdd'"),
        ({"recipe": {"constants": {"fd": -1}}}, "fd=-1: a value of type float of 0 or more is expected"),
        ({"recipe": {"optim": {"lr": "high"}}}, "optim.lr=high: "),
        ({"recipe": {"steps": 2.5}}, "steps=2.5: "),
        ({"recipe": {"optim": [1]}}, "is not the run.json of a run"),
        ({"run": {"color": "red"}}, "clip_kd has no setting 'run.color'"),
        ({"run": {"zero": 7}}, "run.zero=7: "),
        ({"run": None}, "is not the run.json of a run"),
    ],
)
def test_a_foreign_file_is_one_line(parts, says, config):
    with pytest.raises(UserError) as error:
        api.resolve(config=change(config, **parts))
    assert says in str(error.value)
    assert str(config) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"format": 2}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_file_of_another_kind_is_one_line(content, config, capsys):
    config.write_bytes(content)
    assert main(["train", "--config", str(config)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {config} is not the run.json of a run")


def test_a_damaged_run_and_another_recipe_are_refused(finished_run, config, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "run.json").write_text((run / "run.json").read_text().replace("2000.0", "1000.0"))
    assert main(["train", "--config", str(run)]) == 2
    assert "run.json is damaged: " in capsys.readouterr().err
    assert main(["train", "--config", str(config), "--recipe", "clip"]) == 2
    assert "is of the recipe clip_kd, not clip: drop --recipe or --config" in capsys.readouterr().err


def test_a_recipe_that_is_not_installed_has_to_be_named(config):
    change(config, recipe={"name": "stopping", "steps": 7})
    with pytest.raises(UserError, match="'stopping', which is not installed"):
        api.resolve(config=config)
    with pytest.raises(UserError, match="is of the recipe stopping, not clip"):
        api.resolve("student.recipes.clip:CLIP", config=config)
    recipe, _ = api.resolve("own_recipes:STOPPING", config=config)
    assert (recipe.name, recipe.steps) == ("stopping", 7)
