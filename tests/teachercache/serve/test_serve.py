"""`tc serve` over HTTP: what it answers, and what it refuses."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from disturbed import run_build
from PIL import Image
from served import Site, running
from small import build_cache, error_of, run, save_teacher

from teachercache.cache import store
from teachercache.data.pictures import decode_image
from teachercache.search import index, vectors
from teachercache.search.query import search_cache
from teachercache.serve import guard
from teachercache.serve.pictures import Pictures
from teachercache.teachers.registry import load
from tests.teachercache.search.test_index import brute_force, make_cache
from tests.teachercache.search.test_index import vectors as random_vectors


@pytest.fixture(scope="module")
def student(squares, tmp_path_factory) -> Path:
    """A cache of other weights over the same rows."""
    folder = tmp_path_factory.mktemp("student")
    return build_cache(squares, save_teacher(folder / "other", seed=1), folder / "student.zarr")


@pytest.fixture(scope="module")
def site(cache):
    with running(cache) as opened:
        yield opened


@pytest.fixture(scope="module")
def two(cache, student):
    with running(cache, student) as opened:
        yield opened


def keys(answer: dict) -> list[str]:
    return [result["key"] for result in answer["results"]]


# ----------------------------------------------------------------------------------------------------
# Answers


def test_what_the_page_is_told_about_a_cache(site: Site, cache: Path):
    (facts,) = site.ask("/api/caches")
    assert (facts["name"], facts["rows"], facts["pictures"]) == ("tiny", 64, True)
    assert facts["takes"] == {"pictures": ["text", "picture"], "texts": ["text", "picture"]}
    filters = {
        facet["name"]: dict(zip(facet["values"], facet["counts"], strict=True)) for facet in facts["facets"]
    }
    assert filters["split"] == {"train": 48, "test": 16}
    assert set(filters["label"]) == {"class0", "class1", "class2"}


def test_a_text_finds_what_the_command_finds(site: Site, cache: Path):
    (answer,) = site.search(text="square 7", top=9)
    expected = search_cache(cache, text="square 7", top=9)
    assert keys(answer) == [result["key"] for result in expected]
    np.testing.assert_allclose(
        [result["score"] for result in answer["results"]], [result["score"] for result in expected], atol=1e-5
    )
    assert [result["rank"] for result in answer["results"]] == list(range(1, 10))
    assert answer["exact"]
    assert answer["total"] == 64


def test_texts_are_found_too(site: Site, cache: Path):
    (answer,) = site.search(text="square 7", top=9, find="texts")
    expected = search_cache(cache, text="square 7", top=9, field="text_emb")
    assert [result["texts"] for result in answer["results"]] == [result["texts"] for result in expected]


def test_a_dropped_picture_finds_itself_and_is_added_to_a_text(site: Site, cache: Path, squares: Path):
    path = sorted(squares.rglob("*.png"))[5]
    picture = base64.b64encode(path.read_bytes()).decode()
    (answer,) = site.search(picture=picture, top=4)
    assert answer["results"][0]["key"].endswith(path.stem)
    (both,) = site.search(picture=picture, text="square 9", top=6)
    assert keys(both) == [r["key"] for r in search_cache(cache, text="square 9", images=(path,), top=6)]


def test_neighbors_are_those_of_the_row_without_itself(site: Site, cache: Path):
    opened = store.open_cache(cache)
    stored, names = store.read_field(opened, "image_emb"), store.read_keys(opened)
    ids, _ = brute_force(stored, stored[11], 64)
    expected = [names[i] for i in ids if i != 11][:12]
    assert keys(site.search(row=[0, 11], top=12)[0]) == expected
    assert keys(site.search(key=names[11], top=12)[0]) == expected


@pytest.mark.parametrize(
    "where", [{"split": "test"}, {"label": "class1"}, {"split": "train", "label": "class2"}]
)
def test_filters_are_brute_force_among_the_filtered_rows(site: Site, cache: Path, where: dict):
    opened = store.open_cache(cache)
    stored, manifest = store.read_field(opened, "image_emb"), store.cached_manifest(opened)
    rows = [
        i for i in range(64) if all(getattr(manifest.row(i), name) == value for name, value in where.items())
    ]
    ids, _ = brute_force(stored[rows], stored[3], 10)
    expected = [manifest.row(rows[i]).key for i in ids if rows[i] != 3]
    (answer,) = site.search(row=[0, 3], where=where, top=9)
    assert keys(answer) == expected[:9]
    assert answer["total"] == len(rows)
    (listed,) = site.search(where=where, top=480)  # without a query the rows are listed
    assert keys(listed) == [manifest.row(i).key for i in rows]


def test_a_filter_of_no_rows(site: Site):
    for values in ({"row": [0, 3]}, {}):
        (answer,) = site.search(where={"label": "class9"}, **values)
        assert (answer["results"], answer["total"]) == ([], 0)


def test_a_row_in_full(site: Site, squares: Path):
    details = site.ask("/api/row/0/0")
    assert details["split"] == "test"
    assert details["texts"] == ["square 3 said 0", "square 3 said 1"]
    assert (squares / details["image"]).is_file()


def test_two_caches_answer_the_same_query_with_each_others_ranks(two: Site, cache: Path, student: Path):
    first, second = two.search(text="square 4", top=10)
    orders = [[r["key"] for r in search_cache(path, text="square 4", top=64)] for path in (cache, student)]
    for answer, own, other in ((first, *orders), (second, *orders[::-1])):
        assert keys(answer) == own[:10]
        assert [result["other"] for result in answer["results"]] == [other.index(key) + 1 for key in own[:10]]
    assert keys(first) != keys(second)


def test_neighbors_in_two_caches_are_joined_by_key(
    cache: Path, teacher_folder: Path, squares: Path, tmp_path: Path
):
    """The second cache has some of the rows, at other numbers."""
    shutil.copytree(squares / "train", tmp_path / "part" / "train")
    for path in sorted((tmp_path / "part").rglob("class0/*")):
        path.unlink()
    smaller = build_cache(tmp_path / "part", teacher_folder, tmp_path / "smaller.zarr")
    names = store.read_keys(store.open_cache(smaller)).tolist()
    with running(cache, smaller) as site:
        row = site.caches[0].row_of(names[4])
        assert row != 4
        first, second = site.search(row=[0, row], top=60)
        assert names[4] not in keys(first) + keys(second)
        assert set(keys(second)) == set(names) - {names[4]}
        missing = [result for result in first["results"] if result["key"] not in names]
        assert missing
        assert all(result["other"] is None for result in missing)
        assert all(result["other"] > 0 for result in first["results"] if result["key"] in names)
        gone = site.caches[0].row_of(missing[0]["key"])
        alone, error = site.search(row=[0, gone], top=3)
        assert len(alone["results"]) == 3
        assert f"this cache has no row '{missing[0]['key']}'" in error["error"]


def test_a_rank_beyond_the_known_ones(two: Site, monkeypatch):
    monkeypatch.setattr("teachercache.serve.answers.DEPTH", 5)
    first, _ = two.search(text="square 4", top=5)
    others = [result["other"] for result in first["results"]]
    assert all(rank <= 5 for rank in others)
    assert 0 in others
    assert first["results"][0]["beyond"] == 5


# ----------------------------------------------------------------------------------------------------
# Every kind of cache


def test_a_teacher_of_pictures_alone(data: Path, tmp_path: Path):
    made = run_build(load("own-colors"), data, tmp_path / "colors.zarr").cache
    with running(made.path) as site:
        assert site.ask("/api/caches")[0]["takes"] == {"pictures": ["picture"]}
        (answer,) = site.search(text="red")
        assert "own-colors reads no texts" in answer["error"]
        picture = sorted(data.rglob("*.png"))[2]
        (answer,) = site.search(picture=base64.b64encode(picture.read_bytes()).decode(), top=1)
        assert answer["results"][0]["key"].endswith(picture.stem)


def test_texts_alone_are_cards_without_pictures(tmp_path: Path):
    (tmp_path / "names.txt").write_text("red\ngreen\ndark green\nblue\n")
    made = run_build(load("own-letters"), tmp_path / "names.txt", tmp_path / "letters.zarr").cache
    with running(made.path) as site:
        assert site.ask("/api/caches")[0]["takes"] == {"texts": ["text"]}
        (answer,) = site.search(text="green", top=2)
        assert [result["texts"] for result in answer["results"]] == [["green"], ["dark green"]]
        assert not answer["results"][0]["picture"]
        status, _, content = site.send("/picture/0/0/small")
        assert (status, content) == (404, b"the row has no picture")


def test_views_and_unusable_rows(data: Path, tmp_path: Path):
    sorted(data.rglob("*.png"))[4].write_bytes(b"not a picture")
    assert (
        run("build", "--teacher", "own-colors", "--data", data, "--views", 2, "--out", tmp_path / "v.zarr")
        == 0
    )
    with running(tmp_path / "v.zarr") as site:
        broken = next(row for row in range(40) if site.send(f"/picture/0/{row}/small")[0] == 404)
        assert site.send(f"/picture/0/{broken}/small")[2] == b"not a picture in a known format"
        (answer,) = site.search(row=[0, 0], top=60)
        assert len(answer["results"]) == 38
        (answer,) = site.search(row=[0, broken])
        assert "is unusable (not a picture in a known format)" in answer["error"]


def test_a_big_cache_needs_its_index(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("teachercache.search.index.FLAT_UP_TO", 50)
    images = random_vectors(400)
    made = make_cache(tmp_path / "c.zarr", images)
    assert f"run `tc index {made.path} --field image_emb`" in error_of(capsys, "serve", made.path)
    index.build_index(made, kind="ivf")
    with running(made.path) as site:
        (answer,) = site.search(row=[0, 9], top=10)
        assert not answer["exact"]
        assert answer["note"].startswith("approximate: ivf index, nprobe ")
        ids, _ = brute_force(images, images[9], 30)
        assert len({*keys(answer)} & {f"k{i}" for i in ids}) >= 8
    make_cache(tmp_path / "c.zarr", random_vectors(400, seed=5))
    (tmp_path / "c.image_emb.faiss.json").write_text("{}")
    assert "run `tc index " in error_of(capsys, "serve", made.path)


def test_one_cache_that_fails_leaves_the_other(two: Site, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(two.caches[1].live, "encode", broken)
    first, second = two.search(text="square")
    assert len(first["results"]) == 48
    assert "RuntimeError: boom" in second["error"]


# ----------------------------------------------------------------------------------------------------
# Pictures


def test_a_picture_has_the_pixels_of_its_file_and_nothing_else_of_it(tmp_path: Path, teacher_folder: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x010E] = "the secret"
    large.save(folder / "a.jpg", exif=exif, comment=b"the secret", quality=95)
    built = build_cache(folder, teacher_folder, tmp_path / "c.zarr")
    with running(built) as site:
        for size, edge in (("small", 320), ("large", 1280)):
            status, headers, content = site.send(f"/picture/0/0/{size}")
            assert (status, headers["content-type"]) == (200, "image/jpeg")
            assert b"secret" not in content
            seen = np.asarray(decode_image(content).resize((80, 60)), int)
            assert decode_image(content).size == (edge, edge * 3 // 4)
            assert np.abs(seen - np.asarray(large.resize((80, 60)), int)).mean() < 6


def test_the_memory_of_pictures_is_bounded_and_the_oldest_go(cache: Path, monkeypatch):
    manifest = store.cached_manifest(store.open_cache(cache))
    size = len(Pictures(manifest).get(0, "small"))
    kept = Pictures(manifest, most_bytes=4 * size)
    for row in range(20):
        kept.get(0, "small")
        kept.get(row, "small")
        assert kept.bytes == sum(map(len, kept.kept.values())) <= 4 * size
    assert (0, "small") in kept.kept
    assert (1, "small") not in kept.kept
    monkeypatch.setattr("teachercache.serve.pictures._encoded", None)
    assert kept.get(0, "small")  # without decoding it again


def test_serving_writes_no_file(site: Site, cache: Path, squares: Path, tmp_path: Path, monkeypatch):
    """Neither beside the data nor the cache, nor a temporary one for a large upload."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for root in (cache.parent, squares) for path in root.rglob("*")}
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    assert len(file.getvalue()) > 2_000_000
    assert site.search(picture=base64.b64encode(file.getvalue()).decode(), top=1)[0]["results"]
    site.send("/picture/0/3/large")
    after = {path: path.stat().st_mtime_ns for root in (cache.parent, squares) for path in root.rglob("*")}
    assert after == before
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.7"]
)
def test_other_hosts_are_refused(site: Site, host: str):
    """A name that an attacker points at this machine (DNS rebinding) reads nothing."""
    for path in ("/", "/api/caches", "/picture/0/0/small"):
        status, _, content = site.send(path, Host=host)
        assert (status, content) == (421, b"this server answers under its own address only\n")


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}", "[::1]:{}"])
def test_names_of_this_machine_are_not(site: Site, host: str):
    assert site.send("/api/caches", Host=host.format(site.port))[0] == 200


def test_a_server_for_the_network_takes_addresses_and_its_name():
    open_to_all = guard.Guard(None, ["localhost", "box"], any_address=True)
    assert [open_to_all.is_ours(host) for host in ("10.0.0.7:80", "[fe80::1]:80", "box", "evil.example")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_requests_of_other_sites_are_refused(site: Site, headers: dict):
    assert site.send("/api/search", b"{}", **headers)[0] == 403
    assert site.send("/picture/0/0/small", **headers)[0] == 403
    assert site.send("/api/search", b"{}", Origin=f"http://127.0.0.1:{site.port}")[0] == 200


def test_there_are_no_websockets(site: Site):
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
    status, headers, _ = site.send("/", Sec_WebSocket_Key="x3JJHMbDL1EzLkh9GBhXDw==", **upgrade)
    assert status == 200
    assert "upgrade" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/picture/0/../../../../etc/passwd",
        "/picture/0/0/..%2f..%2f..%2fetc%2fpasswd",
        "/picture/0/%2fetc%2fpasswd/small",
        "/picture/0/-1/small",
        "/picture/0/64/small",
        "/picture/9/0/small",
        "/picture/0/99999999999999999999999999/small",
        "/picture/0/0/huge",
        "/page.html",
        "/opened.py",
        "/api/row/0/..",
    ],
)
def test_paths_outside_are_refused(site: Site, path: str):
    status, _, content = site.send(path)
    assert status == 404
    assert b"root:" not in content
    assert len(content) < 200


def test_large_requests_are_refused_before_they_are_read(site: Site, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    monkeypatch.setattr("teachercache.serve.app.MOST_BYTES", 1000)
    body = json.dumps({"text": "x" * 2000}).encode()
    assert site.send("/api/search", body)[0] == 413
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as opened:  # no length is promised
        head = (
            f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        opened.sendall(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert opened.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"text": 3},
        {"top": 0},
        {"top": 10**9},
        {"row": [0]},
        {"row": ["a", "b"]},
        {"where": {"split": 3}},
        {"where": []},
        {"picture": "no base64!"},
        {"picture": base64.b64encode(b"no picture").decode()},
        {"text": "x" * 5000},
        {"key": "no such key"},
    ],
)
def test_odd_queries_are_one_line(site: Site, values: object, capsys):
    status, _, content = site.send("/api/search", json.dumps(values).encode())
    assert status == 400
    assert "\n" not in json.loads(content)["error"]
    assert capsys.readouterr().err == ""


def test_odd_queries_of_one_cache_are_its_error(site: Site):
    for values in (
        {"row": [7, 0]},
        {"row": [0, -1]},
        {"row": [0, 10**30]},
        {"where": {"color": "x"}},
        {"find": "cats", "text": "x"},
    ):
        assert site.search(**values)[0]["error"]
    assert site.send("/api/search", b"[" * 100_000)[0] == 400


def test_every_answer_has_the_security_headers(site: Site):
    for path in ("/", "/page.css", "/page.js", "/api/caches", "/picture/0/0/small", "/no", "/api/search"):
        _, headers, _ = site.send(path)
        assert {name.lower() for name in guard.HEADERS} <= headers.keys()
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_a_fault_is_one_line_on_the_page_and_in_the_terminal(site: Site, monkeypatch, capsys):
    monkeypatch.setattr("teachercache.serve.app.answer", None)
    status, _, content = site.send("/api/search", b"{}")
    assert status == 500
    assert "this is a fault of teachercache: TypeError" in json.loads(content)["error"]
    err = capsys.readouterr().err
    assert err.startswith("error: this is a fault")
    assert "Traceback" not in err


# ----------------------------------------------------------------------------------------------------
# The command


def serve_until(capfd, number: int, *words: object) -> tuple[int, str, str]:
    """Run `tc serve`, look at its page, end it by a signal; its exit code, the URL and what it printed."""
    seen: list[str] = []

    def visit() -> None:
        line = ""
        while not line.endswith("\n"):
            line += capfd.readouterr().out
            time.sleep(0.02)
        seen.append(json.loads(line)["url"])
        for _ in range(500):  # the socket listens before uvicorn has its signal handlers
            with contextlib.suppress(OSError):
                assert b"teachercache" in urllib.request.urlopen(seen[0], timeout=60).read()
                break
        os.kill(os.getpid(), number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        code = run("serve", *words, "--port", 0, "--json")
    finally:
        visitor.join()
    assert {n: signal.getsignal(n) for n in before} == before
    return code, seen[0], capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal(capfd, cache: Path, number: int, code: int):
    status, url, err = serve_until(capfd, number, cache)
    assert status == code
    assert url.startswith("http://127.0.0.1:")
    assert err.splitlines()[-1] == "stopped serving"
    assert "Traceback" not in err


def test_a_wider_address_is_warned_about(capfd, cache: Path):
    _, url, _ = serve_until(capfd, signal.SIGINT, cache, "--host", "0.0.0.0")
    assert url.startswith("http://127.0.0.1:")


def test_mistakes_are_one_line(capsys, cache: Path, tmp_path: Path, monkeypatch):
    assert "no cache at" in error_of(capsys, "serve", tmp_path / "none.zarr", "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of(capsys, "serve", cache, "--port", port)
    assert f"port {port} of 127.0.0.1 is in use: pass --port 0" in line
    assert "pass another --host" in error_of(capsys, "serve", cache, "--host", "203.0.113.9", "--port", 0)
    assert "3 --teacher for 1 caches" in error_of(capsys, "serve", cache, *["--teacher", "a:B"] * 3)
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert "pip install 'teachercache[serve]'" in error_of(capsys, "serve", cache)


def test_opening_makes_no_python_objects_of_keys(tmp_path: Path, monkeypatch):
    """Keys, texts and labels of a large cache stay in Arrow."""
    made = make_cache(tmp_path / "c.zarr", random_vectors(300))
    monkeypatch.setattr(store, "read_keys", None)
    monkeypatch.setattr(store, "join", None)
    monkeypatch.setattr("teachercache.data.manifest.Manifest.column", None)
    rows = []
    monkeypatch.setattr("teachercache.data.manifest.Manifest.row", lambda *_: rows.append(1))
    with running(made.path) as site:
        site.ask("/api/caches")
        assert rows == []
        assert isinstance(site.caches[0].searchers.get("image_emb").vectors, vectors.Vectors)
