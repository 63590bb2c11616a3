"""Sample captions while training and score them with CIDEr-D, for self-critical training.

The batch contains the random numbers, so a caption does not depend on the number of ranks or on resuming.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from evaluation.metrics.cider import cider_d, document_frequency
from evaluation.models.generator import CAPTION
from student.models.seq2seq.texts import Reader


class Reward(NamedTuple):
    """Document frequencies of the training captions and the number of pictures, which CIDEr-D needs."""

    frequency: Counter
    pictures: int


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation and without the prompt."""
    return re.findall(r"[^\W_]+(?:'\w+)?", text.strip().removeprefix(CAPTION).lower())


def reward_of(references: Iterable[Sequence[str]]) -> Reward:
    """Compute the document frequencies of captions, given the captions of each picture."""
    captions = [[words_of(text) for text in texts] for texts in references]
    return Reward(document_frequency(captions), len(captions))


class CaptionSampler(NamedTuple):
    """Samples captions from a BART and scores them."""

    bart: BartForConditionalGeneration
    reader: Reader
    reward: Reward

    def sample(
        self, context: Float[Tensor, "n m d2"], mask: Bool[Tensor, "n m"], batch: Mapping[str, Tensor]
    ) -> tuple[Int[Tensor, "n length"], dict[str, Tensor]]:
        """Sample a caption per row, without dropout or gradient, and score it.

        Args:
            context: The decoder's context.
            mask: Its attention mask.
            batch: The batch of `Reader`.

        Returns:
            The sampled texts, and the CIDEr-D of sampled (`reward` [n]) and greedy captions (`baseline` [n]).
        """
        training = self.bart.training
        self.bart.eval()
        with torch.no_grad():
            # All rows have the same prompt
            prompt = batch["text"][:, : int(batch["prompt_length"][0])]
            texts = [self.write(context, mask, prompt, noise) for noise in (batch["sampling_noise"], None)]
        self.bart.train(training)
        scores = [
            torch.tensor(rewards(text, batch["reference"], self.reader, self.reward), device=text.device)
            for text in texts
        ]
        return texts[0], {"reward": scores[0], "baseline": scores[1]}

    def write(
        self, context: Tensor, mask: Tensor, prompt: Tensor, noise: Tensor | None
    ) -> Int[Tensor, "n length"]:
        """Generate texts that begin with a prompt.

        Args:
            context: The decoder's context [n, m, d2].
            mask: Its attention mask [n, m].
            prompt: Token ids [n, length].
            noise: Random numbers [n, steps] in [0, 1) for sampling; None for greedy decoding.
        """
        marks, text, past = self.reader.marks, prompt, None
        start_token = self.bart.config.decoder_start_token_id
        assert start_token is not None
        start = torch.full_like(prompt[:, :1], start_token)
        ids = torch.cat([start, prompt], 1)
        unfinished = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
        for step in range(self.reader.sampling_steps):
            out = self.bart(
                encoder_outputs=BaseModelOutput(last_hidden_state=context),
                attention_mask=mask.long(),
                decoder_input_ids=ids,
                past_key_values=past,
                use_cache=True,
            )
            past, logits = out.past_key_values, out.logits[:, -1].float()
            if noise is None:
                word = logits.argmax(1)
            else:
                below = logits.softmax(1).cumsum(1)
                word = (below < noise[:, step, None] * below[:, -1:]).sum(1).clamp(max=logits.shape[1] - 1)
            word = torch.where(unfinished, word, marks.pad)
            text, ids = torch.cat([text, word[:, None]], 1), word[:, None]
            unfinished = unfinished & (word != marks.end)
            if not unfinished.any():
                break
        return text


def rewards(text: Tensor, references: Tensor, reader: Reader, reward: Reward) -> list[float]:
    """Compute the CIDEr-D of each row's text [n, length] against its captions [n, R, W]."""
    scores = []
    for ids, captions in zip(text.tolist(), references.tolist(), strict=True):
        written, *words = (
            words_of(reader.tokenizer.decode(row, skip_special_tokens=True)) for row in (ids, *captions)
        )
        scores.append(
            cider_d(written, [caption for caption in words if caption], reward.frequency, reward.pictures)
        )
    return scores
