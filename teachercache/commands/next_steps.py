"""What to type after a command about a cache: a command that runs as it is printed."""

import importlib.util
from typing import TYPE_CHECKING

from teachercache.core.errors import UserError
from teachercache.core.progress import say, suggest

if TYPE_CHECKING:
    from teachercache.cache.store import Cache

SEARCHED_EXACTLY = 50_000  # vectors; above, an index is worth its time


def suggest_first_build(data: str, default: str) -> None:
    """Suggest to cache some data with the small teacher."""
    words = ["tc", "build", "--teacher", "clip-lite"]
    suggest(*words, *([] if data == default else ["--data", data]))


def suggest_use(cache: "Cache", *, done: str) -> None:
    """Suggest what a cache is good for next.

    Args:
        cache: The cache.
        done: The command that has just run.
    """
    from teachercache.cache import store
    from teachercache.search.index_files import index_path
    from teachercache.search.vectors import vector_fields

    path, spec = str(cache.path), cache.meta.spec
    if len(store.done_blocks(cache)) < cache.meta.num_blocks:
        say(f"next: {cache.command()}")
        return
    field = spec.image_vector or spec.text_vector
    if done == "info" or (done == "verify" and not vector_fields(cache)):
        suggest("tc", *(["verify", path, *teacher_words(cache)] if done == "info" else ["info", path]))
    elif not field:
        suggest("tc", "info", path)
    elif done == "build" and cache.meta.rows > SEARCHED_EXACTLY and not index_path(cache, field).exists():
        suggest("tc", "index", path)
    elif done in ("verify", "search") and can_analyze():
        suggest("tc", "analyze", path)
    elif spec.image_vector and spec.text_vector and is_loadable(cache):
        suggest("tc", "search", path, "a photo")
    else:
        suggest("tc", "search", path, "--key", str(store.read_keys(cache)[0]))


def teacher_words(cache: "Cache") -> list[str]:
    """Return the options with which `tc verify` finds the teacher of a cache, or goes without it."""
    name = cache.meta.spec.name
    module, _, attribute = name.partition(":")
    if is_loadable(cache):
        return []
    typed = attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return ["--teacher", name] if typed else ["--samples", "0"]


def can_analyze() -> bool:
    """Return whether the packages of `tc analyze` are installed."""
    return all(importlib.util.find_spec(name) for name in ("plotly", "sklearn"))


def is_loadable(cache: "Cache") -> bool:
    """Return whether a stored name finds the teacher of a cache."""
    from teachercache.teachers.registry import find_stored

    try:
        find_stored(cache.meta.spec.name)
    except UserError:
        return False
    return True
