"""Record outputs of inner modules with forward hooks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

Place = tuple[nn.Module, Callable[[Any], Tensor]]  # a module, and the function of its output to record


@contextlib.contextmanager
def watch(places: Mapping[str, Place]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that fills during the forward pass: for each name its function of the output of its
    module.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, take: Callable[[Any], Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = take(output)

    hooks = [
        module.register_forward_hook(partial(keep, name, take)) for name, (module, take) in places.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def output_tensor(output: Any) -> Tensor:
    """Return the output of a block; blocks of Hugging Face may return a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output
