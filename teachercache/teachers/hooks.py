"""Read the outputs of inner modules with forward hooks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

Place = tuple[nn.Module, Callable[[Any], Tensor]]  # a module and what is kept of its output


@contextlib.contextmanager
def watch(places: Mapping[str, Place]) -> Iterator[dict[str, Tensor]]:
    """A dict that fills while the modules run: under each name what its function makes of the module's output."""
    found: dict[str, Tensor] = {}

    def keep(name: str, take: Callable[[Any], Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        found[name] = take(output)

    hooks = [
        module.register_forward_hook(partial(keep, name, take)) for name, (module, take) in places.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def output_tensor(output: Any) -> Tensor:
    """A block's output; Hugging Face's blocks may give a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output
