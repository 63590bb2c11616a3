"""Small data and a small teacher that every test can afford."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import build_cache, make_folder, save_diffusion, save_teacher, train_here

# Before torch is imported, here and in children: with tiny tensors two threads of a busy machine wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported and collected lives to the end: no later collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process write an empty curve.png: drawing it takes longer than their steps.

    Fixtures of modules, other processes and direct calls draw.
    """
    loop = sys.modules.get("student.training.loop")
    if loop is not None:
        from teachercache.core.digests import write_proved

        monkeypatch.setattr(loop, "draw_curve", lambda out, terms: write_proved(out / "curve.png", out, b""))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, for the pages of the report and of the server."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playing:
        opened = playing.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "small")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "squares")


# ----------------------------------------------------------------------------------------------------
# URLs: an S3 server of our own on loopback

# A process of its own, so that no server's threads are there when workers are forked; it ends when its stdin does,
# so that none is left behind however the tests end.
S3_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """http://127.0.0.1:<port> of an S3 server; nothing in the environment points to it yet."""
    with subprocess.Popen(
        [sys.executable, "-c", S3_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        port = server.stdout.readline().strip()
        if not port:
            pytest.fail("moto's S3 server did not start: pip install 'moto[server]'")
        yield f"http://127.0.0.1:{port}"
        server.stdin.close()
        server.terminate()


@pytest.fixture(scope="session")
def s3(s3_endpoint: str) -> Iterator[Callable[[], str]]:
    """A function that makes an empty bucket and returns its URL, as s3://bucket-3; children find the server too."""
    names = (f"bucket-{i}" for i in itertools.count())

    def new_bucket() -> str:
        name = next(names)
        urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")).close()
        return f"s3://{name}"

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("NO_PROXY", "no_proxy"):  # urllib, botocore and aiohttp look at one or the other
            environment.setenv(name, ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])))
        yield new_bucket


# ----------------------------------------------------------------------------------------------------
# Phase 2: a cache, runs in this process and in others


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 16 test rows of two captions each, in three classes."""
    return make_folder(tmp_path_factory.mktemp("data") / "squares", 64, texts=2, splits=True)


@pytest.fixture(scope="session")
def cache(squares: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny teacher (16 wide) says of `squares`."""
    return build_cache(squares, teacher_folder, tmp_path_factory.mktemp("caches") / "tiny.zarr")


@pytest.fixture(scope="session")
def finished_run(squares: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of clip_kd; read it, change nothing in it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train_here(squares, cache, out, "--steps", 4) == 0
    return out
