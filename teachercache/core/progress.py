"""Messages and progress bars on stderr, and text of foreign origin (captions, keys, file names) on any terminal.

Such text may hold escape sequences that recolor, retitle or clear a terminal, and letters that the terminal's
encoding lacks.
"""

import contextlib
import contextvars
import io
import re
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

from teachercache.core.process import rank

# C0 and C1 controls (ESC, BEL, CR, ...), line separators, embeddings, overrides and isolates of bidirectional text,
# and halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return the text of an object on one line, with control characters written as escapes such as \x1b."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def printable_lines(text: object) -> str:
    """Return the text of an object as `printable` does, with its line breaks."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def show(*words: object) -> None:
    """Print lines for a person to stdout. Not for JSON, whose escapes are its own."""
    print(printable_lines(" ".join(map(str, words))))


def write_any_letter() -> None:
    """Make stdout and stderr write letters that their encoding lacks as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # a stream that is closed
                stream.reconfigure(errors="backslashreplace")


LONG = 10.0  # seconds between two lines of progress where there is no terminal
# Of the current context alone: two threads may differ
_QUIET = contextvars.ContextVar("quiet", default=False)
_LIVE = contextvars.ContextVar("live", default=False)  # whether a bar or a status line is shown


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print neither progress nor notices; warnings and errors remain."""
    with _set(_QUIET, True):
        yield


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def say(*words: object) -> None:
    """Print a line to stderr on rank 0; stdout stays reserved for the output of a command."""
    line = " ".join(map(str, words))
    if rank() == 0 and (not _QUIET.get() or line.startswith("WARNING")):
        print(printable_lines(line), file=sys.stderr, flush=True)


def suggest(*argv: object) -> None:
    """Print the command to type next, quoted for a shell."""
    say(f"next: {shlex.join(map(str, argv))}")


def _shows_bars() -> bool:
    return rank() == 0 and not _QUIET.get() and not _LIVE.get() and sys.stderr.isatty()


@contextlib.contextmanager
def status(title: str) -> Iterator[None]:
    """Show what is being done: a status line on a terminal, and a line with the seconds if it took long.

    Do not start processes inside: the line is drawn by a thread.
    """
    start = time.monotonic()
    if _shows_bars():
        from rich.console import Console
        from rich.text import Text

        with _set(_LIVE, True), Console(stderr=True).status(Text(f"{printable(title)} ...")):
            yield
    else:
        yield
    seconds = time.monotonic() - start
    if seconds > LONG:
        say(f"{title}: {seconds:.0f} s")


class Ticker:
    """Progress with a rate and an ETA: a rich bar on a terminal, otherwise a plain line every few seconds."""

    def __init__(self, total: int, unit: str, *, every: float = LONG) -> None:
        self.total, self.unit, self.every = total, unit, every
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self.bar: Any = None  # a rich Progress on a terminal
        self.task: Any = None

    def step(self, count: int, note: str = "") -> None:
        """Count `count` more units; show `note` after the rate."""
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        if self.bar is not None:
            self.bar.update(
                self.task, completed=self.done, rate=f"{rate:,.1f} {self.unit}/s", note=printable(note)
            )
        elif now - self.last >= self.every:
            self.last = now
            minutes, seconds = divmod(round(left), 60)
            say(
                f"{self.done:,}/{self.total:,} {self.unit}  {rate:,.1f} {self.unit}/s  "
                f"{minutes}:{seconds:02d} left  {note}".rstrip()
            )


@contextlib.contextmanager
def ticker(total: int, unit: str, title: str) -> Iterator[Ticker]:
    """Yield a Ticker that is shown on rank 0."""
    tick = Ticker(total, unit)
    if _shows_bars():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        def whole(width: int = 0) -> Column:
            return Column(no_wrap=True, min_width=width)  # a narrow terminal shortens the note, not these

        title = printable(title)
        columns = (  # titles and notes may have names of files, whose brackets are no markup
            TextColumn("{task.description}", markup=False, table_column=whole(len(title))),
            BarColumn(20),
            MofNCompleteColumn(table_column=whole(2 * len(str(total)) + 1)),
            TextColumn("{task.fields[rate]}", markup=False, table_column=whole(len(unit) + 6)),
            TimeRemainingColumn(table_column=whole(7)),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
        )
        with _set(_LIVE, True), Progress(*columns, console=Console(stderr=True)) as tick.bar:
            tick.task = tick.bar.add_task(title, total=total, rate="", note="")
            yield tick
    else:
        yield tick


@contextlib.contextmanager
def quiet_transformers(*, hints: bool = False) -> Iterator[None]:
    """Hide the progress bars of transformers, and its hints unless `hints`; put back what the process had chosen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if not hints:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
