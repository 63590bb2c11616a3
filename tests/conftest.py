"""Small data and a small teacher that every test can afford."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_folder(root: Path, rows: int = 40, *, texts: int = 1, splits: bool = False) -> Path:
    """An image folder of coloured squares whose captions say the colour's number."""
    random = np.random.default_rng(0)
    for i in range(rows):
        split = ("test/" if i % 4 == 3 else "train/") if splits else ""
        folder = root / f"{split}class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 20)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("\n".join(f"square {i} said {k}" for k in range(texts)) + "\n")
    return root


def save_teacher(folder: Path, cfg: dict = TINY_CFG, seed: int = 0) -> Path:
    """A random CLIP in open_clip's folder format."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = open_clip.CLIP(**json.loads(json.dumps(cfg)))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "squares")
