"""The folder of a run: one trainer, a name of its own, two checkpoints, and a way on from every instant of a kill."""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from small import read_lines, train_here

from student.cli import main
from student.recipe import Run
from student.settings import run_folder
from student.training import lock, pauses
from student.training import run_folder as folders
from student.training.lock import NAME, only_trainer
from student.training.pauses import Pauses
from student.training.telemetry.metrics import Metrics, read_metrics
from teachercache.core.errors import UserError
from teachercache.core.process import Terminated

RECORD = {
    "format": 2,
    "recipe": {"constants": {}, "optim": {}},
    "run": {"seed": 0},
    "student": {"family": "two_tower"},
    "cache": None,
    "rows": "r",
    "views": 1,
}
EIGHT = ("--steps", 8, "--set", "run.save_every=2")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def eight(squares, cache, tmp_path_factory):
    """A run of eight steps with a checkpoint at every second."""
    out = tmp_path_factory.mktemp("eight") / "run"
    assert train_here(squares, cache, out, *EIGHT, recipe="own_recipes:DROPOUT") == 0
    return out


# ----------------------------------------------------------------------------------------------------
# Two checkpoints


def test_the_last_two_checkpoints_are_kept(eight):
    assert [path.name for path in sorted((eight / "checkpoints").iterdir())] == [
        "step-00000006.safetensors",
        "step-00000008.safetensors",
    ]


@pytest.mark.parametrize("digests", [True, False])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    digests, eight, squares, cache, tmp_path, capsys
):
    run = Path(shutil.copytree(eight, tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000008.safetensors"
    if digests:
        flip(newest)
    else:  # as an older version saved them: a torn file
        (run / "digests.json").unlink()
        newest.write_bytes(newest.read_bytes()[:-100])
    (run / "model.safetensors").unlink()
    assert train_here(squares, cache, run, *EIGHT, "--resume", recipe="own_recipes:DROPOUT") == 0
    error = capsys.readouterr().err
    assert f"WARNING: {newest} cannot be loaded (" in error
    assert "resuming from step 6" in error
    for name in ("model.safetensors", "metrics.jsonl", "checkpoints/step-00000008.safetensors"):
        assert (run / name).read_bytes() == (eight / name).read_bytes(), name
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert main(["verify", str(run)]) == 0


def test_damage_in_all_checkpoints_is_one_line(eight, squares, cache, tmp_path, capsys):
    run = Path(shutil.copytree(eight, tmp_path / "run"))
    for path in (run / "checkpoints").iterdir():
        flip(path)
    assert train_here(squares, cache, run, *EIGHT, "--resume", recipe="own_recipes:DROPOUT") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000006.safetensors cannot be loaded (it is damaged" in error
    assert error.endswith(f"remove {run / 'checkpoints'} to start over")
    assert len(list((run / "checkpoints").glob("*.safetensors"))) == 2


def test_a_damaged_log_stops_no_resume(eight, squares, cache, tmp_path, capsys):
    run = Path(shutil.copytree(eight, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1], lines[2], lines[3] = b"\xff\xfe{", b'{"step": "2", "loss": 1.0}', b"[" * 100_000
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert train_here(squares, cache, run, *EIGHT, "--resume", recipe="own_recipes:DROPOUT") == 0
    assert f"3 lines of {run / 'metrics.jsonl'} cannot be read and are skipped" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(run)] == [0, 4, 5, 6, 7]


def test_a_log_keeps_its_text(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "loss": 1.5e-07, "b": NaN}\n{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    Metrics(path, start=1)
    assert path.read_text() == '{"step": 0, "loss": 1.5e-07, "b": NaN}\n'
    assert read_metrics(tmp_path / "none") == []


# ----------------------------------------------------------------------------------------------------
# Kills while a run is opened


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_run_that_died_while_it_was_opened_is_opened_again(call, resume, tmp_path, monkeypatch):
    real = getattr(os, call)
    left = {"calls": 0}

    def failing(*given):
        left["calls"] -= 1
        if left["calls"] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(os, call, failing)
    for stop in range(1, 14):
        out = tmp_path / f"run-{stop}"
        out.mkdir()
        left["calls"] = stop
        with contextlib.suppress(OSError):
            folders.open_run(out, RECORD, {"tokenizer.json": "{}"}, resume=False)
        left["calls"] = -1
        (out / "a.123-00000000.partial").touch()  # of another machine
        (out / ".tmpAbCdEf").touch()
        folders.open_run(out, RECORD, {"tokenizer.json": "{}"}, resume=resume)
        assert json.loads((out / "run.json").read_text()) == RECORD
    assert left["calls"] < 0


def test_what_is_no_run_and_what_has_steps_is_not_taken_over(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists and is not a run"):
        folders.open_run(tmp_path, RECORD, {}, resume=True)
    (tmp_path / "thesis.txt").unlink()
    folders.open_run(tmp_path, RECORD, {}, resume=False)
    folders.open_run(tmp_path, {**RECORD, "views": 2}, {}, resume=False)  # no step was taken
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="exists: go on with --resume"):
        folders.open_run(tmp_path, RECORD, {}, resume=False)
    with pytest.raises(UserError, match="views: 2 there, 1 asked"):
        folders.open_run(tmp_path, RECORD, {}, resume=True)


# ----------------------------------------------------------------------------------------------------
# One trainer


def test_a_second_trainer_is_refused_while_the_first_lives(finished_run, squares, cache, tmp_path, capsys):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    with only_trainer(run):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert train_here(squares, cache, run, "--steps", 4, "--resume") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{run} is being trained by process {os.getpid()} on {socket.gethostname()}" in error
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (run / NAME).exists()
    with only_trainer(run):
        pass


def test_a_data_worker_does_not_hold_the_lock_of_a_dead_trainer(tmp_path):
    read, write = os.pipe()
    with only_trainer(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # lives until the test is over
            os._exit(0)
        (descriptor,) = lock._held
        copy = os.dup(descriptor)
    os.close(copy)  # the trainer is gone, the worker is not
    (tmp_path / NAME).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    try:
        with only_trainer(tmp_path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(write)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("pid", "host", "refused"),
    [("self", "here", True), (2**22 + 1, "here", False), (1, "elsewhere", True), (None, "", False)],
)
def test_a_file_system_without_locks_has_a_lease(pid, host, refused, tmp_path, monkeypatch):
    def no_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if pid is not None:
        record = {"pid": os.getpid() if pid == "self" else pid}
        record["host"] = socket.gethostname() if host == "here" else host
        (tmp_path / NAME).write_text(json.dumps(record))
    if refused:
        with pytest.raises(UserError, match="is being trained by process"), only_trainer(tmp_path):
            pass
        os.utime(tmp_path / NAME, (0, 0))
        if host == "elsewhere":  # a lease that nobody renews ends
            with only_trainer(tmp_path):
                pass
    else:
        with only_trainer(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


# ----------------------------------------------------------------------------------------------------
# Names and places


def test_two_runs_of_one_second_get_two_names(tmp_path):
    names = [folders.new_folder(tmp_path / "runs" / "clip-20260101-000000").name for _ in range(3)]
    assert names == [f"clip-20260101-000000{end}" for end in ("", "-2", "-3")]


def test_resume_auto_goes_on_or_starts(squares, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_folder("clip", resume="auto").startswith("runs/clip-2")
    Path("runs/clip-1").mkdir(parents=True)
    Path("runs/clip-1/run.json").touch()
    assert run_folder("clip", resume="auto") == "runs/clip-1"
    words = ("--steps", 2, "--resume", "auto")
    for said in ("next: ", "resuming from step 2"):
        assert train_here(squares, cache, tmp_path / "run", *words, recipe="own_recipes:DROPOUT") == 0
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--recipe", "clip", "--out", "s3://bucket/run"],
        ["train", "--recipe", "clip", "--set", "run.out=gs://bucket/run"],
        ["export", "run", "--format", "hf", "--out", "s3://bucket/out"],
        ["eval", "run", "--task", "all", "--out", "s3://bucket/out"],
        ["eval", "run", "--task", "zeroshot", "--figures", "memory://figures"],
    ],
)
def test_what_is_written_locally_takes_no_url(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "is a URL: write to a local folder" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------
# When a run saves and stops


def pausing(**settings) -> Pauses:
    return Pauses(dataclasses.replace(Run("", "", ""), **settings), 100)


def test_a_run_saves_by_steps_and_by_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pauses.time, "monotonic", lambda: now[0])
    by_steps = pausing(save_every=3, save_minutes=0.0)
    assert [step for step in range(1, 101) if by_steps.after(step)[0]] == [*range(3, 100, 3), 100]
    by_time, saved = pausing(save_every=0, save_minutes=1.0), []
    by_time.have_saved()
    for step in range(1, 11):
        now[0] += 25.0
        if by_time.after(step) == (True, False):
            saved.append(step)
            by_time.have_saved()
    assert saved == [3, 6, 9]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGTERM, Terminated),
        (signal.SIGHUP, Terminated),
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGUSR1, None),
    ],
)
def test_signals_save_and_most_of_them_stop(number, error):
    waiting = pausing()
    with waiting.catching():
        assert waiting.after(1) == (False, False)
        os.kill(os.getpid(), number)
        assert waiting.after(2) == (True, error is not None)
        assert error is not None or waiting.after(3) == (False, False)
    if error:
        assert type(waiting.stop_error(2, Path("run"))) is error


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        waiting = pausing()
        with waiting.catching():
            os.kill(os.getpid(), signal.SIGHUP)
            assert waiting.after(1) == (False, False)
    finally:
        signal.signal(signal.SIGHUP, before)


def fail(*given, **options):
    raise UserError("no pictures today")


@pytest.mark.parametrize("failing", [1, 2])
def test_an_evaluation_that_failed_is_done_at_the_resume(failing, squares, cache, tmp_path, monkeypatch):
    """The first one, or the last one, after whose checkpoint no step is left."""
    words, name = ("--steps", 4, "--eval-every", 2), "own_recipes:DROPOUT"
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    import evaluation.tasks.encoding.retrieval as retrieval

    calls, embed_images = itertools.count(1), retrieval.embed_images
    with monkeypatch.context() as patch:
        patch.setattr(
            retrieval,
            "embed_images",
            lambda *words, **more: (fail if next(calls) == failing else embed_images)(*words, **more),
        )
        assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 2
    evals = tmp_path / "run" / "evals.jsonl"
    assert len(evals.read_text().splitlines() if evals.exists() else []) == failing - 1
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    assert (tmp_path / "run" / "curve.png").exists()
    for file in ("evals.jsonl", "metrics.jsonl", "best/model.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
