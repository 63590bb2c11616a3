"""Share the blocks of a cache among builders: claim one, and wait for those that others write."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from teachercache.build.target import Target
from teachercache.cache import locks, store
from teachercache.core.progress import ticker

LONGEST_PAUSE = 2.0  # seconds between two looks at the blocks of other builders


@contextlib.contextmanager
def claims(cache: store.Cache, *, shared: bool) -> Iterator[Callable[[int], bool]]:
    """Yield a function that claims a block for this process. The kernel releases the claims of a dead process.

    Args:
        cache: The cache.
        shared: Whether other builders may write blocks of it (`locks.has_locks`). Otherwise one job at a time holds a
            lease, and its ranks write disjoint blocks.
    """
    if not shared:
        yield lambda block: _is_unfinished(cache, block)
        return
    descriptor = locks.open_lock(cache.path)
    try:
        yield lambda block: locks.try_lock(descriptor, block) and _is_unfinished(cache, block)
    finally:
        os.close(descriptor)


def wait_for_others(target: Target) -> bool:
    """Wait until the other builders have written their blocks; return True as soon as one died and left a block."""
    cache = target.cache
    left = _unfinished(target)
    if not left or not locks.has_locks(cache.path):
        return False
    pause = 0.05
    with ticker(len(left), "blocks", "another builder writes") as tick:
        while left:
            if any(_is_free(cache, block) for block in left):
                return True
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            before, left = len(left), _unfinished(target)
            tick.step(before - len(left), "written by another builder")
    return False


def _unfinished(target: Target) -> list[int]:
    """Return the blocks that nobody has written; none if another builder has put a pruned cache into its place."""
    if not target.cache.path.exists():
        return []
    done = store.done_blocks(target.cache)
    return [block for block in range(target.cache.meta.num_blocks) if block not in done]


def _is_unfinished(cache: store.Cache, block: int) -> bool:
    return not store.covers(cache, store.done_record(cache, block))


def _is_free(cache: store.Cache, block: int) -> bool:
    """Return whether no living builder holds an unfinished block."""
    try:
        with claims(cache, shared=True) as claim:
            return claim(block)
    except FileNotFoundError:  # a pruned cache that was put into its place
        return False
