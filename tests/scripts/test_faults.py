"""The short form of `scripts/bench faults`: every command is disturbed at some of its writes and run again."""

import argparse
import itertools

import pytest

from scripts.benchmarks.faults import inject
from scripts.benchmarks.faults.client import COUNT, Ended, Event, Fault, read_events, warm_process
from scripts.benchmarks.faults.compare import differences, leftovers
from scripts.benchmarks.faults.flips import flip_bit
from scripts.benchmarks.faults.inject import (
    Outcome,
    Plan,
    chosen,
    disturb,
    event_at,
    faults_of,
    plan_for,
    problems_of_first,
)
from scripts.benchmarks.faults.jobs import make_inputs, must
from scripts.benchmarks.faults.run import add_options, disturb_all, read_journal
from teachercache.core.errors import UserError

# Where in the course of a command (0 its first write, 1 its last) which fault comes
SHORT = {
    "manifest": (("enospc", 0.5),),
    "build": (("torn", 0.2), ("eio", 1)),
    "index": (("torn", 1),),
    "train": (("kill", 0.55), ("enospc", 0.4)),
    "export_open_clip": (("eio", 0.3),),
    "eval": (("kill", 0.9),),
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """One process for all: it has imported everything, and forks a child for each command."""
    try:
        with warm_process(tmp_path_factory.mktemp("faults")) as process:
            make_inputs(process)
            yield process
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("job", SHORT)
def test_a_disturbed_command_recovers(warm, job):
    plan = plan_for(warm, job, twice=False)
    for kind, share in SHORT[job]:
        outcome = disturb(warm, plan, Fault(kind, event_at(plan.events, kind, share)))
        assert outcome.event != "not reached"
        assert not outcome.wrong, outcome
    if job == "export_open_clip":  # safetensors writes in Rust
        assert any(".tmp" in event.path or "safetensors" in event.path for event in plan.events)


EVENTS = (
    Event("mkdir", True, "/c"),
    Event("open", True, "/c/a.partial"),
    Event("write", True, "/c/a.partial"),
    Event("sync", False, "/c/a.partial"),
    Event("rename", False, "/c/a"),
)


def test_events_of_a_kind():
    assert faults_of(EVENTS, "kill") == faults_of(EVENTS, "eio") == [1, 2, 3, 4, 5]
    assert faults_of(EVENTS, "torn") == [3]
    assert faults_of(EVENTS, "enospc") == [1, 2, 3]
    assert [event_at(EVENTS, "kill", share) for share in (0, 0.5, 1)] == [1, 3, 5]


def test_one_of_n_events_with_first_and_last():
    import random

    numbers = chosen(list(range(1, 101)), 10, random.Random(0))
    assert {1, 100} <= set(numbers)
    assert all(b - a < 20 for a, b in itertools.pairwise(numbers))
    assert chosen([1, 2, 3], 1, random.Random(0)) == [1, 2, 3]


def test_a_sweep_goes_on_after_its_journal(tmp_path, monkeypatch):
    disturbed = []

    def one(warm, plan, fault):
        disturbed.append((fault.kind, fault.at))
        return Outcome("build", fault, "write /c/a", -9, 0, {})

    monkeypatch.setattr(inject, "plan_for", lambda warm, name: Plan(name, tmp_path, EVENTS, {}, {}))
    monkeypatch.setattr(inject, "disturb", one)
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--command", "build", "--journal", str(tmp_path / "journal"), "--kind"]
    first = disturb_all(None, parser.parse_args([*words, "torn"]))
    every = disturb_all(None, parser.parse_args([*words, "torn", "kill"]))
    assert disturbed == [("torn", 3), *(("kill", at) for at in range(1, 6))]
    assert read_journal(tmp_path / "journal") == [*first, *every[:5]]  # kills come first in a report


def test_the_log_of_events(tmp_path):
    (tmp_path / "log").write_text("mkdir 1 \n!write 1 /a b\nrename 0 /a\n")
    events, hit = read_events(tmp_path / "log")
    assert events == (Event("mkdir", True, ""), Event("write", True, "/a b"), Event("rename", False, "/a"))
    assert hit == events[1]


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(75, "error: x: no space\n"), set()),
        (Ended(0, "done\n"), set()),
        (Ended(2, "error: x: no space\n"), {"exit code"}),
        (Ended(75, "error: x\nerror: y\n"), {"error lines"}),
        (
            Ended(1, "Traceback (most recent call last):\nOSError: x\n"),
            {"traceback", "error lines", "exit code"},
        ),
        (Ended("hangs", ""), {"hangs"}),
    ],
)
def test_what_is_wrong_with_a_disturbed_command(ended, wrong):
    assert set(problems_of_first(ended, "enospc")) == wrong


def test_what_differs_and_what_is_left():
    expected = {
        "a": b"1",
        "times": b"1",
        "m.safetensors": b"1",
        "r.json": b'{"a": 1}',
        "metrics.jsonl": b'{"step": 1, "loss": 2, "seconds": 1}\n',
        "speed.json": b"{}",
    }
    again = expected | {"times": b"2", "m.safetensors": b"2", "r.json": b'{"a": 2}', "metrics.jsonl": b""}
    same = {
        "a": b"1",
        "times": b"3",
        "m.safetensors": b"1",
        "r.json": b'{"a": 3}',
        "metrics.jsonl": b'{"step": 1, "loss": 3, "seconds": 1}\n{"step": 1, "loss": 2, "seconds": 4}\n',
    }
    assert differences(same, expected, again) == []
    other = {
        "a": b"2",
        "times": b"",
        "m.safetensors": b"2",
        "r.json": b"{",
        "metrics.jsonl": b'{"step": 1}\n',
    }
    assert differences(other, expected, again) == [f"{name} differs" for name in other]
    assert differences({}, {"a": b""}, {}) == ["a is missing"]
    assert leftovers(same | {"b.partial": b""}, expected) == ["b.partial"]


def test_a_bit_is_flipped(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0")
    flip_bit(tmp_path / "a", 9)
    assert (tmp_path / "a").read_bytes() == b"\0\2"


def test_a_command_that_fails_undisturbed_is_told(warm):
    with pytest.raises(UserError, match="ends with 2 undisturbed"):
        must(warm, "tc info {root}/none.zarr", COUNT)
