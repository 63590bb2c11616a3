"""Facts about this process: device, precision with its reason, ranks, and how it speaks to a person.

Not for anything that changes what is computed beyond the dtype named here.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from teachercache.names import UserError


class Precision(NamedTuple):
    """A dtype name and why it was chosen."""

    dtype: str
    reason: str


def pick_device(name: str = "auto") -> str:
    """A torch device: the one named, else cuda, else cpu."""
    import torch

    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA device here; try --device cpu")
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name}: not a device; try cpu, cuda or cuda:0") from error
        return name
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def pick_precision(name: str, device: str) -> Precision:
    """The compute dtype: as named, or by the device, with the reason to print."""
    import torch

    named = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if name in named:
        if name == "fp16" and device == "cpu":
            raise UserError("--precision fp16 is not for the CPU: try fp32 or bf16")
        return Precision(named[name], "asked for")
    if name != "auto":
        raise UserError(f"--precision {name}: choose from auto, fp32, bf16, fp16")
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return Precision("bfloat16", "the GPU computes bf16 natively")
        return Precision("float16", "the GPU is older than Ampere")
    return Precision("float32", "the CPU is exact and not slower in fp32")


def rank() -> int:
    """Rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_workers() -> int:
    """Decoding processes: what the machine has beside the one that computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, world_size()) - 1))


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken like Ctrl-C: what is half done is put away, decoding processes end with their builder."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated where SIGTERM would end this process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_memory() -> None:
    """Have glibc keep freed activations for the next batch instead of returning them page by page.

    On the CPU every forward pays for page faults otherwise (LOG.md, "page faults").
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to set
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, ctypes.c_int(-1))


def say(*words: Any) -> None:
    """A line for the person, on stderr and from rank 0 alone, so that stdout stays for machines."""
    if rank() == 0:
        print(*words, file=sys.stderr, flush=True)


class Ticker:
    """Progress with a rate and an ETA: a rich bar on a terminal, a plain line every few seconds otherwise."""

    def __init__(self, total: int, unit: str, *, every: float = 10.0):
        self.total, self.unit, self.every = total, unit, every
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self.bar: Any = None  # a rich Progress on a terminal
        self.task: Any = None

    def step(self, count: int, note: str = "") -> None:
        """Count `count` more units done; `note` is shown behind the rate."""
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=f"{rate:,.1f} {self.unit}/s", note=note)
        elif now - self.last >= self.every:
            self.last = now
            minutes, seconds = divmod(round(left), 60)
            say(
                f"{self.done:,}/{self.total:,} {self.unit}  {rate:,.1f} {self.unit}/s  "
                f"{minutes}:{seconds:02d} left  {note}".rstrip()
            )


@contextlib.contextmanager
def ticker(total: int, unit: str, title: str) -> Iterator[Ticker]:
    """A Ticker that shows itself on rank 0."""
    tick = Ticker(total, unit)
    if rank() == 0 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        def whole(width: int = 0) -> Column:
            return Column(no_wrap=True, min_width=width)  # the note gives way on a narrow terminal, not these

        columns = (
            TextColumn("{task.description}", table_column=whole(len(title))),
            BarColumn(20),
            MofNCompleteColumn(table_column=whole(2 * len(str(total)) + 1)),
            TextColumn("{task.fields[rate]}", table_column=whole(len(unit) + 6)),
            TimeRemainingColumn(table_column=whole(7)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        with Progress(*columns, console=Console(stderr=True)) as tick.bar:
            tick.task = tick.bar.add_task(title, total=total, rate="", note="")
            yield tick
    else:
        yield tick


def run_command(group: Any, args: list[str] | None = None) -> int:
    """Run a click group; one `error:` line and exit 2 for what a user can mend, no traceback."""
    import click

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the decoders (LOG.md)
    try:
        result = group.main(args=args, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        message = f"{error.format_message()}{hint}"
    except UserError as error:
        message = str(error).rsplit("UserError: ")[-1]  # from a worker it comes with its traceback
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
    except (KeyboardInterrupt, click.Abort) as stopped:
        print(
            str(stopped.__cause__ or "") or "stopped; the same command goes on where it left off",
            file=sys.stderr,
        )
        return 143 if isinstance(stopped.__cause__, Terminated) else 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
