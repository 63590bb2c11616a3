"""Decide after each step whether a run saves and whether it stops: by steps, by time and by signals.

- SIGUSR1 saves and goes on.
- SIGTERM and SIGHUP save and stop with exit code 143, SIGINT (Ctrl-C) with 130.

All ranks decide alike: one reduction of a few flags per step.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from student.distributed import any_of_ranks
from student.recipe import Run
from teachercache.core.process import Terminated, rank

TERMINATE = (signal.SIGTERM, signal.SIGHUP)
CAUGHT = (*TERMINATE, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass
class Pauses:
    """The signals that came, and the time of the last checkpoint.

    Args:
        run: Settings of the run.
        steps: Number of steps of the run.
        received: Signals that were not acted upon yet.
        saved: Time of the last checkpoint, or of the start.
        terminated: Whether the signal that stopped the run was SIGTERM or SIGHUP.
    """

    run: Run
    steps: int
    received: list[int] = dataclasses.field(default_factory=list)
    saved: float = dataclasses.field(default_factory=time.monotonic)
    terminated: bool = False

    def after(self, step: int) -> tuple[bool, bool]:
        """Return whether to save after a step, and whether to stop; the same on all ranks."""
        run = self.run
        overdue = run.save_minutes > 0 and time.monotonic() - self.saved >= 60 * run.save_minutes
        interrupted, self.terminated, asked = any_of_ranks(
            (
                signal.SIGINT in self.received,
                any(number in self.received for number in TERMINATE),
                signal.SIGUSR1 in self.received or (overdue and rank() == 0),
            )
        )
        self.received[:] = [number for number in self.received if number != signal.SIGUSR1]
        stop = interrupted or self.terminated
        on_step = run.save_every > 0 and step % run.save_every == 0
        return stop or asked or on_step or step == self.steps, stop

    def have_saved(self) -> None:
        """Count the minutes to the next checkpoint from now on."""
        self.saved = time.monotonic()

    def stop_error(self, step: int, out: Path) -> KeyboardInterrupt:
        """Return the error that ends a run that a signal stopped."""
        kind = Terminated if self.terminated else KeyboardInterrupt
        return kind(f"stopped after step {step}; continue with the same command and --resume --out {out}")

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Collect signals, so that the loop can finish its step first. Ignored ones stay ignored (nohup).

        A training in another thread than the main one gets no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in CAUGHT}
        handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        try:
            for number in handlers:
                signal.signal(number, lambda number, frame: self.received.append(number))
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
