"""Single-stream students: one BERT over words and image regions, as UNITER, VL-BERT or VILLA.

A fourth variant, `bert`, reads no picture and measures how well words alone answer. A head on [CLS] chooses
the answer. Distillation uses the outputs of [CLS], of the whole-picture region and of the words. The losses
are in `recipes.clip_td`; `loading` loads weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from student.contract import Capability, RowInputs, StudentSpec
from student.models.single_stream.regions import UniterRegions, VlBertRegions, trim_regions, valid_regions
from student.models.single_stream.villa import Perturbation, perturbed_logits
from teachercache.core.errors import UserError, closest
from teachercache.teachers.allowed import check_code_keys

FACES = ("uniter", "vl-bert", "villa", "bert")
SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        # BERT's dropout of 0.1 takes 1.5 times as long
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "micro": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
# Token types: before the first [SEP], the picture, after the first [SEP] (UNITER has only the first two)
FIRST, IMAGE, SECOND = range(3)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that a student is built with; run.json stores them with BERT's configuration.

    Args:
        face: One of FACES.
        region_width: Width of a cached region feature.
        inputs: Texts per row.
        classes: Answers per row.
        several_right: Several answers may be right (VQA).
        stage: "task" or "adapt".
    """

    face: str
    region_width: int
    inputs: int
    classes: int
    several_right: bool = False
    stage: str = "task"


def parse_model(name: str) -> tuple[str, dict[str, Any]]:
    """Split a model name such as `vl-bert-tiny` into a face and BERT's sizes.

    Raises:
        UserError: The name is unknown; the message lists the valid names.
    """
    face, _, size = name.rpartition("-")
    if face not in FACES or size not in SIZES:
        names = [f"{face}-{size}" for face in FACES for size in SIZES]
        raise UserError(f"--set model={name}: {closest(name, names)}choose from {', '.join(names)}")
    return face, SIZES[size]


class SingleStream(nn.Module):
    """One transformer over the words and regions of n rows of C texts each.

    Args:
        config: BERT's configuration.
        shape: The task's sizes.
        perturbation: VILLA's constants; None for students without perturbations.
    """

    regions: UniterRegions | VlBertRegions

    def __init__(self, config: BertConfig, shape: Shape, perturbation: Perturbation | None = None):
        super().__init__()
        self.config, self.shape, self.perturbation = config, shape, perturbation
        hidden, dropout = config.hidden_size, config.hidden_dropout_prob
        self.bert = BertModel(config, add_pooling_layer=True)
        if shape.face != "bert":
            embed = VlBertRegions if shape.face == "vl-bert" else UniterRegions
            self.regions = embed(shape.region_width, hidden, config.layer_norm_eps, dropout)
        if shape.stage == "adapt":
            self.words = nn.Sequential(
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.LayerNorm(hidden),
                nn.Linear(hidden, config.vocab_size),
            )
            self.match = nn.Linear(hidden, 2)
        else:
            width = 1 if shape.inputs > 1 else shape.classes
            self.answer = nn.Sequential(
                nn.Linear(hidden, 2 * hidden),
                nn.GELU(),
                nn.LayerNorm(2 * hidden),
                nn.Linear(2 * hidden, width),
            )

    @property
    def spec(self) -> StudentSpec:
        """The shape and BERT's configuration."""
        config = {"shape": dataclasses.asdict(self.shape), "bert": self.config.to_diff_dict()}
        return StudentSpec("single_stream", config)

    @property
    def row_inputs(self) -> RowInputs:
        """Text pairs, and the cached regions of the picture unless the face is `bert`."""
        if self.shape.face == "bert":
            return RowInputs(text_pairs=True)
        return RowInputs(text_pairs=True, fields=("region_feature", "region_box"), trim=trim_regions)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Compute answers and the elements that are distilled, for n rows of C texts each.

        Returns:
            `cls`, `picture` [n, C, h], `words` [n, C, m, h] (means over the tokens of selected words) and
            `logits` [n, classes]. In stage adapt, `word_logits` [n, slots, vocabulary] of the masked
            positions and `match` [n, 2] replace the logits. VILLA in training adds `adv_logits` [n, K,
            classes].
        """
        n, C, length = batch["text"].shape
        words, regions, mask = self.embed(batch)
        hidden = self.encode(words, regions, mask)  # [n C, length + regions, h]
        pooled = self.pool(hidden)
        outputs = {"cls": hidden[:, 0].unflatten(0, (n, C))}
        if regions.shape[1]:
            outputs["picture"] = hidden[:, length].unflatten(0, (n, C))
        if "word_tokens" in batch:
            tokens = batch["word_tokens"].flatten(0, 1).to(hidden.dtype)  # [n C, m, length]
            means = tokens @ hidden[:, :length] / tokens.sum(-1, keepdim=True).clamp(min=1)
            outputs["words"] = means.unflatten(0, (n, C))
        if self.shape.stage == "adapt":
            masked = hidden[torch.arange(n)[:, None], batch["masked_place"]]  # [n, slots, h]; C is 1
            return outputs | {"word_logits": self.words(masked), "match": self.match(pooled)}
        outputs["logits"] = self.choose(pooled, n)
        if self.perturbation is not None and self.training:
            outputs["adv_logits"] = perturbed_logits(
                lambda words, regions: self.choose(self.pool(self.encode(words, regions, mask)), n),
                words,
                regions,
                batch["target"],
                plan=self.perturbation,
                many=self.shape.several_right,
            )
        return outputs

    def embed(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "nC l h"], Float[Tensor, "nC r h"], Bool[Tensor, "nC lr"]]:
        """Embed words and regions.

        Returns:
            The elements of words and of regions, and the attention mask of both.
        """
        C = batch["text"].shape[1]
        ids, is_second, attention_mask = (
            batch[name].flatten(0, 1) for name in ("text", "token_type_ids", "attention_mask")
        )
        embed = self.bert.embeddings
        positions = torch.arange(ids.shape[1], device=ids.device)
        token_types = torch.where(is_second, SECOND, FIRST)
        words = (
            embed.word_embeddings(ids)
            + embed.token_type_embeddings(token_types)
            + embed.position_embeddings(positions)
        )
        if self.shape.face == "bert":
            return embed.dropout(embed.LayerNorm(words)), words[:, :0], attention_mask
        feature, box = (batch[name].repeat_interleave(C, 0) for name in ("region_feature", "region_box"))
        image_type = embed.token_type_embeddings.weight[IMAGE]
        if isinstance(self.regions, VlBertRegions):
            visual = self.regions.features(feature, box)
            words = words + self.regions.of_words(visual, box, batch["text_region"].flatten(0, 1))
            # All regions share one position, after the text
            rest = image_type + embed.position_embeddings(attention_mask.sum(1))
            regions = self.regions(visual, rest.unsqueeze(1))
        else:
            regions = self.regions(feature, box, image_type)
        words = embed.dropout(embed.LayerNorm(words))
        return words, regions, torch.cat([attention_mask, valid_regions(box)], 1)

    def encode(
        self, words: Float[Tensor, "n l h"], regions: Float[Tensor, "n r h"], mask: Bool[Tensor, "n lr"]
    ) -> Float[Tensor, "n lr h"]:
        """Return the last layer's output over words and regions; masked elements get no attention."""
        elements = torch.cat([words, regions.to(words.dtype)], 1)
        bias = torch.zeros(mask.shape, dtype=elements.dtype, device=mask.device)
        bias = bias.masked_fill(~mask, torch.finfo(elements.dtype).min)
        return self.bert.encoder(elements, attention_mask=bias[:, None, None, :]).last_hidden_state

    def pool(self, hidden: Float[Tensor, "n lr h"]) -> Float[Tensor, "n h"]:
        """Return BERT's pooled output of [CLS]."""
        assert self.bert.pooler is not None
        return self.bert.pooler(hidden)

    def choose(self, pooled: Float[Tensor, "nC h"], n: int) -> Float[Tensor, "n classes"]:
        """Return the logits of each row's answers: a score per text, or per class if a row has one text."""
        return self.answer(pooled).reshape(n, self.shape.classes)

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities of training, and that to answer unless the stage is adapt."""
        offered = {Capability.ANSWERS, Capability.COMPILES, Capability.SHARDS_PARAMETERS}
        return frozenset(offered - self.limits().keys())

    def limits(self) -> dict[Capability, str]:
        """Return why it cannot encode or be exported, and the limits of stage adapt and of VILLA."""
        limits = {
            Capability.EXPORTS_OPEN_CLIP: "open_clip has no single-stream transformer",
            Capability.EXPORTS_HF: "transformers has no model of these regions and heads",
            Capability.ENCODES: "run `student eval` with the task that it was trained on",
            Capability.CHECKPOINTS_ACTIVATIONS: f"{type(self).__name__} has no blocks for it",
        }
        if self.shape.stage == "adapt":
            limits[Capability.ANSWERS] = (
                "it is a stage=adapt run without answers: go on with `--set init=RUN`, then evaluate"
            )
        if self.perturbation is not None:
            limits[Capability.SHARDS_PARAMETERS] = (
                "VILLA's perturbations need whole parameters: choose 0, 1 or 2"
            )
        return limits

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))


def rebuild(config: Mapping[str, Any]) -> SingleStream:
    """Return a student of a recorded configuration, with random weights."""
    check_code_keys(config["bert"], "the record of the student")
    return SingleStream(BertConfig.from_dict(config["bert"]), Shape(**config["shape"]))
