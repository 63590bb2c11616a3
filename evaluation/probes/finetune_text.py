"""Fine-tune a transformers model on text, for GLUE and XSUM.

VLKD, appendix A: the learning rate rises over the first epoch and decays linearly to 0. Free choices: AdamW instead of
the paper's LAMB, one setting instead of a grid search, no early stopping; the dev split is measured once, at the end.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teachercache.core.device import pick_device
from teachercache.core.errors import UserError, is_machine
from teachercache.core.progress import quiet_transformers, ticker
from teachercache.teachers.allowed import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Label = float | int | str | None
Row = tuple[tuple[str, ...], Label]  # one text or a pair, and its label or target text


@dataclasses.dataclass(frozen=True)
class Options:
    """The hyperparameters of fine-tuning.

    Attributes:
        epochs: Passes over the rows.
        batch: Rows per step.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay.
        clip: Maximum norm of the gradient.
        label_smoothing: Of the cross-entropy; 0 for the model's own loss.
        longest: Maximum number of tokens of the input.
        seed: Seed of the order of rows, of new heads and of dropout.
    """

    epochs: int = 10
    batch: int = 32
    lr: float = 3e-5
    weight_decay: float = 1e-3
    clip: float = 1.0
    label_smoothing: float = 0.0
    longest: int = 128
    seed: int = 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0; with a single epoch a tenth of it is warm-up."""
        total = steps_per_epoch * self.epochs
        warmup = steps_per_epoch if self.epochs > 1 else math.ceil(total / 10)
        return self.lr * min((step + 1) / warmup, (total - step) / max(1, total - warmup))


def load_text_model(
    kind: str, folder: str, **options: int | str
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load `AutoModelFor<kind>` in float32 onto the device, and the tokenizer, of a transformers folder.

    Args:
        kind: "SequenceClassification", "Seq2SeqLM", ...
        folder: A local folder.
        **options: Passed to `from_pretrained`.

    Raises:
        UserError: If the folder holds no such model.
    """
    import transformers

    if not (Path(folder) / "config.json").exists():
        raise UserError(
            f"{folder} is no transformers folder (config.json): pass a BART, or the language_model/ of an "
            "exported student"
        )
    check_folder(folder)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():  # a new head causes long warnings
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            auto_class = getattr(transformers, f"AutoModelFor{kind}")
            model = auto_class.from_pretrained(folder, **local, dtype=torch.float32, **options)
    except Exception as error:  # transformers raises errors of many kinds about weights that it cannot read
        if is_machine(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder} cannot be loaded for {kind}: {reason}") from error
    return model.to(pick_device()), tokenizer


def fine_tune(
    model: "PreTrainedModel",
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Tensor]],
    options: Options,
    title: str,
) -> list[float]:
    """Train a model in place.

    Args:
        model: The model.
        rows: Training rows; their order in each epoch is drawn from the seed.
        collate: Makes the model's inputs of a batch of rows.
        options: The hyperparameters.
        title: Shown with the progress and in errors.

    Returns:
        The loss of each step.

    Raises:
        UserError: If the last loss is not finite.
    """
    per_epoch = math.ceil(len(rows) / options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    order = torch.Generator().manual_seed(options.seed)
    losses, device = [], next(model.parameters()).device
    model.train()
    with ticker(per_epoch * options.epochs, "steps", title) as tick:
        for step in range(per_epoch * options.epochs):
            if step % per_epoch == 0:
                epoch_order = torch.randperm(len(rows), generator=order).tolist()
            start = step % per_epoch * options.batch
            batch = collate([rows[i] for i in epoch_order[start : start + options.batch]])
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


def loss_of(model: "PreTrainedModel", batch: dict[str, Tensor], smoothing: float) -> Tensor:
    """Return the model's own loss, or with smoothing the cross-entropy of its logits; labels of -100 are ignored."""
    output = model(**batch)
    if not smoothing:
        return output.loss
    return torch.nn.functional.cross_entropy(
        output.logits.flatten(0, -2), batch["labels"].flatten(), label_smoothing=smoothing
    )


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Yield consecutive batches of rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], longest: int
) -> dict[str, Tensor]:
    """Return token ids and attention mask [n, length] of each row's text or pair; long texts are cut at the end."""
    first = [texts[0] for texts, _ in rows]
    second = [texts[1] for texts, _ in rows] if len(rows[0][0]) > 1 else None
    encoded = tokenizer(first, second, truncation=True, max_length=longest, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
