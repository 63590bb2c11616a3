"""Benchmark the answers of `tc serve`: a million vectors behind an index, asked over HTTP, and texts that are encoded."""

import argparse
import functools
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.report import HEAD, Figures, Line, judge, middle, number
from teachercache.cache import store
from teachercache.cache.layout import block_rows_for
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core.progress import say
from teachercache.data.manifest import make_manifest
from teachercache.data.sample import Sample
from teachercache.search.index import describe, update_index
from teachercache.serve.answers import DEPTH
from teachercache.serve.opened import Served, open_served
from teachercache.serve.server import listen, make_server

DIM, CLUSTERS, SPREAD = 512, 2_000, 1.0
QUERIES, TOP = 100, 48
BAR = "<= 100"
FIELD = Field("image_emb", (DIM,), "image", "float16", "random")
SPEC = TeacherSpec("bench", "random:0", "0" * 64, ("embeddings",), (FIELD,), {}, {}, {}, inputs=("image",))
LABELS, SPLITS = 1_000, ("train", "train", "train", "train", "val", "test")


def bench_serve(options: argparse.Namespace) -> list[str]:
    """Return the tables of milliseconds per answer."""
    lines, notes = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.serve_folder or temporary)
        for kind in options.vectors:
            path = folder / f"{kind}-{options.serve_rows}.zarr"
            cache = (
                store.open_complete(path) if path.exists() else random_cache(path, options.serve_rows, kind)
            )
            begin = time.perf_counter()
            _, record, done = update_index(cache)
            took = f"; indexed in {time.perf_counter() - begin:.0f} s" if done == "built" else ""
            notes.append(f"- {kind} vectors: {describe(record)}{took}.")
            begin = time.perf_counter()
            served = open_served(path)
            notes.append(f"- {kind} vectors: opened in {time.perf_counter() - begin:.1f} s.")
            lines += answers(served, f"{kind}, {options.serve_rows:,} x {DIM}")
    if options.served_cache:
        lines += texts(open_served(options.served_cache))
    note = (
        f"Milliseconds from a request to the end of its answer, {QUERIES} queries one after the other, {TOP} results with "
        "keys, texts, label and split: median and 95th percentile. Processor time is that of server and client "
        "together; other programs on the machine lengthen the answers, but not this time."
    )
    head = [
        "| what | median | 95 % below | processor, median (slowest) | bar of the 95 % | verdict |",
        HEAD[1],
    ]
    return [note, "", *head, *map(str, lines), "", *notes]


# ----------------------------------------------------------------------------------------------------
# Caches


def random_cache(path: Path, rows: int, kind: str) -> store.Cache:
    """Write a cache of random vectors without pictures, "clustered" as embeddings are or "gaussian"."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((CLUSTERS, DIM), dtype=np.float32)
    samples = (
        Sample(f"{i:08d}", "", (f"a picture of {i}",), f"class {i % LABELS}", SPLITS[i % len(SPLITS)])
        for i in range(rows)
    )
    manifest = make_manifest("bench", path.parent, samples)
    size = block_rows_for((FIELD,), rows)
    cache = store.create(
        path, CacheMeta(SPEC, "bench", manifest.digest, rows, 1, size, "float32", {}), manifest
    )
    for block in range(cache.meta.num_blocks):
        count = len(cache.meta.block(block))
        values = random.standard_normal((count, DIM), dtype=np.float32)
        if kind == "clustered":
            values = SPREAD * values + centers[random.integers(CLUSTERS, size=count)]
        keys = np.array([f"{i:08d}" for i in cache.meta.block(block)], dtype=np.dtypes.StringDType())
        ones = {("valid", 0): np.ones(count, bool), ("text_valid", 0): np.ones(count, bool)}
        chunks = {**ones, ("key", 0): keys, (FIELD.name, 0): values.astype(np.float16)}
        store.write_block(cache, block, chunks, [])
    store.finish(cache)
    say(f"{rows:,} {kind} vectors written")
    return cache


# ----------------------------------------------------------------------------------------------------
# Answers


@contextmanager
def running(caches: list[Served]) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Serve caches, and yield a function that sends a query and returns the answer of the first."""
    opened = listen("127.0.0.1", 0)
    server = make_server(caches, "127.0.0.1")
    thread = threading.Thread(target=functools.partial(server.run, sockets=[opened]))
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", opened.getsockname()[1])

    def ask(values: dict[str, Any]) -> dict[str, Any]:
        connection.request("POST", "/api/search", json.dumps({"top": TOP, **values}))
        answer = json.loads(connection.getresponse().read())["answers"][0]
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    try:
        while not server.started:
            time.sleep(0.01)
        yield ask
    finally:
        connection.close()
        server.should_exit = True
        thread.join()
        opened.close()


def answers(served: Served, what: str) -> list[Line]:
    """Measure neighbors of random rows: all rows, a split (searched in the index) and a class (exactly)."""
    rows = np.random.default_rng(1).integers(len(served.manifest), size=QUERIES).tolist()
    filters: dict[str, dict[str, str]] = {
        "all rows": {},
        "a split of two thirds": {"split": "train"},
        "a class of a thousandth": {"label": "class 7"},
    }
    lines = []
    with running([served]) as ask:
        for name, where in filters.items():
            queries = [{"row": [0, row], "where": where} for row in rows]
            figures, found = timed(ask, queries)
            exact = "exact" if found[0]["exact"] else "approximate"
            lines.append(line(f"{what}: {name}, {exact}", figures, BAR))
    with running([served, served]) as ask:
        figures, _ = timed(ask, [{"row": [0, row]} for row in rows])
        lines.append(line(f"{what}: two caches, ranks up to {DEPTH:,}", figures, BAR))
    return lines


def texts(served: Served) -> list[Line]:
    """Measure texts that the teacher of a cache encodes."""
    words = ["a red bird", "an old house", "a sign with an arrow", "something to eat", "a person who works"]
    queries = [{"text": f"{words[i % len(words)]}, number {i}"} for i in range(QUERIES)]
    spec = served.cache.meta.spec
    with running([served]) as ask:
        figures, found = timed(ask, queries)
    encode = [1000 * answer["seconds"]["encode"] for answer in found]
    rest = [1000 * (answer["seconds"]["search"] + answer["seconds"]["rows"]) for answer in found]
    what = f"{spec.name}, {served.cache.meta.rows:,} rows: a text"
    return [
        line(f"{what}, whole answer", figures),
        line(f"{what}, encoding alone", {"wall": encode}),
        line(f"{what}, search and rows alone", {"wall": rest}),
    ]


def timed(
    ask: Callable[[dict[str, Any]], dict[str, Any]], queries: list[dict[str, Any]]
) -> tuple[Figures, list[dict[str, Any]]]:
    """Return milliseconds, processor milliseconds and answer of each query, after some that are not counted."""
    figures: Figures = {"wall": [], "processor": []}
    found = []
    for i, query in enumerate([*queries[:10], *queries]):
        begin, used = time.perf_counter(), time.process_time()
        answer = ask(query)
        if i >= 10:
            figures["wall"].append(1000 * (time.perf_counter() - begin))
            figures["processor"].append(1000 * (time.process_time() - used))
            found.append(answer)
    return figures, found


def line(what: str, figures: Figures, bar: str = "-") -> Line:
    """Return a row of the table."""
    wall = figures["wall"]
    high = statistics.quantiles(wall, n=20)[-1]
    processor = figures.get("processor")
    used = f"{middle(figures, 'processor')} ({number(max(processor))})" if processor else "-"
    return Line(what, middle(figures, "wall"), number(high), used, bar, judge(high, bar))
