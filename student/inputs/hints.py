"""Which teacher writes a field, and the `tc build` command that makes a missing cache."""

import shlex
from pathlib import Path

CLIP_LIKE, REGIONS, DIFFUSION = "clip-lite", "regions-lite", "sd-tiny"


def teacher_for(fields: tuple[str, ...], preferred: str) -> str:
    """Return the teacher that writes the fields, the preferred one first."""
    return REGIONS if fields[0].startswith("region_") else preferred


def field_groups(fields: tuple[str, ...], preferred: str) -> list[tuple[str, ...]]:
    """Return the fields grouped by the teacher that writes them, in the order of their first fields."""
    groups: dict[str, list[str]] = {}
    for name in fields:
        groups.setdefault(teacher_for((name,), preferred), []).append(name)
    return [tuple(names) for names in groups.values()]


def build_command(data: str, fields: tuple[str, ...], teacher: str, cache: str) -> str:
    """Return a `tc build` that writes the fields into `cache`, a .zarr folder or a folder of caches."""
    path = Path(cache)
    out = path if path.suffix == ".zarr" else path / f"{teacher}.zarr"
    layers = sorted({int(name.rpartition("_")[2]) for name in fields if "_hidden_" in name})
    more = [f"hidden:{'+'.join(map(str, layers))}"] if layers else []
    more += ["patches"] if "patch_emb" in fields else []
    more += ["tokens"] if any(name.startswith("word_") for name in fields) else []
    more += ["random_tokens"] if any(name.startswith("random_") for name in fields) else []
    outputs = ["--outputs", ",".join(["embeddings", *more])] if more else []
    if "unet_feature" in fields:
        outputs = ["--outputs", "text_states,latents,unet_features:100+out"]
    return shlex.join(["tc", "build", "--teacher", teacher, *outputs, "--data", data, "--out", str(out)])
