"""What readers of files share: the endings of pictures, captions in a .txt or .json, and the folder of pictures near an
annotation file.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.urls import is_http
from teachercache.data.foreign import (
    MAX_TEXT,
    Foreign,
    captions_of,
    decode_text,
    lines_of,
    parse_json,
    too_long,
)

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".jfi", ".avif"),
    *(HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else ()),
)
Sizes = Callable[[str], int | None]
TEXT_COLUMNS = ("text", "caption", "title", "texts", "captions")
NO_CAPTION = "the caption file is not a JSON object with `caption` (a string) or `captions` (a list)"
ENDING = re.compile(r"\.[a-z][a-z0-9]{0,9}")  # of a kind of files; others (.0001) are named together


def picture_folder(root: Path, names: list[str], folders: list[str], *, advice: Any, size: Sizes) -> str:
    """Return the first of `folders` (relative to `root`) that holds one of the images; raise UserError if
    none does.
    """
    asked = names[:3] if is_http(root) else names  # each one costs a request
    for folder in folders:
        exists = is_url(root) or (root / folder).is_dir()
        if exists and any(size(os.path.join(folder, name)) is not None for name in asked):
            return folder
    raise UserError(f"no picture {names[0]} near {root}: put the pictures into {advice}")


# ----------------------------------------------------------------------------------------------------
# Captions


def captions_in(suffix: str, content: bytes, size: int | None = None) -> tuple[tuple[str, ...], str]:
    """Return the captions of a .txt or .json file, and a problem if there is one.

    Args:
        suffix: .txt or .json, in lower case.
        content: The bytes of the file.
        size: How many bytes it has, if they were not read because they are too many.
    """
    if size is not None and size > MAX_TEXT:
        return (), too_long(size, what="the caption file")
    return captions_of_text(content) if suffix == ".txt" else captions_of_json(content)


def captions_of_text(content: bytes) -> tuple[tuple[str, ...], str]:
    """Return the lines of a caption file, the first if all are blank, and a problem if there is one."""
    try:
        text = decode_text(content, what="the caption file")
        return tuple(
            lines_of(text) or text.splitlines()[:1]
        ), ""  # one blank text, which is counted, in a blank file
    except Foreign as error:
        return (), str(error)


def captions_of_json(content: bytes) -> tuple[tuple[str, ...], str]:
    """Return `captions` (a list) or `caption` / `text` (a string) of a JSON object, and a problem if there
    is one.
    """
    try:
        values = parse_json(content, what="the caption file")
        if not isinstance(values, dict):
            return (), NO_CAPTION
        captions = values.get("captions") or values.get("caption") or values.get("text") or ()
        if not isinstance(captions, str | list | tuple):
            return (), NO_CAPTION
        return captions_of(captions, what="a caption of the caption file"), ""
    except Foreign as error:
        return (), str(error)


def first_captions(*found: tuple[tuple[str, ...], str]) -> tuple[tuple[str, ...], str]:
    """Return the captions of the first file that has any; without any, the first problem."""
    filled = next((texts for texts, _ in found if any(map(str.strip, texts))), ())
    filled = filled or next((texts for texts, _ in found if texts), ())
    return filled, "" if filled else next((problem for _, problem in found if problem), "")


# ----------------------------------------------------------------------------------------------------
# What is not read


def no_picture(name: str, *, what: str = "files") -> str:
    """Return the reason, in the plural, of a file that is no picture and no caption file."""
    suffix = os.path.splitext(name)[1].lower()
    ending = suffix if ENDING.fullmatch(suffix) else "no known ending"
    advice = ", `pip install pillow-heif` reads them" if suffix in HEIF_SUFFIXES else ""
    return f"{what} are no pictures that are read ({ending}{advice})"
