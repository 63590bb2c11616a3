"""--eval-every: the run goes on as if nothing had been, and the best student is one that eval and export take."""

import json
import shutil
from pathlib import Path

import own_recipes
import pytest
from safetensors.torch import load_file
from small import make_folder, read_lines, train_here, zero_noise

from student.cli import main
from student.models.registry import load_student
from student.training.best import best_score, keep_best
from teachercache.core.errors import UserError

STEPS, EVERY = 6, 2
KEYS = ["image_retrieval_recall@1", "text_retrieval_recall@1"]


def evals_of(run: Path) -> list[dict]:
    """The lines of evals.jsonl."""
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(squares, cache, tmp_path_factory):
    """A run that was evaluated at steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    words = ("--steps", STEPS, "--eval-every", EVERY, "--set", "optim.lr=0.01")
    assert train_here(squares, cache, out, *words, recipe="own_recipes:DROPOUT") == 0
    return out


def test_evaluating_changes_no_step(evaluated, squares, cache, tmp_path):
    words = ("--steps", STEPS, "--set", "optim.lr=0.01")
    assert train_here(squares, cache, tmp_path / "plain", *words, recipe="own_recipes:DROPOUT") == 0
    assert (tmp_path / "plain" / "metrics.jsonl").read_text() == (evaluated / "metrics.jsonl").read_text()
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "plain", evaluated))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_best_is_what_its_score_says(evaluated, squares, capsys):
    lines = evals_of(evaluated)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["score"] == pytest.approx(sum(line[key] for key in KEYS) / 2)
    assert best_score(evaluated) == max(line["score"] for line in lines)
    assert not (evaluated / "candidate").exists()
    capsys.readouterr()
    assert (
        main(["eval", str(evaluated / "best"), "--task", "retrieval", "--data", str(squares), "--json"]) == 0
    )
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    first = next(line for line in lines if line["score"] == best_score(evaluated))
    assert {key: metrics[key] for key in KEYS} == {key: first[key] for key in KEYS}


def test_the_curve_shows_the_scores(evaluated, tmp_path):
    from PIL import Image, ImageChops

    from student.training.telemetry.curve import draw_curve

    for name in ("metrics.jsonl", "evals.jsonl"):
        shutil.copy(evaluated / name, tmp_path)
    with Image.open(draw_curve(tmp_path, ("task",))) as picture:
        with_scores = picture.convert("RGB")
    (tmp_path / "evals.jsonl").unlink()
    with Image.open(draw_curve(tmp_path, ("task",))) as picture:
        assert ImageChops.difference(with_scores, picture.convert("RGB")).getbbox()


def test_the_best_can_be_exported(evaluated, tmp_path):
    words = ["export", str(evaluated / "best"), "--format", "open_clip", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert (tmp_path / "out" / "open_clip_model.safetensors").exists()


def test_the_older_of_two_equals_is_kept_and_a_worse_one_never(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    student = load_student(run)
    scores = iter([0.5, 0.25, 0.5, 0.75])
    kept = []
    for step in (1, 2, 3, 4):
        student.model.logit_scale.data.fill_(float(step))
        keep_best(student, run, step, lambda folder: (next(scores), {"acc1": 0.0}))
        kept.append(float(load_file(run / "best" / "model.safetensors")["logit_scale"]))
    assert kept == [1.0, 1.0, 1.0, 4.0]
    assert [line["score"] for line in evals_of(run)] == [0.5, 0.25, 0.5, 0.75]


@zero_noise
@pytest.mark.parametrize("stage", [2, 3])
def test_every_zero_stage_evaluates_the_whole_student(stage, squares, cache, tmp_path):
    words = ("--steps", 2, "--eval-every", 2, "--set", f"run.zero={stage}", "--set", "run.eval_task=zeroshot")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    assert [line["step"] for line in evals_of(tmp_path / "run")] == [2]
    ours, best = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("", "best"))
    assert all(ours[name].equal(best[name]) for name in ours)


def test_a_resume_writes_what_an_undisturbed_run_writes(evaluated, squares, cache, tmp_path, monkeypatch):
    run = tmp_path / "run"
    words = ("--steps", STEPS, "--eval-every", EVERY, "--set", "optim.lr=0.01")
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    assert train_here(squares, cache, run, *words, recipe="own_recipes:DROPOUT") == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    with open(run / "evals.jsonl", "a") as file:  # a kill between an evaluation and its checkpoint
        file.write('{"step": 4, "score": 0.0, "image_ret')
    assert train_here(squares, cache, run, *words, "--resume", recipe="own_recipes:DROPOUT") == 0
    assert evals_of(run) == evals_of(evaluated)
    assert read_lines(run) == read_lines(evaluated)
    ours, theirs = (load_file(folder / "best" / "model.safetensors") for folder in (run, evaluated))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert best_score(run) == best_score(evaluated)


def test_what_cannot_be_evaluated_is_refused_before_the_first_step(squares, cache, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(squares, cache, run, "--eval-every", 2, "--set", "run.eval_task=linear_probe") == 2
    assert "choose from zeroshot, retrieval" in capsys.readouterr().err
    plain = make_folder(tmp_path / "plain", 16)
    assert train_here(plain, cache, run, "--eval-every", 2, recipe="own_recipes:PLAIN") == 2
    assert "has no val or test rows with a text: leave --eval-every away" in capsys.readouterr().err
    assert not run.exists()


def test_an_evaluation_that_fails_loses_no_step(squares, cache, tmp_path, monkeypatch, capsys):
    import evaluation.tasks.encoding.retrieval as retrieval

    run, words = tmp_path / "run", ("--steps", 4, "--eval-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "embed_images", lambda *given: fail("no pictures today"))
        assert train_here(squares, cache, run, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no pictures today"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    assert train_here(squares, cache, run, *words, "--resume") == 0
    assert "resuming from step 2" in capsys.readouterr().err
    assert len(read_lines(run)) == 4
    assert not (run / "candidate").exists()


def fail(message: str) -> None:
    raise UserError(message)


def test_val_rows_come_before_test_rows(squares, tmp_path):
    from evaluation.results.run import scorer
    from evaluation.tasks.registry import find

    data = tmp_path / "data"
    shutil.copytree(squares, data)
    assert scorer(find("retrieval"), str(data))[1] == "test"
    (data / "val").mkdir()
    shutil.copytree(squares / "test" / "class0", data / "val" / "class0")
    score, split = scorer(find("retrieval"), str(data))
    assert split == "val"
    for path in (data / "val").rglob("*.txt"):
        path.rename(path.with_suffix(".away"))
    assert scorer(find("retrieval"), str(data))[1] == "test"  # a split without captions is of no use
    assert scorer(find("zeroshot"), str(data))[1] == "val"
    for path in (data / "val").rglob("*.away"):
        path.rename(path.with_suffix(".txt"))
    seen = []
    import evaluation.tasks.encoding.retrieval as retrieval

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "embed_images", lambda encoder, manifest, rows: seen.extend(rows) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score(None)
    assert len(seen) == len(list((data / "val").rglob("*.png")))
