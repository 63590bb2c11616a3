"""A warm process that forks a child for each command: `tc` and `student` start without an import.

It reads one JSON object per line from stdin and answers with one on stdout. The harness starts it with `shim.c` in
LD_PRELOAD, so that a child can arm a fault before its command begins.

    {"start": ["tc", "info", "c.zarr"], "output": FILE, "fault": null}                  -> {"pid": 12}
    {"wait": 12, "seconds": 60}                                                         -> {"exit": 0}
    {"poll": 12}                                                                        -> {"exit": null}
"""

import atexit
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

# Small blocks, so that eight rows have several
BLOCK_ROWS = 4
MODULES = (
    "deepspeed",
    "faiss",
    "matplotlib.pyplot",
    "open_clip",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "sklearn.decomposition",
    "evaluation.results.suite_tables",
    "student.cli",
    "student.export.write",
    "student.inference.measure",
    "student.settings",
    "student.training.loop",
    "teachercache.analysis.report.write",
    "teachercache.build.loop",
    "teachercache.build.options",
    "teachercache.build.verify",
    "teachercache.cli",
    "teachercache.search.index",
    "teachercache.search.query",
    "teachercache.teachers.clip.loading",
)


def warm_up() -> None:
    """Import what commands import, with one thread, and make blocks small."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:  # an optional package
            print(f"{name}: {error}", file=sys.stderr)

    import teachercache.build.loop as loop

    loop.block_rows_for = lambda fields, rows: BLOCK_ROWS


def arm(fault: dict[str, Any] | None) -> None:
    """Arm the shim: events below a folder are logged and counted, and one of them fails."""
    if fault is not None:
        ctypes.CDLL(None).fault_arm(
            os.fsencode(fault["root"]),
            ctypes.c_long(fault["at"]),
            ctypes.c_int(fault["kind"]),
            os.fsencode(fault["log"]),
        )


def run_child(request: dict[str, Any]) -> None:
    """Run a command in this forked process, with its output in a file, and end the process."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    program, *words = request["start"]
    os.environ.update(request.get("env", {}))
    code = 1
    try:
        from student.cli import main as student
        from teachercache.cli import main as tc

        sys.argv = [program, *words]
        arm(request.get("fault"))
        code = {"tc": tc, "student": student}[program](words)
        atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def poll(pid: int) -> int | None:
    """Return the exit code of a child, None if it has not ended."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait_for(pid: int, seconds: float) -> int | str:
    """Wait for a child and return its exit code; after `seconds` its group is killed and the code is "hangs"."""
    end = time.monotonic() + seconds
    while (code := poll(pid)) is None:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.005)
    return code


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    warm_up()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run_child(request)
            answer: dict[str, Any] = {"pid": pid}
        elif "poll" in request:
            answer = {"exit": poll(request["poll"])}
        else:
            answer = {"exit": wait_for(request["wait"], request["seconds"])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
