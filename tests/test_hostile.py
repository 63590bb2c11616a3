"""What a stranger sends runs nothing: code beside configurations, names of modules, pickles in place of weights.

Each exploit makes a folder `proof` when it runs. Archives, pages and tables of strangers: see SECURITY.md.
"""

import csv
import dataclasses
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import TINY_CFG, error_of, run, save_diffusion, save_teacher
from small_bart import save_bart

from evaluation.results.suite import CLASSIFICATION, Report
from evaluation.results.suite_tables import write_suite
from student.cli import main
from student.models.named import build_student
from student.models.registry import find_family, load_student
from teachercache.cache import layout, store
from teachercache.core.errors import UserError
from teachercache.teachers.allowed import check_open_clip
from teachercache.teachers.registry import find_stored, installed_teachers, load, load_stored

CODE = """
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizer

Path({proof!r}).mkdir(exist_ok=True)
class Evil(BertTokenizer): pass
class EvilConfig(BertConfig): pass
class EvilModel(BertModel): pass
"""
TOKENIZER_MAP = {"AutoTokenizer": ["evil.Evil", None]}
TRUST = {"hf_tokenizer_name": "here", "tokenizer_kwargs": {"trust_remote_code": True}}


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """The folder that an exploit makes; transformers copies code here, not into the home of a person."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "proof"


def merge(path: Path, changes: dict) -> None:
    """Write changes into a JSON file; dictionaries are joined."""

    def joined(old, new):
        return {**old, **{k: joined(old.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}}

    path.write_text(json.dumps(joined(json.loads(path.read_text()) if path.exists() else {}, changes)))


def add_code(folder: Path, proof: Path) -> None:
    """Code, and the files that make transformers load it."""
    (folder / "evil.py").write_text(CODE.format(proof=str(proof)))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    merge(folder / "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": TOKENIZER_MAP})


@pytest.fixture
def gift(tmp_path, proof):
    """An open_clip folder whose tokenizer is a Python file."""
    folder = save_teacher(tmp_path / "gift")
    add_code(folder, proof)
    merge(folder / "open_clip_config.json", {"model_cfg": {"text_cfg": TRUST}})
    return folder


def test_the_exploit_is_real(gift, proof):
    """Otherwise the tests below would pass without any protection."""
    import open_clip

    open_clip.get_tokenizer(f"local-dir:{gift}")
    assert proof.exists()


def as_run(gift: Path, base: Path) -> Path:
    """The same as a finished run of `student train`."""
    (gift / "open_clip_model.safetensors").rename(gift / "model.safetensors")
    config = json.loads((gift / "open_clip_config.json").read_text())
    (gift / "open_clip_config.json").unlink()
    facts = json.loads((base / "run.json").read_text())
    student = {"model_cfg": config["model_cfg"], "preprocess": config["preprocess_cfg"]}
    facts["student"] = {"family": "two_tower", "config": student}
    (gift / "run.json").write_text(json.dumps(facts))
    return gift


@pytest.mark.parametrize(
    "words", [["--teacher", "GIFT"], ["--teacher", "open_clip:RN50/openai", "--weights", "GIFT"]]
)
def test_a_folder_as_the_teacher(words, gift, proof, squares, tmp_path, capsys):
    words = [str(gift) if word == "GIFT" else word for word in words]
    error = error_of(capsys, "build", *words, "--data", squares, "--out", tmp_path / "c.zarr")
    assert "config.json" in error
    assert "trust_remote_code" in error or "auto_map" in error
    assert not proof.exists()


def rename_teacher(cache: Path, name: str) -> None:
    """Give a cache another teacher, as somebody who sends one can."""
    meta = store.open_complete(cache).meta
    meta = dataclasses.replace(meta, spec=dataclasses.replace(meta.spec, name=name))
    (cache / "zarr.json").write_bytes(layout.metadata(meta)["zarr.json"])


@pytest.mark.parametrize("command", ["verify", "search"])
def test_a_cache_that_names_a_folder_inside_itself(command, gift, proof, cache, tmp_path, capsys):
    mine = shutil.copytree(cache, tmp_path / "c.zarr")
    gift.rename(mine / "gift")
    rename_teacher(mine, str(mine / "gift"))
    words = ["a"] if command == "search" else []
    code = run(command, mine, *words)
    error = capsys.readouterr().err
    assert (code, "auto_map" in error) == (2, True), error
    assert not proof.exists()


def test_a_run_as_student_and_as_teacher(gift, proof, finished_run, squares, tmp_path, capsys):
    folder = as_run(gift, finished_run)
    for words in (
        ["eval", folder, "--task", "retrieval", "--data", squares],
        ["export", folder, "--format", "open_clip", "--out", tmp_path / "out"],
    ):
        assert main([str(word) for word in words]) == 2
        assert "'trust_remote_code'" in capsys.readouterr().err.splitlines()[-1]
    for attempt in (lambda: load(str(folder)), lambda: build_student("vit-micro", str(folder))):
        with pytest.raises(UserError, match=r"trust_remote_code|auto_map"):
            attempt()
    assert not proof.exists()


MODEL, TEXT, VISION = ("model_cfg",), ("model_cfg", "text_cfg"), ("model_cfg", "vision_cfg")
POISON = {
    "an option of the tokenizer": (TEXT, {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "bpe_path"),
    "a folder as tokenizer": (TEXT, {"hf_tokenizer_name": "OTHER"}, "auto_map"),
    "a folder as text tower": (TEXT, {"hf_model_name": "OTHER"}, "auto_map"),
    "a scheme as tokenizer": (
        TEXT,
        {"hf_tokenizer_name": "../../x"},
        "neither a folder nor a name on the hub",
    ),
    "a folder of timm": (VISION, {"timm_model_name": "local-dir:OTHER"}, "timm_model_name"),
    "a hub of timm": (VISION, {"timm_model_name": "hf-hub:evil/model"}, "timm_model_name"),
    "an unknown key": (VISION, {"hub": "x"}, "the key 'hub' in vision_cfg"),
    "a target": (MODEL, {"_target_": "os.system"}, "the key '_target_' in model_cfg"),
    "a huge size": (TEXT, {"vocab_size": 10**12}, "vocab_size"),
    "an odd value": (VISION, {"width": [{"a": 1}]}, "width"),
    "a word for a number": (VISION, {"layers": "many"}, "cannot build its model"),
    "an odd mean": (("preprocess_cfg",), {"mean": "abc"}, "the value of 'mean' in preprocess_cfg"),
    "no architecture": ((), {"model_cfg": 3}, "model_cfg is a int"),
}


@pytest.mark.parametrize("name", POISON)
def test_a_configuration_may_set_what_open_clip_reads_and_no_more(name, proof, tmp_path):
    place, change, says = POISON[name]
    folder, other = save_teacher(tmp_path / "gift"), tmp_path / "other"
    other.mkdir()
    add_code(other, proof)
    merge(other / "config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    change = json.loads(json.dumps(change).replace("OTHER", str(other)))
    for key in reversed(place):
        change = {key: change}
    merge(folder / "open_clip_config.json", change)
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert says in str(error.value)
    assert str(folder) in str(error.value) or str(other) in str(error.value)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.EvilConfig"}}),
        ("config.json", {"text": {"attn_implementation": "evil/kernel"}}),
        ("config.json", {"quantization_config": {"quant_method": "evil"}}),
        ("generation_config.json", {"custom_generate": "evil"}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("adapter_config.json", {"base_model_name_or_path": "evil/base"}),
    ],
)
def test_files_of_transformers(file, change, proof, tmp_path):
    from evaluation.probes.finetune_text import load_text_model
    from student.models.seq2seq.loading import open_bart

    folder = save_bart(tmp_path / "bart")
    (folder / "evil.py").write_text(CODE.format(proof=str(proof)))
    merge(folder / file, change)
    for attempt in (
        lambda: load_text_model("Seq2SeqLM", str(folder)),
        lambda: open_bart(str(folder), scratch=False),
    ):
        with pytest.raises(UserError, match=file):
            attempt()
    assert not proof.exists()


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}, "the key 'unet'"),
        ("model_index.json", {"tokenizer": ["transformers", "pipeline"]}, "'pipeline' is not known"),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.EvilModel"}}, "auto_map"),
        (
            "text_encoder/config.json",
            {"quantization_config": {"quant_method": "evil"}},
            "quantization_config",
        ),
        ("tokenizer/tokenizer_config.json", {"auto_map": TOKENIZER_MAP}, "auto_map"),
    ],
)
def test_files_of_diffusers(file, change, says, proof, diffusion_folder, tmp_path):
    folder = shutil.copytree(diffusion_folder, tmp_path / "sd")
    (folder / "evil.py").write_text(CODE.format(proof=str(proof)))
    merge(folder / file, change)
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert says in str(error.value)
    assert file in str(error.value)
    assert not proof.exists()


def test_every_architecture_of_open_clip_is_allowed():
    import open_clip

    for name in open_clip.list_models():
        check_open_clip(open_clip.get_model_config(name), {}, name)
    with pytest.raises(UserError):
        check_open_clip({**TINY_CFG, "other": 1}, {}, "here")


# ----------------------------------------------------------------------------------------------------
# Names


def test_a_package_in_the_current_folder_is_not_installed(proof, tmp_path, monkeypatch):
    """`python -m` and torchrun put the current folder in front of the import path."""
    info = tmp_path / "here" / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[teachercache.teachers]\nevil = evil_points:E\n[student.models]\nevil = evil_points:E\n"
    )
    (tmp_path / "here" / "evil_points.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nE = 1\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    assert "evil" not in installed_teachers()
    assert "own-diffusion" in installed_teachers()
    for look_up in (find_stored, find_family, lambda name: load_stored(name)):
        for name in ("evil", "evil_points:E", "evil_points"):
            with pytest.raises(UserError):
                look_up(name)
    assert not proof.exists()
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])  # as PYTHONPATH or a .pth file puts it there
    assert "evil" in installed_teachers()


def test_printed_commands_neither_import_nor_leave_their_quotes(cache, tmp_path):
    mine = shutil.copytree(cache, tmp_path / "c.zarr")
    for name, printed in (("evil.module:ENTRY", "PACKAGE.MODULE:ENTRY"), ("a; touch b", "a; touch b")):
        rename_teacher(mine, name)
        words = shlex.split(store.open_complete(mine).command())
        assert words[words.index("--teacher") + 1] == printed


# ----------------------------------------------------------------------------------------------------
# Pickles


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def bomb(path: Path, proof: Path) -> Path:
    torch.save({"weight": Bomb(proof)}, path)
    return path


def bomb_npz(path: Path, proof: Path) -> Path:
    import numpy as np

    np.savez(path, weight=np.array([Bomb(proof)], dtype=object))
    return path


def transformers_folder(path: Path, proof: Path) -> str:
    folder = save_bart(path)
    (folder / "model.safetensors").unlink()
    bomb(folder / "pytorch_model.bin", proof)
    return str(folder)


def load_probe(path: Path, proof: Path) -> None:
    from evaluation.probes.finetune_text import load_text_model

    load_text_model("Seq2SeqLM", transformers_folder(path, proof))


def load_bart(path: Path, proof: Path) -> None:
    from student.models.seq2seq.loading import open_bart

    open_bart(transformers_folder(path, proof), scratch=False)


def load_uniter(path: Path, proof: Path) -> None:
    from student.models.single_stream.loading import read_state

    read_state(bomb(path.with_suffix(".pt"), proof))


def load_diffusers(path: Path, proof: Path) -> None:
    folder = save_diffusion(path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    bomb(folder / "unet" / "diffusion_pytorch_model.bin", proof)
    load(str(folder))


def load_folder(path: Path, proof: Path) -> None:
    folder = save_teacher(path)
    bomb(folder / "open_clip_model.safetensors", proof)
    load(str(folder))


def load_trained(path: Path, proof: Path) -> None:
    path.mkdir()
    student = {"family": "clip_lite_heads", "config": {}}
    (path / "run.json").write_text(json.dumps({"format": 2, "student": student}))
    bomb(path / "model.safetensors", proof)
    load_student(path)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda path, proof: load("open_clip:RN50/openai", weights=str(bomb(path.with_suffix(".pt"), proof))),
        lambda path, proof: load(
            "open_clip:RN50/openai", weights=str(bomb_npz(path.with_suffix(".npz"), proof))
        ),
        lambda path, proof: load("regions", weights=str(bomb(path.with_suffix(".pth"), proof))),
        load_probe,
        load_bart,
        load_uniter,
        load_diffusers,
        load_folder,
        load_trained,
    ],
    ids=["open_clip", "npz", "regions", "probe", "bart", "uniter", "diffusers", "folder", "run"],
)
def test_a_pickle_in_place_of_weights(attempt, proof, tmp_path, monkeypatch):
    import open_clip

    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "RN50", TINY_CFG
    )  # the real one takes seconds to build
    with pytest.raises(UserError):
        attempt(tmp_path / "gift", proof)
    assert not proof.exists()


def test_weights_of_another_student_are_one_line(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "digests.json").unlink()  # which names a changed file before anything is loaded
    with pytest.raises(
        UserError, match=r"model\.safetensors and run\.json are damaged or do not fit each other"
    ):
        load_student(folder)


@pytest.mark.parametrize("name", ["=HYPERLINK(A1)", "+1", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1"])
def test_a_name_in_a_table_is_no_formula(name, tmp_path):
    metrics = {"acc1": -0.5}
    result = {"model": name, "pretrained": name, "dataset": "d", "task": CLASSIFICATION, "metrics": metrics}
    write_suite(Report([result], []), tmp_path)
    with (tmp_path / "suite.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["model"], line["pretrained"], line["acc1"]) == (f"'{name}", f"'{name}", "-0.5")
