"""The command-line interface `student`, whose commands read options, call one function and print."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from evaluation.tasks.registry import SHORT, TASKS
from evaluation.tasks.registry import find as find_task
from evaluation.tasks.task import Kind
from student.recipe import DEMO_DATA
from teachercache.core.command import path, place, run_command, text
from teachercache.core.errors import UserError
from teachercache.core.paths import local_path
from teachercache.core.process import rank
from teachercache.core.progress import say, show
from teachercache.core.ranges import MOST

MATCHERS = ", ".join(task.name for task in TASKS.values() if task.kind is Kind.MATCHER)
SAMPLES_ERROR = f"--samples is a number of noise draws: only {MATCHERS} take one"


def local(text: str | Path) -> Path:
    """Return the path of an option that writes files; click reports a URL as a wrong value."""
    return local_path(place(str(text)), "the path")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def student() -> None:
    """Train students on cached teacher outputs, evaluate them and export them.

    \u0008
    student train --recipe clip_kd        # with the cache of data/demo
    student eval runs/NAME --task retrieval
    student export runs/NAME --format open_clip

    --debug anywhere in a command shows the traceback of an error.
    """


@student.command()
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


@student.command()
@click.option(
    "--recipe",
    "name",
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
@click.option(
    "--batch-size", "batch", type=click.IntRange(2, MOST), help="Rows per step, over all processes."
)
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
    "online_teacher",
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
    name: str,
    resume: str | None,
    dry_run: bool,
    print_config: bool,
    settings: tuple[str, ...],
    **options: Any,
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
    from student.recipes.registry import find
    from student.settings import TrainOptions, as_json, on_this_machine, resolve_run

    recipe, run = resolve_run(find(name), TrainOptions(**options), settings, resume=resume or "")
    if print_config:
        print(json.dumps(as_json(recipe, run), indent=1))
        return

    from student.inference.measure import score_while_training
    from student.training.loop import next_command
    from student.training.loop import train as run_training

    run = on_this_machine(run)
    resuming = resume == "yes" or (resume == "auto" and Path(run.out).exists())
    evaluate = score_while_training(recipe, run) if run.eval_every else None
    new_name = options["out"] is None and not resuming
    trained = run_training(
        recipe, run, resume=resuming, dry_run=dry_run, evaluate=evaluate, new_name=new_name
    )
    if rank() == 0 and not dry_run:
        say(next_command(trained, recipe, run))


@student.command("eval")
@click.argument("models", nargs=-1, type=place, required=True, metavar="MODEL...")
@click.option(
    "--task",
    type=text,
    required=True,
    help=f"One of {', '.join(TASKS)}; short names: {', '.join(SHORT)}; or all: the data sets below --data.",
)
@click.option(
    "--data",
    type=place,
    default=DEMO_DATA,
    show_default=True,
    help="The evaluation data: its test split, or all of it if it has no splits.",
)
@click.option(
    "--out",
    type=local,
    help="The folder where --task all writes suite.json, .csv and .md; default: evals/<data>.",
)
@click.option(
    "--figures", type=local, metavar="DIR", help="Also draw the models' predictions for some rows, as PNG."
)
@click.option(
    "--samples", type=click.IntRange(1, MOST), help="Noise draws per match of a diffusion MODEL; default: 16."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(
    models: tuple[str, ...],
    task: str,
    data: str,
    out: Path | None,
    figures: Path | None,
    samples: int | None,
    as_json: bool,
) -> None:
    """Evaluate runs, exported open_clip folders, or teachers by name; the table has a column for each.

    For vcr, snli_ve and vqa, a MODEL is a run or a cache, and several also form an ensemble. For winoground,
    aro and sugar_crepe, it may also be a diffusion model. For captions and open_vqa, it is a run of vlkd or
    its export; for glue, xsum and text_loss, it may also be a BART folder.

    \u0008
    student eval runs/NAME --task retrieval
    student eval clip-lite runs/NAME --task zeroshot --figures figures/
    student eval runs/NAME --task imagenet --data imagenet-r/
    student eval runs/NAME --task coco_detection --data coco/
    student eval caches/vcr/clip-vit-b16.zarr --task vcr --data vcr1/val.jsonl
    student eval runs/NAME sd-tiny --task winoground --data data/compositions/winoground
    student eval runs/A runs/B --task all --data /datasets
    student eval runs/NAME --task captions --data coco/dataset_coco.json
    student eval models/bart-base runs/NAME --task glue:lr=1e-4,epochs=3 --data GLUE/
    """
    from evaluation.results.run import table
    from evaluation.results.suite_tables import suite_table
    from student.inference.measure import measure_models, measure_suite

    if task == "all":
        if samples:
            raise UserError(SAMPLES_ERROR)
        report = measure_suite(models, data, out or Path("evals", Path(data).name or "data"), figures)
        printed = {"results": report.results, "skipped": report.skipped}
        print(json.dumps(printed)) if as_json else show(suite_table(report))
        return
    if out is not None:
        raise UserError(
            "--out is where --task all writes its tables; the results of a run are kept in RUN/eval"
        )
    chosen = find_task(task)
    if samples and chosen.kind is not Kind.MATCHER:
        raise UserError(SAMPLES_ERROR)
    if figures and chosen.kind is not Kind.ENCODER:
        raise UserError(f"--figures draws what encoders predict: leave it out for {chosen.name}")
    results = measure_models(models, chosen, data, samples=samples, figures=figures)
    if as_json:
        # One line for each model and each way in which it answers
        print(*map(json.dumps, results), sep="\n")
    else:
        show(table(results))


@student.command()
@click.argument("model", type=path)
@click.option(
    "--image",
    "images",
    type=path,
    required=True,
    multiple=True,
    metavar="FILE",
    help="A picture file; repeatable.",
)
@click.option(
    "--question", type=text, default=None, help="Answer this question instead of writing a caption."
)
@click.option(
    "--masks", type=click.IntRange(1, 1000), help="[MASK]s in the prompt; default: 6, or 2 with --question."
)
@click.option("--beams", type=click.IntRange(1, 1000), help="Beam size; default: 6, or 1 with --question.")
def generate(
    model: Path, images: tuple[Path, ...], question: str | None, masks: int | None, beams: int | None
) -> None:
    """Caption pictures, or answer a question about them, with a run of vlkd or its export.

    \u0008
    student generate runs/NAME --image cat.jpg
    student generate runs/NAME --image cat.jpg --question "What color is the cat?"
    """
    from student.inference.generator import describe_pictures
    from teachercache.core.device import pick_device

    texts = describe_pictures(
        model,
        images,
        question=(question or "").strip(),
        masks=masks or 0,
        beams=beams or 0,
        device=pick_device(),
    )
    for image, answer in zip(images, texts, strict=True):
        show(f"{image}: {answer}" if len(images) > 1 else answer)


@student.command("export")
@click.argument("run", type=path)
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["open_clip", "hf"]),
    help="The library that loads the folder: open_clip, or hf for transformers.",
)
@click.option("--out", type=local, help="The folder to write; default: exports/<run>-<format>.")
def write_export(run: Path, form: str, out: Path | None) -> None:
    """Export a trained student, without distillation heads, into a folder for open_clip or transformers.

    \u0008
    student export runs/NAME --format open_clip --out exports/mine
    student export runs/NAME --format hf
    """
    from student.export.write import export

    out, exported = export(run, out or Path("exports", f"{run.resolve().name}-{form}"), form)
    for note in exported.notes:
        say(note)
    say(f"{out}: {exported.call.format(out)}")
    show(out)


@student.command()
@click.argument("folder", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def verify(folder: Path, as_json: bool) -> None:
    """Check that every file of a run or an export holds the bytes that were written; exit code 2 if one does not.

    \u0008
    student verify runs/NAME
    student verify exports/NAME-open_clip
    """
    from student.inference.verify import verify_folder

    report = verify_folder(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(*report.lines(), sep="\n")
    if report.damaged:
        names = ", ".join(problem.file for problem in report.damaged)
        raise UserError(f"{len(report.damaged)} files of {folder} are damaged ({names}): {report.remedy}")


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 after one `error:` line, or 130 or 143 if the command was stopped.
    """
    return run_command(student, args)
