"""Points of LPGD that have names of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.gradients.lpgd import LPGD
from lpgd.gradients.sides import Envelope
from lpgd.problems.base import Point

__all__ = ["BlackboxBackprop", "DirectLoss", "Domke"]


@dataclass(frozen=True, repr=False)
class BlackboxBackprop(LPGD):
    """Blackbox backpropagation (Vlastelica et al. 2020): the lower envelope with ρ = 0 and a given τ (their λ).

    On a linear objective ``<c, x>`` its gradient is ``(x(c + τ g) - x(c)) / τ`` ([LPGD] section 4.3).
    """

    tau: float | None = 20.0
    rho: float = 0.0
    envelope: Envelope = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho != 0.0 or self.envelope != "lower" or self.tau is None:
            raise ValueError("BlackboxBackprop is LPGD(tau, rho=0, envelope='lower'); use LPGD for anything else.")


@dataclass(frozen=True, repr=False)
class Domke(LPGD):
    """Implicit differentiation by perturbation (Domke 2010): the average envelope with τ small, chosen by default."""

    tau: float | None = None
    rho: float = 0.0
    envelope: Envelope = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.envelope != "average":
            raise ValueError("Domke is LPGD with envelope='average'; use LPGD for anything else.")


@dataclass(frozen=True, repr=False)
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

    def steps(self, tau: float, cotangent: Point) -> Tensor:
        sizes = [tensor.abs().amax(-1) for tensor in cotangent if tensor.shape[-1]]
        return tau / torch.stack(sizes).amax(0)
