"""Builds that are disturbed: children that are killed, and whether the same command then gives the same bytes.

Children are forked from a server that has imported everything: real processes, real SIGKILL.
"""

import ctypes
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from processes import CONTEXT
from small import tree

from teachercache.build.loop import BuildOptions, Summary, build
from teachercache.core.device import Precision
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

BLOCK, BATCH = 8, 5  # a batch never crosses a block
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def run_build(
    teacher: Teacher,
    data: Path | str,
    out: Path,
    *,
    block_rows: int | None = BLOCK,
    workers: int = 0,
    dtype: str = "float32",
    batch_size: int = BATCH,
    **options,
) -> Summary:
    """`tc build` in this process, in small batches and blocks."""
    return build(
        teacher,
        read_manifest(str(data)),
        out,
        BuildOptions(
            batch_size=batch_size,
            workers=workers,
            device="cpu",
            precision=Precision(dtype, "a test"),
            block_rows=block_rows,
            **options,
        ),
    )


class Disturbed:
    """Some data, the cache that is there before (if any), what one undisturbed build makes of it, and children that
    build the same elsewhere."""

    def __init__(
        self,
        folder: Path,
        teacher_folder: Path,
        data: Path,
        *,
        before: Path | None = None,
        options: Mapping[str, Any] | None = None,
        outputs: tuple[str, ...] | None = None,
    ):
        self.folder, self.teacher_folder, self.outputs = folder, teacher_folder, outputs
        self.teacher = load(str(teacher_folder), outputs=outputs)
        self.data, self.before, self.options = data, before, dict(options or {})
        self.count = 0
        out = self.new_out()
        run_build(self.teacher, data, out, **self.options)
        self.expected = tree(out)

    def new_out(self) -> Path:
        """A place of its own for a cache, with a copy of the one that is there before."""
        self.count += 1
        out = self.folder / f"out{self.count}" / "c.zarr"
        if self.before:
            shutil.copytree(self.before, out)
        return out

    def start(self, out: Path, **how) -> multiprocessing.Process:
        """A child that builds."""
        arguments = (self.teacher_folder, self.data, out, self.options)
        process = CONTEXT.Process(target=child, args=arguments, kwargs=how | {"outputs": self.outputs})
        process.start()
        return process

    def num_events(self, path: Path) -> int:
        """How often an undisturbed build looks at the disk."""
        process = self.start(self.new_out(), events=path)
        process.join(60)
        assert process.exitcode == 0
        return int(path.read_text())

    def kill_at_event(self, out: Path, event: int) -> bool:
        """Build until its `event`-th look at the disk, then SIGKILL; whether it came to that."""
        process = self.start(out, kill_at=event)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    def finish(self, out: Path) -> Summary:
        """The same build in this process; its result must be that of the undisturbed one."""
        summary = run_build(self.teacher, self.data, out, **self.options)
        assert tree(out) == self.expected
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        return summary

    def assert_survives_kills(self, path: Path, points: int, seed: int = 0) -> list[int]:
        """Kill builds at the first, the last and random looks at the disk; the rows left to compute after each."""
        total = self.num_events(path)
        assert total > points
        chosen = sorted(
            {1, 2, total - 1, total, *random.Random(seed).sample(range(3, total - 1), points - 4)}
        )
        left = []
        for point in chosen:
            out = self.new_out()
            assert self.kill_at_event(out, point)
            left.append(self.finish(out).rows_written)
            shutil.rmtree(out.parent)
        assert left == sorted(left, reverse=True)
        return left


def child(
    teacher_folder: Path,
    data: Path,
    out: Path,
    options: dict[str, Any],
    *,
    kill_at: int = 0,
    pause: float = 0,
    workers: int = 0,
    env: dict[str, str] | None = None,
    events: Path | None = None,
    rows: Path | None = None,
    outputs: tuple[str, ...] | None = None,
) -> None:
    """Build in this process, slowly or until an event; SIGKILL comes from here or from outside."""
    torch.set_num_threads(1)
    os.environ.update(env or {})
    teacher = load(str(teacher_folder), outputs=outputs)

    def slow_encode(module, inputs):
        time.sleep(pause)
        return teacher.encode(module, inputs)

    seen = watch_disk(out, kill_at)
    summary = run_build(
        dataclasses.replace(teacher, encode=slow_encode), data, out, workers=workers, **options
    )
    if events:
        events.write_text(str(seen[0]))
    if rows:
        rows.write_text(str(summary.rows_written))


def watch_disk(out: Path, kill_at: int) -> list[int]:
    """Count what this process opens, renames, removes and makes in `out` and beside it; SIGKILL at `kill_at`."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in (
            "open",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
        ) and f"{arguments[0]}".startswith(str(out)):
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def mount_disk(folder: Path, size: int, *, again: bool = False, read_only: bool = False) -> None:
    """A tmpfs that only this process sees; root alone can. `again` changes the size of one that is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private, locked, remount = 0x20000, 0x44000, 1, 32
    again = again or read_only
    failed = not again and libc.unshare(new_namespace)
    failed = failed or libc.mount(b"none", b"/", None, recursive_private, None)
    flags = remount * again + locked * read_only
    if failed or libc.mount(b"none", bytes(folder), b"tmpfs", flags, f"size={size}".encode()):
        raise PermissionError(os.strerror(ctypes.get_errno()))
