"""Disturb a command at one of its writes, run it again, and judge what is left."""

import collections
import dataclasses
import random
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from scripts.benchmarks.faults.client import COUNT, Ended, Event, Fault, Warm
from scripts.benchmarks.faults.compare import Tree, differences, leftovers, tree_of
from scripts.benchmarks.faults.jobs import JOBS, must, prepare, restore, words_of

FAULTS = ("kill", "torn", "enospc", "eio")
MACHINE = 75
# What can be wrong after an event
WRONG = ("traceback", "error lines", "exit code", "hangs", "dead end", "other result", "leftover")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fault led to.

    Attributes:
        job: The command.
        fault: The fault.
        event: The write that failed, as text.
        first: The exit code of the disturbed command.
        again: The exit code of the command that followed.
        wrong: What is wrong, by the words of WRONG, with details.
    """

    job: str
    fault: Fault
    event: str
    first: int | str
    again: int | str
    wrong: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A prepared job: what is there before it, its events, and what two undisturbed runs of it leave."""

    name: str
    before: Path
    events: tuple[Event, ...]
    expected: Tree
    again: Tree


def plan_for(warm: Warm, name: str, *, twice: bool = True) -> Plan:
    """Prepare a job and run it undisturbed; twice, to learn which files hold times."""
    job = JOBS[name]
    before = prepare(warm, job)
    ended = must(warm, job.words, COUNT)
    expected = tree_of(warm.root)
    if not twice:
        return Plan(name, before, ended.events, expected, {})
    restore(warm, before)
    must(warm, job.words)
    return Plan(name, before, ended.events, expected, tree_of(warm.root))


def faults_of(events: Sequence[Event], kind: str) -> list[int]:
    """Return the numbers of the events at which a kind of fault differs from the others."""
    if kind == "torn":
        return [i for i, event in enumerate(events, 1) if event.name == "write"]
    if kind == "enospc":
        return [i for i, event in enumerate(events, 1) if event.grows]
    return list(range(1, len(events) + 1))


def chosen(numbers: list[int], every: int, draw: random.Random) -> list[int]:
    """Return one number of each `every` that follow each other, at random; the first and the last always."""
    if every == 1 or len(numbers) < 3:
        return numbers
    drawn = {draw.choice(numbers[i : i + every]) for i in range(0, len(numbers), every)}
    return sorted(drawn | {numbers[0], numbers[-1]})


def problems_of_first(ended: Ended, kind: str) -> dict[str, str]:
    """Judge the disturbed command: no traceback, one `error:` line, and the exit code of the machine's errors."""
    wrong = {}
    last = next((line for line in reversed(ended.output.splitlines()) if line.strip()), "")
    if ended.is_traceback:
        wrong["traceback"] = last
    if ended.code == "hangs":
        wrong["hangs"] = last
    elif kind in ("enospc", "eio") and ended.code != 0:
        if len(ended.errors) != 1:
            wrong["error lines"] = f"{len(ended.errors)}: {last}"
        if ended.code != MACHINE:
            wrong["exit code"] = f"{ended.code}: {last}"
    return wrong


def go_on(warm: Warm, text: str) -> Ended:
    """Run the command again; with --resume if its message names that option."""
    words = words_of(warm, text)
    ended = warm.run(words)
    if ended.code != 0 and "--resume" in ended.output and "--resume" not in words:
        ended = warm.run([*words, "--resume"])
    return ended


def event_at(events: Sequence[Event], kind: str, share: float) -> int:
    """Return the number of the event at a share (0 to 1) of a command's course where a kind of fault applies."""
    numbers = faults_of(events, kind)
    return numbers[round(share * (len(numbers) - 1))]


def disturb(warm: Warm, plan: Plan, fault: Fault) -> Outcome:
    """Run the job with a fault, then again, and judge both."""
    text = JOBS[plan.name].words
    restore(warm, plan.before)
    first = warm.run(words_of(warm, text), fault)
    event = f"{first.hit.name} {first.hit.path}" if first.hit else "not reached"
    wrong = problems_of_first(first, fault.kind)
    again = go_on(warm, text)
    if again.is_traceback:
        wrong["traceback"] = f"again: {again.output.strip().splitlines()[-1]}"
    if again.code != 0:
        wrong["dead end"] = (again.errors or again.output.strip().splitlines() or [str(again.code)])[-1]
    else:
        tree = tree_of(warm.root)
        if changed := differences(tree, plan.expected, plan.again):
            wrong["other result"] = ", ".join(changed)
        if left := leftovers(tree, plan.expected):
            wrong["leftover"] = ", ".join(left)
    return Outcome(plan.name, fault, event, first.code, again.code, wrong)


def sweep(
    warm: Warm,
    names: Sequence[str],
    kinds: Sequence[str],
    *,
    every: int,
    seed: int,
    known: Collection[tuple[str, Fault]] = (),
) -> Iterator[Outcome]:
    """Disturb commands by every kind of fault at every event, or at one of `every`, but not as it is `known`."""
    for name in names:
        plan = plan_for(warm, name)
        for kind in kinds:
            draw = random.Random(f"{seed} {name} {kind}")
            for at in chosen(faults_of(plan.events, kind), every, draw):
                if (name, Fault(kind, at)) not in known:
                    yield disturb(warm, plan, Fault(kind, at))


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a Markdown table with a line for each command and kind of fault."""
    groups: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.job, outcome.fault.kind].append(outcome)
    lines = [
        f"| command | fault | events | {' | '.join(WRONG)} |",
        "|---|---|---" + "|---" * len(WRONG) + "|",
    ]
    for (job, kind), group in groups.items():
        counts = [sum(what in outcome.wrong for outcome in group) for what in WRONG]
        lines.append(f"| {job} | {kind} | {len(group)} | {' | '.join(map(str, counts))} |")
    return lines
