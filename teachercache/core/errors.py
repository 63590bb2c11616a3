"""Names to objects, and the one error that users see. Not for anything that needs torch."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """What a user did wrong, in one line that ends in what to type next; the commands print it and exit 2."""


def closest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'? ` for the nearest choice, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'? " if found else ""


def resolve(name: str, table: Mapping[str, Any], *, kind: str) -> Any:
    """The entry of `table`, or the object at "package.module:attr"; UserError names the choices."""
    if name in table:
        return table[name]
    module_name, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in module_name.split(".")):
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot import {kind} '{name}': {error}") from error
    raise UserError(f"unknown {kind} '{name}': {closest(name, table)}choose from {', '.join(table)}")
