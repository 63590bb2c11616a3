"""psd: its loss against a loop of scalars, its schedule and draw, whole runs; a cache in the model's place."""

import dataclasses
import math

import own_recipes
import pytest
import torch
from small import read_lines, train_here
from torch.nn.functional import normalize

from student import losses
from student.losses import papers, tiled
from student.recipe import Progress
from student.recipes.psd import PSD, alpha, draw_unaligned
from tests.student.losses.test_losses import D, E, log_row_softmax, logits, rows, scale

N = 6
UNALIGNED = torch.tensor([True, False, True, True, False, False])


def loop_direction(left, right, scale, t_left, t_right, t_scale, unaligned):
    """Sum over rows; the soft target of row i at j is sm over i of T_ij, over the sum of these in row i."""
    log_p = [log_row_softmax(row) for row in logits(left, right, scale)]
    columns = [
        log_row_softmax(row) for row in logits(t_right, t_left, t_scale)
    ]  # of the other direction: [j][i]
    total = 0
    for i, row in enumerate(log_p):
        if not unaligned[i]:
            total = total - row[i]
            continue
        shares = [torch.exp(columns[j][i]) for j in range(len(row))]
        for j, share in enumerate(shares):
            target = share / sum(shares)
            total = total + target * (torch.log(target) - row[j])
    return total


def loop_psd(image, text, scale, t_image, t_text, t_scale, unaligned):
    forward = loop_direction(image, text, scale, t_image, t_text, t_scale, unaligned)
    backward = loop_direction(text, image, scale, t_text, t_image, t_scale, unaligned)
    return (forward + backward) / 2 / len(image)


def inputs_of(width: int = E) -> dict:
    """Arguments of psd_loss, float64."""
    return {
        "image": rows(D, 1, count=N),
        "text": rows(D, 2, count=N),
        "scale": scale(9.0),
        "t_image": rows(width, 3, count=N),
        "t_text": rows(width, 4, count=N),
        "t_scale": scale(10.0),
    }


# ----------------------------------------------------------------------------------------------------
# The loss


def test_value_and_every_gradient_match_the_loop():
    given = {key: value.requires_grad_() for key, value in inputs_of().items()}
    fast = losses.psd_loss(**given, unaligned=UNALIGNED)
    slow = loop_psd(*(value[0] if len(value) == 1 else list(value) for value in given.values()), UNALIGNED)
    torch.testing.assert_close(fast, slow.reshape(()), rtol=1e-12, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad(one, list(given.values())) for one in (fast, slow)), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_all_aligned_is_clip_and_the_own_softmax_as_target_is_nearly_nothing():
    given = inputs_of()
    none = torch.zeros(N, dtype=torch.bool)
    task = losses.clip_loss(given["image"], given["text"], given["scale"])
    torch.testing.assert_close(losses.psd_loss(**given, unaligned=none), task, rtol=1e-12, atol=0)
    ones = torch.eye(N, dtype=torch.float64)  # a teacher that is sure teaches the diagonal
    sure = given | {"t_image": ones, "t_text": ones, "t_scale": 1e4}
    torch.testing.assert_close(losses.psd_loss(**sure, unaligned=~none), task, rtol=1e-9, atol=0)


def test_swapped_targets_differ_from_the_row_softmax():
    """Where one text is near to all pictures, the swap spreads it over them instead of giving it every row."""
    t_image, t_text = rows(4, 1, count=3), rows(4, 2, count=3)
    z, everything = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    t = 10 * t_image @ t_text.T
    found = papers._psd_rows(z, t, everything)
    plain = papers._kl_rows(t, z)
    assert abs(found - plain) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    given = {key: value.to(dtype) for key, value in inputs_of().items()}
    found = losses.psd_loss(**given, unaligned=UNALIGNED)
    assert found.dtype == torch.float32
    wide = losses.psd_loss(**{key: value.double() for key, value in given.items()}, unaligned=UNALIGNED)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------
# The schedule and the draw


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.1, 0.4, 0.7]), ("linear", [0.1, 0.4, 0.7]), ("constant", [0.7, 0.7, 0.7])],
)
def test_alpha_grows_from_start_to_end(schedule, expected):
    constants = dataclasses.replace(PSD.constants, schedule=schedule, alpha_start=0.1, alpha_end=0.7)
    assert [alpha(constants, Progress(step, 101)) for step in (0, 50, 100)] == pytest.approx(expected)
    quarter = {"cosine": 0.1 + 0.6 * (1 - math.cos(math.pi / 4)) / 2, "linear": 0.25, "constant": 0.7}[
        schedule
    ]
    assert alpha(constants, Progress(25, 101)) == pytest.approx(quarter)
    assert alpha(constants, Progress(0, 1)) == pytest.approx(expected[0])  # a run of one step


def test_the_draw_has_the_share_and_no_favourites():
    counts = torch.zeros(20)
    for step in range(400):
        chosen = draw_unaligned(20, 0.3, step)
        assert chosen.sum() == 6
        counts += chosen
    assert counts.min() > 80  # 120 expected, 9 the standard deviation
    assert counts.max() < 160
    assert draw_unaligned(20, 0.3, 7).equal(draw_unaligned(20, 0.3, 7))
    assert not draw_unaligned(20, 0.3, 7).equal(draw_unaligned(20, 0.3, 8))
    assert draw_unaligned(5, 0.0, 0).sum() == 0
    assert draw_unaligned(5, 1.0, 0).sum() == 5


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("alpha_end=1.5", "a value of type float from 0 to 1 is expected"),
        ("alpha_start=-0.1", "a value of type float from 0 to 1 is expected"),
        ("schedule=cubic", "choose from cosine, linear, constant"),
        ("teacher=me", "choose from self, cache"),
        ("teacher_temperature=0.0", "a value of type float above 0 is expected"),
    ],
)
def test_what_makes_no_sense_is_refused(setting, said, squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--set", setting, recipe="psd") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --set {setting.partition('=')[0]}=")
    assert said in error
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_begins_as_clip_and_moves_on(squares, cache, tmp_path):
    for recipe in ("clip", "psd"):
        words = ("--steps", 6, "--set", "optim.weight_decay=0.1", "--set", "optim.warmup=0.1")
        assert train_here(squares, cache, tmp_path / recipe, *words, recipe=recipe) == 0
    clip, psd = read_lines(tmp_path / "clip"), read_lines(tmp_path / "psd")
    assert psd[0]["unaligned"] == 0
    assert psd[0]["psd"] == pytest.approx(clip[0]["task"], rel=1e-6)
    shares = [line["unaligned"] for line in psd]
    assert shares == sorted(shares)
    assert shares[-1] == 0.75  # 0.8 of 8, in whole pairs
    assert psd[-1]["psd"] != pytest.approx(clip[-1]["task"], rel=1e-2)


def test_the_teacher_is_the_model_detached():
    """The gradient is that of fixed targets: none reaches them."""
    V, S = rows(D, 1, count=8).requires_grad_(), rows(D, 2, count=8).requires_grad_()
    constants = dataclasses.replace(PSD.constants, schedule="constant", alpha_end=1.0)
    terms, notes = PSD.loss(
        {"image": V, "text": S, "scale": scale(9.0).float().reshape(())}, {}, constants, Progress(3, 10)
    )
    assert notes["unaligned"] == 1
    unit, every = (normalize(V.float()), normalize(S.float())), torch.ones(8, dtype=torch.bool)
    fixed = losses.psd_loss(*unit, 9.0, *(part.detach() for part in unit), 10.0, every)
    through = losses.psd_loss(*unit, 9.0, *unit, 10.0, every)
    ours, expected, other = (
        torch.autograd.grad(one, V, retain_graph=True)[0] for one in (terms["psd"], fixed, through)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    assert (ours - other).norm() > 0.1 * ours.norm()


def test_a_cache_in_the_models_place(squares, cache, tmp_path):
    words = ("--steps", 3, "--set", "schedule=constant", "--set", "alpha_end=0.5")
    assert train_here(squares, cache, tmp_path / "own", *words, recipe="psd") == 0
    assert (
        train_here(squares, cache, tmp_path / "cached", *words, "--set", "teacher=cache", recipe="psd") == 0
    )
    own, cached = read_lines(tmp_path / "own"), read_lines(tmp_path / "cached")
    assert own[0]["unaligned"] == cached[0]["unaligned"] == 0.5
    assert own[0]["psd"] != cached[0]["psd"]


def test_a_resumed_run_and_tiles_have_the_same_losses(squares, cache, tmp_path, monkeypatch):
    words, name = ("--steps", 6, "--micro-batch", 4), "own_recipes:PSD_STOPPING"
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "2")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "whole")
    monkeypatch.setattr(tiled, "TILED_FROM", {"cpu": 1, "cuda": 1})
    assert train_here(squares, cache, tmp_path / "tiles", *words, recipe=name) == 0
    for a, b in zip(read_lines(tmp_path / "whole"), read_lines(tmp_path / "tiles"), strict=True):
        assert b["psd"] == pytest.approx(a["psd"], rel=1e-4)
