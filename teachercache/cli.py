"""The command line `tc`: read options, call one function, print. Heavy imports wait until a command needs
them.
"""

import json as jsonlib
from pathlib import Path
from typing import Any

import click

from teachercache.cli_output import (
    print_info,
    print_manifest,
    print_report,
    print_results,
    print_teachers,
    refuse_damage,
)
from teachercache.core.command import path, place, run_command
from teachercache.core.command import text as text_type
from teachercache.core.paths import as_path
from teachercache.core.progress import say, show
from teachercache.core.ranges import MOST

DEMO_DATA = "data/demo"
NUMBER, SEED = click.IntRange(1, MOST), click.IntRange(0, 2**63 - 1)
teacher_option = click.option(
    "--teacher",
    metavar="MODULE:ENTRY",
    type=text_type,
    help="The teacher of the cache, if it was built with a teacher that is not installed: package.module:ENTRY.",
)


def default_cache(data: str, teacher: str, views: int = 0) -> Path:
    """Return caches/<data>/<teacher>.zarr, for augmented views <teacher>-views.zarr."""
    from teachercache.data.read import cache_folder

    name = Path(teacher).name if Path(teacher).is_dir() else teacher.replace("/", "-").replace(":", "-")
    return cache_folder(data) / f"{name}{'-views' * bool(views)}.zarr"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def tc() -> None:
    """Run a frozen vision-language teacher once and store its outputs.

    \u0008
    tc build --teacher clip-lite          embeddings of data/demo into caches/demo/clip-lite.zarr
    tc index caches/demo/clip-lite.zarr   then search in them:
    tc search caches/demo/clip-lite.zarr "a red bird"

    --debug anywhere in a command shows the traceback of an error.
    """


@tc.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def teachers(as_json: bool) -> None:
    """List the teachers that `--teacher` takes."""
    from teachercache.teachers.registry import TEACHERS, installed_teachers

    installed = {
        name: f"{point.value} of the installed package {point.dist.name if point.dist else '?'}"
        for name, point in installed_teachers().items()
    }
    if as_json:
        ours = {name: {"doc": entry.doc, "outputs": entry.outputs} for name, entry in TEACHERS.items()}
        print(jsonlib.dumps({**{name: {"doc": doc} for name, doc in installed.items()}, **ours}))
        return
    print_teachers(TEACHERS, installed)


@tc.command()
@click.argument("data", type=place)
@click.option("--out", type=place, help="Write a manifest .parquet, which --data takes.")
@click.option("--limit", type=NUMBER, help="Only the first N rows.")
@click.option(
    "--noise",
    metavar="KIND=SHARE",
    help="Give a share of the training rows wrong texts: shuffle, partial or near.",
)
@click.option("--noise-seed", default=0, show_default=True, type=SEED)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
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
        print(jsonlib.dumps(facts))
        return
    print_manifest(facts)


@tc.command()
@click.option("--teacher", "name", required=True, type=text_type, help="A name of `tc teachers`.")
@click.option(
    "--data",
    type=place,
    default=DEMO_DATA,
    show_default=True,
    help="A folder of images, .tar shards, Parquet, captions, questions, texts, ...: see `tc manifest "
    "--help`. Several are separated by commas; each may be a quoted glob or a URL: "
    "s3://bucket/shards/*.tar",
)
@click.option(
    "--out",
    type=place,
    help="The cache, a folder or a URL; default caches/<data>/<teacher>.zarr, "
    "<teacher>-views.zarr with --views.",
)
@click.option(
    "--outputs",
    help="What to store, comma-separated: embeddings, patches, hidden, hidden:3+7, tokens, random_tokens; regions of a "
    "regions teacher; text_states, latents, unet_features, scores of a diffusion teacher (tc teachers). Default: a "
    "teacher's first, embeddings or regions; text_states,latents.",
)
@click.option(
    "--weights",
    type=place,
    default="pretrained",
    show_default=True,
    help="pretrained, a checkpoint file or open_clip folder, or random:SEED (untrained).",
)
@click.option(
    "--views",
    default=0,
    show_default=True,
    type=click.IntRange(0, 1000),
    help="Augmented views of every image, stored with their parameters; 0 for the unaugmented image. "
    "A larger number later adds views.",
)
@click.option(
    "--augment",
    multiple=True,
    metavar="KEY=VALUE",
    help="How views are drawn, for example flip=0, scale_min=0.9 (see README).",
)
@click.option("--batch-size", default=32, show_default=True, type=NUMBER)
@click.option(
    "--workers", type=click.IntRange(0, 256), help="Decoding processes; default: spare cores, at most 8."
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--device", default="auto", show_default=True)
@click.option("--limit", type=NUMBER, help="Only the first N rows.")
@click.option(
    "--prune",
    is_flag=True,
    help="Follow data that lost or changed rows; unchanged rows are not computed again.",
)
@click.option("--retry", is_flag=True, help="Compute the rows of quarantine.jsonl again.")
@click.option(
    "--repair", is_flag=True, help="Read every file of the cache first, and write damaged blocks again."
)
@click.option(
    "--no-wait",
    is_flag=True,
    help="Leave blocks that another builder writes to it, and return exit code 3; otherwise wait for them, and take "
    "them over if that builder dies.",
)
def build(
    name: str,
    data: str,
    out: str | None,
    outputs: str | None,
    weights: str,
    limit: int | None,
    **options: Any,
) -> int:
    """Run a teacher over data and write a cache. A build that is killed resumes with the same command.

    Data that gained rows or texts, or a larger --views, extends an existing cache.

    \u0008
    tc build --teacher clip-lite
    tc build --teacher clip-lite --views 4
    tc build --teacher clip-vit-b16 --data photos/ --out caches/photos.zarr
    tc build --teacher clip-vit-b16 --weights random:0 --limit 100
    torchrun --nproc-per-node 8 -m teachercache build --teacher clip-vit-l14 --data shards/
    """
    from teachercache.build.options import choose_options
    from teachercache.data.read import read_manifest
    from teachercache.teachers.registry import find

    wanted = None if outputs is None else tuple(part.strip() for part in outputs.split(",") if part.strip())
    find(name)
    how = choose_options(limit=limit or 0, wait=not options.pop("no_wait"), **options)
    manifest = read_manifest(data, limit=limit)
    if weights.startswith("random:"):
        say(f"WARNING: --weights {weights}: the architecture of {name} with random weights, untrained")

    from teachercache.build.loop import announce
    from teachercache.build.loop import build as run
    from teachercache.teachers.registry import load

    teacher = load(name, weights=weights, outputs=wanted)
    dtype = f"{how.precision.dtype} ({how.precision.reason})"
    say(f"{name} on {how.device} in {dtype}; {len(manifest):,} rows of {manifest.data}")
    folder = as_path(out) if out else default_cache(data, name, how.views)
    return announce(run(teacher, manifest, folder, how))


@tc.command()
@click.argument("cache", type=place)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def info(cache: str, as_json: bool) -> None:
    """Show what a cache holds: teacher, fields, rows, finished blocks."""
    from teachercache.cache import store
    from teachercache.cache.spec import to_dict

    opened = store.open_cache(cache)
    meta, done = opened.meta, store.done_blocks(opened)
    records = [
        record for block in store.listed_blocks(opened) if (record := store.done_record(opened, block))
    ]
    invalid = [entry for record in records for entry in record["invalid"]]
    size = sum(path.stat().st_size for path in opened.path.rglob("*") if path.is_file())
    if as_json:
        facts = {
            "blocks_done": len(done),
            "blocks": meta.num_blocks,
            "quarantined": len(invalid),
            "bytes": size,
        }
        print(jsonlib.dumps({**to_dict(meta), **facts}))
        return
    print_info(opened, blocks_done=len(done), unusable=len(invalid), size=size)


@tc.command()
@click.argument("cache", type=place)
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(0, MOST),
    help="Rows to compute again with the teacher; 0 checks the files only.",
)
@teacher_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(cache: str, samples: int, teacher: str | None, as_json: bool) -> None:
    """Check the checksum of every file, and recompute some rows with the teacher (cosine at least 0.999).

    Damaged blocks, files and indexes are listed with the command that makes them again. Nothing is written.
    """
    from teachercache.build.verify import verify_cache

    report = verify_cache(cache, samples=samples, teacher=teacher)
    if as_json:
        print(jsonlib.dumps(report))
    else:
        print_report(report)
    refuse_damage(report)
    say(f"{cache} is complete and undamaged")


@tc.command()
@click.argument("cache", type=place)
@click.option(
    "--field", type=text_type, help="The vector field; default: the one per image, else the one per text."
)
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    help="flat (exact), ivf, hnsw, or auto: flat up to 50,000 vectors, ivf above.",
)
def index(cache: str, field: str | None, kind: str) -> None:
    """Build a FAISS index over a field, beside the cache; add the new rows of a cache that grew.

    Prints the measured recall@10 against exact search; nprobe or efSearch is raised until it is 0.95.
    """
    from teachercache.cache.store import open_complete
    from teachercache.search.index import changing, describe, update_index

    opened = open_complete(cache)
    with changing(opened):
        path, record, done = update_index(opened, field=field, kind=kind)
    say(f"{path} {done}: {describe(record)}")


@tc.command()
@click.argument("cache", type=place)
@click.argument("text", type=text_type, required=False)
@click.option("--image", "images", type=path, multiple=True, help="Search by an image; may be repeated.")
@click.option(
    "--key", "keys", type=text_type, multiple=True, help="Search by a row of the cache; may be repeated."
)
@click.option(
    "--field", type=text_type, help="The vector field; default: the one per image, else the one per text."
)
@click.option("--top", default=10, show_default=True, type=NUMBER)
@teacher_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def search(
    cache: str,
    text: str | None,
    images: tuple[Path, ...],
    keys: tuple[str, ...],
    field: str | None,
    top: int,
    teacher: str | None,
    as_json: bool,
) -> None:
    """Find the images nearest to a text, an image, a row, or all of them together.

    \u0008
    tc search caches/demo/clip-lite.zarr "a bird"
    tc search caches/demo/clip-lite.zarr --image cat.jpg --top 5
    tc search caches/demo/clip-lite.zarr --key train/cat/0012 "in the snow"   # this image, but snowy
    """
    from teachercache.search.query import search_cache

    results = search_cache(cache, text=text, images=images, keys=keys, field=field, top=top, teacher=teacher)
    if as_json:
        query = " + ".join([*filter(None, [text]), *map(str, images), *keys])
        print(jsonlib.dumps({"query": query, "results": results}))
        return
    print_results(results)


@tc.command()
@click.argument("cache", type=place)
@click.option(
    "--against",
    metavar="CACHE",
    type=place,
    help="A second cache of the same rows, of a student or another teacher.",
)
@click.option("--out", type=path, help="A folder; default <cache>.report beside the cache.")
@click.option(
    "--map", "kind", default="pca", show_default=True, help="pca, or umap (pip install 'teachercache[analyze]')."
)
@click.option(
    "--points",
    default=20_000,
    show_default=True,
    type=click.IntRange(10, MOST),
    help="Rows on the map, a random sample of larger caches; numbers are of all rows.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout: the content of report.json."
)
def analyze(cache: str, against: str | None, out: Path | None, kind: str, points: int, as_json: bool) -> None:
    """Analyze a cache: a page with map, likely wrong captions, duplicates, outliers, groups; and all numbers.

    \u0008
    tc analyze caches/demo/clip-lite.zarr
    tc build --teacher runs/mine --out caches/demo/mine.zarr       # a student over the same rows
    tc analyze caches/demo/clip-lite.zarr --against caches/demo/mine.zarr --out report
    """
    from teachercache.analysis.report.write import analyze as run
    from teachercache.analysis.report.write import default_out

    out = out or default_out(as_path(cache), against)
    report, written = run(
        as_path(cache), against=as_path(against) if against else None, out=out, kind=kind, points=points
    )
    if as_json:
        from teachercache.analysis.report.as_json import as_json as json_of

        print(json_of(report))
        return
    for line in written:
        show(line)


def main(args: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one `error:` line."""
    return run_command(tc, args)
