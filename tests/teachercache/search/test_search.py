"""Search by text, picture and key: the cosine of the normalised sum, in the words of the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import build_cache, make_folder

from teachercache.build import verify as live
from teachercache.cache import store
from teachercache.cli import main
from teachercache.core.errors import UserError
from teachercache.data.manifest import load_manifest
from teachercache.data.pictures import decode_image
from teachercache.search import index
from teachercache.search.query import search_cache
from teachercache.teachers import of_cache
from tests.teachercache.search.test_index import brute_force, make_cache, vectors


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("search") / "photos", 30, texts=2)


@pytest.fixture(scope="module")
def built(photos, teacher_folder) -> Path:
    return build_cache(photos, teacher_folder, photos.parent / "c.zarr")


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector, np.float64) / np.linalg.norm(np.asarray(vector, np.float64))


def no_teacher(*arguments):
    raise AssertionError("a teacher was loaded")


def run(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main(["search", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["search", *map(str, words)]) == 2
    return capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# By key


@pytest.mark.parametrize("indexed", [False, True])
def test_by_key_the_neighbours_without_the_row_itself(tmp_path, indexed: bool, monkeypatch, capsys):
    monkeypatch.setattr(live, "load_teacher", no_teacher)
    images = vectors(80)
    cache = make_cache(tmp_path / "c.zarr", images)
    if indexed:
        index.build_index(cache)
    ids, cosine = brute_force(images, images[7], 11)
    found = run(capsys, cache.path, "--key", "k7")
    assert found["query"] == "k7"
    assert [result["key"] for result in found["results"]] == [f"k{i}" for i in ids if i != 7]
    np.testing.assert_allclose([result["score"] for result in found["results"]], cosine[1:], atol=1e-5)
    assert len(search_cache(cache.path, keys=("k7",), top=500)) == 79


def test_several_keys_are_the_sum_of_their_unit_vectors(tmp_path):
    images = vectors(80)
    cache = make_cache(tmp_path / "c.zarr", images)
    ids, _ = brute_force(images, unit(images[7]) + unit(images[30]), 12)
    found = search_cache(cache.path, keys=("k7", "k30", "k7"))
    assert [result["key"] for result in found] == [f"k{i}" for i in ids if i not in (7, 30)][:10]


def test_in_texts_a_row_stands_for_its_picture_and_none_of_its_texts_is_found(tmp_path):
    images, texts = vectors(50), vectors(150, seed=3).reshape(50, 3, 16)
    cache = make_cache(tmp_path / "c.zarr", images, texts=texts)
    ids, _ = brute_force(texts.reshape(150, 16), images[9], 150)
    found = search_cache(cache.path, keys=("k9",), field="text_emb", top=20)
    assert [result["texts"] for result in found] == [[f"k{i // 3} said {i % 3}"] for i in ids if i // 3 != 9][
        :20
    ]


def test_a_row_of_texts_alone_stands_for_its_usable_texts(tmp_path, teacher_folder):
    (tmp_path / "l.txt").write_text("red\ngreen\nblue\nold\n")
    cache = store.open_cache(build_cache(tmp_path / "l.txt", teacher_folder, tmp_path / "c.zarr"))
    stored = store.read_field(cache, "text_emb")[:, 0]
    ids, _ = brute_force(stored, stored[2], 4)
    keys = store.read_keys(cache)
    assert [r["key"] for r in search_cache(cache.path, keys=(keys[2],))] == [keys[i] for i in ids if i != 2]


def test_unusable_and_unknown_keys(tmp_path, capsys):
    cache = make_cache(tmp_path / "c.zarr", vectors(50), valid=np.arange(50) != 4)
    line = error_of(capsys, cache.path, "--key", "k4")
    assert "row 'k4' of" in line
    assert "is unusable (not a picture): pass another --key" in line
    assert "has no key 'k499': did you mean 'k49'?" in error_of(
        capsys, cache.path, "--key", "k3", "--key", "k499"
    )
    assert "pass one that `tc search --json` shows" in error_of(capsys, cache.path, "--key", "something else")


# ----------------------------------------------------------------------------------------------------
# Together


def test_text_picture_and_key_together_are_the_normalised_sum(built, photos, capsys):
    cache = store.open_cache(built)
    path = sorted(photos.rglob("*.png"))[3]
    teacher, stored, keys = (
        live.load_teacher(cache),
        store.read_field(cache, "image_emb"),
        store.read_keys(cache),
    )
    picture = teacher.view(decode_image(path.read_bytes()))[None]
    said = {
        **teacher.encode(teacher.module, {"image": picture}),
        **teacher.encode(teacher.module, {"text": teacher.tokenize(["in the snow"])}),
    }
    parts = {name: unit(value[0].detach().float().numpy()) for name, value in said.items()}
    for words, query, left_out in (
        (["in the snow", "--image", path], parts["text_emb"] + parts["image_emb"], set()),
        (["in the snow", "--key", keys[12]], parts["text_emb"] + unit(stored[12]), {12}),
        (["--image", path, "--key", keys[12]], parts["image_emb"] + unit(stored[12]), {12}),
        (
            ["in the snow", "--image", path, "--key", keys[12], "--key", keys[5]],
            parts["text_emb"] + parts["image_emb"] + unit(stored[12]) + unit(stored[5]),
            {12, 5},
        ),
    ):
        ids, cosine = brute_force(stored, query, 30)
        kept = [i not in left_out for i in ids]
        found = run(capsys, built, *words, "--top", 6)["results"]
        assert [result["key"] for result in found] == [keys[i] for i in np.array(ids)[kept][:6]]
        np.testing.assert_allclose([result["score"] for result in found], cosine[kept][:6], atol=1e-3)


def test_texts_nearest_to_a_picture(built, photos, capsys):
    cache = store.open_cache(built)
    stored = store.read_field(cache, "text_emb")
    path = sorted(photos.rglob("*.png"))[3]
    ids, _ = brute_force(stored.reshape(60, -1), store.read_field(cache, "image_emb")[3], 4)
    found = run(capsys, built, "--image", path, "--field", "text_emb", "--top", 4)["results"]
    texts = [text for row in load_manifest(built / "manifest.parquet").column("texts") for text in row]
    assert [result["texts"] for result in found] == [[texts[i]] for i in ids]


def test_what_cannot_be_asked(built, tmp_path, capsys):
    assert "give a text, --image FILE or --key KEY" in error_of(capsys, built)
    assert "field 'valid' holds no vectors" in error_of(capsys, built, "x", "--field", "valid")
    assert "has no field 'vae'" in error_of(capsys, built, "x", "--field", "vae")
    narrow = make_cache(tmp_path / "c.zarr", vectors(9), texts=vectors(9, 8).reshape(9, 1, 8))
    with pytest.raises(
        UserError, match="texts and pictures in different spaces: search 'text_emb' by a text alone"
    ):
        search_cache(narrow.path, keys=("k1",), field="text_emb")


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("digest", "0" * 16, "weights"),
        ("view", {"size": 9}, "view"),
        ("tokenizer", {"kind": "letters"}, "tokenizer"),
        ("constants", {"logit_scale": 1.0}, "constants"),
    ],
)
def test_a_teacher_of_other_values_is_refused(built, name, value, word, monkeypatch, capsys):
    real = of_cache.load_entry

    def another(*given, **options):
        teacher = real(*given, **options)
        return dataclasses.replace(teacher, spec=dataclasses.replace(teacher.spec, **{name: value}))

    assert len(run(capsys, built, "square", "--top", 3)["results"]) == 3
    monkeypatch.setattr(of_cache, "load_entry", another)
    error = error_of(capsys, built, "square")
    assert f"was built with other {word} of " in error
    assert "remove it and run `tc build" in error


def test_many_vectors_without_an_index_are_refused_before_the_teacher_is_loaded(built, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "FLAT_UP_TO", 29)
    monkeypatch.setattr(live, "load_teacher", no_teacher)
    copy = shutil.copytree(built, tmp_path / "c.zarr")
    with pytest.raises(
        UserError, match=r"no index of 'image_emb' yet: run `tc index .*c\.zarr --field image_emb`"
    ):
        search_cache(copy, text="x")
