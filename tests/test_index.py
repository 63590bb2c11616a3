"""FAISS beside a cache: the same neighbours as a slow loop, and never those of another build."""

import json
from pathlib import Path

import numpy as np
import pytest

from teachercache import index, store
from teachercache.names import UserError
from teachercache.samples import Sample, make_manifest
from teachercache.spec import CacheMeta, Field, TeacherSpec

COMMAND = r"run `tc index .*c\.zarr --field image_emb`"


def make_cache(path: Path, images: np.ndarray, *, valid: np.ndarray | None = None,
               texts: np.ndarray | None = None, text_valid: np.ndarray | None = None,
               digest: str = "0" * 64) -> store.Cache:  # fmt: skip
    """A cache of these vectors, written block by block."""
    rows, dim = images.shape
    fields = [Field(name, shape, "image", "float16", "") for name, shape in (("image_emb", (dim,)), ("map", (2, 2)))]
    arrays = {"image_emb": images, "map": np.zeros((rows, 2, 2))}
    arrays["valid"] = np.ones(rows, bool) if valid is None else valid
    arrays["key"] = np.array([f"k{i}" for i in range(rows)], dtype=np.dtypes.StringDType())
    if texts is not None:
        fields.append(Field("text_emb", (dim,), "text", "float16", ""))
        arrays["text_emb"] = texts
        arrays["text_valid"] = np.ones(texts.shape[:2], bool) if text_valid is None else text_valid
    meta = CacheMeta(
        spec=TeacherSpec("t", "pretrained", digest, ("embeddings",), tuple(fields), {}, {}, {}),
        data="d", manifest="m", rows=rows, texts=0 if texts is None else texts.shape[1], block_rows=256,
        precision="float32", versions={},
    )  # fmt: skip
    cache = store.create(path, meta, make_manifest("d", Path("d"), [Sample("a", "a")]))
    for block in range(meta.num_blocks):
        span = slice(meta.block(block).start, meta.block(block).stop)
        store.write_block(cache, block, {name: array[span] for name, array in arrays.items()}, [])
    return cache


def vectors(rows: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors of very different lengths, as float16 stores them."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.standard_normal((rows, 1)))
    return (random.standard_normal((rows, dim)) * scale).astype(np.float16)


def brute_force(values: np.ndarray, query: np.ndarray, top: int) -> tuple[list[int], np.ndarray]:
    values, query = values.astype(np.float64), query.astype(np.float64)
    cosine = values @ query / np.linalg.norm(values, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosine)[:top]
    return best.tolist(), cosine[best]


def test_flat_search_is_brute_force_cosine(tmp_path):
    images = vectors(700)
    cache = make_cache(tmp_path / "c.zarr", images)
    path, facts = index.build_index(cache)
    assert path == tmp_path / "c.image_emb.faiss"
    assert (facts["kind"], facts["vectors"]) == ("flat", 700)
    for query in vectors(20, seed=1).astype(np.float32) * 100:
        ids, cosine = brute_force(images, query, 10)
        found = index.search(cache, query, top=10)
        assert [i for i, _ in found] == ids
        np.testing.assert_allclose([score for _, score in found], cosine, atol=1e-5)


def test_rows_that_cannot_be_used_are_never_found(tmp_path):
    images = vectors(300)
    valid = np.random.default_rng(2).random(300) > 0.4
    cache = make_cache(tmp_path / "c.zarr", images, valid=valid)
    _, facts = index.build_index(cache)
    assert facts["vectors"] == valid.sum()
    query = images[np.flatnonzero(~valid)[0]].astype(np.float32)
    found = index.search(cache, query, top=1000)
    assert sorted(i for i, _ in found) == np.flatnonzero(valid).tolist()


def test_ids_of_texts_count_all_texts_of_all_rows(tmp_path):
    texts = vectors(900, seed=3).reshape(300, 3, 16)
    valid, text_valid = np.ones(300, bool), np.ones((300, 3), bool)
    valid[7], text_valid[8, 1] = False, False
    cache = make_cache(tmp_path / "c.zarr", vectors(300), valid=valid, texts=texts, text_valid=text_valid)
    path, facts = index.build_index(cache, field="text_emb")
    assert path.name == "c.text_emb.faiss"
    assert facts["vectors"] == 900 - 3 - 1
    for row, k in ((0, 0), (5, 2), (299, 1)):
        (found, score), *_ = index.search(cache, texts[row, k].astype(np.float32), field="text_emb")
        assert divmod(found, 3) == (row, k)
        assert score == pytest.approx(1, abs=1e-5)
    ids = {i for i, _ in index.search(cache, texts[8, 1].astype(np.float32), field="text_emb", top=900)}
    assert not ids & {21, 22, 23, 25}


@pytest.mark.parametrize(("kind", "recall"), [("flat", 1.0), ("hnsw", 0.95), ("ivf", 0.9)])
def test_every_kind_finds_the_neighbours(tmp_path, kind: str, recall: float):
    """Vectors in clusters, as embeddings are; the share of the true ten that are found."""
    random = np.random.default_rng(4)
    centres = random.standard_normal((60, 32))
    spread = 0.4 * random.standard_normal((3000, 32))
    images = (centres[random.integers(60, size=3000)] + spread).astype(np.float16)
    cache = make_cache(tmp_path / "c.zarr", images)
    _, facts = index.build_index(cache, kind=kind)
    assert facts["kind"] == kind
    hits = []
    for query in images[::60].astype(np.float32):
        found = [i for i, _ in index.search(cache, query, top=10)]
        assert len(found) == 10
        hits.append(len(set(found) & set(brute_force(images, query, 10)[0])))
    assert sum(hits) / (10 * len(hits)) >= recall


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_small_caches_can_be_indexed_too(tmp_path, kind: str, rows: int):
    images = vectors(rows)
    cache = make_cache(tmp_path / "c.zarr", images)
    index.build_index(cache, kind=kind)
    assert index.search(cache, images[-1].astype(np.float32))[0][0] == rows - 1


def test_index_of_another_build_is_refused(tmp_path):
    old = make_cache(tmp_path / "c.zarr", vectors(50))
    index.build_index(old)
    index.check_index(old, "image_emb")
    old.path.rename(tmp_path / "old.zarr")
    new = make_cache(tmp_path / "c.zarr", vectors(50, seed=9), digest="9" * 64)
    with pytest.raises(UserError, match=f"made for another build .*{COMMAND}"):
        index.search(new, np.ones(16, np.float32))
    index.build_index(new)
    assert index.search(new, vectors(50, seed=9)[3].astype(np.float32))[0][0] == 3


def test_missing_index_names_the_command(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    with pytest.raises(UserError, match=f"no index of 'image_emb' yet: {COMMAND}"):
        index.search(cache, np.ones(16, np.float32))


@pytest.mark.parametrize("harm", ["removed", "cut", "facts"])
def test_damaged_index_names_the_command(tmp_path, harm: str):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    path, _ = index.build_index(cache)
    if harm == "removed":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.with_name(path.name + ".json").write_text('{"field":')
    with pytest.raises(UserError, match=COMMAND):
        index.search(cache, np.ones(16, np.float32))


def test_what_cannot_be_indexed(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    with pytest.raises(UserError, match="--kind tree: choose from auto, flat, ivf, hnsw"):
        index.build_index(cache, kind="tree")
    with pytest.raises(UserError, match="no field 'text_emb'"):
        index.build_index(cache, field="text_emb")
    for field in ("map", "valid"):
        with pytest.raises(UserError, match=f"field '{field}' holds no vectors"):
            index.build_index(cache, field=field)
    none = make_cache(tmp_path / "none.zarr", vectors(5), valid=np.zeros(5, bool))
    with pytest.raises(UserError, match=r"no usable row in .*quarantine\.jsonl"):
        index.build_index(none)


def test_facts_beside_the_index(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", vectors(5))
    path, facts = index.build_index(cache)
    assert json.loads(path.with_name(path.name + ".json").read_text()) == facts
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["c.image_emb.faiss", "c.image_emb.faiss.json", "c.zarr"]
