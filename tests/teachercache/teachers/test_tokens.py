"""Words of a text beside its picture against loops straight from Eq. 5 and 6, with YAKE itself and the true teacher."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yake
from disturbed import Disturbed, run_build
from small import TINY_CFG, build_cache, error_of, make_folder, run, save_teacher, tree

from teachercache.build.verify import verify_cache
from teachercache.cache import store
from teachercache.cache.spec import fingerprint
from teachercache.core.errors import UserError
from teachercache.data.pictures import decode_image
from teachercache.data.read import read_manifest
from teachercache.teachers.clip import word_selection as tokens
from teachercache.teachers.clip.layers import join_outputs, parse_outputs
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

BOTH = ("embeddings", "tokens", "random_tokens")
FIELDS = ("word_span", "word_score", "word_index", "word_feature", "random_index", "random_feature")
CAPTIONS = (
    "Why is person 3 holding a red umbrella in front of person 1's car?\n A dog, a dog, and THE Dog's bone.  \n...!?",
    "  the well-known mother-in-law isn't here  \n\n",
    "\n",
    "one",
    "is it? is it not",
    "\u00e9t\u00e9 na\u00efve \u4e2d\u6587 x_1 \U0001f600 end",
    " ".join(f"word{i}" for i in range(80)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = TINY_CFG["text_cfg"] | {"context_length": 16}
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", TINY_CFG | {"text_cfg": text}, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row for each caption file and one whose picture is broken."""
    root = make_folder(tmp_path_factory.mktemp("data") / "squares", len(CAPTIONS) + 1)
    for path, caption in zip(sorted(root.rglob("*.txt"), key=lambda path: path.stem), CAPTIONS, strict=False):
        path.write_text(caption)
    broken = next(root.rglob(f"{len(CAPTIONS):03d}.png"))
    broken.write_bytes(b"no picture")
    broken.with_suffix(".txt").write_text("a blue bird on a red tree")
    return root


@pytest.fixture(scope="module")
def cache(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> store.Cache:
    out = tmp_path_factory.mktemp("caches") / "c.zarr"
    run_build(load(str(folder), outputs=BOTH), data, out)
    return store.open_complete(out)


# ----------------------------------------------------------------------------------------------------
# Eq. 5 and 6 by hand


def yakes_weights(text: str, words: list[str]) -> list[float]:
    """S_si / |S_si|_1."""
    scores = yake.KeywordExtractor(lan="en", n=3, dedup_lim=1.0, top=1000).extract_keywords(text)
    values = []
    for word in words:
        stem = word.lower().split("'")[0]
        having = [score for ngram, score in scores if stem in [part.split("'")[0] for part in ngram.split()]]
        values.append(1 / (1 + min(having)) if having else 0.0)
    return [value / (sum(values) or 1) for value in values]


def embed(teacher: Teacher, word: str) -> torch.Tensor:
    with torch.no_grad():
        return teacher.module.encode_text(teacher.tokenize([word]))[0]


def check_text(teacher: Teacher, text: str, picture: Path | None, said: dict[str, np.ndarray]) -> list[str]:
    """The fields of one text against loops; the words that were chosen."""
    text = text.strip()
    words = re.findall(r"\w+(?:['-]\w+)*", text)[:64]
    spans = said["word_span"][said["word_span"].any(1)]
    assert [text[start:end] for start, end in spans] == words
    assert not said["word_score"][len(words) :].any()
    relevance = [0.0] * len(words)
    if picture is not None:
        with torch.no_grad():
            image = teacher.module.encode_image(teacher.view(decode_image(picture.read_bytes()))[None])[0]
        relevance = [torch.cosine_similarity(image, embed(teacher, word), dim=0).item() for word in words]
    total = sum(abs(value) for value in relevance) or 1.0
    expected = [r / total + s for r, s in zip(relevance, yakes_weights(text, words), strict=True)]
    np.testing.assert_allclose(said["word_score"][: len(words)], expected, atol=1e-3)
    seen: set[str] = set()
    candidates = [i for i, word in enumerate(words) if not (word.lower() in seen or seen.add(word.lower()))]
    best = sorted(candidates, key=lambda i: -expected[i])[:3]
    index = said["word_index"].tolist()
    assert [i for i in index if i >= 0] == best
    assert index[len(best) :] == [-1] * (3 - len(best))
    drawn = [i for i in said["random_index"].tolist() if i >= 0]
    assert len({words[i].lower() for i in drawn}) == len(drawn) == min(3, len(candidates))
    for name, places in (("word_feature", index), ("random_feature", said["random_index"].tolist())):
        for j, place in enumerate(places):
            by_hand = embed(teacher, words[place]).numpy() if place >= 0 else 0
            np.testing.assert_allclose(said[name][j], by_hand, rtol=2e-3, atol=2e-3)
    return [words[i] for i in best]


def test_every_text_against_loops(folder, data, cache):
    teacher, manifest = load(str(folder)), store.cached_manifest(cache)
    values = {name: store.read_field(cache, name) for name in FIELDS}
    assert {name: array.shape[2:] for name, array in values.items()} == {
        "word_span": (64, 2),
        "word_score": (64,),
        "word_index": (3,),
        "word_feature": (3, 16),
        "random_index": (3,),
        "random_feature": (3, 16),
    }
    chosen = {}
    for row in range(len(manifest)):
        sample = manifest.row(row)
        picture = None if sample.key.endswith(f"{len(CAPTIONS):03d}") else data / sample.image
        for k in range(manifest.texts):
            text = sample.texts[k] if k < len(sample.texts) else ""
            chosen[text.strip()] = check_text(
                teacher, text, picture, {name: array[row, k] for name, array in values.items()}
            )
    assert len(set(chosen["A dog, a dog, and THE Dog's bone."])) == 3
    assert chosen["one"] == ["one"]
    assert chosen["...!?"] == chosen[""] == []
    assert [entry["reason"] for entry in store.quarantined(cache) if "picture" in entry["reason"]]
    assert np.isfinite(values["word_score"].astype(float)).all()


def test_verify_agrees_and_sees_what_is_wrong(cache, tmp_path):
    report = verify_cache(cache.path, samples=8)
    assert report["ok"]
    assert set(FIELDS) < set(report["cosine"])
    shutil.copytree(cache.path, tmp_path / "c.zarr")
    other = store.open_complete(tmp_path / "c.zarr")
    # the words of every row are those of the row before
    for name in ("word_index", "word_feature", "random_index"):
        rewrite(other, name, lambda values: np.roll(values, 1, 0))
        low = verify_cache(other.path, samples=8)["cosine"][name]["min"]
        assert low < 0.99, name
        rewrite(other, name, lambda values: np.roll(values, -1, 0))
    assert verify_cache(other.path, samples=8)["ok"]


def rewrite(cache: store.Cache, name: str, change) -> None:
    """Change a field of every block, in good order otherwise."""
    rows = cache.meta.block(0)
    chunks = {
        (field, copy): store.read_rows(cache, field, copy, np.array(rows))
        for field in cache.fields
        for copy in range(cache.copies(field))
    }
    chunks["key", 0] = np.array(store.read_keys(cache).tolist(), np.dtypes.StringDType())
    chunks |= {at: change(values) for at, values in chunks.items() if at[0] == name}
    store.write_block(cache, 0, chunks, store.done_record(cache, 0)["invalid"])


def test_of_two_equal_words_either_may_be_chosen(cache, tmp_path):
    """What another device rounds otherwise is no damage: places are compared by the scores that they have now."""
    shutil.copytree(cache.path, tmp_path / "c.zarr")
    other = store.open_complete(tmp_path / "c.zarr")
    from teachercache.build import compare as live

    copy, rows = 0, np.arange(2)
    fields = {name: store.read_rows(other, name, copy, rows).astype(np.float32) for name in FIELDS}
    now = {(name, copy): values for name, values in fields.items()}
    now["word_score", copy][0, :2] = 0.5
    then = {at: values.copy() for at, values in now.items()}
    now["word_index", copy][0], then["word_index", copy][0] = [0, 1, 2], [1, 0, 2]
    left, right = (
        live.comparable(values, other.fields["word_index"], copy, now, then) for values in (now, then)
    )
    assert np.array_equal(left, right)
    left, right = (
        live.comparable(values, other.fields["word_feature"], copy, now, then) for values in (now, then)
    )
    assert not left[0, :2].any()
    assert np.array_equal(left, right)
    assert left[0, 2].any()
    then["word_index", copy][0] = [5, 1, 2]
    left, right = (
        live.comparable(values, other.fields["word_index"], copy, now, then) for values in (now, then)
    )
    assert not np.allclose(left, right, atol=1e-2)


# ----------------------------------------------------------------------------------------------------
# One forward for each word, the same bytes however it was built


def selection_of(teacher):
    """The word selection behind `encode`."""
    return teacher.encode.keywords["selection"]


def test_one_text_forward_for_each_distinct_word(folder, data, tmp_path):
    teacher = load(str(folder), outputs=BOTH)
    shown: list[int] = []
    true_encode = teacher.module.encode_text
    teacher.module.encode_text = lambda ids, **how: shown.append(len(ids)) or true_encode(ids, **how)
    run_build(load(str(folder)), data, tmp_path / "plain.zarr")
    run_build(teacher, data, tmp_path / "c.zarr")
    manifest = read_manifest(str(data))
    words = {
        word
        for row in range(len(manifest))
        for text in manifest.row(row).texts
        for word in re.findall(r"\w+(?:['-]\w+)*", text.strip())[:64]
    }
    pieces = -(-len(manifest) // 5)
    assert sum(shown) - len(words) <= pieces * manifest.texts * 5  # what is left are the texts themselves
    assert sum(size == 1 for size in shown) >= len(words)
    assert len(next(iter(selection_of(teacher).embeddings.values()))) == len(words)
    before = len(shown)
    run_build(
        teacher, data, tmp_path / "again.zarr"
    )  # the same words: known for as long as the teacher lives
    assert sum(size == 1 for size in shown[before:]) <= sum(size == 1 for size in shown[:before]) - len(words)
    assert tree(tmp_path / "again.zarr") == tree(tmp_path / "c.zarr")


def test_batches_of_words_have_one_size(folder, monkeypatch):
    """As on a GPU: what came together with a word is not seen in its embedding."""
    monkeypatch.setattr(tokens, "WORDS_AT_ONCE", {"": 4})
    sizes, words = [], ["a", "dog", "on", "the", "beach", "runs", "fast"]
    found = []
    for order in (words, words[::-1]):
        teacher = load(str(folder), outputs=BOTH)
        true_encode = teacher.module.encode_text
        teacher.module.encode_text = lambda ids, true=true_encode, **how: (
            sizes.append(len(ids)) or true(ids, **how)
        )
        with torch.inference_mode():
            values = selection_of(teacher).features_of(teacher.module, order)
        found.append(dict(zip(order, values, strict=True)))
        for word in words:
            torch.testing.assert_close(found[-1][word], embed(load(str(folder)), word))
    assert sizes == [4] * 4
    for word in words:
        torch.testing.assert_close(found[0][word], found[1][word], rtol=1e-6, atol=1e-7)


def test_killed_and_resumed_is_the_same(folder, tmp_path):
    data = make_folder(tmp_path / "data", 20, texts=2)
    for number, path in enumerate(sorted(data.rglob("*.txt"))):
        path.write_text(
            f"{path.read_text()}{'a dog and a red ball' if number % 3 else 'one bird'} near house {number % 5}"
        )
    disturbed = Disturbed(tmp_path / "runs", folder, data, outputs=BOTH)
    assert len(disturbed.expected) > 2 * len(FIELDS)
    total, out = disturbed.num_events(tmp_path / "events"), disturbed.new_out()
    assert disturbed.kill_at_event(out, total // 2)
    # a build that goes on knows other words than the one that was killed: none of them, or all of them
    other = disturbed.new_out()
    shutil.copytree(out, other)
    assert not disturbed.kill_at_event(out, 10 * total)
    assert tree(out) == disturbed.expected
    assert disturbed.finish(other).rows_written > 0


def test_random_words_depend_on_the_text_alone(folder, tmp_path):
    texts = [f"the quick brown fox number {i} jumps over a lazy dog" for i in range(30)]
    words = tokens.find_words(texts, weighed=False, num_drawn=2)
    assert np.array_equal(words.drawn, tokens.find_words(texts[::-1], weighed=False, num_drawn=2).drawn[::-1])
    counts = np.bincount(words.drawn.ravel(), minlength=11)
    assert (words.drawn >= 0).all()
    assert (counts > 0).sum() >= 9  # every word has its chance
    assert not words.importance.any()


def test_texts_that_were_added(folder, tmp_path):
    """Their words are weighed beside pictures that were there: those are encoded again."""
    data = make_folder(tmp_path / "data", 19)
    teacher = load(str(folder), outputs=BOTH)
    run_build(teacher, data, tmp_path / "c.zarr")
    for number, path in enumerate(data.rglob("*.txt")):
        path.write_text(f"{path.read_text()}another dog in house {number}\n")
    run_build(teacher, data, tmp_path / "c.zarr")
    run_build(load(str(folder), outputs=BOTH), data, tmp_path / "whole.zarr")
    grown, whole = (store.open_complete(tmp_path / name) for name in ("c.zarr", "whole.zarr"))
    assert fingerprint(grown.meta) == fingerprint(whole.meta)
    for name in grown.fields:
        np.testing.assert_allclose(
            store.read_field(grown, name).astype(float),
            store.read_field(whole, name).astype(float),
            atol=2e-3,
        )
    assert verify_cache(tmp_path / "c.zarr", samples=19)["ok"]


# ----------------------------------------------------------------------------------------------------
# Teachers and what can be asked for


def test_clip_lite_and_its_tokenizer(tmp_path):
    """A Hugging Face tokenizer, a text tower of its own; the towers have no space in common, their heads make one."""
    data = make_folder(tmp_path / "data", 3)
    texts = ["A small dog's red ball.", "the house near a river", "two cats"]
    for path, text in zip(sorted(data.rglob("*.txt")), texts, strict=True):
        path.write_text(text)
    cache = store.open_complete(build_cache(data, Path("clip-lite"), tmp_path / "c.zarr", outputs=BOTH))
    teacher, manifest = load("clip-lite"), store.cached_manifest(cache)
    values = {name: store.read_field(cache, name) for name in FIELDS}
    for row in range(3):
        said = {name: array[row, 0] for name, array in values.items()}
        check_text(teacher, manifest.row(row).texts[0], data / manifest.row(row).image, said)


def test_texts_without_pictures(folder, tmp_path):
    (tmp_path / "names.txt").write_text("a red dog\nthe bird\n")
    run_build(load(str(folder), outputs=BOTH), tmp_path / "names.txt", tmp_path / "c.zarr")
    cache = store.open_complete(tmp_path / "c.zarr")
    np.testing.assert_allclose(
        store.read_field(cache, "word_score")[0, 0, :3],
        yakes_weights("a red dog", ["a", "red", "dog"]),
        atol=1e-3,
    )
    assert verify_cache(cache.path, samples=2)["ok"]


def test_the_towers_without_heads_are_refused():
    with pytest.raises(UserError, match="pictures are 1280 wide and its texts 384: tokens need one space"):
        load("clip-lite-towers", outputs=BOTH)


def test_one_request_is_written_in_one_way():
    assert join_outputs(parse_outputs(("tokens:3", "embeddings"))) == ("embeddings", "tokens")
    assert join_outputs(parse_outputs(("random_tokens:2", "tokens:1", "embeddings"))) == (
        "embeddings",
        "tokens:1",
        "random_tokens:2",
    )


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (("tokens",), "--outputs tokens goes with embeddings: write --outputs embeddings,tokens"),
        (
            ("random_tokens:2", "patches"),
            "random_tokens goes with embeddings: write --outputs embeddings,random_tokens:2,",
        ),
        (("embeddings", "tokens:0"), "write how many words are kept, 1 to 64, tokens:2"),
        (("embeddings", "tokens:65"), "write how many words are kept"),
        (("embeddings", "tokens:1+2"), "write how many words are kept"),
        (("embeddings", "tokens:"), "tokens a number, tokens:2"),
        (("embeddings", "tokens", "tokens:2"), "--outputs names tokens twice"),
    ],
)
def test_outputs_that_cannot_be(folder, outputs, says):
    with pytest.raises(UserError) as error:
        load(str(folder), outputs=outputs)
    assert says in str(error.value)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'teachercache\[analyze\]'"):
        load(str(folder), outputs=("embeddings", "tokens"))
    assert load(str(folder), outputs=("embeddings", "random_tokens")).find_words is not None


def test_tokens_at_the_command_line(folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 3)
    words = (
        "build",
        "--teacher",
        folder,
        "--data",
        data,
        "--outputs",
        "embeddings,tokens:1,random_tokens",
        "--workers",
        1,
        "--out",
        tmp_path / "c.zarr",
    )
    assert "leave --views or tokens away" in error_of(capsys, *words, "--views", 2)
    assert run(*words) == 0
    cache = store.open_complete(tmp_path / "c.zarr")
    assert "--outputs embeddings,tokens:1,random_tokens" in cache.command()
    assert store.read_field(cache, "word_index").shape == (3, 1, 1)
    assert run("verify", tmp_path / "c.zarr") == 0
    assert run("info", tmp_path / "c.zarr") == 0
    assert "word_feature" in capsys.readouterr().out
