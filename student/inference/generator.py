"""Turn a trained sequence-to-sequence student into a Generator of texts for pictures and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from evaluation.models.generator import (
    ANSWERING,
    CAPTIONING,
    MAX_NEW_TOKENS,
    Generator,
    answer_prompt,
    caption_prompt,
)
from student.contract import Capability, Generates, require
from student.inference.load import load_run
from student.models.run_file import read_run
from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import closest_path
from teachercache.data.pictures import decode_image, read_regular
from teachercache.data.sample import BadSample
from teachercache.teachers.of_cache import changes
from teachercache.teachers.registry import find_stored, load_stored, outputs_for
from teachercache.teachers.teacher import Teacher

BATCH = 32  # pictures per forward pass


def load_generator(folder: Path, *, device: str = "cpu") -> Generator:
    """Load the student of a run or exported folder, and the teacher that encodes its pictures.

    Args:
        folder: A run folder or exported folder.
        device: Where student and teacher compute.

    Returns:
        A Generator. Its `generate(pictures, prompts, num_beams, max_length)` takes RGB pictures and one
        prompt for each, and returns the texts that replace the prompts' [MASK]s, with at most `max_length`
        sub-words.

    Raises:
        UserError: The student cannot generate texts, or the teacher's weights have changed.
    """
    student = load_run(folder)
    require(student, Capability.GENERATES, str(folder))
    student.to(device)
    writer = cast(Generates, student)
    teacher = picture_teacher(folder, student.row_inputs.fields)
    teacher.module.to(device)
    view = teacher.view
    assert view is not None, f"{teacher.spec.name} outputs fields of pictures"

    def generate(
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        num_beams: int = CAPTIONING.beams,
        max_length: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts")
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH):
            rows = slice(start, start + BATCH)
            images = torch.stack([view(picture) for picture in pictures[rows]]).to(device)
            with torch.inference_mode():
                fields = teacher.encode(teacher.module, {"image": images})
            texts += writer.generate_texts(
                fields, prompts[rows], num_beams=num_beams, max_new_tokens=max_length
            )
        return texts

    return Generator(folder.resolve().name, str(folder), generate)


def picture_teacher(folder: Path, fields: tuple[str, ...]) -> Teacher:
    """Load the teacher that a student was distilled from.

    Args:
        folder: A run folder or exported folder.
        fields: The fields that the teacher has to output.

    Raises:
        UserError: What the teacher's values depend on has changed since the training.
    """
    spec = read_run(folder)["teachers"][0]
    teacher = load_stored(
        spec["name"], weights=spec["weights"], outputs=outputs_for(find_stored(spec["name"]), fields)
    )
    if changed := changes(spec, teacher.spec):
        raise UserError(
            f"{folder} was distilled from other {changed} of {spec['name']} than are found now: restore those, "
            "or train again"
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
    """Return a caption of each picture file, or an answer to a question about it.

    Args:
        folder: A run folder or exported folder.
        files: Picture files.
        question: The question to answer; "" for captions.
        masks: [MASK]s in the prompt; 0 for the paper's number.
        beams: Beam size; 0 for the paper's.
        device: Where student and teacher compute.

    Raises:
        UserError: A file cannot be decoded, or the model cannot be loaded.
    """
    pictures = []
    for file in files:
        try:
            pictures.append(decode_image(read_regular(file)))
        except (OSError, BadSample) as error:
            if is_machine(error):
                raise
            reason = error if isinstance(error, BadSample) else f"{error.strerror}: {closest_path(file)}"
            raise UserError(f"--image {file} cannot be read as a picture: {reason}") from error
    decoding = ANSWERING if question else CAPTIONING
    masks = masks or decoding.masks
    prompt = answer_prompt(question, masks) if question else caption_prompt(masks)
    beams = beams or decoding.beams
    generator = load_generator(folder, device=device)
    return generator.generate(pictures, [prompt] * len(pictures), beams, MAX_NEW_TOKENS)
