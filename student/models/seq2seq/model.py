"""A sequence-to-sequence student: transformers' BART whose decoder attends to picture and text (VLKD).

    C = concat(W_i V, W'_e W_e E)                                                             Eq. 1, Fig. 2

E is the encoder's output. W_e maps it to CLIP's space and W'_e maps it back; W'_e starts as the
pseudo-inverse of W_e. V are normalized rows of CLIP's space: the picture's embedding (the output of the [CLS]
token) or all of its patches. The losses are in `recipes.vlkd`; `loading` loads weights.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from evaluation.models.generator import MASK
from student.contract import Capability, RowInputs, StudentSpec
from student.losses import text_nll
from student.models.seq2seq.self_critical import CaptionSampler, Reward
from student.models.seq2seq.texts import Reader, encode_prompt, padded
from teachercache.core.errors import UserError

VISUAL = {"cls": "image_emb", "patches": "patch_emb"}  # choice of V -> cached field


class Seq2Seq(nn.Module):
    """BART with the matrices W_i, W_e and W'_e, which `connect` creates.

    Args:
        bart: A BART; its generation settings are replaced.
        reader: Reads the texts of rows.
        visual: A key of VISUAL.
        aligned: Output `text_in_teacher_space` while distilling.
    """

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
        """Create the three matrices between CLIP's space of `width` dimensions and BART's.

        W_i starts with entries from N(0, 1), so that W_i v of a unit row is as large as BART's rows (free
        choice).
        """
        d_model = self.bart.config.d_model
        assert d_model is not None
        self.image_in = nn.Linear(width, d_model, bias=False)  # W_i
        self.text_out = nn.Linear(d_model, width, bias=False)  # W_e
        self.text_in = nn.Linear(width, d_model, bias=False)  # W'_e
        nn.init.normal_(self.image_in.weight)
        with torch.no_grad():
            self.text_in.weight.copy_(torch.linalg.pinv(self.text_out.weight))

    @property
    def start_token(self) -> int:
        """The id that the decoder starts with."""
        start_token = self.bart.config.decoder_start_token_id
        assert start_token is not None
        return start_token

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
        """A text with masks, and the cached features of the picture."""
        return RowInputs(read_texts=self.read_texts, fields=(VISUAL[self.visual],))

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities of training, to generate texts, and to be exported for transformers."""
        return frozenset(
            {
                Capability.GENERATES,
                Capability.EXPORTS_HF,
                Capability.COMPILES,
                Capability.SHARDS_PARAMETERS,
            }
        )

    def limits(self) -> dict[Capability, str]:
        """Return why it cannot encode or be exported for open_clip."""
        return {
            Capability.ENCODES: "run `student generate`, or `student export --format hf`",
            Capability.EXPORTS_OPEN_CLIP: "it writes texts, which open_clip does not support: use --format hf",
            Capability.CHECKPOINTS_ACTIVATIONS: f"{type(self).__name__} has no blocks for it",
        }

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Compute the negative log-likelihood of the rows' texts.

        Returns:
            `nll` [n], the number `tokens` [n] of its summands, and while distilling `text_in_teacher_space`
            [n, d1].
            scst: `nll` of sampled captions; `reward`, `baseline` [n] are CIDEr-D of sampled and greedy
                captions.
        """
        stage = self.read_texts.stage
        outputs: dict[str, Tensor] = {}
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
        """Return V, normalized rows of CLIP's space."""
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
        """Return W_e times the mean of E, not normalized (section 3.2.1)."""
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
        picture_mask = torch.ones(V.shape[:2], dtype=torch.bool, device=attention_mask.device)
        rows = torch.cat([self.image_in(V).to(text.dtype), text], 1)
        return rows, torch.cat([picture_mask, attention_mask], 1)

    def decode(
        self,
        text: Int[Tensor, "n length"],
        context: Float[Tensor, "n m d2"],
        attention_mask: Bool[Tensor, "n m"],
    ) -> Float[Tensor, "n length words"]:
        """Return the logits of each token given those before it; the first follows BART's start token."""
        start = torch.full_like(text[:, :1], self.start_token)
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
        """Generate the text of each prompt's masks by beam search, given the picture of its row.

        The decoder starts with the prompt's words before the first mask (free choice). The prompt's text
        after the last mask, a period in the paper's prompts, is removed from the end.

        Args:
            fields: The teacher's fields of the rows' pictures.
            prompts: A prompt per row.
            num_beams: Beams of the search; 1 is greedy.
            max_new_tokens: Tokens per text, at most.
        """
        marks, tokenizer = self.read_texts.marks, self.read_texts.tokenizer
        V = self.pictures(fields)
        texts = [""] * len(prompts)
        encoded = [encode_prompt(tokenizer, marks, prompt, self.read_texts.max_text) for prompt in prompts]
        for size in sorted({len(prefix) for _, prefix in encoded}):
            rows = [i for i, (_, prefix) in enumerate(encoded) if len(prefix) == size]
            source = padded([[marks.begin, *encoded[i][0], marks.end] for i in rows], marks.pad).to(V.device)
            start = [self.start_token, marks.begin]
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
            for i, row in zip(rows, ids[:, before.shape[1] :].tolist(), strict=True):
                text, after = tokenizer.decode(row, skip_special_tokens=True), prompts[i].rpartition(MASK)[2]
                texts[i] = " ".join(text.strip().removesuffix(after.strip()).split())
        return texts

    @torch.no_grad()
    def language_model(self) -> BartForConditionalGeneration:
        """Return a plain BART that computes the same as this student without a picture.

        Its decoder's cross-attention includes W'_e W_e in the keys and values, so it attends to E itself.
        """
        bart = copy.deepcopy(self.bart)
        round_trip = self.text_in.weight @ self.text_out.weight
        for layer in bart.model.decoder.layers:
            for linear in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
                linear.weight.copy_(linear.weight @ round_trip)
        return bart

    def saved_state(self) -> dict[str, Tensor]:
        """Return every tensor once; BART's shared embeddings appear under their first name."""
        persistent = self.state_dict()
        return dict(self.named_parameters()) | {
            name: value for name, value in self.named_buffers() if name in persistent
        }

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of `saved_state`; KeyError if one is missing."""
        missing = self.saved_state().keys() - state.keys()
        if missing:
            raise KeyError(sorted(missing)[0])
        self.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)


def plain_search(bart: BartConfig) -> GenerationConfig:
    """Return settings of plain beam search, without a checkpoint's forced or forbidden tokens."""
    names = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    return GenerationConfig(do_sample=False, **{name: getattr(bart, name) for name in names})
