"""Errors by kind: exit codes and lines of `run_command`, whatever raises."""

import errno
import os
import signal
import sys

import click
import pytest

from teachercache.core import command
from teachercache.core.command import run_command
from teachercache.core.errors import MachineError, UserError
from teachercache.core.process import Terminated


def fails(error: BaseException, *words: str) -> int:
    """Run a command `go` that raises an error."""

    def go() -> None:
        raise error

    return run_command(click.Group(commands={"go": click.Command("go", callback=go)}), ["go", *words])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class SafetensorError(Exception):
    """As the library names its own."""


IN_WORKER = (
    "Caught {0} in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
    "  File \"decode.py\", line 1, in read\n    raise\nKeyError: 'UserError: no'\n\n"
    "The above exception was the direct cause of the following exception:\n\n"
    '  File "decode.py", line 2, in read\n    raise\n{1}{0}: {2}\n'
)

MISTAKES = [
    (UserError("no data at x: pass --data FOLDER"), "error: no data at x: pass --data FOLDER"),
    (UserError("UserError: is a word: of the data"), "error: UserError: is a word: of the data"),
    (
        UserError(IN_WORKER.format("UserError", "teachercache.core.errors.", "two\n  lines: of it")),
        "error: two lines: of it",
    ),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
        "error: No such file or directory: a/b",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "a"), "error: Permission denied: a"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "error: Is a directory: a"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "error: Not a directory: a"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "error: File name too long: a"),
    (OSError("x is no model of the hub"), "error: x is no model of the hub"),
]

MACHINE = [
    (MachineError("cannot read a.png: the mount is away"), "a.png"),
    (
        OSError(errno.ENOSPC, "No space left on device", "r/w.safetensors"),
        "No space left on device: r/w.safetensors",
    ),
    (OSError(errno.EIO, "Input/output error", "a", None, "b"), "a -> b"),
    (MemoryError(), "out of memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "Tried to allocate 2 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "9 bytes"),
    (RuntimeError("Error in faiss::FileIOWriter: could not write x: No space left on device"), "write x"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Shared memory"), "Bus error"),
    (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
    (
        OSError(IN_WORKER.format("OSError", "", "[Errno 5] Input/output error: 'a.png'")),
        "error: [Errno 5] Input",
    ),
    (MachineError(IN_WORKER.format("MachineError", "x.", "a.png is away")), "error: a.png is away"),
    (
        caused(ValueError("cannot write the index"), OSError(errno.ENOSPC, "No space left on device")),
        "the index",
    ),
    (caused(UserError("cannot read a.parquet"), OSError(errno.EIO, "Input/output error")), "a.parquet"),
]

OURS = [
    KeyError("x"),
    RuntimeError("shape"),
    RecursionError("too deep"),
    AssertionError(),
    EOFError("short file"),
]


@pytest.mark.parametrize(("error", "line"), MISTAKES)
def test_a_mistake_is_one_line_and_2(error, line, capsys):
    assert fails(error) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize(("error", "part"), MACHINE)
def test_an_error_of_the_machine_is_one_line_and_75(error, part, capsys):
    assert fails(error) == 75
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert part in err
    assert "the same command goes on" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_is_one_line_and_1_and_a_traceback_with_debug(error, capsys):
    assert fails(error) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"error: this is a fault of teachercache: {type(error).__name__}")
    assert "--debug" in err
    assert "\n" not in err
    assert fails(error, "--debug") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == err


def test_debug_stands_anywhere_but_behind_two_dashes():
    assert command._without_debug(["--debug", "a"]) == (["a"], True)
    assert command._without_debug(["a", "--debug"]) == (["a"], True)
    assert command._without_debug(["a", "--", "--debug"]) == (["a", "--", "--debug"], False)


def test_a_line_is_short_and_holds_no_escapes(capsys):
    assert fails(UserError(f"no data at \x1b[31m{'a' * 5000}\u202e")) == 2
    err = capsys.readouterr().err
    assert r"\x1b[31maaa" in err
    assert r"\u202e" in err
    assert len(err) < 2100


def test_nul_is_a_mistake(capsys):
    assert run_command(click.Group(), ["go", "a\0b"]) == 2
    assert "NUL" in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_a_stopped_command_says_so(stop, code, capsys):
    assert fails(stop) == code
    assert capsys.readouterr().err.strip() == "stopped; run the same command to resume"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_reader_of_stdout_that_went_away_and_a_full_disk_behind_it(number, capsys, monkeypatch):
    class Gone:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None:
            raise OSError(number, os.strerror(number))

        def fileno(self) -> int:
            raise OSError("no file")

    group = click.Group(commands={"go": click.Command("go", callback=lambda: print("a line"))})
    monkeypatch.setattr(sys, "stdout", Gone())
    code = run_command(group, ["go"])
    assert code == {errno.EPIPE: 128 + signal.SIGPIPE, errno.ENOSPC: 75}[number]
    err = capsys.readouterr().err
    assert err == "" if number == errno.EPIPE else "No space left on device: standard output" in err


def test_a_pipe_of_ones_own_that_broke_is_no_reader_of_stdout(capsys):
    assert fails(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (command.text, ""),
        (command.text, " "),
        (command.text, "\udc80"),
        (command.place, ""),
        (command.path, " "),
    ],
)
def test_an_empty_word_is_refused(kind, value):
    with pytest.raises(click.BadParameter, match="it is"):
        kind(value)
