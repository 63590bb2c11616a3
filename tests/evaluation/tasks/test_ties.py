"""Data whose numbers would be ties by construction: classes of one name, one picture in several rows, split words."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from own_encoder import ENCODER
from PIL import Image

from evaluation.data.same_pictures import by_picture
from evaluation.data.splits import known_splits, rows_in, rows_or_only_split, rows_to_measure
from evaluation.tasks.encoding.linear_probe import labeled_splits
from evaluation.tasks.encoding.zeroshot import names_beside_data, shared_names
from evaluation.tasks.registry import find
from teachercache.core.errors import UserError
from teachercache.data.manifest import make_manifest
from teachercache.data.read import read_manifest
from teachercache.data.sample import Sample


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def in_several_rows(tmp_path):
    """Six pictures as files with three captions each, and in a tar with three rows each."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for i in range(6):
            write(tmp_path / f"d/{i}.png", png(i))
            write(tmp_path / f"d/{i}.txt", "".join(f"picture {i} text {k}\n" for k in range(3)))
            for k in range(3):
                for name, content in (
                    (f"{i}{k}.png", png(i)),
                    (f"{i}{k}.txt", f"picture {i} text {k}".encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return tmp_path


def test_a_picture_in_several_rows_counts_once_with_all_its_captions(in_several_rows, capsys):
    expected = find("retrieval").function(ENCODER, read_manifest(str(in_several_rows / "d")))
    assert "several times" not in capsys.readouterr().err
    manifest = read_manifest(str(in_several_rows / "0.tar"))
    assert find("retrieval").function(ENCODER, manifest) == expected
    line = "6 pictures come several times, in 18 rows (the rows '0/00' and '0/01' show one)"
    assert line in capsys.readouterr().err
    assert [len(group) for group in by_picture(manifest, range(1, 18))] == [2, 3, 3, 3, 3, 3]


def test_rows_of_one_file_are_one_picture_and_unusable_rows_stay_alone(tmp_path):
    samples = [Sample("a", "x.png", size=3), Sample("b", "x.png", size=3), Sample("c", ""), Sample("d", "")]
    samples += [
        Sample("e", "gone.png"),
        dataclasses.replace(samples[0], key="f", problem="no caption"),
    ]
    write(tmp_path / "x.png", b"abc")
    assert by_picture(make_manifest("d", tmp_path, samples), range(6)) == [[0, 1], [2], [3], [4], [5]]


def test_classes_of_one_name_are_told(tmp_path, capsys):
    assert shared_names(
        {"a/crane": "crane", "b/crane": "Crane ", "tennis_ball": "tennis  ball", "x": "tennis ball"}
    ) == [
        f"the classes {labels} have the same name {name!r}, so no picture of them can be told apart and every one is a "
        "miss: name them in classnames.txt, a line `label<TAB>name` each"
        for labels, name in (("'a/crane', 'b/crane'", "crane"), ("'tennis_ball', 'x'", "tennis ball"))
    ]
    for i, name in enumerate(("birds/crane", "machines/crane", "pets/dog")):
        write(tmp_path / f"d/{name}/{i}.png", png(i))
    manifest = read_manifest(str(tmp_path / "d"))
    find("zeroshot").function(ENCODER, manifest)
    assert "the classes 'birds/crane', 'machines/crane' have the same name 'crane'" in capsys.readouterr().err
    write(
        tmp_path / "d/classnames.txt",
        "\ufeffbirds/crane\ta crane, a bird\r\n\r\nmachines/crane \t a lifting crane\r\n",
    )
    assert names_beside_data(manifest, {"birds/crane", "machines/crane"}) == {
        "birds/crane": "a crane, a bird",
        "machines/crane": "a lifting crane",
    }
    find("zeroshot").function(ENCODER, manifest)
    assert "same name" not in capsys.readouterr().err
    for content, message in (
        ("pets/dog\t\n", "is not `label<TAB>name`"),
        ("pets/dog\ta\npets/dog\tb\n", "twice"),
    ):
        write(tmp_path / "d/classnames.txt", content)
        with pytest.raises(UserError, match=message):
            names_beside_data(manifest, {"pets/dog"})


def of_splits(*splits):
    rows = [Sample(str(i), f"{i}.png", ("x",), label="c", split=split) for i, split in enumerate(splits)]
    return make_manifest("data", Path(), rows)


def test_words_of_splits_are_one_list_for_all_tasks(capsys):
    manifest = of_splits("Training", "validation", "dev", "TEST", "extra")
    assert known_splits(manifest) == ["train", "val", "val", "test", "extra"]
    assert rows_in(manifest, "val").tolist() == [1, 2]
    assert rows_to_measure(manifest).tolist() == [1, 2]
    assert labeled_splits(manifest) == {"train": [0], "val": [1, 2], "test": [3]}
    assert rows_in(of_splits("", ""), "test").tolist() == [0, 1]
    assert rows_or_only_split(of_splits("valid", "val"), "test").tolist() == [0, 1]
    assert "data has no test rows: its only split, val, is measured" in capsys.readouterr().err
    assert rows_or_only_split(of_splits("train"), "test").tolist() == []
    for task, message in (("retrieval", "no test rows with texts"), ("zeroshot", "no test rows")):
        with pytest.raises(UserError, match=rf"{message} \(its splits are minival, train\)"):
            find(task).function(ENCODER, of_splits("train", "minival"))
