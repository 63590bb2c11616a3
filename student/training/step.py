"""The module that DeepSpeed wraps: student, distillation heads, gathered outputs, and the recipe's loss."""

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from student.contract import Student
from student.distributed import gather
from student.ensemble import plain_name
from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Terms
from teachercache.core.errors import UserError, calling, name_of
from teachercache.teachers.encode import encode
from teachercache.teachers.teacher import Inputs, Teacher


class Loss(NamedTuple):
    """The loss of the global batch."""

    total: Tensor  # scalar, the sum of the terms
    terms: Terms
    notes: Notes


class TrainStep(nn.Module):
    """A forward pass from the batch of this rank to the loss of the global batch.

    Teachers are plain attributes, so they are neither trained nor sharded nor saved.

    Args:
        recipe: The recipe that is trained.
        student: Its student.
        heads: Its distillation heads, or None.
        online_teacher: Computes in every step the fields that a cache would provide.
        gradient_teacher: A frozen teacher that needs backpropagation.
        precision: "float32", or "bfloat16" to autocast student and heads.
    """

    online_teacher: Teacher | None
    gradient_teacher: Teacher | None

    def __init__(
        self,
        recipe: Recipe[Any],
        student: Student,
        heads: nn.Module | None,
        *,
        online_teacher: Teacher | None = None,
        gradient_teacher: Teacher | None = None,
        precision: str = "float32",
    ):
        super().__init__()
        self.recipe, self.student, self.heads, self.precision = recipe, student, heads, precision
        self.loss_fields = (*(recipe.loss_fields or recipe.fields), "logit_scale")
        self.__dict__ |= {"online_teacher": online_teacher, "gradient_teacher": gradient_teacher}

    def forward(
        self, batch: Batch, progress: Progress, gradients: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, ...] | Tensor:
        """Compute the loss of a batch, or one of the two passes of `accumulate`.

        Args:
            batch: Rows of this rank.
            progress: Current step and number of steps.
            gradients: None for a whole batch; {} or gradients of the loss with respect to outputs for a
                micro-batch.

        Returns:
            Without `gradients`, the entries of a Loss as a plain tuple, because DeepSpeed cannot rebuild
            named ones. If `gradients` is empty, the outputs and loss fields of this micro-batch. Otherwise a
            scalar whose backward pass applies those output gradients.
        """
        outputs, fields = self.outputs(batch)
        if gradients is None:
            return tuple(self.loss(outputs, fields, progress))
        if not gradients:
            return outputs, fields
        products = [(outputs[name].float() * gradient).sum() for name, gradient in gradients.items()]
        return torch.stack(products).sum()

    def outputs(self, batch: Batch) -> tuple[Outputs, dict[str, Tensor]]:
        """Compute the outputs of student, heads and gradient teacher for this rank's rows.

        Returns:
            The outputs, and the loss fields of the batch.
        """
        if self.online_teacher is not None:
            batch = {**batch, **online_fields(self.online_teacher, batch, self.recipe.fields)}
        fields = {name: rows for name, rows in batch.items() if plain_name(name) in self.loss_fields}
        with torch.autocast(device_type(batch), torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self._student_outputs(batch)
            if self.heads is not None:
                with calling(f"{self.recipe.name}: the distillation heads", self.recipe.distill_heads):
                    outputs |= self.heads(outputs | fields)
        if self.gradient_teacher is not None:
            outputs |= self._through_teacher(outputs, fields)
        return outputs, fields

    def _student_outputs(self, batch: Batch) -> Outputs:
        """Compute the student's outputs, and check that each is a scale or has one entry per row."""
        who = f"the student {name_of(self.student)}: forward"
        with calling(who, type(self.student)):
            outputs = self.student(batch)
        if not isinstance(outputs, dict):
            raise UserError(f"{who} returned a {type(outputs).__name__}: return a dict of tensors by name")
        rows = max(len(value) for value in batch.values() if value.ndim)
        for name, value in outputs.items():
            if not isinstance(value, Tensor):
                raise UserError(f"{who} returned a {type(value).__name__} as {name}: return a torch.Tensor")
            if value.ndim and len(value) != rows:
                raise UserError(
                    f"{who} returned {name} with the shape {[*value.shape]} for {rows} rows: return one entry per row, "
                    "or a tensor without dimensions"
                )
        return outputs

    def _through_teacher(self, outputs: Outputs, fields: Mapping[str, Tensor]) -> Outputs:
        """Compute the gradient teacher's outputs in its own precision; check that they are differentiable."""
        assert self.recipe.gradient_teacher is not None
        assert self.gradient_teacher is not None
        teacher_outputs = self.recipe.gradient_teacher.call(
            self.gradient_teacher, outputs, fields, self.recipe.constants
        )
        if torch.is_grad_enabled() and any(value.requires_grad for value in outputs.values()):
            refuse_constants(teacher_outputs, self.recipe.name)
        return teacher_outputs

    def loss(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], progress: Progress) -> Loss:
        """Compute the global batch's loss from this rank's outputs and loss fields. Uses no parameters."""
        terms, notes = call_loss(self.recipe, self._gathered(outputs), self._gathered(fields), progress)
        if not terms:
            raise UserError(f"every weight of {self.recipe.name} is 0: set one of them with --set")
        return Loss(torch.stack([term.reshape(()) for term in terms.values()]).sum(), terms, notes)

    def _gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather rows over ranks, except for scalars and names that the recipe declares per row."""
        return {
            name: gather(rows) if rows.ndim and not self._is_per_row(name) else rows
            for name, rows in values.items()
        }

    def _is_per_row(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(plain_name(name), pattern) for pattern in self.recipe.per_row)


def call_loss(
    recipe: Recipe[Any], outputs: Outputs, fields: dict[str, Tensor], progress: Progress
) -> tuple[Terms, Notes]:
    """Call the loss of a recipe, and check that it returns scalar terms and notes."""
    who = f"recipe {recipe.name}: loss"
    try:
        with calling(who, recipe.loss):
            result = recipe.loss(outputs, fields, recipe.constants, progress)
    except UserError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        raise UserError(
            f"{who} reads {error.__cause__}; the outputs are {', '.join(outputs)}, the loss fields "
            f"{', '.join(fields) or 'none'}: add an entry of the batch to the recipe's loss_fields"
        ) from error.__cause__
    if not (
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, dict) for part in result)
    ):
        raise UserError(
            f"{who} returned a {type(result).__name__}: return a tuple of two dicts, (terms, notes)"
        )
    for name, value in (result[0] | result[1]).items():
        if not isinstance(value, Tensor):
            raise UserError(f"{who} returned a {type(value).__name__} as {name}: return a torch.Tensor")
    for name, term in result[0].items():
        if term.numel() != 1:
            raise UserError(
                f"{who}: the term {name} has the shape {[*term.shape]}: return its mean over the rows"
            )
    return result


def refuse_constants(outputs: Mapping[str, Tensor], name: str) -> None:
    """Raise a RuntimeError if an output of a gradient teacher has no gradient, so that nothing is trained."""
    constant = [key for key, value in outputs.items() if not value.requires_grad]
    if constant:
        raise RuntimeError(
            f"{name}: the gradient teacher returned {', '.join(constant)} without a gradient: is it under "
            "no_grad?"
        )


def device_type(batch: Batch) -> str:
    """Return the device type of a batch, such as "cuda"."""
    return next(iter(batch.values())).device.type


def online_fields(teacher: Teacher, batch: Batch, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Compute the fields that a cache would hold, without gradient."""
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
        outputs = encode(teacher, teacher.module, inputs)
    return {name: outputs[name].float() for name in names}


class Engine(Protocol):
    """The members of a DeepSpeed engine around a TrainStep that training uses."""

    module: TrainStep
    optimizer: torch.optim.Optimizer
    enable_backward_allreduce: bool

    def __call__(
        self, batch: Batch, progress: Progress, gradients: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Run TrainStep.forward; the type of the result depends on `gradients`."""

    def backward(self, loss: Tensor) -> Any:
        """Run the backward pass, and reduce gradients over ranks."""

    def step(self) -> None:
        """Take an optimizer step, or count a micro-batch."""
