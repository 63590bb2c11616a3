"""`student generate`: caption pictures, or answer a question about them."""

from pathlib import Path

import click

from student.commands.options import run_path
from teachercache.commands.options import any_path, output_options, print_json
from teachercache.core.command import path, text
from teachercache.core.progress import show, status, suggest


@click.command()
@click.argument("model", type=path, shell_complete=run_path)
@click.option(
    "--image",
    "images",
    type=path,
    shell_complete=any_path,
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
@output_options
def generate(
    model: Path,
    images: tuple[Path, ...],
    question: str | None,
    masks: int | None,
    beams: int | None,
    as_json: bool,
) -> None:
    """Caption pictures, or answer a question about them, with a run of vlkd or its export.

    \u0008
    student generate runs/NAME --image cat.jpg
    student generate runs/NAME --image cat.jpg --question "What color is the cat?"
    """
    with status("importing libraries"):
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
    pairs = list(zip(images, texts, strict=True))
    if as_json:
        print_json([{"image": image, "text": answer} for image, answer in pairs])
    else:
        for image, answer in pairs:
            show(f"{image}: {answer}" if len(images) > 1 else answer)
    suggest("student", "verify", model)
