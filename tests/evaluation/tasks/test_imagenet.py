"""ImageNet's folders and its variants': subset logits, 80 prompts, numbers against torchmetrics and a slow loop."""

import shutil
from importlib import resources

import numpy as np
import pytest
import torch
from own_encoder import CONSTANT, ENCODER, slow_image, slow_text
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy

from evaluation.data.imagenet_classes import class_places, class_words, wnids
from evaluation.results.run import measure
from evaluation.tasks.encoding.imagenet import evaluate
from evaluation.tasks.registry import find
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

PLACES = (2, 10, 100, 407, 657, 744, 999)  # 657 missile, 744 projectile: CLIP calls both `missile`


@pytest.fixture(scope="module")
def wordnet() -> list[str]:
    """The file that lists ImageNet's wnids in order."""
    return resources.files("timm.data").joinpath("_info", "imagenet_synsets.txt").read_text().split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wordnet):
    """val/<wnid>/: classes of one to seven pictures, and a training split that must not count."""
    root, random = tmp_path_factory.mktemp("imagenet") / "tiny", np.random.default_rng(3)
    for size, place in enumerate(PLACES, start=1):
        for split, count in (("val", size), ("train", 1)):
            (root / split / wordnet[place]).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    root / split / wordnet[place] / f"ILSVRC_{place}_{i}.JPEG", "JPEG"
                )
    return root


def evaluated(root, encoder=ENCODER) -> dict:
    return evaluate(encoder, read_manifest(str(root)))


def slow_scores(root, wordnet, names: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, classes present] and labels [n] from the definitions, prompts and names read here."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    assert len(OPENAI_IMAGENET_TEMPLATES) == 80
    weights = [
        np.mean([slow_text(make(names[place])) for make in OPENAI_IMAGENET_TEMPLATES], 0) for place in PLACES
    ]
    weights = np.stack([weight / np.linalg.norm(weight) for weight in weights])
    pairs = [
        (slow_image(path), i)
        for i, place in enumerate(PLACES)
        for path in sorted((root / "val" / wordnet[place]).iterdir())
    ]
    return np.stack([image for image, _ in pairs]) @ weights.T, np.array([label for _, label in pairs])


@pytest.fixture(scope="module")
def names() -> dict[int, str]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return {place: IMAGENET_CLASSNAMES[place] for place in PLACES} | {744: "projectile"}


def test_imagenet_is_torchmetrics_on_the_slow_scores(folder, wordnet, names):
    found = evaluated(folder)
    scores, labels = (torch.from_numpy(array) for array in slow_scores(folder, wordnet, names))

    def accuracy(**words) -> float:
        return float(MulticlassAccuracy(num_classes=len(PLACES), **words)(scores, labels))

    assert found["acc1"] == pytest.approx(accuracy(average="micro"))
    assert found["acc5"] == pytest.approx(accuracy(average="micro", top_k=5))
    assert found["mean_per_class_recall"] == pytest.approx(accuracy(average="macro"))
    assert 0 < found["acc1"] < found["acc5"] < 1
    assert found["acc1"] != pytest.approx(found["mean_per_class_recall"], abs=1e-3)
    assert (found["num_images"], found["num_classes"], found["num_skipped"], found["tie_rate"]) == (
        28,
        7,
        0,
        0,
    )


def test_numbers_for_folders_are_places_among_the_wnids(folder, wordnet, tmp_path):
    """ImageNetV2: `10` comes before `2` in a listing, and is class 10 all the same."""
    for place in PLACES:
        shutil.copytree(folder / "val" / wordnet[place], tmp_path / "v2" / str(place))
    assert evaluated(tmp_path / "v2") == evaluated(folder) == evaluated(folder / "val")


def test_only_classes_with_a_folder_compete(folder, wordnet, tmp_path, capfd):
    shutil.copytree(folder / "val" / wordnet[999], tmp_path / "one" / wordnet[999])
    shutil.copytree(folder / "val" / wordnet[2], tmp_path / "one" / wordnet[2])
    found = evaluated(tmp_path / "one")
    assert (found["num_classes"], found["num_images"], found["acc5"]) == (2, 8, None)
    assert "2 of ImageNet's 1,000 classes have a folder" in capfd.readouterr().err


@pytest.mark.parametrize("variant", ["a", "r"])
def test_the_200_classes_of_the_variants_are_where_timm_has_them(variant):
    """Its own lists of folders and of indexes."""
    info = resources.files("timm.data").joinpath("_info")
    folders = info.joinpath(f"imagenet_{variant}_synsets.txt").read_text().split()
    indexes = [int(word) for word in info.joinpath(f"imagenet_{variant}_indices.txt").read_text().split()]
    assert len(folders) == 200
    assert sorted(class_places(set(folders), "x").values()) == sorted(indexes)


def test_wnids_and_words_are_in_one_order(wordnet):
    words = class_words()
    assert wnids() == wordnet == sorted(wordnet)
    assert (words[0], words[2], words[999]) == ("tench", "great white shark", "toilet paper")
    assert (words[657], words[744], words[836], words[837]) == (
        "missile",
        "projectile",
        "sunglass",
        "sunglasses",
    )
    assert len(set(words)) == len(words) == 1000


def test_names_of_a_file_count(folder, wordnet, names, tmp_path):
    root = shutil.copytree(folder, tmp_path / "named")
    (root / "classnames.txt").write_text(f"{wordnet[10]}\tking of beasts\n")
    scores, labels = slow_scores(root, wordnet, {**names, 10: "king of beasts"})
    assert evaluated(root)["acc1"] == pytest.approx((scores.argmax(1) == labels).mean())
    (root / "classnames.txt").write_text(f"{wordnet[5]}\tking of beasts\n")
    with pytest.raises(UserError, match="is not `label<TAB>name` of a class that occurs"):
        evaluated(root)


def test_a_model_that_says_one_thing_hits_nothing(folder):
    found = evaluated(folder, CONSTANT)
    assert (found["acc1"], found["acc5"], found["mean_per_class_recall"], found["tie_rate"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("wrong", ["dog", "1000", "n99999999"])
def test_a_folder_that_is_no_class(wrong, folder, tmp_path):
    root = shutil.copytree(folder / "val", tmp_path / "wrong")
    shutil.copytree(next(root.iterdir()), root / wrong)
    with pytest.raises(UserError, match=f"folder '{wrong}' is not one of .* `--task zeroshot`"):
        evaluated(root)


def test_pictures_without_labels(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "bare" / "train")
    with pytest.raises(UserError, match="no validation or test rows with labels"):
        evaluated(tmp_path / "bare")


def test_a_damaged_picture_is_left_out(folder, wordnet, tmp_path):
    root = shutil.copytree(folder, tmp_path / "damaged")
    next((root / "val" / wordnet[999]).iterdir()).write_bytes(b"no picture")
    result = next(measure(find("imagenet"), [ENCODER], str(root)))
    assert (result["dataset"], result["task"]) == ("damaged", "imagenet")
    assert (result["metrics"]["num_images"], result["metrics"]["num_skipped"]) == (27, 1)
