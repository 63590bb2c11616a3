"""Read the settings of a run from its run.json, to train with them again (`student train --config`)."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from student.models.run_file import FORMAT, NAMES
from student.recipe import Recipe, Run
from student.recipes.registry import RECIPES, find, installed
from teachercache.core.digests import refuse_damage
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path
from teachercache.core.ranges import check, kinds_of

Record = TypeVar("Record", bound=Any)
# Of the machine and of the folder, not of the run
NOT_TAKEN = ("device", "workers", "out")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings in a run.json.

    Args:
        path: The file.
        recipe: The recipe with the constants, the optimizer, the steps and the batch size of the run.
        run: The settings of the run, without `NOT_TAKEN`.
    """

    path: Path
    recipe: Recipe[Any]
    run: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.path.parent


def read_config(path: str | Path, recipe: str | None = None) -> Config:
    """Read a run.json.

    Args:
        path: The file, or the run folder that holds it.
        recipe: The recipe as the user named it. A name in the file is only looked up, never imported.

    Raises:
        UserError: There is no such file, it is damaged or no run.json, or its settings do not fit the recipe.
    """
    path = Path(path)
    path = path / NAMES[0] if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no file {path}: {closest_path(path)}pass the run.json of a run, or its folder")
    if path.name == NAMES[0]:
        refuse_damage(path.parent, (path.name,), "copy it again from where it is whole, or pass --recipe")
    try:
        record = json.loads(path.read_bytes())
        version, saved, run = record["format"], dict(record["recipe"]), dict(record["run"])
        name, constants, optim = str(saved["name"]), dict(saved["constants"]), dict(saved["optim"])
        sizes = {key: saved[key] for key in ("steps", "batch")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not the run.json of a run: pass one that `student train` wrote"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, this version reads {FORMAT}: pass --recipe {name} instead"
        )
    found = _recipe(path, name, recipe)
    found = dataclasses.replace(
        found,
        constants=_filled(path, found.constants, constants, found.name, ""),
        optim=_filled(path, found.optim, optim, found.name, "optim."),
        **{key: _checked(path, key, value, kinds_of(Recipe)[key]) for key, value in sizes.items()},
    )
    kept = {key: value for key, value in run.items() if key not in NOT_TAKEN}
    _filled(path, Run(data="data", cache="cache", out="out"), kept, found.name, "run.")
    return Config(path, found, kept)


def _recipe(path: Path, name: str, named: str | None) -> Recipe[Any]:
    """Return the recipe of a file: the one that the user named, or one of the table or of an installed package."""
    if named is not None:
        recipe = find(named)
        if recipe.name != name:
            raise UserError(f"{path} is of the recipe {name}, not {recipe.name}: drop --recipe or --config")
        return recipe
    if name not in RECIPES and name not in installed():
        raise UserError(
            f"{path} is of the recipe '{name}', which is not installed: pass --recipe PACKAGE.MODULE:RECIPE of a package "
            "that you trust"
        )
    return find(name)


def _filled(path: Path, record: Record, values: dict[str, Any], recipe: str, prefix: str) -> Record:
    kinds = kinds_of(type(record))
    for name, value in values.items():
        if name not in kinds:
            raise UserError(
                f"{path}: {recipe} has no setting '{prefix}{name}': pass --recipe and --set instead"
            )
        _checked(path, f"{prefix}{name}", value, kinds[name])
    return dataclasses.replace(record, **values)


def _checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    try:
        return check(value, kind)
    except ValueError as error:
        raise UserError(f"{path}: {name}={value}: {error}") from error
