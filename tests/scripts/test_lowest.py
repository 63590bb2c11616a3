"""The constraints for tests with the lowest versions."""

import configparser
from pathlib import Path

import pytest

from scripts import lowest

ROOT = Path(__file__).parents[2]


def test_every_floor_of_setup_is_pinned():
    """Counted from the text of setup.cfg, not by the parser under test."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = {line.strip() for text in texts for line in text.splitlines() if line.strip()}
    floors = {
        line.partition("[")[0] + line[line.index(">=") :] if "[" in line else line
        for line in lines
        if not line.startswith("teachercache[")
    }
    pinned = set(lowest.constraints())
    assert {line.replace("==", ">=") for line in pinned} == {
        f"{lowest.canonical(line.partition('>=')[0])}>={line.partition('>=')[2]}" for line in floors
    }
    assert {"torch==2.6", "numpy==2.0", "moto==5"} <= pinned


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("torch", "torch has no floor: write torch>=VERSION"),
        ("torch<3", "write NAME>=FLOOR"),
        ("torch>=2\n    Torch>=3", "torch has two floors: 2 and 3"),
    ],
)
def test_a_requirement_without_one_floor_is_an_error(lines, said, tmp_path, monkeypatch):
    (tmp_path / "setup.cfg").write_text(
        f"[options]\ninstall_requires =\n    {lines}\n[options.extras_require]\ncpu =\n    faiss-cpu>=1\n"
    )
    monkeypatch.setattr(lowest, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=said):
        lowest.constraints()


def test_extras_within_extras_are_expanded():
    groups = {extra: {one.name for one in group} for extra, group in lowest.read_setup().items()}
    assert {"s3fs", "nltk", "pytest"} <= groups["dev"]
    assert {"faiss-cpu", "wandb", "plotly"} <= groups["all"]
    assert "teachercache" not in set().union(*groups.values())
