"""uv installs under the settings of pip."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from scripts import install


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ("", []),
        ("global.index-url='https://a/simple'\n", ["--default-index", "https://a/simple"]),
        (
            "global.extra-index-url='file:///a file:///b'\nglobal.constraint='c.txt'\nglobal.cert='x.pem'\n",
            ["--index", "file:///a", "--index", "file:///b", "--constraints", "c.txt"],
        ),
        (":env:.find-links='/mine'\nglobal.find-links='/theirs'\n", ["--find-links", "/mine"]),
        ("global.find-links='/theirs'\n:env:.find-links='/mine'\n", ["--find-links", "/mine"]),
        ("global.no-index='true'\n", None),
    ],
)
def test_settings_of_pip_are_options_of_uv(settings, options):
    assert install.uv_options(settings) == options


@pytest.mark.parametrize(
    ("settings", "failing", "programs"),
    [
        ("", None, ["uv", "uv pip"]),
        ("", "uv", ["uv", "pip"]),
        ("", "uv pip", ["uv", "uv pip", "pip"]),
        ("global.no-index='true'\n", None, ["pip"]),
    ],
)
def test_pip_installs_where_uv_cannot(settings, failing, programs, monkeypatch):
    seen = []

    def run(words: list[str], **options) -> SimpleNamespace:
        if words[3:] == ["config", "list"]:
            return SimpleNamespace(returncode=0, stdout=settings)
        name = "uv pip" if words[2] == "uv" else "uv" if words[-1] == "uv" else "pip"
        seen.append(name)
        return SimpleNamespace(returncode=int(name == failing))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["install.py", "cpu,dev"])
    assert install.main() == 0
    assert seen == programs
