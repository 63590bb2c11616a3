"""The commands that are disturbed, the small inputs that they read, and what is there before each."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from scripts.benchmarks.faults.client import COUNT, Ended, Fault, Warm
from teachercache.core.errors import UserError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
ROWS = 12


@dataclasses.dataclass(frozen=True)
class Job:
    """A command whose writes are disturbed.

    Attributes:
        words: The command; {root} and {in} are the folder that is disturbed and that of the inputs.
        before: Commands that run undisturbed before it.
        killed: Whether the last command of `before` is killed after three fifths of its events.
    """

    words: str
    before: tuple[str, ...] = ()
    killed: bool = False


BUILD = (
    "tc build --teacher {in}/teacher --out {root}/c.zarr --batch-size 4 --workers 0 --precision fp32 --data "
)
BUILT = BUILD + "{in}/data"
FEWER = BUILD + "{in}/fewer"
TRAIN = (
    "student train --recipe clip_kd --data {in}/data --cache {in}/c.zarr --out {root}/run --steps 6 --batch-size 4"
    " --set model=vit-micro --set run.workers=0 --set run.save_every=2"
)
TRAINED = "student train --recipe clip_kd --data {in}/data --cache {in}/c.zarr --out {root}/run --steps 2 --batch-size 4"
TRAINED += " --set model=vit-micro --set run.workers=0"
JOBS = {
    "manifest": Job("tc manifest {in}/data --out {root}/m.parquet"),
    "build": Job(BUILT),
    "grow": Job(BUILT, (FEWER,)),
    "prune": Job(FEWER + " --prune", (BUILT,)),
    "index": Job("tc index {root}/c.zarr --kind flat", (BUILT,)),
    "index_hnsw": Job("tc index {root}/c.zarr --kind hnsw", (BUILT,)),
    "index_grow": Job(
        "tc index {root}/c.zarr --kind hnsw", (FEWER, "tc index {root}/c.zarr --kind hnsw", BUILT)
    ),
    "analyze": Job("tc analyze {root}/c.zarr --points 10", (BUILT,)),
    "train": Job(TRAIN),
    "evaluated": Job(TRAIN + " --eval-every 2"),
    "resume": Job(TRAIN + " --resume", (TRAIN,), killed=True),
    "export_open_clip": Job("student export {root}/run --format open_clip --out {root}/export", (TRAINED,)),
    "export_hf": Job("student export {root}/run --format hf --out {root}/export", (TRAINED,)),
    "eval": Job("student eval {root}/run --task retrieval --data {in}/data", (TRAINED,)),
    "figures": Job(
        "student eval {root}/run --task zeroshot --data {in}/data --figures {root}/figures", (TRAINED,)
    ),
}


def words_of(warm: Warm, text: str) -> list[str]:
    """Return the words of a command with its folders."""
    return [
        word.replace("{root}", str(warm.root)).replace("{in}", str(warm.folder / "in"))
        for word in text.split()
    ]


def must(warm: Warm, text: str, fault: Fault | None = None) -> Ended:
    """Run a command that must succeed.

    Raises:
        UserError: It does not; the message holds its output.
    """
    ended = warm.run(words_of(warm, text), fault)
    if ended.code != 0:
        raise UserError(f"`{text}` ends with {ended.code} undisturbed: {ended.output[-2000:]}")
    return ended


def make_inputs(warm: Warm) -> None:
    """Write pictures with captions, a tiny teacher and its cache into the folder of inputs."""
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    folder = warm.folder / "in"
    random = np.random.default_rng(0)
    for name, rows in (("data", ROWS), ("fewer", ROWS - 4)):
        for i in range(rows):
            place = folder / name / ("test" if i % 3 == 2 else "train") / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            source = folder / "data" / place.relative_to(folder / name) / f"{i:03d}.png"
            if name == "data":
                Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(source)
            else:
                shutil.copy2(source, place)
            (place / f"{i:03d}.txt").write_text(f"square {i}\n")
    torch.manual_seed(0)
    teacher = folder / "teacher"
    teacher.mkdir()
    save_file(open_clip.CLIP(**TINY).state_dict(), teacher / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (teacher / "open_clip_config.json").write_text(json.dumps(config))
    must(warm, BUILT.replace("{root}", "{in}"))


def prepare(warm: Warm, job: Job) -> Path:
    """Run what comes before a job, once for all jobs that share it.

    Returns:
        A folder with a copy of what is then there, to which `restore` goes back.
    """
    digest = hashlib.sha256(repr((job.before, job.killed)).encode()).hexdigest()[:16]
    before = warm.folder / "before" / digest
    if before.exists():
        restore(warm, before)
        return before
    empty(warm.root)
    for i, text in enumerate(job.before):
        if job.killed and i == len(job.before) - 1:
            clean = must(warm, text, COUNT)
            empty(warm.root)
            warm.run(words_of(warm, text), Fault("kill", round(0.6 * len(clean.events))))
        else:
            must(warm, text)
    shutil.copytree(warm.root, before, symlinks=True)
    return before


def empty(folder: Path) -> None:
    """Make a folder that holds nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def restore(warm: Warm, before: Path) -> None:
    """Make the root what it was before the job."""
    shutil.rmtree(warm.root, ignore_errors=True)
    shutil.copytree(before, warm.root, symlinks=True)
