"""Look up families of students by name: the built-in ones, and those of installed packages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from student.contract import Exported, ExportRequest, Family, Student
from student.models.run_file import WEIGHTS, load_weights, record_file, student_record
from teachercache.core.errors import UserError
from teachercache.core.installed import installed, load_installed
from teachercache.teachers.allowed import check_code_keys

GROUP = "student.models"  # entry-point group; each entry loads a Family


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


def _export_two_tower(student: Student, request: ExportRequest) -> Exported:
    from student.models.two_tower.export import export
    from student.models.two_tower.model import TwoTower

    return export(cast(TwoTower, student), request)


def _export_seq2seq(student: Student, request: ExportRequest) -> Exported:
    from student.models.seq2seq.export import export
    from student.models.seq2seq.model import Seq2Seq

    return export(cast(Seq2Seq, student), request)


FAMILIES: dict[str, Family] = {
    "two_tower": Family(_two_tower, _export_two_tower),
    "single_stream": Family(_single_stream),
    "seq2seq": Family(_seq2seq, _export_seq2seq),
    "clip_adapter": Family(_clip_adapter),
    "clip_tuned": Family(_clip_tuned),
    "clip_lite_heads": Family(_clip_lite_heads),
}


def find_family(name: str) -> Family:
    """Return a family by its name in a run folder; only the table and installed entry points are searched.

    Raises:
        UserError: The family is not installed.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    points = installed(GROUP)
    if name in points:
        family = load_installed(points[name])
        if not isinstance(family, Family):
            raise UserError(
                f"the installed student {name} is a {type(family).__name__}, not a student.contract.Family"
            )
        return family
    raise UserError(
        f"the run's student is of the family {name}, which is not installed: install the package that provides it "
        f"(entry points {GROUP}); installed are {', '.join([*FAMILIES, *points])}"
    )


def load_student(folder: Path) -> Student:
    """Load the trained student of a run or exported folder on the CPU; no other file is read.

    Raises:
        UserError: Its record has a key that loads code, or record and weights do not fit each other.
    """
    record, weights = student_record(folder), load_weights(folder)
    check_code_keys(record, record_file(folder))
    try:
        student = find_family(record["family"]).build(record["config"], folder)
        student.load_saved_state(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder}: {WEIGHTS} and {record_file(folder).name} are damaged or do not fit each other "
            f"({type(error).__name__}: {reason})"
        ) from error
    return student
