"""Sub-words for single-stream students: a BERT folder's, or a vocabulary made of the data; pairs with their offsets.

Not for two-tower students, whose tokenizers are open_clip's.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from teachercache.core.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Encoded(NamedTuple):
    """Sub-words of some texts, padded; `spans` are characters of "first second" as one text, 0 0 for special ones."""

    ids: torch.Tensor  # int64 [texts, length]
    token_type_ids: torch.Tensor  # bool [texts, length]: after the first [SEP]
    attention_mask: torch.Tensor  # bool [texts, length]: no padding
    spans: np.ndarray  # int [texts, length, 2]


def vocabulary_tokenizer(texts: Iterable[str], size: int = 8000) -> Any:
    """WordPiece with the most common words of the texts, lower case, and every character: no word is unknown.

    The same for the same texts in any order; ties go by the alphabet.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *words]
    numbers = {piece: number for number, piece in enumerate(pieces[:size])}
    return BertWordPieceTokenizer(numbers, lowercase=True)._tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder: tokenizer.json, or BERT's vocab.txt."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer

    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.txt").exists():
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
        return BertWordPieceTokenizer(
            {piece: number for number, piece in enumerate(pieces)},
            lowercase=not cased,
            strip_accents=not cased,
        )._tokenizer
    raise UserError(
        f"{folder} has neither tokenizer.json nor vocab.txt: copy one from the model that it came from"
    )


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]], most: int) -> Encoded:
    """[CLS] first [SEP] second [SEP], without the second part where it is empty; the longer part is cut first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(most, strategy="longest_first")
    found = tokenizer.encode_batch([(first, second) if second else first for first, second in pairs])
    length = max(len(one.ids) for one in found)
    ids = torch.full((len(pairs), length), tokenizer.token_to_id("[PAD]"))
    token_type_ids, attention_mask = (torch.zeros(len(pairs), length, dtype=torch.bool) for _ in range(2))
    spans = np.zeros((len(pairs), length, 2), np.int64)
    for i, (one, (first, _)) in enumerate(zip(found, pairs, strict=True)):
        size = len(one.ids)
        ids[i, :size], attention_mask[i, :size] = torch.tensor(one.ids), True
        kinds = np.array(one.type_ids, bool)
        token_type_ids[i, :size] = torch.from_numpy(kinds)
        offsets = np.array(one.offsets, np.int64).reshape(size, 2)
        moved = offsets + (len(first) + 1) * kinds[:, None]
        spans[i, :size] = np.where(np.array(one.special_tokens_mask, bool)[:, None], 0, moved)
    return Encoded(ids, token_type_ids, attention_mask, spans)


def tokens_of(spans: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which sub-words lie in which words: bool [words, length] from spans [length, 2] and [words, 2]."""
    start, end = (
        np.maximum(spans[None, :, 0], words[:, None, 0]),
        np.minimum(spans[None, :, 1], words[:, None, 1]),
    )
    return start < end
