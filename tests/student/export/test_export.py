"""What `student export` writes is what open_clip loads: the same numbers, nothing of distillation in it."""

import json
import shutil
from pathlib import Path

import open_clip
import own_recipes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import read_lines, train_here

from student.cli import main
from student.inference.load import load_run

TEXTS = ["square 3 said 1", "a red bird", "", "\u00fcber 12 of them!", "word " * 50]


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "student"
    assert main(["export", str(finished_run), "--format", "open_clip", "--out", str(out)]) == 0
    return out


def pictures() -> list[Image.Image]:
    """Wide, high, square, tiny: resizing shows in each."""
    torch.manual_seed(0)
    sizes = [(24, 20), (10, 50), (33, 33), (1, 1), (90, 31)]
    return [
        Image.frombytes("RGB", size, bytes(torch.randint(0, 256, (3 * size[0] * size[1],)).tolist()))
        for size in sizes
    ]


def embed(model, view, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return model.encode_image(torch.stack([view(p) for p in pictures()])), model.encode_text(
            tokenizer(TEXTS)
        )


def test_open_clip_loads_it_and_says_the_same(exported, finished_run):
    model, _, view = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    student = load_run(finished_run)
    ours, theirs = (
        embed(student.model, student.picture.view, student.tokenizer),
        embed(model.eval(), view, tokenizer),
    )
    for name, a, b in zip(("image", "text"), ours, theirs, strict=True):
        assert a.shape == (5, 64)
        assert (a - b).abs().max() < 1e-5, name
        assert (a[0] - a[1]).abs().max() > 1e-3  # not one constant
    assert float(model.logit_scale.exp().detach()) == pytest.approx(
        float(student.model.logit_scale.exp().detach()), rel=1e-6
    )
    torch.testing.assert_close(view(pictures()[0]), student.picture.view(pictures()[0]), rtol=0, atol=0)
    assert torch.equal(tokenizer(TEXTS), student.tokenizer(TEXTS))


def test_it_is_what_was_trained(exported, finished_run):
    """The weights are those of the last checkpoint, tensor for tensor."""
    trained = load_file(next((finished_run / "checkpoints").glob("*.safetensors")))
    written = load_file(exported / "open_clip_model.safetensors")
    prefix = "model.student.model."
    assert set(written) == {name.removeprefix(prefix) for name in trained if name.startswith(prefix)}
    for name, tensor in written.items():
        assert torch.equal(tensor.reshape(-1), trained[prefix + name].reshape(-1)), name


def test_heads_stay_behind(exported, finished_run):
    saved = load_file(next((finished_run / "checkpoints").glob("*.safetensors")))
    heads = [name for name in saved if name.startswith("model.heads.")]
    assert len(heads) == 5  # there were some
    for path in (finished_run / "model.safetensors", exported / "open_clip_model.safetensors"):
        names = set(load_file(path))
        assert not [name for name in names if "heads" in name or "icl" in name]
        model = open_clip.CLIP(**json.loads((exported / "open_clip_config.json").read_text())["model_cfg"])
        assert names == set(model.state_dict())


def test_files_and_the_model_card(exported, finished_run):
    assert {path.name for path in exported.iterdir()} == {
        "open_clip_model.safetensors",
        "open_clip_config.json",
        "README.md",
        "digests.json",
    }
    card = (exported / "README.md").read_text()
    assert "vit-micro trained by `clip_kd`" in card
    assert "Steps: 4, batch 8, seed 0" in card
    assert "; 48 rows, fingerprint " in card
    config = json.loads((exported / "open_clip_config.json").read_text())
    assert set(config) == {"model_cfg", "preprocess_cfg"}
    assert config["preprocess_cfg"]["size"] == 32


def test_what_was_measured_is_in_the_card(finished_run, squares, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--task", "retrieval", "--data", str(squares), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    )
    card = (tmp_path / "out" / "README.md").read_text()
    for name, value in metrics.items():
        assert f"| {name} | {value} |" in card


@pytest.mark.parametrize("folder", ["the same export", "a changed export", "no export"])
def test_an_existing_folder_stays_as_it_is(folder, exported, finished_run, tmp_path, capsys):
    """The same export again is no error: the first command may have been killed after its last write."""
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    if folder == "a changed export":
        (out / "open_clip_config.json").write_text("{}")
    if folder == "no export":
        (out / "digests.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*")}
    code = main(["export", str(finished_run), "--format", "open_clip", "--out", str(out)])
    said = capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [out]
    if folder == "the same export":
        assert (code, f"{out} is there already" in said) == (0, True)
    else:
        assert (code, f"error: {out} exists: pass another --out, or remove it" in said) == (2, True)


def test_the_default_place_and_what_is_printed(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(finished_run), "--format", "open_clip"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "exports/finished-open_clip\n"
    assert (tmp_path / "exports" / "finished-open_clip" / "open_clip_config.json").exists()
    assert "open_clip.create_model_and_transforms('local-dir:exports/finished-open_clip')" in captured.err


def test_a_run_that_is_not_finished(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path / 'run'} is not a finished run")
    assert f"--recipe clip_kd --resume --out {tmp_path / 'run'}" in error  # what to type, whole
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------
# --set init=<export>


def test_init_starts_from_these_weights(exported, squares, cache, tmp_path):
    """A learning rate of zero leaves what was there at the start."""
    words = ("--steps", 1, "--set", f"init={exported}", "--set", "optim.lr=0")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    start, after = (
        load_file(exported / "open_clip_model.safetensors"),
        load_file(tmp_path / "run" / "model.safetensors"),
    )
    assert start.keys() == after.keys()
    for name, value in start.items():
        assert torch.equal(after[name], value), name


def test_init_goes_on_where_the_run_was(exported, finished_run, squares, cache, tmp_path):
    words = ("--steps", 4, "--set", f"init={exported}")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    assert read_lines(tmp_path / "run")[0]["task"] < read_lines(finished_run)[0]["task"]
    student = load_run(tmp_path / "run")
    assert student.model_cfg["embed_dim"] == 64
    assert student.tokenizer(["a"]).shape == (1, 16)


def test_a_run_stands_alone(exported, squares, cache, tmp_path):
    """The folder that a run started from may go: the run can still be measured and exported."""
    start = tmp_path / "start"
    shutil.copytree(exported, start)
    assert train_here(squares, cache, tmp_path / "run", "--steps", 2, "--set", f"init={start}") == 0
    shutil.rmtree(start)
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    )
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert torch.equal(
        written["logit_scale"], load_file(tmp_path / "run" / "model.safetensors")["logit_scale"]
    )


def test_init_and_a_model_that_disagree(exported, squares, cache, tmp_path, capsys):
    """The folder's configuration counts; a --set model that says otherwise is not ignored in silence."""
    words = ("--dry-run", "--set", f"init={exported}", "--set", "model=vit-tiny")
    code = train_here(squares, cache, tmp_path / "run", *words)
    assert code == 2 or "vit-tiny" in capsys.readouterr().err


def test_init_that_is_no_folder(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--set", "init=nowhere") == 2
    assert (
        "error: --set init=nowhere: no such folder; it takes a run, or what `student export` wrote"
        in capsys.readouterr().err
    )


def test_a_run_of_a_recipe_of_ones_own_exports(squares, cache, tmp_path):
    name = "own_recipes:PLAIN"
    assert own_recipes.PLAIN.constants.model == "vit-micro"
    assert train_here(squares, cache, tmp_path / "run", "--steps", 1, recipe=name) == 0
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    )
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert model.visual.image_size == (32, 32)
