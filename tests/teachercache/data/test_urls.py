"""--data at fsspec URLs: a real S3 server on loopback, and memory://."""

import functools
import http.server
import json
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import build_cache, make_folder

from teachercache.api import default_cache
from teachercache.cache import store
from teachercache.cli import main
from teachercache.core import urls as remote
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path
from teachercache.data.manifest import Manifest, make_manifest
from teachercache.data.pictures import read_image
from teachercache.data.read import cache_folder, find_sources, read_manifest, save
from teachercache.data.sample import BadSample, Sample
from tests.teachercache.data.test_inputs import IMAGE, cc3m, save_to_disk, table, vcr_line, vqa
from tests.teachercache.data.test_readers import SHARD, coco, make_tar, picture, png, write

pytestmark = pytest.mark.usefixtures("s3")


def upload(folder: Path, url: str) -> str:
    """All files below a folder, to a URL."""
    root = as_path(url)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    root.fs.pipe({f"{root.path.rstrip('/')}/{path.relative_to(folder)}": path.read_bytes() for path in files})
    return url


def pictures(manifest: Manifest) -> list:
    """Every row's pixels, or why there are none."""
    found = []
    for i in range(len(manifest)):
        try:
            found.append(
                np.asarray(read_image(manifest, manifest.row(i))).tolist() if manifest.row(i).image else None
            )
        except BadSample as error:
            found.append(str(error).split(":")[0])
    return found


def refuses(data: str, message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_bucket_is_fresh(s3):
    path = as_path(s3()) / "x/y.txt"
    path.write_bytes(b"hello")
    assert path.read_bytes() == b"hello"
    assert [str(entry) for entry in path.parent.iterdir()] == [str(path)]
    assert not (as_path(s3()) / "x/y.txt").exists()


# ----------------------------------------------------------------------------------------------------
# Every form is understood as it is locally: same digest, same pictures


def photos(folder: Path) -> str:
    write(folder / "photos/train/cat/1.png", png(1))
    write(folder / "photos/train/cat/1.txt", "a cat\nanother\n")
    write(folder / "photos/train/dog/2.JPG", png(2))
    write(folder / "photos/train/dog/2.json", '{"caption": "a dog"}')
    write(
        folder / "photos/train-2/3.png", png(3)
    )  # sorts before train/ as a string and behind it as a folder
    write(folder / "photos/train-2/3.txt", "")
    write(folder / "photos/5, what #?.png", png(5))
    return "photos"


def shards(folder: Path) -> str:
    make_tar(folder / "shards/00.tar", SHARD)
    make_tar(folder / "shards/01.tar", SHARD)
    return "shards"


def parquet(folder: Path) -> str:
    (folder / "set/data").mkdir(parents=True)
    pq.write_table(
        table([1, 2, 3], text=["a", "b", "c"]), folder / "set/data/train-0.parquet", row_group_size=2
    )
    write(folder / "set/data/there.png", png(7))
    cells = pa.array([{"bytes": None, "path": "there.png"}, {"bytes": None, "path": "../x.png"}, None], IMAGE)
    pq.write_table(pa.table({"image": cells}), folder / "set/data/train-1.parquet")
    return "set/data/*.parquet"


def parquet_of_paths(folder: Path) -> str:
    write(folder / "deep/pictures/1.png", png(1))
    values = {"image": ["pictures/1.png", "./pictures/gone.png", None], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table(values), folder / "deep/l.parquet")
    return "deep/l.parquet"


def csv(folder: Path) -> str:
    write(folder / "1.png", png(1))
    return str(write(folder / "x.csv", "image,caption\n1.png,a\nnone.png,c\n").relative_to(folder))


def karpathy(folder: Path) -> str:
    write(folder / "coco/val2014/a.jpg", png(4))
    entry = {
        "filename": "a.jpg",
        "filepath": "val2014",
        "cocoid": 9,
        "split": "val",
        "sentences": [{"raw": "x"}],
    }
    write(folder / "annotations/dataset_coco.json", json.dumps({"images": [entry]}))
    return "annotations/dataset_coco.json"


def caption_list(folder: Path) -> str:
    write(folder / "images/val/a.jpg", png(4))
    write(folder / "annotations/list_test.json", json.dumps([{"image": "val/a.jpg", "caption": ["x", "y"]}]))
    return "annotations/list_test.json"


def snli_ve(folder: Path) -> str:
    write(folder / "flickr30k-images/12.jpg", png(1))
    line = {"gold_label": "neutral", "pairID": "p", "Flickr30K_ID": "12", "sentence2": "A tall man."}
    write(folder / "snli/snli_ve_dev.jsonl", json.dumps(line))
    return "snli/snli_ve_dev.jsonl"


def vcr(folder: Path) -> str:
    write(folder / "vcr1images/m/a@0.jpg", png(1))
    write(
        folder / "vcr1images/m/a@0.json", '{"boxes": [[1, 2, 3, 4, 0.9], [0, 0, 1, 1, 0.8], [5, 5, 6, 6, 1]]}'
    )
    lines = [vcr_line(0), vcr_line(1, metadata_fn="m/none.json")]
    write(folder / "vcr1/val.jsonl", "\n".join(map(json.dumps, lines)))
    return "vcr1/val.jsonl"


def cc3m_with_pictures(folder: Path) -> str:
    write(folder / "x/Train_GCC-training/00000/000000000.jpg", png(0))
    return str(cc3m(folder / "x", ["a.jpg", "b.jpg"]).relative_to(folder))


FORMS: dict[str, Callable[[Path], str]] = {
    "folder": photos,
    "tars": shards,
    "one tar": lambda folder: shards(folder) + "/01.tar",
    "tars by a glob": lambda folder: shards(folder) + "/*.tar",
    "parquet": parquet,
    "parquet in data/": lambda folder: parquet(folder).split("/")[0],
    "parquet of paths": parquet_of_paths,
    "csv": csv,
    "coco": lambda folder: str(coco(folder / "coco").relative_to(folder)),
    "karpathy": karpathy,
    "caption list": caption_list,
    "vqa": lambda folder: str(vqa(folder / "Questions", answers="../Annotations").relative_to(folder)),
    "snli-ve": snli_ve,
    "vcr": vcr,
    "cc3m": cc3m_with_pictures,
    "texts": lambda folder: write(folder / "names.txt", "one\ntwo\n").name,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_s3_says_what_the_local_files_say(form: str, s3, tmp_path: Path):
    data = FORMS[form](tmp_path)
    if form == "karpathy":
        (tmp_path / "coco").rename(tmp_path / "images")
    here, there = read_manifest(str(tmp_path / data)), read_manifest(f"{upload(tmp_path, s3())}/{data}")
    assert there.digest == here.digest
    assert there.table.drop_columns("problem").equals(here.table.drop_columns("problem"))
    assert list(map(bool, there.column("problem"))) == list(map(bool, here.column("problem")))
    assert pictures(there) == pictures(here)
    assert there.data.endswith(data)
    assert str(there.root).startswith("s3://")


@pytest.mark.parametrize("form", ["folder", "tars by a glob", "parquet", "coco"])
def test_memory_says_what_the_local_files_say(form: str, tmp_path: Path):
    data = FORMS[form](tmp_path)
    url = upload(tmp_path, f"memory://{tmp_path.name}")
    here, there = read_manifest(str(tmp_path / data)), read_manifest(f"{url}/{data}")
    assert there.digest == here.digest
    assert pictures(there) == pictures(here)


def test_a_bucket_is_a_folder_and_limit_counts(s3, tmp_path):
    photos(tmp_path)
    url = upload(tmp_path / "photos", s3())
    as_path(f"{url}/empty").fs.pipe(f"{url}/train/", b"")  # what consoles leave where they make a folder
    assert (
        read_manifest(url).digest
        == read_manifest(f"{url}/").digest
        == read_manifest(str(tmp_path / "photos")).digest
    )
    assert read_manifest(url, limit=2).column("key") == read_manifest(url).column("key")[:2]


def test_headers_of_large_pictures_come_without_the_pictures(s3, tmp_path, monkeypatch):
    large = np.random.default_rng(0).bytes(3 << 20)
    make_tar(
        tmp_path / "a.tar",
        [
            (f"{i}.{kind}", large if kind == "jpg" else f"text {i}")
            for i in range(4)
            for kind in ("jpg", "txt")
        ],
    )
    caches = []

    def spy(path, block):
        file = open_file(path, block)
        caches.append(file.cache)
        return file

    open_file = remote.open_file
    monkeypatch.setattr("teachercache.data.readers.tars.open_file", spy)
    manifest = read_manifest(upload(tmp_path, s3()) + "/a.tar")
    assert [texts for (texts,) in manifest.column("texts")] == [f"text {i}" for i in range(4)]
    assert caches[0].total_requested_bytes < 2 << 20 < 12 << 20 < caches[0].size


def test_tars_are_worked_on_ahead_and_stay_in_order():
    places, started = [as_path(f"memory://{i}") for i in range(30)], []
    found = remote.in_order(lambda path: started.append(path) or path.name, places)
    assert next(found) == "0"
    assert len(started) <= remote.TARS_AT_ONCE + 1
    assert list(found) == [str(i) for i in range(1, 30)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the S3 requests from now on."""
    from s3fs import S3FileSystem

    calls: list[str] = []
    call = S3FileSystem._call_s3

    async def spy(self, method, *args, **options):
        calls.append(method)
        return await call(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", spy)
    return calls


def test_a_picture_is_one_request_and_sizes_are_one_listing(s3, tmp_path, monkeypatch):
    for form in (photos, shards):
        form(tmp_path)
    write(
        tmp_path / "x.csv",
        "image\n" + "".join(f"photos/train/{name}\n" for name in ("cat/1.png", "dog/2.JPG")),
    )
    url = upload(tmp_path, s3())
    for data in ("photos", "shards"):
        manifest = read_manifest(f"{url}/{data}")
        calls = counted(monkeypatch)
        read_image(manifest, manifest.row(0))
        assert calls == ["get_object"]
    sizes = remote.sizes_below(as_path(url))
    calls = counted(monkeypatch)
    assert [sizes(f"shards/{name}.tar") is None for name in ("00", "01", "02")] == [False, False, True]
    assert calls == ["list_objects_v2"]


# ----------------------------------------------------------------------------------------------------
# Several sources, manifests, names


def test_sources_join_in_one_bucket_and_across_places(s3, tmp_path):
    for form in (photos, shards):
        form(tmp_path)
    one, other = upload(tmp_path, f"{s3()}/a,b"), upload(tmp_path, s3())  # a comma in a name is no separator
    here = read_manifest(f"{tmp_path}/photos,{tmp_path}/shards/*.tar")
    assert read_manifest(f"{one}/photos").digest == read_manifest(str(tmp_path / "photos")).digest
    joined = read_manifest(f"{other}/photos, {other}/shards/*.tar")
    assert (joined.digest, str(joined.root).rstrip("/")) == (here.digest, other)
    for data in (f"{tmp_path}/photos,{other}/shards", f"{other}/photos,{upload(tmp_path, s3())}/shards"):
        manifest = read_manifest(data)
        assert manifest.column("key")[:4] == here.column("key")[:4]
        assert pictures(manifest) == pictures(here)
        assert manifest.data == data


def test_a_manifest_at_a_url_with_a_root_at_a_url(s3, tmp_path, capsys):
    photos(tmp_path)
    url = upload(tmp_path, s3())
    manifest = read_manifest(f"{url}/photos")
    for out in (as_path(f"{url}/saved/m.parquet"), tmp_path / "m.parquet"):
        save(manifest, out)
        again = read_manifest(str(out))
        assert (again.digest, str(again.root), again.data) == (
            manifest.digest,
            str(manifest.root),
            manifest.data,
        )
        assert pictures(again) == pictures(manifest)
    assert find_sources(f"{url}/saved/m.parquet")[0].kind == "manifest"
    assert main(["manifest", f"{url}/photos", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["unusable"], facts["data"]) == (4, 0, f"{url}/photos")
    assert facts["formats"] == {f"{url}/photos": "folder of pictures"}


def test_pictures_named_by_their_urls(s3, tmp_path):
    write(tmp_path / "up/1.png", png(1))
    url = upload(tmp_path / "up", s3())
    manifest = read_manifest(str(write(tmp_path / "x.csv", f"image\n{url}/1.png\n{url}/none.png\n")))
    assert manifest.column("size") == [len(png(1)), 0]
    assert pictures(manifest) == [np.asarray(picture(1)).tolist(), "cannot open the picture"]


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        ("s3://bucket/photos/", "photos"),
        ("s3://bucket/shards/*.tar", "shards"),
        ("s3://bucket/shards/{0..9}/0*.tar", "{0"),
        ("s3://bucket/*.tar", "bucket"),
        ("s3://bucket", "bucket"),
        ("s3://bucket/x.parquet,s3://other/y", "x+1"),
        ("https://a.org/b/c.tar?download=1", "c"),
        ("memory://", "data"),
    ],
)
def test_default_cache_of_a_url(data: str, folder: str):
    assert cache_folder(data) == Path("caches", folder)
    assert default_cache(data, "clip-lite") == Path("caches", folder, "clip-lite.zarr")


def test_paths_stay_in_their_bucket():
    assert str(remote.below(as_path("s3://b/x"), "../../../y/./z.png")) == "s3://b/y/z.png"
    assert str(remote.below(as_path("s3://b/x"), "s3://c/z.png")) == "s3://c/z.png"
    assert remote.below(Path("x"), "../y") == Path("x/../y")


# ----------------------------------------------------------------------------------------------------
# https, from a server that gives ranges and from one that does not


class Ranges(http.server.SimpleHTTPRequestHandler):
    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, wanted = path.read_bytes(), self.headers.get("Range")
        if wanted and self.ranges:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(end) + 1 if end else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
            content = part
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request, tmp_path) -> Iterator[tuple[str, bool]]:
    handler = type("Handler", (Ranges,), {"ranges": request.param})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", request.param
        server.shutdown()


def test_single_files_over_http(web, tmp_path):
    url, ranges = web
    for form in (shards, csv, photos):
        form(tmp_path)
    assert read_manifest(f"{url}/x.csv").digest == read_manifest(str(tmp_path / "x.csv")).digest
    assert pictures(read_manifest(f"{url}/x.csv")) == pictures(read_manifest(str(tmp_path / "x.csv")))
    here, there = read_manifest(f"{tmp_path}/shards/00.tar"), read_manifest(f"{url}/shards/00.tar")
    assert there.digest == here.digest
    assert pictures(there) == pictures(here)
    make_tar(tmp_path / "large.tar", [(f"{i}.jpg", bytes(400_000)) for i in range(3)])
    if ranges:
        assert read_manifest(f"{url}/large.tar").digest == read_manifest(str(tmp_path / "large.tar")).digest
    else:
        refuses(f"{url}/large.tar", "range requests.*check the address")
    refuses(f"{url}/photos/", "folders cannot be listed over http: pass a .tar")
    refuses(f"{url}/none.tar", "no data at http")


# ----------------------------------------------------------------------------------------------------
# What goes wrong: at listing time one line, at a picture a row only if its object is not there


def test_arrow_files_are_not_read_from_a_url(s3, tmp_path):
    save_to_disk(tmp_path / "d", [table([1])])
    url = upload(tmp_path, s3())
    for data in (f"{url}/d", f"{url}/d/data-00000-of-00001.arrow"):
        refuses(data, r"mapped into memory: download them, or write them as Parquet \(Dataset.to_parquet\)")


def test_nothing_there_and_damaged_files(s3, tmp_path):
    url = s3()
    write(tmp_path / "x.parquet", "no Parquet")
    write(tmp_path / "x.tar", "no tar" * 200)
    write(tmp_path / "x.json", "{")
    upload(tmp_path, url)
    for data in (f"{url}/none", f"{url}/*.tsv", "s3://no-such-bucket/x", "s3://no-such-bucket/*.tar"):
        refuses(data, r"no data at s3://.*AWS_ENDPOINT_URL")
    refuses(f"{url}/x.parquet", "not a readable Parquet")
    refuses(f"{url}/x.tar", "not a plain")
    refuses(f"{url}/x.json", "not a COCO captions file")
    refuses("nowhere://x/y", r"nowhere://x/y: (Unsupported filesystem|Protocol not known)")


@pytest.fixture
def broken(monkeypatch) -> Iterator[Callable[[], None]]:
    """A function that turns S3's address into one where nobody answers; connections begin anew."""
    from s3fs import S3FileSystem

    def break_it() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(remote, "PAUSES", (0.01,))
        S3FileSystem.clear_instance_cache()

    yield break_it
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("data", ["photos", "*.tar", "x.parquet", "a,b"])
def test_no_connection_is_one_line(data: str, s3, broken):
    url = f"{s3()}/{data}"
    broken()
    message = refuses(url, r"^cannot read s3://bucket-\d+/")
    assert message.endswith(
        "check the bucket's name, the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID) and AWS_ENDPOINT_URL"
    )


def test_a_missing_object_is_a_bad_row_and_a_missing_bucket_is_not(s3, tmp_path):
    root = as_path(upload(tmp_path, s3()))
    manifest = make_manifest("d", root, [Sample("a", "none.png")])
    with pytest.raises(BadSample, match=r"there is no s3://.*none\.png"):
        read_image(manifest, manifest.row(0))
    (root / "short.tar").write_bytes(b"x" * 10)
    (root / "empty.png").write_bytes(b"")
    for sample in (Sample("a", "short.tar", offset=512, size=10), Sample("b", "empty.png")):
        with pytest.raises(BadSample, match="no bytes"):
            read_image(manifest, sample)
    gone = Manifest("d", as_path("s3://no-such-bucket"), manifest.table, "")
    with pytest.raises(UserError, match="specified bucket does not exist"):
        read_image(gone, manifest.row(0))


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_connection_that_comes_back_is_used(form: str, s3, tmp_path, monkeypatch):
    data = FORMS[form](tmp_path)
    manifest = read_manifest(f"{upload(tmp_path, s3())}/{data}")
    from s3fs import S3FileSystem, core

    fails = [ConnectionResetError("reset"), TimeoutError("slow")]

    def flaky(function):
        return lambda *args, **options: (
            (_ for _ in ()).throw(fails.pop()) if fails else function(*args, **options)
        )

    monkeypatch.setattr(S3FileSystem, "_cat_file", flaky(S3FileSystem._cat_file))
    S3FileSystem.clear_instance_cache()  # an instance holds the methods that its class had
    monkeypatch.setattr(core, "_fetch_range", flaky(core._fetch_range))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    assert read_image(manifest, manifest.row(0)).size == (7, 5)
    assert fails == []


@pytest.mark.parametrize("workers", [0, 2])
def test_build_from_s3_stops_without_a_connection_and_goes_on(
    workers, s3, broken, tmp_path, teacher_folder, monkeypatch
):
    data = make_folder(tmp_path / "squares", 24)
    write(data / "bad.png", "no picture")
    write(data / "bad.txt", "its caption")
    url = upload(data, f"{s3()}/squares")
    expected = build_cache(data, teacher_folder, tmp_path / "local.zarr", block_rows=8)
    right, out = os.environ["AWS_ENDPOINT_URL"], tmp_path / "c.zarr"
    manifest = read_manifest(url)  # and so the parent has connections that no worker must use
    as_path(f"{url}/class1/022.png").unlink()
    monkeypatch.setattr("teachercache.data.read.read_manifest", lambda data: manifest)
    broken()
    with pytest.raises(UserError, match=r"cannot read s3://.*run the same command to resume") as stopped:
        build_cache(url, teacher_folder, out, block_rows=8, workers=workers)
    traceback.clear_frames(
        stopped.tb
    )  # ends the workers: torch waits ten seconds for them where gc has to do it
    monkeypatch.setenv("AWS_ENDPOINT_URL", right)
    remote.here(manifest.root).fs.clear_instance_cache()
    build_cache(url, teacher_folder, out, block_rows=8, workers=workers)
    opened, local = store.open_complete(out), store.open_complete(expected)
    bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in bad] == ["bad", "class1/022"]
    assert bad[0]["reason"] == "not a picture in a known format"
    ours, theirs = (store.read_field(cache, "image_emb")[:] for cache in (opened, local))
    usable = np.array([key not in ("bad", "class1/022") for key in manifest.column("key")])
    assert np.array_equal(ours[usable], theirs[usable])
