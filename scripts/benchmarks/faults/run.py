"""`bash scripts/bench faults`: disturb every command, flip bits, and write the figures.

bash scripts/bench faults                             every event of every command, and flips: about an hour
bash scripts/bench faults --command build --kind kill --every 10
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from scripts.benchmarks.faults.client import Warm, warm_process
from scripts.benchmarks.faults.inject import FAULTS, Outcome, sweep, table
from scripts.benchmarks.faults.jobs import JOBS, make_inputs
from teachercache.core.progress import say


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `faults`."""
    parser.add_argument(
        "--command", choices=list(JOBS), nargs="+", default=list(JOBS), help="`faults`: commands"
    )
    parser.add_argument("--kind", choices=FAULTS, nargs="+", default=list(FAULTS), help="`faults`: kinds")
    parser.add_argument("--every", type=int, default=1, help="`faults`: disturb one of N events")
    parser.add_argument("--seed", type=int, default=0, help="`faults`: which of them")
    parser.add_argument("--json", type=Path, help="`faults`: also write every event as JSON")


def is_whole(options: argparse.Namespace) -> bool:
    """Return whether everything is disturbed, so that the report is written to docs/benchmarks."""
    return options.every == 1 and options.command == list(JOBS) and options.kind == list(FAULTS)


def bench_faults(options: argparse.Namespace) -> tuple[list[str], int]:
    """Return the report and the number of events after which something is wrong."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, warm_process(Path(folder)) as warm:
        make_inputs(warm)
        outcomes = report_each(warm, options)
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1))
    lines = [f"{len(outcomes)} events disturbed, {len(wrong)} with something wrong.", "", *table(outcomes)]
    return lines, len(wrong)


def report_each(warm: Warm, options: argparse.Namespace) -> list[Outcome]:
    """Disturb the commands and print what is wrong as it is found."""
    outcomes = []
    for outcome in sweep(warm, options.command, options.kind, every=options.every, seed=options.seed):
        outcomes.append(outcome)
        if outcome.wrong:
            where = f"{outcome.job} {outcome.fault.kind} {outcome.fault.at} ({outcome.event})"
            say(f"{where}: exit {outcome.first}, then {outcome.again}: {outcome.wrong}")
    return outcomes
