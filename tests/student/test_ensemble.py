"""Several teachers: each row meets what every teacher said of it; softmaxes averaged or embeddings side by side."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small import TINY_CFG, build_cache, make_folder, read_lines, save_teacher, train_here

from student import losses
from student.cli import main
from student.ensemble import concat_shapes, concat_teachers, named, num_teachers, of_teacher
from student.inputs.caches import field_shapes, find_ensemble, training_rows
from student.inputs.hints import Wanted
from student.inputs.order import StepPlan
from student.inputs.pairs import PairBatches, TeacherFields
from student.models.heads import PerTeacher
from student.models.two_tower.loading import build_two_tower
from student.recipe import Progress, Run, pairs_of_one_cache
from student.recipes.clip_kd import CLIP_KD
from student.settings import override
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest
from tests.student.inputs.test_batches import READS, STUDENT, number, reordered, spelled_cache
from tests.student.losses.test_losses import ce, kl, log_row_softmax, logits

RUN, NOW = Run(data="", cache="", out=""), Progress(0, 1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(
        str(make_folder(tmp_path_factory.mktemp("data") / "squares", 40, texts=3, splits=True))
    )


def other_teacher(manifest, path, **changes) -> store.Cache:
    """A cache of another digest that spells the same, at another scale."""
    return spelled_cache(manifest, path, digest="1" * 64, scale=2.0, **changes)


def batches_of(manifest, caches, *, ensemble: str = "average", batch: int = 4) -> PairBatches:
    rows = training_rows(manifest, caches[0])
    for cache in caches[1:]:
        rows = np.intersect1d(rows, training_rows(manifest, cache))
    teachers = TeacherFields(tuple(caches), READS, ensemble)
    return PairBatches(manifest, rows, STUDENT, StepPlan(batch, steps=50, seed=0), teachers=teachers)


# ----------------------------------------------------------------------------------------------------
# Names


def test_what_belongs_to_a_teacher():
    values = {"image": 1, "image_emb": 2, "image_emb@1": 3, "image_emb@11": 4, "logit_scale@1": 5}
    assert num_teachers(values) == 12
    assert of_teacher(values, 0) == {"image": 1, "image_emb": 2}
    assert of_teacher(values, 1) == {"image": 1, "image_emb": 3, "logit_scale": 5}
    assert of_teacher(values, 11)["image_emb"] == 4
    assert (num_teachers({}), num_teachers({"image": 1})) == (1, 1)
    assert (named("a", 0), named("a", 3)) == ("a", "a@3")


# ----------------------------------------------------------------------------------------------------
# Batches of several caches


def test_each_cache_is_joined_by_its_own_keys(manifest, tmp_path):
    order = np.random.default_rng(0).permutation(40).tolist()
    first = spelled_cache(manifest, tmp_path / "a.zarr")
    second = other_teacher(reordered(manifest, order), tmp_path / "b.zarr", block_rows=5)
    batches = batches_of(manifest, [first, second])
    for step in range(14):
        batch = batches[step]
        for i, (own, caption) in enumerate(batch["text"].tolist()):
            for name in ("image_emb", "image_emb@1"):
                assert batch[name][i].tolist() == [own, 1]
            for name in ("text_emb", "text_emb@1"):
                assert batch[name][i].tolist() == [own, caption]
        assert (float(batch["logit_scale"]), float(batch["logit_scale@1"])) == (3, 2)


def test_a_second_cache_changes_nothing_of_the_first(manifest, tmp_path):
    first, second = spelled_cache(manifest, tmp_path / "a.zarr"), other_teacher(manifest, tmp_path / "b.zarr")
    alone, both = batches_of(manifest, [first])[3], batches_of(manifest, [first, second])[3]
    assert all(torch.equal(both[name], alone[name]) for name in alone)
    assert set(both) - set(alone) == {"image_emb@1", "text_emb@1", "logit_scale@1"}


def test_rows_and_texts_must_be_usable_for_every_teacher(manifest, tmp_path):
    train = [number(manifest.column("key")[row]) for row in manifest.rows_of_split("train").tolist()]
    first = spelled_cache(manifest, tmp_path / "a.zarr", bad=(train[0],))
    second = other_teacher(manifest, tmp_path / "b.zarr", bad=(train[5],))
    caches = [first, second]
    batches = batches_of(manifest, caches, batch=28)
    shown = {own for own, _ in batches[0]["text"].tolist()}
    assert shown == set(train) - {train[0], train[5]}
    valid = batches.sources[1].text_valid.copy()
    valid[:, 0] = False  # the second teacher could read no first caption
    batches.sources[1] = batches.sources[1]._replace(text_valid=valid[:, :2])  # and knows two captions a row
    captions = {caption for step in range(9) for _, caption in batches[step]["text"].tolist()}
    assert captions == {1}


def test_concat_puts_unit_rows_side_by_side(manifest, tmp_path):
    caches = [spelled_cache(manifest, tmp_path / "a.zarr"), other_teacher(manifest, tmp_path / "b.zarr")]
    apart, joined = batches_of(manifest, caches)[2], batches_of(manifest, caches, ensemble="concat")[2]
    assert not [name for name in joined if "@" in name]
    for name in READS:
        assert joined[name].shape == (4, 4)
        torch.testing.assert_close(joined[name].norm(dim=1), torch.ones(4))
        parts = [torch.nn.functional.normalize(apart[key]) for key in (name, f"{name}@1")]
        torch.testing.assert_close(joined[name], torch.cat(parts, 1) / 2**0.5)
    mean = (torch.tensor(3.0).exp() + torch.tensor(2.0).exp()) / 2
    torch.testing.assert_close(joined["logit_scale"].exp(), mean)
    shapes = field_shapes(caches, "concat")
    assert {name: shapes[name] for name in READS} == {"image_emb": (4,), "text_emb": (4,)}
    assert field_shapes(caches, "average")["image_emb@1"] == (2,)


def test_cosines_of_concat_are_the_mean_of_the_cosines():
    random = torch.Generator().manual_seed(0)
    fields = {
        f"{name}_emb{end}": 5 * torch.randn(3, size, generator=random)
        for name in ("image", "text")
        for end, size in (("", 4), ("@1", 7), ("@2", 2))
    }
    joined = concat_teachers(fields)
    cosines = [
        torch.nn.functional.normalize(fields[f"image_emb{end}"])
        @ torch.nn.functional.normalize(fields[f"text_emb{end}"]).T
        for end in ("", "@1", "@2")
    ]
    torch.testing.assert_close(joined["image_emb"] @ joined["text_emb"].T, sum(cosines) / 3)
    shapes = concat_shapes({name: tuple(rows.shape[1:]) for name, rows in fields.items()})
    assert shapes == {"image_emb": (13,), "text_emb": (13,)}


# ----------------------------------------------------------------------------------------------------
# The loss of several teachers


def two_teachers() -> tuple[dict, dict]:
    random = torch.Generator().manual_seed(1)

    def rows(size: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(5, size, generator=random))

    student = {name: rows(6).requires_grad_() for name in ("image", "text")} | {"scale": torch.tensor(6.0)}
    student |= {
        f"{name}_in_teacher_space{end}": rows(size).requires_grad_()
        for name in ("image", "text")
        for end, size in (("", 4), ("@1", 3))
    }
    student |= {"icl_scale": torch.tensor(7.0), "icl_scale@1": torch.tensor(9.0)}
    batch = {
        f"{name}_emb{end}": rows(size) for name in ("image", "text") for end, size in (("", 4), ("@1", 3))
    }
    return student, batch | {"logit_scale": torch.tensor(2.0), "logit_scale@1": torch.tensor(3.0)}


def softmaxes(rows: list) -> list:
    return [[torch.exp(value) for value in log_row_softmax(row)] for row in rows]


def test_average_has_the_gradient_of_the_averaged_softmaxes():
    """KL(mean softmax || student) by a loop; the value is above it by the teachers' disagreement, a constant."""
    student, batch = two_teachers()
    recipe = override(CLIP_KD, RUN, ["task=0", "fd=0", "icl=0"])[0]
    ours = recipe.loss(student, batch, recipe.constants, NOW)[0]["crd"]
    V_S = {name: list(torch.nn.functional.normalize(student[name])) for name in ("image", "text")}
    slow, disagreement = 0, 0
    for left, right in (("image", "text"), ("text", "image")):
        each = [
            softmaxes(
                logits(
                    list(batch[f"{left}_emb{end}"]),
                    list(batch[f"{right}_emb{end}"]),
                    batch[f"logit_scale{end}"].exp(),
                )
            )
            for end in ("", "@1")
        ]
        mean = [[(p + q) / 2 for p, q in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]
        log_mean = [[torch.log(p) for p in row] for row in mean]
        slow = slow + kl(log_mean, logits(V_S[left], V_S[right], student["scale"])) / 2
        for one in each:
            disagreement = disagreement + kl([[torch.log(p) for p in row] for row in one], log_mean) / 4
    torch.testing.assert_close(ours, slow + disagreement, rtol=1e-4, atol=1e-6)
    assert disagreement > 0.01
    inputs = [student["image"], student["text"]]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_average_is_the_mean_of_the_terms_of_each_teacher():
    student, batch = two_teachers()
    recipe = override(CLIP_KD, RUN, ["fd=3"])[0]
    terms, notes = recipe.loss(student, batch, recipe.constants, NOW)
    apart = [
        recipe.loss(of_teacher(student, k), of_teacher(batch, k), recipe.constants, NOW)[0] for k in (0, 1)
    ]
    for name, value in terms.items():
        torch.testing.assert_close(value, (apart[0][name] + apart[1][name]) / 2)
    assert apart[0]["fd"] != apart[1]["fd"]
    torch.testing.assert_close(terms["task"], losses.clip_loss(student["image"], student["text"], 6.0))
    of_icl = sum(
        ce(logits(list(student[f"{a}_in_teacher_space{end}"]), list(batch[f"{b}_emb{end}"]), g)) / 4
        for end, g in (("", 7.0), ("@1", 9.0))
        for a, b in (("image", "text"), ("text", "image"))
    )
    torch.testing.assert_close(terms["icl"], of_icl, rtol=1e-4, atol=1e-6)
    assert notes["icl_scale"] == 8


def test_every_teacher_has_heads_of_its_own():
    student = build_two_tower("vit-micro")
    shapes = {"image_emb": (16,), "text_emb": (16,), "image_emb@1": (64,), "text_emb@1": (24,)}
    heads = CLIP_KD.distill_heads(CLIP_KD.constants, student, shapes)
    assert isinstance(heads, PerTeacher)
    found = heads({"image": torch.randn(3, 64), "text": torch.randn(3, 64)})
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "image_in_teacher_space": (3, 16),
        "text_in_teacher_space": (3, 16),
        "icl_scale": (),
        "image_in_teacher_space@1": (3, 64),
        "text_in_teacher_space@1": (3, 24),
        "icl_scale@1": (),
    }
    crd = dataclasses.replace(CLIP_KD.constants, fd=0.0, icl=0.0)
    assert CLIP_KD.distill_heads(crd, student, shapes) is None


# ----------------------------------------------------------------------------------------------------
# `--cache A.zarr,B.zarr`


@pytest.fixture(scope="module")
def second(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    return build_cache(
        squares,
        save_teacher(folder / "teacher", {**TINY_CFG, "embed_dim": 24}, seed=7),
        folder / "second.zarr",
    )


@pytest.mark.parametrize("ensemble", ["average", "concat"])
def test_a_run_of_two_teachers(ensemble, squares, cache, second, tmp_path, capsys):
    words = ("--steps", 8, "--set", f"ensemble={ensemble}", "--set", "optim.lr=0.01")
    assert train_here(squares, f"{cache},{second}", tmp_path / "run", *words) == 0
    said = capsys.readouterr().err
    assert f"2 teachers, {ensemble}: " in said
    widths = [line.split()[2] for line in said.splitlines() if line.startswith("fd=2000 over")]
    assert widths == {"average": ["16", "24"], "concat": ["40"]}[ensemble]
    lines = read_lines(tmp_path / "run")
    assert lines[-1]["fd"] < lines[0]["fd"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [teacher["name"] for teacher in facts["teachers"]] == [
        json.loads((path / "zarr.json").read_text())["attributes"]["spec"]["name"] for path in (cache, second)
    ]
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "exported")])
        == 0
    )
    card = (tmp_path / "exported" / "README.md").read_text()
    assert all(teacher["digest"][:12] in card for teacher in facts["teachers"])
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume") == 2  # one teacher is another run
    assert "is another run (cache: " in capsys.readouterr().err


def test_the_order_of_teachers_does_not_change_their_mean(squares, cache, second, tmp_path):
    words = ("--steps", 1, "--set", "fd=0", "--set", "icl=0")  # no heads, which start at random
    found = []
    for i, caches in enumerate((f"{cache},{second}", f" {second}, {cache} ")):
        assert train_here(squares, caches, tmp_path / str(i), *words) == 0
        found.append(read_lines(tmp_path / str(i))[0])
    assert found[0].keys() == found[1].keys()
    assert all(found[1][name] == pytest.approx(value, rel=1e-6) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("clip_kd", ["--live"], "--live runs one teacher: pass one --cache, or drop --live"),
        ("clip_kd", ["--set", "ensemble=sum"], "--set ensemble=sum: choose from average, concat"),
        ("clip_kd", ["--set", "hidden=1", "--set", "hidden_image=0:0"], "has no field image_hidden_0"),
    ],
)
def test_what_two_teachers_cannot_do(recipe, words, said, squares, cache, second, tmp_path, capsys):
    assert train_here(squares, f"{cache},{second}", tmp_path / "run", "--dry-run", *words, recipe=recipe) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_without_an_ensemble_takes_one_cache(squares, cache, second, tmp_path, capsys, monkeypatch):
    from student.recipes.registry import RECIPES

    one = dataclasses.replace(
        CLIP_KD,
        name="one",
        constants=RECIPES["clip"].constants,
        rows=pairs_of_one_cache,
        student=RECIPES["clip"].student,
        teacher_fields=lambda constants: READS,
    )
    monkeypatch.setitem(RECIPES, "one", one)
    assert train_here(squares, f"{cache},{second}", tmp_path / "run", "--dry-run", recipe="one") == 2
    assert "one reads one cache, not 2: pass one as --cache" in capsys.readouterr().err


def wanted(caches: str) -> Wanted:
    return Wanted(caches, "data/squares", READS, "clip-lite")


def test_one_teacher_twice_is_refused(cache):
    with pytest.raises(UserError, match="twice: write it once"):
        find_ensemble(wanted(f"{cache},{cache}"))


def test_a_path_with_a_comma_is_one_path(manifest, tmp_path):
    spelled_cache(manifest, tmp_path / "a,b.zarr")
    found = find_ensemble(wanted(str(tmp_path / "a,b.zarr")))
    assert [cache.path.name for cache in found] == ["a,b.zarr"]
    with pytest.raises(UserError, match=r"no cache with .* in nowhere: run `tc build .* --out nowhere/\S+`"):
        find_ensemble(wanted("nowhere,elsewhere"))


@pytest.mark.parametrize("views", [(4, 0), (0, 4), (4, 2), "seed"])
def test_teachers_that_saw_different_views_are_refused(
    views, squares, teacher_folder, second, tmp_path, capsys
):
    assert views is not None
    augments = [[], ["--augment", "seed=5"]] if views == "seed" else [[], []]
    paths = []
    other = save_teacher(tmp_path / "other", {**TINY_CFG, "embed_dim": 24}, seed=7)
    for i, teacher in enumerate((teacher_folder, other)):
        from teachercache.cli import main as tc_main

        count = 2 if views == "seed" else views[i]
        more = ["--views", str(count), *augments[i]] if count else []
        out = tmp_path / f"{i}.zarr"
        words = ["build", "--teacher", str(teacher), "--data", str(squares), "--out", str(out), *more]
        assert tc_main([*words, "--workers", "0"]) == 0
        paths.append(str(out))
    assert train_here(squares, ",".join(paths), tmp_path / "run", "--dry-run") == 2
    assert "hold different views: build both with the same --views and --augment" in capsys.readouterr().err
