"""The declarations of a field: what a value belongs to, its dimensions, how two computations are compared."""

import dataclasses
import json

import numpy as np
import pytest

from teachercache.build.compare import comparable
from teachercache.cache import store
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec, meta_from_dict, to_dict
from teachercache.core.errors import UserError

SCORE = Field("score", (), "pair", "float32", "", compare="relative_error", beside="score")
CHOICE = Field("choice", (2,), "text", "int16", "", dims=("choice",), compare="same_choice", beside="worth")
WORTH = Field("worth", (4,), "text", "float16", "", dims=("word",))


def spec_of(*fields: Field) -> TeacherSpec:
    return TeacherSpec("t", "pretrained", "0", ("embeddings",), fields, {}, {}, {}, inputs=("text",))


@pytest.mark.parametrize(
    ("per", "texts", "views", "shape", "dims"),
    [
        ("row", 3, 2, (5, 4), ("row", "dim")),
        ("image", 3, 0, (5, 4), ("row", "dim")),
        ("image", 3, 2, (5, 2, 4), ("row", "view", "dim")),
        ("text", 3, 2, (5, 3, 4), ("row", "text", "dim")),
        ("pair", 3, 2, (5, 3, 4), ("row", "text", "dim")),
        ("pair", 0, 0, (5, 0, 4), ("row", "text", "dim")),
    ],
)
def test_shape_and_dimension_names(per, texts, views, shape, dims):
    field = Field("x", (4,), per, "float16", "")
    assert field.array_shape(5, texts, views) == shape
    assert field.array_dims(views) == dims


def test_a_field_names_its_own_dimensions():
    assert Field("x", (2, 3), "image", "float16", "").array_dims() == ("row", "dim0", "dim1")
    assert Field("x", (2, 3), "image", "float16", "", dims=("y", "x")).array_dims() == ("row", "y", "x")
    with pytest.raises(ValueError, match="1 dims for the shape"):
        Field("x", (2, 3), "image", "float16", "", dims=("y",))


@pytest.mark.parametrize("values", [{"per": "view"}, {"compare": "mse"}, {"compare": "same_choice"}])
def test_declarations_are_checked(values):
    with pytest.raises(ValueError, match=r"per|compare|beside"):
        dataclasses.replace(Field("x", (2,), "text", "int16", ""), **values)


def test_beside_names_a_field_of_the_same_kind():
    with pytest.raises(ValueError, match="names no field per text: 'worth'"):
        spec_of(CHOICE)
    with pytest.raises(ValueError, match="names no field per text: 'worth'"):
        spec_of(CHOICE, dataclasses.replace(WORTH, per="image"))
    assert spec_of(CHOICE, WORTH).field("choice") == CHOICE


def test_vectors_are_found_without_a_name():
    fields = (WORTH, Field("map", (2, 2), "image", "float16", ""), Field("a", (3,), "text", "float16", ""))
    assert (spec_of(*fields).image_vector, spec_of(*fields).text_vector) == ("", "a")
    image = Field("b", (3,), "image", "float32", "")
    assert spec_of(*fields, image, dataclasses.replace(image, name="c")).image_vector == "b"


def test_metadata_round_trip():
    meta = CacheMeta(spec_of(CHOICE, WORTH, SCORE), "d", "0", 4, 2, 2, "float32", {})
    assert meta_from_dict(json.loads(json.dumps(to_dict(meta)))) == meta


def test_relative_error_is_the_error_over_the_stored_value():
    stored = {("score", 0): np.array([2.0, -400.0], np.float32)}
    for error, good in ((0.009, True), (0.011, False)):
        live = {("score", 0): stored["score", 0] * np.float32(1 + error)}
        left, right = (comparable(values, SCORE, 0, live, stored) for values in (live, stored))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        assert ((left * right).sum(1) / norms >= 0.999).all() == good


def test_the_old_format_is_refused_with_the_command_that_builds_it_anew(tmp_path):
    meta = CacheMeta(
        dataclasses.replace(spec_of(WORTH), name="own teacher", outputs=("a", "b")),
        "d",
        "0",
        4,
        2,
        2,
        "bfloat16",
        {},
    )
    attributes = to_dict(meta) | {"format": 1}
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": attributes}))
    with pytest.raises(UserError) as error:
        store.open_cache(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: cache format 1, this version reads format 2: remove the cache and run `tc build --teacher "
        f"'own teacher' --outputs a,b --data d --out {tmp_path} --precision bf16`"
    )
