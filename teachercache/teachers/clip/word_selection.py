"""Select the words of a text that matter for its image: CLIP-TD's token selection (Eq. 5 and 6), and random
words.

    S = S_vr / |S_vr|_1 + S_si / |S_si|_1        per word of the text; a zero vector stays zero
    S_vr   cosine of the image embedding and the text embedding of the word alone
    S_si   1 / (1 + the lowest YAKE score of the n-grams, n <= 3, that contain the word), 0 without such
        an n-gram

The paper specifies neither how YAKE's scores, which are low for important words, become weights, nor what a
word is: both are our choices. The decoding processes find words (`find_words`), and `WordSelection` scores
them with the teacher. A student maps the spans of words to its own sub-words.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from teachercache.cache.spec import Field
from teachercache.core.errors import UserError

WORD = re.compile(r"\w+(?:['-]\w+)*")
MAX_WORDS, MAX_PLACE = 64, np.iinfo(np.int16).max  # CLIP's context is not longer
DEFAULT = 3  # words kept per text
KEPT_TEXTS = 4096  # texts whose words a decoding process caches: questions and answers are repeated
WORDS_AT_ONCE = {"cpu": 1, "": 64}  # words per forward pass; see `WordSelection.features_of`


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of some texts.

    Attributes:
        distinct: The distinct words.
        place: The index into `distinct`, -1 without a word: int64 [texts, MAX_WORDS].
        span: Start and end in the text: int16 [texts, MAX_WORDS, 2].
        first: Whether it is the first occurrence of the word in the text: bool [texts, MAX_WORDS].
        importance: S_si / |S_si|_1: float32 [texts, MAX_WORDS].
        drawn: Positions of randomly drawn words, -1 if there are fewer: int16 [texts, m].
    """

    distinct: tuple[str, ...]
    place: np.ndarray
    span: np.ndarray
    first: np.ndarray
    importance: np.ndarray
    drawn: np.ndarray


# ----------------------------------------------------------------------------------------------------
# Words of a text


def find_words(texts: Sequence[str], *, weighed: bool, num_drawn: int) -> Words:
    """Find the words of each stripped text; `weighed` runs YAKE."""
    parsed = [_words_of(text.strip(), weighed, num_drawn) for text in texts]
    distinct = {
        word: i for i, word in enumerate(dict.fromkeys(word for words, *_ in parsed for word in words))
    }
    place = np.full((len(texts), MAX_WORDS), -1)
    span, first = np.zeros((len(texts), MAX_WORDS, 2), np.int16), np.zeros((len(texts), MAX_WORDS), bool)
    importance, drawn = (
        np.zeros((len(texts), MAX_WORDS), np.float32),
        np.full((len(texts), num_drawn), -1, np.int16),
    )
    for i, (words, spans, firsts, weights, picked) in enumerate(parsed):
        count = len(words)
        place[i, :count] = [distinct[word] for word in words]
        span[i, :count] = np.array(spans, np.int16).reshape(-1, 2)
        first[i, list(firsts)] = True
        importance[i, :count] = weights
        drawn[i, : len(picked)] = picked
    return Words(tuple(distinct), place, span, first, importance, drawn)


@functools.lru_cache(maxsize=KEPT_TEXTS)
def _words_of(text: str, weighed: bool, num_drawn: int) -> tuple[tuple[Any, ...], ...]:
    """Return words, spans, the positions of new words, S_si / |S_si|_1, and the positions of drawn words."""
    matches = [match for match in WORD.finditer(text) if match.end() <= MAX_PLACE][:MAX_WORDS]
    words = tuple(match.group() for match in matches)
    new: dict[str, int] = {}
    for i, word in enumerate(words):
        new.setdefault(word.lower(), i)
    firsts = tuple(new.values())
    seed = np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), np.uint32)
    drawn = np.random.default_rng(seed).permutation(firsts)[:num_drawn] if firsts else ()
    weights = importance(text[: matches[-1].end()], words) if weighed and words else np.zeros(len(words))
    return (
        words,
        tuple(match.span() for match in matches),
        firsts,
        tuple(weights),
        tuple(int(place) for place in drawn),
    )


def importance(text: str, words: Sequence[str]) -> Float[np.ndarray, " words"]:
    """Return S_si / |S_si|_1 of each word of a text.

    YAKE splits `dog's` into `dog` and `'s`: a word is looked up by the part before its apostrophe.
    """
    lowest: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about statistics over a single word
        ngrams = _extractor().extract_keywords(text)
    for ngram, score in ngrams:
        for word in WORD.findall(ngram):
            # rounded: YAKE sums over sets, whose order differs between processes
            lowest[_stem(word)] = min(round(max(float(score), 0.0), 9), lowest.get(_stem(word), np.inf))
    weights = np.array([1 / (1 + lowest[_stem(word)]) if _stem(word) in lowest else 0.0 for word in words])
    return weights / max(weights.sum(), 1e-12)


def _stem(word: str) -> str:
    return word.lower().partition("'")[0]


@functools.cache
def _extractor() -> Any:
    import yake

    return yake.KeywordExtractor(
        lan="en", n=3, dedup_lim=1.0, top=10**6
    )  # all n-grams, including similar ones


# ----------------------------------------------------------------------------------------------------
# Beside the teacher


class WordSelection:
    """The fields that `tokens:M` and `random_tokens:M` add to a CLIP teacher; caches the embedding of
    every word.
    """

    def __init__(self, tokenize: Callable[[list[str]], Tensor], *, num_best: int, num_drawn: int) -> None:
        if num_best and importlib.util.find_spec("yake") is None:
            raise UserError("--outputs tokens needs the package yake: pip install 'teachercache[analyze]'")
        self.tokenize, self.num_best, self.num_drawn = tokenize, num_best, num_drawn
        self.find = functools.partial(find_words, weighed=num_best > 0, num_drawn=num_drawn)
        self.embeddings: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}  # by device and precision

    def fields(self, dim: int) -> tuple[Field, ...]:
        """Return the fields of `weigh` for text embeddings of width `dim`."""
        span = "start and end of each word in the text without spaces around it, 0 for none"
        fields = [Field("word_span", (MAX_WORDS, 2), "text", "int16", span, dims=("word", "end"))]
        if self.num_best:
            fields += [
                Field(
                    name="word_score",
                    shape=(MAX_WORDS,),
                    per="text",
                    dtype="float16",
                    doc="S of CLIP-TD's Eq. 5, 0 where there is no word",
                    dims=("word",),
                ),
                Field(
                    name="word_index",
                    shape=(self.num_best,),
                    per="text",
                    dtype="int16",
                    doc="positions in word_span of the best words, -1 for none",
                    dims=("choice",),
                    compare="same_choice",
                    beside="word_score",
                ),
                Field(
                    name="word_feature",
                    shape=(self.num_best, dim),
                    per="text",
                    dtype="float16",
                    doc="text embedding of each best word alone, not normalized",
                    dims=("choice", "dim"),
                    beside="word_index",
                ),
            ]
        if self.num_drawn:
            index = "positions in word_span of randomly drawn words, -1 for none"
            feature = "text embedding of each drawn word alone, not normalized"
            fields += [
                Field("random_index", (self.num_drawn,), "text", "int16", index, dims=("choice",)),
                Field(
                    name="random_feature",
                    shape=(self.num_drawn, dim),
                    per="text",
                    dtype="float16",
                    doc=feature,
                    dims=("choice", "dim"),
                ),
            ]
        return tuple(fields)

    def weigh(
        self, module: Any, words: Words, images: Float[Tensor, "texts dim"] | None
    ) -> dict[str, Tensor]:
        """Compute the fields of texts.

        Args:
            module: The CLIP.
            words: The words of the texts.
            images: The image embedding of each text [texts, dim], zeros if its image is unusable; None
                for data without images.
        """
        device = next(module.parameters()).device
        features = self.features_of(module, words.distinct)
        place = torch.from_numpy(words.place).to(device)
        fields: dict[str, Tensor] = {"word_span": torch.from_numpy(words.span)}
        if self.num_best:
            scores = score(images, features, place, torch.from_numpy(words.importance).to(device))
            index = best_words(scores, torch.from_numpy(words.first).to(device), self.num_best)
            picked = chosen(features, place, index)
            fields |= {"word_score": scores, "word_index": index.to(torch.int16), "word_feature": picked}
        if self.num_drawn:
            index = torch.from_numpy(words.drawn).to(device)
            fields |= {"random_index": index, "random_feature": chosen(features, place, index.long())}
        return fields

    def features_of(self, module: Any, words: Sequence[str]) -> Float[Tensor, "words dim"]:
        """Return text embeddings in float32; a cached word is not encoded again.

        Which words are new depends on earlier batches, and a resumed build has to write the same bytes. So on
        the CPU, where a batch saves little, each word is encoded alone; elsewhere all batches have one size,
        so that the same kernel computes them.
        """
        parameter = next(module.parameters())
        cached = self.embeddings.setdefault((str(parameter.device), parameter.dtype), {})
        new = [word for word in words if word not in cached]
        size = WORDS_AT_ONCE.get(parameter.device.type, WORDS_AT_ONCE[""])
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            ids = self.tokenize(batch + [""] * (size - len(batch))).to(parameter.device)
            cached |= zip(batch, module.encode_text(ids, normalize=False), strict=False)
        none = torch.zeros(0, 1, device=parameter.device)
        return torch.stack([cached[word] for word in words]).float() if words else none


def score(
    images: Float[Tensor, "texts dim"] | None,
    features: Float[Tensor, "words dim"],
    place: Int[Tensor, "texts length"],
    importance: Float[Tensor, "texts length"],
) -> Float[Tensor, "texts length"]:
    """Compute Eq. 5; `importance` is already normalized by its L1 norm."""
    if images is None or not len(features):
        return importance
    cosines = F.normalize(images.float(), dim=1) @ F.normalize(features, dim=1).T  # [texts, words]
    relevance = cosines.gather(1, place.clamp(min=0)) * (place >= 0)
    return F.normalize(relevance, p=1.0, dim=1) + importance


def best_words(
    scores: Float[Tensor, "texts length"], first: Shaped[Tensor, "texts length"], num_best: int
) -> Int[Tensor, "texts best"]:
    """Compute Eq. 6: the positions of the highest scores, best first, ties in order; a repeated word
    counts once.
    """
    ranked, index = scores.masked_fill(~first, -torch.inf).sort(dim=1, descending=True, stable=True)
    return index.masked_fill(ranked == -torch.inf, -1)[:, :num_best]


def chosen(
    features: Float[Tensor, "words dim"], place: Int[Tensor, "texts length"], index: Int[Tensor, "texts best"]
) -> Float[Tensor, "texts best dim"]:
    """Return the embeddings of words, zeros if the index is -1."""
    if not len(features):
        return features.new_zeros(*index.shape, features.shape[1])
    words = place.gather(1, index.clamp(min=0)).clamp(min=0)
    return features[words] * (index >= 0)[..., None]
