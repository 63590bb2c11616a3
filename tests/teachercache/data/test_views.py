"""Augmented views: what the teacher saw is what the student sees, pixel for pixel."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import make_folder, read_lines, save_teacher, train_here

from student.contract import PictureView, RowInputs
from student.inputs.caches import training_rows
from student.inputs.order import StepPlan
from student.inputs.pairs import PairBatches, TeacherFields
from student.models.two_tower.model import TwoTower
from student.training.step import online_fields
from teachercache.build.loop import BuildOptions, build
from teachercache.cache import store
from teachercache.core.device import Precision
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest
from teachercache.data.views import (
    PARAMS,
    Augment,
    describe_view,
    draw_params,
    image_view,
    parse_augment,
    replay_view,
)
from teachercache.teachers.clip.folders import open_folder
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

VIEW = describe_view({"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"})
NEUTRAL = {"flip": 0, "jitter": 0, "gray": 0, "scale_min": 1, "ratio": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """JPEGs, some of them so large that they are decoded at a reduced size."""
    folder = make_folder(tmp_path_factory.mktemp("views") / "photos", 24, texts=2)
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        width, height = [(640, 480), (90, 300), (33, 40)][i % 3]
        Image.open(path).resize((width, height), Image.Resampling.BICUBIC).save(
            path.with_suffix(".jpg"), quality=90
        )
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return load(str(folder))


@pytest.fixture(scope="module")
def seen(teacher, photos, tmp_path_factory) -> tuple[store.Cache, torch.Tensor]:
    """A cache of four views, and every tensor that the teacher was given: [views, rows, 3, 16, 16]."""
    shown = []

    def encode(module, inputs):
        shown.append(inputs["image"].clone())
        return teacher.encode(module, inputs)

    watched, out = (
        dataclasses.replace(teacher, encode=encode),
        tmp_path_factory.mktemp("caches") / "tiny.zarr",
    )
    build(
        watched,
        read_manifest(str(photos)),
        out,
        BuildOptions(
            batch_size=24,
            workers=0,
            device="cpu",
            precision=Precision("float32", "a test"),
            views=4,
        ),
    )
    return store.open_complete(out), torch.stack(shown[1:])  # the first is the probe of a new cache


@pytest.fixture(scope="module")
def manifest(photos) -> Manifest:
    return read_manifest(str(photos))


def batches_of(manifest: Manifest, cache: store.Cache, inputs: RowInputs, live=None, **ranks) -> PairBatches:
    plan = StepPlan(batch=8, steps=12, seed=0, **ranks)
    teachers = TeacherFields((cache,), ("image_emb", "text_emb"), live=live)
    return PairBatches(manifest, training_rows(manifest, cache), inputs, plan, teachers=teachers)


def student_like(folder: Path, size: int = 16) -> RowInputs:
    """What a student reads whose view is the teacher's, or one of another size."""
    module, preprocess = open_folder(str(folder))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    return TwoTower(module, config, {**preprocess, "size": size}, tokenizer).row_inputs


# ----------------------------------------------------------------------------------------------------
# The student


def test_the_student_sees_exactly_the_pixels_that_the_teacher_saw(seen, folder, manifest):
    cache, shown = seen
    batches = batches_of(manifest, cache, student_like(folder))
    stored, found = store.read_field(cache, "image_emb").astype(np.float32), set()
    for step in range(12):
        batch, rows = batches[step], batches.order.rows_of(step)
        for i, row in enumerate(rows.tolist()):
            (view,) = [v for v in range(4) if torch.equal(batch["image"][i], shown[v, row])]
            assert np.array_equal(batch["image_emb"][i].numpy(), stored[row, view])
            found.add((row, view, step // 3))
    for row in range(24):  # four epochs, four views: each once
        assert sorted(view for other, view, _ in found if other == row) == [0, 1, 2, 3]
    assert len({view for _, view, epoch in found if epoch == 0}) > 1  # rows are out of step


def test_cached_and_live_say_the_same_of_the_same_view(seen, folder, teacher, manifest):
    cache, _ = seen
    cached = batches_of(manifest, cache, student_like(folder))
    live = batches_of(manifest, cache, student_like(folder), live=teacher)
    for step in range(6):
        there, now = cached[step], live[step]
        assert "image_emb" not in now
        assert torch.equal(now["teacher_image"], now["image"])
        assert torch.equal(there["image"], now["image"])
        said = online_fields(teacher, now, ("image_emb", "text_emb"))
        for name, values in said.items():
            assert torch.nn.functional.cosine_similarity(values, there[name]).min() > 0.9999


def test_a_smaller_student_sees_the_same_crop(seen, folder, manifest):
    cache, _ = seen
    large, small = (batches_of(manifest, cache, student_like(folder, size)) for size in (64, 16))
    for step in range(3):
        reduced = torch.nn.functional.interpolate(large[step]["image"], 16, mode="bicubic", antialias=True)
        assert (reduced - small[step]["image"]).abs().mean() < 0.04  # of a range of 2


def test_workers_and_ranks_change_nothing(seen, folder, manifest):
    cache, _ = seen
    whole = batches_of(manifest, cache, student_like(folder))
    halves = [batches_of(manifest, cache, student_like(folder), rank=rank, world=2) for rank in (0, 1)]
    for name in ("image", "image_emb", "text"):
        assert torch.equal(whole[5][name], torch.cat([part[5][name] for part in halves]))


def test_a_student_that_cannot_replay_is_told(seen, manifest):
    inputs = RowInputs(picture=PictureView(lambda picture: torch.zeros(1)))
    with pytest.raises(UserError, match="cannot replay them: pass another --cache"):
        batches_of(manifest, seen[0], inputs)


@pytest.mark.parametrize("recipe", ["clip", "clip_kd"])
def test_training_on_views_resumes_to_the_same_losses(seen, photos, tmp_path, recipe: str, capsys):
    cache = seen[0].path
    assert train_here(photos, cache, tmp_path / "whole", "--steps", 6, recipe=recipe) == 0
    assert "one of 4 augmented views" in capsys.readouterr().err
    words = ("--steps", 6, "--set", "run.save_every=2")
    assert train_here(photos, cache, tmp_path / "parts", *words, recipe=recipe) == 0
    assert read_lines(tmp_path / "parts") == read_lines(tmp_path / "whole")


def test_live_training_on_views_has_the_losses_of_the_cache(seen, photos, tmp_path):
    cache = seen[0].path
    for name, words in (("cached", ()), ("live", ("--live",))):
        assert train_here(photos, cache, tmp_path / name, "--steps", 3, *words) == 0
    cached, live = (read_lines(tmp_path / name) for name in ("cached", "live"))
    assert live[0]["task"] == cached[0]["task"]
    for there, now in zip(cached, live, strict=True):
        assert now["loss"] == pytest.approx(there["loss"], rel=2e-3)


# ----------------------------------------------------------------------------------------------------
# Drawing and replaying


@settings(max_examples=200, deadline=None, database=None)
@given(key=st.text(), view=st.integers(0, 1000), width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_crops_lie_inside_and_keep_their_area_and_shape(key, view, width, height):
    augment = Augment()
    params = draw_params(augment, key, view, width=width, height=height)
    values = dict(zip(PARAMS, params.tolist(), strict=True))
    assert params.dtype == np.float32
    assert 0 <= values["top"] <= values["top"] + values["height"] <= height
    assert 0 <= values["left"] <= values["left"] + values["width"] <= width
    assert values["height"] >= 1
    assert values["width"] >= 1
    assert values["width"] * values["height"] <= width * height
    if min(width, height) > 200 and max(width, height) / min(width, height) < 1.2:
        assert values["width"] * values["height"] >= 0.9 * augment.scale_min * width * height / augment.ratio
        assert 1 / 1.7 < values["width"] / values["height"] < 1.7
    assert {values["flip"], values["gray"]} <= {0, 1}
    assert -0.1 <= values["hue"] <= 0.1
    assert all(0.6 - 1e-6 <= values[name] <= 1.4 + 1e-6 for name in ("brightness", "contrast", "saturation"))
    assert np.array_equal(params, draw_params(augment, key, view, width=width, height=height))


def test_draws_have_the_chances_that_they_are_given():
    params = np.array([draw_params(Augment(), str(i), 0, width=100, height=100) for i in range(4000)])
    share = {name: (params[:, i] != 0).mean() for i, name in enumerate(PARAMS)}
    assert share["flip"] == pytest.approx(0.5, abs=0.03)
    assert share["gray"] == pytest.approx(0.1, abs=0.02)
    assert share["hue"] == pytest.approx(0.8, abs=0.03)
    area = params[:, 2] * params[:, 3] / 1e4
    assert area.mean() == pytest.approx(0.68, abs=0.03)  # 0.7 but for crops that the frame cuts
    assert (params[:, 5] != 1).mean() == pytest.approx(0.8, abs=0.03)


def test_neutral_parameters_are_a_plain_resize():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    params = draw_params(Augment(**NEUTRAL), "k", 0, width=40, height=40)
    assert params.tolist() == [0, 0, 40, 40, 0, 1, 1, 1, 0, 0]
    torch.testing.assert_close(replay_view(VIEW)(picture, params), image_view(VIEW)(picture), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip", 1),
        ("gray", 1),
        ("hue", 0.1),
        ("brightness", 0.6),
        ("contrast", 1.4),
        ("saturation", 0.6),
        ("top", 3),
    ],
)
def test_each_parameter_does_what_it_is_called(name: str, value: float):
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 190, (20, 20, 3), dtype=np.uint8))
    neutral = dict(zip(PARAMS, (0, 0, 16, 20, 0, 1, 1, 1, 0, 0), strict=True))
    plain, changed = (
        replay_view(VIEW)(picture, np.array(list(values.values()), np.float32)) / 2 + 0.5
        for values in (neutral, neutral | {name: value})
    )
    assert (plain - changed).abs().max() > 0.01
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    expected = {
        "flip": plain.flip(2),
        "gray": (plain * luma).sum(0, keepdim=True).expand(3, -1, -1),
        "brightness": plain * 0.6,
        "contrast": (plain - (plain * luma).sum(0).mean()) * 1.4 + (plain * luma).sum(0).mean(),
        "saturation": (plain * luma).sum(0, keepdim=True) * 0.4 + plain * 0.6,
    }
    if name in expected:
        assert (changed - expected[name]).abs().max() < 2.6 / 255


def test_views_differ_by_key_view_and_seed_and_share_what_a_setting_does_not_name():
    draw = lambda augment, key, view: draw_params(augment, key, view, width=300, height=200).tolist()  # noqa: E731
    first = draw(Augment(), "a", 0)
    assert first not in (draw(Augment(), "b", 0), draw(Augment(), "a", 1), draw(Augment(seed=1), "a", 0))
    other = draw(Augment(flip=0, brightness=0), "a", 0)
    assert [i for i in range(len(PARAMS)) if other[i] != first[i]] in ([5], [4, 5])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("flips=1", "write KEY=VALUE, KEY one of scale_min"),
        ("flip=x", "--augment flip=x: a value of type float from 0 to 1 is expected"),
        ("flip", "from 0 to 1"),
        ("flip=2", "--augment flip=2: a value of type float from 0 to 1"),
        ("scale_min=0", "--augment scale_min=0: "),
        ("ratio=0.5", "--augment ratio=0.5"),
        ("hue=0.6", "--augment hue=0.6"),
        ("seed=-1", "--augment seed=-1"),
    ],
)
def test_settings_that_make_no_sense(setting: str, named: str):
    with pytest.raises(UserError) as error:
        parse_augment((setting,))
    assert named in str(error.value)


def test_settings_are_read():
    assert parse_augment(("flip=0", "scale_min=0.9", "seed=3")) == Augment(flip=0.0, scale_min=0.9, seed=3)
    assert math.isclose(parse_augment(()).ratio, 4 / 3)


# ----------------------------------------------------------------------------------------------------
# Lines and spacers


@pytest.mark.parametrize("size", [(5000, 1), (1, 900), (3001, 3)])
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_a_line_of_pixels_is_cropped_before_it_is_resized(size, shape, monkeypatch):
    """To the pixels of the view that resizes first, but for the rounding of its width."""
    view = image_view({**VIEW, "size": shape, "resize_mode": "shortest"})
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture, seen = Image.fromarray(noise), []
    whole = view(picture)
    monkeypatch.setattr("teachercache.data.views.MAX_RESIZED", 1000)
    transform = view.transform
    cropped = dataclasses.replace(
        view, transform=lambda image: (seen.append(image.size), transform(image))[1]
    )(picture)
    assert (cropped - whole).abs().max() <= 3 / 127.5
    assert max(seen[0]) < 100


def test_a_very_long_line_has_a_view_in_every_mode():
    picture = Image.new("RGB", (65_000, 1), (255, 255, 255))
    for mode in ("shortest", "longest", "squash"):
        view = image_view({**VIEW, "size": (224, 224), "resize_mode": mode, "fill_color": 0})
        assert (view(picture) > 0).sum() == 3 * 224 * (1 if mode == "longest" else 224)
