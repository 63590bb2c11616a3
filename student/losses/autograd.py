"""The autograd functions behind the tiled losses: values and gradients of softmax losses, tile by tile.

Legend: X, Y embeddings whose logits are Z = a X Y^T; U, W the teacher's, T = b U W^T; row i of each belongs to pair i.
P, Q are the softmaxes of Z over rows and over columns, R, C those of T, all laid out like Z, so that sm(Z^T) = Q^T.

Tile by tile. A first sweep over square tiles keeps log-sum-exps of all rows and all columns, so that both directions
share one product of matrices; a second, in backward, computes every tile again and adds it to the gradients:

    hard   sum_i h_i [CE(Z, I)_i + CE(Z^T, I)_i]             dZ = h_i P + h_j Q - 2 h_i I
    soft   sum_i s_i [KL(R || P)_i + KL(C || Q)_i]           dZ = s_i (P - R) + s_j (Q - C)
    dX = a dZ Y,  dY = a dZ^T X,  da = <X, dZ Y>

Losses in one direction alone (ICL, cross) take stripes of whole rows and have their gradient ready in forward: nothing
is computed twice. Computed in float32 (float64 in, float64 out) whatever autocast says. No gradient reaches a teacher
(one that asks for it is refused) and none can be differentiated again.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from student.losses.tiles import Logits, Stream, cut, log_sums, tiles


def _refuse_a_graph() -> None:
    """Where backward runs with create_graph=True: a second derivative would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the tiled losses cannot be differentiated twice: raise tiled.TILED_FROM above the batch"
        )


# ----------------------------------------------------------------------------------------------------
# Both directions: hard targets (the diagonal), soft ones (a teacher's), or some of each


@dataclasses.dataclass(frozen=True)
class Targets:
    """The teacher's logits, to whose rows and columns a bias may be added before their softmaxes."""

    logits: Logits
    row_bias: Float[Tensor, "1 n"] | None = None  # beta_j: R = sm over j of T_ij + beta_j
    column_bias: Float[Tensor, "n 1"] | None = None  # alpha_i: C = sm over i of T_ij + alpha_i

    def tile(self, i: slice, j: slice) -> tuple[Float[Tensor, "i j"], Float[Tensor, "i j"]]:
        """What R and what C are the softmax of; one tensor where there is no bias."""
        tile = self.logits.tile(i, j)
        if self.row_bias is None or self.column_bias is None:
            return tile, tile
        return tile + self.row_bias[:, j], tile + self.column_bias[i]


def swapped(logits: Logits, size: int) -> Targets:
    """R = the transpose of the other direction's softmax, rows renormalised, and C likewise (PSD).

    sm(T^T)^T_ij = exp(T_ij - lse_j), of which the row-wise softmax of T_ij - lse_j is the renormalised form.
    """
    rows, columns = log_sums(logits, size)
    return Targets(logits, row_bias=-columns, column_bias=-rows)


class BothDirections(torch.autograd.Function):
    """(hard, soft) of the module's docstring; soft is 0 without a teacher."""

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
        """Compute the losses, tile by tile, and keep what backward needs."""
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
        """Compute the gradients, tile by tile."""
        _refuse_a_graph()
        X, Y, a, h, s = ctx.saved_tensors
        with torch.autocast(X.device.type, enabled=False):
            logits, h, s = Logits(X, Y, a), h * d_hard, s * d_soft
            dX, dY = _grown(ctx, logits, h, s)
            da = (X * dX).sum()
        return dX.mul_(a), dY, da, *[None] * 5


def _grown(
    ctx: Any, logits: Logits, h: Float[Tensor, " n"], s: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Both directions' dZ Y and a dZ^T X, where h and s already hold what comes from above."""
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
    """Mean over rows of CE(Z, I), or with a teacher of KL(sm(T) || sm(Z)); its gradient is ready after forward."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, Y: Tensor, a: Tensor, teacher: Logits | None, grad: bool, size: int
    ) -> Tensor:
        """Compute the losses, tile by tile, and keep what backward needs."""
        logits, total, n = Logits(X, Y, a), X.new_zeros(()), len(X)
        of_x, of_y = (
            grad and (ctx.needs_input_grad[0] or ctx.needs_input_grad[2]),
            grad and ctx.needs_input_grad[1],
        )
        dX, dY = torch.empty_like(X) if of_x else None, torch.zeros_like(Y) if of_y else None
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
            z.exp_()  # now dZ but for the targets
            z.sub_(t) if teacher is not None else diagonal.sub_(1)
            if dX is not None:
                torch.mm(z, Y, out=dX[i])
            if dY is not None:
                dY.addmm_(z.T, a * X[i])
        ctx.save_for_backward(X, a, dX, dY)
        return total / n

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients, tile by tile."""
        _refuse_a_graph()
        X, a, dX, dY = ctx.saved_tensors
        share = d_loss / len(X)
        of_x = (share * a * dX, share * (X * dX).sum()) if dX is not None else (None, None)
        return of_x[0], None if dY is None else share * dY, of_x[1], None, None, None


# ----------------------------------------------------------------------------------------------------
# The gradients of the task loss


def _add_gradient(
    to_X: Float[Tensor, "n d"],
    to_Y: Float[Tensor, "n d"],
    logits: Logits,
    factor: Float[Tensor, ""],
    size: int,
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "1 n"]]:
    """Add factor (P + Q - 2 I) Y and factor (P + Q - 2 I)^T X; the log-sum-exps."""
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
    """GD = 1/N (|D_X|^2 + |D_Y|^2), D the student's minus the teacher's gradient of the task loss.

    With A = P + Q - 2 I: G_X = a/2N A Y, G_Y = a/2N A^T X. With B = dL/dG = 2/N D and w = B_X Y^T + X B_Y^T, which is
    2N/a dL/dA, p_i = sum_j P_ij w_ij and q_j = sum_i Q_ij w_ij (so two sweeps more):

        dL/dZ = a/2N E,  E = P (w - p) + Q (w - q)
        dX = a/2N (a E Y + A B_Y),  dY = a/2N (a E^T X + A^T B_X)
        da = 1/2N (a <X, E Y> + <X, A B_Y> + <B_X, A Y>)
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor, a: Tensor, teacher: Logits, size: int) -> Tensor:
        """Compute the losses, tile by tile, and keep what backward needs."""
        n, D_X, D_Y = len(X), torch.zeros_like(X), torch.zeros_like(Y)
        ctx.lse = _add_gradient(D_X, D_Y, Logits(X, Y, a), a / (2 * n), size)
        _add_gradient(D_X, D_Y, teacher, -teacher.a / (2 * n), size)
        ctx.save_for_backward(X, Y, a, D_X, D_Y)
        ctx.size = size
        return (D_X.square().sum() + D_Y.square().sum()) / n

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients, tile by tile."""
        _refuse_a_graph()
        X, Y, a, D_X, D_Y = ctx.saved_tensors
        with torch.autocast(X.device.type, enabled=False):
            dX, dY, da = _second_gradient(Logits(X, Y, a), Logits(D_X, D_Y, a), ctx.lse, ctx.size)
        factor = d_loss / len(X) ** 2  # 1/2N of the formulas, 2/N of B
        return dX.mul_(factor * a), dY.mul_(factor * a), factor * da, None, None


def _second_gradient(
    logits: Logits, D: Logits, lse: tuple[Tensor, Tensor], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums a E Y + A D_Y, a E^T X + A^T D_X and da of TaskGradients, with D instead of B, without 1/2N."""
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
    # <Y, dY> = a <X, E Y> + <D_X, A Y>, so that A Y needs no memory of its own
    da = (X * dX).sum() + (Y * dY).sum()
    return dX.add_(through_z.mul_(a)), dY, da
