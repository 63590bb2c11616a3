"""Embed a folder of pictures, and search it.

    python examples/embed_and_search.py photos/ "a dog on a beach"

The cache is a folder. A second call embeds only new pictures, and several queries are quick.
"""

import argparse

from teachercache.api import build, search


def main() -> None:
    """Embed the pictures, then print the nearest rows of each query."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pictures", help="a folder, webdataset shards, Parquet, ...: what `tc build --data` takes"
    )
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="texts to search by")
    parser.add_argument("--teacher", default="clip-vit-b32", help="a name of `tc teachers`")
    parser.add_argument("--cache", help="default: caches/<pictures>/<teacher>.zarr")
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()

    built = build(options.teacher, options.pictures, options.cache)
    print(f"{built.cache}: {built.rows} rows, {built.rows_written} of them embedded now")
    if built.quarantined:
        print(f"{built.quarantined} could not be used: see {built.cache}/quarantine.jsonl")

    for query in options.queries:
        print(f"\n{query}")
        for hit in search(built.cache, query, top=options.top):
            print(f"  {hit['score']:.3f}  {hit['key']}  {' / '.join(hit['texts'])}")


if __name__ == "__main__":
    main()
