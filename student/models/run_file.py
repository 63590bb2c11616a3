"""Read and write the files of a run: run.json (seq2seq.json in an export) and model.safetensors."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from teachercache.cache.store import flush
from teachercache.core.errors import UserError

FORMAT = 2  # the version of run.json
NAMES = ("run.json", "seq2seq.json")


def is_run(folder: Path) -> bool:
    """Return whether `student train`, or an export that records its student, wrote a folder."""
    return any((folder / name).exists() for name in NAMES)


def record_file(folder: Path) -> Path:
    """Return the path of a folder's record, run.json or seq2seq.json."""
    return next((folder / name for name in NAMES if (folder / name).exists()), folder / NAMES[0])


def read_run(folder: Path) -> dict[str, Any]:
    """Return the record of a run or export.

    Raises:
        UserError: The folder is not a run, or a run of an older format.
    """
    path = next((folder / name for name in NAMES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder} is not a run: pass a folder that `student train` wrote")
    try:
        record = json.loads(path.read_text())
        version = record.get("format")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: train the run again") from error
    if version != FORMAT:
        name = record.get("recipe", {}).get("name", "NAME")
        raise UserError(
            f"{folder} is a run of format {version or 1}, this version reads {FORMAT}: train it again with "
            f"`student train --recipe {shlex.quote(str(name))} --out ANOTHER`"
        )
    return record


def student_record(folder: Path) -> dict[str, Any]:
    """Return the `family` and `config` of a run's student without building it."""
    return read_run(folder)["student"]


def weights_of(folder: Path) -> Path:
    """Return the path of a finished run's weights.

    Raises:
        UserError: The run is unfinished; the message has the command that continues it.
    """
    path = folder / "model.safetensors"
    if not path.exists():
        name = read_run(folder).get("recipe", {}).get("name", "NAME")
        raise UserError(
            f"{folder} is not a finished run: go on with "
            f"`{shlex.join(['student', 'train', '--recipe', str(name), '--resume', '--out', str(folder)])}`"
        )
    return path


def write_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name and rename it: it is complete or absent."""
    partial = path.with_name(path.name + ".partial")
    save_file(dict(state), partial, dict(metadata) if metadata else None)
    flush(partial)
    os.replace(partial, path)
