"""open_clip's tokenizer for transformers: the same ids up to the end token, whatever stands between typed words.

open_clip repairs texts with ftfy before it splits them. What ftfy does to single characters (curly quotes, ligatures,
wide letters, control characters) and the common HTML entities are written into tokenizer.json as normalizers; what it
guesses from context (mojibake) is not. Padding differs, 0 there and the end token here: no embedding sees it.
"""

import json
from pathlib import Path
from typing import Any

from open_clip import SimpleTokenizer

from teachercache.core.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " "}
ESCAPES = r"\x1b\[[\d;]*[a-zA-Z]"  # a terminal's colours
CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"


def clip_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """A fast tokenizer with these words; vocab.json and merges.txt, which older programs read, go into the folder."""
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
    """open_clip's cleaning: ftfy's replacements, spaces, lower case."""
    from ftfy.chardata import LIGATURES, WIDTH_MAP
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence, Strip

    characters = {chr(code): text for code, text in {**LIGATURES, **WIDTH_MAP}.items()}
    pairs = [("&amp;", "&"), *ENTITIES.items(), *characters.items()]  # &amp;amp; is unescaped twice there too
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
    from tokenizers.decoders import ByteLevel, Replace, Sequence

    return Sequence([ByteLevel(), Replace("</w>", " ")])
