"""Weights by file have the view and activation of their tag; folders load as open_clip loads them."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import TINY_CFG, save_teacher

from student.models.named import build_student
from teachercache.core.errors import UserError
from teachercache.teachers.clip.folders import open_folder
from teachercache.teachers.registry import load

TOKENIZER = open_clip.SimpleTokenizer(context_length=8)


@pytest.fixture
def small_models(monkeypatch):
    """Tiny models under names of open_clip's table, which its tags belong to."""
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "MobileCLIP-S1", "ViT-H-14"):
        cfg = {**TINY_CFG, "quick_gelu": True} if name.endswith("quickgelu") else TINY_CFG
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, cfg)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: TOKENIZER)


def activation(module) -> str:
    return type(module.transformer.resblocks[0].mlp.gelu).__name__


@pytest.mark.parametrize(
    ("name", "quick", "view"),
    [
        ("open_clip:ViT-B-32/openai", True, {}),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", False, {}),
        ("open_clip:ViT-B-32-quickgelu/openai", True, {}),
        ("clip-vit-b32", True, {}),
        (
            "open_clip:ViT-B-16-SigLIP/webli",
            False,
            {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
        ),
        (
            "open_clip:MobileCLIP-S1/datacompdr",
            False,
            {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
        ),
        ("open_clip:ViT-H-14/dfn5b", True, {"interpolation": "bicubic", "resize_mode": "squash"}),
    ],
)
def test_a_file_has_the_view_and_activation_of_its_tag(
    name, quick, view, small_models, tmp_path, monkeypatch, capsys
):
    file = save_teacher(tmp_path / "model") / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    by_file, by_tag, at_random = (
        load(name, weights=weights) for weights in (str(file), "pretrained", "random:0")
    )
    assert "guessed" not in capsys.readouterr().err
    for teacher in (by_file, by_tag, at_random):
        assert activation(teacher.module) == ("QuickGELU" if quick else "GELU")
        assert {key: teacher.spec.view[key] for key in view} == view
    assert by_file.spec.view == by_tag.spec.view == at_random.spec.view
    assert by_file.spec.digest == by_tag.spec.digest


def test_a_tag_that_is_not_there_is_told(small_models, tmp_path, capsys):
    file = save_teacher(tmp_path / "model") / "open_clip_model.safetensors"
    load("open_clip:ViT-B-32/mine", weights=str(file))
    error = " ".join(capsys.readouterr().err.split())
    assert "has no weights 'mine' of ViT-B-32" in error
    assert "OpenAI's mean and std, GELU" in error


def test_a_repository_of_the_hub_is_checked_before_it_is_read(tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "hub")
    names = {None: "open_clip_model.safetensors"}
    monkeypatch.setattr(
        open_clip.factory,
        "download_pretrained_from_hf",
        lambda repository, filename=None, **_: str(folder / names.get(filename, filename)),
    )
    assert load("hf:someone/model").spec.view["mean"] == [0.5] * 3
    other = save_teacher(tmp_path / "other", seed=1) / "open_clip_model.safetensors"
    assert load("hf:someone/model", weights=str(other)).spec.digest == load(str(other.parent)).spec.digest
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the key 'trust_remote_code' in text_cfg\.tokenizer_kwargs"):
        load("hf:someone/model")


def with_prefix(state: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def with_position_ids(state: dict) -> dict:
    return {**state, "text.transformer.embeddings.position_ids": torch.arange(8)[None]}


def with_vector_scale(state: dict) -> dict:
    return {**state, "logit_scale": state["logit_scale"].reshape(1)}


def of_larger_pictures(state: dict) -> dict:
    table = state["visual.positional_embedding"]
    return {**state, "visual.positional_embedding": torch.cat([table, torch.randn(12, table.shape[1])])}


def of_longer_texts(state: dict) -> dict:
    return {**state, "positional_embedding": torch.randn(16, state["positional_embedding"].shape[1])}


@pytest.mark.parametrize(
    "change", [with_prefix, with_position_ids, with_vector_scale, of_larger_pictures, of_longer_texts]
)
def test_a_folder_loads_as_open_clip_loads_it(change, tmp_path):
    folder = save_teacher(tmp_path / "model")
    path = folder / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    theirs = open_clip.create_model(f"local-dir:{folder}").state_dict()
    started = build_student("vit-micro", str(folder)).model
    for module in (open_folder(str(folder))[0], load(str(folder)).module, started):
        state = module.state_dict()
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[name].reshape(theirs[name].shape), theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        lambda state: {name: tensor for name, tensor in state.items() if name != "logit_scale"},
        lambda state: {**state, "other": torch.zeros(1)},
        lambda state: {**state, "positional_embedding": torch.zeros(8, 3)},
        lambda state: {**state, "ln_final.weight": torch.zeros(3)},
    ],
)
def test_weights_that_do_not_fit_are_one_line(change, tmp_path):
    folder = save_teacher(tmp_path / "model")
    path = folder / "open_clip_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(
        UserError, match=r"open_clip_model\.safetensors does not fit its configuration"
    ) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
