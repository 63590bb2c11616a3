"""A diffusion teacher's functions against diffusers' own schedulers and pipeline, and loops by hand."""

import types
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from small import save_diffusion
from torch import nn

from teachercache.core.errors import UserError
from teachercache.teachers.diffusion import model as diffusion
from teachercache.teachers.diffusion.loading import random_sd_v1
from teachercache.teachers.diffusion.model import (
    Diffusion,
    add_noise,
    draw_noise,
    encode_latent,
    encode_states,
    pair_errors,
    predict_noise,
)
from teachercache.teachers.diffusion.outputs import Features, unet_features
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

TEXTS = [
    "a red cube",
    "",
    "a red cube left of a blue ball and more words than there is room for",
    "cube a red",
]


@pytest.fixture(scope="module")
def teacher(diffusion_folder) -> Teacher:
    return load(str(diffusion_folder))


@pytest.fixture(scope="module")
def folder_v(tmp_path_factory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "v", prediction="v_prediction")


@pytest.fixture(scope="module")
def teacher_v(folder_v) -> Teacher:
    return load(str(folder_v))


@pytest.fixture(scope="module")
def folder_of_pixels(tmp_path_factory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "pixels", pixels=True)


def latents_and_states(teacher: Teacher, rows: int, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    words = [f"text {i} of {k}" for i in range(rows) for k in range(texts)]
    with torch.inference_mode():
        latents = encode_latent(teacher.module, torch.rand(rows, 3, *teacher.spec.view["size"]) * 2 - 1)
        states = encode_states(teacher.module, teacher.tokenize(words)).unflatten(0, (rows, texts))
    return latents.clone() * 5, states.clone()


# ----------------------------------------------------------------------------------------------------
# What it makes of pictures and texts


def test_states_are_the_pipelines(teacher, diffusion_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        expected, nothing = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
        found = encode_states(teacher.module, teacher.tokenize(TEXTS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], nothing[0], rtol=1e-5, atol=1e-6)  # guidance's negative prompt
    assert found.shape == (4, 12, 16)
    assert not torch.allclose(found[0], found[3], atol=1e-2)


def test_latents_are_the_posteriors_mean(teacher, diffusion_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, low_cpu_mem_usage=False)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        posterior = pipeline.vae.encode(images).latent_dist
        found = encode_latent(teacher.module, images)
    torch.testing.assert_close(found, posterior.mean * pipeline.vae.config.scaling_factor)
    assert found.shape == (2, 4, 8, 8)
    assert posterior.std.min() > 0.1  # a draw from it would have been another


def test_pixels_are_their_own_latents(folder_of_pixels):
    teacher = load(str(folder_of_pixels))
    assert teacher.module.vae is None
    assert teacher.module.scaling == 1
    assert teacher.spec.view["size"] == [8, 8]
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(encode_latent(teacher.module, images), images)
    t, noise = draw_noise(teacher.module, 2)
    assert noise.shape == (2, 3, 8, 8)
    assert pair_errors(teacher.module, images, torch.randn(2, 1, 12, 16), t, noise).shape == (2, 1)


# ----------------------------------------------------------------------------------------------------
# Noise


SCHEDULES = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},  # abar of the last is 0
]


class TrueUNet(nn.Module):
    """Says exactly what a perfect UNet would, which knows the clean latents and the noise."""

    dtype, config = torch.float32, types.SimpleNamespace(sample_size=4, in_channels=2)

    def __init__(self, scheduler, clean, noise):
        super().__init__()
        self.scheduler, self.clean, self.noise = scheduler, clean, noise

    def forward(self, sample, t, encoder_hidden_states):
        said = self.noise
        if self.scheduler.config.prediction_type == "v_prediction":
            said = self.scheduler.get_velocity(self.clean, self.noise, t)
        return types.SimpleNamespace(sample=said)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["epsilon", "v", "v to zero"])
def test_noise_is_diffusers_and_true_predictions_become_true_noise(schedule):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(**schedule)
    clean, noise, t = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 400, 998, 999])
    module = Diffusion(
        TrueUNet(scheduler, clean, noise),
        None,
        nn.Identity(),
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction=schedule["prediction_type"],
    )
    noised = add_noise(module, clean, noise, t)
    torch.testing.assert_close(noised, scheduler.add_noise(clean, noise, t))
    torch.testing.assert_close(
        predict_noise(module, noised, t, torch.zeros(5, 1, 1)), noise, rtol=1e-4, atol=1e-5
    )
    halves = add_noise(module, clean.bfloat16(), noise.bfloat16(), t)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), noised, rtol=2e-2, atol=2e-2)


def test_draws_are_shared_and_spread(teacher):
    t, noise = draw_noise(teacher.module, 8, seed=3, t_range=(100, 900))
    again = draw_noise(teacher.module, 8, seed=3, t_range=(100, 900))
    other = draw_noise(teacher.module, 8, seed=4, t_range=(100, 900))
    assert torch.equal(t, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(t, other[0])
    assert not torch.equal(noise, other[1])
    assert [(value - 100) // 100 for value in t.tolist()] == [*range(8)]  # one in each of eight equal parts
    assert noise.shape == (8, 4, 8, 8)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert draw_noise(teacher.module, 1000)[0].tolist() == [*range(1000)]  # all timesteps unless told
    drawn = {draw_noise(teacher.module, 1, seed=seed, t_range=(5, 8))[0].item() for seed in range(30)}
    assert drawn == {5, 6, 7}
    for wrong in ({"t_range": (0, 1001)}, {"t_range": (5, 5)}, {"t_range": (-1, 5)}):
        with pytest.raises(ValueError, match="of 1000 timesteps"):
            draw_noise(teacher.module, 2, **wrong)


# ----------------------------------------------------------------------------------------------------
# Eq. 1


def slow_error(module, scheduler, latent, state, t, noise) -> float:
    """d(x, c) of one picture and one text, draw by draw, of diffusers' parts."""
    errors = []
    for step, eps in zip(t, noise, strict=True):
        noised = scheduler.add_noise(latent[None], eps[None], step[None])
        said = module.unet(noised, step, encoder_hidden_states=state[None]).sample[0]
        if scheduler.config.prediction_type == "v_prediction":
            abar = scheduler.alphas_cumprod[step]
            said = abar.sqrt() * said + (1 - abar).sqrt() * noised[0]
        errors.append(((said - eps) ** 2).mean())
    return float(sum(errors) / len(errors))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_errors_against_a_loop(prediction, diffusion_folder, folder_v, teacher, teacher_v, monkeypatch):
    folder, teacher = {"epsilon": (diffusion_folder, teacher), "v_prediction": (folder_v, teacher_v)}[
        prediction
    ]
    monkeypatch.setattr(diffusion, "PAIRS_AT_ONCE", 4)  # fewer than there are pairs, and no divisor of them
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == prediction == teacher.module.prediction
    latents, states = latents_and_states(teacher, rows=3, texts=2)
    t, noise = draw_noise(teacher.module, 3, seed=1)
    with torch.inference_mode():
        found = pair_errors(teacher.module, latents, states, t, noise)
        expected = [
            [slow_error(teacher.module, scheduler, latent, state, t, noise) for state in row]
            for latent, row in zip(latents, states, strict=True)
        ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found.flatten().unique().numel() == 6


def test_equal_pairs_have_equal_errors_in_any_batch(teacher):
    """Otherwise captions would be compared by their noise."""
    latents, states = latents_and_states(teacher, rows=2, texts=3)
    t, noise = draw_noise(teacher.module, 2)
    with torch.inference_mode():
        whole = pair_errors(teacher.module, latents, states, t, noise)
        alone = pair_errors(teacher.module, latents[1:], states[1:, 2:], t, noise)
        doubled = pair_errors(teacher.module, latents[:1], states[:1, [0, 0]], t, noise)
    torch.testing.assert_close(whole[1:, 2:], alone)
    torch.testing.assert_close(doubled[0, 0], doubled[0, 1])


# ----------------------------------------------------------------------------------------------------
# Gradient and precision


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_gradient_reaches_the_latents_alone(prediction, diffusion_folder, folder_v):
    module = load(str(diffusion_folder if prediction == "epsilon" else folder_v)).module.double()
    torch.manual_seed(0)
    noised, noise, way = (torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    t, states = torch.tensor([30, 700]), torch.randn(2, 12, 16, dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (predict_noise(module, values, t, states) - noise).square().mean()

    leaf = noised.clone().requires_grad_(True)
    loss(leaf).backward()
    step = 1e-5
    numeric = (loss(noised + step * way) - loss(noised - step * way)) / (2 * step)
    torch.testing.assert_close((leaf.grad * way).sum(), numeric.detach(), rtol=1e-5, atol=1e-9)
    assert abs(numeric) > 1e-4
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())


def test_half_precision_keeps_the_schedule(teacher, diffusion_folder):
    latents, states = latents_and_states(teacher, rows=2, texts=2)
    halves = (
        load(str(diffusion_folder)).module.to("cpu", torch.bfloat16).to(memory_format=torch.channels_last)
    )
    assert halves.unet.dtype == halves.vae.dtype == halves.text_encoder.dtype == torch.bfloat16
    assert torch.equal(halves.alphas_cumprod, teacher.module.alphas_cumprod)
    assert halves.alphas_cumprod.dtype == torch.float32
    assert "alphas_cumprod" in halves.state_dict()
    t, noise = draw_noise(teacher.module, 4)
    with torch.inference_mode():
        exact = pair_errors(teacher.module, latents, states, t, noise)
        rough = pair_errors(halves, latents.bfloat16(), states.bfloat16(), t, noise)
        assert predict_noise(halves, latents, t[:2], states[:, 0]).dtype == torch.float32
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=1e-3)


# ----------------------------------------------------------------------------------------------------
# Features inside the UNet


@pytest.mark.parametrize("block", ["mid_block", "down_blocks.0", "up_blocks.1"])
def test_features_are_what_the_block_says(block, teacher_v):
    latents, states = latents_and_states(teacher_v, rows=2, texts=2)
    module = teacher_v.module
    t, noise = draw_noise(module, 1, seed=2, t_range=(321, 322))
    assert t.item() == 321
    side, _, number = block.partition(".")
    watched = getattr(module.unet, side)
    seen = []
    hook = (watched[int(number)] if number else watched).register_forward_hook(
        lambda *given: seen.append(given[2])
    )
    noised = add_noise(module, latents, noise.expand_as(latents), t.expand(2))
    with torch.inference_mode():
        for k in range(2):
            module.unet(noised, 321, encoder_hidden_states=states[:, k])
        hook.remove()
        found = unet_features(module, latents, states, place=Features(321, block, 2))
    expected = torch.stack([output if torch.is_tensor(output) else output[0] for output in seen], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 0], found[:, 1], atol=1e-3)  # I(x, c) is of the text too


def test_features_out_are_the_predicted_noise(teacher_v):
    latents, states = latents_and_states(teacher_v, rows=2, texts=1)
    t, noise = draw_noise(teacher_v.module, 1, t_range=(7, 8))
    with torch.inference_mode():
        noised = add_noise(teacher_v.module, latents, noise.expand_as(latents), t.expand(2))
        expected = predict_noise(teacher_v.module, noised, t.expand(2), states[:, 0])
        found = unet_features(teacher_v.module, latents, states, place=Features(7, "out", 0))
    torch.testing.assert_close(found[:, 0], expected)
    assert found.shape == (2, 1, 4, 8, 8)


# ----------------------------------------------------------------------------------------------------
# Where it comes from


def test_random_weights_by_seed(diffusion_folder):
    digests = [load(str(diffusion_folder), weights=f"random:{seed}").spec.digest for seed in (5, 5, 6)]
    assert digests[0] == digests[1] != digests[2]
    assert load(str(diffusion_folder)).spec.digest not in digests
    assert (
        load("sd-tiny", weights=str(diffusion_folder)).spec.digest == load(str(diffusion_folder)).spec.digest
    )


def test_sd_v1_at_random_is_its_architecture():
    """Parameter counts of CompVis/stable-diffusion-v1-4's files, and ids that its tokenizer gives."""
    with torch.device("meta"):
        module, tokenize, _ = random_sd_v1(0)
    counts = [
        sum(value.numel() for value in part.parameters())
        for part in (module.unet, module.vae, module.text_encoder)
    ]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert tokenize(["a photo of a cat", ""])[:, :8].tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407, 49407],
        [49406, *[49407] * 7],
    ]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model_index.json", "{", "model_index.json is not JSON"),
        ("model_index.json", '{"unet": ["diffusers", "Transformer2D"]}', "has Transformer2D as its unet"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "sample"}', "its UNet predicts 'sample'"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", "odd", "is not readable as a diffusers folder"),
        ("unet/diffusion_pytorch_model.safetensors", None, "is not readable as a diffusers folder"),
    ],
)
def test_folders_that_cannot_be_read(file, content, says, diffusion_folder, tmp_path):
    folder = tmp_path / "sd"
    for path in diffusion_folder.rglob("*.*"):
        target = folder / path.relative_to(diffusion_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_go_together(folder_of_pixels, diffusion_folder, tmp_path):
    folder = tmp_path / "sd"
    folder.mkdir()
    for part in ("text_encoder", "tokenizer", "scheduler", "vae", "model_index.json"):
        (folder / part).symlink_to(diffusion_folder / part)
    (folder / "unet").symlink_to(folder_of_pixels / "unet")
    with pytest.raises(UserError, match="its UNet maps 3 channels to 3, its latents have 4"):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("sd-v1-4", "pretrained", "cannot get the weights of sd-v1-4"),
        ("diffusers:nobody/nothing", "pretrained", "Pass --weights FOLDER"),
        (
            "diffusers:nobody/nothing",
            "random:0",
            "needs an architecture that is known here: try --teacher sd-v1-4",
        ),
        ("sd-v1-4", "random:x", "write random:SEED"),
        ("sd-v1-4", "nowhere", "--weights nowhere is no folder of diffusers"),
        ("sd-tiny", "pretrained", "make sd-tiny with `python -m scripts.teachers.train_sd_tiny`"),
    ],
)
def test_weights_that_are_not_there(name, weights, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("teachercache.teachers.diffusion.loading.hub_answers", lambda: False)
    monkeypatch.setattr("teachercache.teachers.diffusion.loading.HOME", tmp_path / "none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        load(name, weights=weights)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
