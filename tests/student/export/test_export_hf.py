"""`student export --format hf`: what transformers loads says what the student says, or is refused."""

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from small import train_here

from student.cli import main
from student.contract import Exported
from student.export.model_card import model_card
from student.inference.load import load_run
from student.models.two_tower import export_hf
from student.models.two_tower.export_hf import image_processor
from student.models.two_tower.hf_tokenizer import clip_tokenizer
from student.models.two_tower.model import TwoTower
from teachercache.data.views import image_view
from teachercache.teachers.clip.folders import build_module, tokenizer_of
from tests.student.export.test_export import pictures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SENTENCES = [
    "square 3 said 1",
    "A Red BIRD",
    "",
    "\u00fcber 12 of them!",
    "word " * 50,
    "It's JOHN'S, don't we'll",
    "na\u00efve \u00e9t\u00e9 \u2014 \u201cquoted\u201d \u2018x\u2019 \u2026",
    "don\u2019t",
    "\u65e5\u672c\u8a9e \u4e2d\u6587\u3002\uff0c",
    "\ufb01ne \uff46\uff55\uff4c\uff4c \u2167",
    "a\tb\nc  d ",
    "tom &amp; jerry &lt;3",
    "&quot;x&quot; &amp;amp;",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "e\u0301 decomposed",
    "STRASSE \u1e9e \u0130stanbul",
    "hello!! #tag @user 100% $5",
    "a_b__c",
    "\u200bzero\u200bwidth a\u00a0b",
    "\x1b[31mred\x1b[0m\x07",
    "\ufeffbom",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "x\u00b2 \u00bd",
    "line\r\nline",
]
NONE: dict = {}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "red",
    "bird",
    "it",
    "'",
    "s",
    "word",
    "1",
]


@pytest.fixture(scope="module")
def clip_run(squares, cache, tmp_path_factory):
    """Two steps of `clip`, which has no heads and no teacher."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert train_here(squares, cache, out, "--steps", 2, recipe="clip") == 0
    return out


@pytest.fixture(scope="module", params=["clip", "clip_kd"])
def run(request):
    return request.getfixturevalue("clip_run" if request.param == "clip" else "finished_run")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "student"
    assert main(["export", str(run), "--format", "hf", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT's configuration and tokenizer."""
    from transformers import BertConfig, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
    ).save_pretrained(folder)
    return folder


def fake_run(folder, base, model_cfg: dict, preprocess: dict | None = None) -> TwoTower:
    """A finished run of a random student of any configuration; its facts are another run's."""
    torch.manual_seed(0)
    model, view = build_module(model_cfg, preprocess or {})
    student = TwoTower(model, model_cfg, view, tokenizer_of(model_cfg)).eval()
    for parameter in model.parameters():  # biases and norms that differ from their start
        parameter.data += 0.02 * torch.randn_like(parameter)
    facts = json.loads((base / "run.json").read_text())
    folder.mkdir()
    facts["student"] = json.loads(json.dumps({"family": student.spec.family, "config": student.spec.config}))
    (folder / "run.json").write_text(json.dumps(facts))
    save_file(student.saved_state(), folder / "model.safetensors")
    return student


def micro(vision: dict = NONE, text: dict = NONE, **other) -> dict:
    """vit-micro's configuration with changes."""
    vision_cfg = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text_cfg = {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
    return {
        "embed_dim": 24,
        "vision_cfg": {**vision_cfg, **vision},
        "text_cfg": {**text_cfg, **text},
        **other,
    }


def features(module, pixels, ids, mask=None):
    """Raw embeddings by the documented methods."""
    found = module.get_image_features(pixel_values=pixels), module.get_text_features(ids, attention_mask=mask)
    return [getattr(value, "pooler_output", value) for value in found]


def assert_same(module, student: TwoTower, limit: float = 1e-5) -> None:
    """Embeddings of random pixels and of token ids as open_clip pads them."""
    pixels = torch.randn(3, 3, *student.model.visual.image_size)
    ids = student.tokenizer(["a red bird", "", "square 3 said 1", "word " * 50])
    mask = (ids != student.model.text.config.pad_token_id).long() if hasattr(student.model, "text") else None
    with torch.inference_mode():
        ours = student.model.encode_image(pixels), student.model.encode_text(ids)
        theirs = features(module, pixels, ids, mask)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < limit
        assert (a[0] - a[1]).abs().max() > 1e-3  # not one constant
    assert torch.equal(module.logit_scale.detach(), student.model.logit_scale.detach().reshape(()))


def refused(capsys, run, out) -> str:
    """The error of an export, of which nothing is left."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main(["export", str(run), "--format", "hf", "--out", str(out)]) == 2
    assert sorted(out.parent.iterdir()) == before
    return capsys.readouterr().err.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------------------------
# CLIPModel


def test_transformers_loads_it_and_says_the_same(exported, run):
    from transformers import AutoModel, CLIPModel

    module = CLIPModel.from_pretrained(exported)
    assert_same(module, load_run(run))
    assert type(AutoModel.from_pretrained(exported)) is CLIPModel
    assert module.config.projection_dim == module.config.text_config.projection_dim == 64


def test_only_the_student_is_in_it(exported, run):
    """Every tensor has its place in the model; there is no other and none of the heads."""
    from transformers import CLIPConfig, CLIPModel

    written = load_file(exported / "model.safetensors")
    assert set(written) == set(CLIPModel(CLIPConfig.from_pretrained(exported)).state_dict())
    assert sum(tensor.numel() for tensor in written.values()) == sum(
        tensor.numel() for tensor in load_file(run / "model.safetensors").values()
    )
    assert not [name for name in written if "heads" in name or "icl" in name]


@pytest.mark.parametrize("form", ["open_clip", "hf"])
def test_a_sharded_run_leaves_its_heads_behind_too(squares, cache, tmp_path, form):
    """ZeRO 3 keeps parts of every tensor; the export has the whole ones of the student alone."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert train_here(squares, cache, run, "--steps", 1, "--set", "run.zero=3") == 0
    assert main(["export", str(run), "--format", form, "--out", str(out)]) == 0
    written = load_file(out / ("model.safetensors" if form == "hf" else "open_clip_model.safetensors"))
    assert all(tensor.numel() for tensor in written.values())
    assert not [name for name in written if "heads" in name or "icl" in name]


DETAILS = {
    "quick_gelu": micro(quick_gelu=True),
    "tanh": micro({"act_kwargs": {"approximate": "tanh"}}),
    "mlp_ratio": micro({"mlp_ratio": 2.0}),
    "context": micro({}, {"context_length": 77, "mlp_ratio": 3.0}),
    "eps": micro({"norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-2}}),
}


@pytest.mark.parametrize("cfg", DETAILS.values(), ids=DETAILS.keys())
def test_details_of_the_towers(cfg, finished_run, tmp_path):
    from transformers import CLIPModel

    student = fake_run(tmp_path / "run", finished_run, cfg)
    assert main(["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    assert_same(CLIPModel.from_pretrained(tmp_path / "out"), student)


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        (micro({"no_ln_pre": True}), "pre_layrnorm"),
        (micro({"ls_init_value": 0.1}), "no place for its transformer.resblocks.0.ls_1.gamma"),
        (micro({"pool_type": "avg"}), "other image embeddings"),
        (micro({}, {"no_causal_mask": True}), "other text embeddings"),
        (micro({}, {"tokenizer_kwargs": {"clean": "canonicalize"}}), "other text embeddings"),
        (micro({"image_size": [32, 16]}), "not square (32 x 16)"),
        (micro({"layers": [1, 1, 1, 1], "width": 16}), "ModifiedResNet"),
        (micro(custom_text=True), "CustomTextCLIP"),
    ],
)
def test_what_clip_model_cannot_say_is_refused(cfg, reason, finished_run, tmp_path, capsys):
    fake_run(tmp_path / "run", finished_run, cfg)
    error = refused(capsys, tmp_path / "run", tmp_path / "out")
    assert reason in error
    assert error.endswith("use --format open_clip")
    assert (
        main(["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    )


def test_a_wrong_conversion_is_caught_before_anyone_sees_it(finished_run, tmp_path, monkeypatch, capsys):
    """What was written is loaded and compared: queries and keys that changed places do not pass."""
    right = export_hf.renamed

    def wrong(state, names):
        swap = {"q_proj": "k_proj", "k_proj": "q_proj"}
        found = right(state, names)
        return {name: found[".".join(swap.get(part, part) for part in name.split("."))] for name in found}

    fake_run(tmp_path / "run", finished_run, micro())
    monkeypatch.setattr(export_hf, "renamed", wrong)
    assert "would compute other image embeddings (by " in refused(capsys, tmp_path / "run", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------
# The processor


def until_end(ids: list[int]) -> list[int]:
    """A row of ids with its end token, without padding."""
    return ids[: ids.index(49407) + 1]


def test_texts_become_the_same_tokens(exported, run):
    from transformers import AutoTokenizer, CLIPProcessor

    tokenizer = CLIPProcessor.from_pretrained(exported).tokenizer
    assert tokenizer.model_max_length == 16
    ours = load_run(run).tokenizer(SENTENCES).tolist()
    for theirs in (tokenizer, AutoTokenizer.from_pretrained(exported)):
        found = theirs(SENTENCES, padding=True, truncation=True).input_ids
        for sentence, a, b in zip(SENTENCES, ours, found, strict=True):
            assert until_end(a) == until_end(b), sentence
    assert (
        tokenizer.decode(tokenizer("A dog's life").input_ids, skip_special_tokens=True).strip()
        == "a dog 's life"
    )


@pytest.mark.parametrize("length", [32, 77])
def test_the_vocabulary_and_the_length(length, tmp_path):
    simple = open_clip.SimpleTokenizer(context_length=length)
    tokenizer = clip_tokenizer(simple, tmp_path)
    assert tokenizer.model_max_length == length
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert list(vocab.values()) == list(range(49408))
    assert [word for word in vocab if simple.encoder.get(word) != vocab[word]] == [
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    assert lines[:2] == ["#version: 0.2", "i n"]
    assert len(lines) == len(simple.bpe_ranks) + 1
    long = tokenizer("word " * 100, truncation=True).input_ids
    assert long == simple("word " * 100)[0].tolist()


def test_square_pictures_become_the_same_pixels(exported, run):
    """To the bit with PIL; transformers' default resizes tensors and differs by two levels of 255 at most."""
    from transformers import AutoProcessor

    student = load_run(run)
    squares = [
        picture.resize((side, side)) for picture, side in zip(pictures(), (20, 32, 33, 1, 90), strict=True)
    ]
    ours = torch.stack([student.picture.view(picture) for picture in squares])
    for backend, limit in (("pil", 1e-6), ("torchvision", 2 / 255 / 0.5 + 1e-6)):
        processor = AutoProcessor.from_pretrained(exported, backend=backend)
        theirs = processor(images=squares, return_tensors="pt").pixel_values
        assert (ours - theirs).abs().max() <= limit, backend


def test_other_pictures_are_said_to_be_stretched_and_how_not_to(exported, run, tmp_path, capsys):
    from transformers import AutoProcessor

    said = (
        "The processor stretches pictures to 32 x 32, the student was trained on pictures padded to squares: "
    )
    assert said in (exported / "README.md").read_text()
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    assert said in capsys.readouterr().err
    student, processor = load_run(run), AutoProcessor.from_pretrained(exported, backend="pil")
    line = next(line for line in (exported / "README.md").read_text().splitlines() if "ImageOps.pad" in line)
    for picture in pictures():
        ours = student.picture.view(picture)
        stretched = processor(images=picture, return_tensors="pt").pixel_values[0]
        padded = eval(
            line.partition("=")[2].strip(), {"ImageOps": ImageOps, "Image": Image, "picture": picture}
        )
        assert torch.allclose(processor(images=padded, return_tensors="pt").pixel_values[0], ours, atol=1e-6)
        assert torch.equal(stretched, ours) == (picture.width == picture.height)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_that_the_processor_can_say(mode, interpolation, tmp_path):
    from transformers import AutoImageProcessor

    view = {
        "size": [32, 32],
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 0,
    }
    image_processor(view).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for picture in pictures():
        theirs = processor(images=picture, return_tensors="pt").pixel_values[0]
        assert torch.allclose(image_view(view)(picture), theirs, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# VisionTextDualEncoderModel


def dual(bert, vision: dict, **text) -> dict:
    """A configuration with a text tower of transformers."""
    text_cfg = {
        "hf_model_name": str(bert),
        "hf_tokenizer_name": str(bert),
        "context_length": 16,
        "hf_pooler_type": "cls_pooler",
        "hf_proj_type": "linear",
    }
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text_cfg, **text}, "custom_text": True}


def timm_cfg(name: str, **other) -> dict:
    return {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 160, **other}


@pytest.mark.parametrize(
    "vision",
    [timm_cfg("test_efficientnet"), timm_cfg("test_vit", timm_pool="token"), micro()["vision_cfg"]],
    ids=["timm-efficientnet", "timm-vit", "open_clip-vit"],
)
def test_a_dual_encoder_says_the_same(vision, bert, finished_run, tmp_path, monkeypatch):
    from transformers import AutoProcessor, VisionTextDualEncoderModel

    student = fake_run(tmp_path / "run", finished_run, dual(bert, vision))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--format", "hf", "--out", str(out)]) == 0
    module = VisionTextDualEncoderModel.from_pretrained(out)
    assert_same(module, student)
    processor = AutoProcessor.from_pretrained(out)
    words = processor(
        text=["a red bird", "word " * 30], padding="max_length", truncation=True, return_tensors="pt"
    )
    assert torch.equal(words["input_ids"], student.tokenizer(["a red bird", "word " * 30]))
    assert str(bert) not in "".join(path.read_text() for path in out.glob("*.json"))
    run_code(out, monkeypatch)


@pytest.mark.parametrize(
    ("vision", "text", "reason"),
    [
        (
            timm_cfg("test_efficientnet"),
            {"hf_pooler_type": "mean_pooler"},
            "its text tower is pooled by MeanPooler",
        ),
        (timm_cfg("test_efficientnet", timm_proj="mlp"), {}, "the head of its image tower is no linear map"),
        (
            timm_cfg("test_efficientnet"),
            {"hf_proj_type": "mlp"},
            "the head of its text tower is no linear map",
        ),
    ],
)
def test_what_a_dual_encoder_cannot_say_is_refused(
    vision, text, reason, bert, finished_run, tmp_path, capsys
):
    fake_run(tmp_path / "run", finished_run, dual(bert, vision, **text))
    error = refused(capsys, tmp_path / "run", tmp_path / "out")
    assert f"error: transformers cannot express this student ({reason}" in error
    assert error.endswith("use --format open_clip")


# ----------------------------------------------------------------------------------------------------
# The model card


def code_of(card: str) -> str:
    """The first block of Python in a card."""
    return card.partition("```python\n")[2].partition("\n```")[0]


def run_code(folder, monkeypatch) -> dict:
    """Run a card's code beside its folder, with a picture there."""
    monkeypatch.chdir(folder.parent)
    Image.new("RGB", (40, 30), "red").save(folder.parent / "picture.jpg")
    found: dict = {}
    exec(code_of((folder / "README.md").read_text()), found)
    return found


def test_the_code_of_the_card_runs(exported, run, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "student")
    found = run_code(tmp_path / "student", monkeypatch)
    student = load_run(run)
    with torch.inference_mode():
        image = student.model.encode_image(student.picture.view(found["picture"])[None], normalize=True)
        text = student.model.encode_text(student.tokenizer(["a red bird"]), normalize=True)
    assert found["cosines"].item() == pytest.approx((image @ text.T).item(), abs=1e-4)


@pytest.mark.parametrize("form", ["open_clip", "hf"])
def test_the_card_says_what_the_run_was(finished_run, squares, tmp_path, form, capsys):
    import yaml

    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["eval", str(run), "--task", "zeroshot", "--data", str(squares), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    assert main(["export", str(run), "--format", form, "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == {"open_clip": "open_clip", "hf": "transformers"}[form]
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert {"clip", "distillation", "clip_kd"} <= set(front["tags"])
    facts = json.loads((run / "run.json").read_text())
    for words in (
        "CLIP-KD: An Empirical Study",
        "fd=2000.0",
        "task Task + crd CRD + fd FD + icl ICL",
        "squares; 48 rows",
        f"tiny, weights pretrained, sha256 {facts['teachers'][0]['digest'][:12]}",
        f"torch={facts['versions']['torch']}",
        "Steps: 4, batch 8, seed 0",
        "## zeroshot_classification on squares",
    ):
        assert words in card
    for name, value in metrics.items():
        assert f"| {name} | {'-' if value is None else value} |" in card
    assert str(squares.parent) not in card  # no folders of this machine


def test_what_users_wrote_cannot_break_the_card(finished_run):
    facts = json.loads((finished_run / "run.json").read_text())
    facts["run"]["data"] = "s3://a_b/*.tar,/home/me/my|photos\n# heading"
    facts["recipe"] |= {"name": 'x"\n- y', "paper": "A <b>paper</b> [x](y) `z`"}
    facts["teachers"] = []
    result = {"task": "t", "dataset": "a|b", "metrics": {"acc|1": 0.5, "none": None}}
    card = model_card(facts, [result], Exported("x", "print('```')", "x.load('{}')", []))
    for line in (
        "- Data: s3://a_b/\\*.tar, my\\|photos # heading; 48 rows",
        "- Teacher: none",
        '- "x\\"\\n- y"',
        "````python",
        "## t on a\\|b",
        "| acc\\|1 | 0.5 |",
        "| none | - |",
        "- Recipe: A \\<b\\>paper\\</b\\> \\[x\\](y) \\`z\\`",
    ):
        assert line in card
    assert "/home" not in card
    assert "# heading" not in [line.strip() for line in card.splitlines()]


def test_a_result_that_is_none(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "mine.json").write_text("[1]")
    assert f"error: {run / 'eval' / 'mine.json'} is not what `student eval` wrote" in refused(
        capsys, run, tmp_path / "out"
    )
