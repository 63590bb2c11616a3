"""Make the teacher clip-lite: cache its towers' features, train its two heads on them by our own `clip` recipe, join.

    python -m scripts.teachers.clip_lite [--data data/demo] [--out models/clip-lite]

Every step is one of the project's own commands; what is done already is reused.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from teachercache.teachers.clip.lite import assemble

STEPS, BATCH, RATE, DECAY = 320, 512, 1e-3, 0.5  # LOG.md, "clip-lite"


def main() -> None:
    """Towers' cache, heads, folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--out", type=Path, default=Path("models/clip-lite"))
    options = parser.parse_args()
    if options.out.is_dir():
        print(f"{options.out} is there already", file=sys.stderr)
        return
    work = options.out.with_name(options.out.name + "-parts")
    cache, run = work / "towers.zarr", work / "heads"
    command("teachercache", "build", "--teacher", "clip-lite-towers", "--data", options.data, "--out", cache)
    if not (run / "model.safetensors").exists():
        shutil.rmtree(run, ignore_errors=True)
        settings = [
            "model=clip-lite-heads",
            f"optim.lr={RATE}",
            f"optim.weight_decay={DECAY}",
            "run.workers=0",
        ]
        chosen = [word for setting in settings for word in ("--set", setting)]
        command(
            "student",
            "train",
            "--recipe",
            "clip",
            "--data",
            options.data,
            "--cache",
            cache,
            "--out",
            run,
            "--steps",
            STEPS,
            "--batch-size",
            BATCH,
            *chosen,
        )
    assemble(load_file(run / "model.safetensors"), options.out)
    print(f"{options.out} is ready: tc build --teacher clip-lite", file=sys.stderr)


def command(module: str, *words: object) -> None:
    """Run one of our commands; its own error line is enough where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
