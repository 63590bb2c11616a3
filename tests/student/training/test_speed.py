"""What a run says of its speed: products counted once, waiting told apart, memory; where numbers go besides."""

import json
import sys
import types

import pytest
import torch
from small import read_lines, train_here
from torch.utils.flop_counter import FlopCounterMode

from student.models.two_tower.loading import build_two_tower
from student.recipe import Run
from student.training.telemetry import speed

RUN = Run(data="", cache="", out="", device="cpu")


@pytest.fixture
def known_peak(monkeypatch):
    """A CPU whose peak is a gigaflop a second."""
    monkeypatch.setattr(speed, "PEAKS", {"cpu": (1e9, 1e9)})


def test_waiting_and_computing_are_told_apart(monkeypatch):
    """Between steps, where a run saves and evaluates, no time is counted."""
    now = iter([0.0, 0.3, 0.4, 7.0, 7.3, 7.4, 9.0, 9.3, 9.4])
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(now))
    clock = speed.Speed(RUN, batch=10)
    for _ in range(3):
        clock.wait()
        clock.compute()
        clock.end_step()
    facts = clock.facts()
    assert clock.steps == 3
    assert facts["data_wait"] == pytest.approx(0.75)
    assert facts["seconds_per_step"] == pytest.approx(0.4)
    assert facts["samples_per_second"] == pytest.approx(25)
    assert facts["peak_memory_bytes"] > 50e6
    assert "mfu" not in facts
    assert "MFU" not in clock.summary()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--micro-batch", 4),
        ("--set", "run.grad_checkpointing=true"),
        ("--micro-batch", 4, "--set", "run.grad_checkpointing=true"),
    ],
)
def test_products_are_counted_once(words, known_peak, squares, cache, tmp_path):
    """Three forwards of the student; heads of so small a batch are a per cent on top."""
    assert train_here(squares, cache, tmp_path / "run", "--steps", 2, *words) == 0
    facts = json.loads((tmp_path / "run" / "speed.json").read_text())
    student = build_two_tower("vit-micro")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student({"image": torch.zeros(8, 3, 32, 32), "text": torch.ones(8, 16, dtype=torch.int64)})
    counted = facts["mfu"] * 1e9 * facts["seconds_per_step"]
    assert counted == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


def test_a_peak_is_that_of_the_longest_name(monkeypatch):
    names = {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA L40": None,
        "NVIDIA RTX A1000 Laptop GPU": None,
        "NVIDIA A10M": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert speed.peak_flops("cuda:0", "bfloat16") == peak, name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other GPU")
    assert speed.peak_flops("cuda:0", "bfloat16") is None
    assert speed.peak_flops("cpu", "float32") is None


def test_a_dry_run_says_time_and_memory(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--dry-run", "--steps", 1000) == 0
    said = capsys.readouterr().err
    assert "student of " in said
    assert " GB at the peak" in said
    assert "1000 steps take about" in said


# ----------------------------------------------------------------------------------------------------
# Reports


def test_tensorboard_gets_every_value(squares, cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert train_here(squares, cache, run, "--steps", 3, "--report-to", "tensorboard") == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    lines = read_lines(run)
    for name in ("loss", "task", "crd", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name])) for line in lines]


def test_wandb_gets_every_value(squares, cache, tmp_path, monkeypatch):
    """By a stand-in with the three calls that are made; the real one was tried offline by hand."""
    logged, started, finished = [], {}, []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append({"step": step, **values}), finish=lambda: finished.append(True)
    )
    module = types.ModuleType("wandb")
    module.init = lambda **words: started.update(words) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train_here(squares, cache, tmp_path / "run", "--steps", 2, "--report-to", "wandb") == 0
    assert logged == read_lines(tmp_path / "run")
    assert (started["dir"], started["resume"], finished) == (tmp_path / "run", "allow", [True])
    assert started["config"]["recipe"]["name"] == "clip_kd"
    first = started["id"]
    assert train_here(squares, cache, tmp_path / "run", "--steps", 2, "--report-to", "wandb", "--resume") == 0
    assert started["id"] == first
    assert train_here(squares, cache, tmp_path / "two" / "run", "--steps", 2, "--report-to", "wandb") == 0
    assert started["id"] != first


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("tensorbord", "--report-to tensorbord: choose from tensorboard, wandb"),
        ("wandb", "--report-to wandb needs its package: pip install 'teachercache[track]'"),
    ],
)
def test_a_report_that_cannot_be_is_refused(names, said, squares, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_here(squares, cache, tmp_path / "run", "--report-to", names) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
