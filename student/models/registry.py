"""Student models by name: an ordinary dict of build functions; any other name is open_clip's."""

from collections.abc import Callable
from typing import Any


def _heads(name: str, init: str) -> Any:
    from student.models.clip_lite_heads import LiteHeads

    return LiteHeads()


MODELS: dict[str, Callable[[str, str], Any]] = {"clip-lite-heads": _heads}


def build_student(name: str, init: str) -> Any:
    """The student of that name, at random or from `init` (an exported folder)."""
    from student.models.two_tower.loading import build_two_tower

    return MODELS.get(name, build_two_tower)(name, init)
