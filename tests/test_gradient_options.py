"""Options of gradient methods."""

from __future__ import annotations

import pytest
import torch

from lpgd import (
    LPGD,
    BlackboxBackprop,
    Clarabel,
    Domke,
)
from tests.problem_table import CASES
from tests.test_gradients import difference, planted_solution, random_cotangent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0; it must be positive"),
        ({"tau": 1e-320}, "tau is 1e-320; it must be positive"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"tau": "x"}, "tau is 'x'; it must be positive"),
        ({"tau": torch.tensor([1.0, 2.0])}, r"tau is tensor\(\[1., 2.\]\); it must be positive and finite, one number"),
        ({"tau": torch.tensor(1.0, requires_grad=True)}, "tau is tensor.*one number"),
        ({"rho": torch.tensor(1.0)}, "rho is tensor.*one number"),
        ({"rho": "x"}, "rho is 'x'; it must be nonnegative"),
        ({"rho": -1.0}, "rho is -1.0; it must be nonnegative"),
        ({"envelope": "middle"}, "envelope is 'middle'; it must be one of average, lower, upper"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPGD(**options)


def test_points_of_the_method_are_the_method() -> None:
    case = next(case for case in CASES if case.name == "qp")
    cotangent = random_cotangent(case)
    for named, general in ((BlackboxBackprop(0.7), LPGD(0.7, 0.0, "lower")), (Domke(), LPGD())):
        ours, _ = named.vjp(planted_solution(case), cotangent, Clarabel())
        theirs, _ = general.vjp(planted_solution(case), cotangent, Clarabel())
        assert difference(ours, theirs) < 1e-12
    with pytest.raises(ValueError, match="use LPGD for anything else"):
        BlackboxBackprop(1.0, rho=0.1)
