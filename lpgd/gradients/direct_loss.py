"""Direct loss minimisation: LPGD whose step is given in units of the loss itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpgd.gradients.lpgd import LPGD, Envelope

__all__ = ["DirectLoss"]


@dataclass(frozen=True)
class DirectLoss(LPGD):
    """The gradient of direct loss minimisation (McAllester et al. 2010; [LPGD] eqs. 17-19), for DirectLossLayer.

    With ``x* = argmax <w, Ψ(x)>`` and ``x_{±τ} = argmax <w, Ψ(x)> ∓ τ ℓ(x)``, the gradient of ``ℓ(x*)`` is

        "lower", towards better    (Ψ(x*) - Ψ(x_{+τ})) / τ
        "upper", away from worse   (Ψ(x_{-τ}) - Ψ(x*)) / τ
        "average"                  (Ψ(x_{-τ}) - Ψ(x_{+τ})) / 2τ

    times the weight with which the element's loss enters the whole.  Unlike in :class:`LPGD`, that weight does not
    change the step: with the mean over a batch, x_τ is that of each element alone.  A negative weight exchanges better
    and worse.

    Args:
        tau: τ > 0.
        rho: 0.
        envelope: which of the three.

    Raises:
        ValueError: an option is out of its range.

    Of another layer's cotangent g this is ``LPGD(tau / max|g|)``, element by element.
    """

    tau: float | None = 1.0
    rho: float = 0.0
    envelope: Envelope = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is None or self.rho != 0.0:
            raise ValueError("DirectLoss takes a tau, and rho=0; use LPGD for anything else.")

    def steps(self, tau: float, cotangent: Any) -> Tensor:
        sizes = [part.abs().amax(-1) for part in cotangent if part.shape[-1]]
        return tau / torch.stack(sizes).amax(0)
