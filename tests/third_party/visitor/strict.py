"""What the tests need: objects that raise when core reads an attribute that is in no contract, and a way to die."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

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


class StrictModule:
    """A mix-in for modules: an attribute that is missing is an error of whoever asks, even inside of hasattr."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if core_asks():
                raise OutsideContract(f"core reads {type(self).__name__}.{name}") from None
            raise


class StrictConstants:
    """A mix-in for a recipe's constants: core never reads them."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and core_asks():
            raise OutsideContract(f"core reads the constant {name}")
        return super().__getattribute__(name)
