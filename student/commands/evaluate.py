"""`student eval`: measure models on a task."""

import json
from pathlib import Path

import click

from evaluation.tasks.registry import SHORT, TASKS
from student.commands.options import local
from student.recipe import DEMO_DATA
from teachercache.commands.options import json_option
from teachercache.core.command import place, text
from teachercache.core.progress import show
from teachercache.core.ranges import MOST


@click.command("eval")
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
@json_option
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
    from student import api

    more = {"samples": samples, "figures": figures, "out": out}
    if task == "all":
        from evaluation.results.suite_tables import suite_table

        report = api.evaluate_all(models, data, **more)
        printed = {"results": report.results, "skipped": report.skipped}
        print(json.dumps(printed)) if as_json else show(suite_table(report))
        return
    from evaluation.results.run import table

    results = api.evaluate(models, task, data, **more)
    if as_json:
        # One line for each model and each way in which it answers
        print(*map(json.dumps, results), sep="\n")
    else:
        show(table(results))
