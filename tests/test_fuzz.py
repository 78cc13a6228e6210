"""The fuzz target's quick form, what it found, and properties that hypothesis looks for a counterexample to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import lpgd
from tests.fuzz import __main__ as command
from tests.fuzz import runner
from tests.fuzz.cases import CHUNK, EXPLAINED, Chunk
from tests.fuzz.front_ends import FRONT_ENDS
from tests.fuzz.presentation import LAYOUTS, bits, laid_out
from tests.fuzz.runner import State, run_watched

QUICK = hypothesis.settings(max_examples=10, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", list(FRONT_ENDS))
def test_nothing_is_unexplained(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunk = FRONT_ENDS[name](12, 0)
    assert chunk.counts.total() == CHUNK
    assert chunk.findings == []
    assert set(chunk.counts) <= EXPLAINED


# -- the machinery -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    arguments = ["--front-end", "direct loss", "--seed", "3", "--state", str(state)]
    assert command.main([*arguments, "--count", str(CHUNK)]) == 0
    assert command.main([*arguments, "--count", str(2 * CHUNK)]) == 0
    (entry,) = json.loads(state.read_text())
    assert entry["done"] == sum(entry["counts"].values()) == 2 * CHUNK


HANGS = """
import sys, time, signal, os, json
first = int(sys.argv[3])
for number in range(first, first + 1 if first < 3 else 4):
    if number == 1:
        time.sleep(60)
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    report = {"number": number, "counts": {"right": 100}, "patterns": {}, "faults": 0, "findings": []}
    print(json.dumps(report), flush=True)
time.sleep(60) if first == 0 else None
"""


def test_what_hangs_or_dies_is_a_finding_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HANGS)
    monkeypatch.setattr(runner, "WORKER", [str(script)])
    monkeypatch.setattr(runner, "LIMIT", 2.0)
    state = State("qp", 0)
    for report in run_watched("qp", 0, 0, 4):
        state.add(report)
    assert state.counts == {"right": 2 * CHUNK, "hang": CHUNK, "crash": CHUNK}
    assert state.unexplained == 2 * CHUNK
    assert state.findings[0]["command"].endswith("--start 100 --count 1")


def test_counts_of_what_is_not_explained() -> None:
    chunk = Chunk(2)
    chunk.add(["right", "wrong x"], ["", "off by 1"], "here")
    chunk.fault("input changed", "there")
    assert [finding.case for finding in chunk.findings] == [2 * CHUNK + 1, 2 * CHUNK]
    assert chunk.faults == 1


# -- properties --------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e8, 1e8, allow_nan=False, allow_subnormal=False)
layouts = st.sampled_from(LAYOUTS)


def vectors(size: int, elements: st.SearchStrategy[float] = numbers) -> st.SearchStrategy[Tensor]:
    return st.lists(elements, min_size=size, max_size=size).map(lambda row: torch.tensor(row, dtype=torch.float64))


def batches(rows: int, size: int, elements: st.SearchStrategy[float] = numbers) -> st.SearchStrategy[Tensor]:
    return st.lists(vectors(size, elements), min_size=rows, max_size=rows).map(torch.stack)


@QUICK
@hypothesis.given(batches(3, 4), layouts)
def test_layouts_keep_values_and_gradients(values: Tensor, layout: str) -> None:
    leaf = values.clone().requires_grad_()
    shown = laid_out(leaf, layout)
    assert bits(shown) == bits(values)
    (gradient,) = torch.autograd.grad(shown, leaf, values)
    assert torch.equal(gradient, values)


@QUICK
@hypothesis.given(batches(4, 3), st.floats(1e-3, 1e3), layouts)
def test_the_nearest_point_of_a_box(target: Tensor, width: float, layout: str) -> None:
    """½|x|² - <t, x> over |x| ≤ width: clipping, whatever the size of t."""
    leaf = target.clone().requires_grad_()
    output: Any = lpgd.QPLayer()(torch.eye(3, dtype=torch.float64), -laid_out(leaf, layout), lb=-width, ub=width)
    expected = target.clamp(-width, width)
    assert torch.allclose(output.x, expected, rtol=1e-6, atol=1e-6 * width)
    (gradient,) = torch.autograd.grad(output.x.sum(), leaf)
    inside = (target.abs() < 0.99 * width).double()
    sure = (target.abs() - width).abs() > 0.01 * width
    assert torch.allclose(gradient[sure], inside[sure], atol=1e-5)


@QUICK
@hypothesis.given(batches(4, 3), layouts)
def test_a_linear_program_over_a_box(cost: Tensor, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = lpgd.LPLayer(gradient=lpgd.LPGD(tau=1.0))(laid_out(cost, layout), lb=-1.0, ub=2.0).x
    best = torch.where(cost > 0, -cost, 2 * cost).sum(-1)
    assert torch.allclose((cost * x).sum(-1), best, rtol=1e-6, atol=1e-6 * float(cost.abs().max()))


@QUICK
@hypothesis.given(batches(4, 4), st.floats(1e-3, 1e3), layouts)
def test_the_nearest_point_of_a_simplex(x: Tensor, radius: float, layout: str) -> None:
    node = lpgd.nodes.Projection("simplex", radius)
    y: Any = lpgd.NodeLayer(node)(laid_out(x, layout))
    assert (y >= 0).all()
    assert torch.allclose(y.sum(-1), torch.full((4,), radius, dtype=torch.float64), rtol=1e-9)
    # Optimal: x - y is the same where y is positive, and no larger elsewhere.
    left = x - y
    level = torch.where(y > 0, left, -torch.inf).amax(-1, keepdim=True)
    assert (left <= level + 1e-9 * x.abs().amax() + 1e-12).all()


@QUICK
@hypothesis.given(batches(4, 5), st.floats(1e-3, 1e3), layouts)
def test_a_black_box_is_called_with_what_was_given(costs: Tensor, tau: float, layout: str) -> None:
    layer = lpgd.BlackboxLayer(lambda c: (c < 0) * 1.0, lpgd.LPGD(tau=tau, envelope="lower"))
    leaf = costs.clone().requires_grad_()
    x = layer(laid_out(leaf, layout))
    assert torch.equal(x.detach(), (costs < 0).double())
    (gradient,) = torch.autograd.grad(x.sum(), leaf)
    assert torch.allclose(gradient * tau, (costs + tau < 0).double() - (costs < 0).double())


@QUICK
@hypothesis.given(st.lists(st.sampled_from(["right", "nan", "inf", "crossed"]), min_size=4, max_size=4))
def test_spoilt_elements_leave_the_others_alone(kinds: list[str]) -> None:
    q = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
    lower, upper = torch.full((4, 3), -0.5).double(), torch.full((4, 3), 0.5).double()
    for element, kind in enumerate(kinds):
        if kind == "crossed":
            lower[element], upper[element] = 0.5, -0.5
        elif kind != "right":
            q[element, 1] = float(kind)
    leaf = q.clone().requires_grad_()
    output: Any = lpgd.QPLayer(on_error="nan")(torch.eye(3).double(), leaf, lb=lower, ub=upper)
    (gradient,) = torch.autograd.grad(output.x.nansum(), leaf)
    for element, kind in enumerate(kinds):
        if kind == "right":
            assert torch.allclose(output.x[element], (-q[element]).clamp(-0.5, 0.5), atol=1e-8)
            assert torch.allclose(gradient[element], -(q[element].abs() < 0.5).double(), atol=1e-6)
        else:
            assert output.x[element].isnan().all()
            assert not gradient[element].any()
            expected = "INFEASIBLE" if kind == "crossed" else "INVALID_DATA"
            assert output.info.statuses[element].name == expected


# -- found by the fuzz target ------------------------------------------------------------------------------------------


def negative(tensor: Tensor) -> Tensor:
    view = laid_out(tensor, "negative")
    assert view.is_neg()
    return view


def test_views_with_the_negative_bit_are_data_and_cotangents() -> None:
    q = torch.tensor([[0.9, -2.0], [-3.0, 0.5]]).double()
    expected = (-q).clamp(-1.0, 1.0)
    for solver in sorted(set(lpgd.available()) - {"CUSTOM"}):
        leaf = q.clone().requires_grad_()
        options = {"lb": negative(torch.full((2,), -1.0).double()), "ub": 1.0}
        x = lpgd.QPLayer(solver=solver)(negative(torch.eye(2).double()), negative(leaf), **options).x
        assert torch.allclose(x, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(x, leaf, negative(torch.ones_like(x)))
        assert torch.allclose(gradient, -(q.abs() < 1.0).double(), atol=1e-4)
    assert torch.allclose(lpgd.QPLayer().solve(torch.eye(2).double(), negative(q)).x, -q)
    layer = lpgd.BlackboxLayer(lambda c: (c < 0) * 1.0, lpgd.BlackboxBackprop(1.0))
    assert torch.equal(layer(negative(q)), (q < 0).double())
    assert np.allclose(lpgd.NodeLayer(lpgd.nodes.Projection("l2_ball"))(negative(q))[0], q[0] / q[0].norm())


def test_a_spectral_function_with_a_step_between_its_eigenvalues() -> None:
    """tanh(1e6 x): f' is a peak that no rule of integration sees, f[a, b] is 2 / (a - b) all the same."""
    matrix = torch.diag(torch.tensor([1e6, 3e6, -2e6]).double()).requires_grad_()
    y = lpgd.NodeLayer(lpgd.nodes.SpectralFunction(torch.tanh))(matrix[None])
    (gradient,) = torch.autograd.grad(y[0, 0, 2], matrix)
    expected = torch.zeros(3, 3).double()
    expected[0, 2] = expected[2, 0] = 0.5 * 2.0 / 3e6
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_small_steps_of_lpgd_keep_their_digits_whatever_the_size_of_the_inputs(scale: float) -> None:
    """Of the projection onto the unit ball, dy = (I - y yᵀ) dx / |x| outside, the identity inside."""
    x = scale * torch.tensor([[3.0, -1.0, 2.0]]).double()
    leaf, v = x.clone().requires_grad_(), torch.tensor([[0.3, 1.0, -2.0]]).double()
    y = lpgd.NodeLayer(lpgd.nodes.Projection("l2_ball"), lpgd.LPGD())(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, v)
    unit = x / x.norm()
    outside = (v - unit * (unit * v).sum()) / x.norm()
    assert torch.allclose(gradient, outside if x.norm() > 1 else v, rtol=1e-7)
