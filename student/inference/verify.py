"""`student verify`: check every file of a run or an export against the digests that were written with it."""

import dataclasses
from pathlib import Path

from safetensors import SafetensorError, safe_open

from student.models.run_file import is_run, read_run, remedy_of
from student.training.lock import NAME as LOCK
from student.training.telemetry.metrics import read_metrics
from teachercache.core.digests import NAME, damage_of, read_digests
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path

LOGS = ("metrics.jsonl", "evals.jsonl")


@dataclasses.dataclass(frozen=True)
class Damage:
    """A damaged file, by its path in the folder, and what is wrong with it."""

    file: str
    problem: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """What `verify_folder` found.

    Args:
        folder: The run or export.
        checked: Number of files that have a digest.
        damaged: Files whose bytes are not those that were written.
        without_digest: Files that could not be checked: logs, and what older versions wrote.
        remedy: What to do about damaged files.
    """

    folder: str
    checked: int
    damaged: list[Damage]
    without_digest: list[str]
    remedy: str

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [f"damaged: {damage.file}: {damage.problem}" for damage in self.damaged]
        lines += [f"no digest: {name}" for name in self.without_digest]
        good = f"ok: {self.folder}: {self.checked} files hold the bytes that were written"
        return lines if self.damaged else [*lines, good]


def verify_folder(folder: Path) -> Verified:
    """Check every file of a run or export; `best` and other folders inside with digests of their own too.

    Raises:
        UserError: The folder is neither a run nor an export.
    """
    if not (is_run(folder) or (folder / NAME).exists() or (folder / "open_clip_config.json").exists()):
        raise UserError(
            f"{folder} is neither a run nor an export: {closest_path(folder)}pass a folder that `student` wrote"
        )
    homes = [folder, *(path.parent for path in sorted(folder.glob("*/" + NAME)))]
    damaged: dict[str, str] = {}
    covered: set[Path] = set()
    for home in homes:
        try:
            files, _ = read_digests(home)
        except UserError:
            damaged[(home / NAME).relative_to(folder).as_posix()] = "is damaged"
            continue
        for name in files:
            if wrong := damage_of(home, name):
                damaged[(home / name).relative_to(folder).as_posix()] = wrong
            if (home / name).exists():
                covered.add(home / name)
    rest = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path in covered or path.name in (NAME, LOCK):
            continue
        name = path.relative_to(folder).as_posix()
        if wrong := _unreadable(path):
            damaged[name] = wrong
        else:
            rest.append(name)
    for name in LOGS:
        read_metrics(folder / name)  # prints how many lines cannot be read
    found = [Damage(name, wrong) for name, wrong in sorted(damaged.items())]
    return Verified(str(folder), len(covered), found, rest, remedy_of(folder))


def _unreadable(path: Path) -> str:
    """Return why a file without a digest cannot be read, or ""."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.name == "run.json":
            read_run(path.parent, alone=True)
    except (SafetensorError, UserError, ValueError) as error:
        return (str(error).splitlines() or ["?"])[0][:160]
    return ""
