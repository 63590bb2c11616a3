"""Run a benchmark and write docs/benchmarks/<theme>[-<parts>]_<hardware>_<date>.md.

    python -m scripts.benchmarks.run cache    read against np.memmap; build against the bare forward pass, another tool; memory
    python -m scripts.benchmarks.run train    distillation step against plain step; DeepSpeed engine against a loop of torch
    python -m scripts.benchmarks.run losses   losses of clip_kd in tiles against whole matrices: time and memory
    python -m scripts.benchmarks.run sds      step of sds_clip against its bare UNet and student; memory of a large UNet
    python -m scripts.benchmarks.run startup  time until a command prints its help
    python -m scripts.benchmarks.run serve    answers of `tc serve` at a million vectors, over HTTP
    python -m scripts.benchmarks.run demo     the stages of scripts/demo in new clones, and a second run
    python -m scripts.benchmarks.run faults   kills, torn writes, full disks and I/O errors at every write of every command

Alternatives are measured in alternation within one run and reported as the median ratio with the range over several
rounds. A missed bar is reported and does not change the exit status; a fault from which a command does not recover does.
"""

import argparse
import sys

from scripts.benchmarks.faults.run import add_options, bench_faults, is_whole
from scripts.benchmarks.report import write
from teachercache.core.errors import UserError
from teachercache.core.process import keep_memory
from teachercache.core.progress import say

PARTS = ("reading", "building", "peer", "memory")


def main() -> int:
    """Run the chosen benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    themes = ["cache", "train", "losses", "sds", "startup", "serve", "demo", "faults"]
    parser.add_argument("theme", choices=themes)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the synthetic cache to read")
    parser.add_argument("--memory-rows", type=int, nargs=3, default=[10_000, 300_000, 1_000_000])
    parser.add_argument(
        "--memory-times", type=int, default=3, help="number of processes per job; the median is reported"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=512, help="number of pictures of a build")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts of `cache`")
    parser.add_argument(
        "--loss-rows", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="pairs of `losses`"
    )
    parser.add_argument("--serve-rows", type=int, default=1_000_000, help="vectors of `serve`")
    parser.add_argument(
        "--vectors", nargs="+", choices=["clustered", "gaussian"], default=["clustered", "gaussian"]
    )
    parser.add_argument("--serve-folder", help="keep the caches of `serve` in a folder, and use those in it")
    parser.add_argument("--served-cache", help="a cache that `serve` asks by texts, such as the demo's")
    parser.add_argument("--demo-runs", type=int, default=3, help="clones of `demo`")
    add_options(parser)
    options = parser.parse_args()
    keep_memory()
    failed = 0
    try:
        if options.theme == "cache":
            from scripts.benchmarks.cache import bench_cache as bench
        elif options.theme == "losses":
            from scripts.benchmarks.losses import bench_losses as bench
        elif options.theme == "sds":
            from scripts.benchmarks.sds import bench_sds as bench
        elif options.theme == "startup":
            from scripts.benchmarks.startup import bench_startup as bench
        elif options.theme == "serve":
            from scripts.benchmarks.serve import bench_serve as bench
        elif options.theme == "demo":
            from scripts.benchmarks.demo import bench_demo as bench
        elif options.theme == "train":
            from scripts.benchmarks.train import bench_train as bench
        if options.theme == "faults":
            text, failed = bench_faults(options)
        else:
            text = bench(options)
    except UserError as error:
        say(f"error: {error}")
        return 2
    is_partial = options.theme == "cache" and set(options.only) != set(PARTS)  # written to a separate file
    if options.theme != "faults" or is_whole(options):
        parts = options.only if is_partial else ["minutes"] if options.minutes else ()
        write("-".join([options.theme, *parts]), text)
    else:
        print("\n".join(text))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
