"""Decoding processes: their number, tensors without shared memory, and errors that arrive in one line."""

import errno
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from teachercache.core import process
from teachercache.core.errors import MachineError, UserError
from teachercache.core.process import cpu_quota, default_workers
from teachercache.data import workers
from teachercache.data.workers import Piped, hand_over, limited, received, shared_memory


class Pair(NamedTuple):
    first: torch.Tensor
    second: list


BATCH = {
    "image": torch.arange(6.0).reshape(2, 3),
    "pair": Pair(torch.ones(2, dtype=torch.bool), [torch.zeros(0), "word"]),
    "array": np.arange(3),
    "number": 3,
}


class Batches(Dataset):
    """Batch i, or the error with that number."""

    def __init__(self, errors: dict[int, Exception] | None = None):
        self.errors = errors or {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        if index in self.errors:
            raise self.errors[index]
        return BATCH | {"number": index}


def loaded(data: Batches, count: int) -> list:
    return list(received(DataLoader(data, batch_size=None, num_workers=count, collate_fn=hand_over(count))))


def same(batch: dict, number: int) -> bool:
    kinds = (
        type(batch["array"]) is np.ndarray and type(batch["pair"]) is Pair and batch["pair"][1][1] == "word"
    )
    return kinds and batch["number"] == number and torch.equal(batch["image"], BATCH["image"])


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_batches_are_the_same_with_and_without_shared_memory(free: int, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory", lambda: free)
    assert isinstance(hand_over(1)(BATCH), Piped) == (free == 0)
    assert all(same(batch, i) for i, batch in enumerate(loaded(Batches(), 1)))
    assert hand_over(0)(BATCH) is BATCH  # in this process nothing is handed over


def test_the_room_is_for_the_batches_of_all_workers(monkeypatch):
    size = sum(tensor.nbytes for tensor in (BATCH["image"], BATCH["pair"].first))
    monkeypatch.setattr(workers, "shared_memory", lambda: 2 * 3 * size)
    assert not isinstance(hand_over(3)(BATCH), Piped)
    assert isinstance(hand_over(4)(BATCH), Piped)


def test_shared_memory_that_is_missing_or_small_is_measured(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "none")
    assert shared_memory() == 0
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=16, f_frsize=4096))
    assert shared_memory() == 65536


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (UserError("row 'a: b' has no text"), UserError, "row 'a: b' has no text"),
        (MachineError("cannot read /d/a.png: Input/output error"), MachineError, "cannot read /d/a.png: Inp"),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_errors_arrive_as_they_were_raised(count: int, error: Exception, kind: type, words: str):
    with pytest.raises(kind) as raised:
        loaded(Batches({1: error}), count)
    assert not multiprocessing.active_children()  # although the error is still held
    assert "Traceback" not in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error", "/d/a.json"), MemoryError("1 GB for an array")]
)
def test_errors_of_the_machine_arrive_as_such(error: Exception):
    with pytest.raises(MachineError) as raised:
        loaded(Batches({0: error}), 1)
    assert "Traceback" not in str(raised.value)


def test_more_workers_than_the_machine_can_use_are_not_started(monkeypatch, capsys):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert (limited(0), limited(16), limited(999)) == (0, 16, 16)
    assert "999 workers" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# The share of a process


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 8),
        ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "4"}, 3),  # 16 machines with 4 processes
        ({"WORLD_SIZE": "2"}, 7),  # a launcher that does not say how many share this machine
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_workers_by_the_share_of_this_machine(variables: dict, count: int, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "cores", lambda: 16)
    assert default_workers() == count


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000"}, 4),
        ("0::/host/path\n", {"cpu.max": "200000 100000"}, 2),  # in a container that does not see its path
        (
            "5:cpu,cpuacct:/x\n1:name=systemd:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, np.inf),
        ("0::/a\n", {"a/cpu.max": "odd"}, np.inf),
        ("", {}, np.inf),
    ],
)
def test_quota_of_the_cgroup(groups: str, files: dict, quota: float, tmp_path: Path):
    (tmp_path / "cgroup").write_text(groups)
    for name, content in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(content)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "fs") == quota
