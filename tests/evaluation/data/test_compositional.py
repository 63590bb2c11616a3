"""Winoground, ARO and SugarCrepe in their published layouts, against loops over one cosine at a time."""

import io
import json
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from own_encoder import CONSTANT, ENCODER, IMAGE_MATRIX, slow_text, view
from PIL import Image
from published_pairs import as_png, noise, winoground_rows, write_aro, write_sugar_crepe, write_winoground

from evaluation.data import compositional
from evaluation.metrics.ranking import bootstrap_interval
from evaluation.models.matcher import Matcher, of_encoder
from evaluation.results.run import measure
from evaluation.tasks.matching import aro, sugar_crepe, winoground
from evaluation.tasks.registry import find
from teachercache.core.errors import UserError
from teachercache.data.sample import BadSample

MATCHER, COLLAPSED = of_encoder(ENCODER), of_encoder(CONSTANT)
LAYOUTS = ("zip", "folder", "parquet")


def cosine(picture: Image.Image, text: str) -> float:
    vector = view(picture.convert("RGB")).numpy().reshape(-1).astype(np.float64) @ IMAGE_MATRIX
    return float(vector @ slow_text(text) / np.sqrt((vector**2).sum()))


@pytest.fixture(scope="module", params=LAYOUTS)
def wino(request, tmp_path_factory) -> Path:
    return write_winoground(tmp_path_factory.mktemp("wino") / request.param, request.param)


@pytest.fixture(scope="module")
def aro_folder(tmp_path_factory) -> Path:
    return write_aro(tmp_path_factory.mktemp("aro") / "aro")


@pytest.fixture(scope="module")
def crepe(tmp_path_factory) -> Path:
    return write_sugar_crepe(tmp_path_factory.mktemp("crepe") / "sugar-crepe")


# ----------------------------------------------------------------------------------------------------
# Winoground


def test_winoground_is_the_slow_loop_in_every_layout(wino):
    wanted = defaultdict(list)
    for row in winoground_rows():
        pictures = [Image.open(io.BytesIO(row[f"image_{k}"])) for k in (0, 1)]
        c0i0, c1i0 = (cosine(pictures[0], row[f"caption_{k}"]) for k in (0, 1))
        c0i1, c1i1 = (cosine(pictures[1], row[f"caption_{k}"]) for k in (0, 1))
        right = {"text": c0i0 > c1i0 and c1i1 > c0i1, "image": c0i0 > c0i1 and c1i1 > c1i0}
        right["group"] = right["text"] and right["image"]
        preds = {1: "1_pred", 2: "2_preds"}[row["num_main_preds"]]
        for name, value in right.items():
            for key in (
                "",
                f"/{row['collapsed_tag'].lower()}",
                f"/{preds}",
                f"/secondary={row['secondary_tag']}",
            ):
                wanted[f"{name}_score{key}"].append(value)
    found = winoground.evaluate(MATCHER, wino)
    for name, values in wanted.items():
        if not name.endswith("="):
            assert found[name] == pytest.approx(np.mean(values)), name
            assert found["n" + name.partition("_score")[2]] == len(values)
    assert {0 < found[f"{name}_score"] < 1 for name in ("text", "image", "group")} == {True}
    assert "text_score/secondary=Series" in found
    assert found["text_score_low"] < found["text_score"] < found["text_score_high"]
    assert (found["ties"], found["n"], found["num_matches"], found["num_skipped"]) == (0, 24, 96, 0)
    assert found["seconds_per_match"] > 0


def test_an_interval_is_that_of_rows_drawn_again():
    hits = np.random.default_rng(0).random(80) < 0.3
    random = np.random.default_rng(1)
    shares = [hits[random.integers(0, 80, 80)].mean() for _ in range(4000)]
    assert bootstrap_interval(hits) == pytest.approx(np.quantile(shares, (0.025, 0.975)), abs=0.015)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_scores_that_say_nothing_are_no_hits(value):
    scores = np.full((3, 2, 2), value)
    hits, ties = winoground.hits_of(scores)
    assert not any(values.any() for values in hits.values())
    assert ties.all() == (value == 1.0)


def test_each_comparison_counts_and_each_tie_is_told():
    right = np.array([[1.0, 0.0], [0.0, 1.0]])  # [picture, caption]
    assert all(values.all() for values in winoground.hits_of(right[None])[0].values())
    for picture, caption, text, image in ((0, 1, False, False), (1, 0, False, False)):
        scores = right.copy()
        scores[picture, caption] = 1.0
        hits, ties = winoground.hits_of(scores[None])
        assert (hits["text"][0], hits["image"][0], hits["group"][0], ties[0]) == (text, image, False, True)
    for scores, text, image in (
        ([[3.0, 2.0], [4.0, 5.0]], True, False),
        ([[1.0, 2.0], [0.0, 3.0]], False, True),
    ):
        hits, _ = winoground.hits_of(np.array(scores)[None])
        assert (hits["text"][0], hits["image"][0], hits["group"][0]) == (text, image, False)


def test_a_collapsed_encoder_scores_nothing_anywhere(aro_folder, crepe, tmp_path):
    found = winoground.evaluate(COLLAPSED, write_winoground(tmp_path / "wino", "zip"))
    assert {found[key] for key in found if "_score" in key} == {0.0}
    assert found["ties"] == 1
    found = aro.evaluate(COLLAPSED, shutil.copytree(aro_folder, tmp_path / "aro"), min_count=5)
    scores = [
        key for key in found if "macro" in key or "micro" in key or key.endswith(("order", "overall", "low"))
    ]
    assert {found[key] for key in scores} == {0.0}
    assert {value for key, value in found.items() if key.endswith("_ties")} == {1.0}
    found = sugar_crepe.evaluate(COLLAPSED, crepe)
    assert (found["acc"], found["swap"], found["swap_obj_ties"]) == (0, 0, 1)


def test_a_picture_that_cannot_be_read_takes_its_example_with_it(tmp_path):
    folder = write_winoground(tmp_path / "wino", "folder", 6)
    (folder / "data/images/ex_2_img_1.png").write_bytes(b"no picture")
    (folder / "data/images/ex_4_img_0.png").unlink()
    found = winoground.evaluate(MATCHER, folder)
    assert (found["n"], found["num_skipped"], found["num_matches"]) == (4, 2, 20)
    for path in (folder / "data/images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no picture can be read, the first because: there is no"):
        winoground.evaluate(MATCHER, folder)


def test_no_name_reaches_out_of_the_data(tmp_path):
    secret = tmp_path / "secret.png"
    noise(np.random.default_rng(0)).save(secret)
    folder = write_winoground(tmp_path / "wino", "folder", 2)
    path = folder / "data/examples.jsonl"
    path.write_text(path.read_text().replace('"ex_0_img_0"', '"../../../secret"'))
    with pytest.raises(BadSample, match="leads out of"):
        compositional.read_winoground(folder)[0].pictures[0]()
    (folder / "data/images/ex_0_img_1.png").unlink()
    (folder / "data/images/ex_0_img_1.png").symlink_to(secret)
    with pytest.raises(BadSample, match="leads out of"):
        compositional.read_winoground(folder)[0].pictures[1]()
    assert compositional.read_winoground(folder)[1].pictures[0]().size == (13, 10)


def test_members_of_an_archive_stay_in_memory(tmp_path, monkeypatch):
    folder = write_winoground(tmp_path / "wino", "zip", 2)
    content = as_png(noise(np.random.default_rng(0)))
    with zipfile.ZipFile(folder / "data/images.zip", "w") as archive:
        archive.writestr("../../../../ex_0_img_0.png", content)
        archive.writestr("images/ex_1_img_0.png", content)
    before = sorted(tmp_path.rglob("*"))
    examples = compositional.read_winoground(folder)
    assert examples[0].pictures[0]().size == (13, 10)  # read, wherever it says that it belongs
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BadSample, match=r"no ex_0_img_1.png in .*images.zip"):
        examples[0].pictures[1]()
    monkeypatch.setattr(compositional, "LARGEST", 100)
    with pytest.raises(BadSample, match="unpacks to"):
        examples[1].pictures[0]()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: (data / "examples.jsonl").unlink(), "no Winoground in"),
        (lambda data: (data / "images.zip").unlink(), "neither images.zip nor images/"),
        (lambda data: (data / "images.zip").write_bytes(b"PK"), "not a readable zip archive"),
        (lambda data: (data / "examples.jsonl").write_text("{"), "line 1: not JSON"),
        (lambda data: (data / "examples.jsonl").write_text("\n"), "has no examples"),
        (lambda data: (data / "examples.jsonl").write_text("\n[]"), "line 2: not an object with caption_0"),
        (lambda data: (data / "examples.jsonl").write_text('{"caption_0": "a"}'), "line 1: no 'caption_1'"),
        (lambda data: edit(data / "examples.jsonl", '_preds": 1', '_preds": 3'), "num_main_preds is 3"),
    ],
)
def test_a_damaged_winoground_is_told_in_one_line(change, said, tmp_path):
    folder = write_winoground(tmp_path / "wino", "zip", 2)
    change(folder / "data")
    with pytest.raises(UserError, match=said) as error:
        winoground.evaluate(MATCHER, folder)
    assert "\n" not in str(error.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_damaged_parquet_is_told(tmp_path):
    folder = write_winoground(tmp_path / "wino", "parquet", 4)
    (folder / "data/test-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        winoground.evaluate(MATCHER, folder)


# ----------------------------------------------------------------------------------------------------
# ARO and SugarCrepe


def slow_cases(folder: Path, name: str, group_of) -> dict[str, list[bool]]:
    right = defaultdict(list)
    for line in json.loads((folder / f"visual_genome_{name}.json").read_text()):
        picture = Image.open(folder / "images" / line["image_path"]).convert("RGB")
        x, y, width, height = (line[f"bbox_{key}"] for key in "xywh")
        crop = picture.crop((x, y, x + width, y + height))
        right[group_of(line)].append(cosine(crop, line["true_caption"]) > cosine(crop, line["false_caption"]))
    return right


def test_aro_is_the_slow_loop(aro_folder):
    found = aro.evaluate(MATCHER, aro_folder, min_count=15)
    relations = slow_cases(aro_folder, "relation", lambda line: line["relation_name"])
    pairs = slow_cases(aro_folder, "attribution", lambda line: tuple(line["attributes"]))
    assert found["relation_macro"] == pytest.approx(np.mean([np.mean(hits) for hits in relations.values()]))
    assert found["relation_micro"] == pytest.approx(
        np.mean([hit for hits in relations.values() for hit in hits])
    )
    asymmetric = [np.mean(hits) for name, hits in relations.items() if name != "near"]
    assert found["relation_macro_asymmetric"] == pytest.approx(np.mean(asymmetric))
    assert found["relation=under"] == pytest.approx(np.mean(relations["under"]))
    assert [len(hits) for hits in pairs.values()] == [
        20,
        10,
        10,
    ]  # the same two the other way round are another pair
    assert found["attribution_macro"] == pytest.approx(np.mean(pairs["red", "old"]))
    assert found["attribution_micro"] == pytest.approx(
        np.mean([hit for hits in pairs.values() for hit in hits])
    )
    assert found["attribution_groups"] == 1
    assert found["aro_overall"] == pytest.approx((found["relation_macro"] + found["attribution_macro"]) / 2)
    for name, file in (("coco_order", "coco_karpathy_test"), ("flickr_order", "flickr30k_test")):
        options = iter(json.loads((aro_folder / f"{file}_options.json").read_text())["options"])
        hits, dropped = [], 0
        for line in json.loads((aro_folder / f"{file}.json").read_text()):
            picture = Image.open(aro_folder / line["image"])
            for _ in line["caption"]:
                true, *wrong = next(options)
                left = [text for text in wrong if text.split() != true.split()]
                dropped += 4 - len(left)
                if left:
                    hits.append(all(cosine(picture, true) > cosine(picture, text) for text in left))
        assert found[name] == pytest.approx(np.mean(hits)), name
        assert 0 < found[name] < 1
        assert (found[f"{name}_n"], found[f"{name}_dropped_options"]) == (len(hits), dropped)
        assert dropped > 0


def test_aro_gives_its_options_in_its_own_order(aro_folder):
    asked = []

    def score(pictures, texts, *, normalize=False):
        asked.extend(texts)
        return MATCHER.score(pictures, texts)

    aro.cases_metrics(
        Matcher("", "", score),
        "relation",
        compositional.read_relations(aro_folder / "visual_genome_relation.json"),
    )
    lines = json.loads((aro_folder / "visual_genome_relation.json").read_text())
    assert asked == [[line["false_caption"], line["true_caption"]] for line in lines]


def test_a_macro_without_groups_says_why(aro_folder, tmp_path):
    found = aro.evaluate(MATCHER, aro_folder)
    assert found["attribution_macro"] == "skipped: none of its groups comes 25 times"
    assert "aro_overall" not in found
    folder = tmp_path / "aro"
    folder.mkdir()
    (folder / "images").symlink_to(aro_folder / "images")
    shutil.copy(aro_folder / "visual_genome_relation.json", folder)
    (folder / "symmetric_relations.json").write_text('["on", "near", "under"]')
    found = aro.evaluate(MATCHER, folder)
    assert found["relation_macro_asymmetric"] == "skipped: all its relations hold both ways"
    assert isinstance(found["relation_macro"], float)
    assert not [key for key in found if key.startswith(("attribution", "coco", "flickr"))]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("visual_genome_relation.json", "[", "is not JSON"),
        ("visual_genome_relation.json", "3", "neither a list nor an object"),
        ("visual_genome_relation.json", "[]", "has no items"),
        ("visual_genome_relation.json", '[{"image_path": "a"}]', "item 0: no 'true_caption'"),
        (
            "coco_karpathy_test.json",
            '[{"image": 3, "caption": ["a"]}]',
            "item 0: 'image' is 3 instead of a text",
        ),
        ("visual_genome_attribution.json", '["a"]', "item 0: not an object with"),
        ("coco_karpathy_test.json", '[{"image": "a", "caption": [1]}]', "item 0: caption is a list of texts"),
        ("coco_karpathy_test.json", '[{"image": "a.jpg", "caption": "dog"}]', "no caption has words"),
        ("symmetric_relations.json", "{}", "not a list of relations' names"),
        ("other.json", "{}", "no set of ARO in"),
    ],
)
def test_a_damaged_aro_is_told_in_one_line(file, content, said, aro_folder, tmp_path):
    (tmp_path / file).write_text(content)
    if file == "symmetric_relations.json":
        shutil.copy(aro_folder / "visual_genome_relation.json", tmp_path)
    with pytest.raises(UserError, match=said) as error:
        aro.evaluate(MATCHER, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bbox_w", 0, "instead of a box in pixels"),
        ("bbox_x", "1", "instead of a box in pixels"),
        ("attributes", ["red"], "a list of two"),
    ],
)
def test_a_wrong_box_or_pair_names_its_item(key, value, said, aro_folder, tmp_path):
    lines = json.loads((aro_folder / "visual_genome_attribution.json").read_text())
    lines[7][key] = value
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(lines))
    with pytest.raises(UserError, match=f"item 7: .*{said}"):
        aro.evaluate(MATCHER, tmp_path)


def test_sugar_crepe_is_the_slow_loop(crepe):
    found, shares = sugar_crepe.evaluate(MATCHER, crepe), {}
    for path in (crepe / "data").glob("*.json"):
        items = json.loads(path.read_text()).values()
        shares[path.stem] = np.mean(
            [
                cosine(picture, item["caption"]) > cosine(picture, item["negative_caption"])
                for item in items
                for picture in [Image.open(crepe / "val2017" / item["filename"])]
            ]
        )
        assert found[path.stem] == pytest.approx(shares[path.stem])
    assert len({*shares.values(), 0.0, 1.0}) > 3
    assert found["acc"] == pytest.approx(np.mean(list(shares.values())))
    assert found["swap"] == pytest.approx((shares["swap_att"] + shares["swap_obj"]) / 2)
    assert (found["add"], found["num_matches"]) == (pytest.approx(shares["add_att"]), 72)
    assert "replace" not in found


def test_sugar_crepe_without_pictures_or_files(crepe, tmp_path):
    (tmp_path / "a/data").mkdir(parents=True)
    with pytest.raises(UserError, match="no SugarCrepe in"):
        sugar_crepe.evaluate(MATCHER, tmp_path / "a")
    shutil.copy(crepe / "data/swap_obj.json", tmp_path / "a/data")
    with pytest.raises(UserError, match="put COCO's val2017/ into"):
        sugar_crepe.evaluate(MATCHER, tmp_path / "a")


def test_a_result_has_the_shape_of_clip_benchmark(wino):
    result = next(measure(find("winoground"), [MATCHER], f"{wino}/"))
    assert set(result) == {"dataset", "model", "pretrained", "task", "language", "metrics"}
    assert (result["dataset"], result["model"], result["task"]) == (wino.name, "linear", "winoground")
    json.dumps(result)
    with pytest.raises(UserError, match="no folder nowhere"):
        next(measure(find("aro"), [MATCHER], "nowhere"))
