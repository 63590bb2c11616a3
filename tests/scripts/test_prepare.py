"""The scripts of the demo data on synthetic packages: selection, duplicates, files."""

import importlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

debian = importlib.import_module("scripts.datasets.demo.debian")
demo = importlib.import_module("scripts.datasets.demo.prepare")
rules = importlib.import_module("scripts.datasets.demo.rules")
scenes = importlib.import_module("scripts.datasets.scenes")

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xlink="http://www.w3.org/1999/xlink">
<metadata><rdf:RDF><cc:Work rdf:about="">
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag><rdf:li></rdf:li>{keywords}</rdf:Bag></dc:subject>
</cc:Work></rdf:RDF></metadata>{body}</svg>"""


def draw(path: Path, seed: int, *, color: str = "red", transparent: bool = True) -> Path:
    """Draw a random polygon in the middle of an empty page."""
    corners = np.random.default_rng(seed).integers(40, 160, (5, 2))
    picture = Image.new("RGBA", (200, 200), (0, 0, 0, 0) if transparent else "white")
    ImageDraw.Draw(picture).polygon([tuple(map(int, corner)) for corner in corners], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def add_stamp(root: Path, name: str, text: str, seed: int = 0) -> None:
    path = draw(root / f"{name}.png", seed)
    path.with_suffix(".txt").write_text(f"{text}\nde.utf8=Etwas.\nfr.utf8=Une chose.\n", encoding="utf-8")


def add_clipart(root: Path, name: str, title: str, *, seed=0, description="", keywords=(), body="") -> Path:
    path = root / "svg" / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    path.write_text(SVG.format(title=title, description=description, keywords=items, body=body))
    return draw(root / "png" / f"{name}.png", seed)


def pair(name: str, *captions: str, picture: Path = Path("x.png"), label: str = "bird"):
    return debian.Pair(name, "stamps", label, picture, captions)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- scenes ------------------------------------------------------------------------------------


def test_scenes_depend_on_the_seed_and_their_number_alone():
    first, again, other = (list(scenes.generate(12, seed, 48)) for seed in (3, 3, 4))
    more = list(scenes.generate(14, 3, 48))[:12]
    for (picture, *content), (picture_2, *content_2), (picture_3, *content_3) in zip(
        first, again, more, strict=True
    ):
        assert picture.size == (48, 48)
        assert content == content_2 == content_3
        assert picture.tobytes() == picture_2.tobytes() == picture_3.tobytes()
    assert [content for _, *content in first] != [content for _, *content in other]


def test_captions_are_true_of_the_scene():
    for picture, captions, label, scene in scenes.generate(150, 0, 96):
        objects = scene["objects"]
        assert label == (objects[0]["shape"] if len(objects) == 1 else "pair")
        for thing in objects:
            assert all(f"{thing['color']} {thing['shape']}" in caption.lower() for caption in captions)
            assert (thing["size"] in captions[0].lower()) == (thing["size"] != "medium")
            assert (thing["texture"] in captions[0].lower()) == (thing["texture"] != "plain")
            if thing["texture"] == "plain" and thing["shape"] != "ring":
                x, y = (int(value * 96) for value in thing["center"])
                assert picture.getpixel((x, y)) == scenes.COLORS[thing["color"]]
        for caption in captions if len(objects) == 2 else ():
            assert relation_holds(caption, objects), caption


def relation_holds(caption: str, objects: list[dict]) -> bool:
    """Parse the relation of a caption and compare it with the centers."""
    words = caption.lower()
    relation = next(name for name in scenes.RELATIONS if name in words)
    named = sorted(objects, key=lambda thing: words.index(f"{thing['color']} {thing['shape']}"))
    (x, y), (x_2, y_2) = (thing["center"] for thing in named)
    return {"left of": x < x_2, "right of": x > x_2, "above": y < y_2, "below": y > y_2}[relation]


def test_scenes_on_disk_share_no_description_between_splits(tmp_path):
    counts = scenes.write_scenes(tmp_path / "a", 120, seed=1, size=32, test=0.4)
    scenes.write_scenes(tmp_path / "b", 120, seed=1, size=32, test=0.4)
    assert counts["train"] + counts["test"] == 120
    assert min(counts.values()) > 20
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    descriptions = {
        split: {p.read_text().splitlines()[0] for p in (tmp_path / "a" / split).rglob("*.txt")}
        for split in ("train", "test")
    }
    assert not descriptions["train"] & descriptions["test"]
    names = dict(line.split("\t") for line in (tmp_path / "a/classnames.txt").read_text().splitlines())
    assert set(names) == {folder.name for folder in (tmp_path / "a/train").iterdir()}
    assert names["pair"] == "two shapes"


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ("tigre03", "tigre"),
        ("corn_dog_bw", "corn dog (black and white)"),
        ("Croissant (B &amp;amp; W)", "Croissant (black and white)"),
        ("RoundPointShovel", "Round Point Shovel"),
        ("Clipart by Nicu Buculei - smiley111", "smiley"),
        ("aiga_coffee_shop_", "coffee shop"),
        ("8 ball", "8 ball"),
        ("dot grid 02 pattern", "dot grid pattern"),
    ],
)
def test_tidy_title(raw, tidy):
    assert rules.tidy_title(raw) == tidy


def test_caption_key_ignores_articles_case_and_plurals():
    assert rules.caption_key("A red Apple.") == rules.caption_key("the red apples")
    assert rules.caption_key("8 ball") != rules.caption_key("9 ball")


def test_every_class_named_by_the_rules_has_words():
    tables = (rules.STAMP_FOLDERS, rules.CLIPART_FOLDERS, rules.WORD_CLASSES)
    named = {label for table in tables for label in table.values()} | {
        c for _, c in rules.read_titles().values()
    }
    assert named - {""} == set(rules.CLASSES)


def test_the_longest_folder_decides_and_words_only_where_folders_are_mixed():
    assert rules.stamp_class("animals/mammals/aquatic") == "sea_animal"
    assert rules.stamp_class("symbols/shapes") == ""
    assert rules.clipart_class("computer/icons/flat-theme/action", ["bird"]) == ""
    assert rules.clipart_class("animals", ["Penguins"]) == "bird"
    assert rules.clipart_class("food/fruit", ["bird"]) == "fruit"


# --- reading the packages ----------------------------------------------------------------------


def test_stamps_take_the_english_line_and_skip_symbols(tmp_path):
    add_stamp(tmp_path, "animals/birds/owl", "An owl.")
    add_stamp(tmp_path, "town/roadsigns/stop", "A \u201cStop\u201d sign. Stop here\u2026")
    add_stamp(tmp_path, "symbols/alphabets/a", "The letter a.")
    draw(tmp_path / "animals/birds/silent.png", 1)
    read = {p.captions: p.label for p in debian.read_stamps(tmp_path)}
    assert read == {("An owl.",): "bird", ('A "Stop" sign.', 'A "Stop" sign. Stop here...'): "sign"}


def test_clipart_needs_words_of_its_own(tmp_path):
    add_clipart(tmp_path, "animals/birds/rooster_01", "Rooster", keywords=["rooster", "farm", "hash(0x8)"])
    add_clipart(tmp_path, "food/pie", "Pie", description="An apple pie on a plate.")
    add_clipart(tmp_path, "food/drawn", "Drawn", description="Created with Inkscape")
    for i in range(4):  # a title on four pictures names the series; so does an author's name
        add_clipart(tmp_path, f"plants/arrow{i}", "Simple things")
    add_clipart(tmp_path, "plants/contour_oak", "Clipart by Somebody - contour_oak")
    add_clipart(tmp_path, "signs_and_symbols/flags/x", "Ruritania")
    add_clipart(tmp_path, "tools/linked", "Linked", body='<g><image xlink:href="/home/a.png"/></g>')
    (tmp_path / "png/food/again.png").symlink_to(tmp_path / "png/food/pie.png")
    add_clipart(tmp_path, "food/again_drawing", "Pie")
    draw(tmp_path / "png/food/alone.png", 2)
    assert {p.captions: p.label for p in debian.read_clipart(tmp_path)} == {
        ("Rooster", "Rooster: farm"): "bird",
        ("Pie", "An apple pie on a plate."): "food",
        ("Drawn",): "food",
        ("arrow",): "plant",
        ("contour oak",): "plant",
        ("Pie",): "food",
    }


def test_translated_titles_replace_move_and_drop(tmp_path, monkeypatch):
    table = {"cigno": ("black swan", ""), "lucchetto": ("gray padlock", "tool"), "oh": ("", "")}
    monkeypatch.setattr(debian, "read_titles", lambda: table | {"b.png": ("blue gecko", "reptile")})
    for name, title in {"a": "Cigno", "b": "Thing", "c": "Lucchetto02", "d": "oh"}.items():
        add_clipart(tmp_path, f"animals/birds/{name}", title)
    read = {p.captions[0]: p.label for p in debian.read_clipart(tmp_path)}
    assert read == {"black swan": "bird", "blue gecko": "reptile", "gray padlock": "tool"}


def test_unpack_writes_plain_files_below_its_part_only(tmp_path, monkeypatch):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in (
            "./usr/share/x/a.png",
            "./usr/share/x/a.ogg",
            "./usr/share/y/b.png",
            "./usr/share/x/../../c.png",
        ):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
        link = tarfile.TarInfo("./usr/share/x/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "deb").write_bytes(archive.getvalue())
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: real(["cat", command[-1]], **how))
    debian.unpack(tmp_path / "deb", "usr/share/x", tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["usr/share/x/a.png"]
    (tmp_path / "deb").write_bytes(archive.getvalue()[:513])  # inside the first file
    with pytest.raises(debian.SourceError, match="damaged"):
        debian.unpack(tmp_path / "deb", "usr/share/x", tmp_path / "out2")


# --- pictures, duplicates, split ---------------------------------------------------------------


def test_render_crops_to_the_content_on_white(tmp_path):
    jpeg, thumbnail = demo.render(draw(tmp_path / "a.png", 0))
    picture = Image.open(io.BytesIO(jpeg))
    assert (picture.mode, max(picture.size) < 200) == ("RGB", True)
    assert min(picture.getpixel((0, 0))) > 245
    assert min(picture.getpixel((picture.width - 1, picture.height - 1))) > 245
    assert thumbnail.shape == (16 * 16 * 3,)
    Image.new("RGBA", (50, 50)).save(tmp_path / "blank.png")
    Image.new("L", (20, 20), 0).save(tmp_path / "small.png")
    assert [demo.render(tmp_path / name) for name in ("blank.png", "small.png")] == ["blank", "too small"]


def test_too_large_pictures_are_left_out(tmp_path, monkeypatch):
    path = draw(tmp_path / "a.png", 0)
    for limit in (30_000, 10_000):  # 200 x 200 is a warning under the first and an error under the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert demo.render(path) == "too large"


def test_no_caption_stays_twice():
    pairs = [
        pair("a", "Heart"),
        pair("b", "A heart.", "Heart: valentines"),
        pair("c", "heart", "Heart: Valentines"),
        pair("d", "Pie (black and white)"),
        pair("e", "Pie", "heart"),
    ]
    kept = demo.distinct_captions(pairs)
    assert {p.name: p.captions for p in kept} == {
        "a": ("Heart",),
        "b": ("Heart: valentines",),
        "d": ("Pie (black and white)",),
        "e": ("Pie",),
    }
    groups = {p.name: p.group for p in kept}
    assert groups["a"] == groups["b"] != groups["d"] == groups["e"]


def test_same_pictures_go_and_recolored_ones_share_a_group(tmp_path):
    looks = [(0, "red", True), (0, "red", False), (0, "blue", True), (7, "red", True)]
    files = [draw(tmp_path / f"{i}.png", s, color=c, transparent=t) for i, (s, c, t) in enumerate(looks)]
    thumbnails = np.stack([demo.render(file)[1] for file in files])
    kept, groups = demo.distinct_pictures(thumbnails, np.arange(4))
    assert kept == [0, 2, 3]
    assert groups[0] == groups[1] != groups[2]


def test_test_pictures_are_shared_out_by_class_and_never_in_a_group():
    pairs = [pair(str(i), str(i), label="bird" if i < 30 else "food") for i in range(90)]
    pairs = [demo.replace(p, group=min(i, 80)) for i, p in enumerate(pairs)]
    test = demo.choose_test(pairs, 9, seed=0)
    assert sorted(pairs[row].label for row in test) == ["bird"] * 3 + ["food"] * 6
    assert max(test) < 80
    assert test == demo.choose_test(pairs, 9, seed=0) != demo.choose_test(pairs, 9, seed=1)


def test_write_pairs_makes_the_same_folder_twice(tmp_path):
    pairs = [
        pair(
            f"p{i}",
            f"Thing number {i}",
            picture=draw(tmp_path / f"{i}.png", i),
            label="bird" if i else "food",
        )
        for i in range(12)
    ]
    for name in ("a", "b"):
        about = demo.write_pairs(tmp_path / name, pairs, num_test=3, seed=0, min_train=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert about["counts"]["train"]["all"] + about["counts"]["test"]["all"] == 11
    assert about["selection"]["class too small"] == 1
    assert (tmp_path / "a/classnames.txt").read_text() == "bird\ta bird\n"


# --- the command -------------------------------------------------------------------------------


def test_pip_source(tmp_path):
    pytest.importorskip("easy_vqa")
    about = demo.write_pip(tmp_path / "a", seed=0, num_vqa=30, num_scenes=60)
    demo.write_pip(tmp_path / "b", seed=0, num_vqa=30, num_scenes=60)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert about["counts"]["train"]["source easy-vqa"] == 30
    captions = [p.read_text() for p in (tmp_path / "a/test").rglob("*.txt")]
    assert len(captions) == len(set(captions)) == about["counts"]["test"]["all"] > 0
    for text in (tmp_path / "a/train").glob("*/vqa_*.txt"):
        color, shape = text.read_text().strip(".\n").split()[1:]
        assert shape == text.parent.name
        assert color in ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")


def test_auto_falls_back_and_debian_prints_the_reason(tmp_path, monkeypatch, capsys):
    about = {"counts": {"train": {"all": 1}, "test": {"all": 1}}}
    monkeypatch.setattr(demo, "write_pip", lambda partial, seed: about)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare", "--out", str(tmp_path / "demo")])
    assert demo.main() == 0
    assert "no Debian packages (apt-get is not installed" in capsys.readouterr().out
    assert (tmp_path / "demo/about.json").is_file()
    assert demo.main() == 0
    assert "exists; pass --force" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--force", "--source", "debian"])
    assert demo.main() == 2
    assert capsys.readouterr().err.startswith("error: apt-get is not installed")
    assert (tmp_path / "demo/about.json").is_file()  # a failed remake leaves the old folder alone
