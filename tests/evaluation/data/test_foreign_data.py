"""Every reader of evaluation data over odd values, bytes and encodings: a value or one line, never a traceback."""

import pytest

from evaluation.data.classification import json_of, lines, tab_rows, words_in_lines
from evaluation.data.coco_instances import checked
from evaluation.data.compositional import (
    read_attributions,
    read_captioned,
    read_relations,
    read_sugar_crepe,
    read_winoground,
)
from evaluation.data.files import file_json
from evaluation.data.pos_tags import of_file
from evaluation.data.word_orders import stored_options
from evaluation.metrics.robustness import read_baselines
from evaluation.tasks.language.glue import GLUE, read_tsv
from evaluation.tasks.language.xsum import read_split
from teachercache.core.errors import UserError
from teachercache.data.sample import BadSample
from tests.teachercache.data.test_foreign_values import ODD, PYTHON, json_text, mutations, write

BOX = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 2, "bbox_h": 2}
PAIR = {"image_path": "a.png", "true_caption": "a dog", "false_caption": "a cat", **BOX}
WINOGROUND = [
    {
        "caption_0": "a",
        "caption_1": "b",
        "image_0": "x",
        "image_1": "y",
        "collapsed_tag": "Both",
        "num_main_preds": 1,
    }
    | {"secondary_tag": "Series"}
]
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
    "categories": [{"id": 3, "name": "dog"}],
    "annotations": [{"id": 9, "image_id": 1, "category_id": 3, "bbox": [0, 0, 2, 2], "iscrowd": 0}],
}
OPTIONS = {"tagger": "t", "seed": 0, "source": "s", "options": [["a", "b", "c", "d", "e"]]}
FILES = {
    "winoground": ("data/examples.jsonl", WINOGROUND, lambda path: read_winoground(path.parent)),
    "relations": ("r.json", [PAIR | {"relation_name": "on"}], read_relations),
    "attributions": ("a.json", [PAIR | {"attributes": ["red", "big"]}], read_attributions),
    "captioned": ("c.json", [{"image": "a.png", "caption": ["a dog"]}], read_captioned),
    "sugar_crepe": (
        "s.json",
        {"0": {"filename": "a.png", "caption": "a", "negative_caption": "b"}},
        lambda path: read_sugar_crepe(path, path.parent),
    ),
    "tags": (
        "pos_tags.json",
        {"a dog": [["a", "other"], ["dog", "noun"]]},
        lambda path: of_file(path).tag(["a dog"]),
    ),
    "options": ("o.json", OPTIONS, lambda path: stored_options(path, ["a"])),
    "instances": ("i.json", INSTANCES, lambda path: checked(file_json(path), path)),
    "names": ("n.json", {"folder": "Name"}, json_of),
    "xsum": (
        "train.jsonl",
        [{"document": "a", "summary": "b"}] * 2,
        lambda path: read_split(str(path.parent), "train"),
    ),
}


def value_or_one_line(read, path):
    """Return what a reader returns; None for a UserError, which is one line that names the folder."""
    try:
        return read(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message, message
    assert str(path.parent.parent) in message
    return None


@pytest.mark.parametrize("name", FILES)
def test_odd_values_are_values_or_one_line(tmp_path, name):
    file, value, read = FILES[name]
    path = tmp_path / "set" / file
    (tmp_path / "set/data/images").mkdir(parents=True)
    for changed in [value, *mutations(value, ODD)]:
        write(path, json_text(changed, lines=file.endswith(".jsonl")))
        found = value_or_one_line(read, path)
        pictures = [case.picture for case in found or () if hasattr(case, "picture")]
        for picture in pictures:
            with pytest.raises(BadSample):  # no name opens anything, and none is a traceback
                picture()
        if name in ("relations", "attributions", "sugar_crepe"):
            assert not [
                case for case in found or () if PYTHON.search(f"{case.true} {case.false} {case.group}")
            ]


BYTES = {
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "latin": b'{"a": "\xe9t\xe9"}',
    "nul": b'{"a": "\0"}',
    "null": b"null",
}
READERS = {
    **{name: (file, read) for name, (file, _, read) in FILES.items()},
    "baselines": ("baselines.csv", read_baselines),
    "glue": ("dev.tsv", lambda path: read_tsv(path, GLUE["SST-2"])),
    "tabs": ("images.txt", lambda path: tab_rows(path, ("path", "id"))),
    "words": ("val.txt", lambda path: words_in_lines(path, 2)),
    "lines": ("val.txt", lines),
}


@pytest.mark.parametrize("name", READERS)
def test_odd_bytes_are_values_or_one_line(tmp_path, name):
    file, read = READERS[name]
    path = tmp_path / "set" / file
    (tmp_path / "set/data/images").mkdir(parents=True)
    for content in BYTES.values():
        value_or_one_line(read, write(path, content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_other_systems_are_understood(tmp_path, encoding):
    def file(name, text):
        return write(tmp_path / name, text.replace("\n", "\r\n").encode(encoding))

    assert json_of(file("n.json", '{"a": "\u00e9"}')) == {"a": "\u00e9"}
    assert lines(file("l.txt", "# comment\na b\n\n")) == ["a b"]
    assert tab_rows(file("t.txt", 'Path\tid\n"a\t1\n'), ("path", "id")) == [{"path": '"a', "id": "1"}]
    assert read_tsv(file("dev.tsv", 'sentence\tlabel\n"a\t1\nb\t0\n'), GLUE["SST-2"]) == (
        [(('"a',), 1), (("b",), 0)],
        0,
    )
    assert read_baselines(file("b.csv", "Model; imagenet1k; imagenet-r\nx; 0.8; 0.3\n")) == {
        "imagenet-r": [(0.8, 0.3)]
    }


def test_ids_of_instances_are_numbers_and_strays_are_told(tmp_path, capsys):
    note = INSTANCES["annotations"][0] | {"image_id": "1", "category_id": "3"}
    found = checked({**INSTANCES, "annotations": [note, note | {"id": 10, "image_id": 5}]}, tmp_path)
    assert [entry["image_id"] for entry in found["annotations"]] == [1]
    assert "1 annotations belong to no picture or no category: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="0 of 1 annotations"):
        checked({**INSTANCES, "annotations": [note | {"image_id": 5}]}, tmp_path)


def test_a_score_that_is_no_number_is_left_out(tmp_path):
    content = "sentence1\tsentence2\tscore\na\tb\tnan\na\tb\tinf\na\tb\t2.5\n"
    assert read_tsv(write(tmp_path / "dev.tsv", content), GLUE["STS-B"]) == ([(("a", "b"), 2.5)], 2)
