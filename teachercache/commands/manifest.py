"""`tc manifest`: show how data is read, and save it."""

from collections.abc import Mapping
from typing import Any

import click

from teachercache.commands.next_steps import suggest_first_build
from teachercache.commands.options import DEMO_DATA, NUMBER, SEED, any_path, output_options, print_json
from teachercache.core.command import place
from teachercache.core.paths import as_path
from teachercache.core.progress import printable, say, show


@click.command()
@click.argument("data", type=place, shell_complete=any_path)
@click.option("--out", type=place, help="Write a manifest .parquet, which --data takes.")
@click.option("--limit", type=NUMBER, help="Only the first N rows.")
@click.option(
    "--noise",
    metavar="KIND=SHARE",
    help="Give a share of the training rows wrong texts: shuffle, partial or near.",
)
@click.option("--noise-seed", default=0, show_default=True, type=SEED)
@output_options
def manifest(
    data: str, out: str | None, limit: int | None, noise: str | None, noise_seed: int, as_json: bool
) -> None:
    """Show how data is read, before a teacher runs over it; save the manifest with --out.

    \u0008
    DATA is one of these, or several separated by commas; each may be a quoted glob or a URL:
      folder/          images, captions in a .txt or .json of the same name; folders are classes and splits
      shards/ x.tar    webdataset and img2dataset shards, read in place
      x.parquet x/     images as bytes or paths; a folder written by Hugging Face's save_to_disk
      x.arrow          one file of such a folder
      x.json           COCO captions, Karpathy's dataset_coco.json, lists of {image, caption}, VQA v2 questions
      x.jsonl          VCR, SNLI-VE
      x.csv x.tsv      a table with a header, or CC3M's captions and urls beside a folder of downloaded images
      x.txt            texts without images, one per line: class names, answers

    \u0008
    tc manifest photos/
    tc manifest dataset_coco.json --out coco.parquet
    """
    from teachercache.data.read import find_sources, join_sources, save
    from teachercache.data.summary import describe

    sources = find_sources(data)
    rows_read = join_sources(data, sources, limit=limit)
    if noise is not None:
        from teachercache.data.noise import corrupt, parse

        kind, share = parse(noise)
        original, rows_read = rows_read, corrupt(rows_read, kind, share, seed=noise_seed)
        rows = original.rows_of_split("train")
        count = int(original.has_text()[rows].sum())
        say(
            f"{kind}: {round(share * count)} of {count} training rows have other texts, recorded in their task columns"
        )
    facts = describe(sources, rows_read)
    if out is not None:
        save(rows_read, as_path(out))
        say(f"wrote {out}: pass it as --data {out}")
    if as_json:
        print_json(facts)
    else:
        print_manifest(facts)
    suggest_first_build(out or data, DEMO_DATA)


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
