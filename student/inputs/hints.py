"""Find the teacher that writes a field, and the `tc build` command for a missing cache."""

import shlex
from pathlib import Path

from teachercache.teachers.registry import find_stored, outputs_for, teacher_for


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


def build_command(data: str, fields: tuple[str, ...], preferred: str, cache: str) -> str:
    """Return the `tc build` command that writes the fields.

    Args:
        data: Value of --data.
        fields: Names of cached fields.
        preferred: The recipe's teacher.
        cache: A .zarr folder or a folder of caches to write into.
    """
    teacher = teacher_for(fields, preferred)
    entry = find_stored(teacher)
    outputs = outputs_for(entry, fields)
    options = [] if set(outputs) <= set(entry.outputs[: entry.default]) else ["--outputs", ",".join(outputs)]
    path = Path(cache)
    out = path if path.suffix == ".zarr" else path / f"{teacher}.zarr"
    return shlex.join(["tc", "build", "--teacher", teacher, *options, "--data", data, "--out", str(out)])
