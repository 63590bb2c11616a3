"""Export a trained student into a folder that another library loads.

The student's family writes a temporary folder and checks it against the student, whose own files were checked when
they were loaded. The folder gets a digest of each file and is then renamed.
"""

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from student.contract import Capability, Exported, ExportRequest, require
from student.export.model_card import model_card, read_results
from student.inference.load import load_run
from student.models.registry import find_family
from student.models.run_file import first_line, read_run
from teachercache.core.digests import damage_of, is_sealed, read_digests, seal
from teachercache.core.errors import MachineError, UserError, calling
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import flush_folder, partial_name, write_whole
from teachercache.core.progress import say

FORMATS = {"open_clip": Capability.EXPORTS_OPEN_CLIP, "hf": Capability.EXPORTS_HF}


def export(run: Path, out: Path, form: str) -> tuple[Path, Exported]:
    """Export the student of a run.

    Args:
        run: The run folder.
        out: The folder to write. It must not exist, unless it is what an earlier command made of the same student.
        form: A key of `FORMATS`.

    Returns:
        The folder, and how it is loaded.

    Raises:
        UserError: The student cannot be exported, `out` exists, or the written folder does not compute what
            the student computes.
    """
    if out.exists() and not is_sealed(out):
        raise _exists(out)
    student, results = load_run(run), read_results(run)
    require(student, FORMATS[form], f"{run} --format {form}")
    facts = read_run(run)
    sweep_beside(out)
    partial = out.with_name(partial_name(out.name))
    partial.mkdir(parents=True)
    try:
        write = find_family(student.spec.family).export
        assert write is not None, f"the family {student.spec.family} has the capability but no export"
        with calling(f"the family {student.spec.family}: export", write):
            exported = write(student, ExportRequest(form, partial, out.name, facts))
        write_whole(partial / "README.md", model_card(facts, results, exported))
        seal(partial)
        if out.exists():  # a command that was killed after the rename is repeated
            if not _is_same(out, partial):
                raise _exists(out)
            say(f"{out} is there already, with the same files")
        else:
            _rename(partial, out)
    except (
        SafetensorError
    ) as error:  # transformers writes with it; the message alone has the number of the error
        raise MachineError(f"{out} cannot be written: {first_line(error)}") from error
    except OSError as error:  # some libraries do not name the file
        raise error if error.filename else OSError(error.errno, error.strerror, str(out)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out, exported


def _exists(out: Path) -> UserError:
    return UserError(f"{out} exists: pass another --out, or remove it")


def _is_same(out: Path, partial: Path) -> bool:
    """Return whether a folder is whole and holds the files of another, except for their cards, which have dates."""
    ours, theirs = (dict(read_digests(folder)[0]) for folder in (partial, out))
    whole = not any(damage_of(out, name) for name in theirs)
    return whole and ours | {"README.md": []} == theirs | {"README.md": []}


def _rename(partial: Path, out: Path) -> None:
    """Give a complete folder its name; UserError if another command wrote that folder meanwhile."""
    try:
        os.replace(partial, out)
    except OSError as error:
        if out.exists():
            raise _exists(out) from error
        raise
    flush_folder(out.parent)
