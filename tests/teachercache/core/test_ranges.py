"""Ranges that are declared with a field: what text and values are taken, and what is said of others."""

import dataclasses
from typing import Annotated, Literal

import pytest
from annotated_types import Interval, Lt

from teachercache.core.ranges import (
    Count,
    Form,
    Name,
    Part,
    Positive,
    Seed,
    Share,
    Weight,
    check,
    from_text,
    kinds_of,
)

WORD = Annotated[str, Form("a|b:[0-9]+", "choose a, or b:NUMBER")]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e-4", Weight, 1e-4),
        ("3", Weight, 3.0),
        (".5", Share, 0.5),
        ("7", Count, 7),
        ("TRUE", bool, True),
        ("false", bool, False),
        ("b", Literal["a", "b"], "b"),
        ("1", str, "1"),
        ("b:12", WORD, "b:12"),
        ("-3", int, -3),
    ],
)
def test_text_of_a_kind(text, kind, value):
    found = from_text(text, kind)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("much", float, "a value of type float is expected"),
        ("True", float, "type float"),
        ("nan", float, "type float"),
        ("1e400", Weight, "a value of type float of 0 or more is expected"),
        ("-inf", Weight, "of 0 or more"),
        ("1.1", Share, "from 0 to 1"),
        ("0", Part, "above 0 and up to 1"),
        ("0", Positive, "a value of type float above 0 is expected"),
        ("1", Annotated[float, Interval(ge=0, lt=1)], "from 0 to below 1"),
        ("9", Annotated[int, Lt(5)], "a value of type int to below 5"),
        ("1.5", Count, "type int"),
        ("1" * 31, Count, "from 0 to 2,147,483,647"),
        ("1" * 6000, int, "type int"),
        ("-" * 100_000, int, "type int"),
        (str(2**70), Seed, "type int from 0 to 9,223,372,036,854,775,807"),
        ("1", bool, "a value of type bool is expected: true or false"),
        ("", Name, "a value of type str that is not empty"),
        ("lineer", Literal["cosine", "linear"], "did you mean 'linear'? choose from cosine, linear"),
        ("b:", WORD, "choose a, or b:NUMBER"),
        ("(1, 2)", tuple[int, int], "tuple"),
    ],
)
def test_what_is_said_of_other_text(text, kind, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        from_text(text, kind)
    assert says in str(error.value)


@pytest.mark.parametrize("value", [True, "1", None, 1.5, float("nan")])
def test_values_are_not_converted(value):
    assert check(1, Share) == 1.0
    with pytest.raises(ValueError, match="from 0 to 1 is expected"):
        check(value, Share)


def test_kinds_of_a_record_without_any_range():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        a: int = 1
        b: "float" = 2.0

    assert kinds_of(Plain) == {"a": int, "b": float}
