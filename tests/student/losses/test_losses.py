"""Every public loss against a loop of scalars written from the equations (CLIP; CLIP-KD, section 3)."""

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from student import losses

N, D, E = 5, 7, 3


# ----------------------------------------------------------------------------------------------------
# The oracles: scalar torch operations only, no matmul, no softmax, no library loss


def dot(a, b):
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + x * y
    return total


def log_row_softmax(row):
    """log of exp(z_j) / sum_k exp(z_k)."""
    total = sum(torch.exp(z) for z in row)
    return [torch.log(torch.exp(z) / total) for z in row]


def logits(left, right, scale):
    return [[scale * dot(a, b) for b in right] for a in left]


def ce(rows):
    """CE(Z, I): mean over rows of -log softmax(z_i)_i."""
    return sum(-log_row_softmax(row)[i] for i, row in enumerate(rows)) / len(rows)


def kl(teacher_rows, student_rows):
    """Batch mean of sum_j p_j (log p_j - log q_j)."""
    total = 0
    for teacher_row, student_row in zip(teacher_rows, student_rows, strict=True):
        for p, q in zip(log_row_softmax(teacher_row), log_row_softmax(student_row), strict=True):
            total = total + torch.exp(p) * (p - q)
    return total / len(teacher_rows)


def mean_square(left, right):
    total, count = 0, 0
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            total, count = total + (x - y) * (x - y), count + 1
    return total / count


def loop_clip(image, text, scale):
    return (ce(logits(image, text, scale)) + ce(logits(text, image, scale))) / 2


def loop_crd(image, text, scale, t_image, t_text, t_scale):
    forward = kl(logits(t_image, t_text, t_scale), logits(image, text, scale))
    backward = kl(logits(t_text, t_image, t_scale), logits(text, image, scale))
    return (forward + backward) / 2


def loop_fd(image, text, t_image, t_text):
    return mean_square(image, t_image) + mean_square(text, t_text)


def loop_icl(image, text, t_image, t_text, scale):
    return (ce(logits(image, t_text, scale)) + ce(logits(text, t_image, scale))) / 2


def loop_task_gradients(image, text, scale):
    """CLIP-KD, appendix Eq. 1 to 6 for the batch mean: sums over anchors k and samples b."""
    n, forward, backward = len(image), [], []
    for row in logits(image, text, scale):
        forward.append([torch.exp(value) for value in log_row_softmax(row)])
    for row in logits(text, image, scale):
        backward.append([torch.exp(value) for value in log_row_softmax(row)])
    of_image, of_text = [], []
    for k in range(n):
        to_image, to_text = 0 * image[k], 0 * text[k]
        for b in range(n):
            own = 1.0 if k == b else 0.0
            to_image = to_image + (forward[k][b] - own) * text[b] * scale  # Eq. 1
            to_text = to_text + (forward[b][k] - own) * image[b] * scale  # Eq. 2, b the anchor
            to_text = to_text + (backward[k][b] - own) * image[b] * scale  # Eq. 3
            to_image = to_image + (backward[b][k] - own) * text[b] * scale  # Eq. 4
        of_image.append(to_image / 2 / n)
        of_text.append(to_text / 2 / n)
    return of_image, of_text


def loop_gd(image, text, scale, t_image, t_text, t_scale):
    """Eq. 7."""
    total = 0
    student, teacher = loop_task_gradients(image, text, scale), loop_task_gradients(t_image, t_text, t_scale)
    for ours, theirs in zip(student, teacher, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            total = total + dot(b - a, b - a)
    return total / len(image)


def loop_cross(image, text, scale, t_image, t_text, t_scale):
    forward = kl(logits(t_image, t_text, t_scale), logits(image, t_text, scale))
    backward = kl(logits(t_text, t_image, t_scale), logits(text, t_image, scale))
    return (forward + backward) / 2


def loop_soft_clip(image, text, scale, t_image, t_text, t_scale):
    total = 0
    for left, right, t_left, t_right in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for q, p in zip(logits(left, right, scale), logits(t_left, t_right, t_scale), strict=True):
            for log_q, log_p in zip(log_row_softmax(q), log_row_softmax(p), strict=True):
                total = total - torch.exp(log_p) * log_q
    return total / len(image) / 2


def rows(width: int, seed: int, *, count: int = N, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Unit rows at random."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (values / values.norm(dim=1, keepdim=True)).to(dtype)


def scale(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def inputs_of(name: str, *, count: int = N, dtype: torch.dtype = torch.float64, a: float = 9.0) -> dict:
    """Arguments of a loss by name; the teacher is narrower than the student only where that is allowed."""
    student = {"image": rows(D, 1, count=count, dtype=dtype), "text": rows(D, 2, count=count, dtype=dtype)}
    width = E if name in ("crd_loss", "soft_clip_loss") else D
    teacher = {
        "t_image": rows(width, 3, count=count, dtype=dtype),
        "t_text": rows(width, 4, count=count, dtype=dtype),
    }
    return {
        "clip_loss": student | {"scale": scale(a, dtype)},
        "crd_loss": student | {"scale": scale(a, dtype)} | teacher | {"t_scale": scale(a * 1.7, dtype)},
        "fd_loss": student | teacher,
        "icl_loss": student | teacher | {"scale": scale(a, dtype)},
        "gd_loss": student | {"scale": scale(a, dtype)} | teacher | {"t_scale": scale(a * 1.7, dtype)},
        "cross_kd_loss": student | {"scale": scale(a, dtype)} | teacher | {"t_scale": scale(a * 1.7, dtype)},
        "soft_clip_loss": student | {"scale": scale(a, dtype)} | teacher | {"t_scale": scale(a * 1.7, dtype)},
        "hidden_loss": {"hidden": student["image"], "t_hidden": teacher["t_image"]},
    }[name]


LOSSES = {
    "clip_loss": loop_clip,
    "crd_loss": loop_crd,
    "fd_loss": loop_fd,
    "icl_loss": loop_icl,
    "gd_loss": loop_gd,
    "cross_kd_loss": loop_cross,
    "soft_clip_loss": loop_soft_clip,
    "hidden_loss": mean_square,
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@every_loss
def test_value_and_every_gradient_match_the_loop(name):
    given = {key: value.requires_grad_() for key, value in inputs_of(name).items()}
    fast = getattr(losses, name)(**given)
    slow = LOSSES[name](*(value[0] if len(value) == 1 else list(value) for value in given.values())).reshape(
        ()
    )
    assert fast.shape == ()
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)
    assert slow > 0.01  # an oracle of zero would agree with too much
    ours = torch.autograd.grad(fast, list(given.values()))
    theirs = torch.autograd.grad(slow, list(given.values()))
    for key, a, b in zip(given, ours, theirs, strict=True):
        assert b.abs().max() > 1e-6, key
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@every_loss
def test_gradients_match_finite_differences(name):
    given = {key: value.requires_grad_() for key, value in inputs_of(name, count=3).items()}
    assert torch.autograd.gradcheck(getattr(losses, name), tuple(given.values()), eps=1e-6, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    given = inputs_of(name, dtype=dtype)
    found = getattr(losses, name)(**{key: value.requires_grad_() for key, value in given.items()})
    assert found.dtype == torch.float32
    wide = {key: value.detach().double() for key, value in given.items()}
    torch.testing.assert_close(found.double(), getattr(losses, name)(**wide), rtol=1e-5, atol=1e-7)
    found.backward()
    assert all(value.grad.dtype == dtype for value in given.values())


@every_loss
def test_a_scale_may_be_a_plain_float_or_have_no_dimension(name):
    given = inputs_of(name)
    plain = {key: float(value) if "scale" in key else value for key, value in given.items()}
    point = {key: value.reshape(()) if "scale" in key else value for key, value in given.items()}
    expected = getattr(losses, name)(**given)
    assert getattr(losses, name)(**plain) == expected == getattr(losses, name)(**point)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "clip_loss"])
def test_a_teacher_needs_no_gradient_and_gets_none(name):
    given = inputs_of(name)
    for key, value in given.items():
        value.requires_grad_(not key.startswith("t_"))
    getattr(losses, name)(**given).backward()
    for key, value in given.items():
        assert (value.grad is None) == key.startswith("t_"), key


@every_loss
@pytest.mark.parametrize(("count", "a"), [(1, 10.0), (1, 1e4), (6, 100.0), (6, 1e4)])
def test_one_pair_and_large_scales_stay_finite(name, count, a):
    given = inputs_of(name, count=count, dtype=torch.float32, a=a)
    given = {key: value.requires_grad_() for key, value in given.items()}
    found = getattr(losses, name)(**given)
    found.backward()
    assert math.isfinite(found.item())
    assert all(torch.isfinite(value.grad).all() for value in given.values())
    if count == 1 and name not in ("fd_loss", "hidden_loss"):  # one choice: nothing to get wrong
        assert found == 0


@every_loss
def test_order_of_the_pairs_does_not_matter(name):
    given = inputs_of(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {key: value if "scale" in key else value[order] for key, value in given.items()}
    torch.testing.assert_close(
        getattr(losses, name)(**shuffled), getattr(losses, name)(**given), rtol=1e-12, atol=0
    )
    which = "hidden" if name == "hidden_loss" else "text"
    broken = shuffled | {which: given[which]}  # pictures and captions of different pairs
    assert (getattr(losses, name)(**broken) - getattr(losses, name)(**given)).abs() > 1e-3


def test_clip_loss_of_equal_rows_is_log_n():
    same = torch.ones(6, 4) / 2
    torch.testing.assert_close(losses.clip_loss(same, same, 50.0), torch.tensor(math.log(6)))


def test_fd_is_two_over_d_times_one_minus_cosine():
    image, text, t_image, t_text = (rows(D, seed) for seed in range(4))
    cosines = (image * t_image).sum(1).mean() + (text * t_text).sum(1).mean()
    torch.testing.assert_close(losses.fd_loss(image, text, t_image, t_text), 2 / D * (2 - cosines))


def test_crd_is_zero_only_where_the_distributions_are_the_same():
    image, text = rows(D, 1), rows(D, 2)
    turned, _ = torch.linalg.qr(
        torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    same = losses.crd_loss(
        image, text, 9.0, image @ turned, text @ turned, 9.0
    )  # another space, the same relations
    torch.testing.assert_close(same, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-13)
    assert losses.crd_loss(image, text, 9.0, image, text, 9.5) > 1e-4  # each side has its own scale
    for seed in range(20):
        assert losses.crd_loss(image, text, 9.0, rows(E, seed), rows(E, seed + 50), 9.0) > 1e-3


def test_crd_measures_the_student_by_the_teacher():
    """KL(teacher || student), not the reverse: a student that is sure and wrong costs without bound."""
    image, text, far = rows(D, 1), rows(D, 2), rows(D, 3)
    costs = [losses.crd_loss(image, text, sure, far, far, 1.0) for sure in (10.0, 100.0, 1000.0)]
    assert costs[2] > 9 * costs[1] > 50 * costs[0]
    reverse = [losses.crd_loss(far, far, 1.0, image, text, sure) for sure in (10.0, 100.0, 1000.0)]
    assert reverse[2] < math.log(N) + 2  # the entropy of the teacher bounds it


def test_icl_pairs_each_student_row_with_the_other_modality():
    image, text, t_image, t_text = (rows(D, seed) for seed in range(4))
    swapped = losses.icl_loss(image, text, t_text, t_image, 9.0)
    assert (swapped - losses.icl_loss(image, text, t_image, t_text, 9.0)).abs() > 1e-2
    perfect = losses.icl_loss(image, text, text, image, 1e3)  # V' S_T^T with S_T = V: all on the diagonal
    assert perfect < 1e-6


def test_gd_is_zero_where_the_gradients_are_the_same_and_compares_those_of_clip_loss():
    image, text, t_image, t_text = (rows(D, seed).requires_grad_() for seed in range(4))
    assert losses.gd_loss(image, text, 9.0, image, text, 9.0) == 0
    ours = torch.autograd.grad(losses.clip_loss(image, text, 9.0), [image, text])
    theirs = torch.autograd.grad(losses.clip_loss(t_image, t_text, 20.0), [t_image, t_text])
    expected = sum((a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(
        losses.gd_loss(image, text, 9.0, t_image, t_text, 20.0), expected, rtol=1e-12, atol=0
    )


def test_gd_in_float32_keeps_its_digits_where_the_teacher_is_sure():
    t_image = rows(64, 3, count=512)
    t_text = torch.nn.functional.normalize(t_image + 0.5 * rows(64, 4, count=512))
    given = {
        "image": rows(64, 1, count=512),
        "text": rows(64, 2, count=512),
        "t_image": t_image,
        "t_text": t_text,
    }
    wide = losses.gd_loss(**given, scale=14.3, t_scale=100.0)
    narrow = losses.gd_loss(
        **{name: value.float() for name, value in given.items()}, scale=14.3, t_scale=100.0
    )
    assert 1e-6 < wide < 1e-2
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0)


def test_the_weight_of_gd_in_the_paper_fits_a_scale_that_divides():
    """1e8 gives the released form, cos / a, a tenth of a new student's loss; Eq. 1 (a = 1 / tau) needs about 1000."""
    n, d = 1024, 512
    random = torch.Generator().manual_seed(0)
    image, text, both, *apart = (torch.randn(n, d, generator=random) for _ in range(5))
    image, text = (torch.nn.functional.normalize(value) for value in (image, text))
    t_image, t_text = (
        torch.nn.functional.normalize(both + 1.7 * value) for value in apart
    )  # a cosine of 1/4, CLIP's
    task = losses.clip_loss(image, text, 14.3)
    multiplied = losses.gd_loss(image, text, 14.3, t_image, t_text, 100.0)
    divided = losses.gd_loss(image, text, 1 / 14.3, t_image, t_text, 1 / 100)
    assert 0.05 < 1e8 * divided / (1e8 * divided + task) < 0.2
    assert 1e8 * multiplied / (1e8 * multiplied + task) > 0.999
    assert 0.05 < 1000 * multiplied / (1000 * multiplied + task) < 0.2


def test_cross_kd_is_zero_where_the_student_is_the_teacher():
    t_image, t_text = rows(D, 1), rows(D, 2)
    same = losses.cross_kd_loss(t_image, t_text, 9.0, t_image, t_text, 9.0)
    torch.testing.assert_close(same, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-13)
    crd = losses.crd_loss(rows(D, 3), rows(D, 4), 9.0, t_image, t_text, 9.0)
    assert (losses.cross_kd_loss(rows(D, 3), rows(D, 4), 9.0, t_image, t_text, 9.0) - crd).abs() > 1e-3


def test_fd_is_the_sum_of_two_hidden_losses():
    image, text, t_image, t_text = (rows(D, seed) for seed in range(4))
    both = losses.hidden_loss(image, t_image) + losses.hidden_loss(text, t_text)
    assert losses.fd_loss(image, text, t_image, t_text) == both


@every_loss
def test_shapes_are_checked_where_a_checker_runs(name):
    checked = jaxtyped(typechecker=beartype)(getattr(losses, name))
    given = inputs_of(name)
    assert checked(**given) == getattr(losses, name)(**given)
    for key, value in given.items():
        if "scale" in key:
            continue
        for wrong in (value[:-1], value[:, :-1], value[0], value.long()):
            with pytest.raises(TypeCheckError):
                checked(**{**given, key: wrong})


def test_the_losses_do_not_change_what_they_are_given():
    for name in LOSSES:
        given = inputs_of(name)
        before = {key: value.clone() for key, value in given.items()}
        getattr(losses, name)(**given)
        assert all(torch.equal(given[key], before[key]) for key in given)
