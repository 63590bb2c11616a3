"""What every benchmark shares: figures taken in alternation, lines with a bar and a verdict, the machine, the file."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from teachercache.core.progress import say

Figures = dict[str, list[float]]
HEAD = ["| what | ours | theirs | ratio | bar | verdict |", "|---|---|---|---|---|---|"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a report."""

    what: str
    ours: str
    theirs: str
    ratio: str = "-"
    bar: str = "-"
    verdict: str = "-"

    def __str__(self) -> str:
        return f"| {self.what} | {self.ours} | {self.theirs} | {self.ratio} | {self.bar} | {self.verdict} |"


def alternate(rounds: int, *, uncounted: int = 1, **actions: Callable[[], float]) -> Figures:
    """Each action's figure, in turn, `rounds` times after `uncounted` rounds that warm up."""
    figures: Figures = {name: [] for name in actions}
    for i in range(rounds + uncounted):
        for name, action in actions.items():
            value = action()
            if i >= uncounted:
                figures[name].append(value)
    return figures


def number(value: float) -> str:
    """A figure to three digits or to the unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def middle(figures: Figures, name: str) -> str:
    """The median figure."""
    return number(statistics.median(figures[name]))


def judge(value: float, bar: str) -> str:
    """Whether a value meets `>= 0.9` or `<= 1.05`; a bar that is neither is no bar."""
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
    """The line of two figures: median ratio with lowest and highest, round by round; `reason`: why no bar applies."""
    ratios = [x / y for x, y in zip(figures[ours], figures[theirs], strict=True)]
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    verdict = f"does not apply: {reason}" if reason else judge(statistics.median(ratios), bar)
    rates = f"{middle(figures, ours)} {unit}", f"{other}, {middle(figures, theirs)} {unit}"
    return Line(what, *rates, ratio, bar, verdict)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak (ru_maxrss has the parent's in it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Processor, cores, accelerator and versions."""
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
    """Print the report and keep it."""
    hardware = (
        torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"{cores()}cpu"
    )
    path = Path("docs/benchmarks", f"{theme}_{hardware}_{datetime.date.today().isoformat()}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# {theme}", "", f"`{' '.join(['python', *sys.argv])}`; {machine()}.", ""]
    path.write_text("\n".join(head + text) + "\n")
    print("\n".join(head[2:] + text))
    say(f"written to {path}")
