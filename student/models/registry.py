"""Families of students by name: an ordinary dict of functions that build one from a run; plus installed packages."""

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from student.models.run_file import student_record, weights_of
from student.models.student import Student
from teachercache.core.errors import UserError

GROUP = "student.models"  # entry points: family -> Build
Build = Callable[[Mapping[str, Any], Path], Student]  # a StudentSpec's config, the run folder -> the student


def _two_tower(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.two_tower.loading import rebuild

    return rebuild(config)


def _single_stream(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.single_stream.model import rebuild

    return rebuild(config)


def _seq2seq(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.seq2seq.loading import read_tokenizer, rebuild

    return rebuild(config, read_tokenizer(folder))


def _clip_adapter(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.clip_baselines import rebuild_adapter

    return rebuild_adapter(config)


def _clip_tuned(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.clip_baselines import rebuild_tuned

    return rebuild_tuned(config)


def _clip_lite_heads(config: Mapping[str, Any], folder: Path) -> Student:
    from student.models.clip_lite_heads import LiteHeads

    return LiteHeads()


FAMILIES: dict[str, Build] = {
    "two_tower": _two_tower,
    "single_stream": _single_stream,
    "seq2seq": _seq2seq,
    "clip_adapter": _clip_adapter,
    "clip_tuned": _clip_tuned,
    "clip_lite_heads": _clip_lite_heads,
}


def find_family(name: str) -> Build:
    """Return the function that builds students of a family.

    The name comes from a run folder, so it is looked up in the table and among installed entry points alone.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    installed = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name in installed:
        return installed[name].load()
    raise UserError(
        f"the run's student is of the family {name}, which is not installed: install the package that has it "
        f"(entry points {GROUP}); known are {', '.join([*FAMILIES, *installed])}"
    )


def load_student(folder: Path) -> Student:
    """Load the trained student of a run or exported folder, from that folder alone, on the CPU."""
    record = student_record(folder)
    student = find_family(record["family"])(record["config"], folder)
    student.load_saved_state(load_file(weights_of(folder)))
    return student
