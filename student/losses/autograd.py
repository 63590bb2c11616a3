"""Autograd functions of the tiled losses: values and gradients of softmax losses, computed tile by tile.

Legend: X, Y are embeddings with logits Z = a X Y^T. U, W are the teacher's embeddings, with logits T = b U
W^T. Row i of each belongs to pair i. P and Q are the softmaxes of Z over each row and over each column; R and
C are those of T. All four have the layout of Z, so sm(Z^T) = Q^T.

The forward pass sweeps once over square tiles and keeps the log-sum-exps of all rows and all columns, so both
directions share one matrix product. The backward pass recomputes every tile and adds its contribution to the
gradients:

    hard   sum_i h_i [CE(Z, I)_i + CE(Z^T, I)_i]             dZ = h_i P + h_j Q - 2 h_i I
    soft   sum_i s_i [KL(R || P)_i + KL(C || Q)_i]           dZ = s_i (P - R) + s_j (Q - C)
    dX = a dZ Y,  dY = a dZ^T X,  da = <X, dZ Y>

Losses in a single direction (ICL, cross) use stripes of whole rows and compute their gradient in the forward
pass, so nothing is computed twice. All functions compute in float32 (float64 for float64 inputs), also under
autocast. The teacher gets no gradient; `tiled` rejects a teacher that requires one. Second derivatives are
not supported.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from student.losses.tiles import Logits, Stream, cut, log_sums, tiles


def _refuse_double_backward() -> None:
    """Raise RuntimeError under create_graph=True: a second derivative would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the tiled losses cannot be differentiated twice: raise tiled.TILED_FROM above the batch"
        )


# ----------------------------------------------------------------------------------------------------
# Both directions: hard targets (the diagonal), soft targets (a teacher's), or a mix of both


@dataclasses.dataclass(frozen=True)
class Targets:
    """Soft targets: the teacher's logits, with optional biases that are added before the softmaxes.

    Args:
        logits: The teacher's logits T.
        row_bias: beta, with R the softmax over j of T_ij + beta_j.
        column_bias: alpha, with C the softmax over i of T_ij + alpha_i.
    """

    logits: Logits
    row_bias: Float[Tensor, "1 n"] | None = None
    column_bias: Float[Tensor, "n 1"] | None = None

    def tile(self, i: slice, j: slice) -> tuple[Float[Tensor, "i j"], Float[Tensor, "i j"]]:
        """Return a tile of the logits of R and of C; the two are the same tensor without biases."""
        tile = self.logits.tile(i, j)
        if self.row_bias is None or self.column_bias is None:
            return tile, tile
        return tile + self.row_bias[:, j], tile + self.column_bias[i]


def swapped(logits: Logits, size: int) -> Targets:
    """Return PSD's swapped targets: transposed softmaxes of the other direction with renormalized rows.

    sm(T^T)^T_ij = exp(T_ij - lse_j). Renormalizing its rows gives the row-wise softmax of T_ij - lse_j.

    Args:
        logits: The teacher's logits T.
        size: Rows and columns of a tile.
    """
    rows, columns = log_sums(logits, size)
    return Targets(logits, row_bias=-columns, column_bias=-rows)


class BothDirections(torch.autograd.Function):
    """The losses `hard` and `soft` of the module docstring; `soft` is 0 without a teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        Y: Tensor,
        a: Tensor,
        targets: Targets | None,
        h: Tensor,
        s: Tensor,
        kl: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses tile by tile and save the tensors for backward.

        Args:
            ctx: The context of autograd.
            X: Embeddings [n, d].
            Y: Embeddings [n, d] of the other modality.
            a: The scale of the logits.
            targets: Soft targets, or None.
            h: Weight of each pair in the hard loss [n].
            s: Weight of each pair in the soft loss [n].
            kl: Compute KL divergences in the soft loss; False computes cross-entropies.
            size: Rows and columns of a tile.
        """
        logits, diagonal = Logits(X, Y, a), torch.empty_like(h)
        z_rows, z_columns, t_rows, t_columns = (Stream(logits, dim) for dim in (1, 0, 1, 0))
        for i, j in tiles(logits, size):
            z = logits.tile(i, j)
            z_rows.add(i, z)
            z_columns.add(j, z)
            if i == j:
                diagonal[i] = z.diagonal()
            if targets is not None:
                by_row, by_column = targets.tile(i, j)
                t_rows.add(i, by_row, by_row - z if kl else -z)
                t_columns.add(j, by_column, by_column - z if kl else -z)
        ctx.save_for_backward(X, Y, a, h, s)
        ctx.targets, ctx.size = targets, size
        z_lse = (z_rows.lse(), z_columns.lse())
        ctx.z_lse, ctx.t_lse = z_lse, (t_rows.lse(), t_columns.lse())
        both = z_lse[0][:, 0] + z_lse[1][0]
        hard = h @ (both - 2 * diagonal)
        if targets is None:
            return hard, torch.zeros_like(hard)
        cross = t_rows.mean()[:, 0] + t_columns.mean()[0] + both
        entropy = ctx.t_lse[0][:, 0] + ctx.t_lse[1][0] if kl else 0
        return hard, s @ (cross - entropy)

    @staticmethod
    def backward(ctx: Any, d_hard: Tensor, d_soft: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of X, Y and a tile by tile."""
        _refuse_double_backward()
        X, Y, a, h, s = ctx.saved_tensors
        with torch.autocast(X.device.type, enabled=False):
            logits, h, s = Logits(X, Y, a), h * d_hard, s * d_soft
            dX, dY = _both_gradients(ctx, logits, h, s)
            da = (X * dX).sum()
        return dX.mul_(a), dY, da, *[None] * 5


def _both_gradients(
    ctx: Any, logits: Logits, h: Float[Tensor, " n"], s: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Compute dZ Y and a dZ^T X of both directions; h and s include the upstream gradients."""
    dX, dY = torch.zeros_like(logits.X), torch.zeros_like(logits.Y)
    both = h + s if ctx.targets is not None else h
    for i, j in tiles(logits, ctx.size):
        z = logits.tile(i, j)
        d = (z - ctx.z_lse[0][i]).exp_().mul_(both[i, None])
        d.addcmul_(z.sub_(ctx.z_lse[1][:, j]).exp_(), both[j])
        if i == j:
            d.diagonal().sub_(2 * h[i])
        if ctx.targets is not None:
            by_row, by_column = ctx.targets.tile(i, j)
            d.addcmul_((by_row - ctx.t_lse[0][i]).exp_(), s[i, None], value=-1)
            d.addcmul_(by_column.sub_(ctx.t_lse[1][:, j]).exp_(), s[j], value=-1)
        dX[i].addmm_(d, logits.Y[j])
        dY[j].addmm_(d.T, logits.a * logits.X[i])
    return dX, dY


# ----------------------------------------------------------------------------------------------------
# One direction


class RowsOnly(torch.autograd.Function):
    """Mean over rows of CE(Z, I), or of KL(sm(T) || sm(Z)) with a teacher.

    The forward pass also computes the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, Y: Tensor, a: Tensor, teacher: Logits | None, grad: bool, size: int
    ) -> Tensor:
        """Compute the loss stripe by stripe, and its gradients where `grad` is set.

        Args:
            ctx: The context of autograd.
            X: Embeddings [n, d] of the rows.
            Y: Embeddings [n, d] of the columns.
            a: The scale of the logits.
            teacher: The teacher's logits, or None for hard targets.
            grad: Gradients are enabled outside of this function.
            size: Rows and columns of a tile; a stripe has about as many elements.
        """
        logits, total, n = Logits(X, Y, a), X.new_zeros(()), len(X)
        needs_dX = grad and (ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
        needs_dY = grad and ctx.needs_input_grad[1]
        dX, dY = torch.empty_like(X) if needs_dX else None, torch.zeros_like(Y) if needs_dY else None
        for i in cut(n, max(size * size // n, min(size, 128))):
            z = logits.tile(i, slice(0, n))
            z -= z.logsumexp(1, keepdim=True)
            diagonal = z.diagonal(i.start)[: len(z)]
            if teacher is None:
                total -= diagonal.sum()
            else:
                t = teacher.tile(i, slice(0, n)).log_softmax(1)
                total += (t - z).mul_(t.exp_()).sum()
            if dX is None and dY is None:
                continue
            z.exp_()  # the softmax; subtracting the targets makes it dZ
            z.sub_(t) if teacher is not None else diagonal.sub_(1)
            if dX is not None:
                torch.mm(z, Y, out=dX[i])
            if dY is not None:
                dY.addmm_(z.T, a * X[i])
        ctx.save_for_backward(X, a, dX, dY)
        return total / n

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients from forward by the upstream gradient."""
        _refuse_double_backward()
        X, a, dX, dY = ctx.saved_tensors
        factor = d_loss / len(X)
        scaled_dX, da = (factor * a * dX, factor * (X * dX).sum()) if dX is not None else (None, None)
        return scaled_dX, None if dY is None else factor * dY, da, None, None, None


# ----------------------------------------------------------------------------------------------------
# The gradients of the task loss


def _add_gradient(
    to_X: Float[Tensor, "n d"],
    to_Y: Float[Tensor, "n d"],
    logits: Logits,
    factor: Float[Tensor, ""],
    size: int,
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "1 n"]]:
    """Add factor (P + Q - 2 I) Y and factor (P + Q - 2 I)^T X in place; return the log-sum-exps."""
    rows, columns = log_sums(logits, size)
    for i, j in tiles(logits, size):
        z = logits.tile(i, j)
        p = (z - rows[i]).exp_().add_(z.sub_(columns[:, j]).exp_())
        if i == j:
            p.diagonal().sub_(2)
        to_X[i].addmm_(p, factor * logits.Y[j])
        to_Y[j].addmm_(p.T, factor * logits.X[i])
    return rows, columns


class TaskGradients(torch.autograd.Function):
    """GD = 1/N (|D_X|^2 + |D_Y|^2), where D is the student's gradient of the task loss minus the teacher's.

    Let A = P + Q - 2 I, so that G_X = a/2N A Y and G_Y = a/2N A^T X. Let B = dL/dG = 2/N D, w = B_X Y^T + X
    B_Y^T = 2N/a dL/dA, p_i = sum_j P_ij w_ij and q_j = sum_i Q_ij w_ij. Then, in two more sweeps:

        dL/dZ = a/2N E,  E = P (w - p) + Q (w - q)
        dX = a/2N (a E Y + A B_Y),  dY = a/2N (a E^T X + A^T B_X)
        da = 1/2N (a <X, E Y> + <X, A B_Y> + <B_X, A Y>)
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor, a: Tensor, teacher: Logits, size: int) -> Tensor:
        """Compute the loss tile by tile and save the tensors for backward."""
        n, D_X, D_Y = len(X), torch.zeros_like(X), torch.zeros_like(Y)
        ctx.lse = _add_gradient(D_X, D_Y, Logits(X, Y, a), a / (2 * n), size)
        _add_gradient(D_X, D_Y, teacher, -teacher.a / (2 * n), size)
        ctx.save_for_backward(X, Y, a, D_X, D_Y)
        ctx.size = size
        return (D_X.square().sum() + D_Y.square().sum()) / n

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of X, Y and a tile by tile."""
        _refuse_double_backward()
        X, Y, a, D_X, D_Y = ctx.saved_tensors
        with torch.autocast(X.device.type, enabled=False):
            dX, dY, da = _second_gradient(Logits(X, Y, a), Logits(D_X, D_Y, a), ctx.lse, ctx.size)
        factor = d_loss / len(X) ** 2  # 1/2N from the equations times 2/N from B
        return dX.mul_(factor * a), dY.mul_(factor * a), factor * da, None, None


def _second_gradient(
    logits: Logits, D: Logits, lse: tuple[Tensor, Tensor], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX, dY and da of TaskGradients up to factors, with D in place of B."""
    X, Y, a, D_X, D_Y = logits.X, logits.Y, logits.a, D.X, D.Y

    def tile(i: slice, j: slice) -> tuple[Tensor, Tensor, Tensor]:
        z = logits.tile(i, j)
        P, Q = (z - lse[0][i]).exp_(), z.sub_(lse[1][:, j]).exp_()
        return P, Q, torch.addmm(D_X[i] @ Y[j].T, X[i], D_Y[j].T)

    p, q = torch.zeros_like(lse[0]), torch.zeros_like(lse[1])
    for i, j in tiles(logits, size):
        P, Q, w = tile(i, j)
        p[i] += P.mul_(w).sum(1, keepdim=True)
        q[:, j] += Q.mul_(w).sum(0, keepdim=True)
    dX, dY, through_z = torch.zeros_like(X), torch.zeros_like(Y), torch.zeros_like(X)
    for i, j in tiles(logits, size):
        P, Q, w = tile(i, j)
        E = (w - p[i]).mul_(P).addcmul_(w.sub_(q[:, j]), Q)
        A = P.add_(Q)
        if i == j:
            A.diagonal().sub_(2)
        through_z[i].addmm_(E, Y[j])
        dX[i].addmm_(A, D_Y[j])
        dY[j].addmm_(E.T, a * X[i]).addmm_(A.T, D_X[i])
    # <Y, dY> = a <X, E Y> + <D_X, A Y>, so A Y is never stored
    da = (X * dX).sum() + (Y * dY).sum()
    return dX.add_(through_z.mul_(a)), dY, da
