"""Fine-tuning of a plain transformers folder on text, for GLUE and XSUM: one short loop. Not for distillation.

VLKD, appendix A: the rate rises over the first epoch and falls to 0. Free choices: AdamW where the paper has LAMB, one
setting where it searches a grid, no early stopping: the dev split is measured once, at the end.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachercache.core.errors import UserError
from teachercache.core.progress import ticker

Row = tuple[tuple[str, ...], Any]  # texts (one or a pair), what is to be said of them


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is fine-tuned."""

    epochs: int = 10
    batch: int = 32
    lr: float = 3e-5
    weight_decay: float = 1e-3
    clip: float = 1.0
    label_smoothing: float = 0.0
    longest: int = 128  # tokens of what is read
    seed: int = 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0; where there is one epoch alone a tenth of it is the rise."""
        total = steps_per_epoch * self.epochs
        rise = steps_per_epoch if self.epochs > 1 else math.ceil(total / 10)
        return self.lr * min((step + 1) / rise, (total - step) / max(1, total - rise))


def load_text_model(kind: str, folder: str, **options: Any) -> tuple[Any, Any]:
    """`AutoModelFor<kind>` and tokenizer of a transformers folder; UserError where it is none."""
    import transformers

    if not (Path(folder) / "config.json").exists():
        raise UserError(
            f"{folder} is no transformers folder (config.json): pass a BART, or the language_model/ of an "
            "exported student"
        )
    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # a head is new, and says so at length
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kinds = getattr(transformers, f"AutoModelFor{kind}")
        model = kinds.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be loaded for {kind}: {str(error).splitlines()[0]}") from error
    finally:
        transformers.utils.logging.set_verbosity(said)
        transformers.utils.logging.enable_progress_bar()
    return model, tokenizer


def fine_tune(
    model: Any,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    options: Options,
    title: str,
) -> list[float]:
    """Train in place, in an order drawn from the seed; the loss of each step."""
    per_epoch = math.ceil(len(rows) / options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    order = torch.Generator().manual_seed(options.seed)
    losses, device = [], next(model.parameters()).device
    model.train()
    with ticker(per_epoch * options.epochs, "steps", title) as tick:
        for step in range(per_epoch * options.epochs):
            if step % per_epoch == 0:
                places = torch.randperm(len(rows), generator=order).tolist()
            start = step % per_epoch * options.batch
            batch = collate([rows[i] for i in places[start : start + options.batch]])
            for group in optimizer.param_groups:
                group["lr"] = options.rate(step, per_epoch)
            loss = loss_of(
                model, {name: value.to(device) for name, value in batch.items()}, options.label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            losses.append(loss.item())
            tick.step(1)
    model.eval()
    if not math.isfinite(losses[-1]):
        raise UserError(
            f"{title}: the loss became {losses[-1]}: the learning rate {options.lr:g} is too high"
        )
    return losses


def loss_of(model: Any, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    """The model's own loss, or with smoothing the cross-entropy of its logits; a label of -100 does not count."""
    found = model(**batch)
    if not smoothing:
        return found.loss
    return torch.nn.functional.cross_entropy(
        found.logits.flatten(0, -2), batch["labels"].flatten(), label_smoothing=smoothing
    )


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Rows in order, some at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def encode_texts(tokenizer: Any, rows: Sequence[Row], longest: int) -> dict[str, Tensor]:
    """Ids and mask of each row's text or pair; a text that is too long loses its end."""
    first = [texts[0] for texts, _ in rows]
    second = [texts[1] for texts, _ in rows] if len(rows[0][0]) > 1 else None
    found = tokenizer(first, second, truncation=True, max_length=longest, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
