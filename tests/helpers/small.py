"""Small data and a small teacher that every test can afford."""

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# DeepSpeed's ZeRO 3 calls this from code that is not inside `quiet_deepspeed`
zero_noise = pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor. is deprecated:FutureWarning")


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def save_diffusion(folder: Path, *, prediction: str = "epsilon", pixels: bool = False, seed: int = 0) -> Path:
    """A random Stable Diffusion in diffusers' folder format, 16 px, or without a VAE 8 px."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = [
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
        "re",
        "red</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    channels = 3 if pixels else 4
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                **ends,
            )
        ),
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1, clip_sample=False
        ),
    }
    if not pixels:
        parts["vae"] = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=16,
        )
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"})
    )
    index = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in index.items() if name in parts}
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index |= {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    whole = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **index}
    (folder / "model_index.json").write_text(json.dumps(whole))
    return folder


def build_cache(
    data: Path | str,
    teacher: Path,
    out: Path,
    *,
    block_rows: int | None = None,
    workers: int = 0,
    outputs: tuple[str, ...] = ("embeddings",),
) -> Path:
    """`tc build` in this process."""
    from teachercache.build.loop import BuildOptions, build
    from teachercache.core.device import Precision
    from teachercache.data.read import read_manifest
    from teachercache.teachers.registry import load

    loaded = load(str(teacher), weights="pretrained", outputs=outputs)
    build(
        loaded,
        read_manifest(str(data)),
        out,
        BuildOptions(
            batch_size=16,
            workers=workers,
            device="cpu",
            precision=Precision("float32", "a test"),
            block_rows=block_rows,
        ),
    )
    return out


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but build.log, which alone holds times."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "build.log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def counting(teacher) -> tuple:
    """The same teacher, and how many pictures and texts it was shown."""
    seen = {"image": 0, "text": 0}

    def encode(module, inputs):
        for name, tensor in inputs.items():
            seen[name] += len(tensor)
        return teacher.encode(module, inputs)

    return dataclasses.replace(teacher, encode=encode), seen


def run(*words: object) -> int:
    """`tc` in this process: its exit code."""
    from teachercache.cli import main

    return main([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one error line of a command that must fail."""
    capsys.readouterr()
    assert run(*words) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in out + err
    return lines[-1]


def chunks_of(cache, arrays: dict[str, np.ndarray], rows: range) -> dict[tuple[str, int], np.ndarray]:
    """Whole fields to what `store.write_block` takes for a block's rows."""
    fields = {name: field.copies(cache.meta.texts, cache.meta.views) for name, field in cache.fields.items()}
    chunks = {("key", 0): arrays["key"][rows.start : rows.stop]}
    for name, copies in fields.items():
        values = arrays[name][rows.start : rows.stop]
        chunks |= {(name, i): values[:, i] for i in range(copies)} if copies else {(name, 0): values}
    return chunks


def train_words(data: Path, cache: Path, out: Path, *words: object, recipe: str = "clip_kd") -> list[str]:
    """The words behind `student` of a small training; later words win over these."""
    start = ["train", "--recipe", recipe, "--data", data, "--cache", cache, "--out", out, "--batch-size", 8]
    sizes = [] if ":" in recipe else ["--set", "model=vit-micro"]
    return [str(word) for word in (*start, *sizes, "--set", "run.workers=0", *words)]


def train_here(data: Path, cache: Path, out: Path, *words: object, recipe: str = "clip_kd") -> int:
    """`student train` in this process: its exit code. Its signal handlers and rank variables are undone."""
    from student.cli import main

    with contained():
        return main(train_words(data, cache, out, *words, recipe=recipe))


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undo what a training leaves in its process, so that later tests and their children see none of it."""
    import torch

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before, linear = dict(os.environ), torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear  # which ZeRO 3 replaces
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def read_lines(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
