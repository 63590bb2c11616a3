"""Make the teacher clip-lite: cache the features of its towers, train its two projection heads, and assemble it.

    python -m scripts.teachers.clip_lite [--data data/demo] [--out models/clip-lite]

The heads are trained with our `clip` recipe. Each step is a command of the project; finished steps are reused.
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
    """Cache the towers, train the heads and write the folder of the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--out", type=Path, default=Path("models/clip-lite"))
    options = parser.parse_args()
    if options.out.is_dir():
        print(f"{options.out} exists", file=sys.stderr)
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
        flags = [word for setting in settings for word in ("--set", setting)]
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
            *flags,
        )
    assemble(load_file(run / "model.safetensors"), options.out)
    print(f"{options.out} is ready: tc build --teacher clip-lite", file=sys.stderr)


def command(module: str, *words: object) -> None:
    """Run a command of the project and exit with its status if it fails; it prints its own error."""
    process = subprocess.run([sys.executable, "-m", module, *map(str, words)])
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
