"""Teachers that read images or texts alone are ordinary: build, grow, verify, search, index."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from disturbed import run_build
from own_teachers import COLORS, LETTERS, tokenize
from PIL import Image
from small import error_of, make_folder, run, tree

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.teachers.registry import load


@pytest.fixture
def colors(data, tmp_path):
    return run_build(load("own-colors"), data, tmp_path / "colors.zarr").cache


@pytest.fixture
def letters(data, tmp_path):
    return run_build(load("own-letters"), data, tmp_path / "letters.zarr").cache


def test_fields_of_an_image_only_teacher(colors, data):
    stored = store.read_field(colors, "color")
    for row, path in enumerate(sorted(data.rglob("*.png"))):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)) / 255
        np.testing.assert_allclose(stored[row], pixels.mean((0, 1)), atol=2e-3)
    assert store.read_field(colors, "cells").shape == (40, 3, 4, 4)
    assert "dimension_names" in (colors.path / "cells" / "zarr.json").read_text()
    assert json.loads((colors.path / "cells" / "zarr.json").read_text())["dimension_names"] == [
        "row",
        "channel",
        "y",
        "x",
    ]


def test_a_text_only_teacher_decodes_no_image(data, tmp_path, monkeypatch):
    next(data.rglob("*.png")).write_bytes(b"not an image")
    monkeypatch.setattr(
        "teachercache.build.decode.decode_image", lambda *_: pytest.fail("an image was decoded")
    )
    cache = run_build(load("own-letters"), data, tmp_path / "c.zarr").cache
    assert store.read_field(cache, "valid").all()
    texts = [text for row in range(40) for text in store.cached_manifest(cache).row(row).texts]
    expected = 1 + torch.nn.functional.one_hot(tokenize(texts), 64).sum(1)
    assert np.array_equal(store.read_field(cache, "counts")[:, 0], expected.numpy().astype(np.float16))


@pytest.mark.parametrize("name", ["own-colors", "own-letters"])
def test_verify_finds_other_values(name, data, tmp_path):
    teacher = load(name)
    run_build(teacher, data, tmp_path / "c.zarr")
    assert run("verify", tmp_path / "c.zarr") == 0

    def other(module, inputs):
        return {
            field: values.roll(1, dims=1) * -1 for field, values in teacher.encode(module, inputs).items()
        }

    run_build(dataclasses.replace(teacher, encode=other), data, tmp_path / "other.zarr")
    assert run("verify", tmp_path / "other.zarr") == 2


@pytest.mark.parametrize("name", ["own-colors", "own-letters"])
def test_growing_is_building_anew(name, tmp_path):
    data = make_folder(tmp_path / "data", 20, texts=1)
    run_build(load(name), data, tmp_path / "c.zarr")
    make_folder(tmp_path / "data", 31, texts=2)
    run_build(load(name), data, tmp_path / "c.zarr")
    run_build(load(name), data, tmp_path / "whole.zarr")
    caches = [store.open_complete(tmp_path / path) for path in ("c.zarr", "whole.zarr")]
    keys = store.read_keys(caches[0])
    rows = store.join(caches[1], keys.tolist())
    assert (rows >= 0).all()
    assert len(rows) == 31
    for field in caches[0].fields:
        first, second = (store.read_field(cache, field) for cache in caches)
        assert np.array_equal(first, second[rows]), field


def test_augmented_views_of_an_image_only_teacher(data, tmp_path):
    cache = run_build(load("own-colors"), data, tmp_path / "c.zarr", views=2).cache
    assert store.read_field(cache, "color").shape == (40, 2, 3)
    assert run("verify", cache.path) == 0
    with pytest.raises(UserError, match="own-letters reads no images; leave --views away"):
        run_build(load("own-letters"), data, tmp_path / "views.zarr", views=2)


def test_data_without_what_the_teacher_reads(tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="own-colors needs images, and"):
        run_build(load("own-colors"), tmp_path / "texts.txt", tmp_path / "c.zarr")
    cache = run_build(load("own-letters"), tmp_path / "texts.txt", tmp_path / "c.zarr").cache
    assert store.read_field(cache, "counts").shape == (2, 1, 64)


def test_search_uses_the_vector_field_of_the_cache(colors, letters, data, capsys):
    path = sorted(data.rglob("*.png"))[7]
    assert run("search", colors.path, "--image", path, "--top", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["image"] == str(path)
    assert "reads no texts: search with --key KEY" in error_of(capsys, "search", colors.path, "a square")
    assert run("search", letters.path, "square 3 said 0", "--top", 1, "--json") == 0
    result = json.loads(capsys.readouterr().out)["results"][
        0
    ]  # ids of words can collide, so 3 is not certain
    assert result["texts"][0].startswith("square ")
    assert result["score"] > 0.999
    assert "reads no images: search with --key KEY" in error_of(
        capsys, "search", letters.path, "--image", path
    )
    for cache, field in ((colors, "color"), (letters, "counts")):
        assert run("index", cache.path) == 0
        assert cache.path.with_name(f"{cache.path.stem}.{field}.faiss").exists()


@pytest.mark.parametrize("name", ["colors", "letters"])
def test_analyze(name, tmp_path, request):
    cache = request.getfixturevalue(name)
    assert run("analyze", cache.path, "--out", tmp_path / "report") == 0
    assert (tmp_path / "report" / "report.json").exists()


def test_killed_builds_resume(data, tmp_path):
    for name in ("own-colors", "own-letters"):
        teacher, calls = load(name), []

        def stops(module, inputs, teacher=teacher, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return teacher.encode(module, inputs)

        with pytest.raises(KeyboardInterrupt):
            run_build(dataclasses.replace(teacher, encode=stops), data, tmp_path / name / "c.zarr")
        run_build(teacher, data, tmp_path / name / "c.zarr")
        run_build(teacher, data, tmp_path / name / "whole.zarr")
        assert tree(tmp_path / name / "c.zarr") == tree(tmp_path / name / "whole.zarr")


def test_the_inputs_of_a_teacher_are_checked():
    for entry, missing in ((COLORS, "view"), (LETTERS, "tokenize")):
        teacher = entry.load("t", weights="none", outputs=("embeddings",))
        with pytest.raises(ValueError, match="lacks the function for it"):
            dataclasses.replace(teacher, **{missing: None})
        with pytest.raises(ValueError, match="'words': the teacher does not list it"):
            dataclasses.replace(teacher, find_words=len)
