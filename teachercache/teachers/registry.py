"""Teachers by name: an ordinary dict. One file per kind; heavy imports wait until a teacher is loaded."""

from teachercache.core.errors import UserError, resolve
from teachercache.teachers.teacher import CLIP_OUTPUTS, DIFFUSION_OUTPUTS, Entry, Teacher


def _clip(doc: str, architecture: str, tag: str) -> Entry:
    def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
        from teachercache.teachers.clip.loading import load_clip

        return load_clip(name, architecture=architecture, tag=tag, weights=weights, outputs=outputs)

    return Entry(doc, load, CLIP_OUTPUTS)


def _clip_lite(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    from teachercache.teachers.clip.lite import load_clip_lite

    return load_clip_lite(name, weights=weights, outputs=outputs)


def _diffusion(doc: str, source: str) -> Entry:
    def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
        from teachercache.teachers.diffusion.loading import load_diffusion

        return load_diffusion(name, source=source, weights=weights, outputs=outputs)

    return Entry(doc, load, DIFFUSION_OUTPUTS, default=2)


def _regions(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    from teachercache.teachers.regions import load_regions

    return load_regions(name, weights=weights, outputs=outputs)


TEACHERS: dict[str, Entry] = {
    "clip-vit-b16": _clip("OpenAI CLIP ViT-B/16, 512-d", "ViT-B-16-quickgelu", "openai"),
    "clip-vit-b32": _clip("OpenAI CLIP ViT-B/32, 512-d", "ViT-B-32-quickgelu", "openai"),
    "clip-vit-l14": _clip("OpenAI CLIP ViT-L/14, 768-d", "ViT-L-14-quickgelu", "openai"),
    "clip-vit-l14-336": _clip("OpenAI CLIP ViT-L/14 at 336 px, 768-d", "ViT-L-14-336-quickgelu", "openai"),
    "clip-rn50": _clip("OpenAI CLIP ResNet-50, 1024-d", "RN50-quickgelu", "openai"),
    "clip-rn50x16": _clip("OpenAI CLIP RN50x16, 768-d", "RN50x16-quickgelu", "openai"),
    "clip-lite": Entry(
        "EfficientNet-Lite0 + MiniLM with heads aligned by `bash scripts/demo`, 512-d",
        _clip_lite,
        CLIP_OUTPUTS,
    ),
    "clip-lite-towers": Entry(
        "the two towers of clip-lite before any alignment, 1280-d and 384-d", _clip_lite, CLIP_OUTPUTS
    ),
    "regions": Entry(
        "Faster R-CNN of torchvision at given boxes or at its own, 37 regions (regions:N for N), 1024-d",
        _regions,
        ("regions",),
    ),
    "regions-lite": Entry(
        "EfficientNet-Lite0 at given boxes or at the quarters, 10 regions (regions:N for N), 472-d",
        _regions,
        ("regions",),
    ),
    "sd-v1-4": _diffusion(
        "Stable Diffusion v1-4, 512 px, text states 77 x 768", "hub:CompVis/stable-diffusion-v1-4"
    ),
    "sd-tiny": _diffusion(
        "a small Stable Diffusion of drawn scenes, made by scripts/teachers/train_sd_tiny.py", "folder:"
    ),
}


def find(name: str) -> Entry:
    """The entry of a teacher's name, of `open_clip:MODEL/TAG`, `hf:ORG/NAME`, `diffusers:ORG/NAME`, a folder or run."""
    from pathlib import Path

    if name.startswith("open_clip:"):
        architecture, slash, tag = name.removeprefix("open_clip:").partition("/")
        if not slash:
            raise UserError(
                f"--teacher {name}: write open_clip:MODEL/TAG, for example open_clip:ViT-B-32/laion2b_s34b_b79k"
            )
        return _clip(f"open_clip {architecture}, {tag}", architecture, tag)
    if name.startswith("hf:"):
        return _clip(f"{name} on the Hugging Face hub", f"hf-hub:{name.removeprefix('hf:')}", "")
    if name.startswith("diffusers:"):
        return _diffusion(f"{name} on the Hugging Face hub", f"hub:{name.removeprefix('diffusers:')}")
    if name not in TEACHERS and Path(name, "model_index.json").is_file():
        return _diffusion(f"the diffusers folder {name}", f"folder:{name}")
    if name not in TEACHERS and Path(name).is_dir():
        return _clip(f"the open_clip folder or run {name}", f"local-dir:{name}", "")
    entry = resolve(name, TEACHERS, kind="teacher")
    if not isinstance(entry, Entry):
        raise UserError(
            f"--teacher {name} is a {type(entry).__name__} and not a teachercache.teachers.teacher.Entry"
        )
    return entry


def load(name: str, *, weights: str = "pretrained", outputs: tuple[str, ...] | None = None) -> Teacher:
    """A teacher in float32 on the CPU, in evaluation mode, parameters frozen; its first outputs unless told others."""
    entry = find(name)
    outputs = entry.outputs[: entry.default] if outputs is None else outputs
    if not outputs:
        raise UserError(f"--outputs names nothing: choose from {', '.join(entry.outputs)}")
    for output in outputs:
        if output.partition(":")[0] not in entry.outputs:
            raise UserError(
                f"teacher {name} has no output '{output}': choose from {', '.join(entry.outputs)}"
            )
    return entry.load(name, weights=weights, outputs=outputs)


def outputs_for(name: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return the outputs of a teacher that write the fields."""
    return ("patches",) if "patch_emb" in fields else ("embeddings",)
