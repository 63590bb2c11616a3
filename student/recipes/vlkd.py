"""vlkd: vision-language knowledge distillation into a BART that then captions and answers (VLKD, 2022).

A pair of the batch is a picture and its text. CLIP is frozen and cached: v_cls, t_eos its picture and text embedding, V
rows of its space; all normalised. E are the outputs of BART's encoder, e their mean over the text's tokens; W_e maps to
CLIP's space, W'_e back (it starts as W_e's pseudo-inverse), W_i from CLIP's pictures.

    e_norm  W_e e / |W_e e|
    TTDM    mean over pairs of | t_eos - e_norm |^2                                            section 3.2.1
    ITCL    1/2 [CE(V_cls E_norm^T / tau, I) + CE(E_norm V_cls^T / tau, I)], tau learnable, from 0.07   3.2.2
    ICTI    mean over pairs of - sum_j log P(w_j | w_<j, C),  C = concat(W_i V, W'_e W_e E)    Eq. 1, 2
    L       1000 TTDM + ITCL + ICTI                                                            section 3.3

E in C is that of the text with 15 % of its words in spans, of Poisson(3) words in the mean, replaced by one mask each
(BART's text infilling); w is the whole text. visual=cls takes V = v_cls, as the paper does for ViT-B/16; visual=patches
takes all patches, as for RN50x16. A teacher without a [CLS] token (clip-lite) has its image embedding in that place.

Printed as it is, TTDM is a sum over the dimensions and 1000 TTDM far above the other terms; the paper says that they
are three magnitudes larger than TTDM, which is so for the mean over 512 dimensions: that would be ttdm=2.

Finetuning keeps the input of zero-shot use and minimises the negative log-likelihood of the words in the masks' place:

    stage=caption   "A picture of [MASK] x 6."           -> "A picture of <caption>."
    stage=vqa       "<question> Answer: [MASK] x 2."     -> "<question> Answer: <answer>."
    stage=scst      (CIDEr-D(greedy) - CIDEr-D(sampled)) log P(sampled), on captions, after stage=caption

Free choices: the decoder is given the words before the first mask; W_i's start; an answer of VQA's ten is
drawn as often as it was given. Table 10: batch 512, 200k steps, lr 5e-5 for BART-large; the defaults here are for the
small BART on a laptop. Table 11: `--set optim.lr=6e-5 --set optim.eps=1e-8`, batch 40 and 20 epochs, or 32 and 10.

    tc build --teacher clip-lite && student train --recipe vlkd
    student train --recipe vlkd --set model=bart-large --set optim.lr=5e-5 --batch-size 512 --steps 200000
    student train --recipe vlkd --set stage=caption --set init=runs/NAME --batch-size 40
    student train --recipe vlkd --set stage=vqa --set init=runs/NAME --set data_share=0.01 --data vqa/ --batch-size 32
    student generate runs/NAME --image cat.jpg
"""

import dataclasses

from student.recipe import Now, Optim, Recipe


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants where it names them."""

    ttdm: float = 1000.0  # gamma; table 7 switches by 0
    itcl: float = 1.0
    icti: float = 1.0
    tau: float = 0.07  # where it starts
    mask_share: float = 0.15  # of the words
    visual: str = "cls"  # or patches
    stage: str = "distil"  # or caption, vqa, scst
    masks: int = 0  # of a prompt; 0: 6 for captions, 2 for answers
    data_share: float = 1.0  # of the training rows: table 9, 1 %-shot VQA
    model: str = "bart-tiny"  # or bart-base, bart-large, a name on the hub, a folder
    scratch: bool = False  # the model's configuration and tokenizer without its weights
    init: str = ""  # a run, or what `student export` made of one
    max_text: int = 64  # sub-words


def reads(constants: Constants) -> tuple[str, ...]:
    """V, which the student reads, and what the terms compare."""
    found = ["patch_emb" if constants.visual == "patches" else "image_emb"]
    if constants.stage == "distil":
        found += [
            name for name, weight in (("image_emb", constants.itcl), ("text_emb", constants.ttdm)) if weight
        ]
    return tuple(dict.fromkeys(found))


def build(constants: Constants):
    """BART and its reader; its matrices are made when the width of CLIP's space is known."""
    from student.models.seq2seq.loading import open_student

    return open_student(constants)


def heads(constants: Constants, student, shapes: dict):
    """W_i, W_e, W'_e of the student in the teacher's width; of its own a temperature alone."""
    from student.models.heads import Temperature
    from teachercache.core.errors import UserError

    width = shapes[student.inputs[1]][-1]
    if not hasattr(student, "text_out"):
        student.connect(width)
    if student.text_out.out_features != width:
        known = student.text_out.out_features
        raise UserError(
            f"--set init={constants.init} knows a CLIP of width {known}, the cache's has {width}: pass a "
            "cache of the same teacher"
        )
    return Temperature(constants.tau) if constants.stage == "distil" and constants.itcl else None


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """Every term that has a weight; of a finetuning stage its one."""
    from student.losses import scst_loss

    notes = {"nll_token": student["nll"].detach().sum() / student["tokens"].sum()}
    if constants.stage == "scst":
        notes |= {name: student[name].mean() for name in ("reward", "baseline")}
        return {"scst": scst_loss(student["nll"], student["reward"], student["baseline"])}, notes
    if constants.stage != "distil":
        return {"nll": student["nll"].float().mean()}, notes
    aligned, found = align_terms(student, batch, constants)
    return aligned | (
        {"icti": constants.icti * student["nll"].float().mean()} if constants.icti else {}
    ), notes | found


def align_terms(student: dict, batch: dict, constants: Constants) -> tuple[dict, dict]:
    """TTDM and ITCL, those that are switched on."""
    from torch.nn.functional import normalize

    from student.losses import clip_loss, ttdm_loss

    terms, notes = {}, {}
    if "text_t" in student:
        e_norm = normalize(student["text_t"].float())
    if constants.ttdm:
        t_eos = normalize(batch["text_emb"].float())
        terms["ttdm"] = constants.ttdm * ttdm_loss(e_norm, t_eos)
        notes["cos_text"] = (e_norm * t_eos).sum(1).mean().detach()
    if constants.itcl:
        v_cls = normalize(batch["image_emb"].float())
        terms["itcl"] = constants.itcl * clip_loss(v_cls, e_norm, student["itcl_scale"])
        notes["tau"] = 1 / student["itcl_scale"].detach()
    return terms, notes


VLKD = Recipe(
    name="vlkd",
    paper="Enabling Multimodal Generation on CLIP via Vision-Language Knowledge Distillation (2022)",
    doc="a cached CLIP into a BART, which then captions and answers",
    constants=Constants(),
    build=build,
    heads=heads,
    loss=loss,
    reads=reads,
    across=("text_t", "image_emb", "text_emb", "nll", "tokens", "reward", "baseline"),
    optim=Optim(lr=1e-3, beta2=0.999, eps=1e-6, weight_decay=0.01, warmup=0.06, clip=5.0, decay="linear"),
    steps=600,
    batch=64,
)
