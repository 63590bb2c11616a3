"""Region features against loops by hand and torchvision's own detector; boxes of rows on their way to the teacher."""

import copy
import json
import math
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbed import run_build
from PIL import Image
from safetensors.torch import save_file
from small import error_of, make_folder, run
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from teachercache.build.decode import WorkItem
from teachercache.build.forward import rows_for
from teachercache.build.verify import verify_cache
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest
from teachercache.teachers import regions
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher
from teachercache.teachers.weights import digest_weights

BOXES = [[[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.3, 0.25]], [[0.4, 0.4, 0.45, 0.45], [0.2, 0.0, 1.0, 1.0]]]


@pytest.fixture(scope="module")
def lite() -> Teacher:
    return load("regions-lite")


@pytest.fixture(scope="module")
def detector() -> Teacher:
    """Faster R-CNN at a small size, of weights that are sure of what they see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(regions.VIEWS, "regions", regions.VIEWS["regions"] | {"size": 128})
        teacher = load("regions", weights="random:0", outputs=("regions:6",))
    predictor = teacher.module.roi_heads.box_predictor
    predictor.cls_score.weight.mul_(400)
    return teacher


def inputs_for(teacher: Teacher, counts: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    pictures = torch.randn(len(counts), 3, *teacher.spec.view["size"])
    boxes = torch.zeros(len(counts), teacher.spec.view["boxes"], 4)
    for i, count in enumerate(counts):
        boxes[i, :count] = torch.tensor(BOXES[i % 2][:count]).reshape(-1, 4)
    return {"image": pictures, "boxes": boxes, "num_boxes": torch.tensor(counts)}


def said(teacher: Teacher, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = teacher.encode(teacher.module, inputs)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in found.items()} == {
        field.name: field.shape for field in teacher.spec.fields
    }
    return found


# ----------------------------------------------------------------------------------------------------
# regions-lite


def bilinear(level: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The value [width] of a map between its cells' centres, those at the border reaching half a cell further."""
    down, across = level.shape[1:]
    y, x = min(max(y, 0.0), down - 1), min(max(x, 0.0), across - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, down - 1), min(left + 1, across - 1)
    upper = level[:, top, left] * (left + 1 - x) + level[:, top, right] * (x - left)
    lower = level[:, bottom, left] * (left + 1 - x) + level[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)


def mean_over(level: torch.Tensor, box: list[float]) -> torch.Tensor:
    """The mean of 4 x 4 samples spread evenly over a box, given as shares."""
    down, across = level.shape[1:]
    values = []
    for i in range(4):
        for j in range(4):
            y = (box[1] + (i + 0.5) / 4 * (box[3] - box[1])) * down - 0.5
            x = (box[0] + (j + 0.5) / 4 * (box[2] - box[0])) * across - 0.5
            values.append(bilinear(level, y, x))
    return torch.stack(values).mean(0)


def test_lite_against_a_loop(lite):
    inputs = inputs_for(lite, [2, 0, 1])
    found = said(lite, inputs)
    tokens = [lite.module.conv_stem(inputs["image"])]
    tokens = [lite.module.bn1(tokens[0])]
    for stage in lite.module.blocks:
        tokens.append(stage(tokens[-1]))
    levels = [tokens[3], tokens[5], tokens[7]]
    assert [level.shape[1:] for level in levels] == [(40, 20, 20), (112, 10, 10), (320, 5, 5)]
    quarters = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    for i, boxes in enumerate((BOXES[0], quarters, BOXES[0][:1])):
        expected = [[0, 0, 1, 1], *boxes]
        np.testing.assert_allclose(found["region_box"][i, : len(expected)], expected, atol=1e-6)
        assert not found["region_box"][i, len(expected) :].any()
        assert not found["region_feature"][i, len(expected) :].any()
        for j, box in enumerate(expected):
            by_hand = torch.cat([mean_over(level[i], box) for level in levels])
            torch.testing.assert_close(found["region_feature"][i, j], by_hand, rtol=1e-3, atol=1e-3)
            assert by_hand.abs().max() > 0.1


def test_lite_is_the_tower_of_clip_lite(lite):
    tower = load("clip-lite-towers").module.visual.trunk.state_dict()
    own = lite.module.state_dict()
    assert [*own] == [*tower]
    assert all(torch.equal(own[name], tower[name]) for name in own)


# ----------------------------------------------------------------------------------------------------
# Faster R-CNN


def whole_detector(module: nn.Module, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """torchvision's own way through the whole module; pictures come as it would have made them."""
    before, module.transform = module.transform, GeneralizedRCNNTransform(128, 128, [0.0] * 3, [1.0] * 3)
    try:
        with torch.inference_mode():
            return module([*images])
    finally:
        module.transform = before


def test_detections_are_torchvisions(detector):
    inputs = inputs_for(detector, [0, 2, 0])
    found = said(detector, inputs)
    expected = whole_detector(detector.module, inputs["image"])
    for i in (0, 2):
        assert len(expected[i]["boxes"]) > 5  # there is something to choose from
        best = expected[i]["scores"][:5]
        assert (best.diff() <= 0).all()
        torch.testing.assert_close(
            found["region_box"][i, 1:], expected[i]["boxes"][:5] / 128, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(found["region_score"][i, 1:], best, rtol=1e-4, atol=1e-5)
        assert found["region_label"][i].tolist() == [0, *expected[i]["labels"][:5].tolist()]
        np.testing.assert_allclose(found["region_box"][i, 0], [0, 0, 1, 1])
    assert found["region_score"][:, 0].tolist() == [0, 0, 0]


def test_given_boxes_one_by_one(detector):
    """Pyramid level by Faster R-CNN's rule, then the box head, for each box alone."""
    inputs = inputs_for(detector, [2, 1])
    found = said(detector, inputs)
    heads = detector.module.roi_heads
    with torch.inference_mode():
        levels = detector.module.backbone(inputs["image"])
        for i, boxes in enumerate((BOXES[0], BOXES[1][:1])):
            for j, box in enumerate([[0, 0, 1, 1], *boxes]):
                pixels = torch.tensor([[value * 128.0 for value in box]])
                side = math.sqrt((box[2] - box[0]) * (box[3] - box[1])) * 128
                level = int(min(max(math.floor(4 + math.log2(side / 224)), 2), 5)) - 2
                alone = {str(level): levels[str(level)][i : i + 1]}
                scale = alone[str(level)].shape[-1] / 128
                pooled = regions.roi_align(alone[str(level)], [pixels], 7, scale, sampling_ratio=2)
                feature = heads.box_head(pooled)
                torch.testing.assert_close(found["region_feature"][i, j], feature[0], rtol=1e-4, atol=5e-5)
                chances = heads.box_predictor(feature)[0][0].softmax(0)[1:]
                if j:
                    assert found["region_label"][i, j] == chances.argmax() + 1
                    torch.testing.assert_close(
                        found["region_score"][i, j], chances.max(), rtol=1e-4, atol=1e-5
                    )
            for name in ("region_feature", "region_box", "region_score", "region_label"):
                assert not found[name][i, 1 + len(boxes) :].any()


def test_half_precision_finds_the_same_regions(detector):
    inputs = inputs_for(detector, [2])
    exact = said(detector, inputs)
    module = copy.deepcopy(detector.module).to(torch.bfloat16)
    with torch.inference_mode():
        found = detector.encode(module, inputs | {"image": inputs["image"].bfloat16()})
        detected = detector.encode(
            module, inputs | {"image": inputs["image"].bfloat16(), "num_boxes": torch.tensor([0])}
        )
    assert torch.equal(found["region_box"], exact["region_box"])
    cosine = nn.functional.cosine_similarity(found["region_feature"].float(), exact["region_feature"], dim=2)
    assert cosine[0, :3].min() > 0.99
    assert detected["region_box"].dtype == torch.float32


def test_weights_by_file(detector, tmp_path, monkeypatch):
    monkeypatch.setitem(regions.VIEWS, "regions", regions.VIEWS["regions"] | {"size": 128})
    state = detector.module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    inputs = inputs_for(detector, [2])
    for name in ("w.safetensors", "w.pth"):
        teacher = load("regions", weights=str(tmp_path / name), outputs=("regions:6",))
        assert teacher.spec.digest == digest_weights(detector.module)
        assert teacher.module.backbone.body.bn1.eps == 0  # as torchvision has it with its checkpoint
        torch.testing.assert_close(
            said(teacher, inputs)["region_feature"],
            said(detector, inputs)["region_feature"],
            rtol=1e-2,
            atol=1e-3,
        )
    save_file(state | {"backbone.body.bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "w.safetensors")
    assert load("regions", weights=str(tmp_path / "w.safetensors")).module.backbone.body.bn1.eps == 1e-5
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", lambda self, **how: dict(state))
    assert load("regions").spec.weights == "pretrained"


def no_network(self, **how):
    raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize(
    ("weights", "outputs", "says"),
    [
        ("pretrained", ("regions",), "no route to host>). Pass --weights FILE"),
        ("random:x", ("regions",), "write random:SEED"),
        ("nowhere.pth", ("regions",), "--weights nowhere.pth: no such file"),
        ("odd.safetensors", ("regions",), "odd.safetensors is not readable as weights"),
        ("other.safetensors", ("regions",), "is not of torchvision's fasterrcnn_resnet50_fpn"),
        ("random:0", ("regions:1",), "write regions, or regions:N"),
        ("random:0", ("regions:",), "write regions, or regions:N"),
        ("random:0", ("regions", "regions:4"), "write regions, or regions:N"),
        ("random:0", ("embeddings",), "has no output 'embeddings': choose from regions"),
    ],
)
def test_what_cannot_be_loaded(weights, outputs, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", no_network)
    Path("odd.safetensors").write_bytes(b"odd")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(UserError) as error:
        load("regions", weights=weights, outputs=outputs)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------
# Boxes of rows


def vcr_folder(folder: Path, boxes: list) -> Path:
    """Rows of one turned picture of 40 x 20 pixels as a person sees it, each with its boxes; one of no picture."""
    images = folder / "vcr1images/m"
    images.mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(images / "a.jpg", exif=exif, quality=95)
    lines = []
    for number, given in enumerate(boxes):
        (images / f"{number}.json").write_text(json.dumps({"boxes": given}))
        lines.append(
            {
                "objects": ["person"] * 9,
                "img_fn": "m/a.jpg" if number else "m/none.jpg",
                "annot_id": f"val-{number}",
                "metadata_fn": f"m/{number}.json",
                "question": ["Who", [0], "?"],
                "answer_choices": [["a"], ["b"], [" "], ["d"]],
                "answer_label": 0,
            }
        )
    path = folder / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_boxes_are_shares_of_the_picture_as_a_person_sees_it(lite, tmp_path):
    many = [[i, 0, 40, 20, 0.9] for i in range(12)]
    data = vcr_folder(tmp_path, [[], [[4, 5, 20, 15, 0.9], [30, -3, 99, 20, 1]], [], many, [[5, 5, 4, 6, 1]]])
    rows = rows_for(lite, read_manifest(str(data)))
    batch = rows.__getitems__(WorkItem((0, 1, 2, 3, 4)))
    assert batch["num_boxes"][batch["image_at"]].tolist() == [0, 2, 0, 9, 0]
    boxes = batch["boxes"][batch["image_at"]]
    np.testing.assert_allclose(boxes[1, :2], [[0.1, 0.25, 0.5, 0.75], [0.75, 0, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(
        boxes[3, :, 0], np.arange(9) / 40, atol=1e-6
    )  # what is above the limit is left out
    assert [entry["reason"] for entry in batch["problems"]][1] == "box 1 of the row is not x1, y1, x2, y2"
    rows.at_least = 5  # decoded at a quarter of its size
    again = rows.__getitems__(WorkItem((1,)))
    assert torch.equal(again["boxes"][0], boxes[1])
    assert len(batch["image"][0]) == 5
    assert len(rows.__getitems__(WorkItem((2, 3, 2)))["image"][0]) == 2  # the same boxes of the same picture


def test_a_cache_of_regions(lite, tmp_path):
    """Over data that has texts: none of them is looked at, a row without any is none that can be used."""
    data = vcr_folder(tmp_path, [[], [[4, 5, 20, 15, 0.9]], [], [[4, 5, 20, 15, 0.9]]])
    run_build(lite, data, tmp_path / "c.zarr")
    cache = store.open_complete(tmp_path / "c.zarr")
    assert [field.name for field in cache.meta.spec.fields] == ["region_feature", "region_box"]
    features, boxes = (store.read_field(cache, name) for name in ("region_feature", "region_box"))
    assert store.read_field(cache, "valid").tolist() == [False, True, True, True]
    assert store.read_field(cache, "text_valid").shape == (4, 9)
    assert (features.shape, boxes.dtype) == ((4, 10, 472), np.float32)
    assert not features[0].any()
    assert np.array_equal(features[1], features[3])
    assert np.array_equal(features[1][0], features[2][0])  # the whole picture is the same
    assert not np.allclose(features[1][1], features[2][1], atol=1e-2)
    assert boxes[:, 1:].any(2).sum(1).tolist() == [0, 1, 4, 1]
    assert verify_cache(tmp_path / "c.zarr", samples=4)["ok"]


def test_regions_at_the_command_line(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 3)
    where = ("--data", data, "--workers", 0)
    assert (
        run(
            "build",
            "--teacher",
            "regions-lite",
            *where,
            "--outputs",
            "regions:3",
            "--out",
            tmp_path / "c.zarr",
        )
        == 0
    )
    cache = store.open_complete(tmp_path / "c.zarr")
    assert cache.fields["region_box"].shape == (3, 4)
    assert "--outputs regions:3" in cache.command()
    says = "reads regions of the unaugmented image; leave --views away"
    assert says in error_of(
        capsys, "build", "--teacher", "regions-lite", *where, "--views", 2, "--out", tmp_path / "d.zarr"
    )
    assert "leave --weights away" in error_of(
        capsys, "build", "--teacher", "regions-lite", *where, "--weights", "random:0"
    )
    assert "write regions, or regions:N" in error_of(
        capsys, "build", "--teacher", "regions-lite", *where, "--outputs", "regions:0"
    )
    assert (
        run("build", "--teacher", "regions-lite", *where, "--out", tmp_path / "e.zarr") == 0
    )  # --outputs is regions
    assert "holds vectors: build another with" in error_of(capsys, "index", tmp_path / "e.zarr")
    from student.cli import main

    assert main(["eval", "regions-lite", "--task", "retrieval", "--data", str(data)]) == 2
    assert "regions-lite has no embeddings to evaluate" in capsys.readouterr().err
