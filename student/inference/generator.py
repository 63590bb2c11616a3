"""A trained sequence-to-sequence student as a function from pictures and prompts to texts. Knows no tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.models.generator import (
    ANSWERING,
    CAPTIONING,
    MAX_NEW_TOKENS,
    Generator,
    answer_prompt,
    caption_prompt,
)
from student.models.seq2seq.loading import facts_path, load_seq2seq
from teachercache.core.errors import UserError
from teachercache.data.pictures import decode_image
from teachercache.data.sample import BadSample
from teachercache.teachers.registry import load

ROWS = 32  # at a time


def load_generator(folder: Path, *, device: str = "cpu") -> Generator:
    """The student of a run or an exported folder with the CLIP that it was distilled from.

    `generate(pictures, prompts, num_beams, max_length)` takes PIL pictures in RGB and a prompt each, and gives what the
    prompts' [MASK]s stand for, `max_length` sub-words at most.
    """
    student = load_seq2seq(folder).to(device)
    teacher = picture_teacher(folder, student.inputs[1])
    teacher.module.to(device)

    def generate(
        pictures: Sequence[Any],
        prompts: Sequence[str],
        num_beams: int = CAPTIONING.beams,
        max_length: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts")
        found: list[str] = []
        for start in range(0, len(prompts), ROWS):
            part = slice(start, start + ROWS)
            images = torch.stack([teacher.view(picture) for picture in pictures[part]]).to(device)
            with torch.inference_mode():
                fields = teacher.encode(teacher.module, {"image": images})
            found += student.generate_texts(
                fields, prompts[part], num_beams=num_beams, max_new_tokens=max_length
            )
        return found

    return Generator(folder.resolve().name, str(folder), generate)


def picture_teacher(folder: Path, field: str) -> Any:
    """The CLIP that said what a student learned from; UserError where its weights have changed since."""
    path = facts_path(folder)
    assert path is not None  # a student was loaded from there
    facts = json.loads(path.read_text())["teachers"][0]
    outputs = ("patches",) if field == "patch_emb" else ("embeddings",)
    teacher = load(facts["name"], weights=facts["weights"], outputs=outputs)
    if teacher.spec.digest != facts["digest"]:
        raise UserError(
            f"{folder} was distilled from other weights of {facts['name']} than there are now: put those "
            "back, or train again"
        )
    return teacher


def describe_pictures(
    folder: Path,
    files: Sequence[Path],
    *,
    question: str = "",
    masks: int = 0,
    beams: int = 0,
    device: str = "cpu",
) -> list[str]:
    """A caption of each picture file, or an answer to the question; masks and beams 0 for the paper's."""
    pictures = []
    for file in files:
        try:
            pictures.append(decode_image(file.read_bytes()))
        except (OSError, BadSample) as error:
            raise UserError(f"--image {file} cannot be read as a picture: {error}") from error
    decoding = ANSWERING if question else CAPTIONING
    masks = masks or decoding.masks
    prompt = answer_prompt(question, masks) if question else caption_prompt(masks)
    beams = beams or decoding.beams
    return load_generator(folder, device=device).generate(
        pictures, [prompt] * len(pictures), beams, MAX_NEW_TOKENS
    )
