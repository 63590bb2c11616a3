"""Real processes that begin with everything imported: forks of a server in which nothing else has run."""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "teachercache.build.loop",
        "teachercache.teachers.clip.loading",
        "student.api",
        "student.training.loop",
        "student.inference.measure",
        "student.models.seq2seq.loading",
        "student.models.two_tower.loading",
        "evaluation.results.suite",
        "evaluation.tasks.encoding.linear_probe",
        "deepspeed.ops.op_builder.all_ops",
        "torch._dynamo",
        "matplotlib.pyplot",
    ]
)


class Command:
    """`tc` or `student` in a process and a session of its own, with the little of subprocess.Popen that tests need."""

    def __init__(
        self, program: str, words: list[str], environment: Mapping[str, str], cwd: Path | None = None
    ):
        self.folder, self.printed = tempfile.TemporaryDirectory(), ()
        files = [str(Path(self.folder.name, name)) for name in ("out", "err")]
        self.process = start(_command, program, words, dict(environment), str(cwd or Path.cwd()), files)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the command has not ended"
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        if not self.printed:
            self.printed = tuple(Path(self.folder.name, name).read_text() for name in ("out", "err"))
            self.folder.cleanup()
        return self.printed


def run_command(
    program: str, *words: object, environment: Mapping[str, str] | None = None, **how
) -> CompletedProcess:
    """What subprocess.run of `tc` or `student` returns."""
    argv = [str(word) for word in words]
    command = Command(program, argv, os.environ if environment is None else environment, **how)
    out, err = command.communicate()
    return CompletedProcess([program, *argv], command.poll(), out, err)


def start(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Start a process. multiprocessing's start method in it is the server's, not "fork"."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _command(program: str, words: list[str], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    from student.cli import main as student
    from teachercache.cli import main as tc

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for number, name in enumerate(files, 1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        sys.exit({"tc": tc, "student": student}[program](words))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
