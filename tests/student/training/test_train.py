"""THE phase-2 loop: the same losses whatever interrupts it, at every ZeRO stage; what it refuses and what it leaves."""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import own_recipes
import pytest
import torch
import zarr
from processes import Command
from safetensors.torch import load_file, save_file
from small import (
    RANK_VARIABLES,
    TINY_CFG,
    build_cache,
    contained,
    read_lines,
    save_teacher,
    train_here,
    train_words,
    zero_noise,
)

from student.cli import main
from student.models.heads import TeacherSpace
from student.models.registry import load_student
from student.models.two_tower.loading import build_two_tower
from student.recipe import Optim
from student.recipes.clip import CLIP
from student.training.engine import learning_rate, parameter_groups
from student.training.step import TrainStep

ROOT = Path(__file__).parents[3]
STEPS = 20
STAGES = (0, 1, 2, 3)


def lines_of(run: Path) -> list[str]:
    """metrics.jsonl as text: floats are written so that the text tells them apart to the last bit."""
    return (run / "metrics.jsonl").read_text().splitlines()


def checkpoints(run: Path) -> list[str]:
    """The names of the files in a run's folder of checkpoints, oldest first."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def compare_weights(run: Path, other: Path) -> None:
    """Two students are the same to the last bit."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def start(data: Path, cache: Path, out: Path, *words: object, recipe: str = "clip_kd") -> Command:
    """`student train` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return Command("student", train_words(data, cache, out, *words, recipe=recipe), environment)


def wait_for_lines(process: Command, run: Path, count: int) -> None:
    """Until the process has written that many steps."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(lines_of(run)) >= count:
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no {count} steps: {process.communicate()[1][-2000:]}")


@pytest.fixture(scope="module")
def undisturbed(squares, cache, tmp_path_factory):
    """The run that the interrupted ones must equal."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_here(squares, cache, out, "--steps", STEPS) == 0
    return out


# ----------------------------------------------------------------------------------------------------
# Stop and go on


def test_a_run_is_whole(undisturbed):
    lines = read_lines(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert line["loss"] == pytest.approx(
            sum(line[name] for name in ("task", "crd", "fd", "icl")), rel=1e-6
        )
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        f"step-{STEPS:08d}.safetensors"
    ]
    assert not list(undisturbed.rglob("*.partial"))
    facts = json.loads((undisturbed / "run.json").read_text())
    assert (facts["recipe"]["name"], facts["recipe"]["steps"], facts["world_size"]) == ("clip_kd", STEPS, 1)


def test_the_same_seed_gives_the_same_run_and_another_does_not(undisturbed, squares, cache, tmp_path):
    for seed in (0, 1):
        assert train_here(squares, cache, tmp_path / str(seed), "--steps", STEPS, "--seed", seed) == 0
    assert lines_of(tmp_path / "0") == lines_of(undisturbed)
    assert lines_of(tmp_path / "1")[0] != lines_of(undisturbed)[0]


def test_sigterm_and_resume_give_the_same_losses(undisturbed, squares, cache, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(squares, cache, run, "--steps", STEPS)
    wait_for_lines(process, run, 8)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.poll() == 143
    assert "stopped after step" in error
    assert "Traceback" not in error
    done = len(lines_of(run))
    assert 8 <= done < STEPS
    assert f"stopped after step {done};" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}.safetensors"]
    assert train_here(squares, cache, run, "--steps", STEPS, "--resume") == 0
    assert f"resuming from step {done}" in capsys.readouterr().err
    assert lines_of(run) == lines_of(undisturbed)
    compare_weights(run, undisturbed)


def test_what_a_stop_says_to_type_works(squares, cache, tmp_path, monkeypatch, capsys):
    """Everything that is said after a stop goes on: not only one of two sentences."""
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    name = "own_recipes:STOPPING"
    assert train_here(squares, cache, tmp_path / "run", "--steps", 4, recipe=name) == 143
    said = capsys.readouterr().err
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert "--resume" in said
    if "same command goes on" in said:
        assert train_here(squares, cache, tmp_path / "run", "--steps", 4, recipe=name) == 0


def test_sigkill_at_any_instant_and_resume_give_the_same_losses(undisturbed, squares, cache, tmp_path):
    """Killed between and within steps and saves, several times; each time --resume goes on."""
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    run = tmp_path / "run"
    words = ["--steps", STEPS, "--set", "run.save_every=3"]
    process = start(squares, cache, run, *words)
    wait_for_lines(process, run, chance.randint(1, 14))
    time.sleep(chance.random() * 0.15)
    process.kill()
    process.communicate()
    assert process.poll() == -signal.SIGKILL, f"seed {seed}: it ended before it was killed"
    assert not (run / "model.safetensors").exists()
    assert train_here(squares, cache, run, *words, "--resume") == 0, f"seed {seed}"
    assert lines_of(run) == lines_of(undisturbed), f"seed {seed}"
    compare_weights(run, undisturbed)
    assert not list(run.rglob("*.partial")), f"seed {seed}"


@pytest.mark.parametrize("leftover", ["partial", "cut line", "no checkpoint"])
def test_what_a_kill_can_leave_is_mended(leftover, squares, cache, tmp_path, monkeypatch):
    """The instants that a random kill seldom hits."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    words, name = ("--steps", 6), "own_recipes:STOPPING"
    assert train_here(squares, cache, whole, *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    assert train_here(squares, cache, run, *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    if leftover == "partial":
        (saved,) = (run / "checkpoints").iterdir()
        left = saved.with_name("step-00000005.safetensors.partial")
        left.write_bytes(saved.read_bytes()[:1000])
        os.utime(left, (0, 0))
    elif leftover == "cut line":
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    else:
        shutil.rmtree(run / "checkpoints")
    assert train_here(squares, cache, run, *words, "--resume", recipe=name) == 0
    assert lines_of(run) == lines_of(whole)
    assert checkpoints(run)[-1] == "step-00000006.safetensors"
    assert not [name for name in checkpoints(run) if not name.endswith(".safetensors")]


def test_a_finished_run_resumes_to_nothing(undisturbed, squares, cache, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert train_here(squares, cache, tmp_path / "run", "--steps", STEPS, "--resume") == 0
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    compare_weights(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("recipe", ["STOPPING", "DROPOUT"])
def test_random_numbers_of_a_model_go_on_where_they_were(recipe, squares, cache, tmp_path, monkeypatch):
    name, words = f"own_recipes:{recipe}", ("--steps", 6)
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_the_loop_gives_signals_back(squares, cache, tmp_path):
    """A notebook or a test that called train() must still stop at Ctrl-C."""
    with contained():
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        assert main(train_words(squares, cache, tmp_path / "run", "--steps", 1)) == 0
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "fd=1"], "fd"),
        (["--set", "optim.lr=1e-5"], "lr"),
        (["--seed", "1"], "seed: 0 there, 1 asked"),
        (["--steps", "21"], f"steps: {STEPS} there, 21 asked"),
        (["--batch-size", "6"], "batch: 8 there, 6 asked"),
        (["--set", "run.precision=bfloat16"], "precision: float32 there, bfloat16 asked"),
        (["--live"], "online_teacher: False there, True asked"),
    ],
)
def test_a_resume_with_changed_settings_is_refused_by_name(
    words, named, undisturbed, squares, cache, tmp_path, capsys
):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert train_here(squares, cache, tmp_path / "run", "--steps", STEPS, "--resume", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'run'} is another run (")
    assert named in error
    assert error.endswith("pass another --out")


def test_a_refused_resume_shows_what_changed_and_nothing_else(undisturbed, squares, cache, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert train_here(squares, cache, tmp_path / "run", "--steps", STEPS, "--resume", "--set", "fd=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "fd: 2000.0 there, 1.0 asked" in error
    assert "crd" not in error


def test_a_resume_with_another_cache_is_refused(undisturbed, squares, tmp_path, capsys):
    other = build_cache(squares, save_teacher(tmp_path / "other", seed=1), tmp_path / "other.zarr")
    shutil.copytree(undisturbed, tmp_path / "run")
    assert train_here(squares, other, tmp_path / "run", "--steps", STEPS, "--resume") == 2
    assert "is another run (cache: " in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["clip_kd", "clip"])
def test_a_resume_with_other_rows_is_refused(recipe, squares, cache, tmp_path, capsys):
    """Another --data gives other batches at the same step, whatever the cache knows."""
    part = tmp_path / "part"
    shutil.copytree(squares, part)
    for path in sorted((part / "train").rglob("*.png"))[::2]:
        path.unlink()
    assert train_here(squares, cache, tmp_path / "run", "--steps", 2, recipe=recipe) == 0
    capsys.readouterr()
    assert train_here(part, cache, tmp_path / "run", "--steps", 2, "--resume", recipe=recipe) == 2
    assert "is another run (" in capsys.readouterr().err


def test_an_existing_run_is_refused(undisturbed, squares, cache, capsys):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    assert train_here(squares, cache, undisturbed, "--steps", STEPS) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {undisturbed} exists: go on with --resume, or pass another --out"
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


def test_nothing_to_resume(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "none", "--resume") == 2
    assert "nothing to resume at" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_no_number_stops_the_run(squares, cache, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("--steps", 6, "--set", "run.save_every=2")
    assert train_here(squares, cache, run, *words, recipe="own_recipes:BAD_LOSS") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss is ")
    assert "at step 3" in error
    assert [line["step"] for line in read_lines(run)] == [0, 1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    assert not (run / "model.safetensors").exists()


def test_no_checkpoint_holds_what_is_no_number(squares, cache, tmp_path):
    """A finite loss with a NaN gradient: the save behind that step must not replace the last good checkpoint."""
    run = tmp_path / "run"
    words = ("--steps", 8, "--set", "run.save_every=2")
    assert train_here(squares, cache, run, *words, recipe="own_recipes:BAD_GRADIENT") == 2
    saved = sorted((run / "checkpoints").iterdir())[-1]
    state = load_file(saved)
    assert len(state) > 100
    assert all(torch.isfinite(tensor).all() for tensor in state.values()), saved.name


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle", "another model", "empty"])
def test_a_checkpoint_that_cannot_be_loaded_is_one_line(
    damage, undisturbed, squares, cache, tmp_path, capsys
):
    """A pickle is never opened: safetensors hold numbers alone."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (saved,) = (run / "checkpoints").iterdir()
    if damage == "cut":
        saved.write_bytes(saved.read_bytes()[:-1000])
    elif damage == "garbage":
        saved.write_bytes(b"\xff" * 1000)
    elif damage == "pickle":
        torch.save({"module": Code(tmp_path / "proof")}, saved)
    elif damage == "another model":
        save_file(
            {name: tensor.flatten()[:1] for name, tensor in load_file(saved).items()}, saved, {"step": "4"}
        )
    else:
        save_file({}, saved)
    assert train_here(squares, cache, run, "--steps", STEPS, "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {saved} cannot be loaded (")
    assert error.endswith(f"remove {saved.parent} to start over")
    assert not (tmp_path / "proof").exists()


def test_a_resume_says_what_it_starts_from(undisturbed, squares, cache, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (saved,) = (run / "checkpoints").iterdir()
    saved.unlink()
    (run / "checkpoints" / "step-00000004").mkdir()  # as versions before this one saved
    assert train_here(squares, cache, run, "--steps", STEPS, "--resume") == 2
    assert (
        "was written by an older version, which alone can resume it: pass another --out"
        in capsys.readouterr().err
    )
    shutil.rmtree(run / "checkpoints")
    assert train_here(squares, cache, run, "--steps", STEPS, "--resume") == 0
    assert "there is no checkpoint yet: starting at step 0" in capsys.readouterr().err
    assert lines_of(run) == lines_of(undisturbed)


@zero_noise
@pytest.mark.parametrize("stage", [1, 2])
def test_what_has_no_part_in_a_loss_is_treated_alike_at_every_stage(stage, squares, cache, tmp_path):
    """A parameter without a gradient decays and its moments too, with one process at stage 0 as everywhere else."""
    words = ("--steps", 6, "--set", "optim.weight_decay=0.5", "--set", "optim.lr=0.01")
    name = "own_recipes:ALTERNATING"
    for zero in (0, stage):
        settings = ("--set", f"run.zero={zero}")
        assert train_here(squares, cache, tmp_path / str(zero), *words, *settings, recipe=name) == 0
    ours, theirs = (load_file(next((tmp_path / str(zero) / "checkpoints").iterdir())) for zero in (0, stage))
    names = [key for key in theirs if "icl_logit_scale" in key]
    assert len(names) == 4  # the value, two moments, the number of steps
    for key in names:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-7, msg=key)
    assert float(ours["optim.heads.icl_logit_scale.step"]) == 6


def test_a_run_holds_no_pickle(undisturbed):
    """Nothing that could run code when it is read."""
    suffixes = {path.suffix for path in undisturbed.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".png"}


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ----------------------------------------------------------------------------------------------------
# --dry-run and --live


def test_a_dry_run_leaves_nothing(squares, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = tree(squares), tree(cache)
    assert train_here(squares, cache, Path("runs/one"), "--dry-run") == 0
    captured = capsys.readouterr()
    assert "the first step took" in captured.err
    assert "nothing was written" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert (tree(squares), tree(cache)) == before


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


TERMS = ("task", "crd", "fd", "icl")


@pytest.fixture(scope="module")
def live_run(squares, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("live") / "run"
    assert train_here(squares, cache, out, "--steps", 3, "--live") == 0
    return read_lines(out)


def test_a_live_teacher_gives_the_losses_of_the_cache(live_run, squares, cache, tmp_path):
    """Batches of the first step are the same; a float16 row is off by at most 2^-11 of each component.

    A cosine is then off by at most 2 x 2^-11 and a logit by a_T = 14.3 times that, 1.4e-2 at worst; errors of signs at
    random and the means over 8 x 8 logits leave less than a tenth of it. FD is 2 - 2 cos per modality times 1000/d.
    """
    assert train_here(squares, cache, tmp_path / "cached", "--steps", 3) == 0
    cached = read_lines(tmp_path / "cached")
    assert cached[0]["task"] == live_run[0]["task"]  # the same student on the same pictures and texts
    for name in TERMS:
        assert live_run[0][name] == pytest.approx(cached[0][name], rel=1e-3), name
    assert any(live_run[0][name] != cached[0][name] for name in TERMS)  # float32 now: it was computed here


def test_live_reads_no_teacher_row_of_the_cache(live_run, squares, cache, tmp_path):
    poisoned = tmp_path / "poisoned.zarr"
    shutil.copytree(cache, poisoned)
    for name in ("image_emb", "text_emb"):
        array = zarr.open_array(poisoned / name, mode="r+")
        array[:] = np.ones(array.shape, np.float16)
    assert train_here(squares, poisoned, tmp_path / "run", "--steps", 3, "--live") == 0
    assert read_lines(tmp_path / "run") == live_run


def test_live_refuses_a_teacher_that_changed(squares, tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    cache = build_cache(squares, teacher, tmp_path / "teacher.zarr")
    save_teacher(teacher, seed=5)
    assert train_here(squares, cache, tmp_path / "run", "--live") == 2
    assert "was built with other weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_live_without_a_teacher_is_refused(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--live", recipe="clip") == 2
    assert "drop --live" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# ZeRO stages and precision


@pytest.fixture(scope="module")
def stage_runs(squares, cache, tmp_path_factory):
    """A run of each ZeRO stage, made when first asked for."""
    folder, codes = tmp_path_factory.mktemp("stages"), {}

    def of(stage: int) -> Path:
        out = folder / str(stage)
        if stage not in codes:
            codes[stage] = train_here(squares, cache, out, "--steps", 6, "--set", f"run.zero={stage}")
        assert codes[stage] == 0
        return out

    return of


@zero_noise
@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_gives_the_losses_of_stage_0(stage, stage_runs):
    plain, staged = read_lines(stage_runs(0)), read_lines(stage_runs(stage))
    assert len(plain) == len(staged) == 6
    for a, b in zip(plain, staged, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-6), (a["step"], name)


@zero_noise
@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_saves_the_student_whole(stage, stage_runs):
    """The saved students say the same; single weights without a gradient are rounding errors that Adam blows up."""
    torch.manual_seed(0)
    pictures, words = torch.randn(6, 3, 32, 32), torch.randint(1, 5000, (6, 16))
    said = []
    for run in (stage_runs(stage), stage_runs(0)):
        model = load_student(run).model
        with torch.inference_mode():
            said.append((model.encode_image(pictures), model.encode_text(words), model.logit_scale.clone()))
    for ours, theirs in zip(*said, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@zero_noise
@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_resumes(stage, squares, cache, tmp_path, monkeypatch):
    words, name = ("--steps", 4, "--set", f"run.zero={stage}"), "own_recipes:STOPPING"
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "1")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


@zero_noise
@pytest.mark.parametrize("stage", STAGES)
def test_logit_scales_are_clamped_at_every_stage(stage, squares, cache, tmp_path):
    words = ("--steps", 4, "--set", f"run.zero={stage}", "--set", "optim.lr=0.02", "--set", "optim.warmup=0")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe="own_recipes:UPWARD") == 0
    lines = read_lines(tmp_path / "run")
    for name in ("scale", "icl_scale"):
        assert lines[0][name] == pytest.approx(math.exp(4.59), rel=1e-5)
        assert [line[name] for line in lines[1:]] == pytest.approx(
            [100.0] * 3, rel=1e-5
        )  # the next step sees it
    if stage < 3:  # whole parameters of stage 3 are the business of another test
        saved = load_file(tmp_path / "run" / "model.safetensors")["logit_scale"]
        assert float(saved) == pytest.approx(math.log(100), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
def test_bfloat16_trains_close_to_float32(stage, squares, cache, tmp_path, stage_runs):
    words = ("--steps", 6, "--set", f"run.zero={stage}", "--set", "run.precision=bfloat16")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    for a, b in zip(read_lines(stage_runs(0)), read_lines(tmp_path / "run"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05), a["step"]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------
# Parameter groups and schedule


def test_weight_decay_is_for_matrices_alone():
    student = build_two_tower("vit-micro")
    step = TrainStep(CLIP, student, TeacherSpace(student.widths, (16, 16)))
    frozen = student.model.visual.conv1.weight.requires_grad_(False)
    groups = parameter_groups(step, 0.3)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)  # none twice
    names = {name: decay.get(id(p)) for name, p in step.named_parameters()}
    assert names.pop("student.model.visual.conv1.weight") is None
    assert not frozen.requires_grad
    free = (
        "bias",
        "ln_1.weight",
        "ln_2.weight",
        "ln_pre.weight",
        "ln_post.weight",
        "ln_final.weight",
        "class_embedding",
        "logit_scale",
    )
    for name, value in names.items():
        assert value == (0.0 if name.endswith(free) else 0.3), name
    assert names["heads.image.weight"] == 0.3
    assert names["heads.icl_logit_scale"] == 0.0


def test_only_decayed_parameters_shrink(squares, cache, tmp_path):
    """With a learning rate that moves and gradients that hardly matter, decay is what is left: 1 - lr wd per step."""
    words = ["--steps", 1, "--set", "optim.warmup=0", "--set", "optim.lr=0.01", "--set", "optim.eps=1e9"]
    for name, value in (("decay", 0.5), ("none", 0.0)):
        assert (
            train_here(squares, cache, tmp_path / name, *words, "--set", f"optim.weight_decay={value}") == 0
        )
    decayed, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("decay", "none"))
    for name, value in plain.items():
        factor = 1 - 0.01 * 0.5 if value.ndim > 1 else 1.0
        torch.testing.assert_close(decayed[name], value * factor, rtol=1e-5, atol=1e-7, msg=name)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    optim = Optim(lr=0.4, warmup=0.25)
    rates = [learning_rate(optim, step, 40) for step in range(40)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)  # the cosine begins at its top
    assert rates[25] == pytest.approx(0.2)  # half way down
    assert rates[39] == pytest.approx(0.4 * (1 + math.cos(math.pi * 29 / 30)) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01 * optim.lr


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.0), (2, 1.0), (5, 1.0), (1000, 0.0)])
def test_the_learning_rate_of_odd_schedules(steps, warmup):
    optim = Optim(lr=1.0, warmup=warmup)
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


def test_the_schedule_is_what_the_optimizer_uses(undisturbed):
    optim = Optim(**json.loads((undisturbed / "run.json").read_text())["recipe"]["optim"])
    assert [line["lr"] for line in read_lines(undisturbed)] == [
        learning_rate(optim, i, STEPS) for i in range(STEPS)
    ]


def test_a_step_is_adamw_by_hand(squares, cache, tmp_path):
    """One step of the engine against torch's AdamW without DeepSpeed, and against none of Adam's settings lost."""
    from student.inputs.caches import training_rows
    from student.inputs.order import StepPlan
    from student.inputs.pairs import PairBatches, TeacherFields
    from student.recipe import Progress, Setting
    from student.recipe import Run as RunRecord
    from student.recipes.registry import find
    from student.settings import override
    from teachercache.cache import store
    from teachercache.data.read import read_manifest

    run = tmp_path / "run"
    words = [
        "--steps",
        2,
        "--set",
        "optim.lr=0.003",
        "--set",
        "optim.beta1=0.5",
        "--set",
        "optim.max_grad_norm=1.0",
    ]
    assert train_here(squares, cache, run, *words) == 0
    opened, manifest = store.open_complete(cache), read_manifest(str(squares))
    settings = ["model=vit-micro", "optim.lr=0.003", "optim.beta1=0.5", "optim.max_grad_norm=1.0"]
    recipe, _ = override(find("clip_kd"), RunRecord(data="", cache="", out=""), settings)
    rows, shapes = training_rows(manifest, opened), {"image_emb": (16,), "text_emb": (16,)}
    torch.manual_seed(0)
    student = recipe.student(recipe.constants, Setting(shapes, manifest, rows))
    step = TrainStep(recipe, student, recipe.distill_heads(recipe.constants, student, shapes))
    batches = PairBatches(
        manifest,
        rows,
        student.row_inputs,
        StepPlan(batch=8, steps=2, seed=0),
        teachers=TeacherFields((opened,), recipe.fields),
    )
    optim = recipe.optim
    groups = [
        {"params": [p], "weight_decay": optim.weight_decay if p.ndim > 1 else 0.0} for p in step.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.5, optim.beta2), eps=optim.eps)
    for i in range(2):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, i, 2)
        optimizer.zero_grad()
        loss, _, _ = step(batches[i], Progress(i, 2))
        assert float(loss.detach()) == pytest.approx(read_lines(run)[i]["loss"], rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
    saved = load_file(run / "model.safetensors")
    for name, value in student.model.state_dict().items():
        torch.testing.assert_close(saved[name].reshape(value.shape), value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_that_nothing_trains_is_no_trouble(squares, tmp_path):
    """Widths that are equal, and terms of weight zero: parameters without a gradient."""
    wide = save_teacher(tmp_path / "wide", {**TINY_CFG, "embed_dim": 64})
    cache = build_cache(squares, wide, tmp_path / "wide.zarr")
    words = ("--steps", 2, "--set", "icl=0", "--set", "fd=0")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    assert set(read_lines(tmp_path / "run")[0]) >= {"task", "crd"}
    assert "icl" not in read_lines(tmp_path / "run")[0]


def test_workers_change_nothing(undisturbed, squares, cache, tmp_path):
    from student.inputs.loader import loader
    from student.recipe import Run as RunRecord
    from student.recipes.registry import find
    from student.settings import override
    from student.training.prepare import prepare

    run = RunRecord(data=str(squares), cache=str(cache), out="", device="cpu")
    recipe, run = override(find("clip_kd"), run, ["model=vit-micro", "mfd=1"])
    batches = prepare(dataclasses.replace(recipe, batch=8, steps=9), run).batches
    alone, forked = (list(loader(batches, start=0, workers=workers, micro=4)) for workers in (0, 2))
    assert len(alone) == len(forked) == 18
    for a, b in zip(alone, forked, strict=True):
        assert a.keys() == b.keys() >= {"image", "text", "image_emb", "mask_noise"}
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    words = ("--steps", STEPS, "--set", "run.workers=2", "--set", "run.save_every=7")
    assert train_here(squares, cache, tmp_path / "run", *words) == 0
    assert read_lines(tmp_path / "run") == read_lines(undisturbed)


@zero_noise
def test_zero_3_changes_no_later_training_of_its_process(undisturbed, squares, cache, tmp_path):
    """DeepSpeed replaces torch's linear function, with other last bits."""
    linear = torch.nn.functional.linear
    assert train_here(squares, cache, tmp_path / "zero", "--steps", 2, "--set", "run.zero=3") == 0
    assert torch.nn.functional.linear is linear
    assert train_here(squares, cache, tmp_path / "run", "--steps", STEPS, "--set", "run.save_every=7") == 0
    assert read_lines(tmp_path / "run") == read_lines(undisturbed)


def test_a_run_leaves_a_picture_of_its_losses(undisturbed, tmp_path):
    from PIL import Image

    from student.training.telemetry.curve import draw_curve, smooth

    with Image.open(undisturbed / "curve.png") as picture:
        assert picture.size == (840, 480)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert smooth([float(i) for i in range(100)])[-1] == 98.5
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert draw_curve(tmp_path, ()) is None


def test_a_run_says_all_it_needs_to_run_again(undisturbed, squares, cache):
    facts = json.loads((undisturbed / "run.json").read_text())
    assert facts["run"]["data"] == str(squares)
    assert facts["recipe"]["constants"]["model"] == "vit-micro"
    assert facts["recipe"]["optim"] == dataclasses.asdict(Optim())
    assert facts["teachers"] == [json.loads((cache / "zarr.json").read_text())["attributes"]["spec"]]
    assert set(facts["versions"]) == {"torch", "open_clip_torch", "deepspeed"}
