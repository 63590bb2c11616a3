"""Load the teacher that built a cache, by the name that the cache stores."""

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.teachers.registry import find, find_stored, load_entry
from teachercache.teachers.teacher import Teacher


def load_teacher(cache: store.Cache, named: str | None = None) -> Teacher:
    """Load the teacher that built a cache.

    Args:
        cache: The cache. Its name of a teacher is looked up, never imported by path.
        named: The teacher that the user names instead, which may be package.module:ENTRY.

    Raises:
        UserError: There is no such teacher, or its weights have changed since the cache was built.
    """
    spec = cache.meta.spec
    entry = find(named) if named else find_stored(spec.name)
    teacher = load_entry(entry, spec.name, weights=spec.weights, outputs=spec.outputs)
    if teacher.spec.digest != spec.digest:
        raise UserError(
            f"{cache.path} was built with other weights of {named or spec.name} than the present ones: "
            f"remove it and run `{cache.command()}`"
        )
    return teacher
