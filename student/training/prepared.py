"""Everything a run holds before its first step."""

from typing import Any, NamedTuple

from student.training.step import TrainStep
from teachercache.cache.store import Cache


class Prepared(NamedTuple):
    """Everything that a run is made of, before its first step."""

    step: TrainStep
    batches: Any  # Batches or TaskBatches
    caches: list[Cache]  # one per teacher
    facts: dict[str, Any] | None = None  # how the student is built again, where it is no TwoTower
    files: dict[str, str] | None = None  # what else the run folder holds
