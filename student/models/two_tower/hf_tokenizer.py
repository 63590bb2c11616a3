"""Convert open_clip's tokenizer to transformers, with the same ids up to the end token.

open_clip repairs texts with ftfy before it splits them. tokenizer.json reproduces as normalizers what ftfy
does to single characters (curly quotes, ligatures, wide letters, control characters) and to common HTML
entities. It does not reproduce repairs from context (mojibake). Padding differs (0 in open_clip, the end
token here) but affects no embedding.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import SimpleTokenizer

from student.models.two_tower.model import Tokenizer
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " "}
ESCAPES = r"\x1b\[[\d;]*[a-zA-Z]"  # terminal colors
CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"


def clip_tokenizer(tokenizer: Tokenizer, folder: Path) -> "PreTrainedTokenizerFast":
    """Return a fast tokenizer, and write vocab.json and merges.txt for older programs.

    Raises:
        UserError: The tokenizer is not CLIP's own.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    if (
        not isinstance(tokenizer, SimpleTokenizer)
        or len(tokenizer.all_special_ids) != 2
        or tokenizer.reduction_fn
    ):
        raise UserError("only CLIP's own tokenizer can be written for transformers: use --format open_clip")
    words = sorted(tokenizer.encoder, key=lambda word: tokenizer.encoder[word])
    vocab = {word: i for i, word in enumerate([*words[:-2], START, END])}
    merges = list(tokenizer.bpe_ranks)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    backend = CLIPTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    backend.normalizer = _normalizer()
    backend.decoder = _decoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=tokenizer.context_length,
    )


def _normalizer() -> Any:
    """Return open_clip's cleaning as a normalizer: ftfy's replacements, spaces, lower case."""
    from ftfy.chardata import LIGATURES, WIDTH_MAP
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence, Strip

    characters = {chr(code): text for code, text in {**LIGATURES, **WIDTH_MAP}.items()}
    pairs = [
        ("&amp;", "&"),
        *ENTITIES.items(),
        *characters.items(),
    ]  # open_clip also unescapes &amp;amp; twice
    return Sequence(
        [
            Replace(Regex(ESCAPES), ""),
            *(Replace(old, new) for old, new in pairs),
            Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
            Replace(Regex("[\u201c-\u201f]"), '"'),
            Replace(Regex(CONTROLS), ""),
            NFC(),
            Replace(Regex(r"\s+"), " "),
            Strip(),
            Lowercase(),
        ]
    )


def _decoder() -> Any:
    """Return the decoder of CLIP's byte-level BPE."""
    from tokenizers.decoders import ByteLevel, Replace, Sequence

    return Sequence([ByteLevel(), Replace("</w>", " ")])
