"""What `tc build` keeps of a diffusion teacher, against every picture and text alone; caches that grow or go on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from disturbed import run_build
from PIL import Image
from small import error_of, run, tree

from teachercache.build.verify import verify_cache
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.teachers.diffusion.model import Diffusion
from teachercache.teachers.diffusion.outputs import Features, Plan, Scores, join_outputs, parse_outputs
from teachercache.teachers.of_cache import load_teacher
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

ALL = ("text_states", "latents", "unet_features:50+up_blocks.0+seed=2", "scores:3+seed=1+t=100-899")
FIELDS = ["text_states", "latent", "unet_feature", "diffusion_score", "diffusion_score_normalised"]
CAPTIONS = [
    ["a red cube", "red a cube"],
    ["a red cube", "a ball"],
    ["a ball", ""],
    ["a cone", "red a cube"],
    ["two", "three"],
]
DAMAGED = 3


@pytest.fixture(scope="module")
def teacher(diffusion_folder) -> Teacher:
    return load(str(diffusion_folder), outputs=ALL)


def pictures(folder: Path, captions: list[list[str]] = CAPTIONS) -> Path:
    """COCO captions of small pictures, the first two rows of one picture; one that cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(len(captions)):
        Image.fromarray(random.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / f"{DAMAGED}.png").write_bytes(b"none")
    images = [{"id": i, "file_name": f"{max(i, 1)}.png"} for i in range(len(captions))]
    annotations = [
        {"id": 10 * i + k, "image_id": i, "caption": text}
        for i, texts in enumerate(captions)
        for k, text in enumerate(texts)
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def cache(data, teacher, tmp_path_factory) -> store.Cache:
    """Batches of two rows: the first two share a picture and a text."""
    out = tmp_path_factory.mktemp("caches") / "sd.zarr"
    run_build(teacher, data, out, batch_size=2)
    return store.open_complete(out)


# ----------------------------------------------------------------------------------------------------
# What is kept


def by_hand(folder: Path, view, picture: Path, text: str) -> dict[str, np.ndarray]:
    """Every field of one picture and one text, of diffusers' parts alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    with torch.inference_mode():
        state, nothing = pipeline.encode_prompt(text, "cpu", 1, True)
        posterior = pipeline.vae.encode(view(Image.open(picture))[None]).latent_dist
        latent = posterior.mean * pipeline.vae.config.scaling_factor
        seen = []
        hook = pipeline.unet.up_blocks[0].register_forward_hook(lambda *given: seen.append(given[2]))
        noise = torch.randn(1, 4, 8, 8, generator=drawn_after(1, seed=2))
        pipeline.unet(scheduler.add_noise(latent, noise, torch.tensor([50])), 50, encoder_hidden_states=state)
        hook.remove()
        generator = torch.Generator().manual_seed(1)
        within = (torch.arange(3) + torch.rand(3, generator=generator, dtype=torch.float64)) / 3
        errors = []
        for share, eps in zip(within, torch.randn(3, 1, 4, 8, 8, generator=generator), strict=True):
            t = torch.tensor([int(100 + share * 800)])
            noised = scheduler.add_noise(latent, eps, t)
            said = [pipeline.unet(noised, t, encoder_hidden_states=c).sample for c in (state, nothing)]
            errors.append([((predicted - eps) ** 2).mean().item() for predicted in said])
    error, without = np.mean(errors, axis=0)
    return {
        "text_states": state[0].numpy(),
        "latent": latent[0].numpy(),
        "unet_feature": seen[0][0].numpy(),
        "diffusion_score": -error,
        "diffusion_score_normalised": without - error,
    }


def drawn_after(num: int, *, seed: int) -> torch.Generator:
    """A generator of a seed after `num` draws of t."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(num, generator=generator, dtype=torch.float64)
    return generator


@pytest.mark.parametrize(("row", "text"), [(0, 0), (1, 1), (4, 0)])
def test_every_field_against_one_pair_alone(row, text, cache, teacher, data, diffusion_folder):
    picture = data.parent / f"{max(row, 1)}.png"
    expected = by_hand(diffusion_folder, teacher.view, picture, CAPTIONS[row][text])
    for name, value in expected.items():
        found = store.read_field(cache, name)[row]
        found = found if name == "latent" else found[text]
        np.testing.assert_allclose(
            found, value, rtol=2e-3, atol=1e-3 if np.ndim(value) else 2e-6, err_msg=name
        )
        assert np.abs(value).max() > 1e-4


def test_shapes_dtypes_and_what_cannot_be_used(cache):
    found = {name: store.read_field(cache, name) for name in FIELDS}
    assert [field.name for field in cache.meta.spec.fields] == FIELDS
    shapes = {name: (values.shape, str(values.dtype)) for name, values in found.items()}
    assert shapes == {
        "text_states": ((5, 2, 12, 16), "float16"),
        "latent": ((5, 4, 8, 8), "float16"),
        "unet_feature": ((5, 2, 16, 8, 8), "float16"),
        "diffusion_score": ((5, 2), "float32"),
        "diffusion_score_normalised": ((5, 2), "float32"),
    }
    assert store.read_field(cache, "valid").tolist() == [True, True, True, False, True]
    assert store.read_field(cache, "text_valid")[2].tolist() == [True, False]
    for name in ("unet_feature", *FIELDS[3:]):
        assert not found[name][DAMAGED].any()  # nothing is said of a picture that is not there
        assert not found[name][2, 1].any()  # nor of an empty text
    assert found["text_states"][DAMAGED].any()
    used = found["diffusion_score"][[0, 0, 1, 1, 2, 4, 4], [0, 1, 0, 1, 0, 0, 1]]
    assert (used < -0.1).all()
    assert len({*used.tolist()}) == 6  # rows 0 and 1 have a picture and a text in common
    assert used[0] == used[2]


def test_what_was_drawn_stands_in_the_cache(cache, teacher):
    constants = cache.meta.spec.constants
    assert constants == teacher.spec.constants
    assert {name: value for name, value in constants.items() if name.startswith("score_")} == {
        "score_samples": 3,
        "score_seed": 1,
        "score_first": 100,
        "score_last": 899,
    }
    assert (constants["feature_t"], constants["feature_seed"], constants["timesteps"]) == (50, 2, 1000)
    assert cache.meta.spec.outputs == ALL
    assert f"--outputs {','.join(ALL)}" in cache.command()


def test_the_live_teacher_agrees_and_other_scores_do_not(cache, data, teacher, tmp_path):
    assert isinstance(load_teacher(cache).module, Diffusion)
    report = verify_cache(cache.path, samples=5)
    assert report["ok"], report
    assert set(report["cosine"]) == set(FIELDS)

    def wrong(module, inputs):
        fields = teacher.encode(module, inputs)
        return {
            name: values * 1.02 if name == "diffusion_score" else values for name, values in fields.items()
        }

    run_build(dataclasses.replace(teacher, encode=wrong), data, tmp_path / "c.zarr")
    report = verify_cache(tmp_path / "c.zarr", samples=5)
    assert not report["ok"]
    assert [name for name, cosine in report["cosine"].items() if cosine["min"] < 0.999] == ["diffusion_score"]


def test_precision_of_the_build(data, diffusion_folder, cache, tmp_path):
    """In bfloat16 scores stay float32, and are close."""
    run_build(load(str(diffusion_folder), outputs=ALL), data, tmp_path / "c.zarr", dtype="bfloat16")
    halves = store.open_complete(tmp_path / "c.zarr")
    assert halves.meta.precision == "bfloat16"
    for name in FIELDS[:4]:
        rough, exact = (store.read_field(opened, name).astype(np.float32) for opened in (halves, cache))
        np.testing.assert_allclose(rough, exact, rtol=0.05, atol=0.05 * np.abs(exact).max(), err_msg=name)


# ----------------------------------------------------------------------------------------------------
# Caches that go on and grow


def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(diffusion_folder, tmp_path):
    teacher = load(str(diffusion_folder), outputs=("text_states", "latents", "scores:1"))
    data = pictures(tmp_path / "data", CAPTIONS[:4] * 4)
    run_build(teacher, data, tmp_path / "whole/c.zarr", batch_size=3)
    calls = []

    def stops(module, inputs):
        calls.append(len(inputs["pair_image"]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return teacher.encode(module, inputs)

    with pytest.raises(KeyboardInterrupt):
        run_build(dataclasses.replace(teacher, encode=stops), data, tmp_path / "c.zarr", batch_size=3)
    summary = run_build(teacher, data, tmp_path / "c.zarr", batch_size=3)
    assert summary.rows_written == 16 - 8  # the first block of eight was whole
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole/c.zarr")


def test_texts_that_were_added(diffusion_folder, tmp_path):
    """Pictures are looked at again for the scores of the new texts alone."""
    teacher = load(str(diffusion_folder), outputs=("text_states", "latents", "unet_features", "scores:1"))
    grown = [[*texts, f"said {i}"] for i, texts in enumerate(CAPTIONS)]
    data = pictures(tmp_path / "data")
    run_build(teacher, data, tmp_path / "c.zarr")
    pictures(tmp_path / "data", grown)
    pairs = []

    def counts(module, inputs):
        pairs.append(inputs["pair_text"].numel())
        return teacher.encode(module, inputs)

    run_build(dataclasses.replace(teacher, encode=counts), data, tmp_path / "c.zarr")
    assert sum(pairs) == len(CAPTIONS)
    run_build(teacher, data, tmp_path / "fresh.zarr")
    caches = [store.open_complete(tmp_path / name) for name in ("c.zarr", "fresh.zarr")]
    for name in FIELDS:
        found, expected = (store.read_field(opened, name).astype(np.float32) for opened in caches)
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3, err_msg=name)
    assert store.read_field(caches[0], "diffusion_score").shape == (5, 3)
    assert verify_cache(caches[0].path, samples=5)["ok"]


def test_pictures_or_texts_alone(teacher, diffusion_folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a red cube\na ball\n")
    run_build(teacher, texts, tmp_path / "t.zarr")
    assert [field.name for field in store.open_complete(tmp_path / "t.zarr").meta.spec.fields] == [
        "text_states"
    ]
    folder = pictures(tmp_path / "data").parent
    (folder / "captions.json").unlink()
    run_build(teacher, folder, tmp_path / "p.zarr")
    assert [field.name for field in store.open_complete(tmp_path / "p.zarr").meta.spec.fields] == ["latent"]
    with pytest.raises(UserError, match="needs images with texts"):
        run_build(load(str(diffusion_folder), outputs=("scores:2",)), texts, tmp_path / "s.zarr")


def test_scores_without_latents_and_states(diffusion_folder, cache, data, tmp_path):
    run_build(load(str(diffusion_folder), outputs=ALL[3:]), data, tmp_path / "c.zarr", batch_size=2)
    alone = store.open_complete(tmp_path / "c.zarr")
    assert [field.name for field in alone.meta.spec.fields] == FIELDS[3:]
    found, expected = (store.read_field(opened, "diffusion_score") for opened in (alone, cache))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_views_are_of_latents_alone(diffusion_folder, teacher, data, tmp_path):
    with pytest.raises(UserError, match="fields per pair use the unaugmented image"):
        run_build(teacher, data, tmp_path / "c.zarr", views=2)
    run_build(load(str(diffusion_folder)), data, tmp_path / "c.zarr", views=2)
    latents = store.read_field(store.open_complete(tmp_path / "c.zarr"), "latent")
    assert latents.shape == (5, 2, 4, 8, 8)
    assert not np.allclose(latents[0, 0], latents[0, 1], atol=1e-2)


# ----------------------------------------------------------------------------------------------------
# How it is asked for


@pytest.mark.parametrize(
    ("outputs", "plan", "written"),
    [
        (("latents", "text_states"), Plan(True, True), ("text_states", "latents")),
        (("scores",), Plan(scores=Scores(10, 0, 0, 999)), ("scores:10",)),
        (("scores:t=200-800+4",), Plan(scores=Scores(4, 0, 200, 800)), ("scores:4+t=200-800",)),
        (("scores:4+t=0-999+seed=0",), Plan(scores=Scores(4, 0, 0, 999)), ("scores:4",)),
        (("unet_features",), Plan(unet_features=Features()), ("unet_features:100+mid_block",)),
        (
            ("unet_features:out+seed=7+9",),
            Plan(unet_features=Features(9, "out", 7)),
            ("unet_features:9+out+seed=7",),
        ),
    ],
)
def test_outputs_are_written_in_one_way(outputs, plan, written):
    assert parse_outputs(outputs, 1000) == plan
    assert join_outputs(plan, 1000) == written
    assert parse_outputs(written, 1000) == plan


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("embeddings", "has no output 'embeddings': choose from text_states"),
        ("latents:3", "choose from text_states, latents, unet_features, scores; scores takes how often"),
        ("scores:", "write scores:16+seed=1+t=200-800"),
        ("scores:4+5", "write scores:16+seed=1+t=200-800"),
        ("scores:0", "at least one sample"),
        ("scores:4+t=800-200", "timesteps are 0 to 999"),
        ("scores:4+t=0-1000", "timesteps are 0 to 999"),
        ("unet_features:1000", "timesteps are 0 to 999"),
        ("unet_features:100+conv_in", "write unet_features:100+mid_block+seed=1"),
        (
            "unet_features:100+up_blocks.2",
            "has no block up_blocks.2: choose from down_blocks.0, down_blocks.1, up_",
        ),
    ],
)
def test_outputs_that_cannot_be(output, says, diffusion_folder):
    with pytest.raises(UserError) as error:
        load(str(diffusion_folder), outputs=("text_states", output))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_output_twice(diffusion_folder):
    with pytest.raises(UserError, match="names scores twice"):
        load(str(diffusion_folder), outputs=("scores:2", "scores:3"))


def test_at_the_command_line(diffusion_folder, data, tmp_path, capsys, monkeypatch):
    """A folder with model_index.json is a diffusion teacher; without --outputs what training on it reads."""
    monkeypatch.chdir(tmp_path)
    where = ("--data", data, "--workers", 0)
    assert run("build", "--teacher", diffusion_folder, *where) == 0
    path = next(Path("caches").rglob("*.zarr"))
    assert path.name == "small.zarr"
    assert [field.name for field in store.open_complete(path).meta.spec.fields] == ["text_states", "latent"]
    assert run("verify", path, "--samples", 3) == 0
    assert "latent: cosine to the recomputed values min 1.0000" in capsys.readouterr().out
    assert run("info", path) == 0
    assert "mean of the VAE's posterior" in capsys.readouterr().out
    for command in (["index", path], ["search", path, "a cube"]):
        assert "holds vectors: build another with `tc build --outputs" in error_of(capsys, *command)
    line = error_of(capsys, "build", "--teacher", diffusion_folder, *where, "--outputs", "latents,scores:2")
    assert "holds another build" in line
    monkeypatch.setattr("teachercache.teachers.diffusion.loading.HOME", tmp_path / "none")
    assert "train_sd_tiny" in error_of(capsys, "build", "--teacher", "sd-tiny", *where)
    assert run("teachers") == 0
    assert "sd-v1-4" in capsys.readouterr().out
