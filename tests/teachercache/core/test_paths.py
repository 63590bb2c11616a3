"""Names of files that are almost right."""

import os

import pytest

from student.inputs.caches import parts_of
from teachercache.cache.store import open_cache
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path
from teachercache.data.read import find_sources


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("caches/demo/clip-lite.zarr", "caches/other", "runs/mine"):
        os.makedirs(name)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("caches/dmo/clip-lite.zarr", "caches/demo/clip-lite.zarr"),
        ("cache/demo/clip-lit.zarr", "caches/demo/clip-lite.zarr"),
        ("runs/mien", "runs/mine"),
        ("runs/mine", ""),  # it is there
        ("runs/nothing-like-it", ""),
        ("elsewhere/mine", ""),
        ("s3://bucket/caches", ""),
        ("a" * 5000, ""),
        ("a\0b", ""),
    ],
)
def test_the_closest_path(typed, meant, home):
    assert closest_path(typed) == (f"did you mean '{meant}'? " if meant else "")


def test_commands_name_the_closest_path(home):
    with pytest.raises(
        UserError, match=r"no cache at caches/demo/clip-lit.zarr: did you mean 'caches/demo/clip-lite"
    ):
        open_cache("caches/demo/clip-lit.zarr")
    with pytest.raises(UserError, match="no data at cachs: did you mean 'caches'"):
        find_sources("cachs")


def test_what_is_named_twice_is_refused(home):
    (home / "a.txt").write_text("a dog\n")
    with pytest.raises(UserError, match=r"names \./a.txt twice|names a.txt twice"):
        find_sources("a.txt,./a.txt")
    with pytest.raises(UserError, match="names runs twice"):
        parts_of("runs,caches, runs")
    assert parts_of("runs,caches") == ["runs", "caches"]
