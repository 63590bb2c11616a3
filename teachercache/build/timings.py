"""How fast each stage of a build is, for the progress line and `<cache>/build.log`. Times live there and nowhere else.

Not for deciding anything: a build that is measured writes the same bytes as one that is not.
"""

import datetime
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from teachercache.cache.store import Cache
from teachercache.core.paths import is_url
from teachercache.core.process import rank

LOG = "build.log"


class Stages:
    """Seconds and rows of decode (over all workers), forward and write, and what the teacher waited for pictures."""

    def __init__(self, cache: Cache, workers: int):
        self.cache, self.workers = cache, max(workers, 1)
        self.rows = dict.fromkeys(("decode", "forward", "write"), 0)
        self.seconds = dict.fromkeys(("decode", "forward", "write", "waited"), 0.0)
        self.start = time.perf_counter()

    def add(self, stage: str, seconds: float, rows: int) -> None:
        """Count what one batch or block took."""
        self.seconds[stage] += seconds
        self.rows[stage] += rows

    def waited(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches as they come, with the time that the teacher waited for them."""
        begin = time.perf_counter()
        for batch in batches:
            self.seconds["waited"] += time.perf_counter() - begin
            self.add("decode", batch["seconds"] / self.workers, len(batch["key"]))
            yield batch
            begin = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """Rows a second of each stage by itself."""
        return {
            name: round(self.rows[name] / self.seconds[name], 1) for name in self.rows if self.seconds[name]
        }

    def line(self) -> str:
        """The rates in words."""
        return ", ".join(f"{name} {rate:,.0f}/s" for name, rate in self.rates().items())

    def log(self, block: int, rows: int) -> None:
        """A line in build.log: when, which block, rates until now; nothing where the cache is at a URL."""
        if is_url(self.cache.path):
            return
        passed = time.perf_counter() - self.start
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        waited = round(self.seconds["waited"] / passed, 3)
        entry = {"time": now, "rank": rank(), "block": block, "rows": rows, **self.rates(), "waited": waited}
        with open(self.cache.path / LOG, "a") as file:
            file.write(json.dumps(entry) + "\n")
