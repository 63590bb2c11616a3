"""The training of the tiny diffusion teacher: its folder, resuming, and its check of attribute binding."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

scenes = importlib.import_module("scripts.datasets.scenes")
sd_tiny = importlib.import_module("scripts.teachers.sd_tiny")
binding = importlib.import_module("scripts.teachers.sd_tiny_binding")
training_loop = importlib.import_module("scripts.teachers.training_loop")
train_sd_tiny = importlib.import_module("scripts.teachers.train_sd_tiny")

SETTINGS = train_sd_tiny.Settings(scenes=30, steps=4, vae_steps=3, batch=4, vae_batch=2, warmup=1)
SIZES = {
    "unet": {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 2},
    "vae": {"block_out_channels": (4, 4, 4, 8), "norm_num_groups": 2, "latent_channels": 4},
    "text": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(sd_tiny, "HELD_OUT_SCENES", 20)
    monkeypatch.setattr(train_sd_tiny, "WHITENED", 10)
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_sd_tiny, "CHECK_EVERY", 100)


def train(out):
    return train_sd_tiny.train(out, SETTINGS, SIZES, check_num=2, draws=2)


def weights(folder):
    return {
        (model, name): value
        for model in ("unet", "vae", "text_encoder")
        for path in (folder / model).glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_folder_is_a_stable_diffusion_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    about = train(tmp_path / "sd")
    assert not (tmp_path / "sd.work").exists()
    assert json.loads((tmp_path / "sd/training.json").read_text()) == json.loads(json.dumps(about))
    assert about["samples"] == 16
    assert {value.dtype for value in weights(tmp_path / "sd").values()} == {torch.float16}
    pipeline = sd_tiny.load_folder(tmp_path / "sd")
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    tokens = pipeline.tokenizer.convert_ids_to_tokens(
        pipeline.tokenizer("An Orange ring, above a zebra.").input_ids
    )
    assert tokens == ["<start>", "an", "orange", "ring", "above", "a", "<unknown>", "<end>"]
    pictures = sd_tiny.sample(pipeline, ["A red circle.", ""], num_steps=2)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    grid = sd_tiny.sample_grid(SimpleNamespace(), rows=0)
    assert grid.width > 6 * 128


def test_resumed_run_equals_uninterrupted_one(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    average, calls = training_loop.average, []

    def stop_now_and_then(*values):
        calls.append(1)
        if len(calls) in (
            3,
            7,
        ):  # the autoencoder's third step; the denoiser's third: 2 + stop, 1 + 2 + stop, 2
            raise KeyboardInterrupt
        average(*values)

    monkeypatch.setattr(training_loop, "average", stop_now_and_then)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    train(tmp_path / "stopped")
    assert len(calls) == 9
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    losses = [
        json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("whole", "stopped")
    ]
    assert [row[0] for row in losses[0]] == [row[0] for row in losses[1]] == [2, 4]


def test_other_settings_are_refused_but_more_steps_are_not(tmp_path):
    path = tmp_path / "settings.json"
    train_sd_tiny.same_settings(path, {"steps": 4, "seed": 1000, "sizes": {"a": (1, 2)}})
    train_sd_tiny.same_settings(path, {"steps": 8, "seed": 1000, "sizes": {"a": (1, 2)}})
    with pytest.raises(train_sd_tiny.UserError, match="another seed"):
        train_sd_tiny.same_settings(path, {"steps": 8, "seed": 1001, "sizes": {"a": (1, 2)}})


@pytest.mark.parametrize("options", [["--seed", "2"], ["--steps", "0"], ["--check"]])
def test_user_errors_are_one_line(tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["train_sd_tiny", "--out", str(tmp_path / "sd"), *options])
    assert train_sd_tiny.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_draws_depend_on_seed_and_step_alone_and_lie_in_the_range_of_the_step():
    latents, ids = torch.randn(5, 4, 8, 8), torch.arange(6 * 2 * 3).view(6, 2, 3)
    settings = train_sd_tiny.Settings(batch=400)
    low, high, _ = train_sd_tiny.RANGES[-1][1:]
    for step, bounds in ((0, train_sd_tiny.RANGES[0][1:3]), (10**6, (low, high))):
        z, words, t, noise = train_sd_tiny.draws_of(settings, step, ids, latents)
        again = train_sd_tiny.draws_of(settings, step, ids, latents)
        assert all(torch.equal(a, b) for a, b in zip((z, words, t, noise), again, strict=True))
        inside = ((t >= bounds[0]) & (t < bounds[1])).float().mean()
        assert 0.6 < inside < 0.95  # the ranged part and what of the rest falls in by itself
        empty = (words >= ids[-1].min()).all(1)
        assert 0.04 < empty.float().mean() < 0.18
        rows = words[~empty][:, 0] // 6
        assert torch.equal(z[~empty], latents[rows])
    assert not torch.equal(noise, train_sd_tiny.draws_of(settings, 0, ids, latents)[3])


def test_ties_are_misses():
    errors = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0], [1.0, 2.0, 2.0], [2.0, 1.0, 3.0]])
    assert binding.accuracies(errors, ["a", "b"]) == {"a": 0.5, "b": 0.75, "all": 0.25}


class Blind(torch.nn.Module):
    """A VAE, a UNet and a text encoder with constant outputs."""

    def encode(self, pictures):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.ones(len(pictures), 4, 8, 8)))

    def forward(self, x, *rest):
        return SimpleNamespace(sample=torch.zeros_like(x)) if rest else (torch.zeros(len(x), 16, 8),)


def test_check_of_a_denoiser_that_ignores_the_text_is_zero():
    blind = Blind()
    accuracies = binding.check(blind, blind, blind, sd_tiny.make_tokenizer(), num=3, draws=2)
    assert accuracies == {
        "colours_swapped": 0,
        "objects_swapped": 0,
        "one_colour": 0,
        "all": 0,
        "num": 3,
        "draws": 2,
    }


def test_check_of_a_perfect_denoiser_is_one():
    tokenizer = sd_tiny.make_tokenizer()
    right = {
        tuple(sd_tiny.tokenize(tokenizer, [caption])[0].tolist()) for caption, _ in binding.check_scenes(3)
    }

    class Perfect(Blind):
        def forward(self, x, *rest):
            if not rest:
                return (torch.tensor([[[float(tuple(row.tolist()) in right)]] for row in x]),)
            t, states = rest
            a = sd_tiny.make_scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
            noise = (x - a.sqrt()) / (1 - a).sqrt()  # the latents are ones
            return SimpleNamespace(sample=noise * states[:, 0].view(-1, 1, 1, 1))

    perfect = Perfect()
    accuracies = binding.check(perfect, perfect, perfect, tokenizer, num=3, draws=2)
    assert accuracies["all"] == accuracies["one_colour"] == 1


def test_wrong_captions():
    first = {"shape": "star", "color": "orange", "size": "small", "texture": "plain"}
    second = {"shape": "ring", "color": "blue", "size": "medium", "texture": "dotted"}
    wrong = binding.wrong_captions({"objects": [first, second], "relation": "left of"})
    assert wrong["colours_swapped"] == "A small blue star left of a dotted orange ring."
    assert wrong["objects_swapped"] == "A dotted blue ring left of a small orange star."
    changed = wrong["one_colour"].split()
    assert [*changed[:2], *changed[3:]] == [
        "A",
        "small",
        "star",
        "left",
        "of",
        "a",
        "dotted",
        "blue",
        "ring.",
    ]
    assert changed[2] in set(scenes.COLORS) - {"orange", "blue"}


def test_check_scenes_are_those_of_the_validation_seed_and_their_captions_true():
    drawn = {captions[0]: scene for _, captions, _, scene in scenes.generate(60, 2, 32)}
    for caption, scene in binding.check_scenes(5):
        assert drawn[caption] == scene
        assert binding.pair_caption(scene["objects"], scene["relation"]) == caption


def test_held_out_pairs_are_not_chosen_and_pairs_are_most():
    seen = [scene for _, scene in sd_tiny.choose_scenes(60, seed=2, held_out=set())]
    pairs = [scenes.description_key(scene) for scene in seen if scene["relation"]]
    assert 0.6 < len(pairs) / 60 < 0.9
    held_out = sd_tiny.held_out_keys()
    assert held_out & set(pairs)
    left = [scene for _, scene in sd_tiny.choose_scenes(60, seed=2, held_out=held_out)]
    assert not held_out & {scenes.description_key(scene) for scene in left}


def test_every_caption_fits_into_the_tokens_and_the_vocabulary():
    tokenizer = sd_tiny.make_tokenizer()
    captions = [text for _, pair, _ in sd_tiny.undrawn(300, 7) for text in pair]
    ids = sd_tiny.tokenize(tokenizer, captions)
    assert ids.shape == (600, sd_tiny.NUM_TOKENS)
    assert tokenizer.unk_token_id not in ids
    assert (ids[:, -1] == tokenizer.eos_token_id).all()


def test_whitening_gives_unit_latents_and_the_same_pictures():
    torch.manual_seed(0)
    vae = sd_tiny.make_vae(SIZES["vae"])
    pictures = sd_tiny.draw([scene for _, scene in sd_tiny.choose_scenes(6, seed=7, held_out=set())])
    with torch.no_grad():
        before = vae.encode(sd_tiny.as_input(pictures)).latent_dist
        plain = vae.decode(before.mean).sample
        sd_tiny.whiten(vae, pictures)
        after = vae.encode(sd_tiny.as_input(pictures)).latent_dist
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(vae.decode(after.mean).sample, plain, atol=1e-4)
    scale = before.mean.std((0, 2, 3)).view(1, -1, 1, 1)
    assert torch.allclose(after.std * scale, before.std, rtol=1e-3)
