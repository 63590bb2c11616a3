"""Use an installed teachercache without its repository: build, search, train, evaluate and export on ten pictures.

python -I scripts/smoke.py FOLDER    works in an empty FOLDER, prints one JSON line, exit 1 at the first failure

Imports nothing of the repository: -I leaves its folder off the module path.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import sys
import zlib
from pathlib import Path

PICTURES = 10
TEACHER = "clip-vit-b32"
COMMANDS = {
    "build": f"tc build --teacher {TEACHER} --weights random:0 --data pictures --out cache.zarr",
    "index": "tc index cache.zarr",
    "search": "tc search cache.zarr square --json",
    "train": "student train --recipe clip_kd --data pictures --cache cache.zarr --out run"
    " --set model=vit-micro --steps 2 --batch-size 4 --set run.workers=0",
    "eval": "student eval run --task retrieval --data pictures --json",
    "export": "student export run --format open_clip --out export",
}
PACKAGED = {
    "teachercache": ("py.typed", "analysis/report/page.js", "teachers/diffusion/sd_tiny/model_index.json"),
    "evaluation": ("py.typed",),
    "student": ("py.typed", "models/seq2seq/bart_tiny/config.json"),
}


def make_pictures(folder: Path) -> None:
    """Write ten pictures of one color each, with captions."""
    from PIL import Image

    folder.mkdir()
    for number in range(PICTURES):
        color = zlib.crc32(str(number).encode()) & 0xFFFFFF
        Image.new("RGB", (40, 32), f"#{color:06x}").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"square number {number}\n")


def packages() -> dict[str, str]:
    """Return the version of the installed distribution and the folder of each of its packages.

    Raises:
        FileNotFoundError: A packaged file is missing.
    """
    import evaluation
    import student
    import teachercache

    places = {"version": importlib.metadata.version("teachercache")}
    for package in (teachercache, evaluation, student):
        home = Path(str(package.__file__)).parent
        for name in PACKAGED[package.__name__]:
            if not (home / name).is_file():
                raise FileNotFoundError(home / name)
        places[package.__name__] = str(home)
    return places


def run_commands() -> dict[str, str]:
    """Run the commands in this process, and return what each printed to stdout.

    Raises:
        RuntimeError: A command did not exit with 0.
    """
    from student.cli import main as student_main
    from teachercache.cli import main as tc_main

    mains = {"tc": tc_main, "student": student_main}
    printed = {}
    for name, line in COMMANDS.items():
        program, *words = line.split()
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            code = mains[program](words)
        if code:
            raise RuntimeError(f"{line}: exit code {code}")
        printed[name] = stdout.getvalue()
    return printed


def main() -> int:
    """Run everything in the folder of the command line, and return the exit status."""
    os.chdir(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    places = packages()
    make_pictures(Path("pictures"))
    printed = run_commands()
    (result,) = json.loads(printed["eval"])["results"]
    written = sorted(path.name for path in Path("export").iterdir())
    print(
        json.dumps(
            {
                **places,
                "search": json.loads(printed["search"]),
                "metrics": result["metrics"],
                "export": written,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
