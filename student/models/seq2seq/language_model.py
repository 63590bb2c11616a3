"""Write the language model of a sequence-to-sequence student as a plain BART folder of transformers."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from student.models.seq2seq.loading import is_seq2seq, load_seq2seq
from student.models.seq2seq.model import Seq2Seq
from teachercache.core.progress import quiet_transformers


def write_language_model(student: Seq2Seq, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files with transformers."""
    from transformers import PreTrainedTokenizerFast

    read, names = student.read_texts, ("bos", "pad", "eos", "mask")
    special = {
        f"{name}_token": read.tokenizer.id_to_token(number)
        for name, number in zip(names, read.marks, strict=True)
    }
    special |= {"cls_token": special["bos_token"], "sep_token": special["eos_token"]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.tokenizer,
        unk_token="<unk>",
        **special,
        model_max_length=student.bart.config.max_position_embeddings,
    )
    with quiet_transformers(hints=True):
        student.language_model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def language_model_of(model: Path) -> Iterator[Path]:
    """Provide a folder with the plain BART of a model while the context is open.

    Yields:
        The language model of a run or export (written to a temporary folder if needed); for any other folder
        the folder itself.
    """
    if not is_seq2seq(model) or (model / "language_model").exists():
        yield model / "language_model" if is_seq2seq(model) else model
        return
    with tempfile.TemporaryDirectory() as name:
        write_language_model(load_seq2seq(model), Path(name))
        yield Path(name)
