"""Conic programs as a differentiable layer and function of their data."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lpgd.autograd import CallInfo
from lpgd.cones.product import Cones
from lpgd.gradients import GradientMethod
from lpgd.layers.base import OptimizationLayer, Recorded, WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.explanations import Argument, explanation
from lpgd.layers.inputs import MATRIX_LAYOUTS, Batch, Expected, check_inputs
from lpgd.layers.matrices import Pattern, plan, read_matrix
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicStructure, per_element
from lpgd.solvers import ConicSolver
from lpgd.solvers.failures import OnError

__all__ = ["ConicLayer", "ConicOutput", "solve_conic"]


class _ConicFields(NamedTuple):
    x: Tensor
    y: Tensor
    s: Tensor


class ConicOutput(_ConicFields, Recorded):
    """A solution of a conic program, and the record of the call in ``info``.

    Attributes:
        x: (*batch, n) the minimiser.
        y: (*batch, m) multipliers of the rows of A, in K*.
        s: (*batch, m) the slack ``b - A x``, in K up to the solver's tolerance; with the violation e of relaxed
            elements ``b + e - A x``.
    """


class ConicLayer(OptimizationLayer):
    """The solution of a conic program with a quadratic objective, as a differentiable function of its data.

        minimise    ½ xᵀP x + qᵀx
        subject to  A x + s = b,  s ∈ K

    K is a product of cones whose rows have the order of :class:`lpgd.Cones`: zero, nonnegative, second-order,
    positive semidefinite (``svec``: lower triangle column by column, off-diagonal entries times √2), exponential and
    power cones.  The multipliers y ∈ K* have ``P x + q + Aᵀy = 0`` and ``sᵀy = 0``.

    Args:
        cones: K, whose rows are those of A.
        solver, gradient, solver_args, on_error, executor, progress: as for :class:`~lpgd.layers.qp.QPLayer`.

    Attributes:
        gradient, solver: may be replaced between calls; a solver of None is chosen by problem.
        cones: K.

    Raises:
        ValueError, TypeError: ``cones`` is not a :class:`lpgd.Cones`, an option is unknown or out of its range, or
            the solver lacks one of the cones.

    What :class:`~lpgd.layers.qp.QPLayer` says of its data holds here: leading batch dimensions broadcast, matrices may
    be shared and sparse, and P counts as ``½ (P + Pᵀ)``.
    """

    def __init__(
        self,
        cones: Cones,
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        solver_args: Mapping[str, object] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        *,
        progress: bool = False,
    ) -> None:
        if not isinstance(cones, Cones):
            raise TypeError(f"cones is {cones!r}; give the sizes as lpgd.Cones(zero=..., second_order=(...), ...).")
        one = Pattern((1, 1))
        example = plan(1, cones, one, (Pattern((cones.rows, 1)),)).structure
        super().__init__(example, solver, gradient, solver_args, on_error, executor, progress=progress)
        self.cones = cones

    @eager
    def forward(
        self,
        P: Tensor | None,
        q: Tensor,
        A: Tensor,
        b: Tensor,
        *,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicOutput:
        """Solve the program for these data.

        Args:
            P: (*batch, n, n), dense or sparse, or None for a linear objective.
            q: (*batch, n).
            A: (*batch, m, n), dense or sparse; m is ``cones.rows``.
            b: (*batch, m); entries of the nonnegative cone's rows may be +inf: such a row is absent, with s = inf.
            solver_args: options for this call, over those of the layer.
            warm_start: as for :meth:`lpgd.layers.qp.QPLayer.forward`.

        Returns:
            A named tuple (x, y, s) in the inputs' type and on their device, with the call's record in ``info``.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``); it carries statuses and indices.
            ValueError, TypeError: an argument has the wrong shape, type, layout or device.
        """
        batch, structure, data = self._read(P, q, A, b)

        def listed() -> list[Argument]:
            arguments = [Argument("q", q, 1), Argument("A", A, 2)]
            arguments.append(Argument("b", b, 1, torch.inf, self.cones.sections["nonnegative"]))
            return arguments if P is None else [Argument("P", P, 2), *arguments]

        point, info = self._solve(data, structure, batch, solver_args, warm_start, explanation(listed, batch))
        s = _slack(structure, data, point.x, info)
        if info.violation is not None:
            s = s + info.violation.rows
            info.violation = info.violation.restored(batch.restore)
        output = ConicOutput(
            batch.restore(point.x, (structure.n,)),
            batch.restore(point.y, (structure.m,)),
            batch.restore(s, (structure.m,)),
        )
        output.info, output.batch_shape = info, batch.batch_shape
        return output

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        P: Tensor | None,
        q: Tensor,
        A: Tensor,
        b: Tensor,
        *,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable: statuses, residuals, iterations, times, x, y and s.

        Arguments are those of a call; leading batch dimensions are flattened to one.  Elements without a solution
        do not raise: see ``ConicSolution.statuses``.
        """
        with torch.no_grad():
            batch, structure, data = self._read(P, q, A, b)
        return self._solution(data, structure, batch, solver_args, warm_start)

    def extra_repr(self) -> str:
        return f"{self.cones}, {super().extra_repr()}"

    def _read(self, P: Tensor | None, q: Tensor, A: Tensor, b: Tensor) -> tuple[Batch, ConicStructure, ConicData]:
        """Check the arguments and put them together."""
        n = q.shape[-1] if isinstance(q, Tensor) and q.ndim else "n"
        if n == 0:
            raise ValueError(f"q has shape {tuple(q.shape)}: there is nothing to solve for.")
        m = self.cones.rows
        expected = [Expected("q", (n,)), Expected("A", (m, n), MATRIX_LAYOUTS), Expected("b", (m,))]
        tensors = [q, A, b]
        if P is not None:
            expected.append(Expected("P", (n, n), MATRIX_LAYOUTS))
            tensors.append(P)
        batch = check_inputs(expected, tensors)
        constraint = read_matrix("A", A, batch)
        quadratic = read_matrix("P", P, batch) if P is not None else None
        chosen = plan(q.shape[-1], self.cones, quadratic and quadratic.pattern, (constraint.pattern,))
        nothing = torch.empty(0, dtype=torch.float64, device=batch.device)
        data = ConicData(
            P=nothing if quadratic is None else chosen.quadratic_values(quadratic),
            q=batch.rows(q, 1),
            A=chosen.constraint_values([constraint]),
            b=batch.rows(b, 1),
            lower=nothing,
            upper=nothing,
        )
        return batch, chosen.structure, data


def _slack(structure: ConicStructure, data: ConicData, x: Tensor, info: CallInfo) -> Tensor:
    """``b - A x``, differentiable where there is a solution: the gradient of a row without one is zero."""
    solution, usable = info.solution, info.usable
    assert solution is not None
    assert usable is not None
    # What is not finite are numbers of elements without a solution, and of absent rows, whose slack is b, infinite.
    b, A = per_element(data.b, x.shape[0]), torch.nan_to_num(data.A, 0.0, 0.0, 0.0)
    if not solution.failed:
        return b - structure.constraint.matvec(A, x)
    s = b - structure.constraint.matvec(A, torch.where(usable, x, 0.0))
    iterate = b.detach() - structure.constraint.matvec(A.detach(), x.detach())
    return torch.where(usable, s, iterate)


@eager
def solve_conic(
    P: Tensor | None,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    cones: Cones,
    *,
    solver: ConicSolver | str | None = None,
    gradient: GradientMethod | None = None,
    solver_args: Mapping[str, object] | None = None,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    warm_start: Recorded | ConicSolution | None = None,
) -> ConicOutput:
    """Solve a conic program, differentiably: :class:`ConicLayer` as a function; see :func:`lpgd.solve_qp`."""
    layer = ConicLayer(cones, solver, gradient, solver_args, on_error, executor)
    return layer(P, q, A, b, warm_start=False if warm_start is None else warm_start)
