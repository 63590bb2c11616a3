"""Install the checkout into the environment of this Python with uv, under the settings of pip, or else with pip.

    .venv/bin/python scripts/install.py EXTRAS

uv needs a quarter of pip's time. Where it is not to be had, or pip has a setting without a counterpart, pip installs.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONS = {  # of pip, and their names in uv
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
WITHOUT = (
    "cert",
    "timeout",
    "default-timeout",
    "retries",
    "disable-pip-version-check",
    "no-compile",
    "quiet",
)


def uv_options(settings: str) -> list[str] | None:
    """Return uv's options for the lines of `pip config list`, or None if one of them has no counterpart."""
    found: dict[str, str] = {}
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        place, option = name.rsplit(".", 1)
        if place == ":env:" or option not in found:  # the environment overrules files
            found[option] = ast.literal_eval(value)
    if found.keys() - OPTIONS.keys() - set(WITHOUT):
        return None
    return [
        word for name, uv in OPTIONS.items() for value in found.get(name, "").split() for word in (uv, value)
    ]


def main() -> int:
    """Install, and return the exit status."""
    wanted = ["--editable", f"{ROOT}[{sys.argv[1]}]"]
    pip = [sys.executable, "-m", "pip"]
    settings = subprocess.run([*pip, "config", "list"], capture_output=True, text=True)
    options = None if settings.returncode else uv_options(settings.stdout)
    if (
        options is not None
        and not subprocess.run([*pip, "install", "-qq", "uv"], capture_output=True).returncode
    ):
        # As pip does: the best version of all indexes, and the certificates of the system
        words = [
            "--python",
            sys.executable,
            "--index-strategy",
            "unsafe-best-match",
            "--system-certs",
            "--no-cache",
        ]
        words += [] if "PIP_NO_COMPILE" in os.environ else ["--compile-bytecode"]
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", *words, *options, *wanted]
        if not subprocess.run(uv, capture_output=True).returncode:
            return 0
    return subprocess.run([*pip, "install", "-qq", *wanted]).returncode


if __name__ == "__main__":
    sys.exit(main())
