"""Map names to teachers: a dict of ours, and the entry points of installed packages.

The heavy imports of a teacher run when it is loaded.
"""

import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from teachercache.cache.spec import to_dict
from teachercache.core.errors import UserError, calling, closest, resolve
from teachercache.core.installed import installed, load_installed
from teachercache.core.progress import status
from teachercache.teachers.allowed import PLAIN_NAME
from teachercache.teachers.teacher import (
    CLIP_NEEDS,
    CLIP_OUTPUTS,
    CLIP_WRITES,
    DIFFUSION_OUTPUTS,
    DIFFUSION_WRITES,
    REGION_WRITES,
    Entry,
    Teacher,
)

GROUP = "teachercache.teachers"
SMALL_TEACHERS = ("clip-lite", "regions-lite", "sd-tiny")  # `teacher_for` prefers them


def _clip(doc: str, architecture: str, tag: str) -> Entry:
    def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
        from teachercache.teachers.clip.loading import load_clip

        return load_clip(name, architecture=architecture, tag=tag, weights=weights, outputs=outputs)

    return Entry(doc, load, CLIP_OUTPUTS, writes=CLIP_WRITES, needs=CLIP_NEEDS)


def _clip_lite(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    from teachercache.teachers.clip.lite import load_clip_lite

    return load_clip_lite(name, weights=weights, outputs=outputs)


def _diffusion(doc: str, source: str) -> Entry:
    def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
        from teachercache.teachers.diffusion.loading import load_diffusion

        return load_diffusion(name, source=source, weights=weights, outputs=outputs)

    return Entry(doc, load, DIFFUSION_OUTPUTS, default=2, writes=DIFFUSION_WRITES)


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
        "EfficientNet-Lite0 + MiniLM with aligned heads, from packages of the extra `demo`, 512-d",
        _clip_lite,
        CLIP_OUTPUTS,
        writes=CLIP_WRITES,
        needs=CLIP_NEEDS,
    ),
    "clip-lite-towers": Entry(
        "the two towers of clip-lite before any alignment, 1280-d and 384-d",
        _clip_lite,
        CLIP_OUTPUTS,
        writes=CLIP_WRITES,
        needs=CLIP_NEEDS,
    ),
    "regions": Entry(
        "Faster R-CNN of torchvision at the data's boxes or its own, 37 regions (regions:N for N), 1024-d",
        _regions,
        ("regions",),
        writes=REGION_WRITES,
    ),
    "regions-lite": Entry(
        "EfficientNet-Lite0 at the data's boxes or at the quarters, 10 regions (regions:N for N), 472-d",
        _regions,
        ("regions",),
        writes={"regions": "region_(?:feature|box)"},
    ),
    "sd-v1-4": _diffusion(
        "Stable Diffusion v1-4, 512 px, text states 77 x 768", "hub:CompVis/stable-diffusion-v1-4"
    ),
    "sd-tiny": _diffusion(
        "a small Stable Diffusion of drawn scenes, made by scripts/teachers/train_sd_tiny.py", "folder:"
    ),
}


def installed_teachers() -> dict[str, EntryPoint]:
    """Return the teachers of other packages, the entry points of the group `teachercache.teachers`, by name."""
    return installed(GROUP)


def find(name: str) -> Entry:
    """Return the entry of a name that a user typed.

    Args:
        name: What `find_stored` accepts, or package.module:ENTRY, which is imported.
    """
    module_name, colon, attribute = name.partition(":")
    if _find(name) is None and colon and attribute.isidentifier() and _is_dotted(module_name):
        return _checked(name, resolve(name, TEACHERS, kind="teacher"))
    return find_stored(name)


def find_stored(name: str) -> Entry:
    """Return the entry of a name that was read from a file, such as the metadata of a cache. Import nothing by path.

    Args:
        name: A name of the table, an installed entry point, `open_clip:MODEL/TAG`, `hf:ORG/NAME`,
            `diffusers:ORG/NAME`, or the folder of a model or of a run.

    Raises:
        UserError: No such teacher. A name of the form package.module:ENTRY has to come from the command line.
    """
    entry = _find(name)
    if entry is not None:
        return entry
    if _is_dotted(name.partition(":")[0]) and name.partition(":")[2].isidentifier():
        raise UserError(
            f"teacher '{name}' is not installed, and a stored name is not imported: pass --teacher "
            f"PACKAGE.MODULE:ENTRY of a package that you trust, or install it as an entry point of the group {GROUP}"
        )
    choices = [*TEACHERS, *installed_teachers()]
    raise UserError(f"unknown teacher '{name}': {closest(name, choices)}choose from {', '.join(choices)}")


def _find(name: str) -> Entry | None:
    from pathlib import Path

    if name in TEACHERS:
        return TEACHERS[name]
    points = installed_teachers()
    if name in points:
        return _checked(name, load_installed(points[name]))
    if name.startswith("open_clip:"):
        architecture, slash, tag = name.removeprefix("open_clip:").partition("/")
        if not slash or not PLAIN_NAME.fullmatch(architecture):
            raise UserError(
                f"--teacher {name}: write open_clip:MODEL/TAG, for example open_clip:ViT-B-32/laion2b_s34b_b79k"
            )
        return _clip(f"open_clip {architecture}, {tag}", architecture, tag)
    if name.startswith("hf:"):
        return _clip(f"{name} on the Hugging Face hub", f"hf-hub:{name.removeprefix('hf:')}", "")
    if name.startswith("diffusers:"):
        return _diffusion(f"{name} on the Hugging Face hub", f"hub:{name.removeprefix('diffusers:')}")
    if Path(name, "model_index.json").is_file():
        return _diffusion(f"the diffusers folder {name}", f"folder:{name}")
    if Path(name).is_dir():
        return _clip(f"the open_clip folder or run {name}", f"local-dir:{name}", "")
    return None


def _is_dotted(name: str) -> bool:
    return all(word.isidentifier() for word in name.split("."))


def _checked(name: str, entry: object) -> Entry:
    if not isinstance(entry, Entry):
        raise UserError(
            f"--teacher {name} is a {type(entry).__name__} and not a teachercache.teachers.teacher.Entry"
        )
    return entry


def load(name: str, *, weights: str = "pretrained", outputs: tuple[str, ...] | None = None) -> Teacher:
    """Load a teacher that a user named: in float32 on the CPU, in evaluation mode, with frozen parameters.

    Args:
        name: See `find`.
        weights: pretrained, random:SEED or a path.
        outputs: The `--outputs`; by default the first ones of the entry.
    """
    return load_entry(find(name), name, weights=weights, outputs=outputs)


def load_stored(name: str, *, weights: str = "pretrained", outputs: tuple[str, ...] | None = None) -> Teacher:
    """Load a teacher by a name that was read from a file: see `find_stored` and `load`."""
    return load_entry(find_stored(name), name, weights=weights, outputs=outputs)


def load_entry(entry: Entry, name: str, *, weights: str, outputs: tuple[str, ...] | None) -> Teacher:
    """Load the teacher of an entry under a name: see `load`."""
    outputs = entry.outputs[: entry.default] if outputs is None else outputs
    if not outputs:
        raise UserError(f"--outputs names nothing: choose from {', '.join(entry.outputs)}")
    for output in outputs:
        if output.partition(":")[0] not in entry.outputs:
            near = closest(output, entry.outputs)
            raise UserError(
                f"teacher {name} has no output '{output}': {near}choose from {', '.join(entry.outputs)}"
            )
    who = f"teacher {name}: load"
    with status(f"loading {name}"), calling(f"{who}(name, *, weights, outputs)", entry.load):
        teacher = entry.load(name, weights=weights, outputs=outputs)
    if not isinstance(teacher, Teacher):
        raise UserError(
            f"{who} returned a {type(teacher).__name__}: return a teachercache.teachers.teacher.Teacher"
        )
    with calling(f"teacher {name}: its spec", entry.load):
        to_dict(teacher.spec)
    return teacher


# ----------------------------------------------------------------------------------------------------
# From fields to the command that caches them


def outputs_for(entry: Entry, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the fewest `--outputs` of an entry that write some fields, in the order of the entry.

    `outputs_for(TEACHERS["clip-lite"], ["image_emb", "text_hidden_3", "image_hidden_7"])` is
    `("embeddings", "hidden:3+7")`.

    Raises:
        UserError: No output of the entry writes one of the fields.
    """
    writers = {field: _writers(entry, field) for field in fields}
    missing = [field for field in fields if not writers[field]]
    if missing:
        raise UserError(
            f"no output of the teacher writes the field '{missing[0]}': {', '.join(entry.outputs)}"
        )
    chosen: dict[str, set[int]] = {}
    for field in sorted(fields, key=lambda field: len(writers[field])):  # those without a choice first
        names = [name for name in writers[field] if name in chosen] or [*writers[field]][:1]
        for name in names:
            chosen.setdefault(name, set()).update(writers[field][name])
    needed = {other for name in chosen for other in entry.needs.get(name, ())} | chosen.keys()
    return tuple(
        f"{name}:{'+'.join(map(str, sorted(chosen[name])))}" if chosen.get(name) else name
        for name in entry.outputs
        if name in needed
    )


def teacher_for(fields: Sequence[str], preferred: str = "") -> str:
    """Return the name of a teacher that writes some fields: the preferred one, a small one, or any of the table.

    Raises:
        UserError: No teacher writes all of them.
    """
    names = [*([preferred] if preferred else []), *SMALL_TEACHERS, *TEACHERS, *installed_teachers()]
    for name in names:
        try:
            entry = _find(name)
        except UserError:  # another package cannot be imported
            continue
        if entry is not None and all(_writers(entry, field) for field in fields):
            return name
    raise UserError(f"no teacher writes the fields {', '.join(fields)}: see `tc teachers`")


def _writers(entry: Entry, field: str) -> dict[str, list[int]]:
    """The outputs that write a field, each with the layer numbers that it has to name."""
    matches = {name: re.fullmatch(pattern, field) for name, pattern in entry.writes.items()}
    return {
        name: [int(number) for number in match.groups() if number] for name, match in matches.items() if match
    }
