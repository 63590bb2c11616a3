"""The losses of the papers as pure functions of tensors, independent of ranks, files and modules.

Legend: V, S are the student's image and text embeddings (`image`, `text`); V_T, S_T are the teacher's
(`t_image`, `t_text`). The caller L2-normalizes the rows, and row i of each belongs to pair i. a = `scale`
multiplies the cosines (it is exp(logit_scale)); a_T = `t_scale` is the teacher's. sm is the softmax over each
row.

All losses compute in float32 (float64 for float64 inputs). They return a scalar, or one value per row where
the signature says [n]. Teacher tensors need no gradient. From `tiled.TILED_FROM` rows on, `tiled` computes
the same values without an N x N matrix.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student.losses import tiled

Scale = Float[Tensor, "..."] | float


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast each tensor to float32; float64 tensors stay as they are."""
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def _diagonal_ce(logits: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Compute the row-wise cross-entropy with the diagonal as target, mean over rows."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _kl_rows(teacher: Float[Tensor, "n m"], student: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Compute KL(sm(teacher) || sm(student)), mean over rows."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def clip_loss(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Scale) -> Float[Tensor, ""]:
    """Compute symmetric InfoNCE, 1/2 [CE(a V S^T, I) + CE(a S V^T, I)] (CLIP; the task loss of CLIP-KD)."""
    if tiled.pays(image):
        return tiled.tiled_clip(image, text, scale)
    V, S = _wide(image, text)
    logits = scale * V @ S.T  # [n, n]
    return (_diagonal_ce(logits) + _diagonal_ce(logits.T)) / 2


def crd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
) -> Float[Tensor, ""]:
    """Compute contrastive relational distillation (CLIP-KD): KL between teacher and student softmax.

    1/2 [KL(sm(a_T V_T S_T^T) || sm(a V S^T)) + KL(sm(a_T S_T V_T^T) || sm(a S V^T))].
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_crd(image, text, scale, t_image, t_text, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student = scale * V @ S.T  # [n, n]
    teacher = t_scale * V_T @ S_T.T  # [n, n]
    return (_kl_rows(teacher, student) + _kl_rows(teacher.T, student.T)) / 2


def clip_crd_losses(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute `clip_loss` and `crd_loss` of the same rows; in tiled form they share their matrix products.

    Returns:
        The two losses, `clip_loss` first.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_clip_crd(image, text, scale, t_image, t_text, t_scale)
    return clip_loss(image, text, scale), crd_loss(image, text, scale, t_image, t_text, t_scale)


def fd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
) -> Float[Tensor, ""]:
    """Compute feature distillation (CLIP-KD): mean over pairs and dims of (V' - V_T)^2, plus the text term.

    V', S' are the student's embeddings in the teacher's width. For unit rows the loss is 2/d (1 - cos) per
    modality, so its weight has to be chosen for a given d.
    """
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    return F.mse_loss(V, V_T) + F.mse_loss(S, S_T)


def icl_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    scale: Scale,
) -> Float[Tensor, ""]:
    """Compute interactive contrastive learning (CLIP-KD): student rows against the teacher's other modality.

    1/2 [CE(g V' S_T^T, I) + CE(g S' V_T^T, I)], where g = `scale` is a separate learnable scale.
    """
    if tiled.pays(image):
        return tiled.tiled_icl(image, text, t_image, t_text, scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    return (_diagonal_ce(scale * V @ S_T.T) + _diagonal_ce(scale * S @ V_T.T)) / 2


def gd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    t_scale: Scale,
) -> Float[Tensor, ""]:
    """Compute gradient distillation (CLIP-KD, appendix Eq. 7).

    Mean over pairs of |G_V,T - G_V|^2 + |G_S,T - G_S|^2. G is the gradient of the batch-mean task loss. Its
    square shrinks as (a / N)^2, so the weight of this loss has to be chosen for a given scale and batch size.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_gd(image, text, scale, t_image, t_text, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student, teacher = _task_gradients(V, S, scale), _task_gradients(V_T, S_T, t_scale)
    image_term, text_term = (
        (G_T - G).square().sum(1).mean() for G, G_T in zip(student, teacher, strict=True)
    )
    return image_term + text_term


def _task_gradients(
    V: Float[Tensor, "n d"], S: Float[Tensor, "n d"], scale: Scale
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Compute differentiable G_V, G_S = d clip_loss / dV, dS in closed form (CLIP-KD, appendix Eq. 1-6).

    With P = sm(a V S^T) and Q = sm(a S V^T):

        G_V = a/2N [(P - I) S + (Q - I)^T S],  G_S = a/2N [(Q - I) V + (P - I)^T V]
    """
    logits = scale * V @ S.T  # [n, n]
    both = logits.softmax(1) + logits.T.softmax(1).T - 2 * torch.eye(len(V), dtype=V.dtype, device=V.device)
    return scale * (both @ S) / (2 * len(V)), scale * (both.T @ V) / (2 * len(V))


def cross_kd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    t_scale: Scale,
) -> Float[Tensor, ""]:
    """Compute cross distribution distillation (CLIP-KD): CRD of student rows against teacher columns.

    1/2 [KL(sm(a_T V_T S_T^T) || sm(g V' S_T^T)) + KL(sm(a_T S_T V_T^T) || sm(g S' V_T^T))], with g as in
    `icl_loss`.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_cross(image, text, t_image, t_text, scale, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    teacher = t_scale * V_T @ S_T.T  # [n, n]
    return (_kl_rows(teacher, scale * V @ S_T.T) + _kl_rows(teacher.T, scale * S @ V_T.T)) / 2


def soft_clip_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
) -> Float[Tensor, ""]:
    """Compute affinity mimicking: InfoNCE with the teacher's softmax as target.

    1/2 [CE(a V S^T, sm(a_T V_T S_T^T)) + CE(a S V^T, sm(a_T S_T V_T^T))], which is `crd_loss` plus the
    entropy of the teacher's softmax.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_soft_clip(image, text, scale, t_image, t_text, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student = scale * V @ S.T  # [n, n]
    teacher = t_scale * V_T @ S_T.T  # [n, n]
    image_to_text = F.cross_entropy(student, teacher.softmax(1))
    return (image_to_text + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def psd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    unaligned: Bool[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Compute progressive self-distillation: hard targets for aligned pairs, soft for unaligned pairs.

    1/N [sum over aligned i of CE(Z_i, i) + sum over unaligned i of KL(R_i || sm(Z)_i)], with Z = a V S^T,
    averaged with the same term for Z^T. R is the transpose of the teacher's text-to-image softmax,
    sm(a_T S_T V_T^T)^T, with its rows renormalized. In PSD the teacher is the model itself, detached.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_psd(image, text, scale, t_image, t_text, t_scale, unaligned)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student = scale * V @ S.T  # [n, n]
    teacher = t_scale * V_T @ S_T.T  # [n, n]
    return (_psd_rows(student, teacher, unaligned) + _psd_rows(student.T, teacher.T, unaligned)) / 2


def _psd_rows(
    z: Float[Tensor, "n n"], t: Float[Tensor, "n n"], unaligned: Bool[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Compute one direction of `psd_loss`; sm(t - lse_j) is sm(t^T)^T with renormalized rows."""
    log_p, log_r = z.log_softmax(1), (t - t.logsumexp(0)).log_softmax(1)
    soft = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
    return torch.where(unaligned, soft, -log_p.diagonal()).mean()


def hidden_loss(hidden: Float[Tensor, "n d"], t_hidden: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Compute FD of one block (CLIP-KD, appendix Fig. 2): mean over pairs and dims of (H' - H_T)^2."""
    H, H_T = _wide(hidden, t_hidden)
    return F.mse_loss(H, H_T)


def answer_loss(
    logits: Float[Tensor, "n classes"], target: Float[Tensor, "n classes"], *, many: bool = False
) -> Float[Tensor, " n"]:
    """Compute the task loss of each row.

    Args:
        logits: A logit of each answer.
        target: The target probability of each answer.
        many: Several answers may be right (VQA): sum binary cross-entropies over the answers. By default the
            loss is the cross-entropy of the softmax.
    """
    Z, T = _wide(logits, target)
    if many:
        return F.binary_cross_entropy_with_logits(Z, T, reduction="none").sum(1)
    return -(T * Z.log_softmax(1)).sum(1)


def token_l1(
    student_tokens: Float[Tensor, "*rows d"],
    teacher_tokens: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "*rows"],
) -> Float[Tensor, ""]:
    """Compute the weighted L1 distance of tokens to the teacher's (CLIP-TD Eq. 3, 4, 7).

    Mean over tokens and width. Missing tokens have weight 0, and so have rows that confidence weighting
    excludes (Eq. 10). Free choice: the mean over the width. With it the paper's weights of 0.01 to 1 all
    help; with a sum the term dominates the task loss.
    """
    S, T, W = _wide(student_tokens, teacher_tokens, weight)
    return (W * (S - T).abs().mean(-1)).mean()


def confidence_weight(
    teacher_logits: Float[Tensor, "n classes"], student_logits: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, " n"]:
    """Compute CLIP-TD's confidence weight (Eq. 9-10), which has no gradient.

    1 if r = T max(sm(teacher)) / max(sm(student)) > 1, else 0, where T = `temperature`.
    """
    Z_T, Z = _wide(teacher_logits.detach(), student_logits.detach())
    r = temperature * Z_T.softmax(1).amax(1) / Z.softmax(1).amax(1)
    return (r > 1).to(r.dtype)


def answer_kl(
    logits: Float[Tensor, "n k classes"], clean: Float[Tensor, "n classes"], *, many: bool = False
) -> Float[Tensor, " n"]:
    """Compute VILLA's symmetric divergence between k perturbed predictions and the clean one, per row.

    Mean over k of KL(p_clean || p_k) + KL(p_k || p_clean) of softmaxes. With `many` (VQA) each answer is a
    Bernoulli variable, and the divergences are summed over answers.
    """
    Z, C = _wide(logits, clean)
    C = C.unsqueeze(1)
    if many:
        return ((Z.sigmoid() - C.sigmoid()) * (Z - C)).sum(-1).mean(1)
    return ((Z.softmax(-1) - C.softmax(-1)) * (Z.log_softmax(-1) - C.log_softmax(-1))).sum(-1).mean(1)


def diffusion_loss(predicted: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Compute each row's squared error of the predicted noise, mean over elements (SDS-CLIP Eq. 3 and 6)."""
    P, E = _wide(predicted, noise)
    return (P - E).square().flatten(1).mean(1)


def ttdm_loss(projected_text: Float[Tensor, "n d"], t_text: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Compute VLKD's text-text distance minimization (section 3.2.1): mean over pairs of |t_eos - e_norm|^2.

    For unit rows the loss is 2 (1 - cos).
    """
    E, T = _wide(projected_text, t_text)
    return (T - E).square().sum(1).mean()


def text_nll(
    logits: Float[Tensor, "n length words"], text: Int[Tensor, "n length"], counted: Bool[Tensor, "n length"]
) -> Float[Tensor, " n"]:
    """Compute each row's negative log-likelihood of its counted tokens (VLKD Eq. 2).

    -sum_j log P(w_j | w_<j, C), before the mean over pairs.

    Args:
        logits: Logits of the token at each position.
        text: Token ids.
        counted: The tokens that the sum includes, such as all but padding and the prompt.
    """
    (Z,) = _wide(logits)
    token_nll = F.cross_entropy(Z.flatten(0, 1), text.flatten(), reduction="none").view_as(text)
    return (token_nll * counted).sum(1)


def scst_loss(
    nll: Float[Tensor, " n"], reward: Float[Tensor, " n"], baseline: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Compute the loss of self-critical training (Rennie et al., 2017).

    -mean over rows of (r(sampled) - r(greedy)) log P(sampled).

    Args:
        nll: -log P(sampled) of each row.
        reward: r(sampled).
        baseline: r(greedy).
    """
    N, R, B = _wide(nll, reward, baseline)
    return ((R - B) * N).mean()
