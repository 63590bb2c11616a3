"""Load the teacher that built a cache."""

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher


def load_teacher(cache: store.Cache) -> Teacher:
    """The teacher that built a cache; UserError where its weights have changed since."""
    spec = cache.meta.spec
    teacher = load(spec.name, weights=spec.weights, outputs=spec.outputs)
    if teacher.spec.digest != spec.digest:
        raise UserError(
            f"{cache.path} was built by other weights of {spec.name} than there are now: "
            f"remove it and run `{cache.command()}`"
        )
    return teacher
