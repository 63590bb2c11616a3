"""The examples run as they are, on small data."""

import argparse
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, small_training
from small import contained, make_folder

from student.cli import main as student
from teachercache.cli import main as tc

EXAMPLES = ROOT / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
Start = Callable[..., str]


@pytest.fixture
def start(monkeypatch, tmp_path, capsys) -> Start:
    """A function that runs an example in an empty folder, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_there_are_five_and_they_are_short():
    assert len(FILES) == 5
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= 80 for name in FILES)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in listed for name in FILES)


def test_embed_and_search(start, teacher_folder):
    make_folder(Path("photos"), 8)
    words = ("photos", "square 3", "--teacher", teacher_folder, "--cache", "c.zarr", "--top", 2)
    first = start("embed_and_search.py", *words)
    assert "8 rows, 8 of them embedded now" in first
    assert first.count("class") == 2
    assert "8 rows, 0 of them" in start("embed_and_search.py", *words)


def test_train_a_student(start, teacher_folder):
    make_folder(Path("squares"), 24, texts=2, splits=True)
    with small_training():
        out = start("train_a_student.py", "squares", "--teacher", teacher_folder)
    assert "after 2 steps" in out
    assert out.count("text to image R@1") == 2
    assert "open_clip.create_model_and_transforms" in out


def test_own_recipe(start, cache, squares, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    words = ["--data", squares, "--cache", cache, "--out", tmp_path / "run", "--steps", 3, "--batch-size", 8]
    words += ["--set", "model=vit-micro", "--set", "run.workers=0", "--set", "end=0.02"]
    with contained():
        assert student([*map(str, ["train", "--recipe", "own_recipe:COOLING", *words])]) == 0
        assert (
            student([*map(str, ["train", "--recipe", "own_recipe:COOLING", "--set", "end=0", "--dry-run"])])
            == 2
        )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"task", "match"} <= json.loads(lines[0]).keys()
    assert json.loads(lines[0])["tau"] == pytest.approx(0.1)
    assert json.loads(lines[-1])["tau"] == pytest.approx(0.02)


def test_own_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    data, out = make_folder(tmp_path / "photos", 8), str(tmp_path / "colors.zarr")
    for suffix in (".png", ".txt"):
        shutil.copy(data / "class0" / f"000{suffix}", data / "class0" / f"copy{suffix}")
    named = ["--teacher", "own_teacher:COLORS"]
    assert tc(["build", *named, "--data", str(data), "--out", out, "--workers", "0"]) == 0
    assert tc(["verify", out, *named]) == 0
    capsys.readouterr()
    assert tc(["search", out, "--key", "class0/000", "--top", "1"]) == 0
    assert "class0/copy" in capsys.readouterr().out
    assert tc(["build", *named, "--data", str(data), "--out", out, "--weights", "random:0"]) == 2


def test_read_a_cache_imports_nothing_of_ours(start, cache):
    source = (EXAMPLES / "read_a_cache.py").read_text()
    assert not any(
        f"{word} {name}" in source for word in ("import", "from") for name in ("teachercache", "student")
    )
    out = start("read_a_cache.py", cache)
    assert "64 rows" in out
    assert "text_emb (64, 2, 16) float16" in out
    with pytest.raises(SystemExit):
        start("read_a_cache.py", "--nothing")


@pytest.mark.parametrize("name", [name for name in FILES if "own" not in name])
def test_help_is_the_docstring(name, start, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(
        argparse.ArgumentParser, "print_help", lambda self, file=None: shown.append(self.format_help())
    )
    with pytest.raises(SystemExit):
        start(name, "--help")
    assert f"python examples/{name}" in shown[0]
