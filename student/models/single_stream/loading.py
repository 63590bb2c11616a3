"""Where a single-stream student starts: from scratch, a BERT folder, a released UNITER checkpoint, or one of our runs.

Only safetensors and weights_only loading. Not for what the student computes: see `single_stream`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig

from student.models.single_stream.model import SECOND, Shape, SingleStream, parse_model
from student.models.single_stream.tokenizer import load_tokenizer
from student.models.single_stream.villa import Perturbation
from teachercache.core.errors import UserError
from teachercache.core.progress import say

# A released UNITER checkpoint's names -> ours; what is not here (its heads) stays behind
UNITER = (
    (r"^(?:uniter|bert)\.embeddings\.", "bert.embeddings."),
    (r"^(?:uniter|bert)\.encoder\.", "bert.encoder."),
    (r"^(?:uniter|bert)\.pooler\.", "bert.pooler."),
    (r"^(?:uniter|bert)\.img_embeddings\.", "regions."),
)
OLD = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
)  # BERT's first checkpoints


def open_student(
    name: str, init: str, shape: Shape, *, tokenizer: Any, perturbation: Perturbation, max_text: int
) -> SingleStream:
    """The student called `name`, begun from `init`; what came from there is said."""
    face, sizes = parse_model(name)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), type_vocab_size=3, max_position_embeddings=512, **sizes
    )
    path = Path(init)
    if init and (path / "config.json").exists():
        config = _bert_config(path, sizes, name)
    if max_text + 1 > config.max_position_embeddings:
        raise UserError(
            f"--set max_text={max_text}: {name} has {config.max_position_embeddings} positions at most"
        )
    student = SingleStream(config, shape, perturbation if face == "villa" else None)
    if init:
        load_into(student, read_state(path), init)
    return student


def _bert_config(folder: Path, sizes: Mapping[str, int], name: str) -> BertConfig:
    """The folder's configuration, with token types for words, pictures and second parts."""
    config = BertConfig.from_dict(json.loads((folder / "config.json").read_text()))
    if config.hidden_size != sizes["hidden_size"] or config.num_hidden_layers != sizes["num_hidden_layers"]:
        raise UserError(
            f"--set init={folder} is a BERT of {config.num_hidden_layers} layers of width {config.hidden_size}, {name} "
            f"has {sizes['num_hidden_layers']} of {sizes['hidden_size']}: pass another --set model"
        )
    config.type_vocab_size = 3
    return config


def init_tokenizer(init: str) -> Any:
    """The tokenizer that belongs to `init`: of a folder its own, of a file the one beside it."""
    path = Path(init)
    if not path.exists():
        raise UserError(
            f"--set init={init} is not there: pass a BERT folder, a UNITER checkpoint (.pt) or a run"
        )
    return load_tokenizer(path if path.is_dir() else path.parent)


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a run, of a BERT folder, or of a UNITER checkpoint, under our names."""
    files = [path] if path.is_file() else [path / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise UserError(f"--set init={path}: it has no {files[0].name}")
    try:
        safe = found.suffix == ".safetensors"
        state = load_file(found) if safe else torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or ["?"])[0][:120]
        raise UserError(f"--set init={path}: {found.name} cannot be loaded: {reason}") from error
    if (path / "run.json").exists():
        return state
    return renamed(state.get("model_state", state))  # UNITER's second-stage VCR checkpoints have it inside


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's or UNITER's tensors under our names; heads and what we do not have are left out."""
    found = {}
    bare = not any(
        name.startswith(("bert.", "uniter.")) for name in state
    )  # BertModel's own, without a prefix
    for name, tensor in state.items():
        for old, new in OLD:
            name = name.replace(old, new)
        name = f"bert.{name}" if bare else name
        for pattern, ours in UNITER:
            if re.match(pattern, name):
                found[re.sub(pattern, ours, name)] = tensor
    return found


def load_into(student: SingleStream, state: dict[str, Tensor], init: str) -> None:
    """Copy what fits and say what does not; UserError where nothing of BERT does."""
    own = student.state_dict()
    kinds = "bert.embeddings.token_type_embeddings.weight"
    if kinds in state:
        state[kinds] = state[kinds][
            : len(own[kinds])
        ]  # UNITER's of VCR has four: words, picture, answer, rationale
    if kinds in state and len(state[kinds]) < len(own[kinds]):
        rows = state[kinds]
        state[kinds] = torch.cat([rows, rows[-1:].expand(len(own[kinds]) - len(rows), -1)])
        state[kinds][SECOND] = rows[0]  # a second part starts as the text that it is
    fitting = {
        name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape
    }
    if not any(name.startswith("bert.encoder.") for name in fitting):
        raise UserError(f"--set init={init} has no BERT in it that fits --set model: is it of another size?")
    student.load_state_dict(fitting, strict=False)
    if student.shape.face == "vl-bert" and not any(name.startswith("regions.") for name in fitting):
        for norm in (student.regions.word_norm, student.regions.region_norm):
            torch.nn.init.zeros_(norm.weight)  # a BERT knows no pictures
    new = sorted({name.rpartition(".")[0] for name in own if name not in fitting})
    say(
        f"init {init}: {len(fitting)} of {len(own)} tensors; new: {', '.join(new[:8]) or 'none'}"
        + (f" and {len(new) - 8} more" if len(new) > 8 else "")
    )
