"""Ten minutes of trainers, builders and a sweeper that are killed at random, and what the same commands then leave."""

import dataclasses
import os
import random
import shutil
import signal
import time

from scripts.benchmarks.faults.client import Ended, Warm
from scripts.benchmarks.faults.compare import Tree, differences, leftovers, tree_of
from scripts.benchmarks.faults.inject import MACHINE, go_on
from scripts.benchmarks.faults.jobs import BUILD, TRAIN, words_of
from teachercache.core.progress import say

BUILDER = BUILD + "{in}/data"
# Longer than in a sweep, so that a trainer lives through several kills
TRAINER = TRAIN.replace("--steps 6", "--steps 30").replace("save_every=2", "save_every=5")
ACTORS = {
    "trainer a": TRAINER.replace("{root}/run", "{root}/a"),
    "second trainer a": TRAINER.replace("{root}/run", "{root}/a"),
    "trainer b": TRAINER.replace("{root}/run", "{root}/b"),
    "builder": BUILDER,
    "second builder": BUILDER,
    "indexer": "tc index {root}/c.zarr",
    "sweeper": "tc verify {root}/c.zarr --samples 0",
}
# In the order in which they come to the end
LAST = ("builder", "indexer", "trainer a", "trainer b", "sweeper")
LIFE = 3.0  # mean seconds until a command is killed
PAUSE = 0.5  # seconds between the end of a command and its next start
ROUND = 40.0  # seconds after which all are brought to their end and compared


@dataclasses.dataclass
class Actor:
    """A command that is started again and again: its process, when it is killed, and when it starts again."""

    name: str
    pid: int = 0
    dies: float = 0.0
    starts: float = 0.0
    resumes: bool = False


@dataclasses.dataclass
class Tally:
    """Starts, kills, ends by exit code, and what went wrong."""

    starts: int = 0
    kills: int = 0
    ends: dict[str, int] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)


def undisturbed(warm: Warm) -> Tree:
    """Run the commands once, in order, and return what they leave."""
    shutil.rmtree(warm.root, ignore_errors=True)
    warm.root.mkdir()
    for name in LAST:
        ended = warm.run(words_of(warm, ACTORS[name]))
        if ended.code != 0:
            raise RuntimeError(f"{name} ends with {ended.code} undisturbed: {ended.output[-2000:]}")
    return tree_of(warm.root)


def start(warm: Warm, actor: Actor, draw: random.Random) -> None:
    """Start the command of an actor and draw its time of death."""
    words = words_of(warm, ACTORS[actor.name]) + ["--resume"] * actor.resumes
    actor.pid = warm.start(words, warm.folder / f"output {actor.name}")
    actor.dies = time.monotonic() + draw.expovariate(1 / LIFE)


def ended_by(warm: Warm, actor: Actor, code: int | str, tally: Tally) -> None:
    """Note how a command ended; a run folder that is there is gone on with the next time."""
    output = (warm.folder / f"output {actor.name}").read_text(errors="replace")
    ended = Ended(code, output)
    tally.ends[f"{actor.name} {code}"] = tally.ends.get(f"{actor.name} {code}", 0) + 1
    actor.pid, actor.starts = 0, time.monotonic() + PAUSE
    if ended.is_traceback or code not in (0, 2, 3, MACHINE, -signal.SIGKILL):
        tally.wrong.append(f"{actor.name}: exit {code}: {(output.strip().splitlines() or [''])[-1]}")
    if "trainer" in actor.name and code == 2:
        actor.resumes = "--resume" in output and not actor.resumes


def disturb_for(warm: Warm, seconds: float, draw: random.Random, tally: Tally) -> None:
    """Start commands and kill them at random until the time is over; then kill all."""
    actors = [Actor(name) for name in ACTORS]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for actor in actors:
            if not actor.pid:
                if time.monotonic() > actor.starts:
                    start(warm, actor, draw)
                    tally.starts += 1
            elif (code := warm.poll(actor.pid)) is not None:
                ended_by(warm, actor, code, tally)
            elif time.monotonic() > actor.dies:
                os.killpg(actor.pid, signal.SIGKILL)
                tally.kills += 1
                ended_by(warm, actor, warm.wait(actor.pid), tally)
        time.sleep(0.02)
    for actor in actors:
        if actor.pid:
            os.killpg(actor.pid, signal.SIGKILL)
            warm.wait(actor.pid)


def judge(warm: Warm, expected: Tree, again: Tree, tally: Tally) -> None:
    """Run the commands to their end and compare what they leave."""
    for name in LAST:
        ended = go_on(warm, ACTORS[name])
        if ended.code != 0 or ended.is_traceback:
            tally.wrong.append(f"dead end: {name}: exit {ended.code}: {ended.output.strip()[-300:]}")
    tree = tree_of(warm.root)
    tally.wrong += differences(tree, expected, again)
    tally.wrong += [f"{name} is left over" for name in leftovers(tree, expected)]


def random_kills(warm: Warm, minutes: float, seed: int) -> tuple[list[str], int]:
    """Disturb all commands at the same time, in rounds that begin with nothing and end with a comparison.

    Returns:
        The report, and how many things were wrong.
    """
    expected, again = undisturbed(warm), undisturbed(warm)
    tally, draw = Tally(), random.Random(seed)
    rounds = max(1, round(60 * minutes / ROUND))
    for i in range(rounds):
        shutil.rmtree(warm.root)
        warm.root.mkdir()
        known = len(tally.wrong)
        disturb_for(warm, 60 * minutes / rounds, draw, tally)
        judge(warm, expected, again, tally)
        for wrong in tally.wrong[known:]:
            say(f"round {i}: {wrong}")
    lines = [
        f"{minutes:g} minutes in {rounds} rounds: {tally.starts} starts, {tally.kills} kills, {len(tally.wrong)} wrong.",
        "",
        "| command and exit code | times |",
        "|---|---|",
        *(f"| {name} | {times} |" for name, times in sorted(tally.ends.items())),
    ]
    return lines, len(tally.wrong)
