"""Write and check run.json, the record of a run, which also decides whether a run can be resumed."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student.models.run_file import FORMAT, WEIGHTS, read_run
from student.recipe import Recipe, Run
from student.training import lock
from student.training.prepare import Prepared
from teachercache.cache.spec import fingerprint, to_dict
from teachercache.core.digests import NAME, forget_missing, write_proved
from teachercache.core.errors import UserError
from teachercache.core.leftovers import is_leftover_name, sweep
from teachercache.core.paths import local_path
from teachercache.core.process import world_size

# Settings that a resume may change, because they affect the paths and the speed of a run but not its losses
RESUMABLE = (
    "cache",
    "data",
    "out",
    "device",
    "workers",
    "save_every",
    "save_minutes",
    "keep",
    "zero",
    "micro_batch",
    "grad_checkpointing",
    "compile",
    "report_to",
    "eval_every",
)


def run_record(recipe: Recipe[Any], run: Run, prepared: Prepared) -> dict[str, Any]:
    """Return the content of run.json: enough to repeat the run, load its student, and detect another run."""
    caches, batches = prepared.caches, prepared.batches
    keys = "\n".join(batches.manifest.table["key"].take(batches.rows).to_pylist())  # in order
    libraries = ("torch", "open_clip_torch", "deepspeed")
    record = {
        "format": FORMAT,
        "recipe": {
            "name": recipe.name,
            "paper": recipe.paper,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "teacher_fields": recipe.fields,
            "constants": dataclasses.asdict(recipe.constants),
            "optim": dataclasses.asdict(recipe.optim),
        },
        "run": dataclasses.asdict(run),
        "world_size": world_size(),
        "rows": hashlib.sha256(f"{batches.manifest.digest}\n{keys}".encode()).hexdigest()[:16],
        "num_rows": len(batches.rows),
        "student": {"family": prepared.student.family, "config": prepared.student.config},
        "questions": dict(prepared.rows) or None,
        "teachers": [to_dict(cache.meta.spec) for cache in caches],
        "cache": "+".join(fingerprint(cache.meta) for cache in caches) or None,
        "views": batches.num_views,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
    return json.loads(json.dumps(record))


def refuse_folder(name: str, *, resume: bool) -> None:
    """Raise a UserError if a folder cannot be a run folder, before anything is written or locked."""
    out = local_path(name)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} exists and is not a run: pass another --out")
    if resume and not out.exists():
        raise UserError(f"nothing to resume at {out}: run the same command without --resume")


def new_folder(out: Path) -> Path:
    """Create a folder of a name that no run has yet: `out`, or `out` with -2, -3 and so on behind it."""
    for number in itertools.count(1):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def open_run(out: Path, record: dict[str, Any], files: Mapping[str, str], *, resume: bool) -> None:
    """Write run.json and further files into a new run folder, or check that a resumed run is the same.

    A folder in which no step was taken is a new one, whatever a killed command left in it. The caller holds the
    lock of the folder.

    Args:
        out: The run folder.
        record: The content of run.json.
        files: Contents of further text files, by file name.
        resume: Whether the run is resumed.

    Raises:
        UserError: The folder is in use, or the settings differ; the message lists them.
    """
    path = out / "run.json"
    if not path.exists() and not all(map(is_leftover, out.iterdir())):
        raise UserError(f"{out} exists and is not a run: pass another --out")
    begun = path.exists() and has_begun(out)
    if begun and not resume:
        raise UserError(f"{out} exists: go on with --resume, or pass another --out")
    sweep_run(out)
    if path.exists() and resume:
        saved, current = flat(read_run(out, alone=True)), flat(record)
        changed = [
            f"{name}: {saved.get(name)} there, {value} asked"
            for name, value in current.items()
            if saved.get(name) != value
        ]
        if changed:
            raise UserError(f"{out} is another run ({'; '.join(changed)}): pass another --out")
    else:
        write_proved(path, out, json.dumps(record, indent=1) + "\n")
    for name, text in files.items():
        write_proved(out / name, out, text)


def is_leftover(path: Path) -> bool:
    """Return whether a file in a run folder is no more than what a killed command leaves."""
    if path.name in (NAME, lock.NAME) or is_leftover_name(path.name):
        return True
    return path.name == "checkpoints" and path.is_dir() and all(map(is_leftover, path.iterdir()))


def has_begun(out: Path) -> bool:
    """Return whether a step of a run was saved or logged."""
    logged = out / "metrics.jsonl"
    saved = [out / WEIGHTS, *(out / "checkpoints").glob("step-*")]
    return any(path.exists() for path in saved) or (logged.exists() and logged.stat().st_size > 0)


def sweep_run(out: Path) -> None:
    """Remove what killed commands left in a run folder: temporary files, and a student that was being evaluated."""
    sweep(out)
    shutil.rmtree(out / "candidate", ignore_errors=True)
    forget_missing(out)


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the losses of a run depend on, as a flat dict."""
    recipe, run = dict(record["recipe"]), dict(record["run"])
    constants, optim = recipe.pop("constants"), recipe.pop("optim")
    for name in RESUMABLE:
        run.pop(name, None)
    data = {name: record[name] for name in ("cache", "rows", "views")}
    return recipe | constants | {f"optim.{name}": value for name, value in optim.items()} | run | data
