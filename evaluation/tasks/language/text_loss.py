"""Loss of infilling held-out texts with a BART, before and after distillation.

In each run of 20 tokens three are replaced by one mask: 15 %, as in VLKD's text infilling, but at fixed places, so that
models are compared on the same masks. The model reconstructs the whole text. Tokens are the model's own, so the losses
of two models are comparable only if they share their tokenizer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.data.splits import known_splits, rows_in
from evaluation.probes.finetune_text import batches, load_text_model
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PERIOD, SPAN = 20, 3
LONGEST, BATCH = 128, 64


def evaluate(folder: str, data: str) -> Metrics:
    """Compute the mean negative log-likelihood in nats, of all tokens and of the masked ones.

    Args:
        folder: A transformers folder.
        data: Anything with texts; only the test split is used if there is one.

    Raises:
        UserError: If there are no texts or no model.
    """
    manifest = read_manifest(data)
    has_test = "test" in set(known_splits(manifest))
    rows = set(rows_in(manifest, "test").tolist()) if has_test else set(range(len(manifest)))
    groups = [texts for row, texts in enumerate(manifest.column("texts")) if row in rows]
    texts = list(dict.fromkeys(text.strip() for group in groups for text in group if text.strip()))
    if not texts:
        raise UserError(f"{data} has no texts to mend")
    model, tokenizer = load_text_model("Seq2SeqLM", folder)
    model.eval()
    longest = min(LONGEST, model.config.max_position_embeddings)
    losses, masked = [], []
    with torch.inference_mode():
        for batch in batches([((text,), None) for text in texts], BATCH):
            ids = tokenizer([text for (text,), _ in batch], truncation=True, max_length=longest)["input_ids"]
            batch_losses, batch_masked = _losses(model, tokenizer, ids)
            losses.append(batch_losses)
            masked.append(batch_masked)
    nll, hidden = torch.cat(losses), torch.cat(masked)
    of_masked = float(nll[hidden].mean()) if hidden.any() else "skipped: no text is long enough"
    return {
        "nll_per_token": float(nll.mean()),
        "nll_per_masked_token": of_masked,
        "num_texts": len(texts),
        "num_tokens": len(nll),
    }


def holes(length: int) -> list[bool]:
    """Return which tokens of a text are masked: the middle three of each 20, never the special tokens at both ends."""
    start = (PERIOD - SPAN) // 2
    return [0 < i < length - 1 and start <= (i - 1) % PERIOD < start + SPAN for i in range(length)]


def masked_ids(ids: Sequence[int], mask: int) -> list[int]:
    """Return the ids with one mask in place of each run of masked tokens."""
    hidden = holes(len(ids))
    return [mask if hidden[i] else token for i, token in enumerate(ids) if not (hidden[i] and hidden[i - 1])]


def _losses(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Losses of all tokens of these texts [tokens], and whether they were masked [tokens]."""
    device = next(model.parameters()).device
    source, attention_mask = _padded(
        [masked_ids(ids, tokenizer.mask_token_id) for ids in rows], tokenizer.pad_token_id
    )
    labels, valid = _padded(rows, tokenizer.pad_token_id)
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    output = model(
        input_ids=source.to(device),
        attention_mask=attention_mask.long().to(device),
        decoder_input_ids=torch.cat([start, labels[:, :-1]], 1).to(device),
    )
    nll = torch.nn.functional.cross_entropy(
        output.logits.float().transpose(1, 2), labels.to(device), reduction="none"
    )
    hidden, _ = _padded([[int(masked) for masked in holes(len(ids))] for ids in rows], 0)
    return nll.cpu()[valid], hidden.bool()[valid]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as one tensor [n, longest], and which places are not padding."""
    out = torch.full((len(rows), max(map(len, rows))), pad)
    valid = torch.zeros(out.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, : len(row)], valid[i, : len(row)] = torch.tensor(row), True
    return out, valid
