"""Which teacher writes a field, and the `tc build` command that makes a missing cache."""

import shlex
from pathlib import Path

from teachercache.teachers.registry import find_stored, outputs_for, teacher_for


def field_groups(fields: tuple[str, ...], preferred: str) -> list[tuple[str, ...]]:
    """Return the fields grouped by the teacher that writes them, in the order of their first fields.

    Args:
        fields: Names of cached fields.
        preferred: The teacher that a recipe names; it comes first where it writes a field.
    """
    groups: dict[str, list[str]] = {}
    for name in fields:
        groups.setdefault(teacher_for((name,), preferred), []).append(name)
    return [tuple(names) for names in groups.values()]


def build_command(data: str, fields: tuple[str, ...], preferred: str, cache: str) -> str:
    """Return a `tc build` that writes the fields into `cache`, a .zarr folder or a folder of caches."""
    teacher = teacher_for(fields, preferred)
    entry = find_stored(teacher)
    outputs = outputs_for(entry, fields)
    words = [] if set(outputs) <= set(entry.outputs[: entry.default]) else ["--outputs", ",".join(outputs)]
    path = Path(cache)
    out = path if path.suffix == ".zarr" else path / f"{teacher}.zarr"
    return shlex.join(["tc", "build", "--teacher", teacher, *words, "--data", data, "--out", str(out)])
