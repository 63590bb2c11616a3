"""A sequence-to-sequence student: transformers' BART whose decoder reads a picture beside the text (VLKD, Fig. 2).

    C = concat(W_i V, W'_e W_e E)                                                                                Eq. 1

E is the encoder's output, W_e takes it to CLIP's space, W'_e back: it starts as the pseudo-inverse of W_e. V are rows
of CLIP's space, normalised: the picture's embedding (the output of its [CLS] token) or all of its patches. Not for
losses (`recipes.vlkd`), nor for where weights come from (`loading`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BartForConditionalGeneration, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from evaluation.models.generator import MASK
from student.contract import Capability, RowInputs, StudentSpec
from student.losses import text_nll
from student.models.seq2seq.self_critical import CaptionSampler, Reward
from student.models.seq2seq.texts import Reader, encode_prompt, padded
from teachercache.core.errors import UserError

VISUAL = {"cls": "image_emb", "patches": "patch_emb"}  # what V is, and the cache's field of it


class Seq2Seq(nn.Module):
    """BART, W_i, W_e and W'_e; the last three exist once `connect` knows the width of CLIP's space."""

    def __init__(
        self,
        bart: BartForConditionalGeneration,
        reader: Reader,
        *,
        visual: str,
        aligned: bool = True,
    ):
        super().__init__()
        if visual not in VISUAL:
            raise UserError(f"--set visual={visual}: choose from {', '.join(VISUAL)}")
        self.bart, self.read_texts, self.visual, self.aligned = bart, reader, visual, aligned
        bart.generation_config = plain_search(bart.config)
        self.reward: Reward | None = None  # scst

    def connect(self, width: int) -> None:
        """Make the three matrices, between `width` dimensions of CLIP and BART's own.

        W_i starts with entries of N(0, 1), which makes W_i v of a unit row as large as BART's own rows (free choice).
        """
        own = self.bart.config.d_model
        self.image_in = nn.Linear(width, own, bias=False)  # W_i
        self.text_out = nn.Linear(own, width, bias=False)  # W_e
        self.text_in = nn.Linear(width, own, bias=False)  # W'_e
        nn.init.normal_(self.image_in.weight)
        with torch.no_grad():
            self.text_in.weight.copy_(torch.linalg.pinv(self.text_out.weight))

    @property
    def spec(self) -> StudentSpec:
        """BART's configuration, the width of CLIP's space, and how texts are read."""
        read = self.read_texts
        config = {
            "bart": self.bart.config.to_diff_dict(),
            "width": self.text_out.out_features,
            "visual": self.visual,
            "stage": read.stage,
            "masks": read.masks,
            "max_text": read.max_text,
        }
        return StudentSpec("seq2seq", config, {"tokenizer.json": read.tokenizer.to_str()})

    @property
    def row_inputs(self) -> RowInputs:
        """A text with masks, and the cached picture."""
        return RowInputs(read_texts=self.read_texts, fields=(VISUAL[self.visual],))

    def capabilities(self) -> frozenset[Capability]:
        """Writing, and an export for transformers."""
        return frozenset(
            {
                Capability.GENERATES,
                Capability.EXPORTS_HF,
                Capability.COMPILES,
                Capability.SHARDS_PARAMETERS,
            }
        )

    def limits(self) -> dict[Capability, str]:
        """It has one stream from picture and text to text."""
        return {
            Capability.ENCODES: "`student generate` takes it, and `student export --format hf`",
            Capability.EXPORTS_OPEN_CLIP: "it writes texts, which open_clip has no place for: use --format hf",
            Capability.CHECKPOINTS_ACTIVATIONS: f"{type(self).__name__} has no blocks for it",
        }

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Compute the negative log-likelihood of the rows' texts.

        Returns:
            `nll` [n], `tokens` [n] that it is summed over, and while distilling `text_in_teacher_space` [n, d1].
            scst: `nll` is that of sampled captions; `reward`, `baseline` [n] are CIDEr-D of these and of greedy ones.
        """
        stage, outputs = self.read_texts.stage, {}
        context, attention_mask = self.context(batch["source"], self.pictures(batch))
        text, prompt_length = batch["text"], batch["prompt_length"]
        if stage == "scst":
            assert self.reward is not None
            sampler = CaptionSampler(self.bart, self.read_texts, self.reward)
            text, rewards = sampler.sample(context, attention_mask, batch)
            outputs |= rewards
        if stage == "distil" and self.aligned:
            outputs["text_in_teacher_space"] = self.embed_text(text)
        counted = (text != self.read_texts.marks.pad) & (
            torch.arange(text.shape[1], device=text.device) >= prompt_length[:, None]
        )
        logits = self.decode(text, context, attention_mask)
        return outputs | {"nll": text_nll(logits, text, counted), "tokens": counted.sum(1).float()}

    def pictures(self, fields: Mapping[str, Tensor]) -> Float[Tensor, "n v d1"]:
        """V: normalised rows of CLIP's space."""
        rows = fields[VISUAL[self.visual]].float()
        return normalize(rows if rows.ndim == 3 else rows[:, None], dim=-1)

    def encode(
        self, text: Int[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n length d2"], Bool[Tensor, "n length"]]:
        """Return E and its attention mask."""
        attention_mask = text != self.read_texts.marks.pad
        hidden = self.bart.model.encoder(input_ids=text, attention_mask=attention_mask).last_hidden_state
        return hidden, attention_mask

    def embed_text(self, text: Int[Tensor, "n length"]) -> Float[Tensor, "n d1"]:
        """W_e times the mean of E, not normalised (section 3.2.1)."""
        E, attention_mask = self.encode(text)
        return self.text_out((E * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))

    def context(
        self, source: Int[Tensor, "n length"], V: Float[Tensor, "n v d1"] | None
    ) -> tuple[Float[Tensor, "n m d2"], Bool[Tensor, "n m"]]:
        """Return C of Eq. 1 and its attention mask; without V, C of the text alone."""
        E, attention_mask = self.encode(source)
        text = self.text_in(self.text_out(E))
        if V is None:
            return text, attention_mask
        of_picture = torch.ones(V.shape[:2], dtype=torch.bool, device=attention_mask.device)
        rows = torch.cat([self.image_in(V).to(text.dtype), text], 1)
        return rows, torch.cat([of_picture, attention_mask], 1)

    def decode(
        self,
        text: Int[Tensor, "n length"],
        context: Float[Tensor, "n m d2"],
        attention_mask: Bool[Tensor, "n m"],
    ) -> Float[Tensor, "n length words"]:
        """Logits of each token of a text after those before it; the first follows BART's start token."""
        start = torch.full_like(text[:, :1], self.bart.config.decoder_start_token_id)
        before = torch.cat([start, text[:, :-1]], 1)
        outputs = self.bart(
            encoder_outputs=BaseModelOutput(last_hidden_state=context),
            attention_mask=attention_mask.long(),
            decoder_input_ids=before,
            use_cache=False,
        )
        return outputs.logits

    @torch.inference_mode()
    def generate_texts(
        self,
        fields: Mapping[str, Tensor],
        prompts: Sequence[str],
        *,
        num_beams: int = 1,
        max_new_tokens: int = 24,
    ) -> list[str]:
        """What each prompt's masks stand for, given the picture of its row, by beam search.

        The decoder is given the prompt's words before the first mask (free choice); what follows the last one, a full
        stop in the paper's prompts, is taken off the end.
        """
        marks, tokenizer = self.read_texts.marks, self.read_texts.tokenizer
        V = self.pictures(fields)
        found = [""] * len(prompts)
        encoded = [encode_prompt(tokenizer, marks, prompt, self.read_texts.max_text) for prompt in prompts]
        for size in sorted({len(given) for _, given in encoded}):
            rows = [i for i, (_, given) in enumerate(encoded) if len(given) == size]
            source = padded([[marks.begin, *encoded[i][0], marks.end] for i in rows], marks.pad).to(V.device)
            start = [self.bart.config.decoder_start_token_id, marks.begin]
            before = torch.tensor([[*start, *encoded[i][1]] for i in rows], device=V.device)
            context, attention_mask = self.context(source, V[rows])
            ids = self.bart.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=context),
                attention_mask=attention_mask.long(),
                decoder_input_ids=before,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                early_stopping=num_beams > 1,
            )
            for i, one in zip(rows, ids[:, before.shape[1] :].tolist(), strict=True):
                text, after = tokenizer.decode(one, skip_special_tokens=True), prompts[i].rpartition(MASK)[2]
                found[i] = " ".join(text.strip().removesuffix(after.strip()).split())
        return found

    @torch.no_grad()
    def language_model(self) -> BartForConditionalGeneration:
        """A plain BART that does what this one does where there is no picture.

        Its decoder's cross-attention has W'_e W_e in its keys and values, so it reads E itself.
        """
        alone = copy.deepcopy(self.bart)
        there_and_back = self.text_in.weight @ self.text_out.weight
        for layer in alone.model.decoder.layers:
            for part in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
                part.weight.copy_(part.weight @ there_and_back)
        return alone

    def saved_state(self) -> dict[str, Tensor]:
        """Return every tensor once: BART's embeddings, which it uses in four places, under their first name."""
        kept = self.state_dict()
        return dict(self.named_parameters()) | {
            name: value for name, value in self.named_buffers() if name in kept
        }

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `saved_state` returned; KeyError if a tensor is missing."""
        missing = self.saved_state().keys() - state.keys()
        if missing:
            raise KeyError(sorted(missing)[0])
        self.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)


def plain_search(bart: Any) -> GenerationConfig:
    """Beam search as it is: nothing forced, forbidden or favoured, whatever a checkpoint's own settings are."""
    names = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    return GenerationConfig(do_sample=False, **{name: getattr(bart, name) for name in names})
