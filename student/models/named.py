"""Build students of image-text pairs by model name: clip-lite's heads, or any open_clip configuration."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student.contract import Student

LITE_HEADS = "clip-lite-heads"


def build_student(name: str, init: str) -> "Student":
    """Build a student by name, with random weights or those of `init`, a run or an exported folder."""
    if name == LITE_HEADS:
        from student.models.clip_lite_heads import LiteHeads

        return LiteHeads()
    from student.models.two_tower.loading import build_two_tower

    return build_two_tower(name, init)


def fields_read_by(name: str) -> tuple[str, ...]:
    """Return the cached fields that a student reads in place of pictures and texts, by the student's name."""
    return ("image_emb", "text_emb") if name == LITE_HEADS else ()
