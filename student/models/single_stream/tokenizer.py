"""Tokenize text pairs for single-stream students, with a BERT's vocabulary or one built from the data.

Two-tower students use open_clip's tokenizers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from teachercache.core.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Encoded(NamedTuple):
    """Padded sub-words of text pairs.

    Attributes:
        ids: int64 [texts, length].
        token_type_ids: bool [texts, length], true after the first [SEP].
        attention_mask: bool [texts, length], false for padding.
        spans: int [texts, length, 2], the characters of each sub-word in "first second"; 0, 0 for special
            tokens.
    """

    ids: torch.Tensor
    token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    spans: np.ndarray


def vocabulary_tokenizer(texts: Iterable[str], size: int = 8000) -> Tokenizer:
    """Build a lower-case WordPiece tokenizer from the most frequent words of texts and all their characters.

    No word of the texts is unknown to it. It does not depend on the order of the texts: ties are sorted
    alphabetically.

    Args:
        texts: The texts.
        size: Entries of the vocabulary, at most.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *words]
    numbers = {piece: number for number, piece in enumerate(pieces[:size])}
    return BertWordPieceTokenizer(numbers, lowercase=True)._tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder from tokenizer.json or BERT's vocab.txt."""
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
    raise UserError(f"{folder} has neither tokenizer.json nor vocab.txt: copy one from the original model")


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], most: int) -> Encoded:
    """Encode pairs as [CLS] first [SEP] second [SEP]; an empty second part is left out.

    Args:
        tokenizer: The tokenizer.
        pairs: First and second part of each text.
        most: Sub-words per text, at most; the longer part is truncated first.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(most, strategy="longest_first")
    encodings = tokenizer.encode_batch([(first, second) if second else first for first, second in pairs])
    length = max(len(encoding.ids) for encoding in encodings)
    pad = tokenizer.token_to_id("[PAD]")
    assert pad is not None
    ids = torch.full((len(pairs), length), pad)
    token_type_ids, attention_mask = (torch.zeros(len(pairs), length, dtype=torch.bool) for _ in range(2))
    spans = np.zeros((len(pairs), length, 2), np.int64)
    for i, (encoding, (first, _)) in enumerate(zip(encodings, pairs, strict=True)):
        size = len(encoding.ids)
        ids[i, :size], attention_mask[i, :size] = torch.tensor(encoding.ids), True
        is_second = np.array(encoding.type_ids, bool)
        token_type_ids[i, :size] = torch.from_numpy(is_second)
        offsets = np.array(encoding.offsets, np.int64).reshape(size, 2)
        shifted = offsets + (len(first) + 1) * is_second[:, None]
        spans[i, :size] = np.where(np.array(encoding.special_tokens_mask, bool)[:, None], 0, shifted)
    return Encoded(ids, token_type_ids, attention_mask, spans)


def tokens_of(spans: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return which sub-words overlap which words: spans [length, 2], [words, 2] -> bool [words, length]."""
    start = np.maximum(spans[None, :, 0], words[:, None, 0])
    end = np.minimum(spans[None, :, 1], words[:, None, 1])
    return start < end
