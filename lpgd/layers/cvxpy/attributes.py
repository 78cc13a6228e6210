"""Parameter values that break a promise under which the problem is convex: signs and definiteness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import elements_where
from lpgd.layers.cvxpy.layout import ParameterLayout

__all__ = ["check_attributes"]

TOLERANCE = 1e-6
"""Relative to a value's largest entry: what rounding in float32 and steps of finite differences may break; in half
precision it is what its rounding may break."""

_SIGNS = {"nonneg": 1.0, "pos": 1.0, "nonpos": -1.0, "neg": -1.0, "PSD": 1.0, "NSD": -1.0}
_MATRICES = ("PSD", "NSD")


def check_attributes(layouts: Sequence[ParameterLayout], tensors: Sequence[Tensor]) -> None:
    """Check each value against the sign or definiteness that its parameter was declared with.

    CVXPY took the problem for convex on the strength of it, and a solver may well "solve" one that is not.  Values
    that are NaN or infinite pass: they become the status of their elements.

    Raises:
        ValueError: with the parameter, its attribute and the elements of the flattened batch.
    """
    for layout, tensor in zip(layouts, tensors, strict=True):
        if layout.log or not tensor.numel():
            continue  # of a geometric program's parameter the logarithm is taken, and checked
        batched = tensor.ndim > len(layout.shape)
        values = tensor.detach().reshape(tensor.shape[0] if batched else 1, -1)
        for attribute in sorted(layout.attributes & set(_SIGNS)):
            signed = _SIGNS[attribute] * values
            room = max(TOLERANCE, torch.finfo(values.dtype).eps) * values.abs().amax(-1)
            if attribute in _MATRICES:
                broken = _not_semidefinite(signed.reshape(-1, *layout.shape), room)
            else:
                broken = signed.amin(-1) < -room
            elements = elements_where(broken)
            if elements:
                where = f" of elements {elements[:10]}" if batched else ""
                raise ValueError(
                    f"the value of parameter {layout.name}{where} is not {attribute}, as it was declared to be; the "
                    "problem need not be convex there. Project or reparametrise it (softplus, L Lᵀ)."
                )


def _not_semidefinite(matrices: Tensor, room: Tensor) -> Tensor:
    symmetric = 0.5 * (matrices + matrices.mT).double()
    finite = symmetric.isfinite().flatten(1).all(-1)
    nonzero = finite & (room > 0)
    # A Cholesky factorisation of the shifted matrix tells, at a tenth of the eigenvalues' price.
    shift = symmetric.shape[-1] * room.double()[:, None, None] * torch.eye(symmetric.shape[-1]).to(symmetric)
    failed = linalg.cholesky_ex(symmetric[nonzero] + shift[nonzero]).info.ne(0)
    broken = torch.zeros_like(nonzero)
    broken[nonzero] = failed
    return broken
