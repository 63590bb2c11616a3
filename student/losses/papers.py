"""The losses of the papers as pure functions of embeddings. They know no ranks, files or modules.

Legend: V, S student image and text embeddings; V_T, S_T the teacher's; rows are L2-normalised by the caller and row i
of each belongs to pair i; a = `scale` multiplies cosines (it is exp(logit_scale)). Everything is computed in float32 at
least (float64 in, float64 out) and returned as a scalar. Teacher tensors may come without gradient. From
tiled.TILED_FROM rows on the same numbers come from tiled.py, without a matrix of N x N.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student.losses import tiled

Scale = Float[Tensor, "..."] | float


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor in float32, or as it is where it is wider."""
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def _diagonal_ce(logits: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Row-wise cross-entropy against the diagonal, mean over rows."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _kl_rows(teacher: Float[Tensor, "n m"], student: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """KL(sm(teacher) || sm(student)), mean over rows."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def clip_loss(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Scale) -> Float[Tensor, ""]:
    """Symmetric InfoNCE, 1/2 [CE(a V S^T, I) + CE(a S V^T, I)] (CLIP; CLIP-KD's task loss)."""
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
    """Contrastive relational distillation (CLIP-KD): KL of the teacher's to the student's contrastive softmax.

    1/2 [KL(sm(a_T V_T S_T^T) || sm(a_S V S^T)) + KL(sm(a_T S_T V_T^T) || sm(a_S S V^T))], each with its own scale.
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
    """clip_loss and crd_loss of the same rows: in tiles they share their products of matrices."""
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_clip_crd(image, text, scale, t_image, t_text, t_scale)
    return clip_loss(image, text, scale), crd_loss(image, text, scale, t_image, t_text, t_scale)


def fd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
) -> Float[Tensor, ""]:
    """Feature distillation (CLIP-KD): mean over pairs and dims of (V' - V_T)^2, plus the same for text.

    For unit rows it is 2/d (1 - cos) per modality, so a weight means something only beside d.
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
    """Interactive contrastive learning (CLIP-KD): the student's rows against the teacher's other modality.

    1/2 [CE(g V' S_T^T, I) + CE(g S' V_T^T, I)], g a learnable scale of its own.
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
    """Gradient distillation (CLIP-KD, appendix Eq. 7): mean over pairs of |G_V,T - G_V|^2 + |G_S,T - G_S|^2.

    G is the gradient of the batch-mean task loss, so its square shrinks as (a / N)^2 and a weight means something only
    beside scale and batch.
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_gd(image, text, scale, t_image, t_text, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student, teacher = _task_gradients(V, S, scale), _task_gradients(V_T, S_T, t_scale)
    return sum((G_T - G).square().sum(1).mean() for G, G_T in zip(student, teacher, strict=True))


def _task_gradients(
    V: Float[Tensor, "n d"], S: Float[Tensor, "n d"], scale: Scale
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """G_V, G_S = d clip_loss / dV, dS in closed form (CLIP-KD, appendix Eq. 1-6), themselves differentiable.

    P = sm(a V S^T), Q = sm(a S V^T): G_V = a/2N [(P - I) S + (Q - I)^T S], G_S = a/2N [(Q - I) V + (P - I)^T V].
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
    """Cross distribution distillation (CLIP-KD): CRD whose student logits meet the teacher's other modality.

    1/2 [KL(sm(a_T V_T S_T^T) || sm(g V' S_T^T)) + KL(sm(a_T S_T V_T^T) || sm(g S' V_T^T))], g as in ICL.
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
    """Affinity mimicking: InfoNCE whose targets are the teacher's softmax, crd_loss and the teacher's entropy.

    1/2 [CE(a V S^T, sm(a_T V_T S_T^T)) + CE(a S V^T, sm(a_T S_T V_T^T))].
    """
    if tiled.pays(image, t_image, t_text, t_scale):
        return tiled.tiled_soft_clip(image, text, scale, t_image, t_text, t_scale)
    V, S, V_T, S_T = _wide(image, text, t_image, t_text)
    student = scale * V @ S.T  # [n, n]
    teacher = t_scale * V_T @ S_T.T  # [n, n]
    both = zip((student, student.T), (teacher, teacher.T), strict=True)
    return sum(F.cross_entropy(z, t.softmax(1)) for z, t in both) / 2


def psd_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    unaligned: Bool[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Progressive self-distillation: hard targets for aligned pairs, swapped soft ones for unaligned pairs.

    1/N [sum over aligned i of CE(Z_i, i) + sum over unaligned i of KL(R_i || sm(Z)_i)], Z = a V S^T, and the same for
    Z^T, halved. R is the transpose of the teacher's text-to-image softmax, sm(a_T S_T V_T^T)^T, rows renormalised.
    In PSD the teacher is the model itself, detached.
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
    """One direction of psd_loss: softmax over rows of t - lse_j is sm(t^T)^T with its rows renormalised."""
    log_p, log_r = z.log_softmax(1), (t - t.logsumexp(0)).log_softmax(1)
    soft = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
    return torch.where(unaligned, soft, -log_p.diagonal()).mean()


def hidden_loss(hidden: Float[Tensor, "n d"], t_hidden: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """FD of one block of one tower (CLIP-KD, appendix Fig. 2): mean over pairs and dims of (H' - H_T)^2."""
    H, H_T = _wide(hidden, t_hidden)
    return F.mse_loss(H, H_T)


def answer_loss(
    logits: Float[Tensor, "n classes"], target: Float[Tensor, "n classes"], *, many: bool = False
) -> Float[Tensor, " n"]:
    """Each row's task loss: cross-entropy, or where several answers may be right (VQA) binary ones, summed."""
    Z, T = _wide(logits, target)
    if many:
        return F.binary_cross_entropy_with_logits(Z, T, reduction="none").sum(1)
    return -(T * Z.log_softmax(1)).sum(1)


def token_l1(
    student_tokens: Float[Tensor, "*rows d"],
    teacher_tokens: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "*rows"],
) -> Float[Tensor, ""]:
    """CLIP-TD Eq. 3, 4, 7: L1 distance of each token to the teacher's, times its weight, mean over tokens and width.

    A token that is not there has weight 0, and so has a row that confidence weighting leaves out (Eq. 10). Free choice:
    the mean over the width, under which the paper's weights of 0.01 to 1 all help; summed they drown the task.
    """
    S, T, W = _wide(student_tokens, teacher_tokens, weight)
    return (W * (S - T).abs().mean(-1)).mean()


def confidence_weight(
    teacher_logits: Float[Tensor, "n classes"], student_logits: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, " n"]:
    """CLIP-TD Eq. 9-10: 1 where r = T max(sm(teacher)) / max(sm(student)) > 1, else 0; no gradient."""
    Z_T, Z = _wide(teacher_logits.detach(), student_logits.detach())
    r = temperature * Z_T.softmax(1).amax(1) / Z.softmax(1).amax(1)
    return (r > 1).to(r.dtype)


def answer_kl(
    logits: Float[Tensor, "n k classes"], clean: Float[Tensor, "n classes"], *, many: bool = False
) -> Float[Tensor, " n"]:
    """VILLA's divergence of k perturbed predictions from the clean one, both ways, mean over k; each row's.

    KL(p_clean || p_k) + KL(p_k || p_clean) of softmaxes, or of each answer's own yes and no, summed (VQA).
    """
    Z, C = _wide(logits, clean)
    C = C.unsqueeze(1)
    if many:
        return ((Z.sigmoid() - C.sigmoid()) * (Z - C)).sum(-1).mean(1)
    return ((Z.softmax(-1) - C.softmax(-1)) * (Z.log_softmax(-1) - C.log_softmax(-1))).sum(-1).mean(1)


def diffusion_loss(predicted: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """SDS-CLIP Eq. 3 and 6: each row's squared error, mean over its elements."""
    P, E = _wide(predicted, noise)
    return (P - E).square().flatten(1).mean(1)


def ttdm_loss(projected_text: Float[Tensor, "n d"], t_text: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """VLKD, text-text distance minimisation (section 3.2.1): mean over pairs of |t_eos - e_norm|^2, summed over d.

    For unit rows it is 2 (1 - cos).
    """
    E, T = _wide(projected_text, t_text)
    return (T - E).square().sum(1).mean()


def text_nll(
    logits: Float[Tensor, "n length words"], text: Int[Tensor, "n length"], counted: Bool[Tensor, "n length"]
) -> Float[Tensor, " n"]:
    """VLKD Eq. 2 before its mean over pairs: each row's -sum_j log P(w_j | w_<j, C) over the tokens that count."""
    (Z,) = _wide(logits)
    each = F.cross_entropy(Z.flatten(0, 1), text.flatten(), reduction="none").view_as(text)
    return (each * counted).sum(1)


def scst_loss(
    nll: Float[Tensor, " n"], reward: Float[Tensor, " n"], baseline: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Self-critical training (Rennie et al., 2017): -mean over rows of (r(sampled) - r(greedy)) log P(sampled)."""
    N, R, B = _wide(nll, reward, baseline)
    return ((R - B) * N).mean()
