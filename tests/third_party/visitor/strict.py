"""What the tests need: objects that raise when core reads an attribute that is in no contract, and a way to die."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from student.recipe import Batch, Notes, Outputs, Progress, Terms

Loss = Callable[[Outputs, Batch, Any, Progress], tuple[Terms, Notes]]
KILL_VARIABLE = "VISITOR_KILL_AT"  # the step in whose loss the process kills itself


def die_at(step: int) -> None:
    """Kill this process in the step that the environment names."""
    if os.environ.get(KILL_VARIABLE) == str(step):
        os.kill(os.getpid(), signal.SIGKILL)


class OutsideContract(Exception):
    """Core has read an attribute that no contract names."""


def core_asks() -> bool:
    """Return whether the code that reads an attribute is in one of our packages."""
    place = sys._getframe(2).f_code.co_filename
    packages = [
        sys.modules[name].__file__
        for name in ("teachercache", "evaluation", "student")
        if name in sys.modules
    ]
    return any(place.startswith(str(Path(file).parent)) for file in packages if file)


def strict_module(kind: type[nn.Module]) -> None:
    """Make an attribute that is missing in a module an error of whoever asks, even inside of hasattr."""

    def strict_getattr(module: nn.Module, name: str) -> Any:
        try:
            return nn.Module.__getattr__(module, name)
        except AttributeError:
            if core_asks():
                raise OutsideContract(f"core reads {kind.__name__}.{name}") from None
            raise

    kind.__getattr__ = strict_getattr  # type: ignore[assignment]


def strict_constants(kind: type) -> None:
    """Make reading a recipe's constants an error of core."""

    def strict_getattribute(constants: object, name: str) -> Any:
        if not name.startswith("__") and core_asks():
            raise OutsideContract(f"core reads the constant {name}")
        return object.__getattribute__(constants, name)

    kind.__getattribute__ = strict_getattribute  # type: ignore[assignment]


def mortal(loss: Loss) -> Loss:
    """Return a loss in whose step the process can kill itself."""

    @functools.wraps(loss)
    def dying(outputs: Outputs, fields: Batch, constants: Any, progress: Progress) -> tuple[Terms, Notes]:
        die_at(progress.step)
        return loss(outputs, fields, constants, progress)

    return dying
