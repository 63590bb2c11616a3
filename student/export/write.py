"""A trained student as a folder that others load; written aside, checked by its family, then put in place."""

import json
import os
import shutil
from pathlib import Path

from student.contract import Capability, Exported, ExportRequest, require
from student.export.model_card import model_card, read_results
from student.inference.load import load_run
from student.models.registry import find_family
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole

FORMATS = {"open_clip": Capability.EXPORTS_OPEN_CLIP, "hf": Capability.EXPORTS_HF}


def export(run: Path, out: Path, form: str) -> tuple[Path, Exported]:
    """Write the run's student to `out` in a format of FORMATS.

    Returns:
        The folder, and how it is loaded.

    Raises:
        UserError: The student cannot be exported, `out` exists, or the written folder computes something else.
    """
    if out.exists():
        raise UserError(f"{out} exists: pass another --out, or remove it")
    student, results = load_run(run), read_results(run)
    require(student, FORMATS[form], f"{run} --format {form}")
    facts = json.loads((run / "run.json").read_text())
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write = find_family(student.spec.family).export
        assert write is not None, f"{student.spec.family} offers an export and has none"
        exported = write(student, ExportRequest(form, partial, out.name, facts))
        write_whole(partial / "README.md", model_card(facts, results, exported))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out, exported
