"""Programs around a chosen solution, of which an answer was wrong and SOLVED: :mod:`tests.constructed` draws more."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from tests.constructed import FUNCTIONS, draw, errors

FAR = [(number, True) for number in (58, 124, 1208, 4132, 4181, 4260, 4281, 22052)] + [(1049, False), (2206, False)]
"""Beside a constraint far away: their numbers, and whether the entries of x have units of their own."""
NORMS = [(number, False) for number in (2015, 2032, 2047)] + [(8012, True), (8089, True), (8146, True)]
"""With a norm, of which some arguments are a small share."""


HIDDEN = [(number, False) for number in (2010, 2320, 6179, 6324, 9082, 9340)]
"""With variables of another size than what is curved, which a row of ones or a square hides: gradients were lost."""


@pytest.mark.parametrize(("number", "spread"), FAR + NORMS + HIDDEN)
@pytest.mark.filterwarnings("ignore::UserWarning")  # CVXPY tells of cones that stand for powers
def test_solutions_and_gradients(number: int, spread: bool) -> None:
    program = draw(number, spread=spread)
    assert program is not None
    found = errors(program)
    assert found.x < 1e-8
    assert found.duals < 1e-8
    assert found.gradient < 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_functions_are_what_atoms_are(name: str) -> None:
    """Values of torch's functions are those of CVXPY's."""
    function = FUNCTIONS[name]
    for seed in range(5):
        z = np.random.default_rng(seed).normal(size=6) * 0.6
        variable = cp.Variable(6, value=z)
        np.testing.assert_allclose(function.atom(variable).value, float(function.value(torch.tensor(z))), rtol=1e-12)
