"""Call `Teacher.encode` and check what it returns against the fields that the teacher declares."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from teachercache.cache.spec import Field
from teachercache.core.errors import UserError, calling
from teachercache.teachers.teacher import Inputs, Teacher

if TYPE_CHECKING:
    from torch import Tensor, nn


def encode(
    teacher: Teacher, module: "nn.Module", inputs: Inputs, wanted: Collection[str] | None = None
) -> "dict[str, Tensor]":
    """Compute the fields of a batch.

    Args:
        teacher: The teacher.
        module: Its module, on the device and in the precision of the caller.
        inputs: The batch.
        wanted: The names of the fields that must be there, if the inputs allow them; by default all of the teacher.

    Raises:
        UserError: `encode` failed, left out a field, or returned values of another shape; the message names the teacher.
    """
    who = f"teacher {teacher.spec.name}: encode"
    with calling(who, teacher.encode):
        outputs = teacher.encode(module, inputs)
    for problem in _problems(teacher, inputs, outputs, wanted):
        raise UserError(f"{who} {problem}")
    return outputs


def _problems(
    teacher: Teacher, inputs: Inputs, outputs: object, wanted: Collection[str] | None
) -> Iterator[str]:
    """Yield what is wrong with the outputs of a batch, most basic first."""
    if not isinstance(outputs, dict):
        yield f"returned a {type(outputs).__name__}: return a dict with a tensor for each field"
        return
    fields = {field.name: field for field in teacher.spec.fields}
    for name, values in outputs.items():
        if name not in fields or (wanted is not None and name not in wanted):
            names = ", ".join(name for name in fields if wanted is None or name in wanted)
            yield f"returned '{name}', which is none of its fields for these outputs and data: {names}"
            return
        yield from _wrong_values(fields[name], inputs, values)
    given = {"image": "image" in inputs, "text": "text" in inputs, "pair": "pair_image" in inputs}
    missing = [
        field.name
        for field in fields.values()
        if given[field.per] and (wanted is None or field.name in wanted) and field.name not in outputs
    ]
    if missing:
        read = ", ".join(inputs)
        yield f"left out {', '.join(missing)} of the inputs {read}: return every field of the teacher's spec"


def _wrong_values(field: Field, inputs: Inputs, values: object) -> Iterator[str]:
    """Yield what is wrong with the values of one field."""
    from torch import Tensor

    if not isinstance(values, Tensor):
        yield f"returned a {type(values).__name__} as {field.name}: return a torch.Tensor"
        return
    pairs = [inputs["pair_text"].numel()] if "pair_text" in inputs else []
    numbers = {
        "image": [len(inputs["image"])] if "image" in inputs else [],
        "text": ([len(inputs["text"])] if "text" in inputs else []) + pairs,
        "pair": pairs,
    }[field.per]
    shape = tuple(values.shape)
    if shape[1:] != field.shape or not shape or (numbers and shape[0] not in numbers):
        expected = " or ".join(str([number, *field.shape]) for number in dict.fromkeys(numbers))
        yield (
            f"returned {field.name} with the shape {[*shape]}: its field is per {field.per}, "
            f"{expected or ['n', *field.shape]}"
        )
