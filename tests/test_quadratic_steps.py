"""LPGD of quadratic programs with a definite P at a given step: the gradient from the forward pass's factors alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import lpgd
from lpgd.gradients import lpgd as module
from tests.test_tilted_programs import BATCH, N, Program, program


def weights() -> torch.Tensor:
    return torch.randn(BATCH, N, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def gradients(data: Program, envelope: str, tau: float, solver: str = "DAQP", count: int = BATCH) -> list[torch.Tensor]:
    """With respect to all data of the first ``count`` elements, for the loss ``<weights, x>``."""
    leaves = {
        name: (value[:count] if value.shape[0] == BATCH else value).clone().requires_grad_()
        for name, value in data.items()
    }
    others = {name: value for name, value in leaves.items() if name not in ("P", "q")}
    layer = lpgd.QPLayer(solver, gradient=lpgd.LPGD(tau=tau, envelope=cast(Any, envelope)))
    x = layer(leaves["P"], leaves["q"], **cast(Any, others)).x
    (weights()[:count] * x).sum().backward()
    return [cast(torch.Tensor, leaf.grad) for leaf in leaves.values()]


@pytest.mark.parametrize("bounded", [False, True], ids=["rows", "rows and bounds"])
@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared matrices"])
@pytest.mark.parametrize("envelope", ["average", "lower", "upper"])
@pytest.mark.parametrize("tau", [1e-4, 3e-2])
def test_the_cost_gets_the_difference_of_another_solvers_solutions(
    tau: float, envelope: str, shared: bool, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a perturbed problem was made")

    data = program(shared=shared, bounded=bounded)
    monkeypatch.setattr(module, "perturb", refuse)
    found = gradients(data, envelope, tau)[1]
    rest: Any = {name: value for name, value in data.items() if name not in ("P", "q")}

    def solved(step: float) -> torch.Tensor:
        return lpgd.QPLayer("PIQP")(data["P"], data["q"] + step * weights(), **rest).x

    above, below = (solved(sign * tau) if envelope in ("average", side) else solved(0.0)
                    for sign, side in ((1.0, "lower"), (-1.0, "upper")))  # fmt: skip
    expected = (above - below) / (2.0 * tau if envelope == "average" else tau)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("tau", [1e-4, 3e-2])
def test_gradients_have_the_same_bits_alone(tau: float) -> None:
    data = program(shared=False, bounded=True)
    for together, alone in zip(gradients(data, "average", tau), gradients(data, "average", tau, count=1), strict=True):
        assert torch.equal(together[:1], alone)
    P = gradients(data, "average", tau)[0]
    assert torch.equal(P, P.mT)


def test_the_step_does_not_matter_while_no_active_set_changes() -> None:
    data = program(shared=False, bounded=False)
    first, second = (gradients(data, "average", tau) for tau in (1e-9, 1e-7))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
