"""Load the teacher that built a cache, by the name that the cache stores."""

from collections.abc import Mapping
from typing import Any

from teachercache.cache import store
from teachercache.cache.spec import TeacherSpec, to_dict
from teachercache.core.errors import UserError
from teachercache.teachers.registry import find, find_stored, load_entry
from teachercache.teachers.teacher import Teacher


def load_teacher(cache: store.Cache, named: str | None = None) -> Teacher:
    """Load the teacher that built a cache.

    Args:
        cache: The cache. Its name of a teacher is looked up, never imported by path.
        named: The teacher that the user names instead, which may be package.module:ENTRY.

    Raises:
        UserError: There is no such teacher, or what its values depend on has changed since the cache was built.
    """
    spec = cache.meta.spec
    entry = find(named) if named else find_stored(spec.name)
    teacher = load_entry(entry, spec.name, weights=spec.weights, outputs=spec.outputs)
    if changed := changes(to_dict(spec), teacher.spec):
        raise UserError(
            f"{cache.path} was built with other {changed} of {named or spec.name} than the present ones: "
            f"remove it and run `{cache.command()}`"
        )
    return teacher


def changes(stored: Mapping[str, Any], spec: TeacherSpec) -> str:
    """Return what a teacher's values depend on and is not as stored, in words; an empty string if all is.

    Args:
        stored: A description as a cache or a run stores it.
        spec: The description of the teacher that was loaded.
    """
    now = to_dict(spec)
    names = {"digest": "weights", "view": "view", "tokenizer": "tokenizer", "constants": "constants"}
    return " and ".join(word for name, word in names.items() if name in stored and stored[name] != now[name])
