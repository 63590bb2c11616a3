"""What DeepSpeed wraps: student and distillation heads, their outputs gathered, the recipe's loss. Knows no files."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from student.distributed import gather
from student.ensemble import plain_name
from student.recipe import Now, Recipe
from teachercache.core.errors import UserError
from teachercache.teachers.teacher import Inputs


class TrainStep(nn.Module):
    """One forward: batch of this rank -> loss of the global batch.

    A teacher is a plain attribute, not a submodule: never trained, sharded or saved. `live` stands in for a cache's
    fields; through `teacher` a gradient passes.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: nn.Module,
        heads: nn.Module | None,
        live: Any = None,
        *,
        teacher: Any = None,
        precision: str = "float32",
    ):
        super().__init__()
        self.recipe, self.student, self.heads, self.precision = recipe, student, heads, precision
        self.__dict__ |= {"live": live, "teacher": teacher}

    def forward(
        self, batch: Mapping[str, Tensor], now: Now, gradients: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Loss to minimise, its weighted terms, and notes; the batch's fields come from a cache or a live teacher.

        For `accumulate`: with `gradients` {} the outputs and fields of these rows alone; with the gradient of some
        loss with respect to outputs, the scalar whose backward is that gradient's.
        """
        outputs, fields = self.outputs(batch)
        if gradients is None:
            return self.loss(outputs, fields, now)
        if not gradients:
            return outputs, fields
        return torch.stack(
            [(outputs[name].float() * gradient).sum() for name, gradient in gradients.items()]
        ).sum()

    def outputs(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What student and heads say of this rank's rows, and what the teacher said."""
        if self.live is not None:
            batch = {**batch, **live_fields(self.live, batch, self.recipe.fields)}
        names = (*(self.recipe.given or self.recipe.fields), "logit_scale")
        fields = {name: rows for name, rows in batch.items() if plain_name(name) in names}
        with torch.autocast(batch_device(batch), torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.student(batch)
            if self.heads is not None:
                outputs |= self.heads(outputs | fields)
        if self.teacher is not None:
            outputs |= self._through(outputs, fields)
        return outputs, fields

    def _through(self, outputs: dict[str, Tensor], fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the teacher says of the student's outputs, in its own precision; it must let their gradient through."""
        assert self.recipe.live is not None
        said = self.recipe.live.call(self.teacher, outputs, fields, self.recipe.constants)
        if torch.is_grad_enabled() and any(value.requires_grad for value in outputs.values()):
            refuse_constants(said, self.recipe.name)
        return said

    def loss(
        self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], now: Now
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of the global batch from this rank's outputs and fields; no parameter is used here."""
        outputs, fields = (
            {name: gather(rows) if self._is_across(name) else rows for name, rows in part.items()}
            for part in (outputs, fields)
        )
        terms, notes = self.recipe.loss(outputs, fields, self.recipe.constants, now)
        if not terms:
            raise UserError(f"every weight of {self.recipe.name} is 0: give one of them a value by --set")
        total = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        return total, terms, notes

    def _is_across(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(plain_name(name), pattern) for pattern in self.recipe.across)


def refuse_constants(said: Mapping[str, Tensor], name: str) -> None:
    """RuntimeError where what a teacher said of the student has no gradient: nothing would be learnt from it."""
    lost = [key for key, value in said.items() if not value.requires_grad]
    if lost:
        raise RuntimeError(
            f"{name}: the live teacher gave {', '.join(lost)} without a gradient: is it under no_grad?"
        )


def batch_device(batch: Mapping[str, Tensor]) -> str:
    """The type of the device that a batch lies on."""
    return next(iter(batch.values())).device.type


def live_fields(teacher: Any, batch: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The fields that a cache would have handed over, computed now, without gradient."""
    inputs: Inputs = {}
    if "image" in teacher.spec.inputs:
        inputs["image"] = batch["teacher_image"]
    if "text" in teacher.spec.inputs:
        inputs["text"] = batch["teacher_text"]
    if "pairs" in teacher.spec.inputs:  # one text for each image
        index = torch.arange(len(batch["teacher_image"]), device=batch["teacher_image"].device)[:, None]
        inputs["pair_image"] = inputs["pair_text"] = index
        inputs["pair_valid"] = torch.ones_like(index, dtype=torch.bool)
    with torch.no_grad():
        outputs = teacher.encode(teacher.module, inputs)
    return {name: outputs[name].float() for name in names}
