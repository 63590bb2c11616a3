"""`student train`: train a student with a recipe."""

import json
from typing import Any

import click

from teachercache.core.command import place, text
from teachercache.core.process import rank
from teachercache.core.progress import say
from teachercache.core.ranges import MOST


@click.command()
@click.option(
    "--recipe",
    required=True,
    type=text,
    help="A name from `student recipes`, or package.module:RECIPE.",
)
@click.option(
    "--data",
    type=place,
    help="The training data, as in `tc build --data`; default: the recipe's (`student recipes NAME`).",
)
@click.option(
    "--cache",
    type=place,
    help="A cache or a folder of caches, separated by commas for several teachers; default: caches/<data>.",
)
@click.option("--out", type=place, help="The run folder; default: runs/<recipe>-<time>.")
@click.option("--steps", type=click.IntRange(1, MOST), help="Number of training steps.")
@click.option("--batch-size", type=click.IntRange(2, MOST), help="Rows per step, over all processes.")
@click.option(
    "--micro-batch",
    type=click.IntRange(2, MOST),
    help="Rows per forward pass of a device; the gradient stays that of the whole batch.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(1, MOST),
    help="Steps between evaluations; the best student so far is kept in OUT/best.",
)
@click.option("--report-to", default="", metavar="NAMES", help="tensorboard, wandb, or tensorboard,wandb.")
@click.option("--seed", default=0, show_default=True, help="Seed of all random numbers.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="yes",
    type=click.Choice(["yes", "auto"]),
    help="Resume from the last checkpoint of --out (default: the recipe's newest run); auto: if there is one.",
)
@click.option(
    "--live",
    is_flag=True,
    help="Run the cache's teacher during training instead of reading its cached outputs.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, run two steps, print time and memory, and write nothing.",
)
@click.option("--print-config", is_flag=True, help="Print the resolved recipe and run as JSON, and exit.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a constant of the recipe, optim.NAME or run.NAME; repeatable.",
)
def train(
    recipe: str, data: str | None, resume: str | None, print_config: bool, dry_run: bool, **options: Any
) -> None:
    """Train a student with a recipe.

    \u0008
    student train --recipe clip_kd
    student train --recipe clip_kd --set fd=1000 --set model=ViT-S-16 --steps 10000
    student train --recipe clip_kd --resume --out runs/clip_kd-20260101-120000
    torchrun --nproc-per-node 4 -m student train --recipe clip_kd --out runs/four --resume auto

    A checkpoint is saved every run.save_every steps and every run.save_minutes minutes, and the last run.keep ones
    are kept. SIGUSR1 saves one and goes on. SIGTERM and SIGHUP save one and stop with exit code 143, Ctrl-C with 130.
    """
    from student import api

    options |= {"resume": {"yes": True, "auto": "auto"}.get(resume or "", False), "dry_run": dry_run}
    if print_config:
        from student.settings import as_json

        print(json.dumps(as_json(*api.resolve(recipe, data, **options)), indent=1))
        return
    trained = api.train(recipe, data, **options)
    if rank() == 0 and not dry_run:
        say(trained.next_command)
