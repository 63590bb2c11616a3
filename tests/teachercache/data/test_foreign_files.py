"""Folders, tars and texts as other tools and people make them: every file is a part of a row, or is named."""

import io
import itertools
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import to_tensor

from teachercache.build.decode import ImageInput, Rows, WorkItem
from teachercache.core import local as walking
from teachercache.core.errors import MachineError, UserError
from teachercache.core.paths import as_path
from teachercache.data.manifest import Manifest, make_manifest
from teachercache.data.pictures import decode_image, read_bytes
from teachercache.data.read import find_sources, read_manifest
from teachercache.data.readers import folders
from teachercache.data.readers.tar_headers import BLOCK
from teachercache.data.sample import Sample
from teachercache.data.summary import describe

UNREAD = "pictures are used without their captions, which cannot be read"
QUICK = settings(max_examples=20, deadline=None, database=None)


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def fill(folder: Path, *names: str) -> Path:
    """Pictures and captions of the given names, each with its own content."""
    texts = {".txt": "text {}", ".json": '{{"caption": "text {}"}}'}
    for i, name in enumerate(names):
        text = texts.get(os.path.splitext(name)[1].lower())
        write(folder / name, text.format(i) if text else png(i))
    return folder


def make_tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def texts(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {row.key: row.texts for row in map(manifest.row, range(len(manifest)))}


def problems(manifest: Manifest) -> dict[str, str]:
    return {row.key: row.problem for row in map(manifest.row, range(len(manifest))) if row.problem}


def shade(manifest: Manifest, row: int) -> int:
    return decode_image(read_bytes(manifest, manifest.row(row))).getpixel((0, 0))[0]


def named(manifest: Manifest) -> dict[str, tuple[int, str]]:
    return manifest.unused.reasons


# ----------------------------------------------------------------------------------------------------
# Captions beside pictures, in a folder and in a tar alike

CAPTIONS = {  # the members beside a.png, and the captions
    "byte order mark": ({"a.txt": b"\xef\xbb\xbfa red dog\r\n"}, ("a red dog",)),
    "UTF-16": ({"a.txt": "a red dog".encode("utf-16")}, ("a red dog",)),
    "UTF-16 JSON": ({"a.json": '{"caption": "a dog"}'.encode("utf-16")}, ("a dog",)),
    "upper case": ({"a.TXT": b"a dog"}, ("a dog",)),
    "blank last lines": ({"a.txt": b"a dog\n\n \n"}, ("a dog",)),
    "blank .txt": ({"a.txt": b" \n", "a.json": b'{"caption": "a dog"}'}, ("a dog",)),
    "unreadable .txt": ({"a.txt": b"zo\xe9", "a.json": b'{"caption": "a dog"}'}, ("a dog",)),
    "null in a list": ({"a.json": b'{"captions": ["a dog", null]}'}, ("a dog",)),
    "half an emoji": ({"a.json": b'{"caption": "so cute \\ud83d"}'}, ("so cute \ufffd",)),
    "both": ({"a.txt": b"one", "a.json": b'{"caption": "two"}'}, ("one",)),
}
BAD_CAPTIONS = {  # and the reason of the row
    "another encoding": ({"a.txt": b"a zo\xe9"}, "the caption file is not UTF-8 (byte e9 at 4)"),
    "UTF-16 without a mark": ({"a.txt": "dog".encode("utf-16-le")}, "the caption file has NUL characters"),
    "records": ({"a.json": b'{"captions": [{"lang": "en", "text": "x"}]}'}, "is a record of lang, text"),
    "too long": ({"a.txt": b"x" * (1 << 20) + b"y"}, "1,048,577 bytes, more than the limit"),
    "deep": ({"a.json": b'{"caption": ' + b"[" * 5000 + b"]" * 5000 + b"}"}, "nested more than 100 levels"),
}


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("kind", [*CAPTIONS, *BAD_CAPTIONS])
def test_captions_of_any_tool_are_read_or_the_row_says_why_not(kind: str, form: str, tmp_path):
    files, expected = {**CAPTIONS, **BAD_CAPTIONS}[kind]
    members = {"a.png": png(), **files}
    for name, content in members.items():
        write(tmp_path / "d" / name, content)
    data = tmp_path / "d" if form == "folder" else make_tar(tmp_path / "d.tar", *members.items())
    row = read_manifest(str(data)).row(0)
    assert row.image
    assert (row.texts, row.problem) == (expected, "") if kind in CAPTIONS else expected in row.problem


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_caption_that_cannot_be_read_does_not_cost_the_picture(form: str, tmp_path):
    members = {"a.png": png(9), "a.txt": b"\xff", "b.png": png(), "b.txt": b"a dog"}
    for name, content in members.items():
        write(tmp_path / "d" / name, content)
    data = tmp_path / "d" if form == "folder" else make_tar(tmp_path / "d.tar", *members.items())
    manifest = read_manifest(str(data))
    rows = Rows(manifest, images=ImageInput(view=to_tensor, size=(3, 4)))
    batch = rows.__getitems__(WorkItem((0, 1), texts=range(1)))
    assert batch["usable"].tolist() == [True, True]
    assert batch["text_valid"].tolist() == [[False], [True]]
    assert batch["image"][0, 0, 0, 0, 0] == 9 / 255
    ((reason, count),) = named(manifest).items()
    assert "which cannot be read" in reason
    assert count[0] == 1
    assert Sample("a", "a.png", problem="no picture").picture_problem == "no picture"


@pytest.mark.parametrize("column", ["texts", "label", "split", "problem", "task"])
def test_text_that_no_file_can_hold_is_replaced_in_every_column(column: str):
    value = "so \ud83d"
    sample = Sample("a", "a.png", **{column: (value,) if column == "texts" else value})
    row = make_manifest("d", Path("d"), [sample, Sample("b", "b.png")]).row(0)
    assert getattr(row, column) == (("so \ufffd",) if column == "texts" else "so \ufffd")


def test_class_names_of_another_encoding_are_refused_and_a_mark_is_none_of_them(tmp_path):
    assert read_manifest(str(write(tmp_path / "a.txt", "zo\xe9\n".encode("utf-16")))).column("key") == [
        "zo\xe9"
    ]
    with pytest.raises(UserError, match=r"b.txt is not UTF-8 \(byte e9 at 2\)"):
        read_manifest(str(write(tmp_path / "b.txt", b"zo\xe9\n")))


def test_one_line_of_cc3m_in_another_encoding_is_one_bad_row(tmp_path):
    write(
        tmp_path / "x.tsv", b"\xef\xbb\xbfa dog\thttp://x/0.png\nzo\xe9\thttp://x/1.png\nb\thttp://x/2.png\n"
    )
    fill(tmp_path / "x", "000000000.png", "000000002.png", "000000007.png", "._000000001.png")
    manifest = read_manifest(str(tmp_path / "x.tsv"))
    assert manifest.column("texts") == [["a dog"], [], ["b"]]
    assert problems(manifest) == {"000000001": "the line is not UTF-8 (byte e9 at 2): save it as UTF-8"}
    assert named(manifest) == {"pictures belong to no line of x.tsv": (1, "x/000000007.png")}


# ----------------------------------------------------------------------------------------------------
# Folders

SPLITS = {  # a path: its split and its label
    "Train/cat/1.png": ("train", "cat"),
    "valid/cat/1.png": ("val", "cat"),
    "Validation/1.png": ("val", ""),
    "dev/cat/1.png": ("val", "cat"),
    "TEST/big cat/1.png": ("test", "big cat"),
    "train2017/1.png": ("train", ""),
    "test_images/cat/1.png": ("test", "cat"),
    "test-dev/1.png": ("test", ""),
    "images/train/cat/1.png": ("train", "cat"),
    "bullet_train/1.png": ("", "bullet_train"),
    "trainval/1.png": ("", "trainval"),
    "animals/train/1.png": ("", "animals/train"),
}


@pytest.mark.parametrize("path", SPLITS)
def test_split_words_in_any_spelling_and_classes_below_them(path: str, tmp_path):
    fill(tmp_path, path, "other/0.png")
    manifest = read_manifest(str(tmp_path))
    rows = {row.image: (row.split, row.label) for row in map(manifest.row, range(2))}
    assert rows == {path: SPLITS[path], "other/0.png": ("", "other")}


def test_splits_below_a_folder_that_lies_alone_and_below_classes(tmp_path):
    fill(tmp_path / "a/flickr", "train/cat/1.png", "Test/cat/2.png")
    manifest = read_manifest(str(tmp_path / "a"))
    assert manifest.column("split") == ["test", "train"]
    assert manifest.column("label") == ["cat", "cat"]
    fill(tmp_path / "b", "cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
    manifest = read_manifest(str(tmp_path / "b"))
    assert manifest.column("split") == ["test", "train"] * 2
    assert manifest.column("label") == ["cat", "cat", "dog", "dog"]


def test_rows_of_no_known_split_are_told_and_never_trained_on(tmp_path, capsys):
    manifest = read_manifest(str(fill(tmp_path, "Train/1.png", "Test/2.png", "extra/3.png")))
    assert "1 rows have no split beside 1 of train, 1 of test" in capsys.readouterr().err
    assert manifest.rows_of_split("train").tolist() == [1]
    assert manifest.rows_of_split("testing").tolist() == [0]
    assert manifest.rows_of_split("val").tolist() == []


def test_splits_in_the_names_of_tars_and_of_sources(tmp_path):
    """Several splits are those of the rows; a name alone is a name."""
    for name in ("x-train-0.tar", "x-validation-1.tar", "rest.tar"):
        make_tar(tmp_path / "shards" / name, ("a.png", png()))
    assert read_manifest(str(tmp_path / "shards")).column("split") == ["", "train", "val"]
    assert read_manifest(str(tmp_path / "shards/x-validation-1.tar")).column("split") == [""]
    fill(tmp_path, "Train/1.png", "test/2.png")
    assert read_manifest(f"{tmp_path}/Train,{tmp_path}/test").column("split") == ["train", "test"]
    assert read_manifest(f"{tmp_path}/test").column("split") == [""]


def test_what_lies_in_a_folder_is_a_row_or_is_named(tmp_path):
    fill(tmp_path, "cat/a.jfif", "cat/b.JPE", "cat/._a.png", "__MACOSX/cat/._a.png", ".git/x", "Thumbs.db")
    fill(
        tmp_path, "cat/lost.txt", "cat/d.heic", "cat/e.heic", "x.parquet", "LICENSE", "many.0001", "many.0002"
    )
    (tmp_path / "empty").mkdir()
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("image") == ["cat/a.jfif", "cat/b.JPE"]
    heic = "files are no pictures that are read (.heic, `pip install pillow-heif` reads them)"
    assert named(manifest) == {
        "folders are hidden or of an operating system": (2, ".git"),
        "files are hidden or of an operating system": (2, "Thumbs.db"),
        "files are no pictures that are read (no known ending)": (3, "LICENSE"),
        "files are no pictures that are read (.parquet)": (1, "x.parquet"),
        heic: (2, "cat/d.heic"),
        "caption files have no picture beside them (.txt)": (1, "cat/lost.txt"),
    }
    facts = describe(find_sources(str(tmp_path)), manifest)
    assert facts["unused"][heic] == {"count": 2, "first": "cat/d.heic"}


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    fill(tmp_path / "pool", "dog/1.png", "bird/2.png")
    fill(tmp_path / "d", "cat/3.png")
    links = {"dog": "../pool/dog", "self": ".", "up": "..", "gone": "nowhere", "cat/cat": "../cat"}
    for name, target in links.items():
        (tmp_path / "d" / name).symlink_to(target)
    (tmp_path / "d/cat/4.png").symlink_to(tmp_path / "pool/bird/2.png")
    # two folders that lead to each other come to an end, too
    (tmp_path / "pool/dog/bird").symlink_to(tmp_path / "pool/bird")
    (tmp_path / "pool/bird/dog").symlink_to(tmp_path / "pool/dog")
    manifest = read_manifest(str(tmp_path / "d"))
    assert manifest.column("image") == ["cat/3.png", "cat/4.png", "dog/1.png", "dog/bird/2.png"]
    assert named(manifest)["links lead nowhere"] == (1, "gone")
    assert "links lead back to a folder that is read already" in named(manifest)


def test_a_folder_without_permission_is_named_and_a_lost_mount_stops(tmp_path, monkeypatch):
    fill(tmp_path, "cat/1.png", "dog/2.png")
    scan, error = os.scandir, PermissionError(13, "Permission denied")

    def refuse(path):
        if str(path).endswith("dog"):
            raise error
        return scan(path)

    monkeypatch.setattr(walking.os, "scandir", refuse)
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("image") == ["cat/1.png"]
    assert named(manifest) == {"folders cannot be opened (Permission denied)": (1, "dog")}
    error = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output error"):
        read_manifest(str(tmp_path))


def test_a_caption_that_is_gone_since_it_was_listed_stops_the_command(tmp_path, monkeypatch):
    def gone(path):
        raise FileNotFoundError(2, "No such file or directory")

    fill(tmp_path, "1.png", "1.txt")
    monkeypatch.setattr(folders, "read_regular", gone)
    with pytest.raises(MachineError, match=r"1\.txt: it was listed a moment ago"):
        read_manifest(str(tmp_path))


def test_a_pipe_is_never_opened(tmp_path):
    fill(tmp_path / "d", "b.png", "c.png")
    for name in ("d/a.png", "d/b.txt", "d/metadata.csv", "x.csv", "e/0.tar", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    manifest = read_manifest(str(tmp_path / "d"))
    assert problems(manifest) == {
        "a": "the picture is no regular file",
        "b": "the caption file is not read: it is no regular file",
    }
    assert named(manifest) == {
        "tables of captions are not understood (it is no regular file)": (1, "metadata.csv"),
        UNREAD: (1, "b.png"),
    }
    for name in ("x.csv", "e", "x.txt"):
        with pytest.raises(UserError, match="no regular file"):
            read_manifest(str(tmp_path / name))


def test_tables_of_captions_beside_pictures(tmp_path):
    """Hugging Face's imagefolder at the root and in a split, and Flickr8k's captions.txt."""
    fill(tmp_path / "a", "1.png", "deep/2.png", "train/3.png", "train/4.png")
    write(
        tmp_path / "a/metadata.csv", '\ufefffile_name, Text\n1.png,"a dog, brown"\ndeep/2.png,x\nno.png,y\n'
    )
    lines = [{"file_name": "3.png", "text": ["p", None, "q"]}, {"file_name": "4.png", "text": {"en": "x"}}]
    write(tmp_path / "a/train/metadata.jsonl", "\n".join(map(json.dumps, lines)))
    manifest = read_manifest(str(tmp_path / "a"))
    assert texts(manifest) == {"1": ("a dog, brown",), "deep/2": ("x",), "train/3": ("p", "q"), "train/4": ()}
    assert problems(manifest) == {
        "train/4": "the captions in line 2 of train/metadata.jsonl: a caption is a record of en, a text is expected"
    }
    assert named(manifest) == {
        "pictures named by metadata.csv are not there": (1, "no.png"),
        UNREAD: (1, "train/4.png"),
    }

    fill(tmp_path / "b", "Images/1.png", "Images/2.png")
    write(
        tmp_path / "b/captions.txt", "image,caption\n1.png,A dog .\n1.png,It runs .\n2.png,A cat, and a dog\n"
    )
    manifest = read_manifest(str(tmp_path / "b"))
    assert texts(manifest) == {"Images/1": ("A dog .", "It runs ."), "Images/2": ()}
    assert problems(manifest) == {
        "Images/2": "the captions in line 4 of captions.txt: it has 3 fields, the header has 2"
    }

    write(tmp_path / "b/captions.txt", "just some notes\n")
    (reason,) = named(read_manifest(str(tmp_path / "b")))
    assert reason.startswith("tables of captions are not understood (a header with `file_name` and `text`")


@QUICK
@given(
    names=st.lists(
        st.sampled_from(
            [
                "a.png",
                "a.txt",
                "a.json",
                "b.JPG",
                "b.TXT",
                "c.heic",
                "notes",
                "._a.png",
                "d/a.png",
                "d/b.txt",
                "train/a.png",
                "d/.x/a.png",
                "metadata.csv",
            ]
        ),
        min_size=1,
        unique=True,
    )
)
def test_files_of_a_folder_are_rows_or_named(names):
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), "0.png", *names)
        manifest = read_manifest(folder)
    used = set(manifest.column("image"))
    present = {"0.png", *names}
    beside = {
        name
        for name, picture in itertools.product(present, used)
        if os.path.splitext(name)[0] == os.path.splitext(picture)[0]
        and name.lower().endswith((".txt", ".json"))
    }
    assert len(used | beside) + manifest.unused.total == len(present)


def test_a_folder_at_a_url_is_read_as_here(tmp_path):
    fill(
        tmp_path / "d",
        "Train/1.png",
        "Train/1.TXT",
        "dev/2.png",
        ".x/3.png",
        "._4.png",
        "notes.md",
        "lost.txt",
    )
    write(tmp_path / "d/metadata.csv", "file_name,text\ndev/2.png,from the table\n")
    url = f"memory://{tmp_path.name}/d"
    as_path(url).fs.put(str(tmp_path / "d"), f"/{tmp_path.name}/d", recursive=True)
    here, there = read_manifest(str(tmp_path / "d")), read_manifest(url)
    assert there.table.equals(here.table)
    assert there.column("split") == ["train", "val"]
    assert there.column("texts") == [["text 1"], ["from the table"]]
    assert sorted(named(there).items()) == sorted(named(here).items())


# ----------------------------------------------------------------------------------------------------
# Tars


def test_rows_of_several_archives_in_one_file_have_their_own_pictures(tmp_path):
    one = make_tar(tmp_path / "1.tar", ("a.png", png(1)), ("a.txt", "x")).read_bytes()
    two = make_tar(tmp_path / "2.tar", ("b.png", png(2)), ("b.txt", "y")).read_bytes()
    manifest = read_manifest(str(write(tmp_path / "all.TAR", one + two)))
    assert texts(manifest) == {"all/a": ("x",), "all/b": ("y",)}
    assert [shade(manifest, row) for row in range(2)] == [1, 2]
    assert not named(manifest)
    manifest = read_manifest(str(write(tmp_path / "junk.tar", one + b"junk" * 300)))
    assert named(manifest) == {
        "tars have bytes behind their end that are no members": (1, f"junk.tar at byte {len(one):,}")
    }


@pytest.mark.parametrize("lost", ["2.png", "1.txt"])
def test_rows_behind_a_damaged_header_are_read_and_those_beside_it_say_so(lost: str, tmp_path):
    members = [
        (f"{i}.{kind}", png(i) if kind == "png" else f"{i}") for i in range(4) for kind in ("png", "txt")
    ]
    content = bytearray(make_tar(tmp_path / "a.tar", *members).read_bytes())
    at = content.index(lost.encode())
    content[at + 148 : at + 156] = b"zzzzzzzz"  # its checksum
    manifest = read_manifest(str(write(tmp_path / "a.tar", bytes(content))))
    assert manifest.column("key") == [f"a/{i}" for i in range(4)]
    row, what = f"a/{lost[0]}", "picture" if lost == "2.png" else "captions"
    assert problems(manifest) == {row: f"the {what} may be lost: the tar is damaged at byte {at:,}"}
    (where,) = named(manifest).values()
    assert where == (1, f"a.tar at byte {at:,}")
    assert shade(manifest, 3) == 3


def test_a_tar_without_an_end_is_told(tmp_path):
    content = make_tar(tmp_path / "a.tar", ("a.png", png(1)), ("b.png", png(2))).read_bytes()
    manifest = read_manifest(str(write(tmp_path / "a.tar", content[: content.index(b"b.png")])))
    assert manifest.column("key") == ["a/a"]
    assert list(named(manifest)) == ["tars have no end: they are cut off, or their writer was not closed"]


def test_a_text_member_is_no_larger_than_a_caption_whatever_its_header_claims(tmp_path):
    content = make_tar(tmp_path / "a.tar", ("a.png", png(1)), ("b.txt", "x")).read_bytes()
    at = content.index(b"b.txt")
    header = tarfile.TarInfo("b.txt")
    header.size = 10 << 30
    claim = content[:at] + header.tobuf(tarfile.GNU_FORMAT) + content[at + BLOCK :]
    manifest = read_manifest(str(write(tmp_path / "a.tar", claim)))
    assert problems(manifest) == {
        "a/b": "the caption file has 10,737,418,240 bytes, more than the limit of 1,048,576"
    }
    assert named(manifest)


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_what_gnu_tar_writes(form: str, tmp_path):
    """Hard links, symbolic links, holes, long names, folders and pipes."""
    long = "x" * 120
    folder = fill(tmp_path / "s", "a.png", "a.txt", f"{long}.png", "._c.png", "README", "z.npy")
    os.link(folder / "a.png", folder / "b.png")
    write(folder / "b.txt", "a link")
    (folder / "c.png").symlink_to("a.png")
    (folder / "d.png").symlink_to("/etc/passwd")
    os.mkfifo(folder / "e.png")
    with open(folder / "h.txt", "wb") as file:
        file.truncate(3 << 30)
    call = [
        "tar",
        "--sort=name",
        f"--format={form}",
        "--sparse",
        "-cf",
        str(tmp_path / "0.tar"),
        "-C",
        str(folder),
        ".",
    ]
    subprocess.run(call, check=True)
    manifest = read_manifest(str(tmp_path / "0.tar"))
    rows = {row.key.rpartition("/")[2]: row for row in map(manifest.row, range(len(manifest)))}
    assert list(rows) == ["a", "b", "c", "h", long, "z"]
    assert rows["b"].texts == ("a link",)
    assert rows["a"].offset == rows["b"].offset == rows["c"].offset
    assert problems(manifest) == {
        "0/./h": "the caption file has 3,221,225,472 bytes, more than the limit of 1,048,576"
    } or (
        list(problems(manifest).values())
        == ["the caption file is stored with holes: write the tar without --sparse"]
    )
    reasons = {reason.split(" (")[0] for reason in named(manifest)}
    assert reasons == {
        "members are links to what is not in the tar before them",
        "members are no files",
        "members are hidden or of an operating system",
        "members have no ending",
        "members are no pictures that are read",
    }


def test_dots_belong_to_keys_where_no_ending_is_plain(tmp_path):
    dotted = make_tar(tmp_path / "a.tar", ("22.05.png", png(1)), ("22.05.txt", "five"), ("22.06.png", png(2)))
    assert texts(read_manifest(str(dotted))) == {"a/22.05": ("five",), "a/22.06": ()}
    beside = make_tar(tmp_path / "b.tar", ("x.png", png(1)), ("x.seg.png", png(2)), ("x.txt", "t"))
    manifest = read_manifest(str(beside))
    assert texts(manifest) == {"b/x": ("t",)}
    assert [where for _, where in named(manifest).values()] == ["x.seg.png in b.tar"]


def test_members_that_are_not_side_by_side_are_refused_with_advice(tmp_path):
    path = make_tar(tmp_path / "0.tar", ("a.png", png(1)), ("b.png", png(2)), ("a.txt", "x"), ("b.txt", "y"))
    with pytest.raises(UserError, match=r"key '0/a' is repeated.*tar --sort=name"):
        read_manifest(str(path))


def test_what_lies_beside_tars_is_named(tmp_path):
    make_tar(tmp_path / "0.tar", ("a.png", png(1)))
    fill(tmp_path, "1.tar.gz", "2.tgz", "0.parquet", "deep/3.txt")
    assert named(read_manifest(str(tmp_path))) == {
        "compressed tars are not read: uncompress them": (2, "1.tar.gz"),
        "files are no pictures that are read (.parquet)": (1, "0.parquet"),
        "folders beside tars are not entered": (1, "deep"),
    }
    fill(tmp_path / "packed", "1.tar.gz")
    with pytest.raises(UserError, match="compressed tars only"):
        read_manifest(str(tmp_path / "packed"))


@QUICK
@given(
    names=st.lists(
        st.sampled_from(
            ["a.png", "a.txt", "a.cls", "b.JPG", "b.json", "c.heic", "README", "._a.png", "d/e.png", "n.npy"]
        ),
        min_size=1,
        unique=True,
    )
)
def test_members_of_a_tar_are_parts_of_rows_or_named(names):
    with tempfile.TemporaryDirectory() as folder:
        members = [
            (name, "{}" if name.endswith("json") else "1" if name[-3:] in ("txt", "cls") else png(1))
            for name in sorted(names)
        ]
        make_tar(Path(folder, "s.tar"), ("0.png", png(0)), *members)
        manifest = read_manifest(f"{folder}/s.tar")
    parts = [
        name
        for name in names
        if name.lower().endswith((".png", ".jpg", ".txt", ".json", ".cls")) and name[0] != "."
    ]
    assert manifest.unused.total == len(names) - len(parts)
    assert sum(map(bool, manifest.column("image"))) == 1 + sum(
        part.lower().endswith(("png", "jpg")) for part in parts
    )


@settings(QUICK, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 6 * BLOCK - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data()
)
def test_flipped_bytes_of_a_tar_give_rows_or_one_line(flips, data):
    with tempfile.TemporaryDirectory() as folder:
        path = make_tar(Path(folder, "s.tar"), ("a.png", png(1)), ("a.txt", "x"), ("b.png", png(2)))
        content = bytearray(path.read_bytes())
        for at, byte in flips:
            content[at] = byte
        write(path, bytes(content[: data.draw(st.integers(1, len(content)))]))
        try:
            manifest = read_manifest(str(path))
        except UserError:
            return
    assert max(row.offset + row.size for row in map(manifest.row, range(len(manifest)))) <= len(content)
