"""Another try for linear programs whose costs are too large for an absolute dual tolerance."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from lpgd.problems.base import State
from lpgd.solvers.backends.elementwise import Outcome, Prepared
from lpgd.solvers.backends.forms import IntervalPoint, IntervalVectors
from lpgd.status import Status

__all__ = ["WithSmallerCosts"]


class WithSmallerCosts(Prepared):
    """A linear program that ends with an error gets another try, with costs divided by a power of two.

    The dual tolerance is absolute: costs of 1e8 are asked for 1e-17 of their size, and the simplex method ends with
    kSolveError on one program of four variables in fifty (highspy 1.15.1).  No sooner, for among costs of several sizes
    the smallest would be below the tolerance.
    """

    quadratic = False

    def solve(self, vectors: IntervalVectors, state: State) -> Outcome:
        outcome = self.attempt(vectors, state)
        largest = np.abs(vectors.q).max(initial=0.0)
        if outcome.status is not Status.NUMERICAL_ERROR or self.quadratic or not 1.0 < largest < np.inf:
            return outcome
        scale = 2.0 ** np.frexp(largest)[1]
        outcome = self.attempt(vectors._replace(q=vectors.q / scale), state)
        if outcome.point is None or outcome.status is Status.INFEASIBLE:  # the proof knows no costs
            return outcome
        x, y, z = outcome.point
        return outcome._replace(point=IntervalPoint(x, scale * y, scale * z))

    @abstractmethod
    def attempt(self, vectors: IntervalVectors, state: State) -> Outcome:
        """One try; what :meth:`~lpgd.solvers.backends.prepared.Prepared.solve` asks for."""
