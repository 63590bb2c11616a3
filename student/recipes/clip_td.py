"""clip_td: targeted distillation of CLIP into vision-language transformers (CLIP-TD, Wang et al., 2022).

A row is a question about a picture; the student reads each answer choice (VCR), hypothesis (SNLI-VE) or question
(VQA) together with the picture's regions. f_img, f_cls, f(t') are the student's elements of the whole picture, of [CLS]
and of selected words, mapped to the teacher's width (a linear map each); CLIP's side is read from its cache:

    L_dv   | f_CLIP(image) - f_img |_1                                                        Eq. 3
    L_dt   | f_CLIP(text) - f_cls |_1                                                         Eq. 4
    S      S_vr/|S_vr|_1 + S_si/|S_si|_1, a score for every word of a text, in the cache      Eq. 5
    L'_dt  | f_CLIP(t') - f(t') |_1, t' the m words of the highest S                          Eq. 6-7
    r      T max(sm(CLIP's logits)) / max(sm(student's logits)), per row                      Eq. 9
    w_r    w where r > 1, else 0                                                              Eq. 10
    L      L_task + w_r (L_dv + L_dt + L'_dt)                                                 Eq. 1, 8
    L_AF   L_MLM + L_ITM + w (L_dv + L_dt), before that, on the same data                     Eq. 11

Switches: dv, dt (naive V, L, VL), select=best|random|none (TS, RTS), m, confidence (CW), choices=all|correct,
stage=adapt (AF; with w=0 a second pretraining without distillation), regime=full|low:N|semi:N|zero. Students: uniter,
vl-bert, villa in base, large, tiny; bert, which sees no picture. Baselines, without distillation, are clip-1-linear,
clip-3-linear and clip-transformer on frozen CLIP (fusion=concat|cosine), and clip-tuned, CLIP itself (init=FOLDER).

Free choices, where the paper is silent: linear maps to the teacher's width; |.|_1 is a mean over the width, and CLIP's
rows are scaled to a root mean square of 1 before it; the mean over selected words, choices and rows; T = 1;
CLIP's logits are its scale times cosines to the answers, and in SNLI-VE the distances to three anchors (k-means);
f_img is the element of region 0, the whole picture; half of a batch has labels in semi; RTS's words are drawn once for
each text; AF's masked words count on matching pairs alone, and AF reads the right choice of rows with a label, of
others their question: before low:N use semi:N, all rows and the same N labels.

    tc build --teacher regions-lite --data data/scenes/vcr1
    tc build --teacher clip-lite --outputs embeddings,tokens --data data/scenes/vcr1
    student train --recipe clip_td
    student train --recipe clip_td --set stage=adapt --set regime=semi:100 --out runs/adapted
    student train --recipe clip_td --set init=runs/adapted --set regime=low:100
"""

import dataclasses
from typing import Any

from student.recipe import Now, Optim, Recipe
from teachercache.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants where it names them."""

    w: float = 0.05  # Eq. 1 and 8; 0 for the baseline
    dv: float = 1.0  # switches: 0 takes a term out of the sum
    dt: float = 1.0
    select: str = "best"  # t': best, random or none
    m: int = 2  # selected words
    confidence: bool = True  # Eq. 9-10
    T: float = 1.0  # free choice
    choices: str = "all"  # VCR: distil every choice, or the correct one
    normalize: bool = True  # CLIP's rows to a root mean square of 1; free choice
    stage: str = "task"  # or adapt, Eq. 11
    mode: str = "q2a"  # VCR: or qa2r
    regime: str = "full"  # low:N, semi:N, zero
    subset: int = 0  # which N
    model: str = "vl-bert-tiny"
    fusion: str = "concat"  # of the baselines on frozen CLIP: or cosine
    init: str = ""  # a BERT folder, a UNITER checkpoint, or a run
    tokenizer: str = (
        ""  # a folder with tokenizer.json or vocab.txt; else that of init, else the data's own words
    )
    max_text: int = 96  # sub-words
    adv_steps: int = 3  # VILLA: K
    adv_lr: float = 0.1
    adv_max: float = 0.0  # largest norm of a perturbation, 0 for any
    adv_kl: float = 1.5  # weight of the divergence


def reads(constants: Constants) -> tuple[str, ...]:
    """Fields of the caches: the student's regions, and of CLIP what the switches need."""
    _check(constants)
    if constants.model.startswith("clip-"):
        return () if constants.model == "clip-tuned" else ("image_emb", "text_emb")
    if constants.model.startswith("bert-"):
        if constants.w or constants.stage == "adapt":
            raise UserError(
                f"--set model={constants.model} sees no picture: add --set w=0, and no stage=adapt"
            )
        return ()
    found = ["region_feature", "region_box"]
    judged = constants.confidence and constants.stage == "task"
    if constants.w:
        found += ["image_emb"] if constants.dv or judged else []
        found += ["text_emb"] if constants.dt or judged else []
        if constants.stage == "task" and constants.select != "none":
            kind = "random" if constants.select == "random" else "word"
            found += ["word_span", f"{kind}_index", f"{kind}_feature"]
    return tuple(found)


def _check(constants: Constants) -> None:
    """Refuse what no switch takes."""
    allowed = {
        "select": ("best", "random", "none"),
        "choices": ("all", "correct"),
        "stage": ("task", "adapt"),
        "fusion": ("concat", "cosine"),
    }
    for name, choices in allowed.items():
        if getattr(constants, name) not in choices:
            raise UserError(f"--set {name}={getattr(constants, name)}: choose from {', '.join(choices)}")
    if constants.model == "clip-transformer" and constants.fusion == "cosine":
        raise UserError(
            "--set fusion=cosine: clip-transformer reads both side by side; choose a clip-...-linear"
        )
    if constants.m < 1 or constants.T <= 0 or constants.w < 0:
        raise UserError("--set m must be 1 or more, T above 0 and w not below 0")


def build(constants: Constants, task: Any, tokenizer: Any, shapes: dict):
    """The student of a task."""
    if constants.model.startswith("clip-"):
        from student.models.clip_baselines import build_adapter

        widths = tuple(shapes.get(name, (0,))[-1] for name in ("image_emb", "text_emb"))
        return build_adapter(
            constants.model,
            constants.fusion,
            widths,
            inputs=task.inputs,
            classes=task.classes,
            init=constants.init,
        )
    from student.models.single_stream.loading import open_student
    from student.models.single_stream.model import Shape, parse_model
    from student.models.single_stream.villa import Perturbation

    inputs = 1 if constants.stage == "adapt" else task.inputs
    width = shapes.get("region_feature", (0,))[-1]
    shape = Shape(
        parse_model(constants.model)[0], width, inputs, task.classes, task.name == "vqa", constants.stage
    )
    attack = Perturbation(constants.adv_steps, constants.adv_lr, constants.adv_max)
    return open_student(
        constants.model,
        constants.init,
        shape,
        tokenizer=tokenizer,
        perturbation=attack,
        max_text=constants.max_text,
    )


def heads(constants: Constants, student, shapes: dict):
    """Maps to CLIP's width, where there is something to distil."""
    from student.models.heads import TokenSpace

    width = shapes.get("image_emb", shapes.get("text_emb", (0,)))[-1]
    return (
        TokenSpace(student.config.hidden_size, width) if constants.w and hasattr(student, "config") else None
    )


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """Terms of Eq. 8 or of Eq. 11, with VILLA's two where there is one."""
    terms, notes = (
        adapt_terms(student, batch) if constants.stage == "adapt" else task_terms(student, batch, constants)
    )
    if "img_t" not in student:
        return terms, notes
    weight = distillation_weight(student, batch, constants)  # [n, C]
    notes["distilled"] = (weight > 0).float().mean()
    return terms | distillation_terms(student, batch, weight, constants), notes


def task_terms(student: dict, batch: dict, constants: Constants) -> tuple[dict, dict]:
    """L_task over the rows with a label, and the share of them that is right."""
    from student.losses import answer_kl, answer_loss

    logits, target, labelled = student["logits"].float(), batch["target"], batch["labelled"]
    many, known = bool(batch["many"].any()), labelled.sum().clamp(min=1)
    right = target.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    terms = {"task": (answer_loss(logits, target, many=many) * labelled).sum() / known}
    if "adv_logits" in student:
        attacked = student["adv_logits"].float()  # [n, K, classes]
        each = [answer_loss(attacked[:, k], target, many=many) for k in range(attacked.shape[1])]
        terms["adv"] = (sum(each) / len(each) * labelled).sum() / known
        terms["adv_kl"] = constants.adv_kl * answer_kl(attacked, logits, many=many).mean()
    return terms, {"right": ((right * labelled).sum() / known).detach()}


def adapt_terms(student: dict, batch: dict) -> tuple[dict, dict]:
    """MLM on the matching rows and image-text matching on all (UNITER's pretraining tasks)."""
    from torch.nn.functional import cross_entropy

    words = batch["masked_word"]  # [n, slots], -1 where a slot is empty
    each = cross_entropy(
        student["word_logits"].float().mT, words, ignore_index=-1, reduction="none"
    )  # [n, slots]
    found = each.sum(1) / (words >= 0).sum(1)  # every row has one masked word at least
    match = cross_entropy(student["match"].float(), batch["matched"].long())
    right = (student["match"].argmax(1) == batch["matched"].long()).float().mean()
    # Half of the rows match, in the mean: a sum over 0.5 n is the same in any number of processes
    return {"mlm": (found * batch["matched"]).sum() / (0.5 * len(words)), "itm": match}, {
        "matched_right": right
    }


def distillation_weight(student: dict, batch: dict, constants: Constants):
    """w_r of each row and choice, float [n, C]; a row whose correct choice alone counts has all weight on that."""
    import torch

    from student.losses import confidence_weight

    n, C = student["img_t"].shape[:2]
    weight = torch.full((n, C), constants.w, device=student["img_t"].device)
    if constants.stage == "adapt":
        return weight * batch["matched"][:, None]
    if constants.choices == "correct" and C > 1:
        weight = torch.where(batch["labelled"][:, None] > 0, C * weight * batch["target"], weight)
    if constants.confidence:
        weight = weight * confidence_weight(batch["clip_logits"], student["logits"], constants.T)[:, None]
    return weight


def distillation_terms(student: dict, batch: dict, weight, constants: Constants) -> dict:
    """w_r L_dv, w_r L_dt and w_r L'_dt, those that are switched on."""
    from torch.nn.functional import normalize

    from student.losses import token_l1

    def shaped(rows):
        rows = rows.float()
        return normalize(rows, dim=-1) * rows.shape[-1] ** 0.5 if constants.normalize else rows

    terms = {}
    if constants.dv:
        image = shaped(batch["image_emb"])[:, None].expand_as(student["img_t"])
        terms["dv"] = constants.dv * token_l1(student["img_t"], image, weight)
    if constants.dt:
        terms["dt"] = constants.dt * token_l1(student["cls_t"], shaped(batch["text_emb"]), weight)
    if "words_t" in student:
        there = batch["word_there"]  # [n, C, m]: 0 where a text has fewer words, or they were cut
        terms["words"] = token_l1(
            student["words_t"], shaped(batch["word_feature"]), weight[..., None] * there
        )
    return terms


GIVEN = (
    "image_emb",
    "text_emb",
    "word_feature",
    "word_there",
    "clip_logits",
    "target",
    "labelled",
    "many",
    "matched",
    "masked_word",
)
CLIP_TD = Recipe(
    name="clip_td",
    paper="CLIP-TD: CLIP Targeted Distillation for Vision-Language Tasks (2022)",
    doc="CLIP's picture, text and best words into UNITER, VL-BERT, VILLA",
    constants=Constants(),
    build=build,
    heads=heads,
    loss=loss,
    reads=reads,
    given=GIVEN,
    questions=True,
    data="data/scenes/vcr1",
    optim=Optim(lr=5e-4, beta2=0.999, eps=1e-8, weight_decay=0.01, warmup=0.1, clip=1.0),
    steps=400,
    batch=64,
)
