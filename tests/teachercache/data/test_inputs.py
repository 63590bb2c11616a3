"""Tables, task data and texts in their true layouts; several sources at once; `tc manifest`; builds on the new ones."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import build_cache

from teachercache.api import default_cache
from teachercache.cache import store
from teachercache.cli import main
from teachercache.core.errors import UserError
from teachercache.data import columns
from teachercache.data.manifest import Manifest, load_manifest, make_manifest, write_manifest
from teachercache.data.pictures import read_image
from teachercache.data.read import cache_folder, read_manifest
from teachercache.data.readers.questions import mentions_of, render_tokens
from teachercache.data.sample import BadSample, Sample
from tests.teachercache.data.test_readers import assert_pictures, coco, make_tar, png, rows, write

NONE = {"bytes": None, "path": None}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def tasks(manifest: Manifest) -> list[dict]:
    return [json.loads(task) for task in manifest.column("task")]


def table(seeds: list[int], **more: list) -> pa.Table:
    """Rows as `datasets` writes an Image and a ClassLabel column."""
    cells = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": pa.array(cells, IMAGE), **more}).replace_schema_metadata(meta)


def refuses(data: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(str(data))


# ----------------------------------------------------------------------------------------------------
# Parquet


def test_hub_parquet_folder(tmp_path):
    one = table([1, 2, 3], text=["a", "b", "c"], label=[0, 1, -1])
    two = table([4, 5], text=["d", "e"], label=[1, 1])
    (tmp_path / "data").mkdir()
    pq.write_table(one, tmp_path / "data/train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(two, tmp_path / "data/validation-00000-of-00001.parquet")
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("key")[2:4] == ["train-00000-of-00001/2", "validation-00000-of-00001/0"]
    assert manifest.column("split") == ["train"] * 3 + ["val"] * 2
    assert manifest.column("label") == ["cat", "dog", "", "dog", "dog"]
    assert_pictures(manifest, [1, 2, 3, 4, 5])
    for row in (4, 0, 2, 1):  # in any order
        assert np.array_equal(
            read_image(manifest, manifest.row(row)), read_image(manifest, manifest.row(row))
        )
    again = read_manifest(str(tmp_path / "data/*.parquet"))
    assert again.column("key") == manifest.column("key")
    assert read_manifest(str(tmp_path), limit=3).column("key") == manifest.column("key")[:3]


def test_parquet_beside_pictures_is_not_the_data(tmp_path):
    """img2dataset --output_format files, and a manifest saved among its pictures."""
    write(tmp_path / "00000/000000000.png", png(1))
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["a"]}), tmp_path / "00000.parquet")
    manifest = read_manifest(str(tmp_path))
    assert manifest.column("key") == ["00000/000000000"]
    write_manifest(manifest, tmp_path / "m.parquet")
    assert read_manifest(str(tmp_path)).digest == manifest.digest


def test_parquet_of_plain_bytes_with_lists_of_captions_and_keys(tmp_path):
    """As img2dataset --output_format parquet writes it."""
    captions = [["x", "y"], ["z"]]
    pq.write_table(
        pa.table({"jpg": [png(1), png(2)], "key": ["k1", "k2"], "captions": captions}), tmp_path / "0.parquet"
    )
    manifest = read_manifest(str(tmp_path / "0.parquet"))
    assert rows(manifest) == {"k1": ("x", "y"), "k2": ("z",)}
    assert_pictures(manifest, [1, 2])


def test_parquet_of_paths(tmp_path):
    write(tmp_path / "pictures/1.png", png(1))
    values = {
        "image": ["pictures/1.png", "pictures/gone.png", None],
        "caption": ["a", "b", "c"],
        "split": ["test"] * 3,
    }
    pq.write_table(pa.table(values), tmp_path / "l.parquet")
    manifest = read_manifest(str(tmp_path / "l.parquet"))
    assert manifest.column("image") == ["pictures/1.png", "pictures/gone.png", ""]
    assert (manifest.column("size")[0], manifest.column("offset"), manifest.column("split")[0]) == (
        len(png(1)),
        [-1] * 3,
        "test",
    )
    assert np.array_equal(
        read_image(manifest, manifest.row(0)), read_image(manifest, Sample("x", "pictures/1.png"))
    )
    with pytest.raises(BadSample, match="No such file"):
        read_image(manifest, manifest.row(1))


def test_cells_without_bytes(tmp_path):
    write(tmp_path / "there.png", png(7))
    cells = pa.array([{"bytes": None, "path": "there.png"}, NONE, None], IMAGE)
    pq.write_table(pa.table({"image": cells}), tmp_path / "l.parquet")
    manifest = read_manifest(str(tmp_path / "l.parquet"))
    assert_pictures(Manifest("", manifest.root, manifest.table.slice(0, 1), ""), [7])
    for row in (1, 2):
        with pytest.raises(BadSample, match="the row has no picture"):
            read_image(manifest, manifest.row(row))
    with pytest.raises(BadSample, match="the file has 3 rows, not 10"):
        read_image(manifest, Sample("x", "l.parquet", offset=9))


def test_large_row_groups_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "WHOLE_GROUP_BYTES", 0)
    columns._open_parquet.cache_clear()
    pq.write_table(table(list(range(150))), tmp_path / "l.parquet", row_group_size=140)
    manifest = read_manifest(str(tmp_path))
    assert_pictures(manifest, list(range(150)))
    picked = [130, 3, 70, 149, 0, 141]
    assert_pictures(Manifest("", manifest.root, manifest.table.take(picked), ""), picked)
    assert (
        max(
            len(values.values)
            for values in [
                columns._open_parquet(
                    tmp_path / "l.parquet",
                    os.getpid(),
                    (tmp_path / "l.parquet").stat().st_mtime_ns,
                    (tmp_path / "l.parquet").stat().st_size,
                )
            ]
        )
        <= 64
    )


def _pixels(task: tuple[Manifest, int]) -> list:
    manifest, row = task
    return np.asarray(read_image(manifest, manifest.row(row))).tolist()


@pytest.mark.filterwarnings("ignore:This process")  # of forking beside threads, which is what is tested
def test_forked_workers_read_after_their_parent(tmp_path):
    pq.write_table(table([1, 2, 3, 4]), tmp_path / "l.parquet", row_group_size=2)
    manifest = read_manifest(str(tmp_path))
    here = [_pixels((manifest, row)) for row in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_pixels, [(manifest, row) for row in range(4)]).get(timeout=60) == here


def test_digest_of_parquet_sees_other_pictures_and_texts(tmp_path):
    def digest(seeds: list[int], text: str) -> str:
        pq.write_table(table(seeds, text=[text] * len(seeds)), tmp_path / "l.parquet")
        return read_manifest(str(tmp_path / "l.parquet")).digest

    assert digest([1, 2], "a") == digest([1, 2], "a")
    assert len({digest([1, 2], "a"), digest([1, 2], "b"), digest([1, 2, 3], "a")}) == 3


def test_questions_of_the_hub_are_task_columns(tmp_path):
    values = {"question": ["why?"], "answers": [[{"answer": "so", "answer_id": 1}]], "question_id": [5]}
    pq.write_table(table([1], **values), tmp_path / "l.parquet")
    manifest = read_manifest(str(tmp_path))
    assert manifest.row(0).texts == ("why?",)
    assert tasks(manifest) == [{"task": "vqa", "question": "why?", "answers": ["so"], "question_id": 5}]


def test_parquet_errors(tmp_path):
    pq.write_table(pa.table({"width": [1]}), tmp_path / "l.parquet")
    refuses(tmp_path / "l.parquet", r"neither pictures nor texts among its columns \(width\): name a column")
    refuses(write(tmp_path / "m.parquet", "no"), "not a readable Parquet")
    columns._open_parquet.cache_clear()
    pq.write_table(table([1]), tmp_path / "l.parquet")
    manifest = read_manifest(str(tmp_path / "l.parquet"))
    write(tmp_path / "l.parquet", "cut")
    with pytest.raises(BadSample, match=r"l\.parquet is damaged"):
        read_image(manifest, manifest.row(0))


# ----------------------------------------------------------------------------------------------------
# Hugging Face datasets on disk


def save_to_disk(
    folder: Path, shards: list[pa.Table], *, new: object = pa.ipc.new_stream, **state: object
) -> Path:
    """The files of `Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, new(sink, shard.schema) as writer:
            writer.write_table(shard, max_chunksize=2)
    values = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_split": None,
        **state,
    }
    write(folder / "state.json", json.dumps(values))
    write(folder / "dataset_info.json", json.dumps({"features": {"image": {"_type": "Image"}}}))
    return folder


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_saved_dataset(tmp_path, new):
    shards = [
        table([1, 2, 3], caption=["a", "b", "c"], label=[0, 1, 0]),
        table([4], caption=["d"], label=[1]),
    ]
    folder = save_to_disk(tmp_path / "d", shards, new=new)
    manifest = read_manifest(str(folder))
    assert rows(manifest) == {"row/0": ("a",), "row/1": ("b",), "row/2": ("c",), "row/3": ("d",)}
    assert manifest.column("label") == ["cat", "dog", "cat", "dog"]
    assert manifest.column("size") == [len(png(seed)) for seed in (1, 2, 3, 4)]
    assert_pictures(manifest, [1, 2, 3, 4])
    whole = save_to_disk(tmp_path / "whole", [pa.concat_tables(shards)])
    assert read_manifest(str(whole)).column("key") == manifest.column("key")  # however many files
    assert_pictures(read_manifest(str(folder / "data-00001-of-00002.arrow")), [4])


def test_saved_dataset_dict(tmp_path):
    for split, seeds in (("train", [1, 2]), ("test", [3])):
        save_to_disk(tmp_path / "d" / split, [table(seeds, text=["x"] * len(seeds))])
    write(tmp_path / "d/dataset_dict.json", '{"splits": ["train", "test"]}')
    manifest = read_manifest(str(tmp_path / "d"))
    assert manifest.column("key") == ["train/0", "train/1", "test/0"]
    assert manifest.column("split") == ["train", "train", "test"]
    assert_pictures(manifest, [1, 2, 3])


def test_saved_dataset_errors(tmp_path):
    folder = save_to_disk(tmp_path / "d", [table([1])], _indices_data_files=[{"filename": "indices.arrow"}])
    refuses(folder, r"call flatten_indices\(\) before save_to_disk")
    write(folder / "state.json", "{")
    refuses(folder, r"state\.json is missing or damaged")
    refuses(write(tmp_path / "x.arrow", "no"), r"x\.arrow is not a readable Arrow file")


# ----------------------------------------------------------------------------------------------------
# Karpathy's splits and lists of captions


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_karpathy(dataset, tmp_path):
    images = []
    for i, split in enumerate(["train", "restval", "val", "test"]):
        name = f"COCO_val2014_{i:012d}.jpg"
        sentences = [{"tokens": ["a"], "raw": f"A {i}. ", "imgid": i, "sentid": i}, {"raw": "B"}]
        entry = {"filename": name, "imgid": i, "split": split, "sentences": sentences, "sentids": [i]}
        images.append(entry | ({"filepath": "val2014", "cocoid": 100 + i} if dataset == "coco" else {}))
        write(tmp_path / ("val2014" if dataset == "coco" else "flickr30k-images") / name, png(i))
    path = write(tmp_path / f"dataset_{dataset}.json", json.dumps({"dataset": dataset, "images": images}))
    manifest = read_manifest(str(path))
    assert manifest.column("key")[1] == ("101" if dataset == "coco" else "COCO_val2014_000000000001")
    assert manifest.column("split") == ["train", "train", "val", "test"]
    assert manifest.row(2).texts == ("A 2.", "B")
    assert_pictures(manifest, [0, 1, 2, 3])


def test_caption_list(tmp_path):
    values = [{"image": "val2014/a.jpg", "caption": ["x", "y"]}, {"image": "val2014/b.jpg", "caption": "z"}]
    for seed, entry in enumerate(values):
        write(tmp_path / "images" / entry["image"], png(seed))
    values.append({"image": "val2014/b.jpg", "caption": "again"})
    manifest = read_manifest(str(write(tmp_path / "coco_karpathy_test.json", json.dumps(values))))
    assert rows(manifest) == {"val2014/a": ("x", "y"), "val2014/b": ("z", "again")}
    assert manifest.column("split") == ["test", "test"]
    assert_pictures(manifest, [0, 1])
    refuses(write(tmp_path / "l.json", '[{"caption": "x"}]'), r"entry 0 of .*l\.json is not")


# ----------------------------------------------------------------------------------------------------
# CC3M, img2dataset


def cc3m(folder: Path, urls: list[str], *, header: bool = False) -> Path:
    lines = [f'caption "{i}, it is\thttp://x.org/{url}' for i, url in enumerate(urls)]
    return write(
        folder / "Train_GCC-training.tsv", "".join(f"{line}\n" for line in ["caption\turl"] * header + lines)
    )


@pytest.mark.parametrize("header", [False, True])
def test_cc3m_by_row_number(header, tmp_path):
    path = cc3m(tmp_path, ["a.jpg?x=1", "a.jpg", "c.jpg"], header=header)
    write(tmp_path / "Train_GCC-training/00000/000000000.jpg", png(0))
    write(tmp_path / "Train_GCC-training/00000/000000002.png", png(2))
    manifest = read_manifest(str(path))
    assert rows(manifest)["000000001"] == ('caption "1, it is',)
    assert manifest.column("split") == ["train"] * 3
    assert manifest.row(1).problem.startswith("no picture 000000001.jpg or a.jpg in ")
    assert_pictures(Manifest("", manifest.root, manifest.table.take([0, 2]), ""), [0, 2])


def test_cc3m_by_the_name_in_the_url(tmp_path):
    path = cc3m(tmp_path, ["a.jpg?x=1", "b.jpg", "up/c.jpg", "down/c.jpg"])
    for seed, name in enumerate("abc"):
        write(tmp_path / f"images/{name}.jpg", png(seed))
    manifest = read_manifest(str(path))
    assert_pictures(Manifest("", manifest.root, manifest.table.take([0, 1]), ""), [0, 1])
    assert manifest.column("problem")[2:] == ["2 urls end in c.jpg: name the pictures by row number"] * 2


def test_cc3m_without_pictures_says_where_they_go(tmp_path):
    refuses(
        cc3m(tmp_path, ["a.jpg"]),
        r"no picture of Train_GCC-training\.tsv in .*Train_GCC-training: put them there",
    )


def test_img2dataset_tar(tmp_path):
    """A caption with a line break in it is one caption; the Parquet of statistics beside the tar is not the data."""
    members = []
    for i, caption in enumerate(["one", "two\nlines"]):
        facts = {
            "caption": caption,
            "url": "http://x",
            "key": f"{i:09d}",
            "status": "success",
            "error_message": None,
            "width": 7,
            "height": 5,
            "exif": "{}",
            "sha256": "0",
        }
        members += [(f"{i:09d}.jpg", png(i)), (f"{i:09d}.json", json.dumps(facts)), (f"{i:09d}.txt", caption)]
    make_tar(tmp_path / "00000.tar", members)
    pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / "00000.parquet")
    write(tmp_path / "00000_stats.json", "{}")
    manifest = read_manifest(str(tmp_path))
    assert rows(manifest) == {"00000/000000000": ("one",), "00000/000000001": ("two\nlines",)}
    assert_pictures(manifest, [0, 1])


# ----------------------------------------------------------------------------------------------------
# VQA, SNLI-VE, VCR


def vqa(folder: Path, *, prefix: str = "v2_", raw: bool = False, answers: str = "") -> Path:
    questions = [
        {"image_id": 262148, "question": "Where?", "question_id": 262148000},
        {"image_id": 262148, "question": "Who?", "question_id": 262148001},
    ]
    write(folder / "val2014/COCO_val2014_000000262148.jpg", png(1))
    given = [{"answer": "down", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    given = [entry | ({"raw_answer": "downs"} if raw else {}) for entry in given]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "down",
            "answers": given,
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        }
    ]
    write(
        folder / answers / f"{prefix}mscoco_val2014_annotations.json",
        json.dumps({"annotations": annotations}),
    )
    values = {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": {},
        "questions": questions,
    }
    return write(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", json.dumps(values))


@pytest.mark.parametrize(
    ("prefix", "raw", "answers"), [("v2_", False, ""), ("", True, ""), ("v2_", False, "Annotations")]
)
def test_vqa(prefix, raw, answers, tmp_path):
    folder = tmp_path / "Questions" if answers else tmp_path
    path = vqa(folder, prefix=prefix, raw=raw, answers=f"../{answers}" if answers else "")
    manifest = read_manifest(str(path))
    assert rows(manifest) == {"262148000": ("Where?", "down"), "262148001": ("Who?",)}
    assert (manifest.column("label"), manifest.column("split")) == (["down", ""], ["val", "val"])
    first, second = tasks(manifest)
    assert first["answers"] == ["down"] * 10
    assert first.get("raw_answers") == (["downs"] * 10 if raw else None)
    assert (first["answer_type"], first["question_type"], first["id"]) == ("other", "what is", 262148000)
    assert (first["texts"], second["texts"]) == (["question", "answer"], ["question"])
    assert "answers" not in second
    assert_pictures(manifest, [1, 1])


def test_vqa_errors(tmp_path):
    path = vqa(tmp_path)
    refuses(tmp_path / "v2_mscoco_val2014_annotations.json", "pass the file of questions")
    write(tmp_path / "v2_mscoco_val2014_annotations.json", "{")
    refuses(path, r"annotations\.json is not a VQA annotations file")
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    assert read_manifest(str(path)).column("label") == ["", ""]
    (tmp_path / "val2014").rename(tmp_path / "moved")
    refuses(path, r"no picture .*262148\.jpg")


@pytest.mark.parametrize("spelling", ["Flickr30K_ID", "Flikr30kID", "Flickr30kID"])
def test_snli_ve(spelling, tmp_path):
    line = {
        "annotator_labels": ["neutral"],
        "captionID": "12.jpg#0",
        "gold_label": "neutral",
        "pairID": "12.jpg#0r1n",
        spelling: "12",
        "sentence1": "A man.",
        "sentence1_parse": "(",
        "sentence2": "A tall man.",
    }
    broken = {"pairID": "p2", spelling: "13", "gold_label": "-"}
    write(tmp_path / "flickr30k-images/12.jpg", png(1))
    path = write(tmp_path / "snli_ve_dev.jsonl", f"{json.dumps(line)}\n{json.dumps(broken)}\n")
    manifest = read_manifest(str(path))
    assert rows(manifest) == {"12.jpg#0r1n": ("A tall man.",), "p2": ()}
    assert (manifest.column("label"), manifest.column("split")) == (["neutral", ""], ["val", "val"])
    assert manifest.column("problem") == ["", "the line has no sentence2"]
    task = tasks(manifest)[0]
    assert task["choices"][task["label"]] == "neutral"
    assert (task["premise"], task["hypothesis"], task["texts"]) == ("A man.", "A tall man.", ["hypothesis"])
    assert_pictures(Manifest("", manifest.root, manifest.table.slice(0, 1), ""), [1])


def vcr_line(number: int, **more: object) -> dict:
    choices = [
        [[0], "is", "n't", "at", "the", [2], "."],
        ["[MASK]", "left", ",", "too", "."],
        [[0, 1], "'s"],
        ["No"],
    ]
    return {
        "movie": "m",
        "objects": ["person", "person", "chair"],
        "img_fn": "m/a@0.jpg",
        "metadata_fn": "m/a@0.json",
        "question": ["Why", "are", [0, 1], "here", "?"],
        "answer_choices": choices,
        "answer_label": 2,
        "rationale_choices": [["So"], [[1], "said"], ["x"], ["y"]],
        "rationale_label": 1,
        "img_id": "val-0",
        "annot_id": f"val-{number}",
        "match_fold": "val-0",
    } | more


def test_vcr(tmp_path):
    write(tmp_path / "vcr1images/m/a@0.jpg", png(1))
    metadata = {
        "boxes": [[1, 2, 3, 4, 0.9], [0, 0, 1, 1, 0.8], [5, 5, 6, 6, 1]],
        "segms": [],
        "width": 7,
        "height": 5,
    }
    write(tmp_path / "vcr1images/m/a@0.json", json.dumps(metadata))
    test = vcr_line(1)
    del test["answer_label"], test["rationale_label"], test["rationale_choices"]
    lines = [vcr_line(0), test, vcr_line(2, question=["Who", [7]]), vcr_line(3, metadata_fn="m/none.json")]
    lines[3] |= {"answer_label": None}
    for name in ("val", "val_rule_singular"):
        path = write(tmp_path / f"vcr1/{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        manifest = read_manifest(str(path))
        assert manifest.column("split") == ["val"] * 4
    question, rationales = "Why are person 1 and person 2 here?", ("So", "person 2 said", "x", "y")
    choices = ("person 1 isn't at the chair.", "[MASK] left, too.", "person 1 and person 2's", "No")
    without = (question, *choices, *(f"{question} {choice}" for choice in choices))
    assert manifest.row(1).texts == without
    assert manifest.row(0).texts == (
        *without,
        *rationales,
        *(f"{question} person 1 and person 2's {r}" for r in rationales),
    )
    first, second = (json.loads(manifest.row(row).task) for row in (0, 1))
    assert second["texts"] == ["question"] + ["choice"] * 4 + ["pair"] * 4
    assert first["texts"] == [*second["texts"], *["rationale"] * 4, *["rationale_pair"] * 4]
    assert (first["label"], first["rationale_label"], first["rationales"][1]) == (2, 1, "person 2 said")
    assert first["boxes"] == [[1, 2, 3, 4], [0, 0, 1, 1], [5, 5, 6, 6]]
    one, two = ("person 1", 0), ("person 2", 1)
    named = [[one, two], [one, ("chair", 2)], [], [one, two], [], [], [two], [], []]
    texts = (question, *choices, *rationales)
    assert [
        [(text[a:b], place) for a, b, place in said]
        for text, said in zip(texts, first["mentions"], strict=True)
    ] == named
    assert second["mentions"] == first["mentions"][:5]
    assert not {"label", "rationales", "rationale_label"} & set(second)
    assert "names an object that is not among the 3" in manifest.row(2).problem
    assert "boxes" not in json.loads(manifest.row(3).task)
    assert manifest.row(3).texts == (
        *without,
        *rationales,
    )  # which rationale is asked for an answer nobody knows
    assert_pictures(Manifest("", manifest.root, manifest.table.slice(0, 2), ""), [1, 1])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"answer_choices": [["Yes"], ["No"], ["So"]]}, "3 answers and 4 rationales, 4 of each"),
        ({"rationale_choices": [["So"]]}, "4 answers and 1 rationales, 4 of each"),
        ({"answer_label": 4}, "answer_label is 4, 0 to 3"),
        ({"answer_label": -1}, "answer_label is -1"),
        ({"rationale_label": "2"}, "rationale_label is 2"),
    ],
)
def test_vcr_rows_with_other_choices_than_four_are_told(tmp_path, changed, problem):
    write(tmp_path / "vcr1images/m/a@0.jpg", png(1))
    lines = [vcr_line(0), vcr_line(1, **changed)]
    manifest = read_manifest(
        str(write(tmp_path / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    )
    assert manifest.row(0).problem == ""
    assert problem in manifest.row(1).problem
    assert manifest.row(1).texts == ()


def test_a_folder_is_read_without_the_variants_of_its_files_and_says_so(tmp_path, capsys):
    write(tmp_path / "vcr1images/m/a@0.jpg", png(1))
    for name in ("train", "val", "val_rule_singular", "val_explicit"):
        write(tmp_path / f"{name}.jsonl", json.dumps(vcr_line(0)) + "\n")
    assert read_manifest(str(tmp_path)).column("key") == ["train/val-0", "val/val-0"]
    said = capsys.readouterr().err
    assert "left out val_explicit.jsonl, val_rule_singular.jsonl, named after files beside them" in said
    assert len(read_manifest(str(tmp_path / "val_rule_singular.jsonl"))) == 1
    assert len(read_manifest(f"{tmp_path}/val.jsonl,{tmp_path}/val_explicit.jsonl")) == 2


def test_json_lines_errors(tmp_path):
    refuses(write(tmp_path / "x.jsonl", '{"a": 1}\n'), r"neither VCR \(`answer_choices`\) nor SNLI-VE")
    refuses(write(tmp_path / "x.jsonl", '{"sentence2": "a"}\n{'), "line 2 of .* is not JSON")
    refuses(write(tmp_path / "x.jsonl", '{"sentence2": "a"}\n'), "names no picture: one of Flickr30K_ID")
    refuses(write(tmp_path / "v.jsonl", json.dumps(vcr_line(0))), r"put the pictures into .*vcr1images")


def test_mentions_of_many_objects_are_where_the_sentence_names_them():
    objects, tokens = (
        ["person", "cup", "person"],
        ["(", [2, 0, 1], ")", "wo", "n't", ",", [1], "'s", [0, 2], "?"],
    )
    text = render_tokens(tokens, objects)
    assert text == "(person 3, person 1 and cup) won't, cup's person 1 and person 3?"
    assert [(text[a:b], place) for a, b, place in mentions_of(tokens, objects)] == [
        ("person 3", 2),
        ("person 1", 0),
        ("cup", 1),
        ("cup", 1),
        ("person 1", 0),
        ("person 3", 2),
    ]


# ----------------------------------------------------------------------------------------------------
# Task columns in the manifest


def test_task_columns_are_in_the_digest_and_survive(tmp_path):
    plain, task = Sample("a", "a.png", ("x",)), Sample("a", "a.png", ("x",), task='{"label":1}')
    manifest = make_manifest("d", tmp_path, [task])
    assert manifest.digest != make_manifest("d", tmp_path, [plain]).digest
    write_manifest(manifest, tmp_path / "m.parquet")
    assert load_manifest(tmp_path / "m.parquet").row(0) == task


def test_digest_and_manifests_from_before_task_columns(tmp_path):
    manifest = make_manifest("d", tmp_path, [Sample("a", "x/a.png", ("one", "two"), "cat", "train", size=3)])
    assert (
        manifest.digest == "54c7afdd28f75870468282e1267322b48eb4e0a32c9ab6dbe8c2187d9fe50e7c"
    )  # what caches hold
    old = Manifest("d", tmp_path, manifest.table.drop_columns(["task"]), manifest.digest)
    write_manifest(old, tmp_path / "m.parquet")
    assert load_manifest(tmp_path / "m.parquet").table.equals(manifest.table)


# ----------------------------------------------------------------------------------------------------
# Several sources


def test_several_sources_keep_splits_labels_and_pictures(tmp_path):
    write(tmp_path / "photos/train/cat/1.png", png(1))
    path = coco(tmp_path / "coco")
    make_tar(tmp_path / "shards/00.tar", [("a.png", png(5)), ("a.cls", "3")])
    pq.write_table(table([6]), tmp_path / "t.parquet")
    manifest = read_manifest(f"{tmp_path}/photos, {path},{tmp_path}/shards/*.tar,{tmp_path}/t.parquet")
    assert manifest.column("key") == [
        "photos/train/cat/1",
        "captions_val2014/100",
        "captions_val2014/99",
        "captions_val2014/98",
        "00/00/a",
        "t/t/0",
    ]
    assert manifest.column("split")[0] == "train"
    assert (manifest.column("label")[0], manifest.column("label")[4]) == ("cat", "3")
    assert_pictures(manifest, [1, 0, 1, 2, 5, 6])
    assert len(read_manifest(f"{tmp_path}/photos,{path}", limit=2)) == 2
    write_manifest(manifest, tmp_path / "m.parquet")
    assert_pictures(read_manifest(f"{tmp_path}/m.parquet,{tmp_path}/photos"), [1, 0, 1, 2, 5, 6, 1])


def test_sources_of_one_name_and_relative_roots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a/x", "b/x")):
        write(tmp_path / name / "1.png", png(seed))
    manifest = read_manifest("a/x,b/x")
    assert manifest.column("key") == ["a/x/1", "b/x/1"]
    assert_pictures(manifest, [0, 1])
    assert read_manifest("*/x").column("key") == ["a/x/1", "b/x/1"]
    assert_pictures(read_manifest(f"a/x,{tmp_path}/b/x"), [0, 1])


def test_tars_by_glob_have_the_keys_of_their_folder(tmp_path):
    for name in ("a", "b"):
        make_tar(tmp_path / f"s/{name}.tar", [("1.png", png(1))])
    assert read_manifest(f"{tmp_path}/s/*.tar").digest == read_manifest(f"{tmp_path}/s").digest
    refuses(f"{tmp_path}/s/*.zip", r"no data at .*\*\.zip: pass --data FOLDER")


def test_a_comma_in_a_name_is_no_separator(tmp_path):
    write(tmp_path / "a,b/1.png", png(1))
    assert_pictures(read_manifest(str(tmp_path / "a,b")), [1])


def test_default_caches():
    assert str(default_cache("data/photos/", "clip")) == "caches/photos/clip.zarr"
    assert str(cache_folder("shards/*.tar")) == "caches/shards"
    assert str(cache_folder("x/train.json,b,c")) == "caches/train+2"


# ----------------------------------------------------------------------------------------------------
# Texts only, and builds


def test_texts_only(tmp_path):
    path = write(tmp_path / "names.txt", "cat\ndog\n\ncat\n\u00e9t\u00e9\r\n")
    manifest = read_manifest(str(path))
    assert rows(manifest) == {
        "cat": ("cat",),
        "dog": ("dog",),
        "line 3": ("",),
        "cat#2": ("cat",),
        "\u00e9t\u00e9": ("\u00e9t\u00e9",),
    }
    refuses(write(tmp_path / "none.txt", ""), "no pictures or texts found")


def test_build_index_and_search_texts_only(tmp_path, teacher_folder, capsys):
    data = write(tmp_path / "names.txt", "a cat\n\na dog\n")
    out = build_cache(data, teacher_folder, tmp_path / "c.zarr")
    cache = store.open_complete(out)
    assert set(cache.fields) == {"valid", "text_valid", "text_emb"}
    assert store.read_field(cache, "valid").tolist() == [True, False, True]
    assert np.abs(store.read_field(cache, "text_emb")[:, 0]).sum(1).astype(bool).tolist() == [
        True,
        False,
        True,
    ]
    assert "no text that is not empty" in (out / "quarantine.jsonl").read_text()
    assert main(["verify", str(out)]) == 0
    assert main(["index", str(out), "--field", "image_emb"]) == 2
    line = (
        f"has no field 'image_emb': did you mean 'text_emb'? index one with `tc index {out} --field text_emb`"
    )
    assert line in capsys.readouterr().err
    assert main(["index", str(out)]) == 0
    capsys.readouterr()
    assert main(["search", str(out), "a dog", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [result["texts"] for result in found] == [["a dog"], ["a cat"]]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_build_says_the_same_wherever_the_pictures_lie(form, tmp_path, teacher_folder):
    seeds = [1, 2, 3, 4, 5]
    for seed in seeds:
        write(tmp_path / f"folder/{seed}.png", png(seed))
        write(tmp_path / f"folder/{seed}.txt", f"text {seed}")
    values = table(seeds, text=[f"text {seed}" for seed in seeds])
    if form == "parquet":
        pq.write_table(values, tmp_path / "data.parquet", row_group_size=2)
        data = tmp_path / "data.parquet"
    else:
        data = save_to_disk(tmp_path / "data", [values])
    one = build_cache(tmp_path / "folder", teacher_folder, tmp_path / "one.zarr")
    two = build_cache(data, teacher_folder, tmp_path / "two.zarr")
    for name in ("image_emb", "text_emb", "valid"):
        fields = [store.read_field(store.open_complete(path), name) for path in (one, two)]
        assert np.array_equal(*fields)


def test_build_quarantines_what_was_not_downloaded(tmp_path, teacher_folder):
    path = cc3m(tmp_path, ["a.jpg", "b.jpg"])
    write(tmp_path / "images/a.jpg", png(1))
    out = build_cache(path, teacher_folder, tmp_path / "c.zarr")
    assert store.read_field(store.open_complete(out), "valid").tolist() == [True, False]
    assert "no picture 000000001.jpg or b.jpg" in (out / "quarantine.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------
# tc manifest


def test_tc_manifest(tmp_path, capsys):
    path = vqa(tmp_path)
    out = tmp_path / "new/m.parquet"
    assert main(["manifest", str(path), "--out", str(out)]) == 0
    text, err = capsys.readouterr()
    for words in (
        "VQA questions",
        "2, 2 with a picture, 2 with task columns",
        "1 to 2 a row",
        "val 2",
        "down 1",
        "Where? | down",
        "problems   none found",
    ):
        assert words in text
    assert f"pass it as --data {out}" in err
    assert read_manifest(str(out)).digest == read_manifest(str(path)).digest
    assert_pictures(read_manifest(str(out)), [1, 1])
    assert main(["manifest", str(path), "--limit", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["splits"], facts["unusable"]) == (1, {"val": 1}, 0)
    assert facts["first"][0]["key"] == "262148000"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_manifest_with_a_flipped_bit_is_refused(share, tmp_path):
    out = tmp_path / "m.parquet"
    assert main(["manifest", str(vqa(tmp_path)), "--out", str(out)]) == 0
    content = bytearray(out.read_bytes())
    content[int(share * len(content))] ^= 4
    out.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.parquet"):
        read_manifest(str(out))


def test_tc_manifest_names_problems(tmp_path, capsys):
    path = write(tmp_path / "l.csv", "image,text\ngone.png,x\n")
    assert main(["manifest", str(path)]) == 0
    assert "1: the picture is missing or empty" in capsys.readouterr().out
    assert main(["manifest", str(path), "--out", str(tmp_path / "m.json")]) == 2
    assert "name it m.parquet" in capsys.readouterr().err
