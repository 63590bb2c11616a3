"""FAISS beside a cache: the same neighbours as a slow loop, and never those of another build."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from small import chunks_of

from teachercache.cache import store
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core import paths
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path
from teachercache.data.manifest import make_manifest
from teachercache.data.sample import Sample
from teachercache.search import index, index_files
from teachercache.search import vectors as vectors_module
from teachercache.search.verify import damaged_indexes

COMMAND = r"run `tc index .*c\.zarr --field image_emb( --kind \w+)?`"


def make_cache(
    path: Path,
    images: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    texts: np.ndarray | None = None,
    text_valid: np.ndarray | None = None,
    digest: str = "0" * 64,
    keys: list[str] | None = None,
) -> store.Cache:
    """A cache of these vectors, written block by block; one that is there makes room."""
    shutil.rmtree(path, ignore_errors=True)
    rows, dim = images.shape
    keys = [f"k{i}" for i in range(rows)] if keys is None else keys
    fields = [
        Field(name, shape, "image", "float16", "") for name, shape in (("image_emb", (dim,)), ("map", (2, 2)))
    ]
    arrays = {"image_emb": images, "map": np.zeros((rows, 2, 2), np.float16)}
    arrays["valid"] = np.ones(rows, bool) if valid is None else valid
    arrays["key"] = np.array(keys, dtype=np.dtypes.StringDType())
    num_texts = 0 if texts is None else texts.shape[1]
    if texts is not None:
        fields.append(Field("text_emb", (texts.shape[2],), "text", "float16", ""))
        arrays["text_emb"] = texts
        arrays["text_valid"] = np.ones(texts.shape[:2], bool) if text_valid is None else text_valid
    samples = [Sample(key, f"{key}.png", tuple(f"{key} said {k}" for k in range(num_texts))) for key in keys]
    manifest = make_manifest("d", Path("d"), samples)
    meta = CacheMeta(
        spec=TeacherSpec("t", "pretrained", digest, ("embeddings",), tuple(fields), {}, {}, {}),
        data="d",
        manifest=manifest.digest,
        rows=rows,
        texts=num_texts,
        block_rows=256,
        precision="float32",
        versions={},
    )
    cache = store.create(path, meta, manifest)
    for block in range(meta.num_blocks):
        span = meta.block(block)
        bad = [{"row": i, "key": keys[i], "reason": "not a picture"} for i in span if not arrays["valid"][i]]
        store.write_block(cache, block, chunks_of(cache, arrays, span), bad)
    store.finish(cache)
    return cache


def vectors(rows: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors of very different lengths, as float16 stores them."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.standard_normal((rows, 1)))
    return (random.standard_normal((rows, dim)) * scale).astype(np.float16)


def clusters(rows: int, spread: float = 0.4) -> np.ndarray:
    """Vectors in clusters, as embeddings are."""
    random = np.random.default_rng(4)
    centers = random.standard_normal((60, 32))
    return (centers[random.integers(60, size=rows)] + spread * random.standard_normal((rows, 32))).astype(
        np.float16
    )


def brute_force(values: np.ndarray, query: np.ndarray, top: int) -> tuple[list[int], np.ndarray]:
    values, query = values.astype(np.float64), query.astype(np.float64)
    cosine = values @ query / np.linalg.norm(values, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosine)[:top]
    return best.tolist(), cosine[best]


def search(cache: store.Cache, query: np.ndarray, *, field: str = "image_emb", top: int = 10) -> list:
    return index.search(index.open_index(cache, field), query, top=top)


def recall(cache: store.Cache, stored: np.ndarray, queries: np.ndarray) -> float:
    """Share of the true ten nearest that are found."""
    opened = index.open_index(cache, "image_emb")
    shares = [
        len({i for i, _ in index.search(opened, query)} & set(brute_force(stored, query, 10)[0])) / 10
        for query in queries.astype(np.float32)
    ]
    return sum(shares) / len(shares)


# ----------------------------------------------------------------------------------------------------
# Neighbours


def test_flat_search_is_brute_force_cosine(tmp_path):
    images = vectors(700)
    cache = make_cache(tmp_path / "c.zarr", images)
    path, facts = index.build_index(cache)
    assert path == tmp_path / "c.image_emb.faiss"
    assert (facts.kind, facts.vectors, facts.rows) == ("flat", 700, 700)
    assert index.describe(facts) == "700 vectors, flat, exact"
    for query in vectors(20, seed=1).astype(np.float32) * 100:
        ids, cosine = brute_force(images, query, 10)
        found = search(cache, query)
        assert [i for i, _ in found] == ids
        np.testing.assert_allclose([score for _, score in found], cosine, atol=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 7, 700])
@pytest.mark.parametrize("top", [1, 10, 900])
def test_exact_search_in_chunks_is_brute_force(tmp_path, monkeypatch, rows_at_once: int, top: int):
    monkeypatch.setattr(vectors_module, "CHUNK_BYTES", rows_at_once * 16 * 4)
    images = vectors(700)
    valid = np.random.default_rng(2).random(700) > 0.2
    opened = vectors_module.usable_vectors(make_cache(tmp_path / "c.zarr", images, valid=valid), "image_emb")
    queries = vectors_module.unit(vectors(3, seed=1))
    scores, ids = vectors_module.exact_search(opened, queries, top)
    for i, query in enumerate(queries):
        best, cosine = brute_force(images[valid], query, top)
        assert ids[i].tolist() == np.flatnonzero(valid)[best].tolist()
        np.testing.assert_allclose(scores[i], cosine, atol=1e-5)


def test_rows_that_cannot_be_used_are_never_found(tmp_path):
    images = vectors(300)
    valid = np.random.default_rng(2).random(300) > 0.4
    cache = make_cache(tmp_path / "c.zarr", images, valid=valid)
    _, facts = index.build_index(cache)
    assert facts.vectors == valid.sum()
    query = images[np.flatnonzero(~valid)[0]].astype(np.float32)
    found = search(cache, query, top=1000)
    assert sorted(i for i, _ in found) == np.flatnonzero(valid).tolist()


def test_ids_of_texts_count_all_texts_of_all_rows(tmp_path):
    texts = vectors(900, seed=3).reshape(300, 3, 16)
    valid, text_valid = np.ones(300, bool), np.ones((300, 3), bool)
    valid[7], text_valid[8, 1] = False, False
    cache = make_cache(tmp_path / "c.zarr", vectors(300), valid=valid, texts=texts, text_valid=text_valid)
    path, facts = index.build_index(cache, field="text_emb")
    assert path.name == "c.text_emb.faiss"
    assert facts.vectors == 900 - 3 - 1
    for row, k in ((0, 0), (5, 2), (299, 1)):
        (found, score), *_ = search(cache, texts[row, k].astype(np.float32), field="text_emb")
        assert divmod(found, 3) == (row, k)
        assert score == pytest.approx(1, abs=1e-5)
    ids = {i for i, _ in search(cache, texts[8, 1].astype(np.float32), field="text_emb", top=900)}
    assert not ids & {21, 22, 23, 25}


def test_stored_views_are_one_vector_a_row(tmp_path, monkeypatch):
    """The normalised mean of the normalised views, whatever their lengths."""
    plain = make_cache(tmp_path / "c.zarr", vectors(40))
    stored = vectors(120, seed=5).reshape(40, 3, 16)
    fields = {"image_emb": stored, "valid": np.arange(40) != 4}
    monkeypatch.setattr(store, "read_field", lambda cache, name: fields[name])
    cache = store.Cache(plain.path, dataclasses.replace(plain.meta, views=3))
    _, facts = index.build_index(cache)
    assert facts.vectors == 39
    views = stored.astype(np.float64)
    means = (views / np.linalg.norm(views, axis=2, keepdims=True)).mean(1)
    ids, cosine = brute_force(means, means[7] + means[9], 10)
    found = search(cache, means[7] + means[9], top=39)
    assert [i for i, _ in found if i != 4][:9] == [i for i in ids if i != 4][:9]
    assert 4 not in dict(found)
    np.testing.assert_allclose(
        [dict(found)[i] for i in ids if i != 4], cosine[[i != 4 for i in ids]], atol=1e-5
    )


# ----------------------------------------------------------------------------------------------------
# Kinds and their recall


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_every_kind_finds_the_neighbours(tmp_path, kind: str):
    images = clusters(3000)
    cache = make_cache(tmp_path / "c.zarr", images)
    _, facts = index.build_index(cache, kind=kind)
    assert facts.kind == kind
    found = recall(cache, images, images[::60])
    assert found >= (1.0 if kind == "flat" else 0.93)
    if kind == "flat":
        assert (facts.effort, facts.recall_at_10) == ({}, {})
    else:
        assert facts.recall_at_10["image_emb"] >= 0.95
        assert facts.recall_at_10["image_emb"] == pytest.approx(found, abs=0.05)
        assert (
            f"recall@10 {facts.recall_at_10['image_emb']:.3f} for queries from image_emb"
            in index.describe(facts)
        )


@pytest.mark.parametrize(("kind", "name"), [("ivf", "nprobe"), ("hnsw", "efSearch")])
def test_effort_is_the_least_that_reaches_the_recall_and_search_uses_it(
    tmp_path, kind: str, name: str, monkeypatch
):
    monkeypatch.setattr(index, "LEAST_EFFORT", {"ivf": 1, "hnsw": 1})
    monkeypatch.setattr(index, "RECALL", 0.99)
    images = vectors(3000, 64)  # no clusters: hard
    cache = make_cache(tmp_path / "c.zarr", images)
    _, facts = index.build_index(cache, kind=kind)
    effort = facts.effort[name]
    assert effort > 16
    assert facts.recall_at_10["image_emb"] >= 0.99
    opened = index.open_index(cache, "image_emb")
    inner = opened if kind == "ivf" else faiss.downcast_index(opened.index).hnsw
    assert getattr(inner, name) == effort
    found = recall(cache, images, images[::30])
    assert found >= 0.98
    path = index.index_path(cache, "image_emb")
    weaker = dataclasses.replace(facts, effort={name: effort // 4}, digest="")
    path.with_name(path.name + ".json").write_text(json.dumps(dataclasses.asdict(weaker)))
    assert recall(cache, images, images[::30]) < found


def test_recall_is_also_measured_from_the_other_side(tmp_path, monkeypatch):
    """Texts lie away from pictures (CLIP's modality gap): what finds pictures by pictures may miss them by texts."""
    monkeypatch.setattr(index, "LEAST_EFFORT", {"ivf": 1})
    images = clusters(3000, spread=0.2)
    texts = (images * 0.1 + 3 * vectors(1, 32, seed=8) + vectors(3000, 32, seed=9) * 0.3)[:, None]
    alone = index.build_index(make_cache(tmp_path / "a.zarr", images), kind="ivf")[1]
    both = index.build_index(make_cache(tmp_path / "b.zarr", images, texts=texts), kind="ivf")[1]
    assert list(alone.recall_at_10) == ["image_emb"]
    assert list(both.recall_at_10) == ["image_emb", "text_emb"]
    assert min(both.recall_at_10.values()) >= 0.95
    assert both.effort["nprobe"] > alone.effort["nprobe"]
    narrow = make_cache(tmp_path / "n.zarr", images, texts=texts[:, :, :8])
    assert list(index.build_index(narrow, kind="ivf")[1].recall_at_10) == ["image_emb"]


def test_of_equal_pictures_either_counts(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", np.repeat(vectors(4), 100, axis=0))
    _, facts = index.build_index(cache, kind="ivf")
    assert facts.recall_at_10 == {"image_emb": 1.0}


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_small_caches_can_be_indexed_too(tmp_path, kind: str, rows: int):
    images = vectors(rows)
    cache = make_cache(tmp_path / "c.zarr", images)
    _, facts = index.build_index(cache, kind=kind)
    assert search(cache, images[-1].astype(np.float32))[0][0] == rows - 1
    assert all(value >= 0.95 for value in facts.recall_at_10.values())


def test_auto_goes_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "FLAT_UP_TO", 299)
    for rows, kind in ((299, "flat"), (300, "ivf")):
        facts = index.build_index(make_cache(tmp_path / "c.zarr", vectors(rows)))[1]
        assert (facts.kind, facts.asked) == (kind, "auto")


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_no_copy_of_all_vectors_is_made(tmp_path, kind: str, monkeypatch):
    """Each float32 vector comes out of `unit`: the sample to train on is the most, all else goes in chunks."""
    monkeypatch.setattr(vectors_module, "CHUNK_BYTES", 100 * 64 * 4)
    monkeypatch.setattr(index, "POINTS_PER_LIST", 10)
    monkeypatch.setattr(index, "QUERIES", 30)
    cache = make_cache(tmp_path / "c.zarr", vectors(3000, 64))
    sizes, unit = [], vectors_module.unit
    for module in (index, vectors_module):
        monkeypatch.setattr(module, "unit", lambda stored: sizes.append(len(stored)) or unit(stored))
    _, facts = index.build_index(cache, kind=kind)
    assert facts.vectors == 3000
    assert sizes.count(100) >= 30
    assert [size for size in sizes if size > 10 * 31] == ([10 * 76] if kind == "ivf" else [])  # 76 lists


def test_gpus_find_the_centroids_and_lists_where_faiss_has_them(tmp_path, monkeypatch):
    """Clones on the CPU stand for GPUs: they are used, and the index is the one that is made without."""
    cache = make_cache(tmp_path / "c.zarr", clusters(2000))
    path, facts = index.build_index(cache, kind="ivf")
    alone, clones = path.read_bytes(), []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(
        faiss,
        "index_cpu_to_all_gpus",
        lambda i: clones.append(faiss.clone_index(i)) or clones[-1],
        raising=False,
    )
    assert index.build_index(cache, kind="ivf") == (path, facts)
    assert path.read_bytes() == alone
    assert len(clones) == 2


# ----------------------------------------------------------------------------------------------------
# Growth


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_grown_cache_adds_its_new_rows_alone(tmp_path, kind: str, monkeypatch):
    images = clusters(2000)
    valid = np.random.default_rng(2).random(2000) > 0.1
    path, before = index.build_index(
        make_cache(tmp_path / "c.zarr", images[:1200], valid=valid[:1200]), kind=kind
    )
    grown = make_cache(tmp_path / "c.zarr", images, valid=valid)
    with pytest.raises(UserError, match=f"lacks the last 800 rows of this cache: .* --kind {kind}`"):
        index.check_index(grown, "image_emb")
    starts = []
    chunks = vectors_module.chunks
    monkeypatch.setattr(
        index, "chunks", lambda vectors, start: starts.append(start) or chunks(vectors, start=start)
    )
    assert index.update_index(grown, kind=kind)[::2] == (path, "extended")
    assert starts == [valid[:1200].sum()]
    facts = index.check_index(grown, "image_emb")
    assert (before.rows, before.vectors, facts.rows, facts.vectors) == (
        1200,
        valid[:1200].sum(),
        2000,
        valid.sum(),
    )
    assert all(value >= 0.95 for value in facts.recall_at_10.values())
    for row in (0, 1199, 1200, 1999):
        row += int(np.argmax(valid[row:])) if valid[row:].any() else -1
        (found, score), *_ = search(grown, images[row].astype(np.float32))
        assert found == row
        assert score == pytest.approx(1, abs=1e-3)
    ids = [i for i, _ in search(grown, images[0].astype(np.float32), top=2000)]
    assert len(ids) == len(set(ids))
    assert set(ids) <= set(np.flatnonzero(valid).tolist())
    assert index.update_index(grown, kind=kind) == (path, facts, "current")
    assert len(starts) == 1


def test_ids_of_texts_after_growth(tmp_path):
    texts = vectors(900, seed=3).reshape(300, 3, 16)
    index.build_index(make_cache(tmp_path / "c.zarr", vectors(200), texts=texts[:200]), field="text_emb")
    grown = make_cache(tmp_path / "c.zarr", vectors(300), texts=texts)
    _, facts, done = index.update_index(grown, field="text_emb")
    assert (done, facts.vectors) == ("extended", 900)
    for row, k in ((0, 1), (199, 2), (200, 0), (299, 2)):
        assert search(grown, texts[row, k].astype(np.float32), field="text_emb")[0][0] == 3 * row + k


def test_what_no_longer_fits_is_built_again(tmp_path, monkeypatch):
    images = vectors(400)
    old_valid = np.arange(400) != 5

    def after(**changes) -> str:
        """What becomes of an index of the first 300 rows."""
        cache = make_cache(tmp_path / "c.zarr", images[:300])
        index.build_index(cache, kind=changes.pop("kind", "auto"))
        values = changes.pop("images", images)
        cache = make_cache(tmp_path / "c.zarr", values, **changes)
        done = index.update_index(cache, kind=changes.get("asked", "auto"))[2]
        query = values[-1].astype(np.float32)
        assert search(cache, query)[0][0] == len(values) - 1
        return done

    assert after() == "extended"
    assert after(kind="ivf") == "built"  # auto was asked now
    assert after(digest="9" * 64) == "built"
    assert after(images=images[:250]) == "built"
    assert after(images=images[1:], keys=[f"k{i}" for i in range(1, 400)]) == "built"  # pruned, and grown
    assert after(valid=old_valid) == "built"  # an old row was quarantined
    assert after(texts=vectors(400).reshape(400, 1, 16)) == "built"
    monkeypatch.setattr(index, "FLAT_UP_TO", 350)
    assert after() == "built"
    assert index.read_record(store.open_cache(tmp_path / "c.zarr"), "image_emb").kind == "ivf"


def test_lists_made_for_far_fewer_vectors_are_made_again(tmp_path):
    images = clusters(1700)
    for rows, expected in ((400, "built"), (1000, "extended"), (1600, "extended"), (1700, "built")):
        _, facts, done = index.update_index(make_cache(tmp_path / "c.zarr", images[:rows]), kind="ivf")
        assert (done, facts.trained) == (expected, 1700 if rows == 1700 else 400)


def test_a_cache_that_was_only_written_down_anew_is_current(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(50))
    path, facts = index.build_index(cache)
    content = path.read_bytes()
    moved = store.Cache(
        cache.path, dataclasses.replace(cache.meta, data="/elsewhere/d", versions={"torch": "9"})
    )
    assert index.check_index(moved, "image_emb") == facts
    _, now, done = index.update_index(moved)
    assert done == "current"
    assert (
        now
        == index.read_record(moved, "image_emb")
        == dataclasses.replace(facts, meta=now.meta, digest=now.digest)
    )
    assert now.meta != facts.meta
    assert path.read_bytes() == content


def test_extend_indexes_does_what_each_needs_and_says_so(tmp_path, capsys, monkeypatch):
    texts = vectors(300, seed=3).reshape(300, 1, 16)
    cache = make_cache(tmp_path / "c.zarr", vectors(200), texts=texts[:200])
    assert index.extend_indexes(cache) == []
    image_path, _ = index.build_index(cache)
    text_path, _ = index.build_index(cache, field="text_emb", kind="hnsw")
    assert index.extend_indexes(cache) == []
    assert capsys.readouterr().err == ""
    grown = make_cache(tmp_path / "c.zarr", vectors(300), texts=texts)
    image_path.with_name(image_path.name + ".json").write_text('{"field": "image_emb", "kind": "flat"}')
    assert set(index.extend_indexes(grown)) == {image_path, text_path}
    lines = capsys.readouterr().err.splitlines()
    assert f"{image_path} built: 300 vectors, flat, exact" in lines
    assert any(
        line.startswith(f"{text_path} extended by 100: 300 vectors, hnsw, efSearch 16:") for line in lines
    )
    assert index.extend_indexes(grown) == []
    monkeypatch.setattr("teachercache.search.index.faiss_module", index_without_faiss)
    assert index.extend_indexes(make_cache(tmp_path / "c.zarr", vectors(310))) == []
    assert f"{image_path} was not changed: search needs FAISS" in capsys.readouterr().err


def index_without_faiss() -> None:
    raise UserError("search needs FAISS: pip install it")


@pytest.mark.parametrize(
    ("kind", "stage"), [("auto", "extend"), ("hnsw", "extend"), ("ivf", "extend"), ("hnsw", "build")]
)
def test_a_kill_at_any_rename_leaves_the_old_index_or_the_new_one(
    tmp_path, monkeypatch, kind: str, stage: str
):
    """Two files are renamed in three steps: the record with both, the index, the record alone."""
    images, replace, left = vectors(60), os.replace, []
    cache = make_cache(tmp_path / "before/c.zarr", images[:40])
    if stage == "extend":
        index.build_index(cache, kind=kind)
        make_cache(tmp_path / "before/c.zarr", images)
    for event in range(4):
        folder, seen = tmp_path / f"{event}", []
        shutil.copytree(tmp_path / "before", folder)
        cache = store.open_cache(folder / "c.zarr")

        def count(source, target, event=event, seen=seen):
            seen.append(target)
            if len(seen) == event + 1:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", count)
            index.update_index(cache, kind=kind)
        record = index.read_record(cache, "image_emb")
        left.append(record and record.vectors)
        assert bool(record) == index.index_path(cache, "image_emb").exists()
        assert damaged_indexes(cache, compare=False) == {}
        if record is not None and record.rows == cache.meta.rows:
            assert damaged_indexes(cache, compare=True) == {}
        assert not list(folder.glob("*.partial"))
        index.extend_indexes(cache)
        index.update_index(cache, kind=kind)
        record = index.check_index(cache, "image_emb")
        assert (record.asked, record.vectors) == (kind, cache.meta.rows)
        path = index_files.record_path(index.index_path(cache, "image_emb"))
        assert json.loads(path.read_text()) == dataclasses.asdict(record), "the record before is gone"
        found = [i for i, _ in search(cache, images[3].astype(np.float32), top=99)]
        assert found.count(3) == 1
    assert left == ([40, 40, 60, 60] if stage == "extend" else [None, None, 40, 40])


# ----------------------------------------------------------------------------------------------------
# Files that do not fit


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_verify_finds_every_flipped_bit_of_an_index_and_search_never_falls_over_it(tmp_path, kind: str):
    images = vectors(100)
    cache = make_cache(tmp_path / "c.zarr", images)
    path, _ = index.build_index(cache, kind=kind)
    assert damaged_indexes(cache, compare=True) == {}
    for file in (path, index_files.record_path(path)):
        content = file.read_bytes()
        for bit in range(3, 8 * len(content), 8 * len(content) // 7):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            (found,) = damaged_indexes(cache, compare=True).items()
            assert found[0] == str(path), bit
            assert found[1]["command"].startswith(f"tc index {cache.path} --field image_emb")
            assert search(cache, images[7].astype(np.float32))[0][0] == 7
        assert extended(cache).kind == kind
        assert damaged_indexes(cache, compare=True) == {}
    path.unlink()
    assert damaged_indexes(cache, compare=True)[str(path)]["reason"] == "is missing"


def extended(cache: store.Cache) -> index_files.IndexRecord:
    """The record after a build of the cache went over its indexes."""
    index.extend_indexes(cache)
    return index.check_index(cache, "image_emb")


def test_a_large_mapped_index_is_checked_up_to_its_lists(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "c.zarr", vectors(400))
    path, record = index.build_index(cache, kind="ivf")
    assert 0 < record.head < record.bytes
    monkeypatch.setattr(index_files, "WHOLE_UP_TO", 0)
    content = path.read_bytes()
    for place, found in ((record.head - 5, True), (record.head + 5, False)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert bool(index_files.wrong_bytes(path, record, whole=False)) == found
        assert index_files.wrong_bytes(path, record, whole=True) == "its checksum differs"


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_verify_compares_an_index_with_its_cache(tmp_path, kind: str):
    images = vectors(100)
    cache = make_cache(tmp_path / "c.zarr", images)
    index.build_index(cache, kind=kind)
    make_cache(tmp_path / "c.zarr", vectors(100, seed=5))  # other values of the same build
    (found,) = damaged_indexes(cache, compare=True).values()
    assert found["reason"] == "holds other vectors than the cache"
    valid = np.ones(100, bool)
    valid[4] = False
    make_cache(tmp_path / "c.zarr", images, valid=valid)
    (found,) = damaged_indexes(cache, compare=True).values()
    assert found["reason"] == "holds other rows than the cache"
    (found,) = damaged_indexes(make_cache(tmp_path / "c.zarr", vectors(110)), compare=True).values()
    assert "lacks the last 10 rows" in found["reason"]


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(20))
    path, record = index.build_index(cache)
    old = dataclasses.asdict(record)
    for name in ("checksum", "head", "head_checksum", "digest"):
        del old[name]
    index_files.record_path(path).write_text(json.dumps(old))
    assert index.check_index(cache, "image_emb").checksum == -1
    assert damaged_indexes(cache, compare=True) == {}


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "7", '{"before": 7}', '{"before": {}, "field": 3}'])
def test_odd_records_are_damaged_ones(tmp_path, content: str):
    cache = make_cache(tmp_path / "c.zarr", vectors(20))
    path, _ = index.build_index(cache)
    index_files.record_path(path).write_text(content)
    assert index.read_record(cache, "image_emb") is None
    assert "missing or damaged" in damaged_indexes(cache, compare=True)[str(path)]["reason"]


def test_a_full_disk_while_an_index_is_written_names_the_file(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "c.zarr", vectors(20))

    def fail(file, content):
        file.failed = OSError(28, "No space left on device")
        raise file.failed

    with monkeypatch.context() as patch:
        patch.setattr(paths._Noting, "write", fail)
        with pytest.raises(OSError, match=r"No space left on device.*image_emb\.faiss"):
            index.build_index(cache)
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


def test_index_of_another_build_is_never_searched(tmp_path, capsys, monkeypatch):
    old = make_cache(tmp_path / "c.zarr", vectors(50))
    index.build_index(old)
    index.check_index(old, "image_emb")
    new = make_cache(tmp_path / "c.zarr", vectors(50, seed=9), digest="9" * 64)
    with pytest.raises(UserError, match=f"made for another build .*{COMMAND}"):
        index.check_index(new, "image_emb")
    query = vectors(50, seed=9)[3].astype(np.float32)
    assert search(new, query)[0][0] == 3
    assert "searching without the index: " in capsys.readouterr().err
    monkeypatch.setattr(index, "FLAT_UP_TO", 49)
    with pytest.raises(UserError, match=f"made for another build .*{COMMAND}"):
        search(new, query)
    index.build_index(new)
    assert search(new, query)[0][0] == 3
    assert capsys.readouterr().err == ""


def test_without_an_index_few_vectors_are_searched_exactly(tmp_path, capsys, monkeypatch):
    images = vectors(60)
    cache = make_cache(tmp_path / "c.zarr", images)
    ids, _ = brute_force(images, images[7], 10)
    assert [i for i, _ in search(cache, images[7].astype(np.float32))] == ids
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(index, "FLAT_UP_TO", 59)
    with pytest.raises(UserError, match=f"no index of 'image_emb' yet: {COMMAND}"):
        search(cache, images[7].astype(np.float32))


@pytest.mark.parametrize("harm", ["removed", "cut", "middle", "facts", "more"])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_damaged_index_names_the_command_and_is_mended(tmp_path, kind: str, harm: str, monkeypatch):
    images = vectors(100)
    cache = make_cache(tmp_path / "c.zarr", images)
    path, facts = index.build_index(cache, kind=kind)
    if harm == "removed":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif harm == "middle":
        path.write_bytes(bytes(len(path.read_bytes())))
    elif harm == "more":
        path.with_name(path.name + ".json").write_text(
            json.dumps({**dataclasses.asdict(facts), "vectors": 99})
        )
    else:
        path.with_name(path.name + ".json").write_text('{"field":')
    with monkeypatch.context() as patch:
        patch.setattr(index, "FLAT_UP_TO", 9)
        with pytest.raises(UserError, match=COMMAND):
            search(cache, np.ones(16, np.float32))
    assert index.update_index(cache, kind=kind)[2] == "built"
    assert search(cache, images[99].astype(np.float32))[0][0] == 99


def test_what_cannot_be_indexed(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    for build in (index.build_index, index.update_index):
        with pytest.raises(UserError, match="--kind tree: choose from auto, flat, ivf, hnsw"):
            build(cache, kind="tree")
        with pytest.raises(UserError, match="no field 'text_emb'"):
            build(cache, field="text_emb")
        for field in ("map", "valid"):
            with pytest.raises(UserError, match=f"field '{field}' holds no vectors"):
                build(cache, field=field)
    none = make_cache(tmp_path / "none.zarr", vectors(5), valid=np.zeros(5, bool))
    with pytest.raises(UserError, match=r"no usable row in .*quarantine\.jsonl"):
        index.build_index(none)


def test_facts_beside_the_index(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    path, facts = index.build_index(cache)
    assert json.loads(path.with_name(path.name + ".json").read_text()) == dataclasses.asdict(facts)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["c.image_emb.faiss", "c.image_emb.faiss.json", "c.zarr"]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_lies_behind_a_url_as_well(tmp_path, kind: str):
    local = make_cache(tmp_path / "c.zarr", vectors(300))
    path, facts = index.build_index(local, kind=kind)
    remote = store.Cache(as_path(f"memory://{tmp_path.name}-{kind}/c.zarr"), local.meta)
    assert not index.index_path(remote, "image_emb").exists()
    written = index_files.write_index(
        index_files.read_index(local, facts, write=True), index.index_path(remote, "image_emb")
    )
    assert written == facts.bytes
    assert index.index_path(remote, "image_emb").read_bytes() == path.read_bytes()
    index_files.write_record(remote, dataclasses.replace(facts, meta=""))
    query = vectors(1, seed=4)[0].astype(np.float32)
    assert search(remote, query) == search(local, query)
    index.index_path(remote, "image_emb").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        index_files.read_index(remote, facts)
