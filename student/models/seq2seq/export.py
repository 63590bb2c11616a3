"""Export a sequence-to-sequence student, with its language model as a plain BART.

seq2seq.json model.safetensors tokenizer.json README.md      `student generate FOLDER`, `--set init=FOLDER`
language_model/                                              BartForConditionalGeneration.from_pretrained(...)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from student.contract import Exported, ExportRequest
from student.models.run_file import WEIGHTS, write_tensors
from student.models.seq2seq.language_model import write_language_model
from student.models.seq2seq.loading import load_seq2seq
from student.models.seq2seq.model import Seq2Seq
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole

TOLERANCE = 1e-4  # relative to the largest logit, or to 1 if that is smaller
PROBES = ["A picture of a red bird.", "It's 12 o'clock.", "word " * 20]


def export(student: Seq2Seq, request: ExportRequest) -> Exported:
    """Write the student's folder and its language model, and compare both with the student.

    Raises:
        UserError: A written model computes other logits than the student.
    """
    write_folder(student, request.run, request.folder)
    write_language_model(student, request.folder / "language_model")
    _compare(student, request.folder)
    notes = [
        "language_model/ is its language model, a plain BART: "
        'transformers.BartForConditionalGeneration.from_pretrained(".../language_model")'
    ]
    call = "`student generate FOLDER` loads it"
    return Exported("transformers", _usage(request.name), call, notes, pipeline="image-to-text")


def write_folder(student: Seq2Seq, run: Mapping[str, Any], folder: Path) -> None:
    """Write the files that `load_seq2seq` and `load_generator` read; `run` is the content of run.json."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.saved_state().items()}
    write_tensors(state, folder / WEIGHTS, folder)
    for name, text in student.spec.files.items():
        write_whole(folder / name, text)
    record = {name: run[name] for name in ("format", "student", "teachers")}
    write_whole(folder / "seq2seq.json", json.dumps(record, indent=1) + "\n")


@torch.inference_mode()
def _compare(student: Seq2Seq, folder: Path) -> None:
    """Raise UserError unless both written models compute the student's logits for some texts."""
    from transformers import AutoTokenizer, BartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    ids = tokenizer(
        PROBES, padding=True, truncation=True, max_length=student.read_texts.max_text, return_tensors="pt"
    )
    text, attention_mask = ids["input_ids"], ids["attention_mask"]
    pictures = torch.randn(
        len(PROBES), 2, student.text_out.out_features, generator=torch.Generator().manual_seed(0)
    )
    reloaded = load_seq2seq(folder)
    language_model = BartForConditionalGeneration.from_pretrained(folder / "language_model")
    ours = [student.decode(text, *student.context(text, V)) for V in (pictures, None)]
    start = torch.full_like(text[:, :1], student.start_token)
    plain = language_model.eval()(
        input_ids=text, attention_mask=attention_mask, decoder_input_ids=torch.cat([start, text[:, :-1]], 1)
    )
    theirs = [reloaded.decode(text, *reloaded.context(text, pictures)), plain.logits]
    for name, a, b in zip(("model", "language_model"), ours, theirs, strict=True):
        worst = float((a - b)[attention_mask.bool()].abs().max())
        if not worst <= TOLERANCE * max(1.0, float(a.abs().max())):
            raise UserError(
                f"the exported {name} computes other logits (by {worst:.2g}): nothing was written"
            )


def _usage(folder: str) -> str:
    return f"""
# student generate {folder} --image cat.jpg
from transformers import AutoTokenizer, BartForConditionalGeneration

language_model = BartForConditionalGeneration.from_pretrained("{folder}/language_model")
tokenizer = AutoTokenizer.from_pretrained("{folder}/language_model")
"""
