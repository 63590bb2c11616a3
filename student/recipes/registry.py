"""The table of recipes by name, and the recipes of installed packages."""

import dataclasses
import importlib.metadata
from typing import Any

from student.recipe import Recipe
from student.recipes.clip import CLIP
from student.recipes.clip_kd import CLIP_KD
from student.recipes.clip_td import CLIP_TD
from student.recipes.psd import PSD
from student.recipes.sds_clip import SDS_CLIP
from student.recipes.vlkd import VLKD
from teachercache.core import installed as packages
from teachercache.core.errors import UserError, resolve

GROUP = "student.recipes"  # entry points: name -> a Recipe

RECIPES: dict[str, Recipe[Any]] = {
    "clip": CLIP,
    "clip_kd": CLIP_KD,
    "clip_td": CLIP_TD,
    "sds_clip": SDS_CLIP,
    "vlkd": VLKD,
    "psd": PSD,
}


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the recipes of installed packages by name, without importing them."""
    return packages.installed(GROUP)


def find(name: str) -> Recipe[Any]:
    """Return a recipe.

    Args:
        name: A name in `RECIPES`, the name of an installed package's recipe, or `package.module:RECIPE`.

    Raises:
        UserError: There is no such recipe (the message lists those that exist), or it is no Recipe.
    """
    points = {point: found for point, found in installed().items() if point not in RECIPES}
    recipe = (
        packages.load_installed(points[name])
        if name in points
        else resolve(name, {**RECIPES, **points}, kind="recipe")
    )
    if not isinstance(recipe, Recipe):
        raise UserError(f"--recipe {name} is a {type(recipe).__name__}, not a student.recipe.Recipe")
    constants = type(recipe.constants)
    if not (dataclasses.is_dataclass(constants) and constants.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(
            f"--recipe {name}: its constants are a {constants.__name__}: make it a dataclass with "
            "@dataclasses.dataclass(frozen=True)"
        )
    return recipe
