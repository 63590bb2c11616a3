"""Errors by kind, and names of objects that users type.

- data: a row that cannot be used is quarantined with its reason (`BadSample` in `data/sample.py`).
- machine: a full disk, a mount that is away, too little memory (`MachineError`, or an OSError of `is_machine`): the
  command stops with one line that names the file, and the same command goes on.
- mistake: `UserError`; one line says what to type.
- ours: every other exception is a fault of this program: one line, and the traceback with --debug.

`command.py` turns them into exit codes.
"""

import difflib
import errno
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user. The message is one line that ends with what to type; commands print it and exit
    with 2.
    """


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
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot import {kind} '{name}': {error}") from error
    raise UserError(f"unknown {kind} '{name}': {closest(name, table)}choose from {', '.join(table)}")
