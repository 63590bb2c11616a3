"""Load trained students and named teachers as models that can be measured or exported."""

from pathlib import Path
from typing import cast

from evaluation.models.encoder import Encoder, of_teacher
from evaluation.models.matcher import SAMPLES, Matcher, of_diffusion, of_encoder
from student.contract import Capability, Encodes, Student, require
from student.models.registry import load_student
from student.models.run_file import is_run
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path
from teachercache.core.progress import status
from teachercache.teachers.diffusion.model import diffusion_of
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher


def load_run(folder: Path) -> Student:
    """Load the student of a run folder or exported folder in evaluation mode, on the CPU."""
    with status(f"loading {folder}"):
        student = load_student(folder)
    student.train(False)
    return student


def named_teacher(model: str) -> Teacher:
    """Load a teacher by its name, or from an exported folder."""
    if "/" in model and ":" not in model and not Path(model).is_dir():
        raise UserError(
            f"no run or exported folder at {model}: {closest_path(model)}pass one, or a teacher's name (`tc teachers`)"
        )
    return load(model)


def find_encoder(model: str) -> tuple[Encoder, Path | None]:
    """Return a model as an Encoder, and its run folder.

    Args:
        model: A run folder, an exported folder, or a teacher's name.

    Returns:
        The Encoder; and the run folder, where results are kept, or None if the model is not a run.
    """
    path, device = Path(model), pick_device()
    if not is_run(path):
        return of_teacher(named_teacher(model), device=device), None
    return run_encoder(path, device=device), path


def run_encoder(run: Path, *, device: str) -> Encoder:
    """Return the student of a run as an Encoder."""
    student = load_run(run)
    require(student, Capability.ENCODES, str(run))
    return cast(Encodes, student).encoder(run.name, str(run), device)


def find_matcher(model: str, samples: int | None) -> tuple[Matcher, Path | None]:
    """Return a model as a Matcher, and its run folder or None.

    Args:
        model: What `find_encoder` takes, or a diffusion model's name.
        samples: Noise draws per match of a diffusion model; None for the default.
    """
    if not is_run(Path(model)):
        teacher = named_teacher(model)
        if diffusion_of(teacher) is not None:
            return of_diffusion(teacher, samples=samples or SAMPLES, device=pick_device()), None
        return of_encoder(of_teacher(teacher, device=pick_device())), None
    encoder, folder = find_encoder(model)
    return of_encoder(encoder), folder
