"""Flip one bit in every file of a cache, an index, a manifest, a run, a checkpoint and an export: is it found?"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.benchmarks.faults.client import Warm
from scripts.benchmarks.faults.jobs import BUILT, TRAIN, TRAINED, Job, prepare, restore, words_of

# A log never stops a command, a picture is for eyes, and a lock holds nothing
HARMLESS = ("build.log", "metrics.jsonl", "evals.jsonl", "curve.png", "speed.json", ".lock")
INDEX = "tc index {root}/c.zarr --kind hnsw"


@dataclasses.dataclass(frozen=True)
class Target:
    """Files in which bits are flipped.

    Attributes:
        before: Commands that write the files.
        check: The command that must find a flipped bit: it ends with an error, or it names the file and goes on.
        files: A glob pattern below the root.
        killed: Whether the last command of `before` is killed on its way.
        newest: Whether bits are flipped in the last of the files alone; the command reads no other.
    """

    before: tuple[str, ...]
    check: str
    files: str = "**/*"
    killed: bool = False
    newest: bool = False


EXPORT = "student export {root}/run --format open_clip --out {root}/export"
EXPORT_HF = "student export {root}/run --format hf --out {root}/export"
TARGETS = {
    "cache": Target((BUILT, INDEX), "tc verify {root}/c.zarr --samples 0"),
    "manifest": Target(("tc manifest {in}/data --out {root}/m.parquet",), "tc manifest {root}/m.parquet"),
    "run": Target((TRAINED,), "student verify {root}/run"),
    "checkpoint": Target((TRAIN,), "student verify {root}/run", "run/checkpoints/*.safetensors", killed=True),
    "resuming": Target(
        (TRAIN,), TRAIN + " --resume", "run/checkpoints/*.safetensors", killed=True, newest=True
    ),
    "export": Target((TRAINED, EXPORT), "student verify {root}/export", "export/**/*"),
    "export_hf": Target((TRAINED, EXPORT_HF), "student verify {root}/export", "export/**/*"),
    "exporting": Target((TRAINED,), EXPORT, "run/model.safetensors"),
    "evaluating": Target(
        (TRAINED,), "student eval {root}/run --task retrieval --data {in}/data", "run/*s*n*"
    ),
    "loading": Target(
        (TRAINED, EXPORT),
        "student eval {root}/export --task retrieval --data {in}/data",
        "export/*.safetensors",
    ),
}


@dataclasses.dataclass(frozen=True)
class Flip:
    """A flipped bit and what the check said.

    Attributes:
        target: A name of TARGETS.
        file: The path below the root.
        bit: The number of the bit.
        code: The exit code of the check.
        found: Whether the check ended with an error, or printed the file's name.
        wrong: A traceback, or "not found"; empty if all is well.
        said: The last line of the check.
    """

    target: str
    file: str
    bit: int
    code: int | str
    found: bool
    wrong: str
    said: str


def flip_bit(path: Path, bit: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips(warm: Warm, names: Sequence[str], *, times: int, seed: int) -> Iterator[Flip]:
    """Flip `times` bits of every file of the targets, one at a time, and run the target's check after each."""
    for name in names:
        target = TARGETS[name]
        before = prepare(warm, Job(target.check, target.before, killed=target.killed))
        files = sorted(path for path in before.glob(target.files) if path.is_file() and path.stat().st_size)
        for path in files[-1:] if target.newest else files:
            draw = random.Random(f"{seed} {name} {path.relative_to(before)}")
            for _ in range(1 if path.name in HARMLESS else times):
                yield flip(warm, name, path.relative_to(before), draw, before)


def flip(warm: Warm, name: str, file: Path, draw: random.Random, before: Path) -> Flip:
    """Flip a random bit of a file and run the check."""
    restore(warm, before)
    path = warm.root / file
    bit = draw.randrange(8 * path.stat().st_size)
    flip_bit(path, bit)
    ended = warm.run(words_of(warm, TARGETS[name].check))
    found = ended.code not in (0, "hangs") or (file.name in ended.output and "damaged" in ended.output)
    wrong = "" if found or file.name in HARMLESS else "not found"
    if ended.is_traceback or ended.code == "hangs" or (ended.code != 0 and len(ended.errors) != 1):
        wrong = "traceback" if ended.is_traceback else f"{len(ended.errors)} error lines, exit {ended.code}"
    said = (ended.output.strip().splitlines() or [""])[-1]
    return Flip(name, str(file), bit, ended.code, found, wrong, said)


def flip_table(found: Sequence[Flip]) -> list[str]:
    """Return a Markdown table with a line for each target."""
    lines = ["| files of | flips | found | of logs and pictures | wrong |", "|---|---|---|---|---|"]
    for name in TARGETS:
        group = [flip for flip in found if flip.target == name]
        if group:
            logs = [flip for flip in group if Path(flip.file).name in HARMLESS]
            rest = [flip for flip in group if flip not in logs]
            wrong = sum(bool(flip.wrong) for flip in group)
            lines.append(
                f"| {name} | {len(rest)} | {sum(flip.found for flip in rest)} | {len(logs)} | {wrong} |"
            )
    return lines
