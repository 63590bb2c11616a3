"""Print the results of commands for a person."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teachercache.core.errors import UserError
from teachercache.core.progress import printable, show

if TYPE_CHECKING:
    from teachercache.cache.store import Cache
    from teachercache.teachers.teacher import Entry


def print_teachers(ours: "Mapping[str, Entry]", installed: Mapping[str, str]) -> None:
    """Print the names that `--teacher` takes: ours, those of installed packages by name and origin, and other forms."""
    for name, entry in ours.items():
        show(f"{name:18} {entry.doc}  [{', '.join(entry.outputs)}]")
    for name, doc in installed.items():
        show(f"{name:18} {doc}")
    show(
        "and open_clip:MODEL/TAG, hf:ORG/NAME, diffusers:ORG/NAME, a folder of open_clip or diffusers, a run of "
        "`student train`, package.module:entry"
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `verify_cache` returned."""
    for block, reason in report["damaged"].items():
        show(f"block {block}: {reason}")
    for name, reason in report["files"].items():
        show(f"{name}: {reason}")
    for name, found in report["indexes"].items():
        show(f"{name}: {found['reason']}")
    for name, values in report["cosine"].items():
        show(f"{name}: cosine to the recomputed values min {values['min']:.6f}, mean {values['mean']:.6f}")


def refuse_damage(report: Mapping[str, Any]) -> None:
    """Raise a UserError for what `verify_cache` found, with the command that mends it."""
    if report["damaged"]:
        raise UserError(
            f"{len(report['damaged'])} damaged blocks: run `{report['command']}` to write them again"
        )
    if report["files"]:
        raise UserError(f"{' and '.join(report['files'])}: damaged, run `{report['command']}` to repair")
    for name, found in report["indexes"].items():
        raise UserError(
            f"{name} cannot be used ({found['reason']}): run `{found['command']}` to make it again"
        )
    if not report["ok"]:
        raise UserError("the teacher computes different values: was the data or the teacher changed?")


def print_manifest(facts: Mapping[str, Any]) -> None:
    """Print what `teachercache.data.summary.describe` returned."""
    low, high = facts["texts"]
    for path, kind in facts["formats"].items():
        show(f"format     {kind}  ({path})")
    show(
        f"rows       {facts['rows']:,}, {facts['pictures']:,} with a picture, {facts['tasks']:,} with task columns"
    )
    show(f"texts      {low if low == high else f'{low} to {high}'} a row")
    for name in ("splits", "labels"):
        counts = [f"{printable(value) or '(none)'} {count:,}" for value, count in facts[name].items()]
        show(
            f"{name:10} {', '.join(counts[:10]) or '(none)'}{f', ... {len(counts):,} in all' * (len(counts) > 10)}"
        )
    for row in facts["first"]:
        texts = " | ".join(row["texts"])[:200]
        show(printable(f"  {row['key']}  {row['image'] or '(no picture)'}  {texts}"))
        if row["task"]:
            show(printable(f"    {row['task'][:200]}"))
    show(f"problems   {facts['unusable']:,} rows" if facts["unusable"] else "problems   none found")
    for problem, count in facts["problems"].items():
        show(printable(f"  {count:,}: {problem}"))


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """Print what `search_cache` returned, a line per row."""
    for result in results:
        texts = "; ".join(result["texts"])
        show(printable(f"{result['score']:.3f}  {result['image'] or result['key']}  {texts}"))


def print_info(opened: "Cache", *, blocks_done: int, unusable: int, size: int) -> None:
    """Print the metadata of a cache.

    Args:
        opened: The cache.
        blocks_done: The number of finished blocks.
        unusable: The number of entries in the quarantine.
        size: The bytes on disk.
    """
    meta = opened.meta
    show(
        f"teacher    {meta.spec.name} ({meta.spec.weights}), weights {meta.spec.digest[:12]}, {meta.precision}"
    )
    show(
        f"data       {meta.data}, {meta.rows:,} rows, {meta.texts} texts a row"
        + (f", {meta.views} augmented views a picture" if meta.views else "")
    )
    show(
        f"blocks     {blocks_done} of {meta.num_blocks} done, {meta.block_rows:,} rows each, {size / 1e6:,.1f} MB"
    )
    show(f"unusable   {unusable}")
    for field in opened.fields.values():
        shape = "x".join(map(str, field.array_shape(meta.rows, meta.texts, meta.views)))
        show(f"  {field.name:18} {shape:>18} {field.dtype:8} {field.doc}")
    for name, value in meta.spec.constants.items():
        show(f"  {name:12} {value:.6g}")
