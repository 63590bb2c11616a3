"""A trained two-tower student as what an Encoder is made of; teachers by name. Knows no tasks."""

from pathlib import Path
from typing import Any

from student.checkpoint import load_student
from teachercache.core.errors import UserError
from teachercache.data.views import describe_view
from teachercache.teachers.registry import load


def encoder_parts(run: Path, *, device: str) -> dict[str, Any]:
    """The fields of `evaluation.models.encoder.Encoder` for a run folder's student."""
    trained = load_student(run).to(device)
    return {
        "name": run.name,
        "pretrained": str(run),
        "size": tuple(describe_view(trained.preprocess)["size"]),
        "view": trained.view,
        "tokenize": trained.tokenizer,
        "encode_image": trained.model.encode_image,
        "encode_text": trained.model.encode_text,
        "device": device,
        "tower": trained.model.visual,
        "mean": tuple(trained.preprocess["mean"]),
        "std": tuple(trained.preprocess["std"]),
        "scale": float(trained.model.logit_scale.detach().exp()),
    }


def named_teacher(model: str) -> Any:
    """A teacher by name or folder."""
    if "/" in model and ":" not in model and not Path(model).is_dir():
        raise UserError(
            f"no run or exported folder at {model}: pass one, or a teacher's name (`tc teachers`)"
        )
    return load(model)
