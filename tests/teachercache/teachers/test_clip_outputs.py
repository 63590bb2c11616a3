"""Patches and hidden layers of CLIP teachers, against Hugging Face's own CLIP and loops over the modules by hand."""

import copy
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from small import TINY_CFG, build_cache, make_folder, save_teacher
from torch import nn

from teachercache.cache import store
from teachercache.cache.spec import fingerprint, meta_from_dict, to_dict
from teachercache.core.errors import UserError
from teachercache.teachers.clip.folders import build_module
from teachercache.teachers.clip.layers import join_outputs, parse_outputs
from teachercache.teachers.clip.loading import make_teacher
from teachercache.teachers.clip.towers import pool_positions
from teachercache.teachers.registry import TEACHERS, load
from teachercache.teachers.teacher import Teacher
from teachercache.teachers.weights import digest_weights

ALL = ("embeddings", "patches", "hidden")
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def cfg(vision: dict | None = None, text: dict | None = None, **more) -> dict:
    return {"embed_dim": 24, "vision_cfg": VIT | (vision or {}), "text_cfg": TEXT | (text or {}), **more}


def timm_cfg(name: str, **vision) -> dict:
    return {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": name, "image_size": 224, **vision},
        "text_cfg": TEXT,
    }


def teacher_of(model_cfg: dict, outputs: tuple[str, ...] = ALL) -> Teacher:
    """A teacher whose every parameter is random, also those that open_clip starts at 0 or 1."""
    torch.manual_seed(0)
    module, preprocess = build_module(model_cfg, {"mean": [0.5] * 3, "std": [0.5] * 3})
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    return make_teacher("tiny", module, preprocess, tokenizer, weights="random:0", outputs=outputs)


def inputs_for(
    teacher: Teacher, rows: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(rows, 3, *teacher.spec.view["size"]).to(dtype)
    return {
        "image": images,
        "text": teacher.tokenize(["a cat", "two big dogs on a beach today and more", "x"]),
    }


def said(teacher: Teacher) -> dict[str, torch.Tensor]:
    """What the teacher says of the inputs, its shapes held against the fields that it lists, in their order."""
    with torch.no_grad():
        found = teacher.encode(teacher.module, inputs_for(teacher))
    assert {name: tuple(tensor.shape[1:]) for name, tensor in found.items()} == {
        field.name: field.shape for field in teacher.spec.fields
    }
    assert [*found] == [field.name for field in teacher.spec.fields]
    return found


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# ViT and its text tower against Hugging Face's CLIP with the same weights


def hugging_face(module: nn.Module) -> transformers.CLIPModel:
    """transformers.CLIPModel with the weights of an open_clip CLIP."""
    text = {
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    state = {}
    fixed = {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    }
    norms = {
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "ln_final.": "text_model.final_layer_norm.",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for name, tensor in module.state_dict().items():
        prefix = name.rpartition(".")[0] + "."
        if name in fixed:
            state[fixed[name]] = tensor
        elif prefix in norms:
            state[norms[prefix] + name.removeprefix(prefix)] = tensor
        elif name in ("visual.proj", "text_projection"):
            state["visual_projection.weight" if name[0] == "v" else "text_projection.weight"] = tensor.T
        else:
            tower, rest = name.split("transformer.resblocks.")
            number, rest = rest.split(".", 1)
            start = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            if "in_proj" in rest:
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{start}self_attn.{part}_proj.{rest.rpartition('_')[2]}"] = piece
            else:
                inside, _, leaf = rest.rpartition(".")
                state[f"{start}{inner[inside]}.{leaf}"] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return model


def test_vit_and_text_transformer_against_hugging_face():
    teacher = teacher_of(cfg(), ("embeddings", "patches", "hidden:0+1+2"))
    found = said(teacher)
    oracle = hugging_face(teacher.module)
    inputs = inputs_for(teacher)
    with torch.no_grad():
        vision = oracle.vision_model(pixel_values=inputs["image"], output_hidden_states=True)
        tokens = oracle.vision_model.post_layernorm(vision.last_hidden_state)
        words = oracle.text_model(input_ids=inputs["text"], output_hidden_states=True)
        projected = oracle.visual_projection(tokens)
    assert_same(found["image_emb"], projected[:, 0])  # the class token goes the way of the patches
    assert_same(found["patch_token"], tokens[:, 1:])
    assert_same(found["patch_emb"], projected[:, 1:])
    assert_same(found["text_emb"], oracle.text_projection(words.pooler_output))
    for layer in range(3):
        assert_same(found[f"image_hidden_{layer}"], vision.hidden_states[layer + 1][:, 0])
    end = inputs["text"].argmax(1)
    assert len(set(end.tolist())) == 3
    for layer in range(2):
        assert_same(found[f"text_hidden_{layer}"], words.hidden_states[layer + 1][torch.arange(3), end])
    assert "text_hidden_2" not in found  # the text tower has two


# ----------------------------------------------------------------------------------------------------
# Other picture towers


def blocks_by_hand(visual: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens [n, 1 + patches, width] before and after every block."""
    tokens = visual.conv1(images).flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(tokens), 1, -1)
    states = [visual.ln_pre(torch.cat([start, tokens], 1) + visual.positional_embedding)]
    for block in visual.transformer.resblocks:
        states.append(block(states[-1]))
    return states


@pytest.mark.parametrize("after", [False, True])
def test_vit_that_pools_by_the_mean(after):
    teacher = teacher_of(
        cfg({"pool_type": "avg", "final_ln_after_pool": after}), ("embeddings", "patches", "hidden:1")
    )
    found = said(teacher)
    visual = teacher.module.visual
    with torch.no_grad():
        states = blocks_by_hand(visual, inputs_for(teacher)["image"])
    assert_same(found["patch_token"], visual.ln_post(states[-1])[:, 1:])
    assert_same(found["patch_emb"], visual.ln_post(states[-1])[:, 1:] @ visual.proj)
    assert_same(found["image_hidden_1"], states[2][:, 1:].mean(1))
    if after:
        assert_same(found["image_emb"], visual.ln_post(states[-1][:, 1:].mean(1)) @ visual.proj)
    else:
        assert_same(found["image_emb"], found["patch_emb"].mean(1))


def test_attentional_pooler_has_tokens_and_no_projected_patches():
    vision = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}
    teacher = teacher_of(cfg(vision), ("patches", "hidden"))
    found = said(teacher)
    with torch.no_grad():
        last = blocks_by_hand(teacher.module.visual, inputs_for(teacher)["image"])[-1][:, 1:]
    assert_same(found["patch_token"], last)
    assert_same(found["image_hidden_2"], last.mean(1))
    assert set(found) == {"patch_token", "image_hidden_2", "text_hidden_1"}


def test_resnet_against_open_clips_own_attention(monkeypatch):
    """open_clip computes the pool's answer at every position and keeps the first: the others are patch_emb."""
    model_cfg = {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT}
    teacher = teacher_of(model_cfg, ("embeddings", "patches", "hidden:0+1+3"))
    found = said(teacher)
    answers = []
    true_attention = torch.nn.functional.multi_head_attention_forward
    own = open_clip.modified_resnet.F

    def spy(*args, **kwargs):
        answers.append(true_attention(*args, **kwargs))
        return answers[-1]

    visual, images = teacher.module.visual, inputs_for(teacher)["image"]
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(own, "multi_head_attention_forward", spy)
        embedding = visual(images)
        maps = [visual.layer1(visual.stem(images))]
        for layer in (visual.layer2, visual.layer3, visual.layer4):
            maps.append(layer(maps[-1]))
    [(answer, _)] = answers
    assert_same(found["image_emb"], embedding)
    assert_same(found["patch_emb"], answer[1:].transpose(0, 1))
    assert_same(pool_positions(visual.attnpool, found["patch_token"])[:, 0], embedding)
    assert found["patch_token"].shape == (3, 4, 256)
    assert_same(found["patch_token"][:, 1], maps[-1][:, :, 0, 1])  # row by row
    for layer in (0, 1, 3):
        assert_same(found[f"image_hidden_{layer}"], maps[layer].mean((2, 3)))
    assert {"text_hidden_0", "text_hidden_1"} <= set(found)


def test_timm_vit_that_ends_on_its_class_token():
    teacher = teacher_of(
        timm_cfg("vit_tiny_patch16_224", timm_pool="token", timm_proj="linear"), (*ALL[:2], "hidden:4")
    )
    found = said(teacher)
    visual, trunk = teacher.module.visual, teacher.module.visual.trunk
    with torch.no_grad():
        images = inputs_for(teacher)["image"]
        tokens = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
        states = [tokens := block(tokens) for block in trunk.blocks]
        projected = trunk.norm(states[-1]) @ visual.head.proj.weight.T
    assert_same(found["image_emb"], projected[:, 0])
    assert_same(found["patch_emb"], projected[:, 1:])
    assert_same(found["patch_token"], trunk.norm(states[-1])[:, 1:])
    assert_same(found["image_hidden_4"], states[4][:, 0])


def test_timm_vit_with_an_attention_pool_has_tokens_alone():
    teacher = teacher_of(timm_cfg("vit_tiny_patch16_224", timm_pool="map", timm_proj="none"), ALL)
    found = said(teacher)
    assert set(found) == {"image_emb", "patch_token", "image_hidden_11", "text_emb", "text_hidden_1"}
    assert found["patch_token"].shape == (3, 196, 192)
    with torch.no_grad():
        assert_same(found["image_emb"], teacher.module.encode_image(inputs_for(teacher)["image"]))


@pytest.mark.parametrize(
    ("name", "width"), [("convnext_atto", 320), ("swin_s3_tiny_224", 768), ("resnet18", 512)]
)
def test_timm_feature_maps(name, width):
    """Pooled by the mean: under a head without norm the mean of the patches is the embedding."""
    teacher = teacher_of(timm_cfg(name, timm_proj="linear"), (*ALL[:2], "hidden:0+3"))
    found = said(teacher)
    trunk, images = teacher.module.visual.trunk, inputs_for(teacher)["image"]
    with torch.no_grad():
        assert_same(found["image_emb"], teacher.module.encode_image(images))
        last = trunk.forward_features(images)
        last = last.permute(0, 3, 1, 2) if name.startswith("swin") else last
        assert_same(found["patch_token"][:, 9], last[:, :, 1, 2])  # 7 across
        assert found["patch_token"].shape == (3, 49, width)
        levels = trunk.forward_intermediates(images, indices=4, intermediates_only=True, norm=False)
    assert_same(found["image_hidden_0"], levels[0].mean((2, 3)))
    assert_same(found["image_hidden_3"], levels[3].mean((2, 3)))
    if name == "resnet18":
        assert_same(found["patch_emb"].mean(1), found["image_emb"])


def test_clip_lite_puts_each_position_through_its_head():
    from teachercache.teachers.clip.lite import PREPROCESS, model_cfg, towers

    teacher = load("clip-lite-towers", outputs=("embeddings", "patches", "hidden:6"))
    found = said(teacher)
    assert found["patch_token"].shape == (3, 49, 1280)
    assert_same(found["patch_token"].mean(1), found["image_emb"])
    assert_same(found["patch_emb"], found["patch_token"])  # its head is the identity
    assert model_cfg("")["vision_cfg"]["timm_proj"] == "linear"
    module, preprocess = towers()
    whole = make_teacher(
        "lite", module, preprocess, teacher.tokenize, weights="", outputs=("embeddings", "patches")
    )
    assert preprocess["mean"] == PREPROCESS["mean"]
    again = said(whole)
    with torch.no_grad():
        assert_same(again["patch_emb"], module.visual.head(found["patch_token"]))
    assert_same(again["patch_emb"].mean(1), again["image_emb"])  # a linear head after a mean
    # the text tower: masked mean over the block before the last
    ids = inputs_for(teacher)["text"]
    mask = (ids != 0).long()
    with torch.no_grad():
        last = module.text.transformer(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states[6]
        masked = [last[i][mask[i].bool()].mean(0) for i in range(len(ids))]
    assert not mask.all()
    assert "text_hidden_6" not in found  # MiniLM has six blocks
    deep = load("clip-lite-towers", outputs=("hidden:5",))
    assert_same(said(deep)["text_hidden_5"], torch.stack(masked))


def test_padding_at_the_end_is_not_computed():
    teacher = load("clip-lite-towers")
    ids = teacher.tokenize(["a bird", "a bird on a branch of an old tree"])
    lengths = []
    hook = teacher.module.text.transformer.register_forward_pre_hook(
        lambda _, __, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        short = teacher.encode(teacher.module, {"text": ids})["text_emb"]
        whole = teacher.module.encode_text(ids)
    hook.remove()
    assert lengths == [11, 32]  # nine words, [CLS] and [SEP]
    assert_same(short, whole)


# ----------------------------------------------------------------------------------------------------
# Other text towers


@pytest.mark.parametrize(
    ("text", "place", "custom"),
    [
        ({"pool_type": "last", "no_causal_mask": True}, lambda ids: torch.full((3,), 7), True),  # SigLIP
        ({"pool_type": "last", "no_causal_mask": True}, lambda ids: torch.full((3,), 7), False),  # CLIPA
        ({"pool_type": "first", "no_causal_mask": True}, lambda ids: torch.zeros(3, dtype=torch.long), False),
        ({"pool_type": "eos", "eos_id": 49407}, lambda ids: (ids == 49407).int().argmax(1), False),
        ({"pool_type": "eos", "eos_id": 49407}, lambda ids: (ids == 49407).int().argmax(1), True),
        ({"embed_cls": True}, lambda ids: torch.full((3,), 8), True),  # CoCa appends a class token
    ],
    ids=["last", "last-unpacked", "first", "eos-unpacked", "eos", "class"],
)
def test_text_towers_are_read_where_they_pool(text, place, custom):
    teacher = teacher_of(cfg(text=text, custom_text=custom), ("embeddings", "hidden:0+1"))
    found = said(teacher)
    tower = teacher.module.text if custom else teacher.module
    seen = []
    handle = tower.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        ids = inputs_for(teacher)["text"]
        assert_same(found["text_emb"], teacher.module.encode_text(ids))
    handle.remove()
    assert_same(found["text_hidden_1"], seen[0][torch.arange(3), place(ids)])
    with torch.no_grad():  # the embedding is read at this token
        assert_same(found["text_emb"], tower.ln_final(found["text_hidden_1"]) @ tower.text_projection)


HUGGING_FACE = {
    "bert": (
        {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 49408,
            "pad_token_id": 0,
        },
        "mean_pooler",
    ),
    "bert-cls": (
        {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 49408,
            "pad_token_id": 0,
        },
        "cls_last_hidden_state_pooler",
    ),
    "xlm-roberta": (
        {
            "model_type": "xlm-roberta",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "vocab_size": 49408,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "pad_token_id": 0,
        },
        "mean_pooler",
    ),
    "mt5": (
        {
            "model_type": "mt5",
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 3,
            "num_heads": 2,
            "vocab_size": 49408,
            "pad_token_id": 0,
            "is_encoder_decoder": True,
            "decoder_start_token_id": 0,
        },
        "mean_pooler",
    ),
    "m2m_100": (
        {
            "model_type": "m2m_100",
            "d_model": 16,
            "encoder_layers": 3,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "vocab_size": 49408,
            "pad_token_id": 0,
        },
        "cls_last_hidden_state_pooler",
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_text_towers(name, tmp_path):
    config, pooler = HUGGING_FACE[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = {
        "hf_model_name": str(tmp_path),
        "hf_pooler_type": pooler,
        "hf_proj_type": "linear",
        "context_length": 8,
    }
    model_cfg = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": text, "custom_text": True}
    teacher = teacher_of(model_cfg, ("embeddings", "hidden:0+1"))
    found = said(teacher)
    ids = inputs_for(teacher)["text"]
    mask = (ids != 0).long()
    with torch.no_grad():
        states = teacher.module.text.transformer(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        )
        assert_same(found["text_emb"], teacher.module.encode_text(ids))
    for layer in (0, 1):
        state = states.hidden_states[layer + 1]
        expected = [row[keep.bool()].mean(0) for row, keep in zip(state, mask, strict=True)]
        assert_same(found[f"text_hidden_{layer}"], state[:, 0] if "cls" in pooler else torch.stack(expected))


def test_coca_is_not_normalised_though_it_would_normalise():
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    vision = VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    module = open_clip.CoCa(24, decoder, text, vision)
    preprocess = teacher_of(cfg(), ("embeddings",)).spec.view
    teacher = make_teacher(
        "coca",
        module,
        preprocess,
        open_clip.SimpleTokenizer(context_length=8),
        weights="random:0",
        outputs=ALL,
    )
    found = said(teacher)
    assert set(found) == {"image_emb", "patch_token", "image_hidden_2", "text_emb", "text_hidden_1"}
    for name, own in (("image_emb", module.encode_image), ("text_emb", module.encode_text)):
        inputs = inputs_for(teacher)[name.removesuffix("_emb")]
        assert (found[name].norm(dim=1) - 1).abs().min() > 1e-2
        assert_same(nn.functional.normalize(found[name], dim=1), own(inputs).detach())


# ----------------------------------------------------------------------------------------------------
# One pass, gradients, precision, no state


TOWERS = {
    "vit": cfg(),
    "resnet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT},
    "timm": timm_cfg("resnet18", timm_proj="mlp"),
}


@pytest.fixture(params=TOWERS)
def teacher(request) -> Teacher:
    return teacher_of(TOWERS[request.param], ("embeddings", "patches", "hidden:0+1"))


def test_every_block_runs_once(teacher):
    visual = teacher.module.visual
    trunk = getattr(visual, "trunk", visual)
    blocks = (
        trunk.transformer.resblocks
        if hasattr(trunk, "transformer")
        else [trunk.conv1, trunk.layer1, trunk.layer4]
    )
    runs = []
    for module in (*blocks, *teacher.module.transformer.resblocks):
        module.register_forward_hook(lambda module, inputs, output: runs.append(id(module)))
    said(teacher)
    assert len(runs) == len(set(runs)) == len(blocks) + 2


def test_gradients_flow_from_every_field_to_the_picture_or_the_tokens(teacher):
    module, inputs = teacher.module, inputs_for(teacher)
    inputs["image"].requires_grad_()
    module.token_embedding.weight.requires_grad_()
    found = teacher.encode(module, inputs)
    assert {"image_emb", "patch_token", "patch_emb", "image_hidden_0", "text_hidden_0"} < set(found)
    for name, tensor in found.items():
        source = module.token_embedding.weight if name.startswith("text") else inputs["image"]
        (gradient,) = torch.autograd.grad(tensor.square().sum(), source, retain_graph=True)
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(teacher, dtype):
    """As `tc build` moves it: the same fields, near to those of float32."""
    exact = said(teacher)
    module = copy.deepcopy(teacher.module).to(dtype).to(memory_format=torch.channels_last)
    inputs = inputs_for(teacher, dtype=dtype)
    with torch.inference_mode():
        found = teacher.encode(module, inputs)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        cosine = nn.functional.cosine_similarity(tensor.float().flatten(1), exact[name].flatten(1))
        assert cosine.min() > 0.99, name


def test_a_call_leaves_nothing_behind(teacher):
    before = digest_weights(teacher.module)
    found = said(teacher)
    kept = [weakref.ref(tensor) for tensor in found.values()]
    assert all(not module._forward_hooks for module in teacher.module.modules())
    del found
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert digest_weights(teacher.module) == before == teacher.spec.digest


def test_hooks_go_when_the_tower_fails(teacher):
    with pytest.raises(RuntimeError):
        teacher.encode(teacher.module, {"image": torch.zeros(1, 3, 64, 64, dtype=torch.float64)})
    assert all(not module._forward_hooks for module in teacher.module.modules())


# ----------------------------------------------------------------------------------------------------
# What can be asked for


def test_outputs_of_a_folder_and_their_fields(teacher_folder):
    plain = load(str(teacher_folder))
    assert [field.name for field in plain.spec.fields] == ["image_emb", "text_emb"]
    assert plain.spec.outputs == ("embeddings",)
    whole = load(str(teacher_folder), outputs=("hidden:0", "patches", "embeddings"))
    assert whole.spec.outputs == ("embeddings", "patches", "hidden:0")
    assert {field.name: (field.per, field.shape) for field in whole.spec.fields} == {
        "image_emb": ("image", (16,)),
        "patch_token": ("image", (4, 32)),
        "patch_emb": ("image", (4, 16)),
        "image_hidden_0": ("image", (32,)),
        "text_emb": ("text", (16,)),
        "text_hidden_0": ("text", (16,)),
    }
    assert whole.spec.digest == plain.spec.digest
    assert all(field.doc and len(field.doc) < 130 for field in whole.spec.fields)
    assert "class token after block 0" in whole.spec.field("image_hidden_0").doc
    assert "EOT token" in whole.spec.field("text_hidden_0").doc


def test_one_request_is_written_in_one_way():
    assert join_outputs(parse_outputs(("hidden:11+3+3", "embeddings"))) == ("embeddings", "hidden:3+11")
    assert parse_outputs(("hidden",)) == {"hidden": ()}
    assert join_outputs(parse_outputs(ALL)) == ALL


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (
            ("hidden:1",),
            "has no layer 1: --outputs hidden:LAYER+LAYER takes 0 to 0 (picture tower) and 0 to 0 (text",
        ),
        (("hidden:",), "hidden takes layers, hidden:3+7"),
        (("hidden:-1",), "hidden takes layers, hidden:3+7"),
        (("hidden:0+",), "hidden takes layers, hidden:3+7"),
        (("patches:3",), "--outputs patches:3: choose from embeddings, patches, hidden"),
        (("hidden", "hidden:0"), "--outputs names hidden twice"),
        (("hidden:0", "1"), "has no output '1': choose from embeddings, patches, hidden"),
        ((), "--outputs names nothing"),
    ],
)
def test_outputs_that_cannot_be(teacher_folder, outputs, says):
    with pytest.raises(UserError) as error:
        load(str(teacher_folder), outputs=outputs)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_every_clip_in_the_table_offers_them():
    assert all(
        entry.outputs == (*ALL, "tokens", "random_tokens")
        for name, entry in TEACHERS.items()
        if name.startswith("clip")
    )


def test_a_cache_holds_what_was_asked(tmp_path):
    """Texts are in the data, their tower is not run; the spec comes back from disk as it was."""
    folder = save_teacher(tmp_path / "teacher", TINY_CFG)
    data = make_folder(tmp_path / "data", 12)
    for outputs in (("patches", "hidden:0"), ("patches",)):
        out = tmp_path / f"{len(outputs)}.zarr"
        teacher = load(str(folder), outputs=outputs)
        cache = store.open_complete(build_cache(data, folder, out, outputs=outputs))
        assert cache.meta.spec.outputs == outputs
        assert fingerprint(meta_from_dict(to_dict(cache.meta))) == fingerprint(cache.meta)
        assert cache.meta.spec.fields == teacher.spec.fields
        assert ("text_hidden_0" in cache.fields) == (len(outputs) == 2)
        images = [teacher.view(picture) for picture in pictures(data)]
        with torch.no_grad():
            expected = teacher.encode(teacher.module, {"image": torch.stack(images)})
        for name, tensor in expected.items():
            np.testing.assert_allclose(store.read_field(cache, name), tensor.numpy(), rtol=2e-3, atol=2e-3)


def pictures(data: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(data.rglob("*.png"))]
