"""A trained two-tower student as what an Encoder is made of; teachers by name. Knows no tasks."""

from pathlib import Path
from typing import Any

from student.models.two_tower.loading import load_student
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


def find_encoder(model: str):
    """An Encoder for a run, a folder or a teacher; and the run folder where results are kept."""
    from evaluation.models.encoder import Encoder, of_teacher
    from teachercache.core.device import pick_device

    path, device = Path(model), pick_device()
    if not (path / "run.json").exists():
        return of_teacher(named_teacher(model), device=device), None
    return Encoder(**encoder_parts(path, device=device)), path


def find_matcher(model: str, samples: int | None):
    """A Matcher for whatever `find_encoder` takes, or for a diffusion model; and the run folder."""
    from evaluation.models.encoder import of_teacher
    from evaluation.models.matcher import SAMPLES, of_diffusion, of_encoder
    from teachercache.core.device import pick_device

    if not (Path(model) / "run.json").exists():
        teacher = named_teacher(model)
        if hasattr(teacher.module, "unet"):
            return of_diffusion(teacher, samples=samples or SAMPLES, device=pick_device()), None
        return of_encoder(of_teacher(teacher, device=pick_device())), None
    encoder, folder = find_encoder(model)
    return of_encoder(encoder), folder
