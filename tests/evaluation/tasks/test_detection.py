"""COCO detection on a tiny set in COCO's format: the frozen tower, what learns, and pycocotools' numbers."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from own_encoder import ENCODER
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from small import TINY_CFG, save_teacher
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import maskrcnn_resnet50_fpn

from evaluation.data.coco_instances import (
    AVERAGES,
    ObjectImages,
    average_precisions,
    images_with_objects,
    objects_of,
    read_instances,
    results_of,
)
from evaluation.models.encoder import of_teacher
from evaluation.probes.mask_rcnn import ONE_X, Options, build_detector, mirrored, train
from evaluation.tasks.encoding import coco_detection
from student.cli import main
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import load

RESNET_CFG = {
    **TINY_CFG,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
COLORS = {3: (220, 30, 30), 7: (30, 60, 220)}  # category: color; the ids have gaps, as COCO's do
SHORT_RUN = Options(epochs=2, batch=2, lr=0.01, short_side=64, long_side=96, width=16, boxes=32)


def make_coco(root, pictures: int = 4, seed: int = 0):
    """Rectangles in the color of their category, polygons around them; a crowd and an object of no size in train."""
    random = np.random.default_rng(seed)
    for split, first in (("train", 100), ("val", 500)):
        (root / f"{split}2017").mkdir(parents=True)
        images, notes = [], []
        for number in range(first, first + pictures):
            name = f"{number:012d}.png"
            picture = Image.new("RGB", (72, 56), (120, 120, 120))
            for place, category in enumerate(random.permutation(list(COLORS))[: 1 + number % 2].tolist()):
                width, height = random.integers(14, 30, 2).tolist()
                x, y = place * 36 + random.integers(0, 6), random.integers(0, 56 - height)
                x, y = int(x), int(y)
                ImageDraw.Draw(picture).rectangle(
                    [x, y, x + width - 1, y + height - 1], fill=COLORS[category]
                )
                corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                note = {"id": len(notes) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                note |= {"bbox": [x, y, width, height], "area": width * height, "segmentation": [corners]}
                notes.append(note)
            picture.save(root / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "width": 72, "height": 56})
        if split == "train":
            flat = {"image_id": first, "category_id": 3, "iscrowd": 0, "bbox": [5, 5, 0, 9], "area": 0}
            notes.append({"id": 90, **flat, "segmentation": [[5, 5, 5, 14, 5, 9]]})
            crowd = {"size": [56, 72], "counts": [0, 56 * 10, 56 * 62]}
            notes.append(
                {
                    "id": 91,
                    "image_id": first,
                    "category_id": 7,
                    "iscrowd": 1,
                    "bbox": [0, 0, 10, 56],
                    "area": 560,
                    "segmentation": crowd,
                }
            )
            images.append({"id": 99, "file_name": "empty.png", "width": 72, "height": 56})
            Image.new("RGB", (72, 56)).save(root / "train2017" / "empty.png")
        categories = [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]
        (root / "annotations").mkdir(exist_ok=True)
        facts = {"images": images, "annotations": notes, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco") / "tiny")


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("resnet") / "rn-tiny", RESNET_CFG)


@pytest.fixture
def encoder(resnet_folder):
    return of_teacher(load(str(resnet_folder)))


def truth_as_found(instances, image: int, *, noise: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a detector would say that sees the truth, or nearly."""
    target = objects_of(instances, instances.coco.loadImgs([image])[0])
    draw = torch.Generator().manual_seed(seed + image)
    boxes = target["boxes"] + noise * torch.randn(target["boxes"].shape, generator=draw)
    masks = target["masks"][:, None].float()
    if noise:
        masks = masks.roll((1, 2), (2, 3))
    return {
        "boxes": boxes,
        "labels": target["labels"],
        "masks": masks,
        "scores": torch.rand(len(boxes), generator=draw),
    }


def all_results(instances, **words) -> list[dict]:
    found = [(image, truth_as_found(instances, image, **words)) for image in instances.images]
    return [result for image, said in found for result in results_of(image, said, instances.categories)]


# ----------------------------------------------------------------------------------------------------
# Scores


def test_a_perfect_prediction_scores_one(coco):
    truth = read_instances(coco, "val")
    found = average_precisions(truth, all_results(truth), truth.images)
    assert {
        name: found[name] for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP75", "segm_AP_small")
    } == {"bbox_AP": 1.0, "bbox_AP50": 1.0, "segm_AP": 1.0, "segm_AP75": 1.0, "segm_AP_small": 1.0}
    assert set(found) == {f"{kind}_{name}" for kind in ("bbox", "segm") for name in AVERAGES}
    assert (found["bbox_AP_large"], found["segm_AP_large"]) == (None, None)  # no such object: nothing, not 0


def test_a_wrong_class_scores_nothing(coco):
    truth = read_instances(coco, "val")
    turned = [{**result, "category_id": 10 - result["category_id"]} for result in all_results(truth)]
    assert average_precisions(truth, turned, truth.images)["bbox_AP"] < 0.1


def test_nothing_found_is_nothing_and_no_crash(coco):
    truth = read_instances(coco, "val")
    found = average_precisions(truth, [], truth.images)
    assert (found["bbox_AP"], found["segm_AP50"], found["bbox_AP_large"]) == (0.0, 0.0, None)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scores_are_those_of_torchmetrics(coco, kind):
    """Tensors as a detector gives them, straight into torchmetrics; ours go through COCO's results."""
    truth = read_instances(coco, "val")
    metric = MeanAveragePrecision(iou_type=kind)
    for image in truth.images:
        said = truth_as_found(truth, image, noise=2.0)
        target = objects_of(truth, truth.coco.loadImgs([image])[0])
        metric.update(
            [{**said, "masks": said["masks"][:, 0] > 0.5}], [{**target, "masks": target["masks"].bool()}]
        )
    expected = metric.compute()
    found = average_precisions(truth, all_results(truth, noise=2.0), truth.images)
    for ours, theirs in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75"), ("AP_small", "map_small")):
        assert found[f"{kind}_{ours}"] == pytest.approx(float(expected[theirs]), abs=1e-6)
    assert 0 < found[f"{kind}_AP"] < 1


def test_results_are_in_cocos_format(coco, tmp_path):
    """Through a file, as COCO's server takes them; pycocotools reads boxes and masks back as they were."""
    truth = read_instances(coco, "val")
    (tmp_path / "results.json").write_text(json.dumps(all_results(truth)))
    again = truth.coco.loadRes(str(tmp_path / "results.json"))
    assert len(again.anns) == len(truth.coco.anns) == 6
    for image in truth.images:
        said, wanted = again.imgToAnns[image], truth.coco.imgToAnns[image]
        for one, other in zip(said, wanted, strict=True):
            assert (one["category_id"], one["bbox"]) == (other["category_id"], other["bbox"])
            np.testing.assert_array_equal(again.annToMask(one), truth.coco.annToMask(other))


# ----------------------------------------------------------------------------------------------------
# What is learned from


def test_crowds_and_flat_objects_and_empty_pictures_are_not_learned(coco):
    learn = read_instances(coco, "train")
    assert sorted(images_with_objects(learn)) == [100, 101, 102, 103]
    assert 99 in learn.images
    assert len(objects_of(learn, learn.coco.loadImgs([100])[0])["labels"]) == 1


def test_targets_are_what_the_picture_shows(coco):
    learn = read_instances(coco, "train")
    pictures = ObjectImages(read_manifest(str(coco)), learn, images_with_objects(learn), targets=True)
    seen = set()
    for _, pixels, target in (pictures[i] for i in range(len(pictures))):
        for flip in (False, True):
            image, objects = mirrored(pixels, target) if flip else (pixels, target)
            for box, label, mask in zip(
                objects["boxes"].int().tolist(), objects["labels"], objects["masks"], strict=True
            ):
                color = torch.tensor(COLORS[[3, 7][int(label) - 1]]) / 255
                shown = (image == color[:, None, None]).all(0)
                assert torch.equal(shown, mask.bool())
                inside = torch.zeros_like(shown)
                inside[box[1] : box[3], box[0] : box[2]] = True
                assert torch.equal(shown, inside)
                seen.add((int(label), flip))
    assert len(seen) == 4


def test_the_schedule_is_mmdetections():
    """LinearLR over 500 steps from a thousandth, MultiStepLR at epochs 8 and 11, as torch steps them; 100 an epoch."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=ONE_X.lr)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=120)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [800, 1100], gamma=0.1)
    for step in range(1200):
        assert ONE_X.rate(step, 100) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        warmup.step()
        drops.step()
    assert (ONE_X.rate(499, 7330) < 0.02, ONE_X.rate(500, 7330)) == (True, 0.02)  # COCO's own size
    assert (ONE_X.epochs, ONE_X.batch, ONE_X.momentum, ONE_X.weight_decay) == (12, 16, 0.9, 1e-4)


# ----------------------------------------------------------------------------------------------------
# The detector


def test_the_tower_stays_to_the_last_bit_while_the_rest_learns(coco, encoder):
    learn = read_instances(coco, "train")
    pictures = ObjectImages(read_manifest(str(coco)), learn, images_with_objects(learn), targets=True)
    torch.manual_seed(0)
    detector = build_detector(encoder, 2, SHORT_RUN)
    tower = {name: value.clone() for name, value in encoder.tower.state_dict().items()}
    heads = {name: value.detach().clone() for name, value in detector.named_parameters()}
    assert train(detector, pictures, dataclasses.replace(SHORT_RUN, epochs=1), "cpu") == 2
    after = encoder.tower.state_dict()
    assert list(tower) == list(after)
    assert all(torch.equal(tower[name], value) for name, value in after.items())  # BatchNorm's statistics too
    assert not encoder.tower.training
    changed = {name for name, value in detector.named_parameters() if not torch.equal(heads[name], value)}
    for part in (
        "backbone.pyramid.",
        "rpn.",
        "roi_heads.box_head.",
        "roi_heads.box_predictor.",
        "roi_heads.mask_",
    ):
        assert any(name.startswith(part) for name in changed), part
    assert not {name for name in heads if name.startswith(("backbone.tower", "backbone.stages"))}


def test_the_pyramid_sees_the_towers_four_stages(encoder):
    detector = build_detector(encoder, 2, SHORT_RUN)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = detector.backbone.stages(images)
        found = encoder.tower.forward_intermediates(images, intermediates_only=True)
    for one, other in zip(maps, found["image_intermediates"][-4:], strict=True):
        torch.testing.assert_close(one, other)
    assert [tuple(one.shape[2:]) for one in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [one.shape[1] for one in maps] == [32, 64, 128, 256]
    pyramid = detector.backbone(images)
    assert [*pyramid] == ["0", "1", "2", "3", "pool"]
    assert {one.shape[1] for one in pyramid.values()} == {16}
    assert detector.transform.image_mean == [0.5] * 3  # the encoder's own


def test_its_own_sizes_are_those_of_torchvisions_mask_rcnn(encoder):
    """Parameter by parameter, of the same names and shapes but for the backbone's stages below the pyramid."""
    ours = {name: value.shape for name, value in build_detector(encoder, 80, ONE_X).named_parameters()}
    reference = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    theirs = {name: value.shape for name, value in reference.named_parameters()}
    heads = [name for name in theirs if name.startswith(("rpn", "roi_heads"))]
    assert {name: ours[name] for name in heads} == {name: theirs[name] for name in heads}
    assert sum(name.startswith("backbone.") for name in ours) == 16  # 2 x 4 convolutions and their biases
    assert len(ours) == len(heads) + 16


def test_the_task_runs_from_end_to_end_by_the_command(coco, resnet_folder, monkeypatch, capfd):
    monkeypatch.setattr(coco_detection, "ONE_X", SHORT_RUN)
    assert main(["eval", str(resnet_folder), "--task", "coco_detection", "--data", str(coco), "--json"]) == 0
    captured = capfd.readouterr()
    (result,) = json.loads(captured.out)["results"]  # and nothing else: pycocotools prints a lot
    assert (result["dataset"], result["task"]) == ("tiny", "coco_detection")
    metrics = result["metrics"]
    assert (metrics["num_images"], metrics["num_train"], metrics["num_steps"], metrics["num_skipped"]) == (
        4,
        4,
        4,
        0,
    )
    assert 0 <= metrics["bbox_AP"] <= metrics["bbox_AP50"] <= 1
    assert metrics["bbox_AP_large"] is None


def test_it_is_the_same_twice_and_leaves_the_random_state(coco, encoder):
    manifest, state = read_manifest(str(coco)), torch.get_rng_state()
    assert coco_detection.evaluate(encoder, manifest, SHORT_RUN) == coco_detection.evaluate(
        encoder, manifest, SHORT_RUN
    )
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_are_found_by_what_the_tower_sees(encoder, tmp_path):
    """Three short epochs find held-out rectangles; with a tower that says one thing of all, the same find nothing."""
    manifest = read_manifest(str(make_coco(tmp_path / "more", pictures=16)))
    calibrate(encoder.tower, [path for path in (tmp_path / "more").glob("train2017/0*.png")])
    options = dataclasses.replace(SHORT_RUN, epochs=3, lr=0.03, short_side=112, long_side=144, width=32)
    seeing = coco_detection.evaluate(encoder, manifest, options)
    for parameter in encoder.tower.parameters():
        parameter.data.zero_()
    blind = coco_detection.evaluate(encoder, manifest, options)
    for kind in ("bbox", "segm"):
        assert seeing[f"{kind}_AP50"] > 0.2  # .65 here; less on other processors
        assert blind[f"{kind}_AP50"] < 0.1


def calibrate(tower, paths) -> None:
    """BatchNorm's statistics and scales of a tower at random, so that every block says something of a picture."""
    pixels = np.stack([np.asarray(Image.open(path), np.float32) / 127.5 - 1 for path in paths])
    larger = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2), scale_factor=2)
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what comes
            torch.nn.init.ones_(module.weight)
    with torch.no_grad():
        tower.train().forward_intermediates(larger, intermediates_only=True)
    tower.eval()


def test_pictures_that_cannot_be_read_or_have_another_size_are_left_out(coco, encoder, tmp_path):
    root = shutil.copytree(coco, tmp_path / "damaged")
    (root / "val2017" / f"{500:012d}.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(root / "val2017" / f"{501:012d}.png")
    (root / "val2017" / f"{502:012d}.png").unlink()
    (root / "train2017" / f"{100:012d}.png").write_bytes(b"no picture")
    found = coco_detection.evaluate(encoder, read_manifest(str(root)), SHORT_RUN)
    assert (found["num_images"], found["num_skipped"]) == (1, 3)


def test_features_that_are_nan_are_an_error(coco, encoder):
    for parameter in encoder.tower.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(UserError, match="the detector's loss is nan at step 0"):
        coco_detection.evaluate(encoder, read_manifest(str(coco)), SHORT_RUN)


# ----------------------------------------------------------------------------------------------------
# Errors


def test_other_towers_are_refused(coco, teacher_folder):
    for other in (ENCODER, of_teacher(load(str(teacher_folder)))):
        with pytest.raises(
            UserError,
            match=r"needs a ResNet picture tower .*, which .* does not have: train one, `student train",
        ):
            coco_detection.evaluate(other, read_manifest(str(coco)), SHORT_RUN)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("annotations/instances_val2017.json", "no .*annotations/instances_val2017.json: pass COCO's folder"),
        ("val2017", "no folder .*val2017: put the pictures of instances_val2017.json there"),
    ],
)
def test_what_a_folder_lacks(gone, said, coco, encoder, tmp_path):
    root = shutil.copytree(coco, tmp_path / "lacking")
    shutil.rmtree(root / gone) if (root / gone).is_dir() else (root / gone).unlink()
    with pytest.raises(UserError, match=said):
        coco_detection.evaluate(encoder, read_manifest(str(root)), SHORT_RUN)


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"images": [{"no": 1}], "annotations": []}'])
def test_a_file_that_is_not_cocos(content, coco, encoder, tmp_path):
    root = shutil.copytree(coco, tmp_path / "odd")
    (root / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(UserError, match="is not in COCO's format of instances"):
        coco_detection.evaluate(encoder, read_manifest(str(root)), SHORT_RUN)


def test_without_pycocotools_the_extra_is_named(coco, encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install 'teachercache\[eval\]'"):
        coco_detection.evaluate(encoder, read_manifest(str(coco)), SHORT_RUN)


def test_the_fixture_is_coco(coco, capfd):
    assert len(COCO(str(coco / "annotations" / "instances_train2017.json")).anns) == 8
