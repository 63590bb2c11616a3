"""Every term of clip_kd beyond the four of its sum: what the recipe makes of outputs and fields, heads, masked
forwards, inner blocks; and what the released code got wrong."""

import dataclasses
import itertools

import own_recipes
import pytest
import torch
from small import TINY_CFG, build_cache, read_lines, save_teacher, train_here

from student.models.two_tower.loading import TINY, build_two_tower
from student.models.two_tower.model import TwoTower, add_block_outputs, add_masked_output, keep_patches
from student.recipe import Progress, Run
from student.recipes.clip_kd import CLIP_KD, block_pairs
from student.settings import override
from student.training.step import TrainStep
from teachercache.core.errors import UserError
from teachercache.teachers.clip.folders import build_module
from tests.student.losses.test_losses import loop_clip, mean_square

RUN, NOW = Run(data="", cache="", out=""), Progress(0, 1)
OFF = ("task=0", "crd=0", "fd=0", "icl=0")
NEW = {"mfd": 2000.0, "gd": 1000.0, "afd": 1.0, "cross": 1.0, "hidden": 2000.0}
BLOCKS = ("hidden_image=0:0", "hidden_text=0:0")
ALL = (*(f"{name}={value}" for name, value in NEW.items()), *BLOCKS)
SHAPES = {"image_emb": (16,), "text_emb": (16,), "image_hidden_0": (32,), "text_hidden_0": (24,)}
COUNT, PATCHES = 6, 16  # vit-micro: 32 pixels, patches of 8


def recipe_of(*settings: str):
    return override(CLIP_KD, RUN, ["model=vit-micro", *settings])[0]


def build(recipe) -> TwoTower:
    """The student of the recipe's settings; clip_kd reads nothing of the data for it."""
    return recipe.student(recipe.constants, None)


def step_of(*settings: str, shapes: dict = SHAPES) -> TrainStep:
    recipe = recipe_of(*settings)
    torch.manual_seed(0)
    student = build(recipe)
    return TrainStep(recipe, student, recipe.distill_heads(recipe.constants, student, shapes))


def batch_of(seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    batch = {"image": torch.randn(COUNT, 3, 32, 32, generator=random)}
    batch |= {"text": torch.randint(1, 1000, (COUNT, 16), generator=random)}
    batch |= {"mask_noise": torch.rand(COUNT, PATCHES, generator=random), "logit_scale": torch.tensor(3.0)}
    return batch | {name: torch.randn(COUNT, *shape, generator=random) for name, shape in SHAPES.items()}


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


# ----------------------------------------------------------------------------------------------------
# One weight, one term


@pytest.mark.parametrize("name", list(NEW))
def test_each_term_comes_by_one_weight_and_leaves_the_others_as_they_are(name):
    plain, plain_notes = step_of()(batch_of(), NOW)[1:]
    with_term, notes = step_of(f"{name}=3", *(BLOCKS if name == "hidden" else ()))(batch_of(), NOW)[1:]
    assert set(with_term) == set(plain) | {name}
    assert all(torch.equal(with_term[other], plain[other]) for other in plain)
    assert all(torch.equal(notes[other], plain_notes[other]) for other in plain_notes)
    assert with_term[name] > 0
    twice = step_of(f"{name}=6", *(BLOCKS if name == "hidden" else ()))(batch_of(), NOW)[1]
    torch.testing.assert_close(twice[name], 2 * with_term[name])


NEEDS = {
    "task": ((), ()),
    "crd": (("image_emb", "text_emb"), ()),
    "fd": (("image_emb", "text_emb"), ("image", "text")),
    "icl": (("image_emb", "text_emb"), ("image", "text", "icl_logit_scale")),
    "mfd": (("image_emb", "text_emb"), ("image", "text")),
    "gd": (("image_emb", "text_emb"), ("image", "text")),
    "afd": (("image_emb", "text_emb"), ("0.image", "0.text", "1.image", "1.text", "1.logit_scale")),
    "cross": (("image_emb", "text_emb"), ("image", "text", "icl_logit_scale")),
    "hidden": (("image_hidden_0", "text_hidden_0"), ("0", "1")),
}


@pytest.mark.parametrize("name", list(NEEDS))
def test_a_term_alone_reads_and_trains_what_it_needs_and_nothing_else(name):
    settings = [setting for setting in OFF if not setting.startswith(f"{name}=")]
    step = step_of(*settings, f"{name}=1", *(BLOCKS if name == "hidden" else ()))
    fields, heads = NEEDS[name]
    assert step.recipe.fields == fields
    names = [] if step.heads is None else [key for key, _ in step.heads.named_parameters()]
    short = {
        key.removeprefix("heads.").removeprefix("maps.").removesuffix(".weight").removesuffix(".bias")
        for key in names
    }
    assert short == set(heads)
    kept = {key: rows for key, rows in batch_of().items() if key in ("image", "text", "logit_scale", *fields)}
    kept |= {"mask_noise": batch_of()["mask_noise"]} if name == "mfd" else {}
    total, terms, _ = step(kept, NOW)
    assert set(terms) == {name}
    total.backward()
    assert [key for key, p in step.named_parameters() if key.startswith("heads") and p.grad is None] == []


def test_a_weight_of_zero_computes_neither_masks_nor_blocks(monkeypatch):
    monkeypatch.setattr(TwoTower, "_masked", lambda *_: pytest.fail("a masked forward"))
    outputs = step_of().student(batch_of())
    assert set(outputs) == {"image", "text", "scale"}


def test_every_parameter_is_trained_by_all_terms_together():
    step = step_of(*ALL)
    total, terms, notes = step(batch_of(), NOW)
    assert set(terms) == {"task", "crd", "fd", "icl", *NEW}
    torch.testing.assert_close(total, sum(terms.values()))
    torch.testing.assert_close(notes["gd_share"], terms["gd"] / total)
    assert 0 < notes["gd_share"] < 1
    total.backward()
    assert [key for key, p in step.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


# ----------------------------------------------------------------------------------------------------
# Each term from what the recipe is given, against loops, value and gradient


def given(width: int = 5, teacher_width: int = 5) -> tuple[dict, dict]:
    """Outputs and fields in float64; the recipe narrows them to float32 itself."""
    random = torch.Generator().manual_seed(2)

    def rows(size: int) -> torch.Tensor:
        return (3 * torch.randn(4, size, generator=random)).requires_grad_()

    student = {name: rows(width) for name in ("image", "text")}
    student |= {f"{name}_in_teacher_space": rows(teacher_width) for name in ("image", "text", "masked_image")}
    student |= {"image_block_1:image_hidden_3": rows(7), "image_block_2:image_hidden_3": rows(7)}
    student |= {"text_block_0:text_hidden_1": rows(6)}
    student |= {
        name: torch.tensor(value, requires_grad=True)
        for name, value in (("scale", 8.0), ("icl_scale", 11.0), ("fused_scale", 5.0))
    }
    batch = {f"{name}_emb": rows(teacher_width) for name in ("image", "text")}
    batch |= {"image_hidden_3": rows(7), "text_hidden_1": rows(6), "logit_scale": torch.tensor(2.5)}
    return student, batch


def check(ours: torch.Tensor, theirs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """The same value and the same gradient in every input, none of it zero."""
    torch.testing.assert_close(ours, theirs.reshape(()), rtol=1e-4, atol=1e-6)
    left = torch.autograd.grad(ours, list(inputs.values()))
    right = torch.autograd.grad(theirs.reshape(()), list(inputs.values()))
    for name, a, b in zip(inputs, left, right, strict=True):
        assert b.abs().max() > 1e-7, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_mfd_is_fd_of_the_masked_rows():
    student, batch = given()
    recipe = recipe_of(*OFF, "mfd=3")
    ours = recipe.loss(student, batch, recipe.constants, NOW)[0]["mfd"]
    inputs = {name: student[name] for name in ("masked_image_in_teacher_space", "text_in_teacher_space")}
    V, S = (unit(rows) for rows in inputs.values())
    V_T, S_T = unit(batch["image_emb"]), unit(batch["text_emb"])
    check(ours, 3 * (mean_square(V, V_T) + mean_square(S, S_T)), inputs)


def test_hidden_is_the_mean_over_pairs_of_blocks_and_the_sum_of_both_towers():
    student, batch = given()
    recipe = recipe_of(*OFF, "hidden=3", "hidden_image=1:3, 2:3", "hidden_text=0:1")
    ours = recipe.loss(student, batch, recipe.constants, NOW)[0]["hidden"]
    names = ("image_block_1:image_hidden_3", "image_block_2:image_hidden_3", "text_block_0:text_hidden_1")
    first, second, text = (unit(student[name]) for name in names)
    image_T, text_T = unit(batch["image_hidden_3"]), unit(batch["text_hidden_1"])
    of_image = (mean_square(first, image_T) + mean_square(second, image_T)) / 2
    check(ours, 3 * (of_image + mean_square(text, text_T)), {name: student[name] for name in names})
    alone = recipe_of(*OFF, "hidden=3", "hidden_text=0:1")
    found = alone.loss(student, batch, alone.constants, NOW)[0]["hidden"]
    torch.testing.assert_close(found, 3 * mean_square(text, text_T))


@pytest.mark.parametrize("width", [64, 16])
def test_afd_is_clip_loss_of_fused_rows(width):
    """A = norm(W [V'; V_T]) by hand from weights and rows, for equal widths and for those where released code fails."""
    step = step_of(*OFF, "afd=2", shapes={"image_emb": (width,), "text_emb": (width,)})
    space, fusion = (step.heads.heads[i] for i in (0, 1))
    random = torch.Generator().manual_seed(3)
    raw = {name: torch.randn(4, 64, generator=random).requires_grad_() for name in ("image", "text")}
    batch = {f"{name}_emb": torch.randn(4, width, generator=random) for name in ("image", "text")}
    outputs = raw | step.heads(raw | batch)
    ours = step.recipe.loss(outputs | {"scale": torch.tensor(1.0)}, batch, step.recipe.constants, NOW)[0][
        "afd"
    ]

    def fused(name: str) -> torch.Tensor:
        mapped, fuse = getattr(space, name), getattr(fusion, name)
        own = [row if width == 64 else mapped.weight @ row + mapped.bias for row in raw[name]]
        pairs = [
            torch.cat([a, b]) for a, b in zip(unit(torch.stack(own)), unit(batch[f"{name}_emb"]), strict=True)
        ]
        return unit(torch.stack([fuse.weight @ pair + fuse.bias for pair in pairs]))

    theirs = 2 * loop_clip(list(fused("image")), list(fused("text")), fusion.logit_scale.exp()[0])
    heads = dict(step.heads.named_parameters())
    assert len(heads) == (5 if width == 64 else 9)
    check(ours, theirs, raw | heads)
    assert (fusion.image.in_features, fusion.image.out_features) == (2 * width, width)


@pytest.mark.parametrize("name", ["gd", "cross"])
def test_gd_and_cross_compare_rows_in_the_width_of_the_teacher(name):
    from student import losses

    student, batch = given(width=9)
    recipe = recipe_of(*OFF, f"{name}=2")
    ours = recipe.loss(student, batch, recipe.constants, NOW)[0][name]
    function = {"gd": losses.gd_loss, "cross": losses.cross_kd_loss}[name]
    scale = {"gd": "scale", "cross": "icl_scale"}[name]
    V, S, V_T, S_T = (
        unit(rows)
        for rows in (
            student["image_in_teacher_space"],
            student["text_in_teacher_space"],
            *list(batch.values())[:2],
        )
    )
    expected = 2 * function(V, S, student[scale], V_T, S_T, batch["logit_scale"].exp())
    check(
        ours,
        expected,
        {key: student[key] for key in ("image_in_teacher_space", "text_in_teacher_space", scale)},
    )


# ----------------------------------------------------------------------------------------------------
# The masked forward


def masked_by_hand(model, images: torch.Tensor, kept: list[list[int]]) -> torch.Tensor:
    """Each picture alone through a ViT, from the class token and the patches that are kept."""
    visual, found = model.visual, []
    for image, places in zip(images, kept, strict=True):
        patches = visual.conv1(image[None]).flatten(2)[0].T  # [16, width]
        positions = visual.positional_embedding
        tokens = [visual.class_embedding + positions[0], *(patches[i] + positions[i + 1] for i in places)]
        hidden = visual.transformer(visual.ln_pre(torch.stack(tokens)[None]))
        found.append(visual.ln_post(hidden)[0, 0] @ visual.proj)
    return torch.stack(found)


@pytest.mark.parametrize(("ratio", "num"), [(0.75, 4), (0.5, 8), (0.25, 12), (0.99, 1), (0.0, 16)])
def test_the_masked_forward_sees_the_class_token_and_the_patches_of_highest_noise(ratio, num):
    torch.manual_seed(0)
    student = build_two_tower("vit-micro")
    add_masked_output(student, ratio)
    assert student.row_inputs.mask_noise == PATCHES
    outputs = student(batch_of())
    kept = [
        sorted(range(PATCHES), key=lambda i, row=row: -float(row[i]))[:num]
        for row in batch_of()["mask_noise"]
    ]
    assert len({tuple(places) for places in kept}) > 1  # another mask for each picture
    expected = masked_by_hand(student.model, batch_of()["image"], kept)
    torch.testing.assert_close(outputs["masked_image"], expected, rtol=1e-4, atol=1e-5)
    plain = build_two_tower("vit-micro")
    plain.load_state_dict(student.state_dict())
    assert torch.equal(outputs["image"], plain(batch_of())["image"])  # the other terms see whole pictures
    hooks = student.model.visual.patch_dropout._forward_hooks
    assert not hooks  # evaluation and export see none of it


def test_a_patch_that_is_left_out_counts_for_nothing():
    student = build_two_tower("vit-micro")
    add_masked_output(student, 0.75)
    batch = batch_of()
    batch["mask_noise"] = (
        torch.arange(PATCHES).float().expand(COUNT, -1)
    )  # the last four are kept: the lowest row
    changed = batch | {"image": batch["image"].clone()}
    changed["image"][:, :, :24] = 0
    assert torch.equal(student(batch)["masked_image"], student(changed)["masked_image"])
    changed["image"][:, :, 24:] = 0
    assert not torch.equal(student(batch)["masked_image"], student(changed)["masked_image"])


def test_open_clips_own_patch_dropout_does_not_come_on_top():
    cfg = {**TINY["vit-micro"], "vision_cfg": {**TINY["vit-micro"]["vision_cfg"], "patch_dropout": 0.5}}
    model, preprocess = build_module(cfg, {})
    student = TwoTower(model, cfg, preprocess, None).train()
    add_masked_output(student, 0.5)
    kept = batch_of()["mask_noise"].topk(8, dim=1).indices.tolist()
    expected = masked_by_hand(model, batch_of()["image"], kept)
    torch.testing.assert_close(student(batch_of())["masked_image"], expected, rtol=1e-4, atol=1e-5)


def test_keep_patches_keeps_the_order_of_rows():
    tokens = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    found = keep_patches(tokens, torch.tensor([[2, 0], [1, 2]]))
    assert torch.equal(found[0], tokens[0, [0, 3, 1]])
    assert torch.equal(found[1], tokens[1, [0, 2, 3]])


@pytest.mark.parametrize("model", ["RN50", "timm"])
def test_a_tower_without_patches_cannot_be_masked(model):
    vision = {
        "RN50": {"layers": [1, 1, 1, 1], "width": 16},
        "timm": {"timm_model_name": "mobilenetv3_small_050"},
    }
    vision = {"image_size": 32, "timm_pool": "avg", "timm_proj": "linear", **vision[model]}
    cfg = {**TINY["vit-micro"], "vision_cfg": vision}
    module, preprocess = build_module(cfg, {})
    with pytest.raises(
        UserError, match=r"masking needs patches, which \w+ does not have: .* or --set mfd=0$"
    ):
        add_masked_output(TwoTower(module, cfg, preprocess, None), 0.5)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 2.0])
def test_a_mask_ratio_that_is_none(ratio):
    with pytest.raises(UserError, match=f"mask_ratio={ratio:g}: a share"):
        add_masked_output(build_two_tower("vit-micro"), ratio)


# ----------------------------------------------------------------------------------------------------
# Inner blocks


def test_blocks_are_what_a_teacher_of_the_same_weights_stores_as_hidden():
    from teachercache.teachers.clip.layers import Taps, picture_fields, text_fields

    student = build_two_tower("vit-tiny").eval()
    add_block_outputs(student, ["image_block_1", "image_block_3", "text_block_0"])
    assert student.block_widths == {"image_block_1": 256, "image_block_3": 256, "text_block_0": 192}
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 1000, (2, 16))
    outputs = student({"image": images, "text": ids})
    taps = Taps(embeddings=False, image_layers=(1, 3), text_layers=(0,))
    said = picture_fields(student.model, images, taps) | text_fields(student.model, ids, taps)
    for name, value in said.items():
        assert torch.equal(outputs[name.replace("hidden", "block")], value)


def test_blocks_of_a_resnet_are_its_stages():
    """Heterogeneous pairs of the paper's Fig. 2: a ResNet's stage, mean over positions, learns a ViT's block."""
    cfg = {**TINY["vit-micro"], "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}}
    model, preprocess = build_module(cfg, {})
    student = TwoTower(model, cfg, preprocess, build_two_tower("vit-micro").tokenizer)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    add_block_outputs(student, ["image_block_1", "image_block_3"])
    assert student.block_widths == {"image_block_1": 128, "image_block_3": 512}
    assert all(
        torch.equal(value, state[name]) for name, value in student.state_dict().items()
    )  # no batch norm moved
    assert student.training
    outputs = student(batch_of())
    assert outputs["image_block_3"].shape == (COUNT, 512)


def test_pairs_of_blocks_are_read_in_one_way():
    constants = dataclasses.replace(
        CLIP_KD.constants, hidden=1.0, hidden_image=" 3:7, 5:11,3:7", hidden_text="1:11"
    )
    assert block_pairs(constants) == [
        ("image_block_3", "image_hidden_7"),
        ("image_block_5", "image_hidden_11"),
        ("text_block_1", "text_hidden_11"),
    ]
    assert recipe_of("hidden=1", "hidden_image=0:7,0:3").fields == (
        "image_emb",
        "text_emb",
        "image_hidden_7",
        "image_hidden_3",
    )
    assert recipe_of("hidden_image=0:7").fields == ("image_emb", "text_emb")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hidden=1"], "--set hidden needs blocks: --set hidden_image=3:7"),
        (
            ["hidden=1", "hidden_image=3"],
            "--set hidden_image=3: pairs of blocks STUDENT:TEACHER are expected, as 3:7",
        ),
        (["hidden=1", "hidden_text=-1:2"], "--set hidden_text=-1:2: pairs"),
        (["hidden=1", "hidden_image=4:0"], "--set hidden_image: the student has no block 4, only 1 from 0"),
        (
            ["hidden=1", "hidden_image=0:9"],
            "has no field image_hidden_9: run `tc build --teacher clip-lite --outputs "
            "embeddings,hidden:9 --data",
        ),
        (["mfd=1", "mask_ratio=1"], "--set mask_ratio=1: a value of type float from 0 to below 1"),
        (["ensemble=both"], "--set ensemble=both: choose from average, concat"),
    ],
)
def test_what_cannot_be_done_is_one_line(settings, words, squares, hidden_cache, tmp_path, capsys):
    options = [word for setting in settings for word in ("--set", setting)]
    assert train_here(squares, hidden_cache, tmp_path / "run", "--dry-run", *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("setting", ["mask_ratio=0.5", "hidden_image=0:0", "hidden_text=0:0"])
def test_a_setting_that_does_nothing_is_said(setting, capsys):
    build(recipe_of(setting))
    name = setting.partition("=")[0]
    assert f"WARNING: --set {name} does nothing while" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# What the released code got wrong


def test_mfd_is_no_second_fd():
    terms = step_of("fd=2000", "mfd=2000")(batch_of(), NOW)[1]
    assert (terms["mfd"] - terms["fd"]).abs() > 1e-3 * terms["fd"]
    again = step_of("fd=2000", "mfd=2000")(
        batch_of() | {"mask_noise": batch_of()["mask_noise"].flip(1)}, NOW
    )[1]
    assert torch.equal(again["fd"], terms["fd"])
    assert not torch.equal(again["mfd"], terms["mfd"])  # the masked pictures are seen
    whole = step_of("fd=2000", "mfd=2000", "mask_ratio=0")(batch_of(), NOW)[1]
    torch.testing.assert_close(whole["mfd"], whole["fd"], rtol=1e-4, atol=0)


def test_the_picture_tower_learns_from_masked_pictures():
    step = step_of(*OFF, "mfd=1")
    step(batch_of(), NOW)[0].backward()
    assert step.student.model.visual.conv1.weight.grad.abs().sum() > 0


def test_scales_are_exp_of_their_parameters():
    step = step_of("afd=1", "cross=1")
    notes = step(batch_of(), NOW)[2]
    for name in ("icl_scale", "fused_scale"):
        assert float(notes[name]) == pytest.approx(1 / 0.07)
    before = step(batch_of(), NOW)[1]
    for name, parameter in step.heads.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data -= 1
    after = step(batch_of(), NOW)
    assert float(after[2]["fused_scale"]) == pytest.approx(1 / 0.07 / torch.e)
    for name in ("icl", "cross", "afd"):
        assert (after[1][name] - before[name]).abs() > 1e-3
    assert torch.equal(after[1]["crd"], before["crd"])


# ----------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def hidden_cache(squares, teacher_folder, tmp_path_factory):
    """Embeddings and the last block of each tower."""
    out = tmp_path_factory.mktemp("hidden") / "tiny.zarr"
    return build_cache(squares, teacher_folder, out, outputs=("embeddings", "hidden"))


@pytest.fixture(scope="module")
def second_cache(squares, tmp_path_factory):
    """What a wider teacher says."""
    folder = tmp_path_factory.mktemp("second")
    teacher = save_teacher(folder / "teacher", {**TINY_CFG, "embed_dim": 24}, seed=7)
    return build_cache(squares, teacher, folder / "second.zarr", outputs=("embeddings", "hidden"))


SETTINGS = [word for setting in ALL for word in ("--set", setting)]


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor. is deprecated:FutureWarning")
@pytest.mark.parametrize(("teachers", "stage"), [(1, 0), (1, 3), (2, 0), (2, 2)])
def test_all_terms_resume_to_the_last_bit(
    teachers, stage, squares, hidden_cache, second_cache, tmp_path, monkeypatch
):
    name = "own_recipes:STOPPING"
    cache = hidden_cache if teachers == 1 else f"{hidden_cache},{second_cache}"
    words = ("--steps", 4, "--set", f"run.zero={stage}", *SETTINGS)
    assert train_here(squares, cache, tmp_path / "whole", *words, recipe=name) == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "1")
    assert train_here(squares, cache, tmp_path / "run", *words, recipe=name) == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train_here(squares, cache, tmp_path / "run", *words, "--resume", recipe=name) == 0
    whole = read_lines(tmp_path / "whole")
    assert read_lines(tmp_path / "run") == whole
    assert set(NEW) < set(whole[0])
    for line in whole:
        terms = {key: line[key] for key in ("task", "crd", "fd", "icl", *NEW)}
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
        assert line["gd_share"] == pytest.approx(line["gd"] / line["loss"], rel=1e-4)


def test_masks_change_with_the_epoch_and_not_with_the_step_alone(squares, hidden_cache, tmp_path):
    """Noise is drawn by seed, epoch and row: a row has another mask in each epoch."""
    from student.inputs.caches import training_rows
    from student.inputs.order import StepPlan
    from student.inputs.pairs import PairBatches, TeacherFields
    from teachercache.cache import store
    from teachercache.data.read import read_manifest

    recipe = recipe_of("mfd=1")
    student = build(recipe)
    manifest, opened = read_manifest(str(squares)), store.open_complete(hidden_cache)
    rows = training_rows(manifest, opened)
    parts = [
        PairBatches(
            manifest,
            rows,
            student.row_inputs,
            StepPlan(48 // world, steps=4, seed=0),
            teachers=TeacherFields((opened,), recipe.fields),
        )
        for world in (1, 2)
    ]
    whole = [
        dict(zip(parts[0].order.rows_of(s).tolist(), parts[0][s]["mask_noise"], strict=True))
        for s in range(2)
    ]
    assert all(not torch.equal(whole[0][row], whole[1][row]) for row in rows.tolist())
    for a, b in itertools.combinations(rows.tolist(), 2):
        assert not torch.equal(whole[0][a], whole[0][b])
    half = parts[1]
    halves = {
        row: noise
        for s in range(2)
        for row, noise in zip(half.order.rows_of(s).tolist(), half[s]["mask_noise"], strict=True)
    }
    assert all(torch.equal(halves[row], whole[0][row]) for row in halves)  # whatever batch a row is in


def test_hidden_live_is_hidden_of_the_cache(squares, hidden_cache, tmp_path):
    words = ("--steps", 1, *SETTINGS)
    assert train_here(squares, hidden_cache, tmp_path / "cached", *words) == 0
    assert train_here(squares, hidden_cache, tmp_path / "live", *words, "--live") == 0
    cached, live = read_lines(tmp_path / "cached")[0], read_lines(tmp_path / "live")[0]
    assert cached.keys() == live.keys()
    for name in ("hidden", "mfd", "afd", "cross"):
        assert live[name] == pytest.approx(cached[name], rel=2e-3), name


def test_the_task_alone_needs_no_cache(squares, tmp_path):
    words = [word for name in ("crd", "fd", "icl") for word in ("--set", f"{name}=0")]
    assert train_here(squares, tmp_path / "none", tmp_path / "run", "--steps", 1, *words) == 0
    assert set(read_lines(tmp_path / "run")[0]) == {"step", "loss", "task", "scale", "lr"}


def test_micro_batches_give_the_losses_of_the_whole_batch(squares, hidden_cache, second_cache, tmp_path):
    """Masks come with the rows, and heads see a micro-batch's fields alone."""
    for name, more in (("whole", ()), ("parts", ("--micro-batch", 2))):
        words = ("--steps", 2, *SETTINGS, *more)
        assert train_here(squares, f"{hidden_cache},{second_cache}", tmp_path / name, *words) == 0
    whole, parts = (read_lines(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        assert all(b[name] == pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in a.items())
