"""The packaged heads of clip-lite: what the script trained, undamaged, and the teacher that they make."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.datasets import scenes
from scripts.teachers import clip_lite as script
from teachercache.core.errors import UserError
from teachercache.teachers.clip import lite
from teachercache.teachers.registry import load

RECORD = json.loads(lite.RECORD.read_text())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The teacher comes from the package, whatever folder a person is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_record_is_of_these_heads_and_of_this_script():
    heads = load_file(lite.HEADS)
    assert {name: (tuple(t.shape), t.dtype) for name, t in heads.items()} == {
        "image.proj.weight": ((512, 1280), torch.float16),
        "text.weight": ((512, 384), torch.float16),
        "logit_scale": ((1,), torch.float16),
    }
    assert lite.HEADS.stat().st_size < 2_000_000
    assert RECORD["settings"] == script.SETTINGS, "run `python -m scripts.teachers.clip_lite --write`"
    assert RECORD["data"]["source"] == "debian"
    assert RECORD["metrics"]["acc1"] > 0.4
    assert lite.packaged_heads()["text.weight"].dtype == torch.float32


def test_the_teacher_computes_what_was_recorded(elsewhere, monkeypatch):
    recorded = torch.tensor(RECORD["cosines"])
    torch.testing.assert_close(script.probe(), recorded, atol=5e-3, rtol=0)
    heads = lite.packaged_heads()
    monkeypatch.setattr(lite, "packaged_heads", lambda: heads | {"text.weight": heads["text.weight"].flip(0)})
    assert (script.probe() - recorded).abs().mean() > 0.05


def test_damaged_heads_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "heads.safetensors"
    content = bytearray(lite.HEADS.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(lite, "HEADS", damaged)
    with pytest.raises(UserError, match=r"heads.safetensors is damaged: install teachercache again"):
        lite.packaged_heads()


def test_heads_trained_here_replace_the_packaged_ones(elsewhere, capsys):
    packaged = load("clip-lite")
    assert "models/clip-lite" not in capsys.readouterr().err
    heads = lite.packaged_heads()
    lite.assemble(heads | {"image.proj.weight": -heads["image.proj.weight"]})
    trained = load("clip-lite")
    assert (
        capsys.readouterr().err
        == "clip-lite is models/clip-lite here; remove that folder to use the packaged heads\n"
    )
    assert trained.spec.digest != packaged.spec.digest
    torch.testing.assert_close(
        trained.module.visual.head.proj.weight, -packaged.module.visual.head.proj.weight
    )
    with pytest.raises(UserError, match="--weights elsewhere: no such folder"):
        load("clip-lite", weights="elsewhere")


def test_packaged_and_assembled_teachers_are_one(elsewhere):
    lite.assemble(lite.packaged_heads(), Path("mine"))
    teacher, folder = load("clip-lite"), load("clip-lite", weights="mine")
    assert teacher.spec.digest == folder.spec.digest
    assert teacher.spec.view == folder.spec.view
    captions = [captions[0] for _, captions, *_ in scenes.generate(3, 1)]
    assert torch.equal(teacher.tokenize(captions), folder.tokenize(captions))


def test_agreement_finds_other_heads():
    heads = lite.packaged_heads()
    rows = torch.randn(5, 1280).numpy()
    assert script.agreement(heads, heads, "visual.head", rows) == pytest.approx(1)
    other = heads | {"image.proj.weight": torch.randn(512, 1280)}
    assert script.agreement(heads, other, "visual.head", rows) < 0.5
