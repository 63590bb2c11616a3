"""The files of a run that other runs and commands read: run.json (seq2seq.json of an export), model.safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from teachercache.cache.store import flush
from teachercache.core.errors import UserError

FORMAT = 2  # of run.json
NAMES = ("run.json", "seq2seq.json")


def is_run(folder: Path) -> bool:
    """Return whether a folder was written by `student train` or as an export that names its student."""
    return any((folder / name).exists() for name in NAMES)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the record of a run or export.

    Raises:
        UserError: The folder is no run, or one of an older format.
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
            f"`student train --recipe {name} --out ANOTHER`"
        )
    return record


def student_record(folder: Path) -> dict[str, Any]:
    """Return {"family", "config"} of a run's student, without loading anything."""
    return read_run(folder)["student"]


def weights_of(folder: Path) -> Path:
    """Return the weights of a finished run; UserError names the command that finishes it."""
    path = folder / "model.safetensors"
    if not path.exists():
        name = read_run(folder).get("recipe", {}).get("name", "NAME")
        raise UserError(
            f"{folder} is not a finished run: go on with `student train --recipe {name} --resume --out {folder}`"
        )
    return path


def write_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it, so that it is either whole or absent."""
    partial = path.with_name(path.name + ".partial")
    save_file(dict(state), partial, dict(metadata) if metadata else None)
    flush(partial)
    os.replace(partial, path)
