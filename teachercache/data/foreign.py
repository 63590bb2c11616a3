"""The one door for foreign data: bytes to text, values to captions and labels, words to splits, names to data.

Every reader passes what it finds through these functions, so that all readers understand the same bytes, words and
names, and refuse the same ones with the same reasons.
"""

import codecs
import collections
import json
import math
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

MAX_TEXT = 1 << 20  # bytes of a caption file or of a text member of a tar
MAX_NESTING = 100  # levels of lists and objects in JSON
# The longest mark first: UTF-32's little-endian mark begins with UTF-16's
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "development": "val",
    "test": "test",
    "testing": "test",
}
# What may stand beside the word of a split; any other word makes it a name of its own (bullet_train)
BESIDE_SPLITS = (
    "set",
    "split",
    "data",
    "dataset",
    "images",
    "image",
    "imgs",
    "img",
    "pictures",
    "photos",
    "std",
)
NO_DATA = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information")
SURROGATES = re.compile("[\ud800-\udfff]")


class Foreign(ValueError):
    """Bytes or a value that no reader understands. The message is a reason: "the caption is not UTF-8: ..."."""


# ----------------------------------------------------------------------------------------------------
# Bytes


def decode_text(content: bytes, *, what: str = "the text") -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with a byte order mark, which is removed.

    Raises:
        Foreign: The bytes are longer than MAX_TEXT, or in another encoding.
    """
    if len(content) > MAX_TEXT:
        raise Foreign(too_long(len(content), what=what))
    return decode_whole(content, what=what)


def decode_whole(content: bytes, *, what: str = "the text") -> str:
    """Decode a whole file of many rows as `decode_text` does, of any length."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        byte = content[error.start : error.start + 1].hex()
        raise Foreign(f"{what} is not UTF-8 (byte {byte} at {error.start:,}): save it as UTF-8") from error
    if "\0" in text:
        raise Foreign(f"{what} has NUL characters, as UTF-16 without a mark has: save it as UTF-8")
    return text


def too_long(size: int, *, what: str = "the text") -> str:
    """Return the reason of a text that is not read because of its size in bytes."""
    return f"{what} has {size:,} bytes, more than the limit of {MAX_TEXT:,}"


def lines_of(text: str) -> list[str]:
    r"""Split a text at \n, \r\n and \r; str.splitlines would also split at U+2028 and form feeds in captions.

    Blank lines at the end are no lines.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def parse_json(content: bytes, *, what: str = "the file") -> Any:
    """Parse JSON in any encoding that `decode_whole` reads.

    Raises:
        Foreign: It is not JSON, or nested more than MAX_NESTING levels deep.
    """
    text = decode_whole(content, what=what)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise Foreign(f"{what} is nested more than {MAX_NESTING} levels deep") from error
    except ValueError as error:  # also integers with more digits than Python converts
        raise Foreign(f"{what} is not JSON: {error}") from error
    if _deeper(value, MAX_NESTING):
        raise Foreign(f"{what} is nested more than {MAX_NESTING} levels deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested deeper than a number of levels; level by level, no recursion."""
    level = [value]
    for _ in range(levels + 1):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner.extend(v for v in entry.values() if isinstance(v, (dict, list)))
            elif isinstance(entry, list):
                inner.extend(v for v in entry if isinstance(v, (dict, list)))
        if not inner:
            return False
        level = inner
    return True


# ----------------------------------------------------------------------------------------------------
# Values


def clean(text: str) -> str:
    """Replace half emojis (lone surrogates), which UTF-8 and Arrow cannot hold, by U+FFFD."""
    return SURROGATES.sub("\ufffd", text)


def caption_of(value: Any, *, what: str = "a caption") -> str | None:
    """Return the text of a value, or None if there is none (null, NaN).

    Raises:
        Foreign: The value is a record, a list or a truth value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return decode_text(value, what=what)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Foreign(f"{what} is {kind_of(value)}, a text is expected")
    return number_text(value)


def captions_of(value: Any, *, what: str = "a caption") -> tuple[str, ...]:
    """Return the texts of a value or of a list of values, without those that are null; see `caption_of`."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = (caption_of(entry, what=what) for entry in values)
    return tuple(text for text in texts if text is not None)


def label_of(value: Any, *, what: str = "the label") -> str:
    """Return the class name of a value, "" for null and NaN; 1.0, an integer beside gaps, is "1"."""
    return (caption_of(value, what=what) or "").strip()


def number_text(value: float) -> str:
    """Return a number as text; a float without a fraction as an integer (pandas makes floats of gaps)."""
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def kind_of(value: Any) -> str:
    """Describe the kind of a JSON or Arrow value for a reason, with what a record holds."""
    if isinstance(value, dict):
        return f"a record of {', '.join(clean(str(name)) for name in value)}" if value else "an empty record"
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    return {list: "a list", tuple: "a list", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


# ----------------------------------------------------------------------------------------------------
# Names


def split_of(word: str) -> str:
    """Return train, val or test for a word that names it, in any case and beside numbers and words like "set"
    (Valid, train2017, test_images, test-dev); "" for any other word.
    """
    if plain := SPLIT_WORDS.get(word.strip().lower()):
        return plain
    words = [part for part in _words(word) if part not in BESIDE_SPLITS]
    splits = {SPLIT_WORDS.get(part, "") for part in words}
    if splits == {"test", "val"} and "dev" in words:  # VQA's test-dev is a part of the test split
        return "test"
    return splits.pop() if len(splits) == 1 else ""


def split_in_name(name: str) -> str:
    """Return the split in a compound name (captions_val2014, Train_GCC-training, snli_ve_dev), or ""."""
    return next((SPLIT_WORDS[word] for word in _words(name) if word in SPLIT_WORDS), "")


def _words(name: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()


def is_data(name: str) -> bool:
    """Return whether a file or folder may hold data: no hidden one, and none of macOS, Windows or a NAS."""
    return not name.startswith(".") and name.lower() not in NO_DATA


def all_data(path: str) -> bool:
    """Return whether every part of a relative path may hold data."""
    return all(is_data(part) for part in PurePath(path).parts if part not in (".", ".."))


def header_of(names: Iterable[str | None]) -> list[str]:
    """Return column names without spaces around them and in lower case.

    Raises:
        Foreign: A name is repeated.
    """
    columns = [clean(name or "").strip().lower() for name in names]
    repeated = [name for name, count in collections.Counter(columns).items() if name and count > 1]
    if repeated:
        raise Foreign(f"column {repeated[0]!r} comes {columns.count(repeated[0])} times: rename all but one")
    return columns
