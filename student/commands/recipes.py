"""`student recipes`: list the recipes, or show one."""

import dataclasses
import sys
from typing import Any

import click

from student.commands.options import recipe_names
from student.recipe import Recipe
from teachercache.commands.options import names_in, output_options, print_json
from teachercache.core.command import text
from teachercache.core.progress import show, suggest


@click.command()
@click.argument("name", type=text, required=False, shell_complete=names_in(recipe_names))
@output_options
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one: its equations, its settings and the `tc build` command that it needs.

    \u0008
    student recipes
    student recipes clip_kd
    """
    from student.recipes.registry import RECIPES, find, installed

    if name is not None:
        recipe = find(name)
        print_json(_record(recipe)) if as_json else _print_recipe(recipe)
        suggest("student", "train", "--recipe", name, "--print-config")
        return
    foreign = {entry.name: entry.value.partition(":")[0] for entry in installed().values()}
    if as_json:
        ours = {recipe.name: {"doc": recipe.doc, "paper": recipe.paper} for recipe in RECIPES.values()}
        print_json(ours | {entry: {"package": package} for entry, package in foreign.items()})
    else:
        for recipe in RECIPES.values():
            print(f"{recipe.name:10} {recipe.doc}  [{recipe.paper}]")
        for entry, package in foreign.items():
            print(f"{entry:10} of the installed package {package}")
    suggest("student", "recipes", next(iter(RECIPES)))


def _print_recipe(recipe: Recipe[Any]) -> None:
    print(_equations(recipe), end="\n\n")
    for setting, value in dataclasses.asdict(recipe.constants).items():
        show(f"  --set {setting}={value}")
    for setting, value in dataclasses.asdict(recipe.optim).items():
        print(f"  --set optim.{setting}={value}")
    print(f"  --data {recipe.data} --steps {recipe.steps} --batch-size {recipe.batch}")


def _equations(recipe: Recipe[Any]) -> str:
    """Return the docstring of the recipe's module, or the line of a recipe without one."""
    return (sys.modules[recipe.loss.__module__].__doc__ or recipe.doc).strip()


def _record(recipe: Recipe[Any]) -> dict[str, Any]:
    """Return what `student recipes NAME` shows, for JSON."""
    names = ("name", "doc", "paper", "data", "teacher", "steps", "batch")
    settings = {"constants": dataclasses.asdict(recipe.constants), "optim": dataclasses.asdict(recipe.optim)}
    return {name: vars(recipe)[name] for name in names} | settings | {"equations": _equations(recipe)}
