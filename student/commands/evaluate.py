"""`student eval`: measure models on a task."""

from pathlib import Path

import click

from evaluation.tasks.registry import SHORT, TASKS
from student.commands.options import local, model_names, task_names
from student.recipe import DEMO_DATA
from teachercache.commands.options import any_path, names_in, output_options, print_json
from teachercache.core.command import place, text
from teachercache.core.progress import show, suggest
from teachercache.core.ranges import MOST


@click.command("eval")
@click.argument(
    "models", nargs=-1, type=place, required=True, metavar="MODEL...", shell_complete=names_in(model_names)
)
@click.option(
    "--task",
    type=text,
    required=True,
    shell_complete=names_in(task_names),
    help=f"One of {', '.join(TASKS)}; short names: {', '.join(SHORT)}; or all: the data sets below --data.",
)
@click.option(
    "--data",
    type=place,
    default=DEMO_DATA,
    shell_complete=any_path,
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
@output_options
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
        results, skipped, text_table = report.results, report.skipped, suite_table(report)
    else:
        from evaluation.results.run import table

        results, skipped = api.evaluate(models, task, data, **more), []
        text_table = table(results)
    print_json({"results": results, "skipped": skipped}) if as_json else show(text_table)
    suggest(*next_command(models[0]))


def next_command(model: str) -> tuple[str, ...]:
    """Return what to type after the evaluation of a run, or of any other model."""
    from student.api import default_export
    from student.export.write import FORMATS
    from student.inference.load import load_run

    folder = Path(model)
    if not (folder / "model.safetensors").exists() or not (folder / "run.json").exists():
        return "student", "recipes"
    capabilities = load_run(folder).capabilities()
    forms = [form for form, needed in FORMATS.items() if needed in capabilities]
    fresh = [form for form in forms if not default_export(folder, form).exists()]
    if fresh:
        return "student", "export", model, "--format", fresh[0]
    return "student", "verify", model
