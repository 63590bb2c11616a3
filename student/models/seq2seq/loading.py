"""Where a sequence-to-sequence student starts: a BART by name, folder or configuration alone, or one of our runs.

Only safetensors. Not for what the student computes: see `seq2seq`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

from student.models.seq2seq.model import Seq2Seq, load_plain_state
from student.models.seq2seq.texts import NUM_MASKS, STAGES, Reader, marks_of, word_starts
from teachercache.core.errors import UserError
from teachercache.core.progress import say

PACKAGED = Path(__file__).parent / "bart_tiny"  # written by scripts/teachers/bart_tiny.py
NAMES = {"bart-tiny": str(PACKAGED), "bart-base": "facebook/bart-base", "bart-large": "facebook/bart-large"}
CAPTION_TOKENS = 20  # of a sampled caption, at most


def open_student(constants: Any) -> Seq2Seq:
    """The student that a recipe's constants name; begun from `init` its configuration counts."""
    if constants.stage not in STAGES:
        raise UserError(f"--set stage={constants.stage}: choose from {', '.join(STAGES)}")
    if not 0 < constants.mask_share <= 1 or not 0 < constants.data_share <= 1 or constants.masks < 0:
        raise UserError(
            "--set mask_share and data_share are shares above 0, masks is a number or 0 for the paper's"
        )
    aligned = bool(constants.ttdm or constants.itcl)
    if constants.init:
        facts, tokenizer = read_facts(Path(constants.init))
        if facts["visual"] != constants.visual:
            raise UserError(
                f"--set init={constants.init} reads other parts of a picture: add --set visual={facts['visual']}"
            )
        say(f"starting from {constants.init}: its BART counts, not model={constants.model}")
        student = rebuild(
            facts,
            tokenizer,
            stage=constants.stage,
            masks=constants.masks,
            share=constants.mask_share,
            max_text=constants.max_text,
        )
        load_plain_state(student, load_file(Path(constants.init) / "model.safetensors"))
        student.aligned, student.data_share = aligned, constants.data_share
        return student
    bart, tokenizer = open_bart(constants.model, scratch=constants.scratch)
    reader = make_reader(
        tokenizer,
        bart.config,
        stage=constants.stage,
        masks=constants.masks,
        share=constants.mask_share,
        max_text=constants.max_text,
    )
    return Seq2Seq(bart, reader, visual=constants.visual, aligned=aligned, data_share=constants.data_share)


def open_bart(name: str, *, scratch: bool) -> tuple[BartForConditionalGeneration, Tokenizer]:
    """A plain BART and its tokenizer, in float32; from scratch with its configuration alone."""
    from transformers.utils import logging

    place = NAMES.get(name, name)
    logging.disable_progress_bar()
    try:
        config = BartConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place).backend_tokenizer
        if scratch:
            return BartForConditionalGeneration(config), tokenizer
        bart = BartForConditionalGeneration.from_pretrained(place, use_safetensors=True, dtype="float32")
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["?"])[0][:160]
        raise UserError(
            f"--set model={name}: no BART there ({reason}); choose {', '.join(NAMES)}, a name on the hub "
            "or a folder with config.json, model.safetensors and tokenizer.json"
        ) from error
    finally:
        logging.enable_progress_bar()
    return bart, tokenizer


def make_reader(
    tokenizer: Tokenizer, bart: Any, *, stage: str, masks: int, share: float, max_text: int
) -> Reader:
    """How the rows of a stage are read."""
    if max_text > bart.max_position_embeddings:
        raise UserError(
            f"--set max_text={max_text}: this BART has {bart.max_position_embeddings} positions at most"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Reader(
        tokenizer,
        marks_of(tokenizer),
        word_starts(tokenizer),
        stage,
        masks or NUM_MASKS[stage],
        share,
        max_text,
        CAPTION_TOKENS if stage == "scst" else 0,
    )


def read_facts(folder: Path) -> tuple[dict[str, Any], Tokenizer]:
    """What a run, or what `student export` made of it, says of its student; and its tokenizer."""
    path = facts_path(folder)
    if path is None or not is_seq2seq(folder):
        raise UserError(
            f"{folder} is no run of vlkd and no export of one: pass a folder that `student train` wrote"
        )
    facts = json.loads(path.read_text())["student"]
    if not (folder / "model.safetensors").exists():
        raise UserError(
            f"{folder} is not a finished run: go on with `student train --recipe vlkd --resume --out {folder}`"
        )
    return facts, Tokenizer.from_file(str(folder / "tokenizer.json"))


def rebuild(
    facts: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    stage: str = "",
    masks: int = 0,
    share: float = 1.0,
    max_text: int = 0,
) -> Seq2Seq:
    """The student that `describe` described, at random; another stage has its own prompts."""
    config = BartConfig.from_dict(facts["bart"])
    masks = masks or (0 if stage else facts["masks"])
    reader = make_reader(
        tokenizer,
        config,
        stage=stage or facts["stage"],
        masks=masks,
        share=share,
        max_text=max_text or facts["max_text"],
    )
    student = Seq2Seq(BartForConditionalGeneration(config), reader, visual=facts["visual"])
    student.connect(facts["width"])
    return student


def facts_path(folder: Path) -> Path | None:
    """The file that says what a run, or an exported folder, is."""
    return next((folder / name for name in ("run.json", "seq2seq.json") if (folder / name).exists()), None)


def is_seq2seq(folder: Path) -> bool:
    """Whether a folder holds a sequence-to-sequence student."""
    path = facts_path(folder)
    return path is not None and (json.loads(path.read_text()).get("student") or {}).get("kind") == "seq2seq"


def load_seq2seq(folder: Path) -> Seq2Seq:
    """The trained student of a run or of an exported folder, from that folder alone."""
    facts, tokenizer = read_facts(folder)
    student = rebuild(facts, tokenizer)
    load_plain_state(student, load_file(folder / "model.safetensors"))
    return student.eval()
