"""Errors by kind, and names of objects that users type.

- data: a row that cannot be used is quarantined with its reason (`BadSample` in `data/sample.py`).
- machine: a full disk, a mount that is away, too little memory (`MachineError`, or an OSError of `is_machine`): the
  command stops with one line that names the file, and the same command goes on.
- mistake: `UserError`; one line says what to type.
- theirs: a function of another package failed (`calling`): a UserError that names the function.
- ours: every other exception is a fault of this program: one line, and the traceback with --debug.

`command.py` turns them into exit codes.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user. The message is one line that ends with what to type; commands print it and exit
    with 2.
    """


OUR_PACKAGES = ("teachercache", "evaluation", "student", "scripts")


class MachineError(OSError):
    """The machine failed, not the data and not the user: the message names the file. The same command goes on."""


# Errors that say nothing about the file itself: it may be whole, and reachable in a minute
MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "ESTALE",
        "ETIMEDOUT",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "EAGAIN",
        "EINTR",
        "EBUSY",
        "ENOLCK",
        "ENODEV",
        "ENXIO",
        "EREMOTEIO",
        "ENOTCONN",
        "ECONNABORTED",
        "ECONNREFUSED",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ESHUTDOWN",
    )
    if hasattr(errno, name)
)


def is_machine(error: BaseException) -> bool:
    """Return whether an error is one of the machine, so that the same command may succeed later."""
    if isinstance(error, MachineError | MemoryError):
        return True
    return isinstance(error, OSError) and error.errno in MACHINE


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed: Python's and numpy's, or torch's on the CPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextlib.contextmanager
def calling(what: str, function: object) -> Iterator[None]:
    """Turn an exception of another package's function into a UserError that names it; --debug shows its traceback.

    Our own exceptions, errors of the system and too little memory pass unchanged, and so does every exception of a
    function of ours.

    Args:
        what: The start of the message: the object that the other package defines, and the function.
        function: The function that is called.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        ours = is_ours(function) or is_ours(type(error))
        if ours or is_machine(error) or lacks_memory(error):
            raise
        text = " ".join(str(error).split())
        raise UserError(
            f"{what} raised {type(error).__name__}{f': {text}' if text else ''} (--debug shows where): mend it there"
        ) from error


def name_of(function: object) -> str:
    """Return the name under which a function, or the class of another callable, is defined: mine.teachers.view."""
    named = function if isinstance(function, types.FunctionType) else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def is_ours(value: object) -> bool:
    """Return whether a function or a class is defined in one of our packages."""
    defined = value.func if isinstance(value, functools.partial) else value
    return str(defined.__module__).partition(".")[0] in OUR_PACKAGES


def closest(name: str, choices: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return "did you mean 'x'? " with the choice most similar to a name, or an empty string."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f"did you mean '{matches[0]}'? " if matches else ""


def resolve(name: str, table: Mapping[str, Any], *, kind: str) -> Any:
    """Return the entry of a table, or import the object at "package.module:attr".

    Raises:
        UserError: There is no such entry or object; the message contains the choices.
    """
    if name in table:
        return table[name]
    module_name, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in module_name.split(".")):
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever the module runs when it is imported
            words = " ".join(str(error).split())
            raise UserError(f"cannot import {kind} '{name}': {type(error).__name__}: {words}") from error
    raise UserError(f"unknown {kind} '{name}': {closest(name, table)}choose from {', '.join(table)}")
