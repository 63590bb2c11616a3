"""Recipes by name: an ordinary dict; a recipe of your own is `my_package.my_module:RECIPE`."""

from student.recipe import Recipe
from student.recipes.clip import CLIP
from student.recipes.clip_kd import CLIP_KD
from student.recipes.clip_td import CLIP_TD
from student.recipes.psd import PSD
from student.recipes.sds_clip import SDS_CLIP
from student.recipes.vlkd import VLKD
from teachercache.core.errors import UserError, resolve

RECIPES: dict[str, Recipe] = {
    "clip": CLIP,
    "clip_kd": CLIP_KD,
    "clip_td": CLIP_TD,
    "sds_clip": SDS_CLIP,
    "vlkd": VLKD,
    "psd": PSD,
}


def find(name: str) -> Recipe:
    """The recipe of that name; UserError names those there are."""
    recipe = resolve(name, RECIPES, kind="recipe")
    if not isinstance(recipe, Recipe):
        raise UserError(f"--recipe {name} is a {type(recipe).__name__}, not a student.recipe.Recipe")
    return recipe
