"""Decoding processes of torch's DataLoader: how many there are, how they hand over tensors, how their errors arrive."""

import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import AuthenticationError
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from teachercache.core.errors import MACHINE, MachineError
from teachercache.core.process import cores
from teachercache.core.progress import say

SHARED_MEMORY = Path("/dev/shm")
LEAST_LIMIT, PER_CORE = 16, 4  # more decoding processes than this only take memory
BATCHES_OF_A_WORKER = (
    2  # a worker writes one batch while the thread that sends the one before still copies it
)


class Piped(NamedTuple):
    """A batch that goes through a pipe: it has an `Array` in the place of each tensor."""

    batch: Any


def limited(workers: int) -> int:
    """Return a number of workers that this machine can run: the wanted one, or the largest."""
    most = max(LEAST_LIMIT, PER_CORE * cores())
    if workers > most:
        say(f"{workers} workers are more than {cores()} cores can use: {most} are started")
    return min(workers, most)


def start_method(workers: int) -> str | None:
    """Return how a DataLoader starts its workers, whatever the method of the process that calls us.

    Datasets hold what cannot be pickled: functions of recipes, open files. The default is no longer "fork" from
    Python 3.14 on.
    """
    return "fork" if workers else None


# ----------------------------------------------------------------------------------------------------
# Tensors


def hand_over(workers: int, prepare: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """Return the `collate_fn` of a DataLoader whose batches `received` reads.

    Tensors go through shared memory, which takes no copy. Where it has no room for the batches of all workers (64 MB
    in Docker's default), torch would wait for ever or die of SIGBUS; such batches go through a pipe.

    Args:
        workers: The number of workers.
        prepare: Called with what the dataset returned; None to leave it as it is.
    """
    return functools.partial(_pack, workers, prepare)


def _pack(workers: int, prepare: Callable[[Any], Any] | None, batch: Any) -> Any:
    import torch

    batch = batch if prepare is None else prepare(batch)
    sizes: list[int] = []
    _mapped(batch, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    if not workers or sum(sizes) * workers * BATCHES_OF_A_WORKER <= shared_memory():
        return batch
    return Piped(_mapped(batch, torch.Tensor, lambda tensor: Array(tensor.numpy())))


def shared_memory() -> int:
    """Return the free bytes of the shared memory, 0 if there is none or if it cannot be written."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize if os.access(SHARED_MEMORY, os.W_OK) else 0


class Array(NamedTuple):
    """The values of a tensor, as opposed to an array that the batch itself holds."""

    values: Any


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a batch with every value of a kind changed, inside of mappings, lists and tuples too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(inner, kind, change) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [_mapped(part, kind, change) for part in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


# ----------------------------------------------------------------------------------------------------
# Batches and errors


def received(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a DataLoader whose `collate_fn` is that of `hand_over`.

    Raises:
        MachineError: A worker died, or the machine failed in one.
        Exception: What a worker raised, with its own message alone.
    """
    import torch

    waiting = iter(batches)
    try:
        while True:
            with report_deaths(RuntimeError, ConnectionError, EOFError):
                try:
                    batch = next(waiting)
                except StopIteration:
                    return
                except Exception as error:
                    traceback.clear_frames(error.__traceback__)
                    arrived = _as_raised(error)
                    if arrived is error:
                        raise
                    raise arrived from error
            if isinstance(batch, Piped):
                batch = _mapped(batch.batch, Array, lambda array: torch.from_numpy(array.values))
            yield batch
    finally:
        # Ends the workers now: torch waits five seconds for each if the garbage collection ends them
        del waiting


def _as_raised(error: Exception) -> Exception:
    """Return the error that a worker raised, without the traceback that torch puts into its message."""
    text, name = str(error), type(error).__name__
    if "in DataLoader worker process" not in text:
        return error
    # The last line that begins with the type: causes come before it
    starts = [match.end() for match in re.finditer(rf"^(?:[\w.]+\.)?{name}(?:: |$)", text, re.MULTILINE)]
    message = text[starts[-1] :].strip() if starts else text.splitlines()[-1]
    if isinstance(error, MemoryError):
        return MachineError("a decoding process has too little memory: try fewer workers or a smaller batch")
    number = re.match(r"\[Errno (\d+)\] (.*)", message, re.DOTALL)
    if isinstance(error, OSError) and number is not None:
        kind = MachineError if int(number[1]) in MACHINE else OSError
        return kind(number[2])
    return type(error)(message)


@contextlib.contextmanager
def report_deaths(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the exceptions by which torch reports a dead worker process into a MachineError."""
    try:
        yield
    except kinds as error:
        if not is_death(error):
            raise
        raise MachineError(
            "a decoding process died (killed, or out of memory): run the same command again, it goes on; "
            "try fewer workers"
        ) from error


def is_death(error: Exception) -> bool:
    """Return whether an error means that a worker died: torch's message, or a connection that broke off."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    # A living worker raised the others: torch puts its traceback before their message, `received` takes it away
    return "in DataLoader worker process" not in f"{error} {error.__cause__}"


def ignore_interrupt(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group: the parent ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _ignore_closed_connections  # called by the thread that hands over tensors


def _ignore_closed_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print nothing about connections that the parent closed when it was stopped."""
    if not issubclass(kind, (OSError, EOFError, AuthenticationError)):
        sys.__excepthook__(kind, error, trace)
