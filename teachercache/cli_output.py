"""Print the results of commands for a person."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachercache.cache.store import Cache
    from teachercache.teachers.teacher import Entry


def print_teachers(ours: "Mapping[str, Entry]", installed: Mapping[str, str]) -> None:
    """Print the names that `--teacher` takes: ours, those of installed packages by name and origin, and other forms."""
    for name, entry in ours.items():
        print(f"{name:18} {entry.doc}  [{', '.join(entry.outputs)}]")
    for name, doc in installed.items():
        print(f"{name:18} {doc}")
    print(
        "and open_clip:MODEL/TAG, hf:ORG/NAME, diffusers:ORG/NAME, a folder of open_clip or diffusers, a run of "
        "`student train`, package.module:entry"
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `verify_cache` returned."""
    for block, reason in report["damaged"].items():
        print(f"block {block}: {reason}")
    for name, reason in report["files"].items():
        print(f"{name}: {reason}")
    for name, found in report["indexes"].items():
        print(f"{name}: {found['reason']}")
    for name, values in report["cosine"].items():
        print(f"{name}: cosine to the recomputed values min {values['min']:.6f}, mean {values['mean']:.6f}")


def print_manifest(facts: Mapping[str, Any]) -> None:
    """Print what `teachercache.data.read.describe` returned."""
    low, high = facts["texts"]
    for path, kind in facts["formats"].items():
        print(f"format     {kind}  ({path})")
    print(
        f"rows       {facts['rows']:,}, {facts['pictures']:,} with a picture, {facts['tasks']:,} with task columns"
    )
    print(f"texts      {low if low == high else f'{low} to {high}'} a row")
    for name in ("splits", "labels"):
        counts = [f"{value or '(none)'} {count:,}" for value, count in facts[name].items()]
        print(
            f"{name:10} {', '.join(counts[:10]) or '(none)'}{f', ... {len(counts):,} in all' * (len(counts) > 10)}"
        )
    for row in facts["first"]:
        print(f"  {row['key']}  {row['image'] or '(no picture)'}  {' | '.join(row['texts'])[:200]}")
        if row["task"]:
            print(f"    {row['task'][:200]}")
    print(f"problems   {facts['unusable']:,} rows" if facts["unusable"] else "problems   none found")
    for problem, count in facts["problems"].items():
        print(f"  {count:,}: {problem}")


def print_info(opened: "Cache", *, blocks_done: int, unusable: int, size: int) -> None:
    """Print the metadata of a cache.

    Args:
        opened: The cache.
        blocks_done: The number of finished blocks.
        unusable: The number of entries in the quarantine.
        size: The bytes on disk.
    """
    meta = opened.meta
    print(
        f"teacher    {meta.spec.name} ({meta.spec.weights}), weights {meta.spec.digest[:12]}, {meta.precision}"
    )
    print(
        f"data       {meta.data}, {meta.rows:,} rows, {meta.texts} texts a row"
        + (f", {meta.views} augmented views a picture" if meta.views else "")
    )
    print(
        f"blocks     {blocks_done} of {meta.num_blocks} done, {meta.block_rows:,} rows each, {size / 1e6:,.1f} MB"
    )
    print(f"unusable   {unusable}")
    for field in opened.fields.values():
        shape = "x".join(map(str, field.array_shape(meta.rows, meta.texts, meta.views)))
        print(f"  {field.name:18} {shape:>18} {field.dtype:8} {field.doc}")
    for name, value in meta.spec.constants.items():
        print(f"  {name:12} {value:.6g}")
