"""Load a trained student, or a teacher by name, for measuring and exporting."""

from pathlib import Path

from evaluation.models.encoder import Encoder, of_teacher
from evaluation.models.matcher import SAMPLES, Matcher, of_diffusion, of_encoder
from student.contract import Capability, Student, require
from student.models.registry import load_student
from student.models.run_file import is_run
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.teachers.diffusion.model import diffusion_of
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher


def load_run(folder: Path) -> Student:
    """Load the student of a run or exported folder in evaluation mode, from that folder alone."""
    student = load_student(folder)
    student.train(False)
    return student


def named_teacher(model: str) -> Teacher:
    """Load a teacher by name or folder."""
    if "/" in model and ":" not in model and not Path(model).is_dir():
        raise UserError(
            f"no run or exported folder at {model}: pass one, or a teacher's name (`tc teachers`)"
        )
    return load(model)


def find_encoder(model: str) -> tuple[Encoder, Path | None]:
    """Return the Encoder of a run, a folder or a teacher, and the run folder where results are kept."""
    path, device = Path(model), pick_device()
    if not is_run(path):
        return of_teacher(named_teacher(model), device=device), None
    return run_encoder(path, device=device), path


def run_encoder(run: Path, *, device: str) -> Encoder:
    """Return the student of a run as an Encoder."""
    student = load_run(run)
    require(student, Capability.ENCODES, str(run))
    return student.encoder(run.name, str(run), device)


def find_matcher(model: str, samples: int | None) -> tuple[Matcher, Path | None]:
    """Return a Matcher for whatever `find_encoder` takes, or for a diffusion model; and the run folder."""
    if not is_run(Path(model)):
        teacher = named_teacher(model)
        if diffusion_of(teacher) is not None:
            return of_diffusion(teacher, samples=samples or SAMPLES, device=pick_device()), None
        return of_encoder(of_teacher(teacher, device=pick_device())), None
    encoder, folder = find_encoder(model)
    return of_encoder(encoder), folder
