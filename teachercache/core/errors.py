"""The error class for users, and names of objects that users type."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user. The message is one line that ends with what to type; commands print it and exit
    with 2.
    """


def closest(name: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'? " with the choice most similar to a name, or an empty string."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean '{matches[0]}'? " if matches else ""


def resolve(name: str, table: Mapping[str, Any], *, kind: str) -> Any:
    """Return the entry of a table, or import the object at "package.module:attr".

    Raises:
        UserError: There is no such entry or object; the message contains the choices.
    """
    if name in table:
        return table[name]
    module_name, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in module_name.split(".")):
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot import {kind} '{name}': {error}") from error
    raise UserError(f"unknown {kind} '{name}': {closest(name, table)}choose from {', '.join(table)}")
