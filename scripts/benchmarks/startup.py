"""Measure how long commands take to print their help, against an empty Python process."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

from scripts.benchmarks.report import HEAD, alternate, compare

COMMANDS = {
    "tc": ["-m", "teachercache", "--help"],
    "tc build": ["-m", "teachercache", "build", "--help"],
    "student": ["-m", "student", "--help"],
    "student train": ["-m", "student", "train", "--help"],
    "student eval": ["-m", "student", "eval", "--help"],
}
EMPTY = "empty"


def timed(arguments: list[str]) -> Callable[[], float]:
    """Return a function that runs Python with the arguments and returns the seconds it takes."""

    def once() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        return time.perf_counter() - begin

    return once


def bench_startup(options: argparse.Namespace) -> list[str]:
    """Return the table of startup times."""
    actions = {name: timed(arguments) for name, arguments in COMMANDS.items()}
    seconds = alternate(options.rounds, actions | {EMPTY: timed(["-c", "pass"])})
    lines = [
        compare(f"{name} --help", seconds, name, EMPTY, unit="s", other="python -c pass") for name in COMMANDS
    ]
    note = "Seconds from the start of the process to its end. tests/student/test_student_cli.py checks the imports."
    return [note, "", *HEAD, *map(str, lines)]
