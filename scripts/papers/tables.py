"""Records of a paper's tables: rows of settings with the published numbers, and how our numbers are measured."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """A column of a table."""

    theirs: str  # what the paper measures
    ours: str  # what we measure
    task: str  # of `student eval`
    key: str  # in the JSON of `student eval`
    column: int  # in Row.paper


METRICS = (
    Metric("ImageNet top-1", "zero-shot top-1", "zeroshot", "acc1", 0),
    Metric("CC3M I2T R@1", "I2T R@1", "retrieval", "text_retrieval_recall@1", 1),
    Metric("CC3M T2I R@1", "T2I R@1", "retrieval", "image_retrieval_recall@1", 2),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings of a recipe with the paper's top-1, I2T and T2I; None if the paper does not report a number."""

    label: str
    settings: tuple[tuple[str, float | str], ...]
    paper: tuple[float | None, float | None, float | None]

    def names(self) -> dict[str, str]:
        """Return the settings of a row whose values are names."""
        return {name: str(value) for name, value in self.settings}

    def numbers(self) -> dict[str, float]:
        """Return the settings of a row whose values are numbers."""
        return {name: float(value) for name, value in self.settings}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in the order of the paper. Differences are relative to the row with index `reference`."""

    title: str
    rows: tuple[Row, ...]
    reference: int
    note: str = ""


Results = Mapping[Row, Sequence[Mapping[str, float]]]  # metrics of each row and seed
Evaluations = (
    Sequence[Sequence[str]] | Mapping[str, Sequence[str]]
)  # arguments of `student eval` after the model

TASKS = [["--task", task] for task in sorted({metric.task for metric in METRICS})]


def default_evaluations(argv: Sequence[str]) -> Evaluations:
    """Return the evaluations of METRICS for every run."""
    return TASKS


def no_preparation(rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> None:
    """Do nothing: the paper's runs need only the data and cache of the demo."""


def all_seeds(row: Row, seeds: Sequence[int]) -> Sequence[int]:
    """Return all seeds for every row."""
    return seeds


@dataclasses.dataclass(frozen=True)
class Paper:
    """How the tables of a paper are reproduced.

    Attributes:
        tables: tables by name.
        argv: returns the arguments of `student train` for a row and a seed, without --out.
        section: returns the Markdown of a table from the results of its rows and the seeds.
        evaluations: returns the arguments of each `student eval` of a run, from the arguments of its training.
        prepare: makes the missing data, teachers and caches for rows and seeds, with a number of parallel jobs.
        seeds_of: returns the seeds of a row.
    """

    tables: Mapping[str, Table]
    argv: Callable[[Row, int], list[str]]
    section: Callable[[Table, Results, Sequence[int]], str]
    evaluations: Callable[[Sequence[str]], Evaluations] = default_evaluations
    prepare: Callable[[Sequence[Row], Sequence[int], int], None] = no_preparation
    seeds_of: Callable[[Row, Sequence[int]], Sequence[int]] = all_seeds


def spread(values: Sequence[float]) -> str:
    """Format the mean of values and, if there are several, their range."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def set_flags(settings: Sequence[str]) -> list[str]:
    """Return `--set` arguments for settings of the form key=value."""
    return [word for setting in settings for word in ("--set", setting)]
