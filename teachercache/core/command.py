"""Run a command line, and turn errors into exit codes and one `error:` line: the only place that does."""

import contextlib
import errno
import os
import re
import select
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from teachercache.core.errors import MACHINE as MACHINE_ERRNOS
from teachercache.core.errors import UserError, closest, is_machine
from teachercache.core.paths import closest_path
from teachercache.core.process import Terminated
from teachercache.core.progress import printable, write_any_letter

if TYPE_CHECKING:
    import click

DEBUG = "--debug"  # anywhere in a command line: show the traceback of an error

# Exit codes
OURS, MISTAKE, UNFINISHED, MACHINE = 1, 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # as shells count: 128 and the number of the signal

AGAIN = "the same command goes on once that is mended"
LONGEST = 2000  # letters of an error line; a path may have 4096

# What libraries without Python's exceptions write: Rust (safetensors), Arrow, FAISS, torch
_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_WORDS = tuple(
    os.strerror(getattr(errno, name))
    for name in ("ENOSPC", "EIO", "EDQUOT", "EFBIG", "EROFS", "ESTALE", "ENOMEM", "EMFILE", "ENFILE")
    if hasattr(errno, name)
)
_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_KILLED = re.compile(
    r"DataLoader worker \(pid.* (is killed by signal: (Bus error|Killed)|exited unexpectedly)"
)
# torch raises the error of a worker process again as the same type, with the worker's traceback as its text
_WORKER = re.compile(r"Caught (\w+) in [^\n]*\.\s+Original Traceback")


def run_command(group: "click.Group", args: list[str] | None = None) -> int:
    """Run a click group and return its exit code.

    One `error:` line, and:

    - 2 for a mistake of the user: a UserError, a wrong option, a path that does not exist or that is of another kind;
    - 75 for an error of the machine (a full disk, a mount that is away, too little memory), after which the same
      command goes on;
    - 1 for any other error, which is a fault of this program. --debug anywhere in the command line shows the
      traceback.

    Ctrl-C returns 130, SIGTERM 143, and a reader of stdout that went away (`| head`) 141, without an error line.
    """
    import click

    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # threads that spin starve the decoding processes (LOG.md)
    write_any_letter()
    words, debug = _without_debug(sys.argv[1:] if args is None else args)
    try:
        return _run(group, words)
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message(), file=sys.stderr)
        return MISTAKE
    except click.exceptions.Exit as left:  # --help
        return left.exit_code
    except (KeyboardInterrupt, click.Abort) as stopped:
        print(printable(stopped) or "stopped; run the same command to resume", file=sys.stderr)
        return TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
    except Exception as error:
        return _failed(error, debug)


def _run(group: "click.Group", words: list[str]) -> int:
    if any("\0" in word for word in words):
        raise UserError("the command line has a NUL character: no path or name has one")
    if f"_{str(group.name).upper()}_COMPLETE" in os.environ:
        group.main(words, prog_name=group.name)  # a shell asks what may follow; leaves with SystemExit
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in group.commands:
        names = ", ".join(group.commands)
        raise UserError(f"No such command '{first}': {closest(first, group.commands)}choose from {names}")
    # Not `group.main`: it ends the process in silence on EPIPE of any file, and takes EOFError for Ctrl-D
    with group.make_context(group.name, list(words), obj=words) as context:
        result = group.invoke(context)
    if sys.stdout is not None:  # None where the shell closed it
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not at the exit of the process
    return result if isinstance(result, int) else 0


def text(value: str) -> str:
    """Return the text of an option or argument: the `type` of click for names, keys, texts and questions.

    Raises:
        click.BadParameter: It is empty, or holds bytes that are no UTF-8.
    """
    import click

    if not value.strip():
        raise click.BadParameter("it is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise click.BadParameter("it is not UTF-8")
    return value


def place(value: str) -> str:
    """Return what an option or argument names as a path, a URL or several of them: a `type` of click.

    Raises:
        click.BadParameter: It is empty.
    """
    import click

    if not value.strip():
        raise click.BadParameter("it is empty")
    return value


def path(value: str) -> Path:
    """Return the local path of an option or argument: a `type` of click; raise BadParameter if it is empty."""
    return Path(place(value))


def _without_debug(args: list[str]) -> tuple[list[str], bool]:
    """Return the arguments without --debug, and whether it stood before a `--`."""
    end = args.index("--") if "--" in args else len(args)
    return [word for word in args[:end] if word != DEBUG] + args[end:], DEBUG in args[:end]


def _failed(error: Exception, debug: bool) -> int:
    """Print the line of an error, and its traceback with --debug; return the exit code."""
    if (
        isinstance(error, OSError)
        and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO)
        and _stdout_is_gone()
    ):
        if error.errno == errno.EPIPE:
            return BROKEN_PIPE
        error = OSError(error.errno, error.strerror, error.filename or "standard output")
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    code, message = explained(error)
    message = printable(" ".join(message.split()))
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    print(f"error: {message}", file=sys.stderr)
    return code


def _stdout_is_gone() -> bool:
    """Return whether stdout takes no more; what it holds back is dropped, or it would fail again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return True
    with contextlib.suppress(OSError):  # without a buffer, a pipe alone tells
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def explained(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error, and the line that a person reads."""
    import click

    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return MISTAKE, f"{error.format_message()}{hint}"
    words = _words_of(error)
    if _failed_machine(error):
        words = words or type(error).__name__
        return MACHINE, words if "same command" in words else f"{words}: {AGAIN}"
    if isinstance(error, UserError):
        return MISTAKE, words
    if isinstance(error, OSError):
        return MISTAKE, words or type(error).__name__
    kind = type(error).__name__
    return (
        OURS,
        f"this is a fault of teachercache: {kind}: {words}: run it again with {DEBUG} for the traceback",
    )


def _words_of(error: BaseException) -> str:
    """Return the words of an error: of an OSError with its file, of a worker process without the traceback."""
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if isinstance(error, FileNotFoundError) and len(names) == 1 and (hint := closest_path(names[0])):
            return f"{error.strerror}: {names[0]}: {hint.strip()}"
        return ": ".join([error.strerror, " -> ".join(names)] if names else [error.strerror])
    text = str(error)
    found = _WORKER.match(text)
    if found:
        # The last line that begins with the type: causes come before it
        starts = list(re.finditer(rf"^(?:[\w.]+\.)?{found[1]}(?:: |$)", text, re.MULTILINE))
        text = text[starts[-1].end() :] if starts else text.splitlines()[-1]
    return text


def _failed_machine(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, is one of the machine.

    Libraries hide the error of the system in an exception of their own, and a worker process in its text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if is_machine(seen) or (not isinstance(seen, UserError) and _reads_as_machine(seen)):
            return True
        seen = seen.__cause__
    return False


def _reads_as_machine(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return False  # `is_machine` has seen its number
    text = str(error)
    numbers = {int(number) for found in _NUMBER.findall(text) for number in found if number}
    if numbers & MACHINE_ERRNOS or _KILLED.search(text):
        return True
    if isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError":
        return any(words.lower() in text.lower() for words in (*_WORDS, *_MEMORY))
    return False
