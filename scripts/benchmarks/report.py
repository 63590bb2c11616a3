"""Helpers of the benchmarks: alternate measurements, format lines with a bar and a verdict, and write the report."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from teachercache.core.progress import say

Figures = dict[str, list[float]]
HEAD = ["| what | ours | theirs | ratio | bar | verdict |", "|---|---|---|---|---|---|"]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a report."""

    what: str
    ours: str
    theirs: str
    ratio: str = "-"
    bar: str = "-"
    verdict: str = "-"

    def __str__(self) -> str:
        return f"| {self.what} | {self.ours} | {self.theirs} | {self.ratio} | {self.bar} | {self.verdict} |"


def alternate(rounds: int, actions: Mapping[str, Callable[[], float]], *, uncounted: int = 1) -> Figures:
    """Measure actions in alternation.

    Args:
        rounds: number of measurements of each action.
        actions: functions that return a measurement, by name.
        uncounted: number of warmup rounds.

    Returns:
        The measurements of each action.
    """
    figures: Figures = {name: [] for name in actions}
    for i in range(rounds + uncounted):
        for name, action in actions.items():
            value = action()
            if i >= uncounted:
                figures[name].append(value)
    return figures


def number(value: float) -> str:
    """Format a measurement with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def middle(figures: Figures, name: str) -> str:
    """Format the median of a measurement."""
    return number(statistics.median(figures[name]))


def judge(value: float, bar: str) -> str:
    """Return "met" or "missed" for a bar such as `>= 0.9` or `<= 1.05`, and "-" if there is no bar."""
    relation, _, limit = bar.partition(" ")
    if relation not in (">=", "<="):
        return "-"
    met = value >= float(limit) if relation == ">=" else value <= float(limit)
    return "met" if met else "missed"


def compare(
    what: str,
    figures: Figures,
    ours: str,
    theirs: str,
    *,
    unit: str,
    other: str,
    bar: str = "-",
    reason: str = "",
) -> Line:
    """Return the line that compares two measurements by their ratio in each round: median and range.

    Args:
        what: title of the line.
        figures: measurements by name.
        ours: name of the first measurement.
        theirs: name of the second measurement.
        unit: unit of both.
        other: title of the second measurement.
        bar: bar of the median ratio, such as `>= 0.9`.
        reason: why the bar does not apply; "" if it does.
    """
    ratios = [x / y for x, y in zip(figures[ours], figures[theirs], strict=True)]
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    verdict = f"does not apply: {reason}" if reason else judge(statistics.median(ratios), bar)
    rates = f"{middle(figures, ours)} {unit}", f"{other}, {middle(figures, theirs)} {unit}"
    return Line(what, *rates, ratio, bar, verdict)


def resident(key: str) -> int:
    """Return the memory of this process in bytes: VmRSS (current) or VmHWM (peak). ru_maxrss includes the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Describe processor, cores, accelerator and versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    devices = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    names = ("torch", "open_clip_torch", "zarr", "numpy", "pyarrow", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    hardware = ", ".join([f"{platform.machine()}, {model}, {cores()} cores", *devices, load])
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def write(theme: str, text: list[str]) -> None:
    """Print the report and write it to docs/benchmarks."""
    hardware = (
        torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"{cores()}cpu"
    )
    path = Path("docs/benchmarks", f"{theme}_{hardware}_{datetime.date.today().isoformat()}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# {theme}", "", f"`{' '.join(['python', *sys.orig_argv[1:]])}`; {machine()}.", ""]
    path.write_text("\n".join(head + text) + "\n")
    print("\n".join(head[2:] + text))
    say(f"written to {path}")
