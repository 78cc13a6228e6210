"""Starts for long horizons: the solution of a shorter one, with its end held, and so on to the whole.

Far from a solution each iteration moves what happens in a trajectory, such as a swing, by a few stages, so that their
number grows with the horizon.  Where a task is done early, as most are in long horizons, the solution of the first part
is nearly that of the whole; a first part that is too short says nothing of the whole.  The two are told apart by the
value of a horizon a quarter longer, which is the same in the first case only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.nodes.control.ending import Trajectories
from lpgd.nodes.control.trajectory import ControlProblem
from lpgd.status import Status

__all__ = ["SHORTEST", "Grown", "grow", "shortened"]

SHORTEST = 64
"""No horizon that is solved first is shorter."""
SAME = 0.01
"""So much, relatively, the values of two horizons may differ."""


class Grown(NamedTuple):
    """Starts from shorter horizons.

    Attributes:
        z: (B, T, m + n).
        trusted: (B,) whether it is a start that is better than the first guess.
        systems: (B,) that were solved.
    """

    z: Tensor
    trusted: Tensor
    systems: Tensor


def shortened(problem: ControlProblem, horizon: int) -> ControlProblem:
    """The first stages alone, ended by the cost of the end."""
    varying = problem.functions.varying
    parameters = tuple(
        torch.cat([parameter[:, :horizon], parameter[:, -1:]], 1) if varies else parameter
        for parameter, varies in zip(problem.parameters, varying, strict=True)
    )
    terms = {name: getattr(problem, name) for name in ("lower", "upper", "linear", "center")}
    changes = {name: term if term is None else term[:, :horizon] for name, term in terms.items()}
    return replace(problem, parameters=parameters, **changes)


def grow(minimise: Callable[[ControlProblem, Tensor], Trajectories], problem: ControlProblem, z: Tensor) -> Grown:
    """Solve the first 64 to 127 stages, and twice as many again and again.

    Args:
        minimise: solves from a guess.
        problem: B elements with at least 2 · 64 stages.
        z: (B, T, m + n) the first guess, whose controls are those of stages to come.
    """
    controls = z.shape[-1] - problem.start.shape[-1]
    horizons = [z.shape[1]]
    while horizons[0] >= 2 * SHORTEST:
        horizons.insert(0, -(-horizons[0] // 2))
    first, longer = horizons[0], horizons[0] + horizons[0] // 4
    found = minimise(shortened(problem, first), z[:, :first])
    value = shortened(problem, first).value(found.z)
    again = minimise(shortened(problem, longer), _held(found.z, z[:, :longer], controls))
    change = (shortened(problem, longer).value(again.z) - value).abs()
    solved = (found.status == int(Status.SOLVED)) & (again.status == int(Status.SOLVED))
    trusted, systems = solved & (change <= SAME * value.abs()), found.iterations + again.iterations
    start = z.clone()
    elements, known = rows_where(trusted), again.z[trusted]
    for horizon in horizons[1:-1]:
        if not len(elements):
            break
        answer = minimise(shortened(problem.select(elements), horizon), _held(known, z[elements, :horizon], controls))
        systems[elements] += answer.iterations
        fine = answer.status == int(Status.SOLVED)
        trusted[elements] = fine
        elements, known = elements[fine], answer.z[fine]
    start[elements] = _held(known, z[elements], controls)
    return Grown(start, trusted, systems)


def _held(z: Tensor, guess: Tensor, controls: int) -> Tensor:
    """A trajectory that goes on with its last state, and with the controls of a guess; no longer than the guess."""
    z = z[:, : guess.shape[1]]
    more = guess[:, z.shape[1] :].clone()
    more[..., controls:] = z[:, -1:, controls:]
    return torch.cat([z, more], 1)
