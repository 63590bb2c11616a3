"""Read the text and JSON files of published data sets: any encoding that the door of foreign data reads, one line for
what it does not.
"""

from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError, is_machine
from teachercache.data.foreign import Foreign, decode_whole, lines_of, parse_json

UNPACK = "unpack the data set's archive again"


def file_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: It is missing, not readable, or in another encoding than UTF-8 or UTF-16 with a mark.
    """
    try:
        return decode_whole(_content(path), what=str(path))
    except Foreign as error:
        raise UserError(str(error)) from error


def file_lines(path: Path) -> list[str]:
    """Return the lines of a file without blank ones at the end; raise UserError as `file_text` does."""
    return lines_of(file_text(path))


def file_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        UserError: It is missing, not readable, not JSON, or nested too deep.
    """
    try:
        return parse_json(_content(path), what=str(path))
    except Foreign as error:
        raise UserError(str(error)) from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if is_machine(error):
            raise
        raise UserError(f"cannot read {path}: {error.strerror or error}; {UNPACK}") from error
