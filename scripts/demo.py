"""Run the demo in stages that each end in something to look at; finished steps are reused.

    bash scripts/demo                   # search, look, distil
    bash scripts/demo search            # one stage, or several
    bash scripts/demo --all             # and a short run of every other recipe
    bash scripts/demo --from-scratch    # train the heads of the teacher instead of using the packaged ones

Each step is a command that a person can type. It is printed, and runs in this process: an import takes as long as a step.
runs/demo/times.json has the seconds of each stage of every call.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

CACHE, STUDENT_CACHE = Path("caches/demo/clip-lite.zarr"), Path("caches/demo/clip_kd.zarr")
REPORT, COMPARISON = Path("caches/demo/clip-lite.report"), Path("caches/demo/clip-lite-clip_kd.report")
TIMES = Path("runs/demo/times.json")
QUERY = "a bird on a branch"
FIRST = 1000  # rows that are cached before the first search; the next stage adds the rest


@dataclass(frozen=True)
class Stage:
    """A stage of the demo: what it does, and what a person opens afterwards."""

    doc: str
    run: Callable[[], None]
    open: str


def command(program: str, *words: object) -> None:
    """Print a command of the project and run it in this process; exit with its status if it fails."""
    from student.cli import main as student
    from teachercache.cli import main as tc

    argv = [str(word) for word in words]
    print("$", program, shlex.join(argv), file=sys.stderr, flush=True)
    if status := {"tc": tc, "student": student}[program](argv):
        sys.exit(status)


def script(module: str, *words: object) -> subprocess.Popen[bytes]:
    """Print and start a script of the checkout in a process of its own."""
    argv = ["python", "-m", f"scripts.{module}", *map(str, words)]
    print("$", shlex.join(argv), file=sys.stderr, flush=True)
    return subprocess.Popen([sys.executable, *argv[1:]])


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a script; exit with its status if it fails."""
    if status := process.wait():
        sys.exit(status if status > 0 else 128 - status)


def search(from_scratch: bool) -> None:
    """Prepare the pictures, cache the teacher's embeddings of the first of them, and search."""
    preparing = None if Path("data/demo").is_dir() else script("datasets.demo.prepare")
    import teachercache.build.loop
    import teachercache.teachers.clip.lite  # noqa: F401  # imports take seconds: meanwhile the pictures arrive

    if preparing is not None:
        finish(preparing)
    if from_scratch:
        finish(script("teachers.clip_lite"))
    build(*() if CACHE.exists() else ("--limit", FIRST))
    command("tc", "search", CACHE, QUERY, "--top", 5)


def build(*options: object) -> None:
    """Cache the teacher's embeddings of the pictures."""
    command("tc", "build", "--teacher", "clip-lite", "--data", "data/demo", *options)


def look() -> None:
    """Cache the rest of the pictures, and analyze the cache."""
    build()
    analyze(CACHE, out=REPORT)


def analyze(cache: Path, *options: object, out: Path) -> None:
    """Write a report if it is missing, or older than the caches."""
    caches = [path for path in (CACHE, STUDENT_CACHE) if path in (cache, *options)]
    done = out / "report.html"
    if not done.exists() or done.stat().st_mtime < max(
        (path / "zarr.json").stat().st_mtime for path in caches
    ):
        command("tc", "analyze", cache, *options)


def distil() -> None:
    """Train and measure both students, and compare the distilled one with its teacher."""
    from scripts import demo_table

    build()
    print("$ python -m scripts.demo_table --seeds 0", file=sys.stderr, flush=True)
    demo_table.show_table([0])
    command(
        "tc",
        "build",
        "--teacher",
        demo_table.folder("clip_kd", 0),
        "--data",
        "data/demo",
        "--out",
        STUDENT_CACHE,
    )
    analyze(CACHE, "--against", STUDENT_CACHE, out=COMPARISON)


def others() -> None:
    """Run every other recipe once, beside its baseline."""
    from scripts import demo_others

    demo_others.main()


def stages(from_scratch: bool) -> dict[str, Stage]:
    """Return the stages by name, in their order."""
    return {
        "search": Stage(
            "search real pictures with a teacher", lambda: search(from_scratch), f"tc serve {CACHE}"
        ),
        "look": Stage("cache all pictures and analyze the cache", look, str(REPORT / "report.html")),
        "distil": Stage("distill a student and compare it", distil, str(COMPARISON / "report.html")),
        "others": Stage("a short run of the other recipes", others, "runs/demo/others.md"),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="search, look, distil, others")
    parser.add_argument("--all", action="store_true", help="all four stages")
    parser.add_argument("--from-scratch", action="store_true", help="train the heads of the teacher")
    options = parser.parse_args()
    known = stages(options.from_scratch)
    names = list(known) if options.all else options.stages or [name for name in known if name != "others"]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no stage {unknown[0]}: choose from {', '.join(known)}")
    try:
        run_stages({name: known[name] for name in known if name in names})
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def run_stages(chosen: dict[str, Stage]) -> None:
    """Run stages, print and keep the seconds of each, and print what to open."""
    seconds: dict[str, float] = {}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    for name, stage in chosen.items():
        print(f"\n== {name}: {stage.doc}", file=sys.stderr, flush=True)
        begin = time.monotonic()
        stage.run()
        seconds[name] = round(time.monotonic() - begin, 1)
        print(f"== {name}: {seconds[name]:.0f} s; open {stage.open}", file=sys.stderr, flush=True)
        keep_times(started, seconds)
    print(f"\n{summary(chosen, seconds)}")


def keep_times(started: str, seconds: dict[str, float]) -> None:
    """Write the seconds of this call behind those of earlier calls."""
    from teachercache.core.paths import write_whole

    calls = json.loads(TIMES.read_text()) if TIMES.exists() else []
    entry = {"started": started, "cores": len(os.sched_getaffinity(0)), "seconds": seconds}
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    kept = [call for call in calls if call["started"] != started]
    write_whole(TIMES, json.dumps([*kept, entry], indent=1) + "\n")


def summary(chosen: dict[str, Stage], seconds: dict[str, float]) -> str:
    """Return a table of the stages: seconds, and what to open."""
    rows = [("stage", "seconds", "to open")]
    rows += [(name, f"{seconds[name]:.0f}", stage.open) for name, stage in chosen.items()]
    rows += [("all", f"{sum(seconds.values()):.0f}", f"times: {TIMES}")]
    return "\n".join(f"{name:8} {took:>7}  {what}" for name, took, what in rows)


if __name__ == "__main__":
    sys.exit(main())
