"""Whole runs of vlkd on a small cache: no pictures, any number of ranks, resume, stages, exports, the commands."""

import dataclasses
import json

import numpy as np
import own_recipes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import build_cache, contained, read_lines, save_teacher, train_here
from small_bart import save_bart

from student.cli import main
from student.inference.generator import load_generator
from student.models.seq2seq.loading import load_seq2seq
from student.recipe import Run
from student.recipes.vlkd import VLKD
from student.settings import override
from student.training.prepare import prepare
from teachercache.core.errors import UserError
from tests.student.inputs.test_tasks import write_vqa


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return save_bart(tmp_path_factory.mktemp("bart") / "micro")


def train(squares, cache, bart, out, *words, steps=4, recipe="vlkd") -> int:
    settings = ["--set", f"model={bart}", "--set", "max_text=32", "--set", "optim.lr=1e-3"]
    return train_here(squares, cache, out, "--steps", steps, *settings, *words, recipe=recipe)


@pytest.fixture(scope="module")
def run(squares, cache, bart, tmp_path_factory):
    """Four steps, for which no picture may be opened."""
    out = tmp_path_factory.mktemp("runs") / "vlkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *words, **settings: pytest.fail("a picture was opened"))
        assert train(squares, cache, bart, out) == 0
    return out


def prepared(squares, cache, bart, *settings, rank=0, world=1, monkeypatch=None):
    found, place = override(
        VLKD,
        Run(str(squares), str(cache), "", device="cpu", workers=0),
        [f"model={bart}", "max_text=32", *settings],
    )
    if monkeypatch:
        monkeypatch.setattr("student.training.prepare.rank", lambda: rank)
        monkeypatch.setattr("student.training.prepare.world_size", lambda: world)
    with contained():
        return prepare(dataclasses.replace(found, batch=8), place)


def sources(batch) -> list[list[int]]:
    return [[one for one in row if one != 1] for row in batch["source"].tolist()]


def test_a_run_decodes_no_picture_and_says_its_terms(run):
    lines = read_lines(run)
    assert len(lines) == 4
    for line in lines:
        assert line["loss"] == pytest.approx(line["ttdm"] + line["itcl"] + line["icti"], rel=1e-5)
        assert line["tau"] == pytest.approx(0.07, abs=0.01)
    assert lines[-1]["ttdm"] < lines[0]["ttdm"]
    assert lines[-1]["lr"] < lines[1]["lr"]
    made = json.loads((run / "run.json").read_text())["student"]
    config = made["config"]
    assert (made["family"], config["width"], config["visual"], config["masks"]) == ("seq2seq", 16, "cls", 6)


def test_holes_are_the_same_on_any_number_of_ranks_and_others_in_every_epoch(
    squares, cache, bart, monkeypatch
):
    whole = prepared(squares, cache, bart).batches
    halves = [
        prepared(squares, cache, bart, rank=k, world=2, monkeypatch=monkeypatch).batches for k in (0, 1)
    ]
    per_epoch = whole.order.per_epoch
    for step in (0, per_epoch):
        assert sources(whole[step]) == [row for half in halves for row in sources(half[step])]
        assert sources(whole[step]) == sources(whole[(step, 0, 3)]) + sources(whole[(step, 3, 8)])
    seen = []
    for start in (0, per_epoch):
        steps = range(start, start + per_epoch)
        rows = [row for step in steps for row in whole.order.rows_of(step).tolist()]
        seen.append(dict(zip(rows, [holes for step in steps for holes in sources(whole[step])], strict=True)))
    assert len(seen[0]) == 48
    assert sum(seen[0][row] != seen[1][row] for row in seen[0]) > 40


def test_a_stopped_run_goes_on_as_if_nothing_had_been(squares, cache, bart, tmp_path, monkeypatch):
    recipe = "own_recipes:VLKD_STOPPING"  # with BART's dropout
    assert train(squares, cache, bart, tmp_path / "whole", steps=5, recipe=recipe) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    assert train(squares, cache, bart, tmp_path / "halved", steps=5, recipe=recipe) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train(squares, cache, bart, tmp_path / "halved", "--resume", steps=5, recipe=recipe) == 0
    assert read_lines(tmp_path / "halved") == read_lines(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_micro_batches_have_the_losses_of_whole_batches(squares, cache, bart, tmp_path):
    calm = save_bart(tmp_path / "calm", dropout=0.0)
    assert train(squares, cache, calm, tmp_path / "whole", steps=3) == 0
    assert train(squares, cache, calm, tmp_path / "micro", "--micro-batch", 2, steps=3) == 0
    for a, b in zip(read_lines(tmp_path / "whole"), read_lines(tmp_path / "micro"), strict=True):
        assert all(b[key] == pytest.approx(value, rel=1e-4) for key, value in a.items())


def test_the_stages_go_on_from_a_run(squares, cache, bart, run, tmp_path):
    assert (
        train(squares, cache, bart, tmp_path / "caption", "--set", "stage=caption", "--set", f"init={run}")
        == 0
    )
    first, *_, last = read_lines(tmp_path / "caption")
    assert first.keys() == {"step", "loss", "nll", "nll_token", "lr"}
    assert last["nll_token"] < first["nll_token"]
    words = ["--set", "stage=scst", "--set", f"init={tmp_path / 'caption'}"]
    assert train(squares, cache, bart, tmp_path / "scst", *words, steps=2) == 0
    assert train(squares, cache, bart, tmp_path / "again", *words, "--micro-batch", 4, steps=2) == 0
    for a, b in zip(read_lines(tmp_path / "scst"), read_lines(tmp_path / "again"), strict=True):
        assert {"scst", "reward", "baseline"} <= a.keys()
        assert b["baseline"] == pytest.approx(a["baseline"], rel=1e-4)
    half = prepared(squares, cache, bart, "data_share=0.5").batches.rows
    assert len(half) == 24
    assert set(prepared(squares, cache, bart, "data_share=0.25").batches.rows) < set(half)


def test_patches_are_read_in_the_place_of_the_picture(squares, bart, teacher_folder, tmp_path, capsys):
    made = build_cache(squares, teacher_folder, tmp_path / "p.zarr", outputs=("embeddings", "patches"))
    words = ["--set", "visual=patches", "--set", "run.precision=bfloat16"]
    assert train(squares, made, bart, tmp_path / "run", *words, steps=2) == 0
    batch = prepared(squares, made, bart, "visual=patches").batches[0]
    assert batch["patch_emb"].shape == (8, 4, 16)
    picture = sorted((squares / "test").rglob("*.png"))[0]
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--image", str(picture)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert train(squares, made, bart, tmp_path / "other", "--set", f"init={tmp_path / 'run'}") == 2
    assert "visual=patches" in error(capsys)


def test_answers_are_learned_of_a_vqa_file(bart, tmp_path):
    write_vqa(tmp_path / "vqa", [["red"] * 10, ["blue"] * 6 + ["red"] * 4] * 6)
    made = build_cache(tmp_path / "vqa", save_teacher(tmp_path / "clip"), tmp_path / "vqa.zarr")
    assert train(tmp_path / "vqa", made, bart, tmp_path / "run", "--set", "stage=vqa") == 0
    assert read_lines(tmp_path / "run")[0]["nll"] > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["student"]["config"]["masks"] == 2


def test_an_export_loads_again_and_its_language_model_writes(run, squares, tmp_path, capsys, monkeypatch):
    from transformers import AutoTokenizer, BartForConditionalGeneration

    pictures = sorted((squares / "test").rglob("*.png"))[:3]
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "mine")]) == 0
    capsys.readouterr()
    words = [word for path in pictures for word in ("--image", str(path))]
    said = []
    for model in (run, tmp_path / "mine"):
        assert main(["generate", str(model), *words, "--beams", "2"]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == said[1]
    assert [line.partition(": ")[0] for line in said[0]] == [str(path) for path in pictures]
    assert main(["generate", str(run), "--image", str(pictures[0]), "--question", "What color?"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    one, two = load_seq2seq(run).state_dict(), load_seq2seq(tmp_path / "mine").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone = BartForConditionalGeneration.from_pretrained(tmp_path / "mine" / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine" / "language_model")
    ids = tokenizer(["A picture of <mask>."], return_tensors="pt")
    assert ids["input_ids"][0, 0] == 0
    assert 4 in ids["input_ids"]
    written = alone.generate(**ids, num_beams=2, max_new_tokens=5, do_sample=False)
    assert tokenizer.batch_decode(written, skip_special_tokens=True)[0]


def test_a_generator_sees_the_picture_that_the_cache_saw(run, squares):
    """Its CLIP's embedding of a training picture is the cached one, so what is written is the same."""
    made = load_generator(run)
    files = sorted((squares / "train").rglob("*.png"))[:2]
    pictures = [Image.open(file).convert("RGB") for file in files]
    prompts = ["A picture of [MASK][MASK]."] * 2
    found = made.generate(pictures, prompts, 1, 6)
    import zarr

    facts = json.loads((run / "run.json").read_text())
    cache = zarr.open(facts["run"]["cache"])
    keys = [str(key) for key in cache["key"][:]]
    at = [next(i for i, key in enumerate(keys) if file.stem in key) for file in files]
    fields = {"image_emb": torch.from_numpy(np.asarray(cache["image_emb"])[at]).float()}
    assert load_seq2seq(run).generate_texts(fields, prompts, num_beams=1, max_new_tokens=6) == found
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        made.generate(pictures, prompts[:1], 1, 6)


def error(capsys) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]


def test_what_cannot_be_is_refused_in_one_line(run, squares, cache, bart, finished_run, tmp_path, capsys):
    cases = {
        "visual=rows": "cls, patches",
        "stage=adapt": "distil, caption, vqa, scst",
        "mask_share=0": "above 0 and up to 1",
        "max_text=900": "40 positions",
        f"init={finished_run}": "no run of vlkd",
        "visual=patches": "--outputs",
        "stage=vqa": "asks nothing",
        "optim.schedule=step": "cosine, linear",
    }
    for k, (setting, words) in enumerate(cases.items()):
        assert train(squares, cache, bart, tmp_path / f"refused-{k}", "--set", setting) == 2, setting
        assert words in error(capsys), setting
    assert train(squares, cache, tmp_path / "nothing", tmp_path / "refused") == 2
    assert "no BART there" in error(capsys)
    picture = sorted(squares.rglob("*.png"))[0]
    for command, words in {
        ("generate", finished_run, "--image", picture): "this student cannot write texts",
        ("generate", run, "--image", run / "run.json"): "cannot be read as a picture",
        ("export", run, "--format", "open_clip", "--out", tmp_path / "x"): "--format hf",
        ("eval", run, "--task", "retrieval", "--data", squares): "student generate",
    }.items():
        assert main([str(word) for word in command]) == 2
        assert words in error(capsys)
    with pytest.raises(UserError, match="no run of vlkd"):
        load_seq2seq(tmp_path)


def test_the_packaged_bart_mends_text():
    from student.models.seq2seq.loading import open_bart

    model, tokenizer = open_bart("bart-tiny", scratch=False)
    ids = torch.tensor([tokenizer.encode("A large<mask> circle left of a blue square.").ids])
    written = tokenizer.decode(
        model.eval().generate(input_ids=ids, num_beams=4, max_new_tokens=24)[0].tolist()
    )
    assert written.startswith("A large")
    assert written.endswith("circle left of a blue square.")
    assert model.model.shared.weight.dtype == torch.float32
    other, _ = open_bart("bart-tiny", scratch=True)
    assert other.model.shared.weight.shape == model.model.shared.weight.shape
    assert not torch.equal(other.model.shared.weight, model.model.shared.weight)
