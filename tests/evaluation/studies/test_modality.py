"""Modality importance against the definition's loops; what is drawn, read back from the pictures; a student's own."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.studies import modality_importance as modality
from teachercache.core.errors import UserError

show = importlib.import_module("scripts.papers.attention")
scene_tasks = importlib.import_module("scripts.datasets.scene_vcr_snli_ve")


def made_up(seed: int, n: int, length: int, *, layers: int = 3, heads: int = 2):
    """Attention that adds up to one, and masks; token 0 is neither, the last are padding."""
    random = np.random.default_rng(seed)
    attention = random.random((layers, n, heads, length, length))
    attention /= attention.sum(-1, keepdims=True)
    text, picture = np.zeros((n, length), bool), np.zeros((n, length), bool)
    for i in range(n):
        words = int(random.integers(1, length - 3))
        text[i, 1 : 1 + words] = True
        picture[i, 1 + words : length - 1] = True
    return attention, picture, text


def slow(parts, layer: int, head: int, which: int, *, per_token: bool) -> float:
    """Mean over rows of the sum (the mean) over a modality's tokens of what [CLS] gives them."""
    values = []
    for attention, *masks in parts:
        for row in range(attention.shape[1]):
            tokens = [j for j in range(attention.shape[-1]) if masks[which][row, j]]
            mass = sum(attention[layer, row, head, 0, j] for j in tokens)
            values.append(mass / len(tokens) if per_token else mass)
    return sum(values) / len(values)


def test_importance_is_the_loop():
    parts = [made_up(0, 5, 9), made_up(1, 3, 12)]
    found = modality.importance(iter(parts))
    for layer in range(3):
        for head in range(2):
            for k, name in enumerate(("picture", "text")):
                assert getattr(found, name)[layer, head] == pytest.approx(
                    slow(parts, layer, head, k, per_token=False)
                )
                per_token = getattr(found, f"{name}_per_token")[layer, head]
                assert per_token == pytest.approx(slow(parts, layer, head, k, per_token=True))
    assert (found.num_rows, found.num_skipped) == (8, 0)
    alone = modality.importance([(attention[..., :1, :], *masks) for attention, *masks in parts])
    np.testing.assert_array_equal(alone.picture, found.picture)  # the query's row is enough


def test_rows_of_one_modality_and_what_is_no_attention():
    attention, picture, text = made_up(0, 4, 9)
    picture[2] = False
    kept = [0, 1, 3]
    found = modality.importance([(attention, picture, text)])
    same = modality.importance([(attention[:, kept], picture[kept], text[kept])])
    np.testing.assert_allclose(found.text, same.text)
    assert (found.num_rows, found.num_skipped) == (3, 1)
    with pytest.raises(UserError, match="no row has both"):
        modality.importance([(attention, np.zeros_like(picture), text)])
    with pytest.raises(ValueError, match="output of its softmax"):
        modality.importance([(attention * 3, picture, text)])


def test_numbers_and_how_they_changed():
    def of(picture, text):
        picture, text = (np.array(values, float) for values in (picture, text))
        return modality.Importance(picture, text, picture / 10, text / 20, num_rows=4, num_skipped=0)

    before, after = (
        of([[0.1, 0.3], [0.2, 0.2]], [[0.8, 0.6], [0.7, 0.5]]),
        of([[0.2, 0.4]] * 2, [[0.5, 0.3]] * 2),
    )
    numbers = modality.as_numbers(before)
    assert numbers["picture_by_layer"] == pytest.approx([0.2, 0.2])
    assert numbers["text_mean"] == pytest.approx(0.65)
    assert numbers["difference"] == pytest.approx((0.5 + 0.4) / 2)
    assert json.loads(json.dumps(numbers)) == numbers
    found = modality.change(before, after)
    assert found["difference_reduction"] == pytest.approx(1 - 0.1 / 0.45)
    assert found["picture_gain"] == pytest.approx(0.5)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_heatmaps_have_one_scale(tmp_path):
    """The color of each model's cells, read from the middle of its field."""

    def flat(picture, text):
        return modality.Importance(
            *(np.full((2, 3), value) for value in (picture, text, picture / 5, text / 5)), 1, 0
        )

    both = {"before": flat(0.2, 0.7), "after": flat(0.7, 0.2)}
    found = pixels(modality.draw_importance(both, tmp_path / "m.png"))
    height, width = found.shape[:2]
    corners = [tuple(found[height * y // 8, width * x // 8]) for y in (2, 6) for x in (2, 5)]
    assert corners[0] == corners[3] != corners[1] == corners[2]
    assert modality.draw_importance(both, tmp_path / "p.png", per_token=True).stat().st_size > 1000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.png", "p.png"]


def test_a_text_is_darker_where_a_word_weighs_more(tmp_path):
    text = "red star left"
    spans = np.array([[m.start(), m.end()] for m in re.finditer(r"\w+", text)] + [[0, 0]])
    found = pixels(
        modality.draw_token_scores(text, {"a": (spans, np.array([0.1, 1.0, 0.4, 9.0]))}, tmp_path / "t.png")
    )
    step = found.shape[1] / (modality.WIDTH + 4)  # the picture begins two characters before the text
    line = found[-50:-15]  # below the heading
    behind = [np.median(line[:, int((2 + start) * step) + 2].mean(-1)) for start, _ in spans[:3]]
    assert behind[1] < behind[2] < behind[0] < 255
    assert np.median(line[:, int((2 + 3) * step) + 2].mean(-1)) == 255  # the space is no word


def test_the_scores_of_special_tokens_darken_nothing():
    shade = modality._shades(8, np.array([[0, 3], [4, 8], [0, 0]]), np.array([0.2, 0.1, 0.9]))
    assert shade[:3] == pytest.approx([0.85] * 3)
    assert shade[3] == 0
    assert shade[4:] == pytest.approx([0.425] * 4)


def test_long_texts_are_wrapped_without_losing_a_character():
    text = " ".join(["word", "x" * 120, *["of"] * 90])
    lines = modality.wrapped(text)
    assert all(0 < end - start <= modality.WIDTH for start, end in lines)
    assert "".join(text[start:end] for start, end in lines).replace(" ", "") == text.replace(" ", "")
    assert modality.wrapped("") == [(0, 0)]


# ----------------------------------------------------------------------------------------------------
# The attention of a student


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A random student as a run, its regions made up; the data that it is asked."""
    from transformers import BertConfig

    from student.inference.answerer import RowsOfRun, TaskModel
    from student.inputs.questions import Task, read_question
    from student.models.single_stream.model import SIZES, Shape, SingleStream
    from student.models.single_stream.tokenizer import encode_pairs, vocabulary_tokenizer
    from teachercache.data.read import read_manifest

    scene_tasks.write_tasks(tmp_path / "scenes", 8, seed=0, size=32, test=0.9)
    data = str(tmp_path / "scenes/vcr1/val.jsonl")
    tokenizer = vocabulary_tokenizer(
        [text for texts in read_manifest(data).column("texts") for text in texts]
    )
    torch.manual_seed(0)
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), type_vocab_size=3, **SIZES["micro"])
    task = Task("vcr", "q2a", 4, 4)
    model = SingleStream(config, Shape("uniter", 6, 4, 4)).eval()
    seen = []

    def read(rows_of, manifest, rows):
        questions = [read_question(rows_of.task, manifest.row(row)) for row in rows.tolist()]
        pairs = [pair for question in questions for pair in question.parts]
        found = encode_pairs(rows_of.tokenizer, pairs, rows_of.max_text)
        box = torch.zeros(len(rows), 3, 4)
        box[:, :2, 2:] = 0.5  # the third region is not there
        batch = {name: getattr(found, name) for name in ("token_type_ids", "attention_mask")}
        batch["text"] = found.ids
        batch = {name: value.unflatten(0, (len(rows), 4)) for name, value in batch.items()}
        batch |= {"region_box": box, "region_feature": torch.rand(len(rows), 3, 6)}
        seen.append(batch)
        yield batch

    monkeypatch.setattr(show, "load_task_model", lambda run, device: TaskModel(task, model, lambda *_: None))
    monkeypatch.setattr(RowsOfRun, "read", read)
    monkeypatch.setattr(show, "load_tokenizer", lambda run: tokenizer)
    monkeypatch.setattr(show, "pick_device", lambda: "cpu")
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        questions = {"task": dataclasses.asdict(task), "max_text": 40}
        made = {"format": 2, "run": {"data": data, "cache": ""}, "questions": questions}
        made["student"] = {"family": "single_stream", "config": {}}
        (tmp_path / name / "run.json").write_text(json.dumps(made))
    return tmp_path, data, model, tokenizer, seen


def test_a_students_first_layer_by_hand(student):
    from teachercache.data.read import read_manifest

    folder, data, model, tokenizer, seen = student
    reader = show.AttentionReader(folder / "before", data, "cpu")
    attention, picture, text = next(reader.batches(read_manifest(data), np.arange(3)))
    (batch,) = seen
    words, regions, mask = (tensor.detach() for tensor in model.embed(batch))
    elements = torch.cat([words, regions], 1)
    layer = model.bert.encoder.layer[0].attention.self
    for row in range(12):
        queries, keys = layer.query(elements[row, :1]), layer.key(elements[row])
        for head in range(2):
            part = slice(16 * head, 16 * (head + 1))
            scores = (queries[:, part] @ keys[:, part].T)[0] / 4
            chances = torch.softmax(scores.masked_fill(~mask[row], -torch.inf), 0)
            np.testing.assert_allclose(attention[0, row, head, 0], chances.detach(), atol=1e-6)
    length = batch["text"].shape[2]
    for row, ids in enumerate(batch["text"].flatten(0, 1).tolist()):
        said = [tokenizer.id_to_token(number) for number in ids]
        assert text[row].tolist() == [not word.startswith("[") for word in said] + [False] * 3
        assert picture[row].tolist() == [False] * length + [True, True, False]


def test_numbers_and_pictures_of_two_runs(student, tmp_path, monkeypatch, capsys):
    folder, data, *_ = student
    words = [
        str(folder / "before"),
        str(folder / "after"),
        "--data",
        data,
        "--out",
        str(folder / "out"),
        "--rows",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["show_attention.py", *words])
    assert show.main() == 0
    numbers = json.loads((folder / "out/modality.json").read_text())
    assert numbers["before"]["num_rows"] == 12
    assert numbers["change"] == pytest.approx({"difference_reduction": 0, "picture_gain": 0}, abs=0.05)
    assert {path.suffix for path in (folder / "out").iterdir()} == {".json", ".png"}
    assert "difference" in capsys.readouterr().out
    (folder / "best").mkdir()
    (folder / "before").rename(folder / "best" / "after")
    monkeypatch.setattr(sys, "argv", ["show_attention.py", str(folder / "best" / "after"), *words[1:]])
    assert show.main() == 0  # two runs of one name
    assert len(json.loads((folder / "out/modality.json").read_text())) == 3
    (folder / "best" / "after").rename(folder / "before")
    for more, message in (
        (["--example", "none"], "no row 'none'"),
        (["--data", str(tmp_path / "no")], "no data at"),
    ):
        monkeypatch.setattr(sys, "argv", ["show_attention.py", *words, *more])
        assert show.main() == 2
        assert message in capsys.readouterr().err
