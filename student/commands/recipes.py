"""`student recipes`: list the recipes, or show one."""

import dataclasses
import sys

import click

from teachercache.core.command import text
from teachercache.core.progress import show


@click.command()
@click.argument("name", type=text, required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or show one: its equations, its settings and the `tc build` command that it needs.

    \u0008
    student recipes
    student recipes clip_kd
    """
    from student.recipes.registry import RECIPES, find, installed

    if name is None:
        for recipe in RECIPES.values():
            print(f"{recipe.name:10} {recipe.doc}  [{recipe.paper}]")
        for entry in installed().values():
            print(f"{entry.name:10} of the installed package {entry.value.partition(':')[0]}")
        return
    recipe = find(name)
    print((sys.modules[recipe.loss.__module__].__doc__ or recipe.doc).strip(), end="\n\n")
    for setting, value in dataclasses.asdict(recipe.constants).items():
        show(f"  --set {setting}={value}")
    for setting, value in dataclasses.asdict(recipe.optim).items():
        print(f"  --set optim.{setting}={value}")
    print(f"  --data {recipe.data} --steps {recipe.steps} --batch-size {recipe.batch}")
