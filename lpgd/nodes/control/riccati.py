"""The systems of optimal control by a Riccati recursion: batched, and linear in the horizon.

The Newton system of a trajectory with stages t = 0 … T - 1, in ``w_t = (u_t, x_t)`` with ``F_t = [B_t A_t]`` the
derivative of the dynamics, x_0 fixed, and ν_t the multiplier of ``f(x_t, u_t) - x_(t+1) = 0``:

    H_t dw_t + F_tᵀ dν_t - (0, dν_(t-1)) = -r_t        H_T dx_T - dν_(T-1) = -r_T
    F_t dw_t - dx_(t+1) = -c_t

Its block elimination from the end has ``dν_(t-1) = P_t dx_t + p_t`` with

    M_t = H_t + F_tᵀ P_(t+1) F_t = [M_uu M_ux; M_xu M_xx]
    P_t = M_xx - M_xu M_uu⁻¹ M_ux,    K_t = -M_uu⁻¹ M_ux,    du_t = K_t dx_t + k_t

All M_uu are positive definite if, and only if, the Hessian is along all feasible changes, so that the factorisation
tells strict minima from other stationary points.  Tensors have time first, (T, B, …), as the loops run over it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg

__all__ = ["Factor", "factorise", "solve"]


class Factor(NamedTuple):
    """A factorised system.

    Attributes:
        root: (T, B, m, m) Cholesky factors of M_uu.
        gain: K, (T, B, m, n).
        closed: A + BK, (T, B, n, n).
        value: P_1 … P_T, (T, B, n, n).
        slope: F, (T, B, n, m + n), the columns of fixed controls zero.
        definite: (B,) whether all M_uu are positive definite, by more than rounding.
    """

    root: Tensor
    gain: Tensor
    closed: Tensor
    value: Tensor
    slope: Tensor
    definite: Tensor


def factorise(hessian: Tensor, last: Tensor, slope: Tensor, free: Tensor | None = None) -> Factor:
    """Factorise the system.

    Args:
        hessian: H, (T, B, m + n, m + n).
        last: H_T, (B, n, n).
        slope: F, (T, B, n, m + n).
        free: (T, B, m) 1 for controls that may move and 0 for those that must not, or None for all.
    """
    n, m = last.shape[-1], slope.shape[-1] - last.shape[-1]
    if free is not None:
        both = torch.nn.functional.pad(free, (0, n), value=1.0)
        held = torch.nn.functional.pad(1.0 - free, (0, n))
        hessian = both[..., :, None] * hessian * both[..., None, :] + held.diag_embed()
        slope = slope * both[..., None, :]
    value, roots, rows, values, codes = last, [], [], [], []
    for stage, turn in zip(reversed(hessian.unbind(0)), reversed(slope.unbind(0)), strict=True):
        values.append(value)
        matrix = torch.baddbmm(stage, turn.mT, value @ turn)
        root, code = linalg.cholesky_ex(matrix[:, :m, :m])
        row = linalg.solve_triangular(root, matrix[:, :m, m:], upper=False)
        value = torch.baddbmm(matrix[:, m:, m:], row.mT, row, alpha=-1.0)
        roots.append(root)
        rows.append(row)
        codes.append(code)
    root, row, values = (torch.stack(backwards[::-1]) for backwards in (roots, rows, values))
    gain = -linalg.solve_triangular(root.mT, row, upper=True)
    closed = slope[..., m:] + slope[..., :m] @ gain
    pivots, sizes = root.diagonal(dim1=-2, dim2=-1).square(), root.square().sum(-1)
    large = pivots > 100 * torch.finfo(root.dtype).eps * sizes
    fine = (torch.stack(codes) == 0).all(0) & large.all(-1).all(0) & torch.isfinite(value).all(-1).all(-1)
    return Factor(root, gain, closed, values, slope, fine)


def solve(factor: Factor, right: Tensor, last: Tensor, defect: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The answer of the system; fixed controls stay where they are.

    Args:
        factor: from :func:`factorise`.
        right: r, (T, B, m + n); what it has for the states of stage 0 is not looked at.
        last: r_T, (B, n).
        defect: c, (T, B, n).

    Returns:
        du (T, B, m), dx_1 … dx_T (T, B, n) and dν (T, B, n).
    """
    m = factor.root.shape[-1]
    forced, moved = right[..., :m], factor.slope[..., :m]
    start = linalg.matvec(factor.value, defect)
    # p_t = (r_x + Kᵀ r_u + (A + BK)ᵀ P c) + (A + BK)ᵀ p_(t+1)
    constant = right[..., m:] + linalg.matvec(factor.gain.mT, forced) + linalg.matvec(factor.closed.mT, start)
    offsets = _scan(factor.closed.mT.unbind(0)[::-1], constant.unbind(0)[::-1], last)
    offset = torch.stack([*offsets[-2::-1], last])  # p_1 … p_T
    pull = forced + linalg.matvec(moved.mT, start + offset)
    shift = -torch.cholesky_solve(pull[..., None], factor.root)[..., 0]
    drift = linalg.matvec(moved, shift) + defect
    state = torch.stack(_scan(factor.closed.unbind(0), drift.unbind(0), torch.zeros_like(last)))
    before = torch.cat([torch.zeros_like(state[:1]), state[:-1]])
    control = linalg.matvec(factor.gain, before) + shift
    return control, state, linalg.matvec(factor.value, state) + offset


def _scan(matrices: tuple[Tensor, ...], constants: tuple[Tensor, ...], start: Tensor) -> list[Tensor]:
    """``v ← M_t v + c_t``, one after the other: all values after the first."""
    value, found = start[..., None], []
    for matrix, constant in zip(matrices, constants, strict=True):
        value = torch.baddbmm(constant[..., None], matrix, value)
        found.append(value[..., 0])
    return found
