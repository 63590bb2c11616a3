"""`bash scripts/bench faults`: disturb every command, flip bits, and write the figures.

bash scripts/bench faults                             every event of every command, and flips: two hours on one core
bash scripts/bench faults --command build --kind kill --every 10
bash scripts/bench faults --journal F                 the same command goes on after F's events; several may share it
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from scripts.benchmarks.faults.client import Fault, Warm, warm_process
from scripts.benchmarks.faults.flips import TARGETS, Flip, flip_table, flips
from scripts.benchmarks.faults.inject import FAULTS, Outcome, sweep, table
from scripts.benchmarks.faults.jobs import JOBS, make_inputs
from scripts.benchmarks.faults.minutes import random_kills
from teachercache.core.progress import say

KINDS = (*FAULTS, "flip")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `faults`."""
    parser.add_argument(
        "--command", choices=list(JOBS), nargs="+", default=list(JOBS), help="`faults`: commands"
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="`faults`: kinds")
    parser.add_argument("--every", type=int, default=1, help="`faults`: disturb one of N events")
    parser.add_argument("--seed", type=int, default=0, help="`faults`: which of them")
    parser.add_argument("--flips", type=int, default=4, help="`faults`: flipped bits per file")
    parser.add_argument(
        "--target", choices=list(TARGETS), nargs="+", default=list(TARGETS), help="`faults`: files"
    )
    parser.add_argument("--minutes", type=float, default=0, help="`faults`: only kill at random for so long")
    parser.add_argument("--journal", type=Path, help="`faults`: append every event, skip those there")


def is_whole(options: argparse.Namespace) -> bool:
    """Return whether everything is disturbed, so that the report is written to docs/benchmarks."""
    everything = (
        options.command == list(JOBS) and options.target == list(TARGETS) and options.kind == list(KINDS)
    )
    return bool(options.minutes) or (options.every == 1 and everything)


def bench_faults(options: argparse.Namespace) -> tuple[list[str], int]:
    """Return the report and how many things are wrong."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, warm_process(Path(folder)) as warm:
        make_inputs(warm)
        if options.minutes:
            return random_kills(warm, options.minutes, options.seed)
        outcomes = disturb_all(warm, options)
        flipped = flip_all(warm, options) if "flip" in options.kind else []
    wrong = [outcome for outcome in outcomes if outcome.wrong], [flip for flip in flipped if flip.wrong]
    lines = [f"{len(outcomes)} writes disturbed, {len(wrong[0])} with something wrong.", "", *table(outcomes)]
    lines += [
        "",
        f"{len(flipped)} bits flipped, {len(wrong[1])} with something wrong.",
        "",
        *flip_table(flipped),
    ]
    return lines, len(wrong[0]) + len(wrong[1])


def disturb_all(warm: Warm, options: argparse.Namespace) -> list[Outcome]:
    """Disturb the commands and print what is wrong as it is found."""
    outcomes = read_journal(options.journal)
    kinds = [kind for kind in options.kind if kind in FAULTS]
    known = {(outcome.job, outcome.fault) for outcome in outcomes}
    for outcome in sweep(warm, options.command, kinds, every=options.every, seed=options.seed, known=known):
        group = outcome.job, outcome.fault.kind
        if not outcomes or group != (outcomes[-1].job, outcomes[-1].fault.kind):
            say(" ".join(group))
        outcomes.append(outcome)
        if options.journal:
            with options.journal.open("a") as journal:
                journal.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        if outcome.wrong:
            where = f"{outcome.job} {outcome.fault.kind} {outcome.fault.at} ({outcome.event})"
            say(f"{where}: exit {outcome.first}, then {outcome.again}: {outcome.wrong}")
    jobs = list(JOBS)
    outcomes.sort(key=lambda outcome: (jobs.index(outcome.job), FAULTS.index(outcome.fault.kind)))
    return outcomes


def read_journal(path: Path | None) -> list[Outcome]:
    """Return the outcomes of a journal, none where there is none."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    entries = [json.loads(line) for line in lines]
    return [Outcome(**entry | {"fault": Fault(**entry["fault"])}) for entry in entries]


def flip_all(warm: Warm, options: argparse.Namespace) -> list[Flip]:
    """Flip bits and print what is wrong as it is found."""
    flipped = []
    for flip in flips(warm, options.target, times=options.flips, seed=options.seed):
        flipped.append(flip)
        if flip.wrong:
            say(f"{flip.target} {flip.file} bit {flip.bit}: {flip.wrong}: exit {flip.code}: {flip.said}")
    return flipped
