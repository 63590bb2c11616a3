"""Measure the speed of each stage of a build, for the progress line and `<cache>/build.log`."""

import contextlib
import datetime
import json
import time
from collections.abc import Iterable, Iterator

from teachercache.build.decode import Batch
from teachercache.cache.store import Cache
from teachercache.core.paths import is_url
from teachercache.core.process import rank

LOG = "build.log"


class Stages:
    """Seconds and rows of decode (over all workers), forward and write, and how long the teacher waited for batches."""

    def __init__(self, cache: Cache, workers: int) -> None:
        self.cache, self.workers = cache, max(workers, 1)
        self.rows = dict.fromkeys(("decode", "forward", "write"), 0)
        self.seconds = dict.fromkeys(("decode", "forward", "write", "waited"), 0.0)
        self.start = time.perf_counter()

    def add(self, stage: str, seconds: float, rows: int) -> None:
        """Add the time of one batch or block."""
        self.seconds[stage] += seconds
        self.rows[stage] += rows

    def waited(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and measure how long each one is waited for."""
        begin = time.perf_counter()
        for batch in batches:
            self.seconds["waited"] += time.perf_counter() - begin
            self.add("decode", batch["seconds"] / self.workers, len(batch["key"]))
            yield batch
            begin = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """Return the rows per second of each stage."""
        return {
            name: round(self.rows[name] / self.seconds[name], 1) for name in self.rows if self.seconds[name]
        }

    def line(self) -> str:
        """Return the rates as one line."""
        return ", ".join(f"{name} {rate:,.0f}/s" for name, rate in self.rates().items())

    def log(self, block: int, rows: int) -> None:
        """Append a line to build.log: time, block, rates so far. A cache at a URL has no log."""
        if is_url(self.cache.path):
            return
        passed = time.perf_counter() - self.start
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        waited = round(self.seconds["waited"] / passed, 3)
        entry = {"time": now, "rank": rank(), "block": block, "rows": rows, **self.rates(), "waited": waited}
        with contextlib.suppress(OSError), open(self.cache.path / LOG, "a") as file:  # a log stops no build
            file.write(json.dumps(entry) + "\n")
