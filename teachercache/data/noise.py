"""Corrupt a share of the training pairs on purpose, to measure the robustness of recipes such as PSD.

A seeded share of the training rows receives wrong texts. The task column `noise` of a changed row records the
kind of noise, the row that the new texts come from, and the original texts. Images, keys and other splits do
not change.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from teachercache.core.errors import UserError, closest
from teachercache.data.manifest import Manifest, digest_rows, schema
from teachercache.data.sample import task_columns

Texts = list[list[str]]
COMMON = 1000  # a word of more rows than this is too common to find similar rows


def parse(text: str) -> tuple[str, float]:
    """Parse KIND=SHARE of the command line."""
    kind, equals, share = text.partition("=")
    if kind not in KINDS:
        raise UserError(
            f"--noise {text}: {closest(kind, KINDS)}write KIND=SHARE, KIND one of {', '.join(KINDS)}"
        )
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not equals or not 0 < value <= 1:
        raise UserError(f"--noise {text}: write a share after {kind}=, above 0 and up to 1")
    return kind, value


def corrupt(manifest: Manifest, kind: str, share: float, *, seed: int = 0) -> Manifest:
    """Return a manifest in which a share of the training rows with texts has wrong ones.

    Raises:
        UserError: There are too few such rows.
    """
    rows = manifest.rows_of_split("train")
    rows = rows[manifest.has_text()[rows]]
    count = round(share * len(rows))
    if count < 2:
        raise UserError(
            f"{manifest.data} has {len(rows)} training rows with texts: {share:g} of them are too few"
        )
    random = np.random.default_rng(seed)
    chosen = random.choice(rows, count, replace=False)
    texts, tasks, keys = (manifest.column(name) for name in ("texts", "task", "key"))
    sources, wrong = KINDS[kind](texts, chosen, rows, random)
    for row, source, new in zip(chosen.tolist(), sources, wrong, strict=True):
        record = {"kind": kind, "from": keys[source] if source is not None else None, "texts": texts[row]}
        old = json.loads(tasks[row]) if tasks[row] else {}
        tasks[row] = task_columns(
            **old, noise={name: value for name, value in record.items() if value is not None}
        )
        texts[row] = new
    table = manifest.table
    for name, column in (("texts", texts), ("task", tasks)):
        table = table.set_column(
            table.column_names.index(name), name, pa.array(column, schema().field(name).type)
        )
    return dataclasses.replace(manifest, table=table, digest=digest_rows(table))


def _shuffled(
    texts: Texts, chosen: np.ndarray, rows: np.ndarray, random: np.random.Generator
) -> tuple[Sequence[int | None], Texts]:
    """Give each chosen row the texts of the previous one in a random cycle: no row keeps its own."""
    sources = np.roll(chosen, 1).tolist()
    return sources, [texts[row] for row in sources]


def _partial(
    texts: Texts, chosen: np.ndarray, rows: np.ndarray, random: np.random.Generator
) -> tuple[Sequence[int | None], Texts]:
    """Keep half of the words of each text, a contiguous part."""

    def part(text: str) -> str:
        words = text.split()
        kept = max(1, len(words) // 2)
        start = int(random.integers(len(words) - kept + 1)) if words else 0
        return " ".join(words[start : start + kept])

    return [None] * len(chosen), [[part(text) for text in texts[row]] for row in chosen.tolist()]


def _near(
    texts: Texts, chosen: np.ndarray, rows: np.ndarray, random: np.random.Generator
) -> tuple[Sequence[int | None], Texts]:
    """Give each row the texts of the row that shares the most, but not all, of its words (Jaccard); else
    of a random row.
    """
    words = {row: frozenset(" ".join(texts[row]).lower().split()) for row in rows.tolist()}
    holders = collections.defaultdict(list)
    for row, mine in words.items():
        for word in mine:
            holders[word].append(row)

    def nearest(row: int) -> int:
        mine = words[row]
        shared = collections.Counter(
            other
            for word in sorted(mine)
            if len(holders[word]) <= COMMON
            for other in holders[word]
            if words[other] != mine
        )
        if not shared:
            return int(random.choice(rows[rows != row]))
        return max(shared, key=lambda other: (len(mine & words[other]) / len(mine | words[other]), -other))

    sources = [nearest(row) for row in chosen.tolist()]
    return sources, [texts[source] for source in sources]


KINDS: dict[str, Callable[..., tuple[Sequence[int | None], Texts]]] = {
    "shuffle": _shuffled,
    "partial": _partial,
    "near": _near,
}
