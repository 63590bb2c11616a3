"""Read and write the files of a run: run.json (seq2seq.json in an export) and model.safetensors."""

import json
import shlex
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teachercache.core.digests import names_to_load, refuse_damage, stream_proved
from teachercache.core.errors import UserError
from teachercache.core.installed import installed
from teachercache.core.paths import closest_path

FORMAT = 2  # the version of run.json
NAMES = ("run.json", "seq2seq.json")
WEIGHTS = "model.safetensors"


def is_run(folder: Path) -> bool:
    """Return whether `student train`, or an export that records its student, wrote a folder."""
    return any((folder / name).exists() for name in NAMES)


def record_file(folder: Path) -> Path:
    """Return the path of a folder's record, run.json or seq2seq.json."""
    return next((folder / name for name in NAMES if (folder / name).exists()), folder / NAMES[0])


def read_run(folder: Path, *, alone: bool = False) -> dict[str, Any]:
    """Return the record of a run or export.

    Args:
        folder: The run or export.
        alone: Check the record alone; otherwise also the other small files that a loader reads.

    Raises:
        UserError: The folder is not a run, a run of an older format, or damaged.
    """
    path = record_file(folder)
    if not path.exists():
        raise UserError(
            f"{folder} is not a run: {closest_path(folder)}pass a folder that `student train` wrote"
        )
    small = tuple(name for name in names_to_load(folder) if name != WEIGHTS)
    refuse_damage(folder, (path.name,) if alone else small, remedy_of(folder))
    try:
        record = json.loads(path.read_bytes())
        version = record.get("format")
        if version == FORMAT and not isinstance(record["student"]["family"], str):
            raise TypeError
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {remedy_of(folder)}") from error
    if version != FORMAT:
        recipe = record.get("recipe")
        name = recipe.get("name", "NAME") if isinstance(recipe, dict) else "NAME"
        raise UserError(
            f"{folder} is a run of format {version or 1}, this version reads {FORMAT}: train it again with "
            f"`student train --recipe {shlex.quote(str(name))} --out ANOTHER`"
        )
    return record


def remedy_of(folder: Path) -> str:
    """Return what to do about a damaged file of a run or export."""
    verb = "train the run again" if (folder / "run.json").exists() else "export it again"
    return f"copy it again from where it is whole, or {verb}"


def student_record(folder: Path) -> dict[str, Any]:
    """Return the `family` and `config` of a run's student without building it."""
    return read_run(folder)["student"]


def weights_of(folder: Path) -> Path:
    """Return the path of a finished run's weights, whose bytes are those that were written.

    Raises:
        UserError: The run is unfinished or its weights are damaged; the message has the command that mends it.
    """
    path = folder / WEIGHTS
    recipe = str(read_run(folder).get("recipe", {}).get("name", "NAME"))
    words = ["--recipe", recipe, "--resume", "--out", str(folder)]
    if not _is_known(recipe):
        words = ["--config", str(folder / NAMES[0]), "--recipe", "PACKAGE.MODULE:RECIPE", "--resume"]
    command = f"`{shlex.join(['student', 'train', *words])}`"
    if not path.exists():
        raise UserError(f"{folder} is not a finished run: go on with {command}")
    again = f"{command} writes it again" if (folder / "checkpoints").exists() else remedy_of(folder)
    refuse_damage(folder, (WEIGHTS,), again)
    return path


def _is_known(recipe: str) -> bool:
    """Return whether a recipe is found by its name: a file of `student/recipes`, or an installed one."""
    ours = Path(__file__).parents[1] / "recipes" / f"{recipe}.py"
    return recipe in installed("student.recipes") or (recipe.isidentifier() and ours.is_file())


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a finished run or export.

    Raises:
        UserError: The run is unfinished, or its weights are damaged.
    """
    path = weights_of(folder)
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {remedy_of(folder)}") from error


def first_line(error: Exception) -> str:
    """Return the start of the first line of an error's message."""
    return (str(error).splitlines() or ["?"])[0][:120]


DTYPES = {  # in the order in which safetensors writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    state: Mapping[str, Tensor], path: Path, home: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name and rename it: it is complete or absent.

    The bytes are those of `safetensors.torch.save_file`. That function reports a full disk without the name of the
    file and leaves temporary files of its own.

    Args:
        state: Tensors by name, on the CPU.
        path: The file.
        home: The folder whose digests.json has the digest of the file.
        metadata: Texts that are stored with the tensors.
    """
    stream_proved(path, home, lambda file: _write_safetensors(state, metadata, file))


def _write_safetensors(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None, file: IO[bytes]
) -> None:
    """Write the format of safetensors: the size of the header, the header as JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = list(DTYPES)
    names = sorted(state, key=lambda name: (order.index(state[name].dtype), name))
    start = 0
    for name in names:
        tensor = state[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(state[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
