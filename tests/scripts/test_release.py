"""The archives of a release: what is in them, and that the installed wheel works without the repository.

The environment that the wheel is installed into is new. Its dependencies are those of this one, by a .pth file: the
editable install beside them is not seen, because .pth files of such a folder are not read.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import teachercache
from scripts.release import MAX_FILE, build, contents, faults
from scripts.release import run as run_or_stop

ROOT = Path(__file__).parents[2]


def files_of_the_repository() -> list[str]:
    """Files that are committed or could be; a build in the repository itself would leave folders in it."""
    words = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("release") / "source"
    for name in files_of_the_repository():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    return build(source, source.parent / "dist", "--no-isolation")


@pytest.fixture(scope="module")
def environment(archives, tmp_path_factory) -> Path:
    """The folder of programs of a new environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    words = ["--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", archives[1]]
    done = run(sys.executable, "-m", "pip", *words, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n"
    )  # last: pip sees what it names
    return folder / "bin"


def test_the_archives_hold_every_file_of_the_packages_and_nothing_large(archives):
    names = files_of_the_repository()
    assert sum(name.startswith("teachercache/") for name in names) > 80
    for archive in archives:
        assert faults(archive, names) == []
        assert teachercache.__version__ in archive.name
    inside = contents(archives[1])
    assert {"teachercache/py.typed", "student/py.typed", "evaluation/py.typed"} <= inside.keys()
    assert (
        inside["teachercache/teachers/diffusion/sd_tiny/vae/diffusion_pytorch_model.safetensors"] > 1_000_000
    )
    (entry_points,) = [name for name in inside if name.endswith("entry_points.txt")]
    assert contents(archives[0])["LICENSE"] == (ROOT / "LICENSE").stat().st_size
    with zipfile.ZipFile(archives[1]) as wheel:
        assert "tc = teachercache.cli:main" in wheel.read(entry_points).decode()


def test_what_is_wrong_with_an_archive_is_found(tmp_path):
    path = tmp_path / "x.tar.gz"
    (tmp_path / "large").write_bytes(b"\0" * (MAX_FILE + 1))
    with tarfile.open(path, "w:gz") as sdist:
        sdist.add(tmp_path / "large", "x-1/student/large")
        sdist.add(tmp_path / "large", "x-1/tests/test_x.py")
    found = faults(path, ["student/cli.py", "docs/x.md"])
    assert "x.tar.gz lacks student/cli.py" in found
    assert "x.tar.gz lacks LICENSE" in found
    assert f"x.tar.gz student/large has {MAX_FILE + 1:,} bytes" in found
    assert "x.tar.gz has tests/test_x.py, which is no part of a package" in found
    assert not any("docs/x.md" in fault for fault in found)


def test_the_installed_wheel_builds_searches_trains_evaluates_and_exports(environment, tmp_path):
    """Ten pictures and a teacher with random weights, outside of the repository and without its path."""
    work = tmp_path / "work"
    work.mkdir()
    done = run(environment / "python", "-I", ROOT / "scripts" / "smoke.py", work, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] == teachercache.__version__
    for package in ("teachercache", "evaluation", "student"):
        assert Path(facts[package]).is_relative_to(environment.parent)
    assert len(facts["search"]["results"]) == 10
    assert facts["metrics"]["num_images"] == 10
    assert "open_clip_config.json" in facts["export"]
    assert (work / "run" / "curve.png").exists()


def test_both_programs_are_installed_and_no_requirement_is_broken(environment, tmp_path):
    for program in ("tc", "student"):
        done = run(environment / program, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"{program} {teachercache.__version__}\n"), done.stderr
    words = (sys.executable, "-m", "pip", "--python", environment / "python")
    done = run(*words, "show", "--files", "teachercache", cwd=tmp_path)
    assert f"Version: {teachercache.__version__}" in done.stdout
    assert str(environment.parent) in done.stdout  # not the editable install of this environment
    done = run(*words, "check", cwd=tmp_path)
    assert "teachercache" not in done.stdout, done.stdout


def test_a_failing_command_stops_the_release():
    with pytest.raises(SystemExit, match="exit code 3"):
        run_or_stop(sys.executable, "-c", "raise SystemExit(3)")
