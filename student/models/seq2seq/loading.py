"""Build a sequence-to-sequence student from a BART (by name, folder or configuration) or from a run.

Weights are read from safetensors files alone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

from student.models.run_file import is_run, load_weights, student_record
from student.models.seq2seq.model import Seq2Seq
from student.models.seq2seq.texts import NUM_MASKS, Reader, marks_of, word_starts
from teachercache.core.errors import UserError, is_machine
from teachercache.core.progress import quiet_transformers
from teachercache.teachers.allowed import HUB_NAME, check_code_keys, check_source

PACKAGED = Path(__file__).parent / "bart_tiny"  # written by scripts/teachers/bart_tiny.py
NAMES = {"bart-tiny": str(PACKAGED), "bart-base": "facebook/bart-base", "bart-large": "facebook/bart-large"}
CAPTION_TOKENS = 20  # tokens of a sampled caption, at most


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a stage reads its texts.

    Args:
        stage: One of distil, caption, vqa and scst; "" for the stage of the loaded folder.
        masks: Masks per prompt; 0 for the paper's number.
        share: Share of the words that infilling masks.
        max_text: Sub-words per text, at most; 0 for the number of the loaded folder.
    """

    stage: str = ""
    masks: int = 0
    share: float = 1.0
    max_text: int = 0


def start_from(init: str, reading: Reading, *, visual: str) -> Seq2Seq:
    """Load the student of a run or exported folder to train it in another stage."""
    folder = Path(init)
    record = seq2seq_record(folder)
    if record["visual"] != visual:
        raise UserError(
            f"--set init={init} reads other features of a picture: add --set visual={record['visual']}"
        )
    student = rebuild(record, read_tokenizer(folder), reading)
    student.load_saved_state(load_weights(folder))
    return student


def start_bart(model: str, reading: Reading, *, scratch: bool, visual: str, width: int) -> Seq2Seq:
    """Build a student from a BART by name, with new matrices for a CLIP space of `width` dimensions."""
    bart, tokenizer = open_bart(model, scratch=scratch)
    student = Seq2Seq(bart, make_reader(tokenizer, bart.config, reading), visual=visual)
    student.connect(width)
    return student


def open_bart(name: str, *, scratch: bool) -> tuple[BartForConditionalGeneration, Tokenizer]:
    """Load a plain BART in float32 and its tokenizer.

    Args:
        name: A key of NAMES, a name on the Hugging Face hub or a folder.
        scratch: Use the configuration alone, with random weights.

    Raises:
        UserError: There is no BART of that name.
    """
    source = NAMES.get(name, name)
    if not Path(source).is_dir() and not HUB_NAME.fullmatch(source):
        raise _no_bart(name, "neither a folder nor a name on the hub")
    check_source(source, f"--set model={name}")
    try:
        with quiet_transformers(hints=True):
            config = BartConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False).backend_tokenizer
            if scratch:
                return BartForConditionalGeneration(config), tokenizer
            bart = BartForConditionalGeneration.from_pretrained(source, use_safetensors=True, dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_machine(error) or isinstance(error, UserError):
            raise
        raise _no_bart(name, (str(error).splitlines() or ["?"])[0][:160]) from error
    return bart, tokenizer


def _no_bart(name: str, reason: str) -> UserError:
    return UserError(
        f"--set model={name}: no BART there ({reason}); choose {', '.join(NAMES)}, a name on the hub "
        "or a folder with config.json, model.safetensors and tokenizer.json"
    )


def make_reader(tokenizer: Tokenizer, bart: BartConfig, reading: Reading) -> Reader:
    """Return the reader of a stage's texts; UserError if the BART has too few positions."""
    if reading.max_text > bart.max_position_embeddings:
        raise UserError(
            f"--set max_text={reading.max_text}: this BART has {bart.max_position_embeddings} positions at most"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Reader(
        tokenizer,
        marks_of(tokenizer),
        word_starts(tokenizer),
        reading.stage,
        reading.masks or NUM_MASKS[reading.stage],
        reading.share,
        reading.max_text,
        CAPTION_TOKENS if reading.stage == "scst" else 0,
    )


def seq2seq_record(folder: Path) -> dict[str, Any]:
    """Return the configuration of a sequence-to-sequence student; UserError if the folder holds another."""
    if not is_seq2seq(folder):
        raise UserError(
            f"{folder} is no run of vlkd and no export of one: pass a folder that `student train` wrote"
        )
    return student_record(folder)["config"]


def is_seq2seq(folder: Path) -> bool:
    """Return whether a folder holds a sequence-to-sequence student."""
    return is_run(folder) and student_record(folder)["family"] == "seq2seq"


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a run or exported folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def rebuild(config: Mapping[str, Any], tokenizer: Tokenizer, reading: Reading | None = None) -> Seq2Seq:
    """Return a student of a recorded configuration with random weights, optionally for another stage."""
    reading = reading or Reading()
    check_code_keys(config["bart"], "the record of the student")
    bart = BartConfig.from_dict(config["bart"])
    masks = reading.masks or (0 if reading.stage else config["masks"])
    reading = Reading(
        reading.stage or config["stage"], masks, reading.share, reading.max_text or config["max_text"]
    )
    reader = make_reader(tokenizer, bart, reading)
    student = Seq2Seq(BartForConditionalGeneration(bart), reader, visual=config["visual"])
    student.connect(config["width"])
    return student


def load_seq2seq(folder: Path) -> Seq2Seq:
    """Load the trained student of a run or exported folder in evaluation mode; no other file is read."""
    student = rebuild(seq2seq_record(folder), read_tokenizer(folder))
    student.load_saved_state(load_weights(folder))
    return student.eval()
