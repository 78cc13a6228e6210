"""Plots draw what the functions they show say, and refuse what they cannot draw."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd import plotting

SIMPLEX = {"A": torch.ones(1, 3, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64), "lb": 0.0}
WEIGHTS = torch.tensor([3.0, 1.0, 2.5], dtype=torch.float64)
COSTS = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
ALONG = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
AT = [-1.0, 0.0, 0.45, 0.55, 1.0]
"""Vertex 0 is best up to t = ½, vertex 1 after it."""


def weighted(output: Any) -> Tensor:
    return output.x @ WEIGHTS


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def lines(panel: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in panel.get_lines()}


def test_envelopes_are_drawn_as_they_are() -> None:
    layer = lpgd.LPLayer()
    axes = plotting.plot_envelopes(layer, {"c": COSTS, **SIMPLEX}, {"c": ALONG}, weighted, [0.2, 2.0], [0.0, 0.3], AT)
    assert axes.shape == (2, 3)
    batch = {"c": COSTS + torch.tensor(AT, dtype=torch.float64)[:, None] * ALONG, **SIMPLEX}
    for row, rho in zip(axes, (0.0, 0.3), strict=True):
        for panel, name in zip(row, ("lower", "average", "upper"), strict=True):
            drawn = lines(panel)
            assert set(drawn) == {"τ = 0.2", "τ = 2", "loss"}
            np.testing.assert_allclose(drawn["loss"], [3, 3, 3, 1, 1], atol=1e-6)
            for tau in (0.2, 2.0):
                expected = getattr(lpgd.envelopes(layer, batch, weighted, tau, rho), name)
                np.testing.assert_allclose(drawn[f"τ = {tau:g}"], expected.numpy(), atol=1e-6)
            assert name in panel.get_title()


def test_solution_paths_step_where_the_vertex_changes() -> None:
    axes = plotting.plot_solution_path(lpgd.LPLayer(), {"c": COSTS, **SIMPLEX}, {"c": ALONG}, AT)
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["0"], [1, 1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(drawn["1"], [0, 0, 0, 1, 1], atol=1e-6)


def test_perturbed_paths_step_at_the_threshold() -> None:
    """Element 0 leaves vertex 0 at τ = ½, on the lower side only."""
    from matplotlib import pyplot

    _, given = pyplot.subplots()
    batch = {"c": torch.stack([COSTS, COSTS + 1.0]), **SIMPLEX}
    axes = plotting.plot_perturbed_path(
        lpgd.LPLayer(), batch, weighted, taus=[0.45, 0.1, 0.55], entries=[0, 1], axes=given
    )
    assert axes is given
    np.testing.assert_allclose(lines(axes)["0"], [1, 1, 1, 1, 1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(lines(axes)["1"], [0, 0, 0, 0, 0, 0, 1], atol=1e-6)


def test_sweeps_are_drawn_as_they_are() -> None:
    sweep = lpgd.sweep(
        lpgd.LPLayer(), {"c": COSTS.clone().requires_grad_(), **SIMPLEX}, weighted, [0.1, 1.0], [0.0, 0.2]
    )
    axes = plotting.plot_sweep(sweep)
    assert axes.shape == (3,)
    still = lines(axes[1])
    assert still["ρ = 0"].tolist() == [100.0, 0.0]
    taken = lines(axes[2])
    np.testing.assert_allclose(
        taken["c, ρ = 0.2"], [100 * row.measurement.decreases[0] for row in sweep.rows if row.rho == 0.2]
    )
    assert axes[0].get_xscale() == "log"


def test_what_cannot_be_drawn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, one = lpgd.LPLayer(), {"c": COSTS, **SIMPLEX}
    with pytest.raises(ValueError, match="one number for each element"):
        plotting.plot_envelopes(layer, one, {"c": ALONG}, lambda output: output.x.sum(), [1.0], at=AT)
    with pytest.raises(ValueError, match=r"entries for \['d'\]"):
        plotting.plot_envelopes(layer, one, {"d": ALONG}, weighted, [1.0], at=AT)
    with pytest.raises(ValueError, match="nothing moves"):
        plotting.plot_envelopes(layer, one, {"c": None}, weighted, [1.0], at=AT)
    with pytest.raises(ValueError, match="the direction of c must be a tensor of its shape"):
        plotting.plot_envelopes(layer, one, {"c": ALONG[:2]}, weighted, [1.0], at=AT)
    with pytest.raises(ValueError, match="1 axes were given; this plot needs 3"):
        plotting.plot_envelopes(layer, one, {"c": ALONG}, weighted, [1.0], at=AT, axes=[None])
    with pytest.raises(ValueError, match="is zero: it does not move"):
        plotting.plot_perturbed_path(layer, one, lambda output: 0.0 * output.x.sum())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(lpgd.MissingPackageError, match=r"pip install matplotlib"):
        plotting.plot_solution_path(layer, one, {"c": ALONG}, AT)
