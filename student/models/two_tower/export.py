"""Export a two-tower student for open_clip or transformers, and compare the reloaded model with the student.

Modules that only distillation needs (projections, ICL's scale) are not in a run's model.safetensors, so no
export contains them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from student.contract import Exported, ExportRequest
from student.models.run_file import write_tensors
from student.models.two_tower import export_hf
from student.models.two_tower.model import TwoTower, open_clip_state
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.data.views import describe_view
from teachercache.teachers.clip.folders import folder_parts, open_folder, tokenizer_of

TOLERANCE = 1e-4  # relative to the largest value of the embeddings, or to 1 if that is smaller
PROBES = ["a photo of a red bird", "It's 12 o'clock, \u00fcber \u65e5\u672c \U0001f44d", "", "word " * 100]

# Pixels and texts -> raw image and text embeddings
Encode = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


class Format(NamedTuple):
    """How one format is written and loaded.

    Attributes:
        library: The library that loads the folder.
        write: Write the student to a folder; return notes for its users, one line each.
        load: Load the encoders of a folder.
        usage: Return the code that loads the folder, for the model card.
        call: One line of code that loads the folder, for the terminal; {} stands for the folder.
    """

    library: str
    write: Callable[[TwoTower, Path], list[str]]
    load: Callable[[Path], Encode]
    usage: Callable[[TwoTower, str], str]
    call: str


def export(student: TwoTower, request: ExportRequest) -> Exported:
    """Write the student in one of FORMATS and compare the embeddings of the written model with the student's.

    Raises:
        UserError: The written model computes other embeddings, or the format cannot express the student.
    """
    kind = FORMATS[request.form]
    notes = kind.write(student, request.folder)
    _compare(student, kind.load(request.folder), request.form)
    return Exported(kind.library, kind.usage(student, request.name), kind.call, notes)


def _compare(student: TwoTower, encode: Encode, form: str) -> None:
    """Raise UserError unless the written folder computes the student's embeddings."""
    size = describe_view(student.preprocess)["size"]
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = student.model.encode_image(pixels), student.model.encode_text(student.tokenizer(PROBES))
        theirs = encode(pixels, PROBES)
    for name, a, b in zip(("image", "text"), ours, theirs, strict=True):
        worst = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
        if not worst <= TOLERANCE * max(1.0, float(a.abs().max())):
            other = "" if form == "open_clip" else ": use --format open_clip"
            raise UserError(
                f"as {form} this student would compute other {name} embeddings (by {worst:.2g}){other}"
            )


def _write_open_clip(student: TwoTower, folder: Path) -> list[str]:
    """Write open_clip_config.json, open_clip_model.safetensors and the files of a Hugging Face text tower."""
    write_tensors(open_clip_state(student), folder / "open_clip_model.safetensors", folder)
    if isinstance(student.tokenizer, HFTokenizer):
        # open_clip looks for both in the folder itself
        student.tokenizer.tokenizer.save_pretrained(folder)
        student.model.text.config.save_pretrained(folder)
    view = describe_view(student.preprocess)
    preprocess = {**view, "size": view["size"][0] if view["size"][0] == view["size"][1] else view["size"]}
    config = {"model_cfg": student.model_cfg, "preprocess_cfg": preprocess}
    write_whole(folder / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    return []


def _load_open_clip(folder: Path) -> Encode:
    module, _ = open_folder(str(folder))
    tokenize = tokenizer_of(folder_parts(str(folder))[0], str(folder))
    module = module.eval()
    return lambda pixels, texts: (module.encode_image(pixels), module.encode_text(tokenize(texts)))


def _open_clip_usage(student: TwoTower, folder: str) -> str:
    return f"""
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
"""


FORMATS = {
    "open_clip": Format(
        "open_clip",
        _write_open_clip,
        _load_open_clip,
        _open_clip_usage,
        "open_clip.create_model_and_transforms('local-dir:{}')",
    ),
    "hf": Format(
        "transformers",
        export_hf.write,
        export_hf.load,
        export_hf.usage,
        "transformers.AutoModel.from_pretrained('{}')",
    ),
}
