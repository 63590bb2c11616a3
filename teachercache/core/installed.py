"""List the entry points of installed packages, without those of the folder in which a command was started."""

import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError


def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, without importing them.

    `python -m` and torchrun put the current folder in front of the import path. A folder that somebody else wrote
    could pretend to be an installed package there, so that its code would run as soon as a cache names its entry.
    Such packages are left out. A folder that is on the path for another reason (PYTHONPATH, a `.pth` file) counts as
    installed.
    """
    here = Path.cwd().resolve()
    visitor = here not in {Path(place).resolve() for place in sys.path[1:] if place}
    return {
        point.name: point
        for point in sorted(entry_points(group=group))
        if not (
            visitor and point.dist is not None and Path(str(point.dist.locate_file(""))).resolve() == here
        )
    }


def load_installed(point: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        UserError: It cannot be imported; the message names the entry point and its package.
    """
    try:
        return point.load()
    except Exception as error:
        package = f"package {point.dist.name}" if point.dist is not None else "a package"
        text = " ".join(str(error).split())
        raise UserError(
            f"the entry point '{point.name} = {point.value}' of {point.group} ({package}) cannot be imported: "
            f"{type(error).__name__}: {text}: mend or uninstall that package"
        ) from error
