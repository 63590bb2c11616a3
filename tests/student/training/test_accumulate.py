"""Micro-batches against the whole batch: the same gradients, losses and steps; dropout is replayed."""

import dataclasses
from types import SimpleNamespace

import own_recipes
import pytest
import torch
from small import read_lines, train_here, zero_noise
from torch import nn

from student.models.two_tower.loading import build_two_tower
from student.recipe import Progress
from student.recipes.clip import CLIP
from student.recipes.clip_kd import CLIP_KD
from student.training.accumulate import accumulate, joined, split
from student.training.step import TrainStep

ROWS, WIDTH = 12, 16


def make_step(recipe, *, dropout: bool = False) -> TrainStep:
    torch.manual_seed(3)
    student, shapes = build_two_tower("vit-micro"), {"image_emb": (WIDTH,), "text_emb": (WIDTH,)}
    heads = recipe.distill_heads(recipe.constants, student, shapes)
    heads = own_recipes.NoisyHeads(heads) if dropout else heads
    return TrainStep(recipe, student, heads)


def make_batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(ROWS, 3, 32, 32, generator=random)}
    batch["text"] = torch.randint(1, 5000, (ROWS, 16), generator=random)
    batch |= {name: torch.randn(ROWS, WIDTH, generator=random) for name in CLIP_KD.fields}
    return batch | {"logit_scale": torch.tensor(3.0)}


def parts_of(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    cuts = range(0, ROWS, size)
    return [
        {name: value[i : i + size] if value.ndim else value for name, value in batch.items()} for i in cuts
    ]


class Engine:
    """What DeepSpeed does with micro-batches: gradients add up, each divided by their number."""

    def __init__(self, module: nn.Module, parts: int):
        self.module, self.parts, self.steps, self.enable_backward_allreduce = module, parts, 0, True

    def __call__(self, *words):
        return self.module(*words)

    def backward(self, loss):
        (loss / self.parts).backward()

    def step(self):
        self.steps += 1


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("recipe", [CLIP, CLIP_KD], ids=lambda recipe: recipe.name)
def test_the_gradient_is_that_of_the_whole_batch(recipe, size: int):
    whole, batch = make_step(recipe), make_batch()
    loss, terms, notes = whole(batch, Progress(0, 1))
    loss.backward()
    parts = parts_of(batch, size)
    engine = Engine(make_step(recipe), len(parts))
    found = accumulate(engine, parts, Progress(0, 1), "cpu")
    assert engine.steps == len(parts)
    torch.testing.assert_close(
        found[0], loss.detach(), rtol=1e-6, atol=1e-7
    )  # losses are computed in float32
    assert found[1].keys() == terms.keys()
    assert found[2].keys() == notes.keys()
    for (name, ours), theirs in zip(engine.module.named_parameters(), whole.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0 or "bias" in name, name
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=0, atol=1e-5 * theirs.grad.abs().max().item() + 1e-9
        )


def test_dropout_is_replayed_and_random_numbers_go_on_from_the_first_pass():
    recipe = dataclasses.replace(CLIP_KD, constants=dataclasses.replace(CLIP_KD.constants, fd=1.0))
    parts, seen = parts_of(make_batch(), 4), []
    step = make_step(recipe, dropout=True)
    step.heads.register_forward_hook(
        lambda module, inputs, outputs: seen.append(outputs["image_in_teacher_space"].detach().clone())
    )
    torch.manual_seed(5)
    accumulate(Engine(step, 3), parts, Progress(0, 1), "cpu")
    state = torch.get_rng_state()
    assert len(seen) == 6
    assert all(torch.equal(first, again) for first, again in zip(seen[:3], seen[3:], strict=True))
    assert not torch.equal(seen[0], seen[1])
    torch.manual_seed(5)
    with torch.no_grad():
        for part in parts:
            step(part, Progress(0, 1), {})
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_and_scales_are_told_apart():
    parts = [
        {"image": torch.ones(3, 2), "scale": torch.tensor(1.0)},
        {"image": torch.zeros(3, 2), "scale": torch.tensor(1.0)},
    ]
    whole = joined(parts, [3, 3])
    assert {name: tuple(value.shape) for name, value in whole.items()} == {"image": (6, 2), "scale": ()}
    again = split(whole, [3, 3])
    assert torch.equal(again[1]["image"], parts[1]["image"])
    assert sum(part["scale"] for part in again) == whole["scale"]


@zero_noise
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_by_micro_batches_has_the_losses_of_whole_batches(squares, cache, tmp_path, stage: int):
    words = ("--steps", 4, "--set", f"run.zero={stage}", "--set", "fd=10")
    assert train_here(squares, cache, tmp_path / "whole", *words) == 0
    assert train_here(squares, cache, tmp_path / "parts", *words, "--micro-batch", 2) == 0
    whole, parts = read_lines(tmp_path / "whole"), read_lines(tmp_path / "parts")
    assert len(whole) == len(parts) == 4
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=2e-5), (a["step"], name)


def test_micro_batches_resume_to_the_same_losses(squares, cache, tmp_path, monkeypatch):
    words, name = ("--steps", 4, "--micro-batch", 4, "--set", "run.workers=1"), "own_recipes:DROPOUT"
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "1")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert len(read_lines(tmp_path / "run")) == 2
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("micro", "named"), [(3, "does not divide the 8 rows"), (16, "does not divide the 8 rows")]
)
def test_micro_batches_that_do_not_come_out_even(squares, cache, tmp_path, capsys, micro: int, named: str):
    assert train_here(squares, cache, tmp_path / "run", "--micro-batch", micro) == 2
    assert named in capsys.readouterr().err


def test_a_step_without_micro_batches_is_one_forward():
    from student.training.loop import take_step

    calls = []
    engine = SimpleNamespace(
        backward=lambda loss: calls.append("backward"), step=lambda: calls.append("step")
    )

    class Counting:
        backward, step = staticmethod(engine.backward), staticmethod(engine.step)
        enable_backward_allreduce = True

        def __call__(self, batch, progress):
            calls.append(len(batch["image"]))
            return torch.zeros(()), {}, {}

    take_step(Counting(), [make_batch()], Progress(0, 1), "cpu")
    assert calls == [ROWS, "backward", "step"]
