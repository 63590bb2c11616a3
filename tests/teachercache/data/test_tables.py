"""CSV, TSV, Parquet and Arrow as people and other tools write them: headers, quotes, fields, types, splits."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.core.errors import UserError
from teachercache.data.foreign import Foreign
from teachercache.data.read import read_manifest
from teachercache.data.readers.csv_files import parse_table
from tests.teachercache.data.test_foreign_values import ODD, mutations, read_or_one_line, write


def rows_of(path, content):
    return read_manifest(str(write(path, content))).table.to_pylist()


def texts_of(path, content):
    return {row["key"]: tuple(row["texts"]) for row in rows_of(path, content)}


@pytest.mark.parametrize(
    "content",
    [
        "image,caption\na.png,a dog\n",
        "Image , CAPTION\na.png,a dog\n",
        "image, caption\na.png, a dog\n",
        "image;caption\na.png;a dog\n",
        "sep=;\nimage;caption\na.png;a dog\n",
        "image\tcaption\na.png\ta dog\n",
        '"image"\t"caption"\n"a.png"\t"a dog"\n',
        "image,caption,,\na.png,a dog,,\n\n,,,\n",
        "\ufeffimage,caption\r\na.png,a dog\r\n",
        "image,caption\na.png,a dog\n".encode("utf-16"),
    ],
)
def test_the_header_decides_how_a_table_is_read(tmp_path, content):
    assert texts_of(tmp_path / "t.csv", content) == {"a": ("a dog",)}


@pytest.mark.parametrize(
    "header",
    ["caption,caption", "caption,Caption", "caption,caption.1", "caption_1,caption_2", "text 1,text 2"],
)
def test_several_columns_of_captions_are_all_read(tmp_path, header):
    content = f"image,{header}\na.png,a dog,a brown dog\nb.png,a cat,\n"
    assert texts_of(tmp_path / "t.csv", content) == {"a": ("a dog", "a brown dog"), "b": ("a cat",)}


def test_long_fields_are_read_and_the_limit_of_csv_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    assert texts_of(tmp_path / "t.csv", f"image,text\na.png,{'dog ' * 50_000}\n") == {"a": ("dog " * 50_000,)}
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "b.png,a cat, a bird",
            "line 3 has 3 fields, the header 2: put a text that holds the delimiter between",
        ),
        ("b.png", "line 3 has 1 field, the header 2"),
        (
            'b.png,"a cat\nd.png,a 5"',
            "a quotation mark of line 3 is closed behind line 4, which looks like a row",
        ),
    ],
)
def test_a_line_of_another_length_is_the_problem_of_its_row(tmp_path, line, problem):
    rows = rows_of(tmp_path / "t.csv", f"image,caption\na.png,a dog\n{line}\nc.png,a pig\n")
    assert [row["key"] for row in rows] == ["a", "b", "c"]
    assert [row["problem"][: len(problem)] for row in rows] == ["", problem, ""]


@pytest.mark.parametrize(
    ("lines", "captions"),
    [
        (('a.png\t"Wow a dog', "b.png\ta cat"), ['"Wow a dog', "a cat"]),
        (('a.png\t"Wow', 'b.png\ta 5"'), ['"Wow', 'a 5"']),
        (('a.png\t"a dog" barks', 'b.png\t"a cat"'), ['"a dog" barks', '"a cat"']),
        (('a.png\t"He said ""hi"""', 'b.png\t"open'), ['He said "hi"', '"open']),
        (('a.png\t"a dog"', 'b.png\t"a cat"'), ["a dog", "a cat"]),
    ],
)
def test_a_quotation_mark_swallows_nothing_in_a_tsv(tmp_path, lines, captions):
    found = texts_of(tmp_path / "t.tsv", "\n".join(("image\tcaption", *lines)))
    assert found == {"a": (captions[0],), "b": (captions[1],)}


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=4),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_a_csv_writer_wrote_is_read_as_it_was(captions, delimiter, quoting, ending, encoding):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerows([("image", "caption"), *((f"{i}.png", text) for i, text in enumerate(captions))])
    table = parse_table(file.getvalue().encode(encoding), known=("image",))
    assert table.names == ["image", "caption"]
    if (
        delimiter == "\t"
        and any("\n" in text and "\t" in text for text in captions)
        and quoting != csv.QUOTE_ALL
    ):
        return  # as a mark that is closed lines behind: read line by line
    assert [line.cells for line in table.lines] == [[f"{i}.png", text] for i, text in enumerate(captions)]


def test_words_of_a_split_column_are_understood(tmp_path):
    words = ["Train", "training", "valid", "dev", "Validation", "TEST", "val2014", "minival", ""]
    lines = "".join(f"{i}.png,x,{word}\n" for i, word in enumerate(words))
    rows = rows_of(tmp_path / "t.csv", f"image,text,Split\n{lines}")
    splits = ["train", "train", "val", "val", "val", "test", "val", "minival", ""]
    assert [row["split"] for row in rows] == splits
    table = pa.table(
        {"path": [f"{i}.png" for i in range(len(words))], "text": ["x"] * len(words), "split": words}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_manifest(str(tmp_path / "t.parquet")).column("split") == splits


def test_a_picture_in_two_splits_is_a_problem(tmp_path):
    content = "image,text,split\na.png,x,train\na.png,y,test\nb.png,x,Train\nb.png,y,train\n"
    first, second = rows_of(tmp_path / "t.csv", content)
    assert first["problem"].startswith("line 2 puts the picture into the split train, line 3 into test")
    assert (second["problem"], second["split"]) == ("", "train")
    with_keys = rows_of(tmp_path / "k.csv", "key,image,split\nk,a.png,train\nl,a.png,test\nm,b.png,test\n")
    of_parquet = parquet(
        tmp_path / "t.parquet", image=["a.png", "a.png", "b.png"], split=["Train", "dev", "dev"]
    )
    for rows in (with_keys, of_parquet):
        assert [row["problem"][:40] for row in rows] == ["", "the picture is in the split train in a r", ""]


def test_labels_written_with_gaps_are_whole_numbers(tmp_path):
    content = "image,label\na.png,0.0\nb.png,1.0\nc.png,\nd.png,nan\n"
    assert [row["label"] for row in rows_of(tmp_path / "t.csv", content)] == ["0", "1", "", ""]
    content = "image,label\na.png,1.0\nb.png,beta\n"
    assert [row["label"] for row in rows_of(tmp_path / "t.csv", content)] == ["1.0", "beta"]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return read_manifest(str(path)).table.to_pylist()


def test_a_damaged_data_set_on_disk_is_one_line(tmp_path):
    table = pa.table({"text": ["a dog"]})
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "d.arrow"}], "_indices_data_files": None}
    write(tmp_path / "state.json", json.dumps(state))
    assert read_manifest(str(tmp_path)).column("texts") == [["a dog"]]
    for changed in mutations(state, ODD):
        write(tmp_path / "state.json", json.dumps(changed))
        read_or_one_line(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"image", b"text", b"a.png", b'"', b",", b"\t", b"\n", b"\r", b";", b"\xff", b"\0"])
    )
)
def test_any_bytes_are_a_table_or_a_reason(parts):
    try:
        table = parse_table(b"".join(parts), known=("image",))
    except Foreign:
        return
    assert all(len(line.cells) == len(table.names) for line in table.lines)


BYTES = pa.array([b"x", b"y", b"z"])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("string", lambda column: column),
        ("large_string", lambda column: column.cast(pa.large_string())),
        ("string_view", lambda column: column.cast(pa.string_view())),
        ("dictionary", lambda column: column.dictionary_encode()),
    ],
)
def test_every_kind_of_strings_is_read_as_strings(tmp_path, kind, change):
    rows = parquet(
        tmp_path / "t.parquet",
        Image=change(pa.array(["a.png", None])),
        Caption=change(pa.array(["a dog", None])),
        LABEL=change(pa.array(["dog", None])),
    )
    assert [(row["image"], row["texts"], row["label"]) for row in rows] == [
        ("a.png", ["a dog"], "dog"),
        ("", [], ""),
    ]


@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        ([[{"lang": "en", "text": "a dog"}], [], None], [["a dog"], [], []]),
        ([{"lang": ["en", "de"], "text": ["a dog", "ein Hund"]}] * 3, [["a dog", "ein Hund"]] * 3),
        ([["a dog", None], ["a cat"], None], [["a dog"], ["a cat"], []]),
        ([b"a dog", "\u00e9t\u00e9".encode(), None], [["a dog"], ["\u00e9t\u00e9"], []]),
        ([1.0, 2.5, float("nan")], [["1"], ["2.5"], []]),
    ],
)
def test_captions_of_parquet_are_texts(tmp_path, captions, texts):
    rows = parquet(tmp_path / "t.parquet", jpg=BYTES, caption=pa.array(captions))
    assert [row["texts"] for row in rows] == texts
    assert not any(row["problem"] for row in rows)


def test_cells_that_are_no_texts_are_named(tmp_path):
    with pytest.raises(
        UserError, match=r"t\.parquet: column 'caption' holds struct<en: string> instead of texts"
    ):
        parquet(tmp_path / "t.parquet", jpg=BYTES, caption=pa.array([{"en": "a dog"}] * 3))
    table = pa.Table.from_arrays(
        [BYTES, pa.array(list("abc")), pa.array(list("def"))], ["jpg", "text", "text"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column 'text' comes 2 times"):
        read_manifest(str(tmp_path / "t.parquet"))
    rows = parquet(tmp_path / "t.parquet", jpg=BYTES, caption=pa.array([b"a dog", b"\xe9t\xe9", b"x"]))
    assert [bool(row["problem"]) for row in rows] == [False, True, False]


@pytest.mark.parametrize("keys", [[1, 2, None], [1.0, 2.0, float("nan")], ["1", "2", None]])
def test_keys_of_parquet_are_texts_and_a_missing_one_is_told(tmp_path, capsys, keys):
    rows = parquet(tmp_path / "t.parquet", jpg=BYTES, key=pa.array(keys, from_pandas=False))
    assert [row["key"] for row in rows] == ["1", "2", "t/2"]
    assert "1 rows have no key in column 'key' and get their number: t/2" in capsys.readouterr().err


def test_labels_of_parquet(tmp_path):
    rows = parquet(tmp_path / "t.parquet", jpg=BYTES, label=pa.array([0.0, 1.0, float("nan")]))
    assert [row["label"] for row in rows] == ["0", "1", ""]
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"jpg": BYTES, "label": [1.0, -1.0, None]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "t.parquet")
    assert read_manifest(str(tmp_path / "t.parquet")).column("label") == ["dog", "", ""]


@pytest.mark.parametrize(
    "answers",
    [
        [["red", None], None, []],
        [[{"answer": "red"}, {"answer": None}], None, []],
        [{"answer": ["red", None]}, None, {"answer": []}],
    ],
)
def test_answers_of_parquet_without_nulls(tmp_path, answers):
    rows = parquet(
        tmp_path / "t.parquet",
        jpg=BYTES,
        question=["what?", None, "who?"],
        answers=pa.array(answers),
        answer=["red", "x", None],
    )
    tasks = [json.loads(row["task"] or "{}") for row in rows]
    assert tasks[0] == {"task": "vqa", "question": "what?", "answers": ["red"], "answer": "red"}
    assert [row["problem"] for row in rows] == [
        "",
        "the captions or the question cannot be used: the row has no question",
        "",
    ]


def test_ids_of_coco_join_as_numbers_and_texts_and_strays_are_told(tmp_path, capsys):
    write(tmp_path / "a.png", "x")
    images = [{"id": 7, "file_name": "a.png"}]
    note = {"id": 1, "image_id": "7", "caption": "a dog"}
    strays = [{"id": 2, "image_id": 8, "caption": "a cat"}, {"id": 3, "image_id": 7, "caption": None}]

    def coco(notes):
        return texts_of(tmp_path / "captions.json", json.dumps({"images": images, "annotations": notes}))

    assert coco([note, *strays]) == {"7": ("a dog",)}
    err = capsys.readouterr().err
    assert "1 annotations belong to no picture in `images`: image_id 8" in err
    assert "1 annotations have no caption (null): entry 2 of `annotations`" in err
    read_manifest(str(tmp_path / "captions.json"), quiet=True)  # a second time in one command
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"0 of 1 annotations of .*captions\.json belong to a picture"):
        coco(strays)


def test_questions_join_their_answers_by_ids_of_either_kind(tmp_path):
    write(tmp_path / "val2014/COCO_val2014_000000000007.jpg", "x")
    questions = [
        {"question_id": "70", "image_id": "7", "question": "what?"},
        {"question_id": 71, "image_id": 7, "question": None},
    ]
    answers = [
        {"question_id": 70, "multiple_choice_answer": "dog", "answers": [{"answer": "dog"}, {"answer": None}]}
    ]
    write(tmp_path / "v2_annotations.json", json.dumps({"annotations": answers}))
    content = json.dumps({"data_subtype": "val2014", "questions": questions})
    first, second = rows_of(tmp_path / "v2_questions.json", content)
    assert (first["texts"], first["label"]) == (["what?", "dog"], "dog")
    assert json.loads(first["task"])["answers"] == ["dog"]
    assert (second["problem"], second["texts"], second["task"]) == ("the question is null", [], "")
