"""Write and check run.json, the record of a run, which also decides whether a run can be resumed."""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from student.models.run_file import FORMAT, read_run
from student.recipe import Recipe, Run
from student.training.prepare import Prepared
from teachercache.cache.spec import fingerprint, to_dict
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path, write_whole
from teachercache.core.process import rank, world_size

# Settings that a resume may change, because they affect the paths and the speed of a run but not its losses
RESUMABLE = (
    "cache",
    "data",
    "out",
    "device",
    "workers",
    "save_every",
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


def open_run(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Write run.json into a new run folder, or check that a resumed run is the same.

    Args:
        out: The run folder.
        record: The content of run.json.
        resume: Whether the run is resumed.

    Raises:
        UserError: The folder is in use, there is nothing to resume, or the settings differ; the message lists
            them.
    """
    path = out / "run.json"
    exists, occupied = path.exists(), out.exists() and (not out.is_dir() or any(out.iterdir()))
    dist.barrier()  # all ranks must have checked the folder before rank 0 writes
    if exists:
        if not resume:
            raise UserError(f"{out} exists: go on with --resume, or pass another --out")
        saved, current = flat(read_run(out)), flat(record)
        changed = [
            f"{name}: {saved.get(name)} there, {value} asked"
            for name, value in current.items()
            if saved.get(name) != value
        ]
        if changed:
            raise UserError(f"{out} is another run ({'; '.join(changed)}): pass another --out")
        return
    if occupied:
        raise UserError(f"{out} exists and is not a run: pass another --out")
    if resume:
        raise UserError(
            f"nothing to resume at {out}: {closest_path(out)}run the same command without --resume"
        )
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, indent=1) + "\n")


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the losses of a run depend on, as a flat dict."""
    recipe, run = dict(record["recipe"]), dict(record["run"])
    constants, optim = recipe.pop("constants"), recipe.pop("optim")
    for name in RESUMABLE:
        run.pop(name, None)
    data = {name: record[name] for name in ("cache", "rows", "views")}
    return recipe | constants | {f"optim.{name}": value for name, value in optim.items()} | run | data
