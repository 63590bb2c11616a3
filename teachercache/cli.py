"""The command `tc`: reads options, calls one function, prints. It computes nothing; imports wait until needed."""

import json as jsonlib
from pathlib import Path

import click

from teachercache.cli_output import print_info, print_manifest
from teachercache.core.command import run_command
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path
from teachercache.core.progress import say

DEMO_DATA = "data/demo"
teacher_option = click.option(
    "--teacher",
    metavar="MODULE:ENTRY",
    help="The teacher of the cache, if it was built with a teacher that is not installed: package.module:ENTRY.",
)


def default_cache(data: str, teacher: str, views: int = 0) -> Path:
    """caches/<data>/<teacher>.zarr, of augmented views <teacher>-views.zarr"""
    from teachercache.data.read import cache_folder

    name = Path(teacher).name if Path(teacher).is_dir() else teacher.replace("/", "-").replace(":", "-")
    return cache_folder(data) / f"{name}{'-views' * bool(views)}.zarr"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def tc() -> None:
    """Run a frozen vision-language teacher once and keep what it said.

    \u0008
    tc build --teacher clip-lite          embeddings of data/demo into caches/demo/clip-lite.zarr
    tc index caches/demo/clip-lite.zarr   then search in them:
    tc search caches/demo/clip-lite.zarr "a red bird"
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
    for name, entry in TEACHERS.items():
        print(f"{name:18} {entry.doc}  [{', '.join(entry.outputs)}]")
    for name, doc in installed.items():
        print(f"{name:18} {doc}")
    print(
        "and open_clip:MODEL/TAG, hf:ORG/NAME, diffusers:ORG/NAME, a folder of open_clip or diffusers, a run of "
        "`student train`, package.module:entry"
    )


@tc.command()
@click.argument("data")
@click.option("--out", help="Write a manifest .parquet, which --data takes.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N rows.")
@click.option(
    "--noise",
    metavar="KIND=SHARE",
    help="Give a share of the training rows wrong texts: shuffle, partial or near.",
)
@click.option("--noise-seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def manifest(
    data: str, out: str | None, limit: int | None, noise: str | None, noise_seed: int, as_json: bool
) -> None:
    """Show what data is understood as, before a teacher runs over it; write it down with --out.

    \u0008
    DATA is one of these, or several with commas between them, each may be a quoted glob or a URL:
      folder/          pictures, captions in a .txt or .json of the same name; folders are classes and splits
      shards/ x.tar    webdataset and img2dataset shards, read where they lie
      x.parquet x/     pictures as bytes or paths; a folder that Hugging Face's save_to_disk wrote
      x.arrow          one file of such a folder
      x.json           COCO captions, Karpathy's dataset_coco.json, lists of {image, caption}, VQA v2 questions
      x.jsonl          VCR, SNLI-VE
      x.csv x.tsv      a table with a header, or CC3M's captions and urls beside a folder of what was downloaded
      x.txt            texts alone, one a line: class names, answers
    """
    from teachercache.data.read import describe, find_sources, join_sources, save

    sources = find_sources(data)
    found = join_sources(data, sources, limit=limit)
    if noise is not None:
        from teachercache.data.noise import corrupt, parse

        kind, share = parse(noise)
        clean, found = found, corrupt(found, kind, share, seed=noise_seed)
        rows = clean.rows_of_split("train")
        count = int(clean.has_text()[rows].sum())
        say(
            f"{kind}: {round(share * count)} of {count} training rows have other texts; their task columns say which"
        )
    facts = describe(sources, found)
    if out is not None:
        save(found, as_path(out))
        say(f"wrote {out}: pass it as --data {out}")
    if as_json:
        print(jsonlib.dumps(facts))
        return
    print_manifest(facts)


@tc.command()
@click.option("--teacher", "name", required=True, help="A name of `tc teachers`.")
@click.option(
    "--data",
    default=DEMO_DATA,
    show_default=True,
    help="A folder of pictures, .tar shards, Parquet, captions, questions, texts, ...: see `tc manifest "
    "--help`. Several with commas between them, each may be a quoted glob or a URL: "
    "s3://bucket/shards/*.tar",
)
@click.option(
    "--out",
    help="The cache, a folder or a URL; default caches/<data>/<teacher>.zarr, "
    "<teacher>-views.zarr with --views.",
)
@click.option(
    "--outputs",
    help="What to keep, comma-separated: embeddings, patches, hidden, hidden:3+7, tokens, random_tokens; regions of a "
    "regions teacher; text_states, latents, unet_features, scores of a diffusion teacher (tc teachers). Default: a "
    "teacher's first, embeddings or regions; text_states,latents.",
)
@click.option(
    "--weights",
    default="pretrained",
    show_default=True,
    help="pretrained, a checkpoint file or open_clip folder, or random:SEED (knows nothing).",
)
@click.option(
    "--views",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Augmented views of every picture, stored with their parameters; 0 for the plain picture. "
    "A larger number later adds views.",
)
@click.option(
    "--augment",
    multiple=True,
    metavar="KEY=VALUE",
    help="How views are drawn, for example flip=0, scale_min=0.9 (see README).",
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--workers", type=click.IntRange(0), help="Decoding processes; default: spare cores, at most 8."
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--device", default="auto", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first N rows.")
@click.option(
    "--prune", is_flag=True, help="Follow data that lost or changed rows; the others are not computed again."
)
def build(
    name, data, out, outputs, weights, views, augment, batch_size, workers, precision, device, limit, prune
) -> None:
    """Run a teacher over data and write a cache. Killed at any time, the same command goes on.

    Data that gained rows or texts, or a larger --views, extend the cache that is there.

    \u0008
    tc build --teacher clip-lite
    tc build --teacher clip-lite --views 4
    tc build --teacher clip-vit-b16 --data photos/ --out caches/photos.zarr
    tc build --teacher clip-vit-b16 --weights random:0 --limit 100
    torchrun --nproc-per-node 8 -m teachercache build --teacher clip-vit-l14 --data shards/
    """
    from teachercache.core import device as devices
    from teachercache.core.process import default_workers
    from teachercache.data.read import read_manifest
    from teachercache.data.views import parse_augment
    from teachercache.teachers.registry import find

    wanted = None if outputs is None else tuple(part.strip() for part in outputs.split(",") if part.strip())
    find(name)
    drawn = parse_augment(augment)
    if augment and not views:
        raise UserError("--augment is for stored views: add --views 4, or leave --augment away")
    device = devices.pick_device(device)
    dtype = devices.pick_precision(precision, device)
    manifest = read_manifest(data, limit=limit)
    from teachercache.teachers.weights import random_seed

    if random_seed(weights) is not None:
        say(
            f"WARNING: --weights {weights}: the true architecture of {name} with random weights; it knows nothing"
        )

    from teachercache.build.loop import BuildOptions, announce
    from teachercache.build.loop import build as run
    from teachercache.teachers.registry import load

    teacher = load(name, weights=weights, outputs=wanted)
    say(f"{name} on {device} in {dtype.dtype} ({dtype.reason}); {len(manifest):,} rows of {manifest.data}")
    workers = default_workers() if workers is None else workers
    out = as_path(out) if out else default_cache(data, name, views)
    announce(
        run(
            teacher,
            manifest,
            out,
            BuildOptions(
                batch_size=batch_size,
                workers=workers,
                device=device,
                precision=dtype,
                views=views,
                augment=drawn,
                prune=prune,
                limit=limit or 0,
            ),
        )
    )


@tc.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def info(cache: str, as_json: bool) -> None:
    """Say what a cache holds: teacher, fields, rows, how much of it is done."""
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
@click.argument("cache")
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    help="Rows to compute again with the live teacher; 0 checks the files alone.",
)
@teacher_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(cache: str, samples: int, teacher: str | None, as_json: bool) -> None:
    """Check every file's checksum, and some rows against the live teacher (cosine at least 0.999).

    A damaged block is named and forgotten, so that the next `tc build` writes it again; so is what follows from others.
    """
    from teachercache.build.verify import verify_cache

    report = verify_cache(cache, samples=samples, teacher=teacher)
    if as_json:
        print(jsonlib.dumps(report))
    else:
        for block, reason in report["damaged"].items():
            print(f"block {block}: {reason}")
        for name, reason in report["files"].items():
            print(f"{name}: {reason}")
        for name, values in report["cosine"].items():
            print(f"{name}: cosine to the live teacher min {values['min']:.6f}, mean {values['mean']:.6f}")
    if report["damaged"]:
        raise UserError(
            f"{len(report['damaged'])} damaged blocks, forgotten now: run `{report['command']}` to mend them"
        )
    if report["files"]:
        raise UserError(f"{' and '.join(report['files'])}: damaged, run `{report['command']}` to mend that")
    if not report["ok"]:
        raise UserError("the live teacher says something else: was the data or the teacher changed?")
    say(f"{cache} is whole")


@tc.command()
@click.argument("cache")
@click.option("--field", help="The vector field; default: the one per image, else the one per text.")
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    help="flat (exact), ivf, hnsw, or auto: flat up to 50,000 vectors, ivf above.",
)
def index(cache: str, field: str | None, kind: str) -> None:
    """Build a FAISS index over a field, beside the cache; of a cache that gained rows, add those rows to it.

    Prints the measured recall@10 against exact search; nprobe or efSearch is raised until it is 0.95.
    """
    from teachercache.cache.store import open_complete
    from teachercache.search.index import describe, update_index

    path, facts, done = update_index(open_complete(cache), field=field, kind=kind)
    say(f"{path} {done}: {describe(facts)}")


@tc.command()
@click.argument("cache")
@click.argument("text", required=False)
@click.option(
    "--image", "images", type=Path, multiple=True, help="Search by a picture; may be given several times."
)
@click.option(
    "--key", "keys", multiple=True, help="Search by a row of the cache; may be given several times."
)
@click.option("--field", help="The vector field; default: the one per image, else the one per text.")
@click.option("--top", default=10, show_default=True, type=click.IntRange(1))
@teacher_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def search(cache, text, images, keys, field, top, teacher, as_json) -> None:
    """Find the pictures nearest to a text, a picture, a row, or all of them together.

    \u0008
    tc search caches/demo/clip-lite.zarr "a bird"
    tc search caches/demo/clip-lite.zarr --image cat.jpg --top 5
    tc search caches/demo/clip-lite.zarr --key train/cat/0012 "in the snow"   # this picture, but snowy
    """
    from teachercache.search.query import search_cache

    found = search_cache(cache, text=text, images=images, keys=keys, field=field, top=top, teacher=teacher)
    if as_json:
        query = " + ".join([*filter(None, [text]), *map(str, images), *keys])
        print(jsonlib.dumps({"query": query, "results": found}))
        return
    for result in found:
        print(f"{result['score']:.3f}  {result['image'] or result['key']}  {'; '.join(result['texts'])}")


@tc.command()
@click.argument("cache")
@click.option(
    "--against", metavar="CACHE", help="A second cache of the same rows: a student's, another teacher's."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="A folder; default <cache>.report beside the cache."
)
@click.option(
    "--map", "kind", default="pca", show_default=True, help="pca, or umap (pip install 'teachercache[umap]')."
)
@click.option(
    "--points",
    default=20_000,
    show_default=True,
    type=click.IntRange(10),
    help="Rows on the map, drawn by chance where there are more; numbers are of all rows.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout: what report.json holds.")
def analyze(cache, against, out, kind, points, as_json) -> None:
    """Look into a cache: a page with map, likely wrong captions, duplicates, outliers, groups; and all numbers.

    \u0008
    tc analyze caches/demo/clip-lite.zarr
    tc build --teacher runs/mine --out caches/demo/mine.zarr       # a student says what it sees in the same rows
    tc analyze caches/demo/clip-lite.zarr --against caches/demo/mine.zarr --out report
    """
    from teachercache.analysis.report.write import analyze as run
    from teachercache.analysis.report.write import default_out

    out = out or default_out(as_path(cache), against)
    found, written = run(
        as_path(cache), against=against and as_path(against), out=out, kind=kind, points=points
    )
    if as_json:
        from teachercache.analysis.report.as_json import as_json as json_of

        print(json_of(found))
        return
    for line in written:
        print(line)


def main(args: list[str] | None = None) -> int:
    """Entry point: exit code 0, or 2 with one `error:` line."""
    return run_command(tc, args)
