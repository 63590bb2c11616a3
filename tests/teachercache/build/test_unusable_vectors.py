"""Vectors without a direction, values that a dtype cannot hold, and the probe of a new cache."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbed import run_build
from small import make_folder

from teachercache.build import loop
from teachercache.build.forward import least_size, problems_of
from teachercache.cache import store
from teachercache.cache.spec import Field
from teachercache.core.device import Precision
from teachercache.search.vectors import unit, usable_vectors
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

VECTOR = Field("image_emb", (4,), "image", "float16", "")
MAP = Field("patches", (2, 2), "image", "float16", "", dims=("y", "x"))


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def scaled(teacher: Teacher, **factors: float) -> Teacher:
    """The teacher with fields that are multiplied: by one factor, or by a list of one for each row."""

    def encode(module, inputs):
        outputs = teacher.encode(module, inputs)
        return {name: value * factors.get(name, 1.0) for name, value in outputs.items()}

    return dataclasses.replace(teacher, encode=encode)


def reasons(cache: Path) -> set[str]:
    return {json.loads(line)["reason"] for line in (cache / "quarantine.jsonl").read_text().splitlines()}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0, 0, 0, 0], "is zero"),
        ([np.nan, 0, 0, 0], "is not finite"),
        ([np.inf, 1e6, 0, 0], "is not finite"),
        ([65_504, 0, 0, 0], None),
        ([65_600, 1, 1, 1], "is too large for float16"),
        ([0, 0, 0, 1e-9], "is too small for float16"),
        ([1e-5, 1e-5, 0, 0], None),
        ([1e-9, 1, 0, 0], None),  # one small number beside a large one
    ],
)
def test_reasons_of_a_vector(values: list, reason: str | None):
    found = problems_of(VECTOR, np.array([[1, 2, 3, 4], values], np.float32), np.ones(2, bool))
    assert found == ({} if reason is None else {1: reason})


def test_feature_maps_may_be_zero_and_rows_that_are_unusable_have_their_own_reason():
    assert problems_of(MAP, np.zeros((1, 2, 2), np.float32), np.ones(1, bool)) == {}
    assert problems_of(VECTOR, np.zeros((1, 4), np.float32), np.zeros(1, bool)) == {}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_smallest_vector_keeps_its_direction(dtype: str):
    vectors = np.random.default_rng(0).standard_normal((200, 512)) * least_size(dtype)
    rounded = unit(vectors.astype(dtype))
    assert (rounded * unit(vectors)).sum(1).min() > 0.9995


def test_zero_vectors_are_unusable_rows(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 4)
    run_build(scaled(teacher, image_emb=0.0), data, tmp_path / "c.zarr")
    assert reasons(tmp_path / "c.zarr") == {"image_emb is zero"}
    assert not store.read_field(store.open_cache(tmp_path / "c.zarr"), "valid").any()


@pytest.mark.parametrize(("factor", "what"), [(1e7, "large"), (1e-12, "small")])
def test_one_row_that_does_not_fit_is_named(factor: float, what: str, teacher, tmp_path, monkeypatch):
    """The probe of a cache sees ordinary rows; a later one does not fit."""
    data = make_folder(tmp_path / "data", 6)
    monkeypatch.setattr(loop, "probe_teacher", lambda teacher, *_: (teacher, Precision("float32", "a test")))
    factors = torch.ones(5, 1)
    factors[2] = factor

    def encode(module, inputs):
        outputs = teacher.encode(module, inputs)
        return outputs | {"text_emb": outputs["text_emb"] * factors[: len(outputs["text_emb"])]}

    run_build(dataclasses.replace(teacher, encode=encode), data, tmp_path / "c.zarr")
    cache = store.open_cache(tmp_path / "c.zarr")
    assert reasons(tmp_path / "c.zarr") == {f"text_emb is too {what} for float16"}
    assert store.read_field(cache, "text_valid").ravel().tolist() == [i != 2 for i in range(6)]
    assert len(usable_vectors(cache, "text_emb")) == 5


@pytest.mark.parametrize("factor", [1e7, 1e-9])
def test_vectors_outside_of_float16_are_stored_in_float32(factor: float, teacher, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 10)
    run_build(teacher, data, tmp_path / "plain.zarr")
    odd = scaled(teacher, image_emb=factor)
    run_build(odd, data, tmp_path / "c.zarr")
    assert "image_emb" in capsys.readouterr().err
    plain, cache = (store.open_cache(tmp_path / name) for name in ("plain.zarr", "c.zarr"))
    assert [cache.fields[name].dtype for name in ("image_emb", "text_emb")] == ["float32", "float16"]
    vectors = [unit(store.read_field(opened, "image_emb")) for opened in (plain, cache)]
    assert np.abs((vectors[0] * vectors[1]).sum(1) - 1).max() < 1e-5
    assert run_build(odd, data, tmp_path / "c.zarr").rows_written == 0  # the cache decides, not another probe


@pytest.mark.parametrize("digits", [3, 12])
def test_a_proposed_precision_must_come_close_to_float32(digits: int, teacher, tmp_path):
    """bfloat16 is kept unless a vector of the probe leaves its direction."""
    data = make_folder(tmp_path / "data", 6)

    def encode(module, inputs):
        outputs = {name: value.float() for name, value in teacher.encode(module, inputs).items()}
        if next(module.parameters()).dtype == torch.bfloat16:
            outputs["image_emb"] = torch.round(outputs["image_emb"] * digits) / digits
        return outputs

    proposal = Precision("bfloat16", "a test", proposed=True)
    rounding = dataclasses.replace(load(teacher.spec.name), encode=encode)
    cache = loop.build(
        rounding,
        loop_manifest(data),
        tmp_path / "c.zarr",
        loop.BuildOptions(batch_size=4, workers=0, device="cpu", precision=proposal),
    ).cache
    assert cache.meta.precision == ("float32" if digits == 3 else "bfloat16")


def loop_manifest(data: Path):
    from teachercache.data.read import read_manifest

    return read_manifest(str(data))
