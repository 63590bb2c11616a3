"""ARO's wrong orders: what each shuffle may move, the same options again, taggers that are there or not."""

import builtins
import json
import random
import sys
import types
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.data import pos_tags
from evaluation.data import word_orders as orders
from evaluation.data.pos_tags import KINDS, Tagger, find_tagger, of_hanta, word_tokenizer
from evaluation.data.word_orders import options_of, pre_caption, stored_options, wrong_options
from teachercache.core.errors import UserError

WORDS = st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.sampled_from(KINDS)), max_size=14)
BY_LETTER = Tagger(
    "letters",
    lambda texts: [
        [(word, KINDS["na".find(word[0])] if word[0] in "na" else "other") for word in text.split()]
        for text in texts
    ],
)


@given(WORDS, st.integers(0, 5))
def test_each_shuffle_keeps_the_words_and_moves_what_it_may(tagged, seed):
    words, kinds = [word for word, _ in tagged], [kind for _, kind in tagged]

    def at(order, *wanted):
        return [word for word, kind in zip(order, kinds, strict=True) if kind in wanted]

    found = orders.shuffle_nouns_and_adjectives(tagged, random.Random(seed))
    for kind in ("noun", "adjective"):
        assert Counter(at(found, kind)) == Counter(at(words, kind))
    assert at(found, "other") == at(words, "other")
    found = orders.shuffle_all_but_nouns_and_adjectives(tagged, random.Random(seed))
    assert at(found, "noun", "adjective") == at(words, "noun", "adjective")
    assert Counter(found) == Counter(words)
    found = orders.shuffle_within_trigrams(words, random.Random(seed))
    for i in range(0, len(words), 3):
        assert Counter(found[i : i + 3]) == Counter(words[i : i + 3])
    found = orders.shuffle_trigrams(words, random.Random(seed))
    assert Counter(found) == Counter(words)


def test_threes_change_places_as_wholes():
    words = [f"w{i}" for i in range(8)]
    seen = {tuple(orders.shuffle_trigrams(words, random.Random(seed))) for seed in range(60)}
    a, b, c = ("w0", "w1", "w2"), ("w3", "w4", "w5"), ("w6", "w7")
    assert seen == {a + b + c, a + c + b, b + a + c, b + c + a, c + a + b, c + b + a}


def test_every_order_is_drawn():
    tagged = [
        ("n1", "noun"),
        ("x", "other"),
        ("n2", "noun"),
        ("a1", "adjective"),
        ("a2", "adjective"),
        ("y", "other"),
    ]
    for shuffle, number in (
        (orders.shuffle_nouns_and_adjectives, 4),
        (orders.shuffle_all_but_nouns_and_adjectives, 2),
    ):
        assert len({tuple(shuffle(tagged, random.Random(seed))) for seed in range(60)}) == number


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ('A dog: "runs" (fast)!', "a dog runs fast"),
        ("Two  men;\n one * hat~ #1 .", "two men one hat 1"),
        ("It's a well-known, old house.\n", "it's a well-known, old house"),
        (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(30))),
    ],
)
def test_captions_lose_what_blip_takes_away(caption, wanted):
    assert pre_caption(caption) == wanted


def test_options_are_five_the_true_one_first_and_the_same_again():
    captions = ["Nice nut and apple near nothing else.", "Nut.", "one two three four five six seven"]
    made = options_of(captions, BY_LETTER, seed=3)
    assert made == options_of(captions, BY_LETTER, seed=3)
    assert made.texts != options_of(captions, BY_LETTER, seed=4).texts
    for caption, group in zip(captions, made.texts, strict=True):
        assert len(group) == 5
        assert group[0] == pre_caption(caption)
    assert made.texts[2][1] == made.texts[2][0]  # neither nouns nor adjectives
    assert made.texts[2][2] != made.texts[2][0]
    assert wrong_options(made.texts[1]) == []
    assert made.texts[0][3].split() != made.texts[0][0].split()


def test_an_option_that_differs_in_spaces_alone_is_none():
    assert wrong_options(["a dog's tail, red", "a dog 's tail , red", "a tail 's dog , red"]) == [
        "a tail 's dog , red"
    ]


def test_options_are_kept_beside_the_data(tmp_path, monkeypatch):
    captions = ["A red dog near a small old tree."]
    (tmp_path / "pos_tags.json").write_text(
        json.dumps({captions[0]: [[word, "other"] for word in captions[0].split()]})
    )
    path = tmp_path / "set_options.json"
    made = stored_options(path, captions, seed=1)
    assert (made.tagger, made.seed) == ("pos_tags.json", 1)
    written = path.read_bytes()
    (tmp_path / "pos_tags.json").unlink()
    monkeypatch.setattr(orders, "find_tagger", lambda folder: pytest.fail("asked for a tagger again"))
    assert stored_options(path, captions, seed=2) == made  # what other models were asked counts
    assert path.read_bytes() == written
    with pytest.raises(UserError, match="made of other captions: remove it"):
        stored_options(path, ["Another."])
    for damaged in (b"{", b"[]", b"{}", written.replace(b'["a red', b'["", "a red')):
        assert damaged != written
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a complete file of options"):
            stored_options(path, captions)


def test_options_that_cannot_be_kept_are_used(tmp_path, monkeypatch, capsys):
    def fail(path, content):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(orders, "write_whole", fail)
    monkeypatch.setattr(orders, "find_tagger", lambda folder: BY_LETTER)
    assert len(stored_options(tmp_path / "set_options.json", ["a b c d e f"]).texts) == 1
    assert "not stored" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# Taggers


def test_hanta_knows_nouns_and_adjectives():
    pytest.importorskip("HanTa")
    (tagged,) = of_hanta().tag(["The old dog's small house is near two green trees."])
    assert [word for word, kind in tagged if kind == "noun"] == ["dog", "house", "trees"]
    assert [word for word, kind in tagged if kind == "adjective"] == ["old", "small", "green"]
    assert [word for word, _ in tagged] == word_tokenizer()(
        "The old dog's small house is near two green trees."
    )
    assert of_hanta().tag([""]) == [[]]


def test_spacy_comes_first_where_it_has_its_model(tmp_path, monkeypatch):
    """A stand-in with spaCy's names: its model is not on PyPI."""
    words = {"dogs": "NNS", "London": "NNP", "red": "JJ", "older": "JJR", "run": "VBP"}

    class Model:
        meta = types.MappingProxyType({"version": "3.8.0"})

        def pipe(self, texts):
            for text in texts:
                yield [types.SimpleNamespace(text=word, tag_=words[word]) for word in text.split()]

    spacy = types.ModuleType("spacy")
    spacy.load = lambda name: {"en_core_web_sm": Model()}[name]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    tagger = find_tagger(tmp_path)
    assert tagger.name == "spacy en_core_web_sm 3.8.0"
    assert tagger.tag(["older red dogs run London"]) == [
        [("older", "adjective"), ("red", "adjective"), ("dogs", "noun"), ("run", "other"), ("London", "noun")]
    ]

    def missing(name):
        raise OSError(f"[E050] Can't find model '{name}'")

    spacy.load = missing
    monkeypatch.setattr(pos_tags, "of_hanta", lambda: BY_LETTER)
    assert find_tagger(tmp_path) is BY_LETTER


def test_without_any_tagger_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name.split(".")[0] in ("spacy", "HanTa", "nltk"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'teachercache\[eval\]', or put pos_tags.json beside"):
        find_tagger(tmp_path)
    with pytest.raises(UserError, match="NLTK's tokenizer: pip install"):
        word_tokenizer()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object of captions"),
        ("{}", "no tags of the caption 'a b'"),
        ('{"a b": [["a", "verb"]]}', "not pairs of a token and noun, adjective, other"),
        ('{"a b": 3}', "not pairs"),
    ],
)
def test_tags_of_a_file_are_checked(content, said, tmp_path):
    (tmp_path / "pos_tags.json").write_text(content)
    with pytest.raises(UserError, match=said):
        find_tagger(tmp_path).tag(["a b"])
