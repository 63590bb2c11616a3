"""Make the teacher clip-lite: cache the features of its towers and train its two projection heads.

    python -m scripts.teachers.clip_lite            # -> models/clip-lite, which `tc build` then prefers
    python -m scripts.teachers.clip_lite --check    # the packaged heads are what this script trains
    python -m scripts.teachers.clip_lite --write    # replace the packaged heads and their record

The heads are trained with our `clip` recipe. Finished steps are reused; the features of the towers are in
models/clip-lite-parts.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import normalize

from scripts.datasets import scenes
from student import api
from teachercache import api as teacher_api
from teachercache.cache import store
from teachercache.core.command import explained
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.progress import say, show
from teachercache.teachers.clip.lite import HEADS, HOME, RECORD, assemble, joined, packaged_heads, towers
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Inputs

SETTINGS = {
    "steps": 160,
    "batch_size": 512,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.5,
}  # LOG.md, "clip-lite"
TASKS = ("zeroshot", "retrieval")
LEAST_COSINE, MOST_CHANGE = 0.95, 0.03  # of --check: cosines of held-out embeddings, and changes of metrics


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--out", type=Path, default=Path(HOME))
    parser.add_argument(
        "--check", action="store_true", help="train again and compare with the packaged heads"
    )
    parser.add_argument("--write", action="store_true", help="replace the packaged heads and their record")
    options = parser.parse_args()
    try:
        if options.check:
            return check(options.data, options.out)
        if options.write:
            write(options.data, options.out)
        else:
            make(options.data, options.out)
    except UserError as error:
        print(f"error: {explained(error)[1]}", file=sys.stderr)
        return 2
    return 0


def make(data: str, out: Path) -> None:
    """Write the folder of the teacher if it is missing."""
    if out.is_dir():
        say(f"{out} exists")
        return
    assemble(train(data, out, "heads"), out)
    say(f"{out} is ready: tc build --teacher clip-lite")


def train(data: str, out: Path, name: str) -> dict[str, Tensor]:
    """Train the heads on the cached features of the towers, and return them."""
    work = out.with_name(out.name + "-parts")
    cache, run = work / "towers.zarr", work / name
    teacher_api.build("clip-lite-towers", data, cache)
    if not (run / "model.safetensors").exists():
        shutil.rmtree(run, ignore_errors=True)
        settings: dict[str, Any] = {key: value for key, value in SETTINGS.items() if "." in key}
        settings |= {"model": "clip-lite-heads", "run.workers": 0}
        sizes = {"steps": int(SETTINGS["steps"]), "batch_size": int(SETTINGS["batch_size"])}
        api.train("clip", data, cache=cache, out=run, settings=settings, **sizes)  # type: ignore[arg-type]
    return load_file(run / "model.safetensors")


def write(data: str, out: Path) -> None:
    """Write the packaged heads in float16, and their record."""
    heads = {name: tensor.half().contiguous() for name, tensor in train(data, out, "heads").items()}
    content = save(heads)
    HEADS.parent.mkdir(exist_ok=True)
    write_whole(HEADS, content)
    record: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "settings": SETTINGS}
    write_whole(RECORD, json.dumps(record))  # `load` needs the digest; the measurements follow
    about = json.loads(Path(data, "about.json").read_text())
    manifest = store.open_complete(out.with_name(out.name + "-parts") / "towers.zarr").meta.manifest
    record["data"] = {name: about[name] for name in ("source", "seed", "pillow", "packages")}
    record["data"]["manifest"] = manifest
    record["metrics"] = measured()
    record["cosines"] = [[round(value, 4) for value in row] for row in probe().tolist()]
    write_whole(RECORD, json.dumps(record, indent=1) + "\n")
    say(f"{HEADS} and {RECORD.name} are written")


def measured() -> dict[str, float]:
    """Return the held-out metrics of the packaged clip-lite."""
    metrics: dict[str, Any] = {}
    for task in TASKS:
        metrics |= api.evaluate("clip-lite", task)[0]["metrics"]
    return {name: round(float(value), 4) for name, value in metrics.items()}


def probe() -> Tensor:
    """Return the cosines of eight drawn scenes and their captions: what the whole teacher computes, without any data."""
    teacher = load("clip-lite")
    assert teacher.view is not None
    assert teacher.tokenize is not None
    drawn = list(scenes.generate(8, 0))
    images = torch.stack([teacher.view(picture) for picture, *_ in drawn])
    with torch.inference_mode():
        inputs: Inputs = {
            "image": images,
            "text": teacher.tokenize([captions[0] for _, captions, *_ in drawn]),
        }
        fields = teacher.encode(teacher.module, inputs)
    return normalize(fields["image_emb"], dim=-1) @ normalize(fields["text_emb"], dim=-1).T


def check(data: str, out: Path) -> int:
    """Train the heads again, compare them with the packaged ones, and return 1 if they differ."""
    trained, packaged = train(data, out, "heads-check"), packaged_heads()
    cache = store.open_complete(out.with_name(out.name + "-parts") / "towers.zarr")
    rows = [i for i, split in enumerate(store.cached_manifest(cache).column("split")) if split == "test"]
    cosines = {
        "image": agreement(trained, packaged, "visual.head", store.read_field(cache, "image_emb")[rows]),
        "text": agreement(trained, packaged, "text.proj", store.read_field(cache, "text_emb")[rows, 0]),
    }
    shutil.rmtree(out.with_name(out.name + "-parts") / "heads-check")
    recorded, now = json.loads(RECORD.read_text())["metrics"], measured()
    changes = {name: abs(now[name] - value) for name, value in recorded.items()}
    for name, cosine in cosines.items():
        show(f"{name}: mean cosine of held-out embeddings {cosine:.4f} (at least {LEAST_COSINE})")
    show(f"metrics: largest change {max(changes.values()):.4f} (at most {MOST_CHANGE})")
    return int(min(cosines.values()) < LEAST_COSINE or max(changes.values()) > MOST_CHANGE)


def agreement(trained: Mapping[str, Tensor], packaged: Mapping[str, Tensor], head: str, rows: Any) -> float:
    """Return the mean cosine of two versions of a linear head over cached features."""
    module, _ = towers()
    vectors = []
    for heads in (trained, packaged):
        state = joined(module, heads)
        weight = next(tensor for name, tensor in state.items() if name.startswith(head))
        vectors.append(normalize(torch.from_numpy(rows).float() @ weight.T, dim=-1))
    return float((vectors[0] * vectors[1]).sum(-1).mean())


if __name__ == "__main__":
    sys.exit(main())
