"""VCR's mitigated sets: rules by hand, words shared and replaced, what a text-only model answers; read unchanged."""

import importlib
import json
import re
import sys

import numpy as np
import pytest

from evaluation.studies import vcr_mitigation as vm
from teachercache.data.read import read_manifest
from tests.teachercache.data.test_inputs import png, vcr_line, write

command = importlib.import_module("scripts.datasets.mitigate_vcr")
OBJECTS = ["person", "person", "cup", "person"]


def line(question: str, *choices: str, label: int = 0, number: int = 0, **more) -> dict:
    """A line of VCR from words; `0,1` is a mention."""

    def tokens(text):
        return [[int(n) for n in word.split(",")] if word[0].isdigit() else word for word in text.split()]

    choices = [*choices, *["Nothing ."] * (4 - len(choices))]
    return vcr_line(
        number,
        objects=OBJECTS,
        question=tokens(question),
        answer_choices=list(map(tokens, choices)),
        answer_label=label,
        **more,
    )


def said(found: dict, k: int) -> str:
    return " ".join(
        ",".join(map(str, token)) if isinstance(token, list) else token
        for token in found["answer_choices"][k]
    )


# ----------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    ("question", "choices", "label", "then"),
    [
        # the four examples that the authors show of their files, persons from 0
        (
            "Where is 1 going ?",
            (
                "1 is going into the store .",
                "1 is getting into a carriage .",
                "0 is going to the bathroom .",
                "0 is going outside to play after the conversation with 1 is over .",
            ),
            0,
            (
                "He is going into the store .",
                "1 is getting into a carriage .",
                "1 is going to the bathroom .",
                "0 is going outside to play after the conversation with 1 is over .",
            ),
        ),
        (
            "What are 0,1 feeling ?",
            (
                "0,1 do not like the restaurant .",
                "They are apprehensive .",
                "They are both feeling happy .",
                "0,1 are feeling drunk .",
            ),
            2,
            (
                "0,1 do not like the restaurant .",
                "0,1 are apprehensive .",
                "They are both feeling happy .",
                "0,1 are feeling drunk .",
            ),
        ),
        (
            "How is 0 feeling ?",
            (
                "0 is feeling amused .",
                "0 is upset and disgusted .",
                "0 is feeling very scared .",
                "0 is feeling uncomfortable with 1 .",
            ),
            1,
            (
                "0 is feeling amused .",
                "He is upset and disgusted .",
                "0 is feeling very scared .",
                "0 is feeling uncomfortable with 1 .",
            ),
        ),
        (
            "How does 0 feel right now ?",
            (
                "0 is tired and concerned .",
                "0 feels admonished .",
                "1 is a bit upset .",
                "0 is aroused and happy .",
            ),
            0,
            (
                "He is tired and concerned .",
                "0 feels admonished .",
                "0 is a bit upset .",
                "0 is aroused and happy .",
            ),
        ),
    ],
)
def test_rules_make_what_is_published(question, choices, label, then):
    given = line(question, *choices, label=label)
    given["rationale_choices"], given["rationale_label"] = given["answer_choices"][::-1], 3 - label
    before = json.dumps(given)
    (found,) = vm.rule_mitigated([given], plural="," in question)
    assert [said(found, k) for k in range(4)] == list(then)
    assert found["rationale_choices"] == found["answer_choices"][::-1]
    assert json.dumps(given) == before
    kept = {name for name in given if not name.endswith("_choices")}
    assert {name: found[name] for name in kept} == {name: given[name] for name in kept}


@pytest.mark.parametrize(
    ("question", "right", "wrong", "right_then", "wrong_then"),
    [
        ("Why is 0 here ?", "0 wants her cup .", "He is late .", "She wants her cup .", "0 is late ."),
        ("Where does 0 go with her cup ?", "Away , says 0 .", "Away .", "Away , says she .", "Away ."),
        (
            "Why is 0 here ?",
            "To 1 , says 0 .",
            "1 and 3 talk .",
            "To 1 , says 0 .",
            "1 and 3 talk .",
        ),  # two: as it was
        (
            "Why is 0 here ?",
            "1 is tired .",
            "1 says 1 is late .",
            "He is tired .",
            "0 says 0 is late .",
        ),  # wherever
        (
            "Why is 0 here ?",
            "0 says he is .",
            "He says 1 is .",
            "0 says he is .",
            "He says 1 is .",
        ),  # one and a he
        (
            "Why is 0 near 2 ?",
            "It is 2 .",
            "It is his cup .",
            "It is 2 .",
            "It is his cup .",
        ),  # a cup is nobody
        (
            "Why is 0 here ? 0 waves .",
            "No one .",
            "0,1 wave .",
            "No one .",
            "0,1 wave .",
        ),  # a group is no person
    ],
)
def test_rule_singular(question, right, wrong, right_then, wrong_then):
    (found,) = vm.rule_mitigated([line(question, wrong, right, label=1)])
    assert (said(found, 1), said(found, 0)) == (right_then, wrong_then)


@pytest.mark.parametrize(
    "question", ["Why ?", "Why is 0 near 1 ?", "What is 2 ?", "Who are 0,1 ?", "Is 0 at 0,3 ?"]
)
def test_rule_singular_leaves_out_what_is_not_about_one_person(question):
    assert vm.rule_mitigated([line(question, "0 is .")]) == []


def test_rule_plural():
    (found,) = vm.rule_mitigated(
        [line("What do 0,1 do ?", "0,3 eat .", "They sleep .", "0,3 sing .", "1 sings .")], plural=True
    )
    assert [said(found, k) for k in range(4)] == ["They eat .", "0,1 sleep .", "0,1 sing .", "1 sings ."]
    asked = ("Why is 0 ?", "Why do 0,1 see 3 ?", "Why do 0,1 see 2 ?", "Is 0,2 here ?", "Do 0,1 see 0,1 ?")
    assert vm.rule_mitigated([line(question, "x") for question in asked], plural=True) == []


# ----------------------------------------------------------------------------------------------------
# Explicit


@pytest.mark.parametrize(
    ("words", "alike"),
    [
        ("walk walks walking walked", True),
        ("make makes making", True),
        ("stop stops stopping stopped", True),
        ("cup cups", True),
        ("city cities", True),
        ("watch watches watching", True),
        ("is it", False),
        ("glass grass", False),
        ("sing singing", True),
        ("bus buses", True),
        ("his hi", False),
    ],
)
def test_lemmas(words, alike):
    assert (len({vm.lemma(word) for word in words.split()}) == 1) == alike


def test_the_overlap_table_is_the_loop():
    lines = [
        line("Why is 0 walking there ?", "0 walks home .", "He walks .", "No .", "Is 0 there ?", label=0),
        line("What is it ?", "A cup .", "The person 's cup is .", "It is it .", "No .", label=1),
    ]
    found = vm.overlap_table(lines)
    # row 1: {why, is, [0], walk, there}: right 2 ([0], walk), wrong 1, 0, 3
    # row 2: {what, is, it}: right 1, wrong 0, 2, 0
    assert found["question_correct"] == pytest.approx((2 + 1) / 2)
    assert found["question_incorrect"] == pytest.approx((4 / 3 + 2 / 3) / 2)
    assert (found["question_correct_more"], found["question_incorrect_more"]) == (1.0, 0.0)
    # objects: person, cup; row 2: right has both, wrong 1, 0, 0
    assert found["image_correct"] == pytest.approx(2 / 2)
    assert found["image_incorrect"] == pytest.approx(1 / 3 / 2)
    assert (found["image_correct_more"], found["image_incorrect_more"]) == (0.5, 0.0)
    assert vm.overlap_table(lines, lemmatize=str)["question_correct"] == pytest.approx((1 + 1) / 2)


SYNONYMS = {"walk": ["stroll"], "coffee cup": ["mug"], "see": ["look"], "orange": ["fruit", "apple"]}


def test_explicit_replaces_what_is_frequent_and_shared_alone():
    lines = [line("Why is 0 walking ?", "He walks fast .", "She walks .", number=i) for i in range(3)]
    lines += [line("Is it a coffee cup ?", "Yes , a Coffee cup .", number=3 + i) for i in range(3)]
    lines += [line("What does 0 see ?", "To see it .", number=9), line("Why ?", "He walks .", number=10)]
    made = vm.explicit_mitigated(lines, SYNONYMS, min_count=3)
    texts = [said(row, 0) for row in made.lines]
    assert texts == ["He strolls fast ."] * 3 + ["Yes , a Mug ."] * 3 + ["To see it .", "He walks ."]
    assert said(made.lines[0], 1) == "She walks ."
    assert made.replaced == {"walk": 3, "coffee cup": 3}
    assert vm.explicit_mitigated(lines, SYNONYMS, min_count=4).lines == lines
    assert vm.overlap_table(made.lines)["question_correct"] < vm.overlap_table(lines)["question_correct"]


def test_explicit_never_takes_a_word_of_the_question_and_mends_a_and_an():
    lines = [line("Is it an orange or a fruit ?", "It is an orange .")]
    assert said(vm.explicit_mitigated(lines, SYNONYMS, min_count=1).lines[0], 0) == "It is an apple ."
    lines = [line("Is it an orange or an apple ?", "It is an orange .")]
    assert said(vm.explicit_mitigated(lines, SYNONYMS, min_count=1).lines[0], 0) == "It is a fruit ."


def test_explicit_goes_by_the_row_and_the_seed_alone():
    lines = [line("An orange ?", "An orange .", number=i) for i in range(20)]
    one, again, other = (
        vm.explicit_mitigated(lines, SYNONYMS, min_count=1, seed=seed).lines for seed in (0, 0, 1)
    )
    assert one == again != other
    assert {said(row, 0) for row in one} == {"A fruit .", "An apple ."}
    assert vm.explicit_mitigated(lines[7:], SYNONYMS, min_count=1).lines == one[7:]


def test_inflections():
    assert [
        vm.inflected(*words)
        for words in (
            ("stroll", "walking", "walk"),
            ("move", "walked", "walk"),
            ("watch", "sees", "see"),
            ("mug", "cup", "cup"),
            ("sing", "bring", "bring"),
        )
    ] == ["strolling", "moved", "watches", "mug", "sing"]


# ----------------------------------------------------------------------------------------------------
# Implicit


def test_implicit_parts_by_hand():
    given = {
        "val-0": [5.0, 0, 0, 0],  # right: e^5 / (e^5 + 3) = .98
        "val-1": [2.0, 0, 0, 0],  # right, .71
        "val-2": [0.0, 5, 0, 0],  # wrong and sure
        "val-3": [1.0, 1, 1, 1],  # a tie is not right
        "val-4": [0.95, 0.05, 0, 0],  # chances already
        "val-5": [0.9, 0.1, 0, 0],  # no more than .9
    }
    lines = [line("Why ?", "x", number=i) for i in range(6)]
    parts = vm.implicit_parts(lines, given)
    names = {name: [row["annot_id"] for row in part] for name, part in parts.items()}
    assert names == {
        "language_biased": ["val-0", "val-4"],
        "image_biased": ["val-2", "val-3"],
        "unsure": ["val-1", "val-5"],
    }
    assert len(vm.implicit_parts(lines, given, sure=0.5)["unsure"]) == 0


# ----------------------------------------------------------------------------------------------------
# The command, and what is published


@pytest.fixture
def vcr(tmp_path):
    write(tmp_path / "vcr1images/m/a@0.jpg", png(1))
    write(tmp_path / "vcr1images/m/a@0.json", json.dumps({"boxes": [[0, 0, 1, 1, 1]] * 4}))
    lines = [
        line("Why is 0 walking ?", "0 walks .", "1 runs .", number=0),
        line("Who do 0,1 see ?", "0,1 .", number=1),
    ]
    return write(tmp_path / "vcr1/val.jsonl", "".join(json.dumps(row) + "\n" for row in lines))


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mitigate_vcr.py", *map(str, words)])
    return command.main()


def test_the_command_writes_files_that_are_read_as_vcr(vcr, monkeypatch, capsys):
    words = write(vcr.parent / "words.json", json.dumps({"walk": ["stroll"]}))
    text = write(vcr.parent / "text.json", json.dumps({"val-0": [9, 0, 0, 0], "val-1": [0, 9, 0, 0]}))
    np.savez(vcr.parent / "text.npz", annot_id=["val-0", "val-1"], scores=[[9.0, 0, 0, 0], [0, 9, 0, 0]])
    for options, made in (
        (["singular", vcr], {"rule_singular": 1}),
        (["plural", vcr], {"rule_plural": 1}),
        (["explicit", vcr, "--words", words, "--min-count", 1], {"explicit": 2}),
        (["implicit", vcr, "--scores", text], {"language_biased": 1, "image_biased": 1}),
        (["implicit", vcr, "--scores", vcr.parent / "text.npz"], {"language_biased": 1, "image_biased": 1}),
    ):
        assert run(monkeypatch, *options) == 0
        for name, count in made.items():
            manifest = read_manifest(str(vcr.with_name(f"val_{name}.jsonl")))
            assert (len(manifest), set(manifest.column("problem")), manifest.column("split")[0]) == (
                count,
                {""},
                "val",
            )
    singular = read_manifest(str(vcr.with_name("val_rule_singular.jsonl"))).row(0)
    assert singular.texts[1:3] == ("He walks.", "person 1 runs.")
    assert read_manifest(str(vcr.with_name("val_explicit.jsonl"))).row(0).texts[1] == "person 1 strolls."
    capsys.readouterr()
    assert run(monkeypatch, "overlap", vcr) == 0
    assert json.loads(capsys.readouterr().out)["question_correct"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["singular", "none.jsonl"], "no file none.jsonl"),
        (["explicit", "FILE"], "pass --words"),
        (["explicit", "FILE", "--words", "FILE"], "is not a word list"),
        (["explicit", "FILE", "--words", "none.json"], "no word list"),
        (["implicit", "FILE"], "pass --run RUN or --scores"),
        (
            ["implicit", "FILE", "--scores", "short.json"],
            "lacks four scores for 1 lines; the first is 'val-1'",
        ),
        (["singular", "bare.jsonl"], "line 1 of .* has no answer_label"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, vcr, monkeypatch, capsys):
    monkeypatch.chdir(vcr.parent)
    write(vcr.parent / "short.json", json.dumps({"val-0": [1, 2, 3, 4], "val-1": [1, 2]}))
    bare = {name: value for name, value in line("Why ?", "x").items() if name != "answer_label"}
    write(vcr.parent / "bare.jsonl", json.dumps(bare))
    assert run(monkeypatch, *[vcr if word == "FILE" else word for word in words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert re.search(message, error)


@pytest.mark.parametrize(
    "name", ["val_rule_singular", "val_rule_plural", "val_adv_rmtop1", "val_adv_keeptop3"]
)
def test_published_variants_are_read_unchanged(name, vcr):
    changed = line("Why is 0 [MASK] ?", "He [MASK] [MASK] .", "0 [MASK] .")
    path = write(vcr.with_name(f"{name}.jsonl"), json.dumps(changed) + "\n")
    manifest = read_manifest(str(path))
    assert manifest.row(0).texts[:3] == ("Why is person 1 [MASK]?", "He [MASK] [MASK].", "person 1 [MASK].")
    assert (manifest.row(0).split, manifest.row(0).problem) == ("val", "")
