"""Every reader of JSON, CSV, Parquet and Arrow over odd values: rows or one line, never a traceback and never a
caption that is the name of a Python value.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD = [None, 7, 1.5, float("nan"), float("inf"), True, "", "x", "half \ud83d", "a\0b", "n" * 300, [], [None], ["x", 3],
       {}, {"lang": "en"}, [{"lang": "en"}], DEEP, 10**400]  # fmt: skip
PYTHON = re.compile(r"\bNone\b|\bnan\b|\{'|\['|\bTrue\b|b'")

COCO = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png", "domain": "in"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "a dog"}, {"id": 2, "image_id": 8, "caption": "a cat"}]}  # fmt: skip
KARPATHY = {"images": [{"filename": "a.png", "filepath": "", "cocoid": 5, "split": "restval", "sentences": [{"raw": "a dog"}]},
                       {"filename": "b.png", "split": "test", "sentences": [{"raw": "a cat"}]}]}  # fmt: skip
LIST = [{"image": "a.png", "caption": ["a dog", "a pet"]}, {"image": "b.png", "caption": "a cat"}]
QUESTIONS = {"data_subtype": "val2014", "questions": [{"question_id": 70, "image_id": 7, "question": "what?"},
                                                      {"question_id": 71, "image_id": 7, "question": "who?"}]}  # fmt: skip
ANSWERS = {"annotations": [{"question_id": 70, "multiple_choice_answer": "dog", "answer_type": "other", "question_type": "what",
                            "answers": [{"answer": "dog", "raw_answer": "dogs"}] * 3},
                           {"question_id": 71, "multiple_choice_answer": "me", "answers": [{"answer": "me"}]}]}  # fmt: skip
SNLI = [{"Flickr30K_ID": "a", "pairID": f"a#{i}", "gold_label": "neutral", "sentence1": "p", "sentence2": "h", "annotator_labels": ["neutral"]}
        for i in range(2)]  # fmt: skip
VCR = [{"img_fn": "m/a.jpg", "metadata_fn": "m/a.json", "annot_id": f"val-{i}", "objects": ["person", "dog"], "answer_label": 1, "rationale_label": 2,
        "question": ["Is", [0], "ok", "?"], "answer_choices": [["a", [1]]] * 4, "rationale_choices": [["r"]] * 4} for i in range(2)]  # fmt: skip
BOXES = {"boxes": [[0, 0, 1, 1, 0.9], [1, 1, 2, 2, 0.5]], "names": ["person", "dog"]}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mutations(value: Any, put: list[Any]) -> Iterator[Any]:
    """Yield copies of a JSON value with each of its parts replaced by each odd value, and with each key removed."""
    places = list(_places(value))
    for place in places:
        for odd in put:
            yield _changed(value, place, odd)
        if isinstance(place[-1], str):
            yield _changed(value, place, ...)
    yield from put


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, inner in entries:
        yield (*above, name)
        yield from _places(inner, (*above, name))


def _changed(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    if odd is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = odd
    return value


def json_text(value: Any, *, lines: bool) -> str:
    if lines and isinstance(value, list):
        return "\n".join(map(json.dumps, value))
    return json.dumps(value)


def read_or_one_line(data: Path) -> Manifest | None:
    """Read data, and check what the rows hold; a UserError has to be one line that names the file."""
    try:
        manifest = read_manifest(str(data))
    except UserError as error:
        message = str(error)
        manifest = None
    if manifest is None:
        assert "\n" not in message, message
        assert str(data.parent) in message
        return None
    for row in manifest.table.select(["texts", "label", "image", "split"]).to_pylist():
        assert not [text for text in (*row["texts"], row["label"], row["image"]) if PYTHON.search(text)], row
    for task in manifest.column("task"):
        assert isinstance(json.loads(task or "{}"), dict)
    return manifest


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "a.jpg", "m/a.jpg", "COCO_val2014_000000000007.jpg"):
        write(tmp_path / name, b"a picture")
    write(tmp_path / "m/a.json", json.dumps(BOXES))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("captions_val2014.json", COCO),
        ("dataset_flickr30k.json", KARPATHY),
        ("karpathy_test.json", LIST),
        ("v2_val2014_questions.json", QUESTIONS),
        ("snli_ve_dev.jsonl", SNLI),
        ("val.jsonl", VCR),
    ],
)
def test_odd_values_of_json_are_rows_or_one_line(pictures, capsys, name, value):
    lines = name.endswith(".jsonl")
    assert len(read_or_one_line(write(pictures / name, json_text(value, lines=lines)))) == 2
    read = 0
    for changed in mutations(value, ODD):
        read += read_or_one_line(write(pictures / name, json_text(changed, lines=lines))) is not None
    assert read  # most odd values are the problem of one row, not of the file


@pytest.mark.parametrize(("name", "value"), [("v2_val2014_annotations.json", ANSWERS), ("m/a.json", BOXES)])
def test_odd_values_beside_the_questions_are_rows_or_one_line(pictures, capsys, name, value):
    data = write(pictures / "v2_val2014_questions.json", json.dumps(QUESTIONS))
    if name == "m/a.json":
        data = write(pictures / "val.jsonl", json_text(VCR, lines=True))
    read = 0
    for changed in mutations(value, ODD):
        write(pictures / name, json.dumps(changed))
        read += read_or_one_line(data) is not None
    assert read  # most odd values are the problem of one row, not of the file
