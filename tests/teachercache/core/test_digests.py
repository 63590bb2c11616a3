"""digests.json: a whole file has its digest there at every instant, and every other byte is found."""

import os

import pytest

from teachercache.core.digests import (
    NAME,
    damage_of,
    forget_missing,
    read_digests,
    refuse_damage,
    remove_proved,
    seal,
    write_proved,
)
from teachercache.core.errors import UserError


def test_a_file_is_whole_until_a_bit_of_it_flips(tmp_path):
    write_proved(tmp_path / "inner" / "a", tmp_path, "some words")
    assert damage_of(tmp_path, "inner/a") == ""
    content = (tmp_path / "inner" / "a").read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "inner" / "a").write_bytes(flipped)
        assert damage_of(tmp_path, "inner/a") == "is damaged"
    (tmp_path / "inner" / "a").write_bytes(content)
    write_proved(tmp_path / "b", tmp_path, "b")
    (tmp_path / "b").write_text("c")
    with pytest.raises(UserError, match="b is damaged: train again"):
        refuse_damage(tmp_path, ("inner/a", "b"), "train again")


def test_every_flip_of_the_digests_themselves_is_found(tmp_path):
    write_proved(tmp_path / "a", tmp_path, "words")
    content = (tmp_path / NAME).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / NAME).write_bytes(flipped)
        with pytest.raises(UserError, match=r"digests\.json is damaged"):
            read_digests(tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_kill_at_any_write_leaves_the_old_file_or_the_new_one(call, tmp_path, monkeypatch):
    real, seen, stop = getattr(os, call), 0, 0

    def dying(*given):
        nonlocal seen
        seen += 1
        if seen == stop:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(os, call, dying)
    write_proved(tmp_path / "a", tmp_path, "before")
    for stop in range(1, 12):
        seen = 0
        try:
            write_proved(tmp_path / "a", tmp_path, f"after {stop}")
        except KeyboardInterrupt:
            pass
        else:
            break
        assert damage_of(tmp_path, "a") == ""
        assert (tmp_path / "a").read_text() in ("before", *(f"after {i}" for i in range(stop + 1)))
    assert stop > 3
    assert len(read_digests(tmp_path)[0]["a"]) == 1  # what a kill left beside it is gone


def test_a_sealed_folder_misses_a_file_and_another_does_not(tmp_path):
    (tmp_path / "a").write_text("a")
    assert damage_of(tmp_path, "a") == ""  # without digests nothing is checked
    seal(tmp_path)
    (tmp_path / "a").unlink()
    assert damage_of(tmp_path, "a") == "is missing"
    write_proved(tmp_path / "b", tmp_path, "b")
    remove_proved(tmp_path / "b", tmp_path)
    assert "b" not in read_digests(tmp_path)[0]


def test_digests_of_files_that_are_gone_leave_an_open_folder_alone(tmp_path):
    """As a kill between the removal of a checkpoint and of its digest leaves them."""
    for name in ("a", "b"):
        write_proved(tmp_path / name, tmp_path, name)
    (tmp_path / "a").unlink()
    forget_missing(tmp_path)
    assert list(read_digests(tmp_path)[0]) == ["b"]
    seal(tmp_path)
    (tmp_path / "b").unlink()
    forget_missing(tmp_path)
    assert damage_of(tmp_path, "b") == "is missing"
