"""`student train`: train a student with a recipe."""

import json
from typing import Any

import click

from student.commands.options import recipe_names, run_path
from teachercache.commands.options import SEED, any_path, names_in, output_options, paths_of, print_json
from teachercache.core.command import place, text
from teachercache.core.progress import suggest
from teachercache.core.ranges import MOST


@click.command()
@click.option(
    "--recipe",
    type=text,
    shell_complete=names_in(recipe_names),
    help="A name from `student recipes`, or package.module:RECIPE; with --config, the recipe of that run.",
)
@click.option(
    "--config",
    type=place,
    metavar="RUN.json",
    shell_complete=paths_of("runs/*/run.json"),
    help="The run.json of a run, whose recipe and settings are taken; options and --set come on top.",
)
@click.option(
    "--data",
    type=place,
    shell_complete=any_path,
    help="The training data, as in `tc build --data`; default: the recipe's (`student recipes NAME`).",
)
@click.option(
    "--cache",
    type=place,
    shell_complete=paths_of("caches/*/*.zarr", "caches/*", "*.zarr"),
    help="A cache or a folder of caches, separated by commas for several teachers; default: caches/<data>.",
)
@click.option(
    "--out", type=place, shell_complete=run_path, help="The run folder; default: runs/<recipe>-<time>."
)
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
@click.option("--report-to", metavar="NAMES", help="tensorboard, wandb, or tensorboard,wandb.")
@click.option("--seed", type=SEED, help="Seed of all random numbers; default: 0.")
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
@output_options
@click.pass_context
def train(
    context: click.Context,
    recipe: str | None,
    data: str | None,
    resume: str | None,
    print_config: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a student with a recipe.

    \u0008
    student train --recipe clip_kd
    student train --recipe clip_kd --set fd=1000 --set model=ViT-S-16 --steps 10000
    student train --config runs/clip_kd-20260101-120000/run.json --set fd=1000
    student train --recipe clip_kd --resume --out runs/clip_kd-20260101-120000
    torchrun --nproc-per-node 4 -m student train --recipe clip_kd --out runs/four --resume auto

    A checkpoint is saved every run.save_every steps and every run.save_minutes minutes, and the last run.keep ones
    are kept. SIGUSR1 saves one and goes on. SIGTERM and SIGHUP save one and stop with exit code 143, Ctrl-C with 130.
    """
    from student import api

    options |= {"resume": {"yes": True, "auto": "auto"}.get(resume or "", False), "dry_run": dry_run}
    typed = [word for word in context.obj or () if word not in ("--dry-run", "--print-config")]
    if print_config:
        from student.settings import as_json as json_of

        print(json.dumps(json_of(*api.resolve(recipe, data, **options)), indent=1))
        suggest("student", *typed, "--dry-run")
        return
    trained = api.train(recipe, data, **options)
    if as_json:
        print_json(trained)
    if dry_run:
        suggest("student", *typed)
    else:
        suggest(*trained.next_command)
