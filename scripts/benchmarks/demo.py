"""Time scripts/demo: its stages in new clones with this environment, and a second run, which reuses everything.

The first run of a clone downloads the pictures, too. Nothing else may run on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.demo import TIMES
from teachercache.core.progress import say

BARS = {"search": 120, "all": 480, "again": 40}  # seconds
NAMES = {"search": "the first search result", "all": "all three stages", "again": "a second run"}


def bench_demo(options: argparse.Namespace) -> list[str]:
    """Return the report."""
    runs = []
    for number in range(1, options.demo_runs + 1):
        with tempfile.TemporaryDirectory(prefix="demo-") as folder:
            runs.append(time_demo(Path(folder, "clone")))
        say(f"run {number} of {options.demo_runs}: {runs[-1]}")
    return [*table(runs), "", sentence(runs)]


def time_demo(clone: Path) -> dict[str, float]:
    """Run the demo twice in a new clone and return the seconds of its stages, of all, and of the second run."""
    subprocess.run(["git", "clone", "--quiet", Path.cwd(), clone], check=True)
    words = [sys.executable, "-m", "scripts.demo"]
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(words, cwd=clone, env=environment, check=True)
    (call,) = json.loads((clone / TIMES).read_text())
    begin = time.monotonic()
    subprocess.run(words, cwd=clone, env=environment, check=True)
    seconds = call["seconds"]
    return {**seconds, "all": sum(seconds.values()), "again": time.monotonic() - begin}


def table(runs: list[dict[str, float]]) -> list[str]:
    """Return a Markdown table with a line for each run and the bars."""
    lines = [f"| run | {' | '.join(runs[0])} |", "|---" * (len(runs[0]) + 1) + "|"]
    for number, run in enumerate(runs, 1):
        lines.append(f"| {number} | {' | '.join(f'{seconds:.0f} s' for seconds in run.values())} |")
    bars = (f"{BARS[name]} s" if name in BARS else "" for name in runs[0])
    return [*lines, f"| bar | {' | '.join(bars)} |"]


def sentence(runs: list[dict[str, float]]) -> str:
    """Return the sentence of the README: medians, and ranges in parentheses."""
    parts = []
    for key, name in NAMES.items():
        seconds = [run[key] for run in runs]
        parts.append(
            f"{name} took {statistics.median(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f})"
        )
    first, whole, again = parts
    return f"On two CPU cores {first}, {whole}, {again}."
