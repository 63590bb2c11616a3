"""Distill CLIP into a BART that captions pictures and answers questions (VLKD, 2022).

Each pair of the batch is a picture and its text. CLIP is frozen and cached: v_cls, t_eos are its image and
text embeddings, V are rows of its embedding space, all normalized. E are the outputs of BART's encoder, e is
their mean over the tokens of the text. W_e maps to CLIP's space; W'_e maps back and is initialized as the
pseudo-inverse of W_e; W_i maps V to BART's space.

    e_norm  W_e e / |W_e e|
    TTDM    mean over pairs of | t_eos - e_norm |^2                                            section 3.2.1
    ITCL    1/2 [CE(V_cls E_norm^T / tau, I) + CE(E_norm V_cls^T / tau, I)], tau learnable, from 0.07   3.2.2
    ICTI    mean over pairs of - sum_j log P(w_j | w_<j, C),  C = concat(W_i V, W'_e W_e E)    Eq. 1, 2
    L       1000 TTDM + ITCL + ICTI                                                            section 3.3

E in C encodes a masked text: 15 % of its words are masked in spans with Poisson(3) lengths, and each span is
replaced by a single mask (BART's text infilling). w is the whole text. visual=cls uses V = v_cls, as the
paper does for ViT-B/16; visual=patches uses all patches, as for RN50x16. For a teacher without a [CLS] token
(clip-lite), v_cls is its image embedding.

As printed, TTDM is a sum over the dimensions, and 1000 TTDM is far larger than the other terms. The paper
states that the other terms are three orders of magnitude larger than TTDM, which holds for the mean over 512
dimensions: that would be ttdm=2.

Finetuning has the same inputs as zero-shot use, and minimizes the negative log-likelihood of the words that
replace the masks:

    stage=caption   "A picture of [MASK] x 6."           -> "A picture of <caption>."
    stage=vqa       "<question> Answer: [MASK] x 2."     -> "<question> Answer: <answer>."
    stage=scst      (CIDEr-D(greedy) - CIDEr-D(sampled)) log P(sampled), on captions, after stage=caption

Free choices: the words before the first mask are the decoder's prefix; the initialization of W_i; VQA's
target is drawn from the ten answers of a question, in proportion to their counts.

Table 10 uses batch 512, 200k steps and lr 5e-5 for BART-large; the defaults here fit the small BART on a
laptop. Table 11 is `--set optim.lr=6e-5 --set optim.eps=1e-8` with batch 40 and 20 epochs (captions), or
batch 32 and 10 (VQA).

    tc build --teacher clip-lite && student train --recipe vlkd
    student train --recipe vlkd --set model=bart-large --set optim.lr=5e-5 --batch-size 512 --steps 200000
    student train --recipe vlkd --set stage=caption --set init=runs/NAME --batch-size 40
    student train --recipe vlkd --set stage=vqa --set init=runs/NAME --set data_share=0.01 --data vqa/
    student generate runs/NAME --image cat.jpg
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval

from student.recipe import Batch, Notes, Optim, Outputs, Progress, Recipe, Setting, Shapes, Terms
from student.rows import Pairs
from teachercache.core.errors import UserError
from teachercache.core.ranges import MOST, Count, Name, Part, Positive, Weight, check_record

if TYPE_CHECKING:
    from torch import nn

    from student.contract import Student


Length = Annotated[int, Interval(ge=2, le=MOST)]  # the marks of begin and end


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants, with its values where it gives them, and the student model."""

    ttdm: Weight = 1000.0  # weight gamma of TTDM; 0 switches a term off, as in table 7
    itcl: Weight = 1.0  # weight of ITCL
    icti: Weight = 1.0  # weight of ICTI
    tau: Positive = 0.07  # initial value
    mask_share: Part = 0.15  # share of the words that are masked
    visual: Literal["cls", "patches"] = "cls"
    stage: Literal["distil", "caption", "vqa", "scst"] = "distil"
    masks: Count = 0  # masks per prompt; 0: 6 for captions, 2 for answers
    data_share: Part = 1.0  # share of the training rows; 0.01 is table 9's 1 %-shot VQA
    model: Name = "bart-tiny"  # or bart-base, bart-large, a name on the hub, a folder
    scratch: bool = False  # use the model's configuration and tokenizer with random weights
    init: str = ""  # a run folder or exported folder to start from
    max_text: Length = 64  # sub-words per text


def rows(constants: Constants) -> Pairs:
    """Return the kind of rows: the pairs that the stage can use, reduced to `data_share` of them."""
    from student.models.seq2seq.texts import choose_rows

    return Pairs(
        choose_rows=functools.partial(choose_rows, stage=constants.stage, share=constants.data_share)
    )


def picture_field(constants: Constants) -> str:
    """Return the cached field that holds V."""
    return "patch_emb" if constants.visual == "patches" else "image_emb"


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the field of V, which the student reads, and the fields that weighted terms compare."""
    check_record(constants)
    fields = [picture_field(constants)]
    if constants.stage == "distil":
        fields += [
            name for name, weight in (("image_emb", constants.itcl), ("text_emb", constants.ttdm)) if weight
        ]
    return tuple(dict.fromkeys(fields))


def build(constants: Constants, setting: Setting) -> "Student":
    """Build BART with W_i, W_e and W'_e for the cache's CLIP space, or load it from `init`.

    Raises:
        UserError: `init` was trained on a CLIP of another width.
    """
    from student.models.seq2seq.loading import Reading, start_bart, start_from
    from student.models.seq2seq.self_critical import reward_of
    from student.models.seq2seq.texts import references
    from teachercache.core.progress import say

    reading = Reading(constants.stage, constants.masks, constants.mask_share, constants.max_text)
    width = setting.shapes[picture_field(constants)][-1]
    if constants.init:
        say(f"starting from {constants.init}: its BART replaces model={constants.model}")
        student = start_from(constants.init, reading, visual=constants.visual)
    else:
        student = start_bart(
            constants.model, reading, scratch=constants.scratch, visual=constants.visual, width=width
        )
    if student.text_out.out_features != width:
        raise UserError(
            f"--set init={constants.init} was trained on a CLIP of width {student.text_out.out_features}, "
            f"the cache is of one of width {width}: pass a cache of the same teacher"
        )
    student.aligned = bool(constants.ttdm or constants.itcl)
    if constants.stage == "scst":
        samples = (setting.manifest.row(row) for row in setting.rows.tolist())
        student.reward = reward_of(references(sample) for sample in samples)
    return student


def heads(constants: Constants, student: "Student", shapes: Shapes) -> "nn.Module | None":
    """Build ITCL's learnable temperature, or return None without ITCL."""
    from student.models.heads import Temperature

    return Temperature(constants.tau) if constants.stage == "distil" and constants.itcl else None


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute the weighted terms of L, or in a finetuning stage its single term.

    Returns:
        The terms `ttdm`, `itcl`, `icti` (stage distil), `nll` (caption, vqa) or `scst`; and notes, among them
        `nll_token`, the negative log-likelihood per token.
    """
    from student.losses import scst_loss

    nll = outputs["nll"]
    notes = {"nll_token": nll.detach().sum() / outputs["tokens"].sum()}
    if constants.stage == "scst":
        notes |= {name: outputs[name].mean() for name in ("reward", "baseline")}
        return {"scst": scst_loss(nll, outputs["reward"], outputs["baseline"])}, notes
    if constants.stage != "distil":
        return {"nll": nll.float().mean()}, notes
    terms, align_notes = align_terms(outputs, fields, constants)
    if constants.icti:
        terms["icti"] = constants.icti * nll.float().mean()
    return terms, notes | align_notes


def align_terms(outputs: Outputs, fields: Batch, constants: Constants) -> tuple[Terms, Notes]:
    """Compute TTDM and ITCL, as far as they have a weight.

    Returns:
        The terms `ttdm` and `itcl`; the notes `cos_text`, the mean cosine of t_eos and e_norm, and `tau`.
    """
    from torch.nn.functional import normalize

    from student.losses import clip_loss, ttdm_loss

    terms: Terms = {}
    notes: Notes = {}
    if "text_in_teacher_space" in outputs:
        e_norm = normalize(outputs["text_in_teacher_space"].float())
    if constants.ttdm:
        t_eos = normalize(fields["text_emb"].float())
        terms["ttdm"] = constants.ttdm * ttdm_loss(e_norm, t_eos)
        notes["cos_text"] = (e_norm * t_eos).sum(1).mean().detach()
    if constants.itcl:
        v_cls = normalize(fields["image_emb"].float())
        terms["itcl"] = constants.itcl * clip_loss(v_cls, e_norm, outputs["itcl_scale"])
        notes["tau"] = 1 / outputs["itcl_scale"].detach()
    return terms, notes


VLKD = Recipe(
    name="vlkd",
    paper="Enabling Multimodal Generation on CLIP via Vision-Language Knowledge Distillation (2022)",
    doc="a cached CLIP distilled into a BART that captions pictures and answers questions",
    constants=Constants(),
    rows=rows,
    student=build,
    distill_heads=heads,
    loss=loss,
    teacher_fields=teacher_fields,
    per_row=frozenset({"patch_emb"}),
    optim=Optim(
        lr=1e-3,
        beta2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        warmup=0.06,
        max_grad_norm=5.0,
        schedule="linear",
    ),
    steps=600,
    batch=64,
)
