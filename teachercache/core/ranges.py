"""Ranges and choices of settings, declared once as the types of a record's fields, and values read from text.

A field is annotated with what it allows, in the words of annotated_types: `Annotated[float, Ge(0)]`, `Literal["a", "b"]`,
or a name below. pydantic checks; it is imported when the first value is checked, because it takes 0.1 s.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from teachercache.core.errors import UserError, closest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MOST = 2**31 - 1  # the largest count: more rows, steps or bytes of one thing are a slip of the hand

Share = Annotated[float, Interval(ge=0, le=1)]
Part = Annotated[float, Interval(gt=0, le=1)]
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Interval(ge=0, le=MOST)]
Number = Annotated[int, Interval(ge=1, le=MOST)]
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]  # what numpy and torch take
Name = Annotated[str, MinLen(1)]


@dataclasses.dataclass(frozen=True)
class Form:
    """What a text has to look like, in the metadata of an `Annotated[str, ...]`.

    Attributes:
        pattern: A regular expression that matches the whole text.
        words: What an error message says then: "choose a, or b:NUMBER".
    """

    pattern: str
    words: str


def kinds_of(record: type) -> dict[str, Any]:
    """Return the annotated types of a dataclass's fields by name."""
    try:
        hints = typing.get_type_hints(record, include_extras=True)
    except (
        NameError
    ):  # names that are imported for type checkers only: the types of the defaults stand for them
        hints = {}
    return {field.name: hints.get(field.name, type(field.default)) for field in dataclasses.fields(record)}


def from_text(text: str, kind: Any) -> Any:
    """Return the value of a kind that a text stands for: a number, true or false in any case, or the text itself.

    Raises:
        ValueError: The text stands for no such value; the message says what is expected.
    """
    if _plain(kind) is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(expected(kind, text))
        return text.lower() == "true"
    return _checked(text, kind, text, from_strings=True)


def check(value: Any, kind: Any) -> Any:
    """Return a value that is of a kind and in its range; an int where a float is expected becomes one.

    Raises:
        ValueError: It is not; the message says what is expected.
    """
    return _checked(value, kind, str(value), from_strings=False)


def check_record(record: Any, option: str = "--set ") -> None:
    """Check every field of a dataclass, for records that were not made from text.

    Args:
        record: The dataclass.
        option: What stands in front of `NAME=VALUE` in the message.

    Raises:
        UserError: A value is of another kind, or out of its range.
    """
    for name, kind in kinds_of(type(record)).items():
        value = getattr(record, name)
        try:
            check(value, kind)
        except ValueError as error:
            raise UserError(f"{option}{name}={value}: {error}") from error


def check_options(options: Mapping[str, Any], keywords: type | None = None, **kinds: Any) -> None:
    """Check the keyword options of a function, whose names are those of the command line with underscores.

    Args:
        options: The options as they were given.
        keywords: A TypedDict of their types.
        **kinds: Types of further options.

    Raises:
        UserError: No such option, or a value of another kind or out of its range.
    """
    known = typing.get_type_hints(keywords, include_extras=True) if keywords else {}
    known |= kinds
    for name, value in options.items():
        if name not in known:
            raise UserError(f"no option '{name}': {closest(name, known)}choose from {', '.join(known)}")
        kind = known[name]
        parts = (
            typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        )
        if value is None and type(None) in parts:
            continue
        try:
            check(value, parts[0] if set(parts[1:]) <= {type(None)} else kind)
        except ValueError as error:
            raise UserError(f"{name}={value}: {error}") from error


def _checked(value: Any, kind: Any, text: str, *, from_strings: bool) -> Any:
    from pydantic import ValidationError

    try:
        found = _adapter(kind).validate_strings(value) if from_strings else _strict(value, kind)
    except ValidationError as error:
        raise ValueError(expected(kind, text)) from error
    for form in _metadata(kind):
        if isinstance(form, Form) and not re.fullmatch(form.pattern, found):
            raise ValueError(form.words)
    return found


def _strict(value: Any, kind: Any) -> Any:
    return _adapter(kind).validate_python(value, strict=True)


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def expected(kind: Any, text: str = "") -> str:
    """Return what a kind of value is, for an error message about a text that is none."""
    for form in _metadata(kind):
        if isinstance(form, Form):
            return form.words
    plain = _plain(kind)
    if typing.get_origin(plain) is Literal:
        choices = [str(choice) for choice in typing.get_args(plain)]
        return f"{closest(text, choices, cutoff=0.6)}choose from {', '.join(choices)}"
    name = getattr(plain, "__name__", str(plain))
    if plain is bool:
        return "a value of type bool is expected: true or false"
    return f"a value of type {name}{_range(kind)} is expected"


def _range(kind: Any) -> str:
    """Return the words of a range: " from 0 to 1", " above 0", and so on."""
    bounds = {}
    for entry in _metadata(kind):
        for name in ("gt", "ge", "lt", "le"):
            bound = getattr(entry, name, None)
            if bound is not None:
                bounds[name] = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        if isinstance(entry, MinLen):
            return " that is not empty"
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    if list(bounds) == ["ge"]:
        return f" of {bounds['ge']} or more"
    words = {"gt": "above", "ge": "from", "lt": "to below", "le": "and up to"}
    return "".join(f" {words[name]} {bounds[name]}" for name in words if name in bounds)


def _plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _metadata(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__metadata__", ())
