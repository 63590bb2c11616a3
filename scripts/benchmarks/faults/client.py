"""Start the warm process with the shim, run commands in it, and read what they print."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError

SHIM = Path(__file__).parent / "shim.c"
KINDS = {"count": 0, "kill": 1, "torn": 2, "enospc": 3, "eio": 4}
SECONDS = 120.0  # a tiny command that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Event:
    """One write of a command: what it did, whether the disk must hold more for it, and the path below the root."""

    name: str
    grows: bool
    path: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that ended.

    Attributes:
        code: The exit code; negative for a signal, "hangs" after SECONDS.
        output: stdout and stderr.
        events: What it wrote below the root.
        hit: The event that failed, None if the command ended before it.
    """

    code: int | str
    output: str
    events: tuple[Event, ...] = ()
    hit: Event | None = None

    @property
    def errors(self) -> list[str]:
        """The `error:` lines."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    @property
    def is_traceback(self) -> bool:
        """Whether a traceback was printed."""
        return "Traceback (most recent call last)" in self.output


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of a kind at the n-th event below the root."""

    kind: str
    at: int


COUNT = Fault("count", 0)


class Warm:
    """The warm process. Commands see `folder`/root as the place whose writes are events."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder, self.root = process, folder, folder / "root"
        self.number = 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process ended with {self.process.wait()}")
        return json.loads(line)

    def start(self, words: Sequence[str], output: Path, fault: dict[str, Any] | None = None) -> int:
        """Start a command and return its process id, which is also its process group."""
        return self.ask(start=list(words), output=str(output), fault=fault)["pid"]

    def wait(self, pid: int, seconds: float = SECONDS) -> int | str:
        """Wait for a command and return its exit code."""
        return self.ask(wait=pid, seconds=seconds)["exit"]

    def poll(self, pid: int) -> int | None:
        """Return the exit code of a command, None if it has not ended."""
        return self.ask(poll=pid)["exit"]

    def run(self, words: Sequence[str], fault: Fault | None = None) -> Ended:
        """Run a command, with a fault or undisturbed."""
        output, log = self.folder / "output", self.folder / "events"
        log.unlink(missing_ok=True)
        armed = fault and {"root": str(self.root), "at": fault.at, "kind": KINDS[fault.kind], "log": str(log)}
        code = self.wait(self.start(words, output, armed or None))
        events, hit = read_events(log)
        return Ended(code, output.read_text(errors="replace"), events, hit)


def read_events(log: Path) -> tuple[tuple[Event, ...], Event | None]:
    """Read the shim's log: all events, and the first one that failed."""
    events: list[Event] = []
    hit = None
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        name, grows, path = line.split(" ", 2)
        event = Event(name.lstrip("!"), grows == "1", path)
        events.append(event)
        if name.startswith("!") and hit is None:
            hit = event
    return tuple(events), hit


def compiled_shim(folder: Path) -> Path:
    """Compile the shim.

    Raises:
        UserError: There is no C compiler, or this is no Linux.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler or sys.platform != "linux":
        raise UserError("faults are injected by a C library on Linux: install a C compiler (cc)")
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@contextlib.contextmanager
def warm_process(folder: Path) -> Iterator[Warm]:
    """Start the warm process; it ends with the block.

    Args:
        folder: An empty folder for inputs, outputs and logs.

    Raises:
        UserError: There is no C compiler, or this is no Linux.
        RuntimeError: The process does not start.
    """
    folder = folder.resolve()
    log = folder / "log"
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(compiled_shim(folder))]))
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, "-m", "scripts.benchmarks.faults.server"]
    pipe = subprocess.PIPE
    with (
        log.open("w") as errors,
        subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            warm = Warm(process, folder)
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"the warm process did not start: {log.read_text()[-1000:]}")
            yield warm
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
