"""The run folder: run.json, and what a resume may change."""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from student.models.two_tower.model import TwoTower
from student.recipe import Recipe, Run
from student.training.prepare_pairs import Prepared
from teachercache.cache.spec import fingerprint, to_dict
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import rank, world_size

# Settings of a run that say where things lie and how they are computed, not what is computed: a resume may change them
HOW = (
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


def describe(recipe: Recipe, run: Run, prepared: Prepared) -> dict[str, Any]:
    """What run.json holds: enough to run it again, to load its student, and to refuse a resume of something else."""
    names = ("name", "paper", "steps", "batch")
    known = {name: getattr(recipe, name) for name in names} | {"reads": recipe.fields}
    known |= {"constants": dataclasses.asdict(recipe.constants), "optim": dataclasses.asdict(recipe.optim)}
    caches, batches, student = prepared.caches, prepared.batches, prepared.step.student
    keys = "\n".join(batches.manifest.table["key"].take(batches.rows).to_pylist())  # in their order
    rows = hashlib.sha256(f"{batches.manifest.digest}\n{keys}".encode()).hexdigest()[:16]
    made = prepared.facts
    if isinstance(student, TwoTower):
        made = {"model_cfg": student.model_cfg, "preprocess": student.preprocess}
    return json.loads(
        json.dumps(
            {
                "recipe": known,
                "run": dataclasses.asdict(run),
                "world_size": world_size(),
                "rows": rows,
                "num_rows": len(batches.rows),
                "student": made,
                "teachers": [to_dict(cache.meta.spec) for cache in caches],
                "cache": "+".join(fingerprint(cache.meta) for cache in caches) or None,
                "views": batches.num_views,
                "versions": {
                    name: importlib.metadata.version(name)
                    for name in ("torch", "open_clip_torch", "deepspeed")
                },
            }
        )
    )


def open_run(out: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write run.json, or compare with the one that is there; a different run is refused by what changed."""
    path = out / "run.json"
    exists, occupied = path.exists(), out.exists() and (not out.is_dir() or any(out.iterdir()))
    dist.barrier()  # every rank has looked before rank 0 writes
    if exists:
        if not resume:
            raise UserError(f"{out} exists: go on with --resume, or pass another --out")
        then, now = flat(json.loads(path.read_text())), flat(facts)
        changed = [
            f"{name}: {then.get(name)} there, {value} asked"
            for name, value in now.items()
            if then.get(name) != value
        ]
        if changed:
            raise UserError(f"{out} is another run ({'; '.join(changed)}): pass another --out")
        return
    if occupied:
        raise UserError(f"{out} is there and is no run: pass another --out")
    if resume:
        raise UserError(f"nothing to resume at {out}: run the same command without --resume")
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts, indent=1) + "\n")


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that its losses depend on, each under its own name."""
    recipe, run = dict(facts["recipe"]), dict(facts["run"])
    constants, optim = (
        recipe.pop("constants"),
        {"decay": "cosine"} | recipe.pop("optim"),
    )  # older runs have no decay
    for name in HOW:
        run.pop(name, None)
    own = {name: facts[name] for name in ("cache", "rows", "views")}
    return recipe | constants | {f"optim.{name}": value for name, value in optim.items()} | run | own
