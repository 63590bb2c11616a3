"""Find the teacher that writes a field, and the `tc build` command for a missing cache."""

import dataclasses
import shlex
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from teachercache.teachers.registry import find_stored, outputs_for, teacher_for


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request for cached fields.

    Args:
        cache: Value of `--cache`: a cache, a folder of caches, or several separated by commas.
        data: Value of `--data`, for hints.
        fields: Names of the cached fields that recipe and student read.
        teacher: The teacher that hints suggest, if it writes the fields.
        outputs: Outputs that hints spell differently, such as {"hidden": "hidden:3"}.
    """

    cache: str
    data: str
    fields: tuple[str, ...]
    teacher: str
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


def field_groups(fields: tuple[str, ...], preferred: str) -> list[tuple[str, ...]]:
    """Group fields by the teacher that writes them, ordered by the first field of each group.

    Args:
        fields: Names of cached fields.
        preferred: The recipe's teacher, used for every field that it writes.
    """
    groups: dict[str, list[str]] = {}
    for name in fields:
        groups.setdefault(teacher_for((name,), preferred), []).append(name)
    return [tuple(names) for names in groups.values()]


def build_command(wanted: Wanted, fields: tuple[str, ...], cache: str) -> str:
    """Return the `tc build` command that writes the fields.

    Args:
        wanted: The request: data, teacher, and how its outputs are spelled.
        fields: Names of cached fields, some or all of those requested.
        cache: A .zarr folder or a folder of caches to write into. A cache that is there without the fields holds another
            build, so that the command writes beside it.
    """
    teacher = teacher_for(fields, wanted.teacher)
    entry = find_stored(teacher)
    outputs = outputs_for(entry, fields)
    spelled = [wanted.outputs.get(output, output) for output in outputs]
    options = [] if set(outputs) <= set(entry.outputs[: entry.default]) else ["--outputs", ",".join(spelled)]
    path = Path(cache)
    out = free_path(path if path.suffix == ".zarr" else path / f"{teacher}.zarr")
    return shlex.join(
        ["tc", "build", "--teacher", teacher, *options, "--data", wanted.data, "--out", str(out)]
    )


def free_path(path: Path) -> Path:
    """Return a path, or the first one that does not exist with -2, -3 and so on behind its name."""
    names = (
        path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1)
    )
    return next(name for name in names if not name.exists())
