"""Benchmarks as ratios within one run; each writes docs/benchmarks/<theme>[-<parts>]_<hardware>_<date>.md.

    python -m scripts.benchmarks.run cache    reading against np.memmap; building against the bare forward; another tool; memory
    python -m scripts.benchmarks.run train    a distillation step against the same step without; the engine against bare torch
    python -m scripts.benchmarks.run losses   clip_kd's losses in tiles against whole matrices: time, memory
    python -m scripts.benchmarks.run sds      a step of sds_clip against the bare UNet and student; the memory of a large UNet

Measured in alternation and reported as the median with lowest and highest of several rounds. Not a test: nothing fails.
"""

import argparse
import sys

from scripts.benchmarks.report import write
from teachercache.core.errors import UserError
from teachercache.core.process import keep_memory
from teachercache.core.progress import say

PARTS = ("reading", "building", "peer", "memory")


def main() -> int:
    """Pick a theme."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("theme", choices=["cache", "train", "losses", "sds"])
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the synthetic cache that is read")
    parser.add_argument("--memory-rows", type=int, nargs=3, default=[10_000, 300_000, 1_000_000])
    parser.add_argument(
        "--memory-times", type=int, default=3, help="processes of each job; the median counts"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=512, help="pictures of one build")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts of `cache`")
    parser.add_argument(
        "--loss-rows", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="pairs of `losses`"
    )
    options = parser.parse_args()
    keep_memory()
    try:
        if options.theme == "cache":
            from scripts.benchmarks.cache import bench_cache as bench
        elif options.theme == "losses":
            from scripts.benchmarks.losses import bench_losses as bench
        elif options.theme == "sds":
            from scripts.benchmarks.sds import bench_sds as bench
        else:
            from scripts.benchmarks.train import bench_train as bench
        text = bench(options)
    except UserError as error:
        say(f"error: {error}")
        return 2
    some = options.theme == "cache" and set(options.only) != set(PARTS)  # parts have a file of their own
    write("-".join([options.theme, *(options.only if some else ())]), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
