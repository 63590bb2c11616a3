"""Build a single-stream student: from scratch, a BERT folder, a released UNITER checkpoint, or a run.

Weights are read from safetensors files or with torch's `weights_only`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig

from student.models.single_stream.model import SECOND, Shape, SingleStream, parse_model
from student.models.single_stream.regions import VlBertRegions
from student.models.single_stream.tokenizer import load_tokenizer
from student.models.single_stream.villa import Perturbation
from teachercache.core.digests import names_to_load, refuse_damage
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.teachers.allowed import check_folder, read_config

# Names in a released UNITER checkpoint -> our names; tensors without an entry (its heads) are skipped
UNITER = (
    (r"^(?:uniter|bert)\.embeddings\.", "bert.embeddings."),
    (r"^(?:uniter|bert)\.encoder\.", "bert.encoder."),
    (r"^(?:uniter|bert)\.pooler\.", "bert.pooler."),
    (r"^(?:uniter|bert)\.img_embeddings\.", "regions."),
)
# Names in BERT's first checkpoints
OLD = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def open_student(
    name: str, init: str, shape: Shape, *, tokenizer: Tokenizer, perturbation: Perturbation, max_text: int
) -> SingleStream:
    """Build a student by name and print which tensors it takes from `init`.

    Args:
        name: A model name such as `vl-bert-tiny`.
        init: A BERT folder, a UNITER checkpoint or a run; "" for random weights.
        shape: The task's sizes.
        tokenizer: The tokenizer, for the size of its vocabulary.
        perturbation: VILLA's constants, used if the model is a VILLA.
        max_text: Sub-words per text, at most.
    """
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
    """Return the folder's configuration, with token types for first parts, pictures and second parts."""
    check_folder(folder)
    config = BertConfig.from_dict(read_config(folder / "config.json"))
    if config.hidden_size != sizes["hidden_size"] or config.num_hidden_layers != sizes["num_hidden_layers"]:
        raise UserError(
            f"--set init={folder} is a BERT of {config.num_hidden_layers} layers of width {config.hidden_size}, {name} "
            f"has {sizes['num_hidden_layers']} of {sizes['hidden_size']}: pass another --set model"
        )
    config.type_vocab_size = 3
    return config


def init_tokenizer(init: str) -> Tokenizer:
    """Load the tokenizer of `init`: the one in a folder, or the one beside a checkpoint file."""
    path = Path(init)
    if not path.exists():
        raise UserError(
            f"--set init={init} is not there: pass a BERT folder, a UNITER checkpoint (.pt) or a run"
        )
    return load_tokenizer(path if path.is_dir() else path.parent)


def read_state(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a run, a BERT folder or a UNITER checkpoint under our names."""
    files = [path] if path.is_file() else [path / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UserError(f"--set init={path}: it has no {files[0].name}")
    if path.is_dir():
        refuse_damage(path, names_to_load(path), "copy the folder again from where it is whole")
    try:
        safe = file.suffix == ".safetensors"
        state: dict[str, Any] = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        reason = (str(error).splitlines() or ["?"])[0][:120]
        raise UserError(f"--set init={path}: {file.name} cannot be loaded: {reason}") from error
    if (path / "run.json").exists():
        return state
    # UNITER's second-stage VCR checkpoints nest the tensors
    return renamed(state.get("model_state", state))


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a BERT or UNITER under our names, without heads and unknown tensors."""
    renamed_state = {}
    bare = not any(name.startswith(("bert.", "uniter.")) for name in state)  # a BertModel, without a prefix
    for name, tensor in state.items():
        for old, new in OLD:
            name = name.replace(old, new)
        name = f"bert.{name}" if bare else name
        for pattern, ours in UNITER:
            if re.match(pattern, name):
                renamed_state[re.sub(pattern, ours, name)] = tensor
    return renamed_state


def load_into(student: SingleStream, state: dict[str, Tensor], init: str) -> None:
    """Copy the tensors that fit into a student and print which are new.

    Raises:
        UserError: No tensor of BERT's encoder fits.
    """
    target = student.state_dict()
    token_types = "bert.embeddings.token_type_embeddings.weight"
    if token_types in state:
        # UNITER's VCR checkpoints have four: words, picture, answer, rationale
        state[token_types] = state[token_types][: len(target[token_types])]
    if token_types in state and len(state[token_types]) < len(target[token_types]):
        rows = state[token_types]
        state[token_types] = torch.cat([rows, rows[-1:].expand(len(target[token_types]) - len(rows), -1)])
        state[token_types][SECOND] = rows[0]  # second parts are text, as first parts are
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name in target and target[name].shape == tensor.shape
    }
    if not any(name.startswith("bert.encoder.") for name in fitting):
        raise UserError(f"--set init={init} has no BERT in it that fits --set model: is it of another size?")
    student.load_state_dict(fitting, strict=False)
    if student.shape.face == "vl-bert" and not any(name.startswith("regions.") for name in fitting):
        regions = student.regions
        assert isinstance(regions, VlBertRegions)
        for norm in (regions.word_norm, regions.region_norm):
            torch.nn.init.zeros_(norm.weight)  # a BERT was trained without pictures
    new = sorted({name.rpartition(".")[0] for name in target if name not in fitting})
    say(
        f"init {init}: {len(fitting)} of {len(target)} tensors; new: {', '.join(new[:8]) or 'none'}"
        + (f" and {len(new) - 8} more" if len(new) > 8 else "")
    )
