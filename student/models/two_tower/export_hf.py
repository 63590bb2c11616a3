"""Convert a student to transformers' CLIPModel or VisionTextDualEncoderModel.

A student with a Hugging Face text tower becomes a dual encoder.
open_clip's ViT and text transformer match CLIPModel's under other names. A dual encoder applies a linear
projection without bias to each tower's pooled output; other heads and poolings raise a UserError. The weights
are converted exactly. The preprocessing may differ, and `notes` lists how: CLIPImageProcessor stretches a
picture that open_clip would pad to a square.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.hf_model import ClsPooler, HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from student.models.two_tower.hf_tokenizer import clip_tokenizer
from student.models.two_tower.model import ClipModel, TwoTower
from teachercache.core.errors import UserError
from teachercache.core.progress import quiet_transformers
from teachercache.data.views import describe_view

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, VisionTextDualEncoderModel

BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}


def write(student: TwoTower, folder: Path) -> list[str]:
    """Write config.json, model.safetensors and the processor's files.

    Returns:
        Differences between the processor and the student's preprocessing, one line each.

    Raises:
        UserError: transformers cannot express the student.
    """
    from transformers import CLIPProcessor, VisionTextDualEncoderProcessor

    dual = _is_dual(student)
    with quiet_transformers():
        module = dual_encoder(student.model, student.model_cfg) if dual else clip_model(student.model)
        tokenizer = student.tokenizer.tokenizer if dual else clip_tokenizer(student.tokenizer, folder)
        processor = VisionTextDualEncoderProcessor if dual else CLIPProcessor
        module.save_pretrained(folder)
        pixels = image_processor(describe_view(student.preprocess))
        pixels.save_pretrained(folder)  # preprocessor_config.json, which older versions look for
        processor(pixels, tokenizer).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    length = {"model_max_length": student.tokenizer.context_length}
    # CLIPTokenizer ignores our normalizer
    tokenizer_class = {} if dual else {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config | length | tokenizer_class, indent=2) + "\n")
    return notes(student)


def load(folder: Path) -> Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]:
    """Load a folder of `write` with `from_pretrained`.

    Returns:
        A function of pixels and texts that returns their raw embeddings.
    """
    from transformers import AutoModel, AutoTokenizer

    with quiet_transformers():
        module = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        text = module.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])[1]
        return module.visual_projection(module.vision_model(pixels)[1]), module.text_projection(text)

    return encode


def usage(student: TwoTower, folder: str) -> str:
    """Return the code that loads the folder and, if needed, pads pictures to squares."""
    model = "VisionTextDualEncoderModel" if _is_dual(student) else "CLIPModel"
    square = _square(describe_view(student.preprocess))
    lines = [
        "from PIL import Image, ImageOps" if square else "from PIL import Image",
        f"from transformers import AutoProcessor, {model}",
        "",
        f'model = {model}.from_pretrained("{folder}")',
        f'processor = AutoProcessor.from_pretrained("{folder}", backend="pil")  # pixels as in training, to the bit',
        'picture = Image.open("picture.jpg").convert("RGB")',
        *([f"picture = {square}"] if square else []),
        'inputs = processor(images=[picture], text=["a red bird"], padding=True, truncation=True, return_tensors="pt")',
        "cosines = model(**inputs).logits_per_image / model.logit_scale.exp()",
    ]
    return "\n".join(lines)


def notes(student: TwoTower) -> list[str]:
    """Return the differences between the processor and the student's preprocessing, one line each."""
    view = describe_view(student.preprocess)
    height, width = view["size"]
    if view["resize_mode"] == "longest":
        view_text = "padded to squares: pad them first with ImageOps.pad"
    elif view["resize_mode"] in (None, "shortest") and height != width:
        view_text = "cropped at the center: crop them first"
    else:
        return []
    return [
        f"The processor stretches pictures to {height} x {width}, the student was trained on pictures {view_text}."
    ]


def _square(view: Mapping[str, Any]) -> str:
    """Return code for resize_mode `longest`, or ""; an odd row of padding goes to the bottom."""
    if view["resize_mode"] != "longest":
        return ""
    height, width = view["size"]
    filter_name = "BILINEAR" if view["interpolation"] == "bilinear" else "BICUBIC"
    color = ", ".join([str(view["fill_color"] or 0)] * 3)
    return f"ImageOps.pad(picture, ({width}, {height}), Image.{filter_name}, ({color}), centering=(0.4999, 0.4999))"


def image_processor(view: Mapping[str, Any]) -> "CLIPImageProcessor":
    """Return the CLIPImageProcessor closest to a view; pixels of square pictures are equal."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    height, width = view["size"]
    bilinear = view["interpolation"] == "bilinear"
    options = {
        "image_mean": view["mean"],
        "image_std": view["std"],
        "resample": int(Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC),
    }
    size = {"height": height, "width": width}
    if view["resize_mode"] in (None, "shortest") and height == width:
        return CLIPImageProcessor(
            size={"shortest_edge": height}, crop_size=size, do_center_crop=True, **options
        )
    return CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, **options)


def _is_dual(student: TwoTower) -> bool:
    """Return whether the text tower is a transformers model."""
    return isinstance(getattr(student.model, "text", None), HFTextEncoder)


# ----------------------------------------------------------------------------------------------------
# Modules


def clip_model(model: ClipModel) -> "CLIPModel":
    """Return a CLIPModel with the weights of open_clip's CLIP."""
    from transformers import CLIPConfig, CLIPModel

    if not isinstance(model, open_clip.CLIP):
        raise refusal(f"its towers are open_clip's {type(model).__name__}")
    width, eos = model.visual.output_dim, model.vocab_size - 1  # open_clip pools at the largest id
    text = {
        **_tower(model.transformer, model.ln_final),
        "vocab_size": model.vocab_size,
        "projection_dim": width,
        "max_position_embeddings": model.positional_embedding.shape[0],
        "bos_token_id": eos - 1,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=_vision_config(model.visual),
        projection_dim=width,
        logit_scale_init_value=model.logit_scale.item(),
    )
    state = _state(model)
    words = {name: value for name, value in state.items() if not name.startswith("visual.")}
    projection, logit_scale = words.pop("text_projection"), words.pop("logit_scale")
    tensors = {f"text_model.{name}": value for name, value in renamed(words, TEXT).items()}
    tensors |= {f"vision_model.{name}": value for name, value in _vision_state(state).items()}
    tensors |= {"logit_scale": logit_scale, "text_projection.weight": projection.T.contiguous()}
    tensors |= {"visual_projection.weight": state["visual.proj"].T.contiguous()}
    return _filled(CLIPModel(config), tensors)


def dual_encoder(model: ClipModel, model_cfg: Mapping[str, Any]) -> "VisionTextDualEncoderModel":
    """Return a dual encoder of a Hugging Face text tower and a timm tower or open_clip's ViT."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    text = model.text
    if not isinstance(text.pooler, ClsPooler):
        raise refusal(f"its text tower is pooled by {type(text.pooler).__name__}")
    text_projection = _linear(text.proj, "text", text.transformer.config.hidden_size)
    vision, visual_projection = _dual_vision(model.visual, model_cfg["vision_cfg"])
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config,
        text.transformer.config,
        projection_dim=text_projection.shape[0],
        logit_scale_init_value=model.logit_scale.item(),
    )
    config.text_config.name_or_path = ""  # the path that it was loaded from
    joined = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text.transformer)
    with torch.no_grad():
        joined.visual_projection.weight.copy_(visual_projection)
        joined.text_projection.weight.copy_(text_projection)
        joined.logit_scale.copy_(model.logit_scale.reshape(()))
    return joined.eval()


def _dual_vision(visual: Any, cfg: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Return the image tower as a transformers model, and its projection [dim, width]."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, TimmWrapperConfig, TimmWrapperModel

    if isinstance(visual, TimmModel):
        heads = list(visual.head.named_children())
        head = heads[-1][1] if [name for name, _ in heads] == ["drop", "proj"] else visual.head
        projection = _linear(head, "image", visual.trunk.num_features)
        pool = cfg.get("timm_pool", "avg")
        options: dict[str, Any] = {
            "architecture": cfg["timm_model_name"],
            "hidden_size": visual.trunk.num_features,
            "model_args": {"global_pool": pool} if pool else {},
        }
        tensors = {f"timm_model.{name}": value for name, value in visual.trunk.state_dict().items()}
        return _filled(TimmWrapperModel(TimmWrapperConfig(**options)), tensors), projection
    module = CLIPVisionModel(CLIPVisionConfig(**_vision_config(visual)))
    inner = getattr(module, "vision_model", module)  # a wrapper in older versions
    _filled(inner, _vision_state({f"visual.{name}": value for name, value in visual.state_dict().items()}))
    return module, visual.proj.detach().T


def _linear(module: nn.Module, tower: str, width: int) -> Tensor:
    """Return the matrix of a head that is a linear map without bias; UserError for other heads."""
    if isinstance(module, nn.Identity):
        return torch.eye(width)
    if not isinstance(module, nn.Linear) or module.bias is not None:
        raise refusal(f"the head of its {tower} tower is no linear map without bias")
    return module.weight.detach()


def _vision_config(visual: Any) -> dict[str, Any]:
    """Return the values of a CLIPVisionConfig for open_clip's ViT."""
    if not isinstance(visual, VisionTransformer):
        raise refusal(f"its image tower is open_clip's {type(visual).__name__}")
    height, width = visual.image_size
    if height != width or visual.patch_size[0] != visual.patch_size[1]:
        raise refusal(f"its pictures or patches are not square ({height} x {width})")
    return {
        **_tower(visual.transformer, visual.ln_post),
        "image_size": height,
        "patch_size": visual.patch_size[0],
        "projection_dim": visual.output_dim,
    }


def _tower(transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    """Return the values that the configurations of both towers have in common."""
    block = transformer.resblocks[0]
    activation = block.mlp.gelu
    tanh = getattr(activation, "approximate", "none") == "tanh"
    names = {QuickGELU: "quick_gelu", nn.GELU: "gelu_pytorch_tanh" if tanh else "gelu"}
    if type(activation) not in names:
        raise refusal(f"its blocks use {type(activation).__name__}")
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": names[type(activation)],
        "layer_norm_eps": norm.eps,
    }


def _state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().float() for name, value in model.state_dict().items()}


def _vision_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower's tensors under CLIPVisionModel's names, without the projection."""
    tensors = {
        name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")
    }
    return renamed({name: value for name, value in tensors.items() if name != "proj"}, VISION)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return an open_clip tower's tensors under transformers' names, with q, k and v split."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, table, rest = "", names, name
        if name.startswith("transformer.resblocks."):
            layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            prefix, table = f"encoder.layers.{layer}.", BLOCK
        module, _, kind = rest.rpartition(".")
        if module == "attn" and kind.startswith("in_proj_"):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                tensors[f"{prefix}self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = (
                    third.contiguous()
                )
        elif rest in table:
            tensors[prefix + table[rest]] = tensor
        elif module in table:
            tensors[f"{prefix}{table[module]}.{kind}"] = tensor
        else:
            raise refusal(f"CLIPModel has no place for its {name}")
    return tensors


def _filled(module: Any, state: Mapping[str, Tensor]) -> Any:
    """Load exactly these tensors into a module; UserError if they do not match."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise refusal(" ".join(str(error).split())[:160]) from error
    return module.eval()


def refusal(reason: str) -> UserError:
    """Return the error for a student that transformers cannot express."""
    return UserError(f"transformers cannot express this student ({reason}): use --format open_clip")
