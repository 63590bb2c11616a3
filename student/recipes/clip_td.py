"""Distill CLIP into vision-language transformers that answer questions (CLIP-TD, Wang et al., 2022).

A row is a question about a picture. The student reads each answer choice (VCR), the hypothesis (SNLI-VE) or
the question (VQA) together with the regions of the picture. f_img, f_cls, f(t') are the student's output
vectors of the whole picture, of [CLS] and of selected words, each mapped to the teacher's width by a linear
layer. CLIP's embeddings are read from its cache:

    L_dv   | f_CLIP(image) - f_img |_1                                                        Eq. 3
    L_dt   | f_CLIP(text) - f_cls |_1                                                         Eq. 4
    S      S_vr/|S_vr|_1 + S_si/|S_si|_1, the score of each word of a text, from the cache    Eq. 5
    L'_dt  | f_CLIP(t') - f(t') |_1, t' the m words with the highest S                        Eq. 6-7
    r      T max(sm(CLIP's logits)) / max(sm(student's logits)), per row                      Eq. 9
    w_r    w where r > 1, else 0                                                              Eq. 10
    L      L_task + w_r (L_dv + L_dt + L'_dt)                                                 Eq. 1, 8
    L_AF   L_MLM + L_ITM + w (L_dv + L_dt), in a stage before L, on the same data             Eq. 11

Settings, with the paper's names:

    distill_weight                  w
    image_term, text_term           switch the terms of naive V, L, VL
    select=best|random|none         TS, RTS, or no selected words; num_words is m
    confidence, temperature         CW, T
    choices=all|correct             the choices that are distilled
    stage=adapt                     AF; with distill_weight=0, a second pretraining without distillation
    regime=full|low:N|semi:N|zero   the labels that are used

Students are uniter, vl-bert and villa, each in base, large and tiny, and bert, which sees no picture.
Baselines without distillation are clip-1-linear, clip-3-linear and clip-transformer on frozen CLIP
(fusion=concat|cosine), and clip-tuned, which is CLIP itself (init=FOLDER).

Free choices, where the paper gives no detail:

- The maps to the teacher's width are linear. f_img is the output of region 0, the whole picture.
- |.|_1 is the mean over the width, after CLIP's rows are scaled to a root mean square of 1. The terms are
  means over selected words, choices and rows.
- T = 1. CLIP's logits are its scale times the cosines to the answers; in SNLI-VE, the distances to three
  anchors found by k-means.
- In semi, half of each batch is labeled.
- RTS draws its words once per text.
- In AF, L_MLM covers matching pairs only. AF reads the correct choice of labeled rows and the question of all
  others. To prepare for low:N, adapt with semi:N: it uses all rows and the same N labels.

    tc build --teacher regions-lite --data data/scenes/vcr1
    tc build --teacher clip-lite --outputs embeddings,tokens --data data/scenes/vcr1
    student train --recipe clip_td
    student train --recipe clip_td --set stage=adapt --set regime=semi:100 --out runs/adapted
    student train --recipe clip_td --set init=runs/adapted --set regime=low:100
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from annotated_types import Interval

from student.recipe import Batch, Notes, Optim, Outputs, Progress, Recipe, Setting, Shapes, Terms
from student.rows import Questions, TeacherLogits, Words
from teachercache.core.errors import UserError
from teachercache.core.ranges import MOST, Form, Name, Number, Positive, Seed, Weight, check_record

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from student.contract import Student
    from student.models.single_stream.model import SingleStream


Regime = Annotated[
    str,
    Form(
        r"full|zero|(low|semi):0*[1-9]\d{0,8}", "choose full, zero, low:N or semi:N (N labels of each group)"
    ),
]
Length = Annotated[int, Interval(ge=4, le=MOST)]  # [CLS], [SEP] and something between and behind them


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants and switches, with its values where it gives them, and the student model."""

    distill_weight: Weight = 0.05  # w of Eq. 1 and 8; 0 for the baseline
    image_term: Weight = 1.0  # factor of L_dv; 0 switches it off
    text_term: Weight = 1.0  # factor of L_dt; 0 switches it off
    select: Literal["best", "random", "none"] = "best"  # t'
    num_words: Number = 2  # m, the number of selected words
    confidence: bool = True  # Eq. 9-10
    temperature: Positive = 1.0  # T; free choice
    choices: Literal["all", "correct"] = "all"  # VCR: the choices that are distilled
    normalize: bool = True  # scale CLIP's rows to a root mean square of 1; free choice
    stage: Literal["task", "adapt"] = "task"  # adapt: Eq. 11
    mode: Literal["q2a", "qa2r"] = "q2a"  # VCR
    regime: Regime = "full"  # or low:N, semi:N, zero
    subset: Seed = 0  # seed that draws the N labels of low:N and semi:N
    model: Name = "vl-bert-tiny"
    fusion: Literal["concat", "cosine"] = "concat"  # of the baselines on frozen CLIP
    init: str = ""  # a BERT folder, a UNITER checkpoint, or a run
    # A folder with tokenizer.json or vocab.txt; by default that of init, else the words of the training rows
    tokenizer: str = ""
    max_text: Length = 96  # sub-words per input
    adv_steps: Number = 3  # VILLA: K, the number of perturbation steps
    adv_lr: Weight = 0.1  # VILLA: step size of the perturbation
    adv_max: Weight = 0.0  # VILLA: largest norm of a perturbation, 0 for no limit
    adv_kl: Weight = 1.5  # VILLA: weight of the divergence from the clean prediction


WORD_FIELDS = {"best": ("word_index", "word_feature"), "random": ("random_index", "random_feature")}


def words_of(constants: Constants) -> Words | None:
    """Return which selected words t' are distilled, or None if there are none."""
    if not constants.distill_weight or constants.stage != "task" or constants.select == "none":
        return None
    index, feature = WORD_FIELDS[constants.select]
    return Words("word_span", index, feature, constants.num_words)


def weighs_confidence(constants: Constants) -> bool:
    """Return whether rows are weighted by confidence (Eq. 9), which needs CLIP's own logits."""
    return constants.distill_weight > 0 and constants.confidence and constants.stage == "task"


def rows(constants: Constants) -> Questions:
    """Return the kind of rows: questions of a task, or for stage=adapt their texts with masked words."""
    reads_clip = not constants.model.startswith(("clip-", "bert-"))
    return Questions(
        mode=constants.mode,
        regime=constants.regime,
        subset=constants.subset,
        max_text=constants.max_text,
        make_tokenizer=functools.partial(make_tokenizer, constants),
        words=words_of(constants) if reads_clip else None,
        teacher_logits=TeacherLogits() if weighs_confidence(constants) else None,
        adapt=constants.stage == "adapt",
    )


def make_tokenizer(constants: Constants, texts: Sequence[str]) -> "Tokenizer":
    """Return the tokenizer of the setting `tokenizer`, else that of `init`, else one built from the texts."""
    from student.models.single_stream.loading import init_tokenizer
    from student.models.single_stream.tokenizer import load_tokenizer, vocabulary_tokenizer

    if constants.tokenizer:
        return load_tokenizer(Path(constants.tokenizer))
    # Baselines named clip-* use CLIP's own tokenizer
    if constants.init and not constants.model.startswith("clip-"):
        return init_tokenizer(constants.init)
    return vocabulary_tokenizer(texts)


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the regions that the student reads, and the CLIP fields that the terms need."""
    _check(constants)
    if constants.model.startswith("clip-"):
        return () if constants.model == "clip-tuned" else ("image_emb", "text_emb")
    if constants.model.startswith("bert-"):
        if constants.distill_weight or constants.stage == "adapt":
            raise UserError(
                f"--set model={constants.model} sees no picture: add --set distill_weight=0, and leave out "
                "stage=adapt"
            )
        return ()
    fields = ["region_feature", "region_box"]
    if constants.distill_weight:
        scored = constants.confidence and constants.stage == "task"
        fields += ["image_emb"] if constants.image_term or scored else []
        fields += ["text_emb"] if constants.text_term or scored else []
        words = words_of(constants)
        fields += [words.span, words.index, words.feature] if words is not None else []
    return tuple(fields)


def _check(constants: Constants) -> None:
    """Raise a UserError for invalid or contradictory settings."""
    check_record(constants)
    if constants.model == "clip-transformer" and constants.fusion == "cosine":
        raise UserError(
            "--set fusion=cosine: clip-transformer reads both side by side; choose clip-1-linear or "
            "clip-3-linear"
        )


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student for the setting's task."""
    task, shapes = setting.task, setting.shapes
    if constants.model.startswith("clip-"):
        from student.models.clip_baselines import build_adapter

        widths = shapes.get("image_emb", (0,))[-1], shapes.get("text_emb", (0,))[-1]
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
    architecture = parse_model(constants.model)[0]
    shape = Shape(architecture, width, inputs, task.classes, task.several_right, constants.stage)
    perturbation = Perturbation(constants.adv_steps, constants.adv_lr, constants.adv_max)
    return open_student(
        constants.model,
        constants.init,
        shape,
        tokenizer=setting.tokenizer,
        perturbation=perturbation,
        max_text=constants.max_text,
    )


def heads(constants: Constants, student: "Student", shapes: Shapes) -> "nn.Module | None":
    """Build the linear maps to CLIP's width, or return None if nothing is distilled."""
    from student.models.heads import TokenSpace

    if not constants.distill_weight or constants.model.startswith("clip-"):
        return None
    width = shapes.get("image_emb", shapes.get("text_emb", (0,)))[-1]
    return TokenSpace(cast("SingleStream", student).config.hidden_size, width)


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute the terms of Eq. 8, or of Eq. 11 for stage=adapt; VILLA adds its two adversarial terms."""
    if constants.stage == "adapt":
        terms, notes = adapt_terms(outputs, fields)
    else:
        terms, notes = task_terms(outputs, fields, constants)
    if "image_in_teacher_space" not in outputs:
        return terms, notes
    weight = distillation_weight(outputs, fields, constants)  # [n, C]
    notes["distilled"] = (weight > 0).float().mean()
    return terms | distillation_terms(outputs, fields, weight, constants), notes


def task_terms(outputs: Outputs, fields: Batch, constants: Constants) -> tuple[Terms, Notes]:
    """Compute L_task over the labeled rows, and VILLA's terms if the student was perturbed.

    Returns:
        The terms `task` and for VILLA `adv`, `adv_kl`; the note `right`, the accuracy on the labeled rows.
    """
    from student.losses import answer_kl, answer_loss

    logits, target, labeled = outputs["logits"].float(), fields["target"], fields["labeled"]
    many = bool(fields["several_right"].any())
    num_labeled = labeled.sum().clamp(min=1)
    right = target.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    terms = {"task": (answer_loss(logits, target, many=many) * labeled).sum() / num_labeled}
    if "adv_logits" in outputs:
        adv_logits = outputs["adv_logits"].float()  # [n, K, classes]
        per_step = [answer_loss(adv_logits[:, k], target, many=many) for k in range(adv_logits.shape[1])]
        terms["adv"] = (sum(per_step) / len(per_step) * labeled).sum() / num_labeled
        terms["adv_kl"] = constants.adv_kl * answer_kl(adv_logits, logits, many=many).mean()
    return terms, {"right": ((right * labeled).sum() / num_labeled).detach()}


def adapt_terms(outputs: Outputs, fields: Batch) -> tuple[Terms, Notes]:
    """Compute L_MLM on the matching rows and L_ITM on all rows (UNITER's pretraining tasks).

    Returns:
        The terms `mlm` and `itm`; the note `matched_right`, the accuracy of image-text matching.
    """
    from torch.nn.functional import cross_entropy

    words = fields["masked_word"]  # [n, slots], -1 for an empty slot
    word_logits = outputs["word_logits"].float().mT
    per_word = cross_entropy(word_logits, words, ignore_index=-1, reduction="none")  # [n, slots]
    per_row = per_word.sum(1) / (words >= 0).sum(1)  # every row has at least one masked word
    matched = fields["matched"]
    itm = cross_entropy(outputs["match"].float(), matched.long())
    right = (outputs["match"].argmax(1) == matched.long()).float().mean()
    # Half of the rows match on average. Dividing by 0.5 n gives the same loss for any number of processes
    mlm = (per_row * matched).sum() / (0.5 * len(words))
    return {"mlm": mlm, "itm": itm}, {"matched_right": right}


def distillation_weight(outputs: Outputs, fields: Batch, constants: Constants) -> "Tensor":
    """Return w_r of each row and choice (Eq. 9-10), float [n, C].

    With choices=correct, labeled rows put all weight on the correct choice. For stage=adapt, only matching
    rows have a weight.
    """
    import torch

    from student.losses import confidence_weight

    picture = outputs["image_in_teacher_space"]
    n, C = picture.shape[:2]
    weight = torch.full((n, C), constants.distill_weight, device=picture.device)
    if constants.stage == "adapt":
        return weight * fields["matched"][:, None]
    if constants.choices == "correct" and C > 1:
        weight = torch.where(fields["labeled"][:, None] > 0, C * weight * fields["target"], weight)
    if constants.confidence:
        confident = confidence_weight(fields["clip_logits"], outputs["logits"], constants.temperature)
        weight = weight * confident[:, None]
    return weight


def distillation_terms(outputs: Outputs, fields: Batch, weight: "Tensor", constants: Constants) -> Terms:
    """Compute the terms w_r L_dv, w_r L_dt and w_r L'_dt, as far as they are switched on.

    Args:
        outputs: `image_in_teacher_space` and `cls_in_teacher_space` [n, C, d]; with selected words
            `words_in_teacher_space` [n, C, m, d].
        fields: `image_emb` [n, d], `text_emb` [n, C, d]; with selected words `word_feature` [n, C, m, d] and
            `word_valid` [n, C, m].
        weight: w_r [n, C].
        constants: The switches, and whether CLIP's rows are scaled.
    """
    from torch.nn.functional import normalize

    from student.losses import token_l1

    def scaled(rows: "Tensor") -> "Tensor":
        rows = rows.float()
        return normalize(rows, dim=-1) * rows.shape[-1] ** 0.5 if constants.normalize else rows

    terms = {}
    if constants.image_term:
        picture = outputs["image_in_teacher_space"]
        image = scaled(fields["image_emb"])[:, None].expand_as(picture)
        terms["dv"] = constants.image_term * token_l1(picture, image, weight)
    if constants.text_term:
        text = scaled(fields["text_emb"])
        terms["dt"] = constants.text_term * token_l1(outputs["cls_in_teacher_space"], text, weight)
    if "words_in_teacher_space" in outputs:
        valid = fields[
            "word_valid"
        ]  # [n, C, m]: 0 where a text has fewer than m words, or a word was cut off
        words = scaled(fields["word_feature"])
        terms["words"] = token_l1(outputs["words_in_teacher_space"], words, weight[..., None] * valid)
    return terms


CLIP_TD = Recipe(
    name="clip_td",
    paper="CLIP-TD: CLIP Targeted Distillation for Vision-Language Tasks (2022)",
    doc="CLIP's image, text and best-word embeddings distilled into UNITER, VL-BERT, VILLA",
    constants=Constants(),
    rows=rows,
    student=build,
    distill_heads=heads,
    loss=loss,
    teacher_fields=teacher_fields,
    loss_fields=(
        "image_emb",
        "text_emb",
        "word_feature",
        "word_valid",
        "clip_logits",
        "target",
        "labeled",
        "several_right",
        "matched",
        "masked_word",
    ),
    per_row=frozenset({"*"}),
    data="data/scenes/vcr1",
    optim=Optim(lr=5e-4, beta2=0.999, eps=1e-8, weight_decay=0.01, warmup=0.1, max_grad_norm=1.0),
    steps=400,
    batch=64,
)
