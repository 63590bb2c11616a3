"""`tc analyze`: planted faults are found, every kind of cache is told as it is, the page holds words as words."""

import base64
import dataclasses
import errno
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small import build_cache, error_of, make_folder, run, save_teacher

from teachercache import analysis
from teachercache.analysis import matching, neighbors
from teachercache.analysis.report import one_cache as describe
from teachercache.analysis.report import opened as subject
from teachercache.analysis.report import thumbnails
from teachercache.analysis.report import two_caches as compare
from teachercache.analysis.report import write as report
from teachercache.analysis.report.as_json import as_json
from teachercache.analysis.report.write import analyze
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.core.paths import machine
from teachercache.data.manifest import make_manifest, write_manifest
from teachercache.data.sample import Sample
from teachercache.search import vectors as vectors_module
from tests.teachercache.search.test_index import make_cache

WIDTH = 24


def embeddings(rows: int, *, seed: int = 0, dim: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in clusters and texts near them, one a row."""
    random = np.random.default_rng(seed)
    centers = random.standard_normal((8, dim))
    pictures = centers[random.integers(8, size=rows)] + 0.6 * random.standard_normal((rows, dim))
    texts = pictures + 0.5 * random.standard_normal((rows, dim))
    return pictures.astype(np.float16), texts.astype(np.float16)[:, None]


def with_samples(cache: store.Cache, samples: list[Sample], root: Path) -> store.Cache:
    """The same vectors, of other rows."""
    manifest = make_manifest("d", root, samples)
    write_manifest(manifest, cache.path / "manifest.parquet")
    return cache


def samples_of(rows: int, **changes) -> list[Sample]:
    plain = [
        Sample(f"k{i}", f"{i}.png", (f"text {i}",), f"label {i % 3}", "test" if i % 4 == 0 else "train")
        for i in range(rows)
    ]
    return [
        dataclasses.replace(row, **{name: value(i) for name, value in changes.items()})
        for i, row in enumerate(plain)
    ]


def page_data(out: Path, name: str) -> dict:
    page = (out / "report.html").read_text()
    return json.loads(
        re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', page, re.S)[1]
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """300 rows: 20 captions swapped, 10 near duplicates (half of them across splits), 5 outliers; and its report."""
    folder = tmp_path_factory.mktemp("planted")
    random = np.random.default_rng(1)
    pictures, texts = embeddings(300)
    swapped = random.choice(200, 20, replace=False)
    texts[swapped] = texts[np.roll(swapped, 1)]
    copies = np.arange(240, 250)
    pictures[copies] = pictures[copies - 40] * 2 + 0.02 * random.standard_normal((10, WIDTH))
    texts[copies] = texts[copies - 40]
    outliers = np.arange(280, 285)
    pictures[outliers] = 3 * np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0][:5] - pictures.mean(0)
    texts[outliers, 0] = pictures[outliers]
    cache = make_cache(folder / "c.zarr", pictures, texts=texts)
    with_samples(cache, samples_of(300, split=lambda i: "test" if 240 <= i < 245 else "train"), folder)
    found, lines = analyze(cache.path, out=folder / "out")
    return {
        "report": found,
        "lines": lines,
        "swapped": swapped,
        "copies": copies,
        "outliers": outliers,
        "cache": cache,
        "out": folder / "out",
    }


# ----------------------------------------------------------------------------------------------------
# Planted faults


def test_swapped_captions_are_the_worst_pairs(planted):
    worst = planted["report"]["pairs"]["worst"]
    assert {one["row"] for one in worst[:30]} >= set(planted["swapped"].tolist())
    assert worst[0]["key"] == f"k{worst[0]['row']}"
    assert worst[0]["text"] == f"text {worst[0]['row']}"


def test_all_near_duplicates_are_listed_and_leaks_named(planted):
    found = planted["report"]["duplicates"]
    groups = {tuple(group["rows"]): group for group in found["groups"]}
    for copy in planted["copies"].tolist():
        group = next(group for rows, group in groups.items() if copy in rows)
        assert copy - 40 in group["rows"]
        assert group["leak"] == (copy < 245)
    assert found["leaks"] == 5
    assert found["exact_groups"] == 0


def test_outliers_are_the_first_of_their_list(planted):
    assert {one["row"] for one in planted["report"]["outliers"]["worst"][:5]} == set(
        planted["outliers"].tolist()
    )


def test_every_file_is_there_and_agrees(planted):
    out, found = planted["out"], planted["report"]
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.json",
        "points.parquet",
        "map.png",
        "similarity.png",
        "matrix.png",
        "spectrum.png",
    }
    assert json.loads((out / "report.json").read_text()) == json.loads(as_json(found))
    assert page_data(out, "report") == json.loads((out / "report.json").read_text())
    for name in ("map.png", "similarity.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5
    table = pq.read_table(out / "points.parquet")
    assert table.num_rows == 300
    near = table["neighbors"][7].as_py()
    pictures = store.read_field(planted["cache"], "image_emb")
    cosines, expected = analysis.nearest(pictures, 6, np.array([7]))
    assert near["ids"] == expected[0].tolist()
    assert near["distances"] == pytest.approx((1 - cosines[0]).tolist(), abs=1e-6)
    placed = analysis.flatten(analysis.unit(pictures))
    np.testing.assert_allclose(np.abs(table["projection_x"].to_numpy()), np.abs(placed[:, 0]), atol=1e-4)
    assert any("uvx embedding-atlas" in line and "--x projection_x" in line for line in planted["lines"])


def test_rows_that_cannot_be_read_have_no_thumbnail_and_one_line(planted):
    assert "no picture can be read" in planted["report"]["left_out"]["thumbnails"]
    assert any(line.startswith("left out: thumbnails") for line in planted["lines"])


def test_numbers_of_slices_are_means_over_their_rows(planted):
    found = {one["name"]: one for one in planted["report"]["slices"]["label"]}
    pictures, texts = (
        analysis.unit(store.read_field(planted["cache"], name).reshape(300, WIDTH))
        for name in ("image_emb", "text_emb")
    )
    assert found["label 1"]["num_rows"] == 100
    assert found["label 1"]["cosine to text"] == pytest.approx(
        (pictures * texts).sum(1)[1::3].mean(), abs=1e-5
    )
    assert {one["name"] for one in planted["report"]["slices"]["split"]} == {"train", "test"}


# ----------------------------------------------------------------------------------------------------
# Words and pictures in the page


def test_texts_stay_texts_and_pictures_are_drawn_anew(tmp_path):
    pictures, texts = embeddings(40)
    evil = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028"
    Image.new("RGB", (60, 30), "red").save(tmp_path / "0.png", pnginfo=secret())
    cache = make_cache(tmp_path / "c.zarr", pictures, texts=texts)
    with_samples(
        cache,
        samples_of(40, texts=lambda i: (evil,), label=lambda i: evil, image=lambda i: "0.png"),
        tmp_path,
    )
    found, _ = analyze(cache.path, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "document.title='owned'" not in re.sub(
        r'<script type="application/json".*?</script>', "", page, flags=re.S
    )
    assert page_data(tmp_path / "out", "points")["texts"][3] == [evil]
    assert found["slices"] == {"split": found["slices"]["split"]}  # one label is no slice
    assert b"where I live" not in (tmp_path / "out" / "report.html").read_bytes()
    sheet = base64.b64decode(re.search(r'id="sheet-0">(.*?)<', page)[1])
    assert b"where I live" not in sheet
    (tmp_path / "s.webp").write_bytes(sheet)
    with Image.open(tmp_path / "s.webp") as image:
        assert image.getpixel((56, 56))[0] > 200 > 60 > image.getpixel((56, 56))[1]
        assert min(image.getpixel((56, 5))) > 240  # padded with white, not stretched
    image = pq.read_table(tmp_path / "out" / "points.parquet")["image"][0].as_py()
    assert image["bytes"][:2] == b"\xff\xd8"


def secret():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "where I live")
    return info


def test_the_page_loads_nothing(planted):
    page = (planted["out"] / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|img|iframe)[^>]+src=|<link[^>]+href=.https?:", page.split("<script>")[0])
    assert "{{" not in page.split("<script>")[0]


def test_many_thumbnails_stay_within_their_bytes(monkeypatch):
    random = np.random.default_rng(0)
    soft = [
        Image.fromarray(random.integers(0, 255, (6, 6, 3), np.uint8)).resize((48, 48)) for _ in range(700)
    ]
    small = thumbnails.Thumbnails(48, np.arange(700), soft, "")
    full = sum(map(len, thumbnails.sheets(small)))
    most = round(0.7 * full)
    monkeypatch.setattr(thumbnails, "SHEET_BYTES", most)
    found = thumbnails.sheets(small)
    assert len(found) == 2
    assert sum(map(len, found)) <= most


# ----------------------------------------------------------------------------------------------------
# Kinds of caches


def test_pictures_alone(tmp_path):
    cache = make_cache(tmp_path / "c.zarr", embeddings(60)[0])
    found, _ = analyze(cache.path, out=tmp_path / "out")
    assert found["left_out"]["pairs"] == "the cache has no texts that can be used"
    assert "pairs" not in found
    assert "retrieval" not in found
    assert found["clusters"]
    assert [each["title"] for each in page_data(tmp_path / "out", "points")["maps"]] == ["pictures"]


def test_texts_alone_and_several_a_row(tmp_path, teacher_folder):
    (tmp_path / "names.txt").write_text(
        "".join(f"a {word} bicycle\n" for word in ("red", "blue", "old", "green"))
    )
    cache = build_cache(tmp_path / "names.txt", teacher_folder, tmp_path / "c.zarr")
    found, _ = analyze(cache, out=tmp_path / "out")
    assert "no pictures" in found["left_out"]["pairs"]
    assert found["cache"]["usable"] == 4
    assert [each["title"] for each in page_data(tmp_path / "out", "points")["lists"]] == ["texts like it"]


def test_two_spaces_in_one_cache(tmp_path):
    texts = np.random.default_rng(0).standard_normal((50, 2, 8)).astype(np.float16)
    cache = make_cache(tmp_path / "c.zarr", embeddings(50)[0], texts=texts)
    found, _ = analyze(cache.path, out=tmp_path / "out")
    assert found["left_out"]["pairs"] == "pictures are 24 and texts 8 wide: two spaces"
    assert {"pictures", "texts"} <= set(found["space"])
    assert "modality_gap" not in found["space"]


def test_views_quarantined_rows_and_several_texts(tmp_path, teacher_folder):
    data = make_folder(tmp_path / "photos", 24, texts=3)
    (data / "class0" / "000.png").write_bytes(b"no picture")
    (data / "class1" / "001.txt").write_text("only one\n")
    out = tmp_path / "v.zarr"
    assert (
        run(
            "build",
            "--teacher",
            teacher_folder,
            "--data",
            data,
            "--out",
            out,
            "--views",
            2,
            "--workers",
            0,
            "--device",
            "cpu",
        )
        == 0
    )
    found, _ = analyze(out, out=tmp_path / "out")
    assert found["quarantine"]["count"] == 1
    assert found["quarantine"]["first"][0]["key"].endswith("000")
    assert (found["cache"]["usable"], found["cache"]["texts"], found["cache"]["views"]) == (23, 23 * 3 - 2, 2)
    points = page_data(tmp_path / "out", "points")
    assert points["thumbs"]["count"] == 23
    stored = store.read_field(store.open_cache(out), "image_emb")[1:]
    cosines = analysis.nearest(analysis.unit(stored), 10)[0]
    assert found["outliers"]["worst"][0]["distance"] == pytest.approx((1 - cosines.mean(1)).max(), abs=1e-5)


def test_a_report_that_cannot_be_written_is_written_by_the_same_command(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "c.zarr", np.random.default_rng(0).normal(size=(30, 8)).astype(np.float16))
    out = tmp_path / "c.report"

    def fail(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"report\.json"):
            analyze(cache.path, out=out)
    assert list(out.iterdir()) == []
    dead = out / f"report.json.999999999-{machine()}.partial"  # of a command that was killed
    dead.write_text("half")
    analyze(cache.path, out=out)
    assert not dead.exists()
    assert {path.name for path in out.iterdir()} >= {"report.json", "report.html", "points.parquet"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(UserError, match="exists and is not a report"):
        analyze(cache.path, out=tmp_path / "other")


def test_what_cannot_be_analyzed(tmp_path, planted, capsys):
    cache = planted["cache"].path
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    assert "is not a report: pass another --out" in error_of(
        capsys, "analyze", cache, "--out", tmp_path / "other"
    )
    assert "choose from pca, umap" in error_of(
        capsys, "analyze", cache, "--out", tmp_path / "x", "--map", "tsne"
    )
    one = make_cache(tmp_path / "one.zarr", embeddings(1)[0])
    assert "fewer than two usable vectors" in error_of(capsys, "analyze", one.path, "--out", tmp_path / "x")
    far = make_cache(tmp_path / "far.zarr", embeddings(9)[0], keys=[f"other{i}" for i in range(9)])
    words = ("analyze", cache, "--against", far.path, "--out", tmp_path / "x")
    assert "have no key in common: build both from the same --data" in error_of(capsys, *words)
    assert not (tmp_path / "x").exists()


def test_the_command_says_what_it_wrote(planted, tmp_path, capsys):
    copy = shutil.copytree(planted["cache"].path, tmp_path / "mine.zarr")
    assert run("analyze", copy, "--points", 50) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "mine.report" / "report.html") in said
    points = page_data(tmp_path / "mine.report", "points")
    assert 50 <= len(points["rows"]) < 300
    assert set(planted["outliers"].tolist()) <= set(points["rows"])  # whatever a list names is shown
    assert run("analyze", copy, "--json") == 0  # over the report that is there
    assert json.loads(capsys.readouterr().out)["cache"]["num_rows"] == 300
    assert report.default_out(Path("a/b.zarr"), "c/d.zarr") == Path("a/b-d.report")


# ----------------------------------------------------------------------------------------------------
# Two caches


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cache, and one that turns its space, has some rows in another order, lacks some and confuses ten."""
    folder = tmp_path_factory.mktemp("two")
    pictures, texts = embeddings(120)
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((WIDTH, WIDTH)))[0]
    order = np.random.default_rng(6).permutation(120)[:110]
    other, other_texts = (pictures @ turn)[order], (texts @ turn)[order]
    confused = np.arange(10)
    other[confused] = np.random.default_rng(7).standard_normal((10, WIDTH))
    first = make_cache(folder / "a.zarr", pictures, texts=texts)
    second = make_cache(
        folder / "b.zarr",
        other.astype(np.float16),
        texts=other_texts.astype(np.float16),
        keys=[f"k{i}" for i in order],
    )
    found, _ = analyze(first.path, against=second.path, out=folder / "out")
    return {
        "report": found["against"],
        "out": folder / "out",
        "confused": set(order[confused].tolist()),
        "first": first,
        "second": second,
        "order": order,
    }


def test_rows_join_by_key_and_a_turned_space_is_the_same(two):
    found = two["report"]
    assert found["joined"] == {"both": 110, "first_alone": 10, "second_alone": 0}
    assert found["texts"]["cka"] == pytest.approx(1, abs=1e-3)
    assert found["texts"]["procrustes"] == pytest.approx(0, abs=1e-3)
    assert found["texts"]["rank_correlation"] == pytest.approx(1, abs=1e-3)
    common = np.sort(two["order"])
    place = {row: i for i, row in enumerate(two["order"].tolist())}
    x, y = (analysis.unit(store.read_field(two[name], "image_emb")) for name in ("first", "second"))
    y = y[[place[row] for row in common.tolist()]]
    assert found["pictures"]["cka"] == pytest.approx(analysis.linear_cka(x[common], y), abs=1e-4)
    a, b = analysis.nearest(x[common], 10)[1], analysis.nearest(y, 10)[1]
    share = analysis.neighbor_overlap(a, b)
    assert found["neighbourhoods"]["overlap"]["10"] == pytest.approx(share.mean())
    first = found["neighbourhoods"]["changed"][0]
    assert first["neighbours"] == common[a[common.tolist().index(first["row"])]][:6].tolist()


def test_rows_whose_neighbours_changed_and_what_retrieval_lost(two):
    found = two["report"]
    assert {one["row"] for one in found["neighbourhoods"]["changed"][:10]} == two["confused"]
    lost = found["retrieval"]["lost"]
    assert {one["row"] for one in lost["worst"]} == two["confused"] & {one["row"] for one in lost["worst"]}
    assert lost["count"] >= 5
    assert found["retrieval"]["gained"]["count"] == 0
    first, second = found["retrieval"]["text_to_image"]
    assert first["R@1"] > second["R@1"]
    points = page_data(two["out"], "points")
    assert [each["title"] for each in points["maps"]][-1] == "pictures, second cache"
    assert "neighbors kept" in {column["name"] for column in points["columns"]}


def test_texts_that_differ_are_not_compared(two, tmp_path):
    path = shutil.copytree(two["second"].path, tmp_path / "b.zarr")
    keys = [f"k{i}" for i in two["order"]]
    changed = [Sample(key, "", (f"{key} said 0" if i % 2 else "other",)) for i, key in enumerate(keys)]
    with_samples(store.open_cache(path), changed, tmp_path)
    meta = dataclasses.replace(two["second"].meta, manifest="f" * 64)
    other = subject.open_subject(path)
    other = dataclasses.replace(other, cache=dataclasses.replace(other.cache, meta=meta))
    joined = compare.join(subject.open_subject(two["first"].path), other)
    assert (len(joined.pictures), len(joined.texts)) == (110, 55)


def test_a_run_is_a_teacher_and_its_cache_can_be_compared(finished_run, squares, cache, tmp_path, capsys):
    from student.inference.load import load_run
    from teachercache.data.pictures import decode_image

    out = tmp_path / "student.zarr"
    assert run("build", "--teacher", finished_run, "--data", squares, "--out", out, "--workers", 0) == 0
    student, built = load_run(finished_run), store.open_cache(out)
    row = store.cached_manifest(built).row(5)
    picture = student.picture.view(decode_image((squares / row.image).read_bytes()))[None]
    theirs = student.model.encode_image(picture)[0].detach().numpy()
    np.testing.assert_allclose(store.read_field(built, "image_emb")[5], theirs, atol=2e-3)
    said = student.model.encode_text(student.tokenizer([row.texts[1]]))[0].detach().numpy()
    np.testing.assert_allclose(store.read_field(built, "text_emb")[5, 1], said, atol=2e-3)
    assert run("verify", out, "--samples", 4) == 0
    found, _ = analyze(cache, against=out, out=tmp_path / "out")
    assert 0 < found["against"]["neighbourhoods"]["overlap"]["10"] <= 1
    assert found["against"]["cache"]["teacher"] == str(finished_run)
    partial = tmp_path / "run"
    partial.mkdir()
    shutil.copy(finished_run / "run.json", partial)
    words = ("build", "--data", squares, "--out", tmp_path / "x.zarr", "--teacher")
    assert "is not a finished run: go on with `student train --resume" in error_of(capsys, *words, partial)
    facts = json.loads((partial / "run.json").read_text())
    (partial / "run.json").write_text(
        json.dumps({**facts, "student": {"family": "clip_lite_heads", "config": {}}})
    )
    assert "trained no model of two towers" in error_of(capsys, *words, partial)
    (partial / "run.json").unlink()
    assert "neither an open_clip folder" in error_of(capsys, *words, partial)


def test_two_teachers_of_other_widths(tmp_path, teacher_folder):
    from small import TINY_CFG

    data = make_folder(tmp_path / "photos", 30)
    wide = save_teacher(tmp_path / "wide", {**TINY_CFG, "embed_dim": 40}, seed=3)
    caches = [
        build_cache(data, folder, tmp_path / f"{i}.zarr") for i, folder in enumerate((teacher_folder, wide))
    ]
    found, _ = analyze(caches[0], against=caches[1], out=tmp_path / "out")
    assert 0 <= found["against"]["pictures"]["procrustes"] <= 1
    assert found["against"]["retrieval"]["queries"] == [30, 30]


# ----------------------------------------------------------------------------------------------------
# Many rows


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """Above what all pairs allow, queries are drawn, and what is kept is some numbers a row."""
    for module, name, value in (
        (subject, "ALL_PAIRS", 3_000_000),
        (describe, "ALL_PAIRS", 3_000_000),
        (neighbors, "BLOCK_SCORES", 1 << 20),
        (matching, "BLOCK_SCORES", 1 << 20),
        (vectors_module, "CHUNK_BYTES", 1 << 18),
    ):
        monkeypatch.setattr(module, name, value)
    peaks = {}
    for rows in (5_000, 15_000):
        pictures, texts = embeddings(rows, dim=16)
        pictures[rows - 1] = -20 * pictures.astype(np.float32).mean(
            0
        )  # far from all: asked although not drawn
        cache = make_cache(tmp_path / f"{rows}.zarr", pictures, texts=texts)
        del pictures, texts
        opened, known = subject.open_subject(cache.path), describe.empty_per_row(rows)
        tracemalloc.start()
        describe.space(opened)
        centers = analysis.fit_centers(opened.main, 8)
        describe.pairs(opened, known)
        describe.retrieval(opened, known)
        outliers, hubness = describe.crowd(opened, known, centers)
        found = describe.duplicates(opened)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert hubness["asked"] == 3_000_000 // rows
        assert outliers["worst"][0]["row"] == rows - 1
        assert found["asked"] == 3_000_000 // rows
    assert peaks[15_000] - peaks[5_000] < 10_000 * 300  # bytes: some numbers a row
    assert peaks[15_000] < 120e6
