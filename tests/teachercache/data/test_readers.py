"""Every input format in its true layout, and what each says of damaged or foreign files."""

import csv
import io
import json
import os
import string
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import make_folder

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest, write_manifest
from teachercache.data.pictures import read_image
from teachercache.data.read import read_manifest
from teachercache.data.sample import BadSample


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {manifest.row(i).key: manifest.row(i).texts for i in range(len(manifest))}


def assert_pictures(manifest: Manifest, seeds: list[int]) -> None:
    got = [np.asarray(read_image(manifest, manifest.row(i))) for i in range(len(manifest))]
    assert len(got) == len(seeds)
    for array, seed in zip(got, seeds, strict=True):
        assert np.array_equal(array, np.asarray(picture(seed)))


# ----------------------------------------------------------------------------------------------------
# What is not data


def test_missing_empty_and_unknown_paths(tmp_path):
    with pytest.raises(UserError, match=r"no data at .*none: pass --data FOLDER"):
        read_manifest(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no pictures or texts found"):
        read_manifest(str(tmp_path))
    for name in ("a.xlsx", "a.zip", "a.tar.gz", "noending", "a.png"):
        with pytest.raises(UserError, match=r"cannot read .*: a folder of pictures, .tar, .parquet, .csv"):
            read_manifest(str(write(tmp_path / name, "x")))


# ----------------------------------------------------------------------------------------------------
# Image folder


def test_folder_captions_labels_and_splits(tmp_path):
    write(tmp_path / "train/cat/1.png", png(1))
    write(tmp_path / "train/cat/1.txt", "a cat\nanother line\n")
    write(tmp_path / "train/dog/big/2.JPG", png(2))
    write(tmp_path / "train/dog/big/2.json", json.dumps({"caption": "a dog"}))
    write(tmp_path / "test/cat/3.png", png(3))
    write(tmp_path / "test/cat/3.json", json.dumps({"captions": ["x", "y"]}))
    write(tmp_path / "4.png", png(4))
    write(tmp_path / "other/5.png", png(5))
    write(tmp_path / "notes.md", "not a picture")
    manifest = read_manifest(str(tmp_path))
    assert rows(manifest) == {
        "4": (),
        "other/5": (),
        "test/cat/3": ("x", "y"),
        "train/cat/1": ("a cat", "another line"),
        "train/dog/big/2": ("a dog",),
    }
    assert manifest.column("label") == ["", "other", "cat", "cat", "dog/big"]
    assert manifest.column("split") == ["", "", "test", "train", "train"]
    assert manifest.column("size") == [len(png(seed)) for seed in (4, 5, 3, 1, 2)]
    assert manifest.rows_of_split("train").tolist() == [3, 4]
    assert_pictures(manifest, [4, 5, 3, 1, 2])


def test_folder_is_read_in_the_same_order_wherever_it_lies(tmp_path):
    one = read_manifest(str(make_folder(tmp_path / "one", 12, splits=True)))
    two = read_manifest(str(make_folder(tmp_path / "far" / "two", 12, splits=True)))
    assert one.digest == two.digest
    assert one.column("key") == two.column("key")
    keys = one.column("key")
    assert sorted(keys) == keys


def test_folder_with_two_pictures_of_one_stem_keeps_both(tmp_path):
    write(tmp_path / "a.jpg", png(1))
    write(tmp_path / "a.png", png(2))
    write(tmp_path / "deep/a.jpg", png(3))
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("key") == ["a", "a.png", "deep/a"]
    assert_pictures(manifest, [1, 2, 3])


def test_folder_limit(tmp_path):
    make_folder(tmp_path, 9)
    assert (
        read_manifest(str(tmp_path), limit=4).column("key") == read_manifest(str(tmp_path)).column("key")[:4]
    )


def test_folder_with_a_dangling_link_still_reads(tmp_path):
    write(tmp_path / "a.png", png(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("key") == ["a", "b"]
    with pytest.raises(BadSample):
        read_image(manifest, manifest.row(1))


def test_folder_with_a_name_that_is_not_utf8_names_it(tmp_path):
    write(tmp_path / "a.png", png(1))
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")), png(2))
    with pytest.raises(UserError, match=r"\.png"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("separator", ["\u2028", "\x0c"])
def test_only_line_ends_separate_captions(tmp_path, separator: str):
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "a.txt", f"one{separator}caption\r\nsecond\n")
    assert rows(read_manifest(str(tmp_path)))["a"] == (f"one{separator}caption", "second")


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', '{"caption": 5}'])
def test_caption_json_that_is_odd_is_named(tmp_path, content: str):
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "a.json", content)
    sample = read_manifest(str(tmp_path)).row(0)
    assert sample.texts == ()
    assert sample.problem.startswith("the caption file is not")


# ----------------------------------------------------------------------------------------------------
# COCO captions


def coco(folder: Path, *, split: str = "val2014", pictures: int = 3) -> Path:
    """The layout of the COCO download: annotations/captions_val2014.json beside val2014/."""
    names = [f"COCO_{split}_{i:012d}.jpg" for i in range(pictures)]
    images = [
        {"id": 100 - i, "file_name": name, "height": 5, "width": 7, "license": 1, "coco_url": "http://x"}
        for i, name in enumerate(names)
    ]
    captions = [
        {"id": 7 - k, "image_id": 100 - i, "caption": f"picture {i} caption {7 - k}.\n"}
        for k in range(2)
        for i in range(2)
    ]
    for i, name in enumerate(names):
        write(folder / split / name, png(i))
    values = {"info": {}, "licenses": [], "images": images, "annotations": captions, "type": "captions"}
    return write(folder / f"annotations/captions_{split}.json", json.dumps(values))


def test_coco_in_its_own_layout(tmp_path):
    manifest = read_manifest(str(coco(tmp_path)))
    assert rows(manifest) == {
        "100": ("picture 0 caption 6.", "picture 0 caption 7."),
        "99": ("picture 1 caption 6.", "picture 1 caption 7."),
        "98": (),
    }
    assert_pictures(manifest, [0, 1, 2])


def test_coco_with_the_pictures_beside_the_json(tmp_path):
    path = coco(tmp_path)
    flat = tmp_path / "flat"
    write(flat / "captions.json", path.read_bytes())
    for file in (tmp_path / "val2014").iterdir():
        write(flat / file.name, file.read_bytes())
    assert_pictures(read_manifest(str(flat / "captions.json")), [0, 1, 2])


def test_coco_without_any_picture_says_where_they_are_looked_for(tmp_path):
    path = coco(tmp_path)
    (tmp_path / "val2014").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"no picture COCO_val2014_0+\.jpg near .*put the pictures into .*val2014"
    ):
        read_manifest(str(path))


@pytest.mark.parametrize("missing", [0, 1])
def test_coco_with_one_missing_picture_still_reads(tmp_path, missing: int):
    path = coco(tmp_path)
    (tmp_path / f"val2014/COCO_val2014_{missing:012d}.jpg").unlink()
    manifest = read_manifest(str(path))
    assert len(manifest) == 3
    for i in {0, 1, 2} - {missing}:
        assert np.array_equal(np.asarray(read_image(manifest, manifest.row(i))), np.asarray(picture(i)))
    with pytest.raises(BadSample, match="No such file"):
        read_image(manifest, manifest.row(missing))


INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}],
}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "5", '{"images": []}', json.dumps(INSTANCES), '{"images": [{"id": 1}], "annotations": []}'],
    ids=["broken", "list", "number", "no-annotations", "instances", "no-file-name"],
)
def test_json_that_is_not_coco_captions(tmp_path, content: str):
    write(tmp_path / "a.jpg", png(1))
    with pytest.raises(UserError, match=r"x.json is not a COCO captions file"):
        read_manifest(str(write(tmp_path / "x.json", content)))


# ----------------------------------------------------------------------------------------------------
# webdataset tars


def make_tar(path: Path, members: list[tuple[str, bytes | str]], *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


SHARD = [
    ("000.jpg", png(1)),
    ("000.txt", "first"),
    ("000.cls", "3\n"),
    ("001.json", json.dumps({"caption": "second"})),
    ("001.png", png(2)),
    ("sub/002.txt", "no picture"),
    ("sub/003.PNG", png(3)),
]


def test_tar_rows_and_pixels(tmp_path):
    manifest = read_manifest(str(make_tar(tmp_path / "00000.tar", SHARD)))
    assert rows(manifest) == {
        "00000/000": ("first",),
        "00000/001": ("second",),
        "00000/sub/002": ("no picture",),
        "00000/sub/003": (),
    }
    assert manifest.column("label") == ["3", "", "", ""]
    assert manifest.row(2).image == ""
    for row, seed in ((0, 1), (1, 2), (3, 3)):
        assert np.array_equal(np.asarray(read_image(manifest, manifest.row(row))), np.asarray(picture(seed)))


def test_folder_of_tars_reads_all_and_unpacks_nothing(tmp_path):
    make_tar(tmp_path / "d/b.tar", SHARD)
    make_tar(tmp_path / "d/a.tar", SHARD[:2])
    before = sorted(tmp_path.rglob("*"))
    manifest = read_manifest(str(tmp_path / "d"))
    assert manifest.column("key") == ["a/000", "b/000", "b/001", "b/sub/002", "b/sub/003"]
    assert_pictures(read_manifest(str(tmp_path / "d"), limit=3), [1, 1, 2])
    assert sorted(tmp_path.rglob("*")) == before
    one = read_manifest(str(tmp_path / "d/b.tar"))
    assert one.column("key") == manifest.column("key")[1:]  # a shard alone has the keys it has among others


@pytest.mark.parametrize("name", ["../../evil.jpg", "/etc/evil.jpg", "a/../../../evil.jpg"])
def test_member_names_never_become_paths(tmp_path, name: str):
    inside = tmp_path / "a" / "b"
    manifest = read_manifest(str(make_tar(inside / "s.tar", [(name, png(1))])))
    assert manifest.column("image") == ["s.tar"]
    assert_pictures(manifest, [1])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "s.tar"]


def test_long_names_and_links(tmp_path):
    long = "x" * 150
    path = make_tar(tmp_path / "s.tar", [(f"{long}.png", png(1))])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("passwd.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    manifest = read_manifest(str(path))
    assert manifest.column("key") == [f"s/{long}"]
    assert_pictures(manifest, [1])


def test_members_that_are_no_samples_are_left_out(tmp_path):
    members = [
        ("._a.png", b"\0"),
        ("a.png", png(1)),
        ("._b.png", b"\0"),
        ("b.png", png(2)),
        ("README", "read me"),
    ]
    manifest = read_manifest(str(make_tar(tmp_path / "s.tar", members)))
    assert manifest.column("key") == ["s/a", "s/b"]


def test_tar_with_one_key_twice_is_refused(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    with pytest.raises(UserError, match="key 's/a' is repeated"):
        read_manifest(str(path))


def test_tar_that_is_compressed_or_broken(tmp_path):
    packed = make_tar(tmp_path / "packed.tar", SHARD, mode="w:gz")
    with pytest.raises(UserError, match=r"packed.tar is not a plain \(uncompressed\) tar"):
        read_manifest(str(packed))
    with pytest.raises(UserError, match="cannot read"):
        read_manifest(str(packed.rename(tmp_path / "packed.tar.gz")))
    with pytest.raises(UserError, match="not a plain"):
        read_manifest(str(write(tmp_path / "text.tar", "this is not a tar at all\n" * 100)))
    whole = make_tar(tmp_path / "whole.tar", SHARD).read_bytes()
    for size in (600, 512 * 3, 512 * 5 + 100):
        with pytest.raises(UserError, match="not a plain"):
            read_manifest(str(write(tmp_path / "short.tar", whole[:size])))


# ----------------------------------------------------------------------------------------------------
# CSV and TSV


def test_csv_lines_of_one_picture_are_its_captions(tmp_path):
    for seed in (1, 2):
        write(tmp_path / f"pictures/{seed}.png", png(seed))
    lines = 'image,caption,label,split\npictures/1.png,"a, b",cat,train\npictures/2.png,c,,val\n'
    lines += 'pictures/1.png,"d\ne",cat,train\n'
    manifest = read_manifest(str(write(tmp_path / "list.csv", lines)))
    assert rows(manifest) == {"pictures/1": ("a, b", "d\ne"), "pictures/2": ("c",)}
    assert manifest.column("label") == ["cat", ""]
    assert manifest.column("split") == ["train", "val"]
    assert_pictures(manifest, [1, 2])


def test_tsv_with_other_column_names_and_keys(tmp_path):
    write(tmp_path / "1.png", png(1))
    lines = "key\ttitle\tfilepath\nk1\tan, apple\t1.png\nk2\tpear\t1.png\nk1\tplum\t1.png\n"
    manifest = read_manifest(str(write(tmp_path / "list.tsv", lines)))
    assert rows(manifest) == {"k1": ("an, apple", "plum"), "k2": ("pear",)}
    assert_pictures(manifest, [1, 1])


@pytest.mark.parametrize("column", ["text", "caption", "title", "texts", "captions"])
def test_every_text_column_is_read(tmp_path, column: str):
    manifest = read_manifest(str(write(tmp_path / "l.csv", f"image,{column}\na.png,one\na.png,two\n")))
    assert rows(manifest) == {"a": ("one", "two")}


def test_csv_without_texts_and_with_missing_pictures(tmp_path):
    write(tmp_path / "a.png", png(1))
    manifest = read_manifest(str(write(tmp_path / "l.csv", "image\na.png\ngone.png\n")))
    assert (manifest.texts, manifest.column("size")) == (0, [len(png(1)), 0])
    with pytest.raises(BadSample, match="No such file"):
        read_image(manifest, manifest.row(1))


def test_csv_from_a_spreadsheet_has_a_byte_order_mark(tmp_path):
    content = "image,text\r\na.png,\u00e9t\u00e9\r\n".encode("utf-8-sig")
    assert rows(read_manifest(str(write(tmp_path / "l.csv", content)))) == {"a": ("\u00e9t\u00e9",)}


def test_csv_errors_name_the_file(tmp_path):
    for content, message in (
        ("picture,text\na.png,b\n", r"l.csv has no column for the picture: name one of image"),
        ("", r"l.csv has no column for the picture"),
        ("key,image\nk,a.png\nk,b.png\n", r"key 'k' refers to two pictures in .*l.csv: a.png and b.png"),
        ("image,text\n", "no pictures or texts found"),
        ("image,text\na.png,\u00e9\n".encode("latin-1"), r"l\.csv"),
        ('image,text\na.png,"x\n', r"l\.csv .*quotation mark of line 2 is not closed"),
        ("image,image\na.png,b.png\n", r"l\.csv .*column 'image' comes 2 times"),
        ("image,text\na.png,x\0\n", r"l\.csv .*NUL"),
    ):
        with pytest.raises(UserError, match=message):
            read_manifest(str(write(tmp_path / "l.csv", content)))


def test_csv_line_without_a_picture_needs_a_key(tmp_path):
    path = write(tmp_path / "l.csv", "key,image,text\nk,,words\nl,a.png,b\n")
    assert rows(read_manifest(str(path))) == {"k": ("words",), "l": ("b",)}
    with pytest.raises(UserError, match=r"l\.csv"):
        read_manifest(str(write(tmp_path / "l.csv", "image,text\n,words\na.png,b\n")))


words = st.text(string.ascii_letters + ' ",;\n\u00e9\u4e2d', max_size=10)
names = st.text(string.ascii_lowercase + "_-. ", min_size=1, max_size=8).map(lambda name: f"d/{name}x.png")


@settings(max_examples=30, deadline=None, database=None)
@given(
    lines=st.dictionaries(names, st.lists(words, min_size=1, max_size=3), min_size=1, max_size=4),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_csv_round_trip(lines, delimiter, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "list.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "text"])
        writer.writerows([name, text] for name, texts in lines.items() for text in texts)
    manifest = read_manifest(str(path))
    got = {manifest.row(i).image: list(manifest.row(i).texts) for i in range(len(manifest))}
    assert got == lines
    assert list(got) == list(lines)


# ----------------------------------------------------------------------------------------------------
# Parquet


def test_parquet_manifest_with_and_without_limit(tmp_path):
    manifest = read_manifest(str(make_folder(tmp_path / "d", 9)))
    path = tmp_path / "m.parquet"
    write_manifest(manifest, path)
    again = read_manifest(str(path))
    assert again.table.equals(manifest.table)
    assert again.digest == manifest.digest
    assert read_manifest(str(path), limit=100).digest == manifest.digest
    few = read_manifest(str(path), limit=4)
    assert few.digest == read_manifest(str(tmp_path / "d"), limit=4).digest
    assert np.array_equal(
        np.asarray(read_image(few, few.row(3))), np.asarray(read_image(manifest, manifest.row(3)))
    )
