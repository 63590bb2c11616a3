"""clip_td: its loss against a loop written from Eq. 1-11, its switches, whole runs on a small VCR set."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from student.recipe import Progress
from student.recipes.clip_td import Constants, loss, teacher_fields
from teachercache.core.errors import UserError

N, C, M, D = 3, 4, 2, 5
NOW = Progress(0, 10)


def outputs_of() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {
        "logits": (N, C),
        "image_in_teacher_space": (N, C, D),
        "cls_in_teacher_space": (N, C, D),
        "words_in_teacher_space": (N, C, M, D),
    }
    return {
        name: torch.randn(*shape, dtype=torch.float64, requires_grad=True) for name, shape in named.items()
    }


def batch_of() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    valid = torch.ones(N, C, M, dtype=torch.float64)
    valid[0, 1, 1] = 0
    known = torch.tensor([[1.0], [1], [0]], dtype=torch.float64)
    return {
        "target": torch.eye(C, dtype=torch.float64)[[1, 3, 0]] * known,
        "labeled": torch.tensor([1.0, 1, 0], dtype=torch.float64),
        "several_right": torch.zeros(N, dtype=torch.bool),
        "clip_logits": 2 * torch.randn(N, C, dtype=torch.float64),
        "image_emb": torch.randn(N, D, dtype=torch.float64),
        "text_emb": torch.randn(N, C, D, dtype=torch.float64),
        "word_valid": valid,
        "word_feature": torch.randn(N, C, M, D, dtype=torch.float64),
    }


def softmax(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def unit(row):
    return row / math.sqrt(sum(float(value) ** 2 for value in row))


def l1(student, teacher):
    """| teacher - student |_1 of one token, a mean over its numbers; CLIP's row has a mean square of 1."""
    scaled = unit(teacher).float() * math.sqrt(len(teacher))
    return sum(abs(a - b) for a, b in zip(scaled, student.float(), strict=True)) / len(teacher)


def loop(out, batch, constants):
    """Eq. 1-10, one row, choice and token at a time."""
    task = dv = dt = words = 0.0
    for i in range(N):
        p = softmax(out["logits"][i].tolist())
        if batch["labeled"][i]:
            logits = out["logits"][i]
            task = (
                task
                - torch.log(torch.exp(logits[int(batch["target"][i].argmax())]) / torch.exp(logits).sum()) / 2
            )
        r = constants.temperature * max(softmax(batch["clip_logits"][i].tolist())) / max(p)
        w = constants.distill_weight if not constants.confidence or r > 1 else 0
        chosen = range(C)
        if constants.choices == "correct" and batch["labeled"][i]:
            chosen = [int(batch["target"][i].argmax())]
        for c in chosen:
            share = w / len(chosen) / N
            dv = dv + share * constants.image_term * l1(
                out["image_in_teacher_space"][i, c], batch["image_emb"][i]
            )
            dt = dt + share * constants.text_term * l1(
                out["cls_in_teacher_space"][i, c], batch["text_emb"][i, c]
            )
            for k in range(M):
                valid = float(batch["word_valid"][i, c, k])
                words = words + share / M * valid * l1(
                    out["words_in_teacher_space"][i, c, k], batch["word_feature"][i, c, k]
                )
    return {"task": task, "dv": dv, "dt": dt, "words": words}


SETTINGS = [
    {},
    {"confidence": False},
    {"choices": "correct"},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"distill_weight": 0.5, "image_term": 2.0},
    {"choices": "correct", "confidence": False, "distill_weight": 1.0},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_terms_and_gradients_are_the_equations(setting):
    constants = dataclasses.replace(Constants(), **setting)
    out, batch = outputs_of(), batch_of()
    terms, notes = loss(out, batch, constants, NOW)
    slow = loop(out, batch, constants)
    assert set(terms) == set(slow)
    assert 0 <= notes["distilled"] <= 1
    for name, term in terms.items():
        torch.testing.assert_close(term.double(), torch.as_tensor(slow[name]).double(), rtol=1e-5, atol=1e-6)
        if not isinstance(slow[name], float):
            pairs = (
                torch.autograd.grad(one, list(out.values()), retain_graph=True, allow_unused=True)
                for one in (term, slow[name])
            )
            for fast, right in zip(*pairs, strict=True):
                assert (fast is None) == (right is None)
                if right is not None:
                    torch.testing.assert_close(fast.double(), right.double(), rtol=1e-4, atol=1e-6)


def test_confidence_leaves_rows_out_and_puts_them_in():
    """The settings above would show nothing if no row or every row were left out."""
    shares = [
        float(loss(outputs_of(), batch_of(), Constants(temperature=T), NOW)[1]["distilled"])
        for T in (0.1, 1.0, 10.0)
    ]
    assert shares[0] == 0
    assert 0 < shares[1] < 1
    assert shares[2] == 1


def test_switches_take_terms_and_reads_away():
    out, batch = outputs_of(), batch_of()

    def terms(**setting):
        given = (
            dict(out)
            if setting.get("select") != "none"
            else {k: v for k, v in out.items() if k != "words_in_teacher_space"}
        )
        return set(loss(given, batch, Constants(**setting), NOW)[0])

    assert terms(text_term=0.0, select="none") == {"task", "dv"}
    assert terms(image_term=0.0, select="none") == {"task", "dt"}
    regions = ("region_feature", "region_box")
    assert teacher_fields(Constants(distill_weight=0.0)) == regions
    assert teacher_fields(Constants(text_term=0.0, select="none", confidence=False)) == (
        *regions,
        "image_emb",
    )
    assert teacher_fields(Constants(image_term=0.0, select="none", confidence=False)) == (
        *regions,
        "text_emb",
    )
    assert teacher_fields(Constants(select="random")) == (
        *regions,
        "image_emb",
        "text_emb",
        "word_span",
        "random_index",
        "random_feature",
    )
    assert "word_feature" in teacher_fields(Constants())
    assert "word_span" not in teacher_fields(Constants(stage="adapt"))
    assert teacher_fields(Constants(model="clip-1-linear")) == ("image_emb", "text_emb")
    for wrong in (
        {"select": "some"},
        {"stage": "both"},
        {"num_words": 0},
        {"temperature": 0.0},
        {"distill_weight": -1.0},
        {"choices": "one"},
    ):
        with pytest.raises(UserError, match="--set"):
            teacher_fields(Constants(**wrong))


def test_adaptive_finetuning_is_eq_11():
    torch.manual_seed(2)
    out = {
        "word_logits": torch.randn(N, 2, 7),
        "match": torch.randn(N, 2),
        "image_in_teacher_space": torch.randn(N, 1, D),
        "cls_in_teacher_space": torch.randn(N, 1, D),
    }
    batch = {
        "masked_word": torch.tensor([[1, 4], [3, -1], [2, 5]]),
        "matched": torch.tensor([1.0, 1.0, 0.0]),
        "image_emb": torch.randn(N, D),
        "text_emb": torch.randn(N, 1, D),
    }
    terms, _ = loss(out, batch, Constants(stage="adapt"), NOW)
    first, second, other = (
        -math.log(softmax(out["word_logits"][i, k].tolist())[word])
        for i, k, word in ((0, 0, 1), (0, 1, 4), (1, 0, 3))
    )
    itm = [-math.log(softmax(row.tolist())[kind]) for row, kind in zip(out["match"], (1, 1, 0), strict=True)]
    far = [
        [
            float(l1(out[name][i, 0], batch[field][i] if field == "image_emb" else batch[field][i, 0]))
            for i in (0, 1)
        ]
        for name, field in (("image_in_teacher_space", "image_emb"), ("cls_in_teacher_space", "text_emb"))
    ]
    expected = {
        "mlm": ((first + second) / 2 + other) / (0.5 * N),
        "itm": np.mean(itm),
        "dv": 0.05 * sum(far[0]) / N,
        "dt": 0.05 * sum(far[1]) / N,
    }
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
