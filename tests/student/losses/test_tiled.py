"""The tiled losses against whole matrices and autograd: values, every gradient, and how large a tensor ever gets."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from student import losses
from student.losses import tiled, tiles

D, E = 9, 5


# ----------------------------------------------------------------------------------------------------
# The same losses with whole N x N matrices


def pairs(scale, left, right):
    return scale * left @ right.T


def kl_rows(teacher, student):
    log_p = teacher.log_softmax(1)
    return (log_p.exp() * (log_p - student.log_softmax(1))).sum(1)


def whole_soft_clip(image, text, scale, t_image, t_text, t_scale):
    student, teacher = pairs(scale, image, text), pairs(t_scale, t_image, t_text)
    there, back = (
        -(teacher.softmax(1) * student.log_softmax(1)),
        -(teacher.T.softmax(1) * student.T.log_softmax(1)),
    )
    return (there.sum() + back.sum()) / (2 * len(image))


def whole_psd(image, text, scale, t_image, t_text, t_scale, unaligned):
    student, teacher = pairs(scale, image, text), pairs(t_scale, t_image, t_text)
    total = 0
    for z, t in ((student, teacher), (student.T, teacher.T)):
        target = t.T.softmax(1).T
        target = target / target.sum(1, keepdim=True)
        log_p = z.log_softmax(1)
        total = (
            total + torch.where(unaligned, (target * (target.log() - log_p)).sum(1), -log_p.diagonal()).mean()
        )
    return total / 2


def whole_cross(image, text, t_image, t_text, scale, t_scale):
    teacher = pairs(t_scale, t_image, t_text)
    there, back = (
        kl_rows(teacher, pairs(scale, image, t_text)),
        kl_rows(teacher.T, pairs(scale, text, t_image)),
    )
    return (there.mean() + back.mean()) / 2


def task_gradients(image, text, scale, *, create_graph):
    """By autograd, as the paper defines them."""
    image, text = (part if part.requires_grad else part.detach().requires_grad_() for part in (image, text))
    return torch.autograd.grad(losses.clip_loss(image, text, scale), (image, text), create_graph=create_graph)


def whole_gd(image, text, scale, t_image, t_text, t_scale):
    student = task_gradients(image, text, scale, create_graph=True)
    teacher = task_gradients(t_image, t_text, t_scale, create_graph=False)
    return sum((a - b).square().sum(1).mean() for a, b in zip(student, teacher, strict=True))


def whole_clip_crd(image, text, scale, t_image, t_text, t_scale):
    crd = losses.crd_loss(image, text, scale, t_image, t_text, t_scale)
    return losses.clip_loss(image, text, scale), crd


# ----------------------------------------------------------------------------------------------------
# What each takes


STUDENT = ("image", "text", "scale")
TEACHER = ("t_image", "t_text", "t_scale")
LOSSES = {
    "clip": (losses.clip_loss, STUDENT),
    "crd": (losses.crd_loss, STUDENT + TEACHER),
    "clip_crd": (whole_clip_crd, STUDENT + TEACHER),
    "soft_clip": (whole_soft_clip, STUDENT + TEACHER),
    "psd": (whole_psd, (*STUDENT, *TEACHER, "unaligned")),
    "icl": (losses.icl_loss, ("image", "text", "t_image", "t_text", "scale")),
    "cross": (whole_cross, ("image", "text", "t_image", "t_text", "scale", "t_scale")),
    "gd": (whole_gd, STUDENT + TEACHER),
}
SAME_WIDTH = ("icl", "cross", "gd")
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@pytest.fixture(autouse=True)
def _whole(monkeypatch):
    """The references never switch to tiles by themselves."""
    monkeypatch.setattr(tiled, "TILED_FROM", {"cpu": 10**9, "cuda": 10**9})


def inputs_of(name, count, *, a=9.0, dtype=torch.float64, seed=0, width=D):
    generator = torch.Generator().manual_seed(seed)
    widths = {"image": width, "text": width, "t_image": E, "t_text": E}
    if name in SAME_WIDTH:
        widths |= {"t_image": width, "t_text": width}
    given = {
        key: torch.randn(count, size, generator=generator, dtype=torch.float64)
        for key, size in widths.items()
    }
    given = {key: (rows / rows.norm(dim=1, keepdim=True)).to(dtype) for key, rows in given.items()}
    given |= {"scale": torch.tensor([a], dtype=dtype), "t_scale": torch.tensor([1.7 * a], dtype=dtype)}
    given["unaligned"] = torch.rand(count, generator=generator) < 0.6
    given = {key: given[key] for key in LOSSES[name][1]}
    for key in STUDENT:
        given[key].requires_grad_()
    return given


def total(found):
    """One scalar of which every part of the result is felt."""
    return 0.7 * found[0] - 1.9 * found[1] if isinstance(found, tuple) else 1.3 * found


def results(function, given, **options):
    """Value and gradients of the student's side."""
    value = total(function(**given, **options))
    return value.detach(), torch.autograd.grad(value, [given[key] for key in STUDENT])


def assert_same(ours, theirs, rtol):
    """Relative to the largest entry of each."""
    for key, x, y in zip(("value", *STUDENT), (ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert (x - y).abs().max() <= rtol * y.abs().max() + 1e-13, key


# ----------------------------------------------------------------------------------------------------
# The same numbers


@every_loss
@pytest.mark.parametrize(
    ("count", "tile", "a"),
    [(1, 4, 1.0), (3, 8, 14.0), (8, 4, 100.0), (13, 4, 1.0), (37, 16, 100.0), (37, 9, 14.0), (29, 1, 14.0)],
)
def test_value_and_gradients_are_those_of_whole_matrices(name, count, tile, a):
    given = inputs_of(name, count, a=a, seed=count)
    theirs = results(LOSSES[name][0], given)
    assert_same(results(getattr(tiled, f"tiled_{name}"), given, tile=tile), theirs, 1e-9)
    if count > 1:
        assert all(gradient.abs().max() > 1e-9 for gradient in theirs[1])


@every_loss
def test_gradients_match_finite_differences(name):
    given = inputs_of(name, 5, a=3.0)

    def function(*student):
        return getattr(tiled, f"tiled_{name}")(**given | dict(zip(STUDENT, student, strict=True)), tile=2)

    assert torch.autograd.gradcheck(function, tuple(given[key] for key in STUDENT), eps=1e-6, atol=1e-6)


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(name):
    given = inputs_of(name, 70, a=14.0, dtype=torch.bfloat16, width=32)
    wide = {
        key: value.detach().double() if value.is_floating_point() else value for key, value in given.items()
    }
    wide = {key: value.requires_grad_(key in STUDENT) for key, value in wide.items()}
    value, gradients = results(getattr(tiled, f"tiled_{name}"), given, tile=32)
    exact, exact_gradients = results(LOSSES[name][0], wide)
    assert value.dtype == torch.float32
    assert (value - exact).abs() <= 1e-4 * exact.abs()
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        rounded = theirs.to(
            torch.bfloat16
        )  # what is left beside rounding to bfloat16: at most one step of it
        assert (ours.double() - rounded.double()).abs().max() <= 2**-8 * theirs.abs().max()
    float32 = {
        key: part.detach().float().requires_grad_() if key in STUDENT else part for key, part in given.items()
    }
    for ours, theirs in zip(
        results(getattr(tiled, f"tiled_{name}"), float32, tile=32)[1], exact_gradients, strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@every_loss
@pytest.mark.parametrize("a", [100.0, 1e4])
def test_large_scales_stay_finite_in_float32(name, a):
    value, gradients = results(
        getattr(tiled, f"tiled_{name}"), inputs_of(name, 21, a=a, dtype=torch.float32), tile=8
    )
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_loss
def test_autocast_changes_nothing(name):
    given = inputs_of(name, 21, dtype=torch.float32)
    plain = results(getattr(tiled, f"tiled_{name}"), given, tile=8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(getattr(tiled, f"tiled_{name}"), given, tile=8)  # backward too
    assert_same(inside, plain, 0)


def test_a_loss_may_be_used_without_gradient():
    for name in LOSSES:
        given = inputs_of(name, 13)
        with torch.no_grad():
            value = total(getattr(tiled, f"tiled_{name}")(**given, tile=4))
        assert not value.requires_grad
        torch.testing.assert_close(value, results(getattr(tiled, f"tiled_{name}"), given, tile=4)[0])


@every_loss
@pytest.mark.parametrize("key", STUDENT)
def test_what_asks_alone_gets_its_gradient(name, key):
    given = inputs_of(name, 13)
    expected = dict(zip(STUDENT, results(LOSSES[name][0], given)[1], strict=True))[key]
    alone = {
        other: value.detach().requires_grad_() if other == key else value.detach()
        for other, value in given.items()
    }
    total(getattr(tiled, f"tiled_{name}")(**alone, tile=4)).backward()
    torch.testing.assert_close(alone[key].grad, expected)
    assert all(value.grad is None for other, value in alone.items() if other != key)


def test_the_gradient_of_icl_reaches_a_teacher_that_learns():
    given = {key: value.requires_grad_() for key, value in inputs_of("icl", 13).items()}
    ours = torch.autograd.grad(tiled.tiled_icl(**given, tile=4), list(given.values()))
    theirs = torch.autograd.grad(losses.icl_loss(**given), list(given.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("clip", "icl")])
def test_a_teacher_that_learns_is_refused(name):
    given = inputs_of(name, 5)
    for key in TEACHER:
        learns = given | {key: given[key].clone().requires_grad_()}
        with pytest.raises(ValueError, match="detach"):
            getattr(tiled, f"tiled_{name}")(**learns)


@pytest.mark.parametrize("name", ["clip", "icl", "gd"])
def test_a_second_derivative_is_refused(name):
    given = inputs_of(name, 5)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(getattr(tiled, f"tiled_{name}")(**given), given["image"], create_graph=True)


def test_crd_of_the_same_relations_is_zero():
    given = inputs_of("crd", 40, dtype=torch.float32, a=100.0)
    same = {"t_image": given["image"], "t_text": given["text"], "t_scale": given["scale"]}
    same = {key: value.detach() for key, value in same.items()}
    value, gradients = results(tiled.tiled_crd, given | same, tile=16)
    assert value.abs() < 1e-5
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_psd_of_aligned_pairs_is_clip():
    given = inputs_of("psd", 21)
    aligned = given | {"unaligned": torch.zeros(21, dtype=torch.bool)}
    assert_same(
        results(tiled.tiled_psd, aligned, tile=8),
        results(tiled.tiled_clip, {key: given[key] for key in STUDENT}, tile=8),
        1e-12,
    )


# ----------------------------------------------------------------------------------------------------
# The switch, and memory


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.numel())
        return found


def largest(function, given, **options):
    with Largest() as seen:
        total(function(**given, **options)).backward()
    return seen.count


@every_loss
def test_no_tensor_grows_with_the_square_of_the_pairs(name):
    few, many = inputs_of(name, 128), inputs_of(name, 512)
    assert largest(LOSSES[name][0], many) >= 512 * 512  # the check can see it, in backward too
    assert largest(getattr(tiled, f"tiled_{name}"), many, tile=32) <= 512 * 32
    assert largest(getattr(tiled, f"tiled_{name}"), few, tile=32) <= 128 * 32


def test_soft_losses_are_those_of_losses_py():
    given = inputs_of("psd", 21)
    assert_same(results(losses.psd_loss, given), results(whole_psd, given), 1e-9)
    given = inputs_of("soft_clip", 21)
    assert_same(results(losses.soft_clip_loss, given), results(whole_soft_clip, given), 1e-9)


@pytest.mark.parametrize("name", ["clip", "crd", "icl"])
def test_losses_switch_to_tiles_where_it_pays(name, monkeypatch):
    given = inputs_of(name, 600, dtype=torch.float32)
    loss = LOSSES[name][0]
    whole = results(loss, given)
    monkeypatch.setattr(tiled, "TILED_FROM", {"cpu": 600, "cuda": 0})
    monkeypatch.setattr(tiles, "TILE", {"cpu": 64, "cuda": 0})
    assert largest(loss, given) <= 600 * 64
    assert_same(results(loss, given), whole, 1e-5)
    for key in given:
        given[key] = given[key].detach()[:599] if given[key].numel() > 1 else given[key].detach()
        given[key].requires_grad_(key in STUDENT)
    assert largest(loss, given) >= 599 * 599


def test_a_teacher_that_learns_keeps_whole_matrices(monkeypatch):
    given = {key: value.requires_grad_() for key, value in inputs_of("crd", 40).items()}
    expected = torch.autograd.grad(losses.crd_loss(**given), list(given.values()))
    monkeypatch.setattr(tiled, "TILED_FROM", {"cpu": 1, "cuda": 1})
    for ours, theirs in zip(
        torch.autograd.grad(losses.crd_loss(**given), list(given.values())), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
