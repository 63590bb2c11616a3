"""Options that several commands of `student` share."""

from pathlib import Path

from teachercache.core.command import place
from teachercache.core.paths import local_path


def local(text: str | Path) -> Path:
    """Return the path of an option that writes files; click reports a URL as a wrong value."""
    return local_path(place(str(text)), "the path")
