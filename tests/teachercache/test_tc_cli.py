"""The command `tc` as a person types it: one line for what can be mended, JSON for machines, quick --help."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from small import error_of, make_folder, run, save_teacher, tree

import teachercache.teachers.clip.loading
from teachercache.cache import store
from teachercache.cli import tc

OPTIONS = {  # besides --json and --quiet, which all have. A contract: adding one is a decision, made here
    "teachers": set(),
    "manifest": {"data", "--out", "--limit", "--noise", "--noise-seed"},
    "build": {
        "--teacher",
        "--data",
        "--out",
        "--outputs",
        "--weights",
        "--batch-size",
        "--workers",
        "--precision",
        "--device",
        "--limit",
        "--views",
        "--augment",
        "--prune",
        "--retry",
        "--repair",
        "--no-wait",
    },
    "info": {"cache"},
    "verify": {"cache", "--samples", "--teacher"},
    "index": {"cache", "--field", "--kind"},
    "analyze": {"cache", "--against", "--out", "--map", "--points"},
    "search": {"cache", "text", "--image", "--key", "--field", "--teacher", "--top"},
    "serve": {"cache", "cache2", "--host", "--port", "--open", "--teacher"},
}
HERE = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tc") / "photos", 12, texts=2)


@pytest.fixture(scope="module")
def built(photos, teacher_folder) -> Path:
    out = photos.parent / "photos.zarr"
    assert run("build", "--teacher", teacher_folder, "--data", photos, "--out", out, *HERE) == 0
    return out


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "copy.zarr")


@pytest.fixture
def indexed(copy) -> Path:
    assert run("index", copy) == 0
    return copy


def flip_a_bit(cache: Path, name: str = "image_emb/c/0/0") -> None:
    content = bytearray((cache / name).read_bytes())
    content[len(content) // 2] ^= 4
    (cache / name).write_bytes(content)


# ----------------------------------------------------------------------------------------------------
# The contract


def test_options_are_frozen():
    found = {
        name: {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in tc.commands.items()
    }
    assert found == {name: options | {"--json", "--quiet", "-q"} for name, options in OPTIONS.items()}


@pytest.mark.parametrize("command", ["", *OPTIONS])
def test_help_imports_nothing_heavy(command: str):
    words = [sys.executable, "-X", "importtime", "-m", "teachercache", *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {
        "torch",
        "open_clip",
        "zarr",
        "faiss",
        "pyarrow",
        "transformers",
        "PIL",
        "numpy",
        "plotly",
        "sklearn",
        "diffusers",
        "pandas",
        "matplotlib",
        "timm",
        "torchvision",
    }


@pytest.mark.parametrize("command", list(OPTIONS))
def test_help_names_every_option(command: str, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in OPTIONS[command] if option.startswith("--"))
    assert r"\b" not in text  # click's mark for lines that keep their breaks, unread in a raw docstring


def test_examples_keep_their_lines(capsys):
    assert run("build", "--help") == 0
    assert (
        "\n  tc build --teacher clip-lite\n  tc build --teacher clip-lite --views 4\n"
        in capsys.readouterr().out
    )


# ----------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--teacher", "clip-vit-b61"], "unknown teacher 'clip-vit-b61': did you mean 'clip-vit-b16'?"),
        (["--teacher", "open_clip:ViT-B-32"], "write open_clip:MODEL/TAG"),
        (["--teacher", "nowhere.at_all:thing"], "cannot import teacher 'nowhere.at_all:thing'"),
        (["--teacher", "os:nothing"], "cannot import teacher 'os:nothing'"),
        (["--teacher", "os:path"], "os:path"),
        (
            ["--outputs", "embedings"],
            "has no output 'embedings': did you mean 'embeddings'? choose from embeddings",
        ),
        (["--outputs", ""], "outputs"),
        (["--data", "nowhere"], "no data at nowhere: pass --data FOLDER"),
        (["--data", "."], "no pictures or texts found in"),
        (["--data", "notes.docx"], "cannot read notes.docx: a folder of pictures"),
        (["--device", "abacus"], "--device abacus: not a device; try cpu"),
        (["--device", "mps"], "--device mps"),
        (["--precision", "fp64"], "--precision fp64: choose from auto, fp32, bf16, fp16"),
        (["--precision", "fp16"], "--precision fp16 does not work on the CPU"),
        (["--batch-size", "0"], "--batch-size"),
        (["--limit", "many"], "--limit"),
        (["--wieghts", "random:0"], "--weights"),
        (["--out", "notes.docx"], "notes.docx"),
        (["--out", "/proc/nowhere/c.zarr"], "/proc/nowhere"),
        (["--out", "."], "pass another --out"),
    ],
    ids=lambda value: "=".join(value).lstrip("-") if isinstance(value, list) else "",
)
def test_build_errors_are_one_line(words, says, teacher_folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.docx").touch()
    start = ["build", "--teacher", teacher_folder, "--data", photos, "--out", "c.zarr", *HERE]
    assert says in error_of(capsys, *start, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.docx"]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("random:x", "--weights random:x: write random:SEED, for example random:0"),
        ("random:", "--weights random:: write random:SEED"),
        ("no/such/file.pt", "--weights no/such/file.pt: no such file or folder"),
    ],
)
def test_bad_weights(weights, says, photos, tmp_path, capsys):
    start = ["build", "--teacher", "clip-vit-b32", "--data", photos, "--out", tmp_path / "c.zarr", *HERE]
    assert says in error_of(capsys, *start, "--weights", weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["random:0", "random:x", "no/such/file.pt"])
def test_weights_are_never_ignored(weights, teacher_folder, photos, tmp_path, capsys):
    """A folder brings its own weights: others must be used or refused."""
    start = ["build", "--teacher", teacher_folder, "--data", photos, "--out", tmp_path / "c.zarr", *HERE]
    assert "--weights" in error_of(capsys, *start, "--weights", weights)


def test_teacher_without_weights_offline_says_what_can_be_done(photos, tmp_path, capsys, monkeypatch):
    calls = []

    def refuse(*arguments, **more):
        calls.append(arguments)
        raise OSError("this test has no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(teachercache.teachers.clip.loading, "hub_answers", lambda: False)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    start = ["build", "--teacher", "clip-vit-b16", "--data", photos, "--out", tmp_path / "c.zarr", *HERE]
    line = error_of(capsys, *start)
    assert "cannot get the weights of clip-vit-b16" in line
    for words in ("--weights PATH", "--weights random:0", "--teacher clip-lite"):
        assert words in line
    assert calls == []
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("words", [["info"], ["verify"], ["index"], ["search", "--top", "3", "--"]])
def test_commands_on_no_cache(words, tmp_path, capsys):
    words = [words[0], *words[1:], tmp_path / "none.zarr", *(["dog"] if words[0] == "search" else [])]
    assert "no cache at" in error_of(capsys, *words)


@pytest.mark.parametrize("words", [["index"], ["search", "dog"]])
def test_commands_on_an_unfinished_cache_name_what_finishes_it(words, copy, built, capsys):
    store.forget_block(store.open_cache(copy), 0)
    line = error_of(capsys, words[0], copy, *words[1:])
    assert "1 of 1 blocks are missing" in line
    run_named_command(line)
    assert tree(copy) == tree(built)


def run_named_command(line: str) -> None:
    """Type what an error line says between backquotes."""
    command = shlex.split(line.split("`")[1])
    assert command[:2] == ["tc", "build"]
    assert run(*command[1:], *HERE) == 0


@pytest.mark.parametrize("extra", ["", "--limit 7", "--precision bf16", "--data relative/photos"])
def test_named_command_knows_how_the_cache_was_built(
    extra, teacher_folder, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    (tmp_path / "relative" / "photos").symlink_to(photos)
    words = ["--teacher", teacher_folder, "--data", photos, "--out", "c.zarr", *HERE]
    assert run("build", *words, *extra.split()) == 0
    store.forget_block(store.open_cache("c.zarr"), 0)
    run_named_command(error_of(capsys, "index", "c.zarr"))


def test_interrupt_is_one_line_and_130(teacher_folder, photos, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("teachercache.build.loop.build", interrupt)
    words = ["--teacher", teacher_folder, "--data", photos, "--out", tmp_path / "c.zarr", *HERE]
    assert run("build", *words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; run the same command to resume"


def test_no_command_and_unknown_commands(capsys):
    assert run() == 2
    assert "Usage" in capsys.readouterr().err
    assert "No such command 'biuld'" in error_of(capsys, "biuld")
    assert "--teacher" in error_of(capsys, "build")


def test_real_process_exits_2_with_one_line(tmp_path):
    words = [sys.executable, "-m", "teachercache", "build", "--teacher", "clip-lit", "--out", "c.zarr"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown teacher 'clip-lit': did you mean 'clip-lite'?")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------
# teachers, build, info


def test_teachers(capsys):
    assert run("teachers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"clip-vit-b16", "clip-vit-l14-336", "clip-rn50x16", "clip-lite"} <= set(found)
    assert found["clip-vit-b16"]["outputs"][0] == "embeddings"
    assert run("teachers") == 0
    plain = capsys.readouterr().out
    assert all(name in plain for name in found)


def test_build_speaks_on_stderr_and_picks_a_place(teacher_folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("build", "--teacher", teacher_folder, "--data", photos, "--limit", 5, *HERE) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "on cpu in float32 (" in err
    assert f"{Path('caches/photos/tiny.zarr')} is complete: 5 rows (5 written now)" in err
    assert store.open_complete("caches/photos/tiny.zarr").meta.rows == 5


def test_build_over_other_data_is_refused(teacher_folder, copy, tmp_path, capsys):
    before = tree(copy)
    data = make_folder(tmp_path / "other" / "deeper", 3).parent
    line = error_of(capsys, "build", "--teacher", teacher_folder, "--data", data, "--out", copy, *HERE)
    assert "holds another build" in line
    assert f"{data} has none of its rows: pass another --out" in line
    assert tree(copy) == before


def test_random_weights_are_said_loudly_and_recorded(photos, tmp_path, capsys):
    words = ["--teacher", "open_clip:ViT-S-32-alt/x", "--weights", "random:7", "--data", photos, "--limit", 2]
    for name in ("a.zarr", "b.zarr"):
        assert run("build", *words, "--out", tmp_path / name, *HERE) == 0
        assert "WARNING: --weights random:7" in capsys.readouterr().err
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")
    spec = store.open_cache(tmp_path / "a.zarr").meta.spec
    assert (spec.weights, spec.name) == ("random:7", "open_clip:ViT-S-32-alt/x")


def test_info(built, teacher_folder, capsys):
    assert run("info", built, "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == f"next: tc verify {built}\n"
    names = ("rows", "texts", "blocks", "blocks_done", "quarantined")
    assert [facts[name] for name in names] == [12, 2, 1, 1, 0]
    assert facts["spec"]["name"] == str(teacher_folder)
    assert [field["name"] for field in facts["spec"]["fields"]] == ["image_emb", "text_emb"]
    assert facts["bytes"] == sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    assert run("info", built) == 0
    text = capsys.readouterr().out
    for word in ("12 rows, 2 texts a row", "1 of 1 done", "image_emb", "12x2x16", "logit_scale"):
        assert word in text


# ----------------------------------------------------------------------------------------------------
# verify


def test_verify_a_whole_cache(built, capsys):
    assert run("verify", built, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["damaged"]) == (True, {})
    assert set(report["cosine"]) == {"image_emb", "text_emb"}
    assert all(0.999 <= values["min"] <= values["mean"] <= 1.001 for values in report["cosine"].values())
    assert run("verify", built, "--samples", 0) == 0


def test_verify_finds_a_flipped_bit_and_build_mends_it(copy, built, capsys):
    flip_a_bit(copy)
    line = error_of(capsys, "verify", copy)
    assert "1 damaged blocks: run `tc build" in line
    run_named_command(line)
    assert tree(copy) == tree(built)
    assert run("verify", copy) == 0


def test_verify_json_of_a_damaged_cache_is_one_object(copy, capsys):
    flip_a_bit(copy, "key/c/0")
    assert run("verify", copy, "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["damaged"] == {"0": "key/c/0: checksum differs"}
    assert err.startswith("error: ")


def test_verify_on_changed_data(photos, teacher_folder, tmp_path, capsys):
    data = shutil.copytree(photos, tmp_path / "data")
    assert run("build", "--teacher", teacher_folder, "--data", data, "--out", tmp_path / "c.zarr", *HERE) == 0
    assert run("verify", tmp_path / "c.zarr") == 0
    next(data.rglob("*.txt")).write_text("another caption\n")
    assert "has changed since" in error_of(capsys, "verify", tmp_path / "c.zarr")
    shutil.rmtree(data)
    assert "no data at" in error_of(capsys, "verify", tmp_path / "c.zarr")


def test_verify_on_pictures_that_changed_without_a_trace(teacher_folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, color in (("a", "black"), ("b", "red")):
        Image.new("RGB", (8, 8), color).save(data / f"{name}.bmp")
    assert run("build", "--teacher", teacher_folder, "--data", data, "--out", tmp_path / "c.zarr", *HERE) == 0
    Image.new("RGB", (8, 8), "white").save(data / "a.bmp")
    assert "data has changed since" in error_of(capsys, "verify", tmp_path / "c.zarr")  # by time and digest


def test_verify_with_another_teacher_in_its_place(photos, teacher_folder, tmp_path, capsys):
    folder = shutil.copytree(teacher_folder, tmp_path / "tiny")
    assert run("build", "--teacher", folder, "--data", photos, "--out", tmp_path / "c.zarr", *HERE) == 0
    save_teacher(folder, seed=1)
    assert "was built with other weights" in error_of(capsys, "verify", tmp_path / "c.zarr")


# ----------------------------------------------------------------------------------------------------
# index and search


def test_index_says_what_it_did_and_how_exact_it_is(copy, capsys):
    path = copy.with_name("copy.image_emb.faiss")
    for words, says in (
        ([], "built: 12 vectors, flat, exact"),
        ([], "current: 12 vectors, flat, exact"),
        (
            ["--kind", "hnsw"],
            "built: 12 vectors, hnsw, efSearch 12: recall@10 1.000 for queries from image_emb and",
        ),
    ):
        capsys.readouterr()
        assert run("index", copy, *words) == 0
        assert f"{path} {says}" in capsys.readouterr().err


def test_search_without_an_index_finds_the_same(copy, capsys):
    found = []
    for prepare in (False, True):
        assert not prepare or run("index", copy) == 0
        capsys.readouterr()
        assert run("search", copy, "x", "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["results"])
    assert [result["key"] for result in found[0]] == [result["key"] for result in found[1]]


def test_text_search_ranks_as_open_clip_does(indexed, teacher_folder, photos, capsys):
    capsys.readouterr()
    assert run("search", indexed, "square 3", "--top", 5, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == f"next: tc search {indexed} --key {found['results'][0]['key']}\n"
    assert found["query"] == "square 3"
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{teacher_folder}")
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        words = open_clip.get_tokenizer(f"local-dir:{teacher_folder}")(["square 3"])
        query = model.eval().encode_text(words, normalize=True)[0]
        pictures = torch.stack([transform(Image.open(path)) for path in paths])
        images = model.encode_image(pictures, normalize=True)
    cosine = (images @ query).numpy()
    best = np.argsort(-cosine)[:5]
    assert [result["image"] for result in found["results"]] == [str(paths[i]) for i in best]
    np.testing.assert_allclose([result["score"] for result in found["results"]], cosine[best], atol=2e-3)
    first = paths[best[0]].with_suffix(".txt").read_text().splitlines()
    assert found["results"][0]["texts"] == first


def test_image_search_finds_the_picture_itself(indexed, photos, capsys):
    for path in sorted(photos.rglob("*.png"))[:3]:
        capsys.readouterr()
        assert run("search", indexed, "--image", path, "--top", 2, "--json") == 0
        found = json.loads(capsys.readouterr().out)["results"]
        assert found[0]["image"] == str(path)
        assert found[0]["score"] == pytest.approx(1, abs=1e-3)
        assert len(found) == 2


def test_plain_search_prints_a_line_per_result(indexed, capsys):
    capsys.readouterr()
    assert run("search", indexed, "square", "--top", 100) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all("photos/class" in line and "; square" in line for line in lines)


def test_search_in_a_table_finds_files_that_exist(teacher_folder, photos, tmp_path, capsys):
    names = [os.path.relpath(path, photos) for path in sorted(photos.rglob("*.png"))]
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "l.csv").write_text("image,text\n" + "".join(f"{name},some text\n" for name in names))
    cache = tmp_path / "c.zarr"
    assert run("build", "--teacher", teacher_folder, "--data", data / "l.csv", "--out", cache, *HERE) == 0
    assert run("index", cache) == 0
    capsys.readouterr()
    assert run("search", cache, "x", "--json") == 0
    assert all(Path(result["image"]).is_file() for result in json.loads(capsys.readouterr().out)["results"])


def test_search_errors(indexed, photos, tmp_path, capsys):
    notes = tmp_path / "notes.png"
    notes.write_text("not a picture")
    assert "give a text, --image FILE or --key KEY" in error_of(capsys, "search", indexed)
    assert "No such file" in error_of(capsys, "search", indexed, "--image", tmp_path / "gone.png")
    assert "--top" in error_of(capsys, "search", indexed, "x", "--top", 0)
    assert "not a picture" in error_of(capsys, "search", indexed, "--image", notes)
