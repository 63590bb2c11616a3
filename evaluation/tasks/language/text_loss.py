"""How well a BART mends texts that it has not seen: the loss of a token, before and after distillation. No pictures.

In each run of 20 tokens three are replaced by one mask, 15 % as in VLKD's text infilling, but always at the same places
so that models are compared on the same holes; the model writes the whole text. Tokens are the model's own: losses of
two models compare only where they share their tokenizer.
"""

from typing import Any

import torch
from torch import Tensor

from evaluation.probes.finetune_text import batches, load_text_model
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

PERIOD, SPAN = 20, 3
LONGEST, BATCH = 128, 64


def evaluate(folder: str, data: str) -> dict[str, Any]:
    """Mean negative log-likelihood in nats: of all tokens of the test split's texts, and of the masked ones."""
    manifest = read_manifest(data)
    there = set(manifest.column("split"))
    rows = set(manifest.rows_of_split("test").tolist()) if "test" in there else set(range(len(manifest)))
    groups = [texts for row, texts in enumerate(manifest.column("texts")) if row in rows]
    texts = list(dict.fromkeys(text.strip() for group in groups for text in group if text.strip()))
    if not texts:
        raise UserError(f"{data} has no texts to mend")
    model, tokenizer = load_text_model("Seq2SeqLM", folder)
    model.to(pick_device()).eval()
    longest = min(LONGEST, model.config.max_position_embeddings)
    losses, masked = [], []
    with torch.inference_mode():
        for part in batches([((text,), None) for text in texts], BATCH):
            ids = tokenizer([text for (text,), _ in part], truncation=True, max_length=longest)["input_ids"]
            nll, hidden = _losses(model, tokenizer, ids)
            losses.append(nll)
            masked.append(hidden)
    nll, hidden = torch.cat(losses), torch.cat(masked)
    return {
        "nll_per_token": float(nll.mean()),
        "nll_per_masked_token": float(nll[hidden].mean())
        if hidden.any()
        else "skipped: no text is long enough",
        "num_texts": len(texts),
        "num_tokens": len(nll),
    }


def holes(length: int) -> list[bool]:
    """Which tokens of a text are hidden, the special ones at both ends never: three of each 20, in their middle."""
    start = (PERIOD - SPAN) // 2
    return [0 < i < length - 1 and start <= (i - 1) % PERIOD < start + SPAN for i in range(length)]


def masked_ids(ids: list[int], mask: int) -> list[int]:
    """Ids with one mask in the place of each run of hidden ones."""
    hidden = holes(len(ids))
    return [mask if hidden[i] else token for i, token in enumerate(ids) if not (hidden[i] and hidden[i - 1])]


def _losses(model: Any, tokenizer: Any, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Loss of every token of these texts, and whether it was hidden."""
    device = next(model.parameters()).device
    source, there = _padded(
        [masked_ids(ids, tokenizer.mask_token_id) for ids in rows], tokenizer.pad_token_id
    )
    labels, counted = _padded(rows, tokenizer.pad_token_id)
    before = torch.cat([torch.full((len(rows), 1), model.config.decoder_start_token_id), labels[:, :-1]], 1)
    found = model(
        input_ids=source.to(device),
        attention_mask=there.long().to(device),
        decoder_input_ids=before.to(device),
    )
    nll = torch.nn.functional.cross_entropy(
        found.logits.float().transpose(1, 2), labels.to(device), reduction="none"
    )
    hidden, _ = _padded([[int(one) for one in holes(len(ids))] for ids in rows], 0)
    return nll.cpu()[counted], hidden.bool()[counted]


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as one tensor [n, longest], and where they have values."""
    found = torch.full((len(rows), max(map(len, rows))), pad)
    there = torch.zeros(found.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        found[i, : len(row)], there[i, : len(row)] = torch.tensor(row), True
    return found, there
