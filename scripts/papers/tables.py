"""What a table of a paper is to scripts/reproduce: rows of settings with the paper's figures beside them."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """A column: what the paper measured, what we measure, its key in `student eval`'s JSON, its place in Row.paper."""

    theirs: str
    ours: str
    task: str
    key: str
    place: int


METRICS = (
    Metric("ImageNet top-1", "zero-shot top-1", "zeroshot", "acc1", 0),
    Metric("CC3M I2T R@1", "I2T R@1", "retrieval", "text_retrieval_recall@1", 1),
    Metric("CC3M T2I R@1", "T2I R@1", "retrieval", "image_retrieval_recall@1", 2),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a recipe's constants, and top-1, I2T and T2I of the paper, None where it has none."""

    label: str
    settings: tuple[tuple[str, float | str], ...]
    paper: tuple[float | None, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in the paper's order; `reference` is the one that differences are taken to."""

    title: str
    rows: tuple[Row, ...]
    reference: int
    note: str = ""


def spread(values: Sequence[float]) -> str:
    """Mean, with lowest and highest of several."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"
