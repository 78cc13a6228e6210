"""The short way of dense quadratic programs has the general way's bits, and is left where an element is unusual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.autograd import CallInfo
from lpgd.gradients.implicit import conic
from lpgd.solvers.backends.daqp import DAQP
from lpgd.solvers.backends.moreau import Moreau
from lpgd.solvers.base import Begun

with_moreau = pytest.mark.skipif(not Moreau.is_installed(), reason="moreau is an extra")


def draw(seed: int, n: int, batch: int, shared: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    equalities = max(n // 5, 1)
    root = generator.standard_normal((batch, n, n))
    data = {
        "P": root @ root.swapaxes(-1, -2) / n + 0.1 * np.eye(n),
        "q": generator.standard_normal((batch, n)),
        "A": generator.standard_normal((batch, equalities, n)) / np.sqrt(n),
        "G": generator.standard_normal((batch, n, n)) / np.sqrt(n),
    }
    inside = generator.standard_normal((batch, n, 1))
    for name in shared:
        data[name] = data[name][0]
    data["b"] = (data["A"] @ inside)[..., 0]
    data["h"] = (data["G"] @ inside)[..., 0] + generator.uniform(0.05, 1.0, (batch, n))
    return {name: torch.from_numpy(value).requires_grad_() for name, value in data.items()}


def results(data: dict[str, Tensor]) -> tuple[CallInfo, list[Tensor]]:
    output = lpgd.QPLayer("DAQP")(data["P"], data["q"], A=data["A"], b=data["b"], G=data["G"], h=data["h"])
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal(output.x.shape))
    gradients = torch.autograd.grad((weights * output.x).sum() + output.z.square().sum(), list(data.values()))
    return output.info, [*output, *gradients]


def assert_short_way_has_the_same_bits(
    draw_results: Callable[[], tuple[CallInfo, list[Tensor]]], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Begun | None] = []

    def watched(kind: type[DAQP] | type[Moreau]) -> Callable[[Any, lpgd.ConicProblem, Any], Begun | None]:
        at_once = kind.at_once

        def watch(self: Any, problem: lpgd.ConicProblem, executor: Any) -> Begun | None:
            taken.append(at_once(self, problem, executor))
            return taken[-1]

        return watch

    for kind in (DAQP, Moreau):
        monkeypatch.setattr(kind, "at_once", watched(kind))
    info, quick = draw_results()
    assert taken[0] is not None
    assert taken[0].judged is not None
    for kind in (DAQP, Moreau):
        monkeypatch.setattr(kind, "at_once", lambda self, problem, executor: None)
    monkeypatch.setattr(conic, "regular_response", lambda *arguments: None)
    expected_info, general = draw_results()
    solution, expected = info.solution, expected_info.solution
    for found, one in zip(quick, general, strict=True):
        assert torch.equal(found, one)
    for name in ("known_to", "known_before", "refined", "isolated", "slack", "x", "y", "z"):
        assert torch.equal(getattr(solution, name), getattr(expected, name))
    for name in ("statuses", "solvers", "proofs", "asked"):
        assert getattr(solution, name) == getattr(expected, name)
    assert solution.residuals.worst.max() == expected.residuals.worst.max()
    (gradient,), (expected_gradient,) = info.gradients, expected_info.gradients
    assert gradient.used == expected_gradient.used == ["implicit"] * batch
    assert gradient.doubt is not None
    assert expected_gradient.doubt is not None
    assert torch.equal(gradient.doubt, expected_gradient.doubt)
    assert (gradient.fallbacks, gradient.notices) == (expected_gradient.fallbacks, expected_gradient.notices)


@pytest.mark.parametrize("n", [3, 10, 24])
@pytest.mark.parametrize("shared", [(), ("P",), ("A", "G"), ("P", "A", "G", "q")])
def test_the_short_way_has_the_bits_of_the_general_way(
    n: int, shared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_short_way_has_the_same_bits(lambda: results(draw(n, n, 16, shared)), 16, monkeypatch)


def test_the_short_way_takes_matrices_that_are_barely_definite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their definiteness takes a second look, and their derivatives another step by the same system."""
    n, batch = 24, 32
    generator = np.random.default_rng(7)
    root = torch.from_numpy(np.eye(n) + generator.standard_normal((batch, n, n)) / np.sqrt(n))
    P = root.mT @ root
    pivots = torch.linalg.cholesky(P).diagonal(dim1=-2, dim2=-1).amin(-1).square()
    assert bool((pivots <= 1e-5 * P.diagonal(dim1=-2, dim2=-1).amax(-1)).any())
    data = {name: tensor.detach().requires_grad_() for name, tensor in (draw(5, n, batch) | {"P": P}).items()}
    with monkeypatch.context() as watching:
        short: list[bool] = []
        respond = conic.regular_response

        def watch(*arguments: Any) -> Any:
            found = respond(*arguments)
            short.append(found is not None)
            return found

        watching.setattr(conic, "regular_response", watch)
        results(data)
        assert short == [True]
    assert_short_way_has_the_same_bits(lambda: results(data), batch, monkeypatch)


@pytest.mark.parametrize("solver", ["DAQP", pytest.param("MOREAU", marks=with_moreau)])
@pytest.mark.parametrize("rows", ["full", "sparse", "none"])
@pytest.mark.parametrize("ends", ["both", "lower", "some"])
def test_the_short_way_takes_bounds_and_sparse_matrices(
    solver: str, rows: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, batch = 10, 12
    generator = torch.Generator().manual_seed(3)

    def results() -> tuple[CallInfo, list[Tensor]]:
        generator.manual_seed(3)
        data = {key: tensor.detach().clone().requires_grad_() for key, tensor in draw(3, n, batch).items()}
        data |= {
            "lb": (-torch.rand(batch, n, generator=generator, dtype=torch.float64)).requires_grad_(),
            "ub": torch.rand(batch, n, generator=generator, dtype=torch.float64).add_(0.1).requires_grad_(),
        }
        P = data["P"]
        given: dict[str, Any] = {}
        if rows == "full":  # zero satisfies all of them
            given = {"A": data["A"], "b": torch.zeros_like(data["b"]), "G": data["G"], "h": data["h"].abs() + 0.1}
        if rows == "sparse":  # a simplex, and a diagonal objective
            pattern = torch.zeros(2, n, dtype=torch.float64)
            pattern[0, : n // 2], pattern[1, n // 2 : n - 2] = 1.0, -0.5
            given = {"A": pattern.to_sparse(), "b": torch.full((2,), 0.25, dtype=torch.float64)}
            P = torch.eye(n, dtype=torch.float64).to_sparse()
        if ends == "both":
            given |= {"lb": data["lb"], "ub": data["ub"]}
        elif ends == "lower":
            given |= {"lb": data["lb"]}
        else:
            given |= {"lb": data["lb"].masked_fill(torch.arange(n) % 3 == 0, -torch.inf), "ub": 0.9}
        output = lpgd.QPLayer(solver)(P, data["q"], **given)
        weights = torch.from_numpy(np.random.default_rng(1).standard_normal(output.x.shape))
        loss = (weights * output.x).sum() + output.z.square().sum() + output.z_box.square().sum()
        gradients = torch.autograd.grad(loss, list(data.values()), allow_unused=True)
        return output.info, [*output, *(gradient for gradient in gradients if gradient is not None)]

    assert_short_way_has_the_same_bits(results, batch, monkeypatch)


def test_kinks_and_dependent_rows_go_the_general_way() -> None:
    """An inequality that is active without a multiplier in one element, and one that is there twice in another."""
    data = {key: tensor.detach().clone() for key, tensor in draw(5, 6, 4).items()}
    layer = lpgd.QPLayer("DAQP")
    free = layer(data["P"], data["q"], A=data["A"], b=data["b"], G=data["G"], h=data["h"])
    loose = int((data["h"][0] - data["G"][0] @ free.x[0]).argmax())
    data["h"][0, loose] = data["G"][0, loose] @ free.x[0]
    tight, other = int(free.z[2].argmax()), int(free.z[2].argmin())
    data["G"][2, other], data["h"][2, other] = data["G"][2, tight], data["h"][2, tight]
    q = data["q"].clone().requires_grad_()
    output = layer(data["P"], q, A=data["A"], b=data["b"], G=data["G"], h=data["h"])
    with pytest.warns(lpgd.LpgdWarning, match="kink"):
        output.x.sum().backward()
    assert [used == "implicit" for used in output.info.gradients[0].used] == [False, True, False, True]


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("name", ["P", "q", "A", "h"])
def test_data_that_are_not_of_order_one_are_solved_in_their_units(name: str, factor: float) -> None:
    data = draw(5, 6, 4)
    scaled = {key: value.detach().clone() for key, value in data.items()}
    changed = {"A": ("A", "b"), "P": ("P", "q"), "q": ("q", "P"), "h": ("G", "h")}[name]
    for key in changed:  # rows, and the objective, times a number: the same minimiser
        scaled[key][1] *= factor
    x = lpgd.QPLayer("DAQP")(data["P"], data["q"], A=data["A"], b=data["b"], G=data["G"], h=data["h"]).x
    other = lpgd.QPLayer("DAQP")(scaled["P"], scaled["q"], A=scaled["A"], b=scaled["b"], G=scaled["G"], h=scaled["h"])
    torch.testing.assert_close(other.x, x, rtol=1e-9, atol=1e-9)


NOT_FINITE = [(name, value) for name in ("P", "q", "A", "G", "b", "h") for value in (torch.nan, torch.inf, -torch.inf)]
NOT_FINITE.remove(("h", torch.inf))  # an absent row


@pytest.mark.parametrize(("name", "value"), NOT_FINITE)
def test_an_element_that_is_not_finite_is_found_among_others(name: str, value: float) -> None:
    data = {key: tensor.detach().clone() for key, tensor in draw(5, 6, 4).items()}
    data[name].flatten(1)[2, -1] = value
    with pytest.raises(lpgd.SolverError, match="2"):
        lpgd.QPLayer("DAQP")(data["P"], data["q"], A=data["A"], b=data["b"], G=data["G"], h=data["h"])


def test_an_indefinite_element_and_an_infeasible_one_are_found_among_others() -> None:
    data = {key: tensor.detach().clone() for key, tensor in draw(5, 6, 4).items()}
    data["P"][1] -= 5.0 * torch.eye(6)
    data["G"][3, 1], data["h"][3, 1] = -data["G"][3, 0], -data["h"][3, 0] - 1.0
    layer = lpgd.QPLayer("DAQP", on_error="nan")
    output = layer(data["P"], data["q"], A=data["A"], b=data["b"], G=data["G"], h=data["h"])
    names = [status.name for status in output.info.statuses]
    assert names == ["SOLVED", "NOT_CONVEX", "SOLVED", "INFEASIBLE"]


def test_a_wrong_answer_is_not_flawless(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in which a multiplier is off goes the general way, which mends it."""
    data = draw(7, 6, 4)
    _, expected = results(data)
    at_once = DAQP.at_once

    def spoilt(self: DAQP, problem: lpgd.ConicProblem, executor: None) -> Begun | None:
        begun = at_once(self, problem, executor)
        assert begun is not None
        answer = replace(begun.answer, y=begun.answer.y * (1.0 + 1e-7))
        from lpgd.solvers.backends.flawless import judged_flawless

        assert judged_flawless(answer, "DAQP") is None
        return Begun(answer, None)

    monkeypatch.setattr(DAQP, "at_once", spoilt)
    info, found = results(draw(7, 6, 4))
    solution = info.solution
    assert solution.refined is not None
    assert bool((solution.refined > 0).all())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
