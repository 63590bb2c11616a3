"""Pairs made wrong on purpose: which rows, what texts, and what is recorded."""

import json

import numpy as np
import pytest
from small import error_of, make_folder, run

from teachercache.data.manifest import make_manifest
from teachercache.data.noise import KINDS, corrupt
from teachercache.data.read import read_manifest
from teachercache.data.sample import Sample

CAPTIONS = [
    "a red cat sits",
    "a red cat sleeps",
    "a blue dog runs",
    "a blue dog sits",
    "two old trains",
    "rain",
]


def manifest_of(tmp_path, captions=CAPTIONS, *, repeat: int = 4):
    """Rows of a caption each, every fourth a test row, with a task column of their own."""
    many = [f"{text} {k}" for k in range(repeat) for text in captions]
    return make_manifest(
        "d",
        tmp_path,
        [
            Sample(f"k{i:02d}", "", (text,), split="test" if i % 4 == 3 else "train", task='{"question":"q"}')
            for i, text in enumerate(many)
        ],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_training_rows_changes_and_says_so(kind, share, tmp_path):
    before = manifest_of(tmp_path)
    after = corrupt(before, kind, share, seed=3)
    texts, was = after.column("texts"), before.column("texts")
    changed = [row for row in range(len(before)) if texts[row] != was[row]]
    train = set(before.rows_of_split("train").tolist())
    assert set(changed) <= train
    assert len(changed) == round(share * len(train))
    keys = before.column("key")
    for row, task in enumerate(after.column("task")):
        found = json.loads(task)
        assert found["question"] == "q"
        assert ("noise" in found) == (row in changed)
        if row in changed:
            assert found["noise"]["kind"] == kind
            assert found["noise"]["texts"] == was[row]
            if kind != "partial":
                assert was[keys.index(found["noise"]["from"])] == texts[row]
    assert after.column("key") == keys
    assert after.digest != before.digest
    again = corrupt(before, kind, share, seed=3)
    assert again.table.equals(after.table)
    assert again.digest == after.digest
    if share < 1:
        assert not corrupt(before, kind, share, seed=4).table.equals(after.table)


def test_shuffled_texts_are_the_same_texts(tmp_path):
    before = manifest_of(tmp_path)
    after = corrupt(before, "shuffle", 0.5)
    assert sorted(after.column("texts")) == sorted(before.column("texts"))


def test_partial_texts_are_half_of_the_words_in_their_order(tmp_path):
    before = manifest_of(tmp_path)
    after = corrupt(before, "partial", 1.0)
    for row in before.rows_of_split("train").tolist():
        (new,), (old,) = after.column("texts")[row], before.column("texts")[row]
        assert f" {new} " in f" {old} "
        assert len(new.split()) == len(old.split()) // 2


def test_near_texts_are_the_nearest_that_differ(tmp_path):
    rows = [Sample(f"k{i}", "", (text,)) for i, text in enumerate(CAPTIONS)]
    after = corrupt(make_manifest("d", tmp_path, rows), "near", 1.0).column("texts")
    assert after[0] == [CAPTIONS[1]]
    assert after[1] == [CAPTIONS[0]]
    assert after[2] == [CAPTIONS[3]]
    assert after[5] != ["rain"]  # no word in common with any: one at random


def test_the_share_is_drawn_without_favourites(tmp_path):
    before = manifest_of(tmp_path)
    counts = np.zeros(len(before))
    for seed in range(200):
        texts = corrupt(before, "shuffle", 0.5, seed=seed).column("texts")
        counts += [a != b for a, b in zip(texts, before.column("texts"), strict=True)]
    train = counts[before.rows_of_split("train")]
    assert train.min() > 60  # 100 expected, 7 the standard deviation
    assert train.max() < 140


def test_the_command_writes_what_can_be_read_again(tmp_path, capsys):
    data = make_folder(tmp_path / "squares", 20, splits=True)
    out = tmp_path / "noisy.parquet"
    assert run("manifest", data, "--noise", "shuffle=0.4", "--noise-seed", "1", "--out", out) == 0
    assert "6 of 15 training rows" in capsys.readouterr().err
    noisy, clean = read_manifest(str(out)), read_manifest(str(data))
    expected = corrupt(clean, "shuffle", 0.4, seed=1)
    assert noisy.column("texts") == expected.column("texts")
    assert sum(a != b for a, b in zip(noisy.column("texts"), clean.column("texts"), strict=True)) == 6


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ("shuffel=0.4", "did you mean 'shuffle'"),
        ("shuffle", "write a share after shuffle="),
        ("shuffle=much", "write a share after"),
        ("near=1.5", "above 0 and up to 1"),
        ("partial=0.01", "are too few"),
    ],
)
def test_noise_that_makes_no_sense(noise, said, tmp_path, capsys):
    data = make_folder(tmp_path / "squares", 20, splits=True)
    assert said in error_of(capsys, "manifest", data, "--noise", noise, "--out", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
