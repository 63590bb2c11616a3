"""Captions that a student makes up while it trains, and what they are worth: self-critical training on CIDEr-D.

The numbers that sampling needs come with the batch, so a caption is the same on any number of ranks and after a resume.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from evaluation.metrics.cider import cider_d, document_frequency
from evaluation.models.generator import CAPTION
from student.models.seq2seq.texts import Reader


class Reward(NamedTuple):
    """What CIDEr-D knows of the training captions."""

    frequency: Counter
    pictures: int


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation and without the prompt in front of them."""
    return re.findall(r"[^\W_]+(?:'\w+)?", text.strip().removeprefix(CAPTION).lower())


def reward_of(references: Iterable[Sequence[str]]) -> Reward:
    """Document frequencies of each picture's captions."""
    captions = [[words_of(text) for text in texts] for texts in references]
    return Reward(document_frequency(captions), len(captions))


def sampled_captions(
    bart: Any,
    context: Float[Tensor, "n m d2"],
    there: Bool[Tensor, "n m"],
    batch: Mapping[str, Tensor],
    reader: Reader,
    reward: Reward,
) -> tuple[Int[Tensor, "n length"], dict[str, Tensor]]:
    """Sampled texts, and `reward`, `baseline` [n]: CIDEr-D of them and of greedy ones. Without dropout or gradient."""
    training = bart.training
    bart.eval()
    with torch.no_grad():
        given = batch["text"][:, : int(batch["given"][0])]  # the prompt's words are the same in each row
        texts = [write(bart, context, there, given, chance, reader) for chance in (batch["chance"], None)]
    bart.train(training)
    scores = [
        torch.tensor(rewards(text, batch["reference"], reader, reward), device=text.device) for text in texts
    ]
    return texts[0], {"reward": scores[0], "baseline": scores[1]}


def write(
    bart: Any, context: Tensor, there: Tensor, given: Tensor, chance: Tensor | None, reader: Reader
) -> Int[Tensor, "n length"]:
    """Texts that begin with `given`, token after token: sampled by the batch's own random numbers, or the likeliest."""
    marks, text, past = reader.marks, given, None
    start = torch.full_like(given[:, :1], bart.config.decoder_start_token_id)
    ids, open_ = torch.cat([start, given], 1), torch.ones(len(given), dtype=torch.bool, device=given.device)
    for step in range(reader.num_chances):
        out = bart(
            encoder_outputs=BaseModelOutput(last_hidden_state=context),
            attention_mask=there.long(),
            decoder_input_ids=ids,
            past_key_values=past,
            use_cache=True,
        )
        past, logits = out.past_key_values, out.logits[:, -1].float()
        if chance is None:
            word = logits.argmax(1)
        else:
            below = logits.softmax(1).cumsum(1)
            word = (below < chance[:, step, None] * below[:, -1:]).sum(1).clamp(max=logits.shape[1] - 1)
        word = torch.where(open_, word, marks.pad)
        text, ids = torch.cat([text, word[:, None]], 1), word[:, None]
        open_ = open_ & (word != marks.end)
        if not open_.any():
            break
    return text


def rewards(text: Tensor, references: Tensor, reader: Reader, reward: Reward) -> list[float]:
    """CIDEr-D of each row's text."""
    found = []
    for ids, captions in zip(text.tolist(), references.tolist(), strict=True):
        said, *known = (
            words_of(reader.tokenizer.decode(one, skip_special_tokens=True)) for one in (ids, *captions)
        )
        found.append(cider_d(said, [words for words in known if words], reward.frequency, reward.pictures))
    return found
