"""Build the sdist and the wheel of the last commit, use the wheel in a new environment, and print how to publish.

python -m scripts.release               dist/ gets both archives
python -m scripts.release --extras all  install these extras too; default: cpu

Needs the package `build` (extra `dev`), and a package index for the new environment: about three minutes.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("teachercache", "evaluation", "student")
RECORD = (
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
    "setup.cfg",
)
MAX_FILE, MAX_ARCHIVE = 6_000_000, 20_000_000  # bytes; the largest file is the UNet of sd-tiny


def contents(archive: Path) -> dict[str, int]:
    """Return the files in a wheel or an sdist and their sizes, without the sdist's outer folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {info.filename: info.file_size for info in wheel.infolist() if not info.is_dir()}
    with tarfile.open(archive) as sdist:
        return {info.name.partition("/")[2]: info.size for info in sdist if info.isfile()}


def faults(archive: Path, tracked: Iterable[str]) -> list[str]:
    """Return what is wrong with an archive.

    Args:
        archive: A wheel or an sdist.
        tracked: The files of the repository.
    """
    names = list(tracked)
    inside = contents(archive)
    needed = [name for name in names if name.startswith(tuple(f"{package}/" for package in PACKAGES))]
    if archive.suffix != ".whl":
        needed += RECORD
    found = [f"lacks {name}" for name in needed if name not in inside]
    found += [f"{name} has {size:,} bytes" for name, size in inside.items() if size > MAX_FILE]
    if archive.stat().st_size > MAX_ARCHIVE:
        found.append(f"has {archive.stat().st_size:,} bytes")
    foreign = ("tests/", "scripts/", "docs/", "data/", ".github/")
    found += [f"has {name}, which is no part of a package" for name in inside if name.startswith(foreign)]
    return [f"{archive.name} {fault}" for fault in found]


def run(*words: object, cwd: Path | None = None) -> str:
    """Run a command that must succeed, and return what it printed to stdout.

    It does not see PYTHONPATH, by which a package of the repository would count as installed.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=variables, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise SystemExit(f"error: {' '.join(map(str, words))}: exit code {done.returncode}")
    return done.stdout


def export_commit(folder: Path) -> list[str]:
    """Write the files of the last commit into a folder, and return their names."""
    archive = folder.with_suffix(".tar")
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    folder.mkdir()
    run("tar", "--extract", "--file", archive, "--directory", folder)
    return run("git", "ls-tree", "-r", "--name-only", "HEAD", cwd=ROOT).splitlines()


def build(source: Path, out: Path, *options: str) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist; return their paths."""
    run(sys.executable, "-m", "build", "--outdir", out, *options, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def use(wheel: Path, extras: str, folder: Path) -> str:
    """Install a wheel into a new environment, check its dependencies, run both programs and `scripts/smoke.py`."""
    print("making a new environment ...", file=sys.stderr)
    run(sys.executable, "-m", "venv", folder / "venv")
    programs = folder / "venv" / "bin"
    pip = (programs / "python", "-m", "pip")
    run(*pip, "install", "--quiet", f"{wheel}[{extras}]", cwd=folder)
    run(*pip, "check", cwd=folder)
    for program in ("tc", "student"):
        run(programs / program, "--version", cwd=folder)
    (folder / "work").mkdir()
    return run(programs / "python", "-I", ROOT / "scripts" / "smoke.py", folder / "work", cwd=folder)


def main() -> int:
    """Build, check and use the archives, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--extras", default="cpu", help="extras to install, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the archives")
    options = parser.parse_args()
    if run("git", "status", "--porcelain", cwd=ROOT).strip():
        print("note: what is not committed is not part of the release", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    for old in [*options.out.glob("*.tar.gz"), *options.out.glob("*.whl")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracked = export_commit(folder / "source")
        sdist, wheel = build(folder / "source", options.out)
        wrong = [fault for archive in (sdist, wheel) for fault in faults(archive, tracked)]
        if wrong:
            raise SystemExit("error: " + "; ".join(wrong))
        print(use(wheel.resolve(), options.extras, folder).strip())
    for archive in (sdist, wheel):
        print(f"{archive}: {archive.stat().st_size:,} bytes, {len(contents(archive))} files")
    version = wheel.name.split("-")[1]
    print("to publish:")
    print(f"  git tag v{version} && git push origin v{version}")
    print("  python -m pip install twine")
    print(f"  python -m twine check {sdist} {wheel}")
    print(f"  python -m twine upload {sdist} {wheel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
