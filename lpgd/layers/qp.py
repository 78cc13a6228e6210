"""Quadratic and linear programs as differentiable layers and functions of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor

from lpgd.gradients import GradientMethod
from lpgd.layers.base import Recorded, WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.inputs import refuse_positional
from lpgd.layers.program import Bound, ProgramLayer, ProgramOutput
from lpgd.problems.conic.solution import ConicSolution
from lpgd.solvers import ConicSolver
from lpgd.solvers.failures import OnError

__all__ = ["LPLayer", "QPLayer", "solve_lp", "solve_qp"]


class QPLayer(ProgramLayer):
    """The solution of a convex quadratic program, as a differentiable function of all of its data.

        minimise    ½ xᵀP x + qᵀx
        subject to  A x = b,  l ≤ G x ≤ h,  lb ≤ x ≤ ub

    Multipliers y of the equalities, z of the inequalities and z_box of the bounds, positive at an upper and negative at
    a lower end, have ``P x + q + Aᵀy + Gᵀz + z_box = 0``; without l, ``z ≥ 0``.

    An end or a bound that is infinite (1e20 and more) is absent, for each element on its own: it has no multiplier and
    no gradient, and nothing that stands in its row is looked at.  Ends that are equal make an equality; one above the
    other leaves the element without a solution.

    Args:
        solver: a solver, the name of one, or None to choose for each problem.
        gradient: a gradient method; None is ``ImplicitKKT()``, the exact gradient.
        solver_args: options of the solver, as for :class:`~lpgd.layers.cvxpy.layer.CvxpyLayer`.
        on_error: ``"raise"``, ``"nan"``, ``"warn"`` or ``"relax"``: what becomes of elements without a solution.
            Relaxed are those without a feasible point: they get the best of the points that violate rows and bounds
            least, in the sense of least squares and in the units in which they are given, with its gradient;
            ``output.info.violation`` says by how much, differentiably.  Other failures raise
            (:mod:`lpgd.problems.conic.relaxed` has the derivation).
        executor: a ``concurrent.futures.Executor`` for the elements of a batch; None is one thread for each core.
        progress: show a progress bar (tqdm) over the elements, where a call takes longer than a second.

    Attributes:
        gradient, solver: may be replaced between calls; a solver of None is chosen by problem.

    Raises:
        ValueError, TypeError: an option is unknown or out of its range, or the solver cannot take such problems.

    **Data.**  P is symmetric positive semidefinite: only ``½ (P + Pᵀ)`` enters, and its gradient is
    ``½ (dP + dPᵀ)``.  Every datum may have leading batch dimensions, which broadcast; a matrix without any is shared:
    it is set up once for the whole batch, and again only when its values change.  P, A and G may be sparse (COO, CSR
    or CSC, the whole matrix for P) with gradients on their patterns, in the same layout; a batch of sparse matrices
    (``torch.sparse_csr_tensor`` with batched indices, say) is solved on the union of its patterns.  PyTorch cannot
    accumulate the ``.grad`` of a CSC leaf (``torch.autograd.grad`` works).
    """

    _has_quadratic = True

    def __init__(
        self,
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        solver_args: Mapping[str, object] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        *,
        progress: bool = False,
    ) -> None:
        super().__init__(solver, gradient, solver_args, on_error, executor, progress=progress)

    @eager
    def forward(
        self,
        P: Tensor,
        q: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Bound = None,
        G: Tensor | None = None,
        h: Bound = None,
        lb: Bound = None,
        ub: Bound = None,
        l: Bound = None,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ProgramOutput:
        """Solve the program for these data; constraints and bounds are given by name.

        Args:
            P: (*batch, n, n), dense or sparse.
            q: (*batch, n).
            A, b: (*batch, m, n) and (*batch, m), or None for both.
            G, h: (*batch, k, n) and (*batch, k), or None for both; entries of h may be +inf.
            l: (*batch, k), or None; entries may be -inf.  With it, h may be None.  Solvers that know rows with two ends
                get them as they are, others ``G x - w = 0`` with bounds on w.
            lb, ub: (*batch, n), or None; entries may be infinite.
            b, h, l, lb and ub may also be one number for all entries: a Python number, which is a constant, or a tensor
                without dimensions.
            solver_args: options for this call, over those of the layer.
            warm_start: start from a previous result of problems of the same structure and a batch of this size: an
                output or a Solution; True takes this thread's last one of this layer, if it fits.  Solvers without
                warm start ignore it.

        Returns:
            A named tuple (x, y, z, z_box) in the inputs' type and on their device, with the call's record in ``info``.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``); it carries statuses and indices.
            ValueError, TypeError: an argument has the wrong shape, type, layout or device, or a constraint no name.
        """
        refuse_positional("QPLayer", "layer(P, q", misplaced)
        return self._run(self._read({"q": q, "P": P}, A, b, G, h, lb, ub, l), solver_args, warm_start)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        P: Tensor,
        q: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Bound = None,
        G: Tensor | None = None,
        h: Bound = None,
        lb: Bound = None,
        ub: Bound = None,
        l: Bound = None,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable: statuses, residuals, iterations, times.

        Arguments are those of a call; leading batch dimensions are flattened to one.  The rows of its ``y`` are the
        equalities and then the inequalities, its ``z`` is z_box; with l, its ``x`` is (x, G x) and its ``z`` is
        (z_box, z).  Elements without a solution do not raise.
        """
        refuse_positional("QPLayer", "layer.solve(P, q", misplaced)
        with torch.no_grad():
            call = self._read({"q": q, "P": P}, A, b, G, h, lb, ub, l)
        return self._solution(call.data, call.structure, call.batch, solver_args, warm_start)


class LPLayer(ProgramLayer):
    """The solution of a linear program, as a differentiable function of all of its data.

        minimise cᵀx   subject to  A x = b,  l ≤ G x ≤ h,  lb ≤ x ≤ ub

    Arguments, attributes, errors and conventions are those of :class:`QPLayer`; ``c + Aᵀy + Gᵀz + z_box = 0``.  Where
    the solution is a vertex the exact gradient with respect to c is zero, which is warned about: with
    ``gradient=lpgd.LPGD(tau)`` it teaches.

    Args:
        solver, gradient, solver_args, on_error, executor, progress: as for :class:`QPLayer`.
        integer: the variables that take whole numbers only (a binary one has the bounds 0 and 1).  What
            :class:`~lpgd.CvxpyLayer` says of integer programs holds here: HiGHS solves them, ``gradient`` is LPGD or
            BlackboxBackprop with a given τ, and multipliers are those of the linear relaxation.

    Raises:
        ValueError: ``integer`` holds an index twice or a negative one, or a call's c has no such entry.
    """

    _has_quadratic = False

    def __init__(
        self,
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        solver_args: Mapping[str, object] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        integer: Sequence[int] = (),
        *,
        progress: bool = False,
    ) -> None:
        super().__init__(solver, gradient, solver_args, on_error, executor, integer, progress)

    @eager
    def forward(
        self,
        c: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Bound = None,
        G: Tensor | None = None,
        h: Bound = None,
        lb: Bound = None,
        ub: Bound = None,
        l: Bound = None,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ProgramOutput:
        """Solve the program for these data: c is (*batch, n), the others, by name, as in :meth:`QPLayer.forward`."""
        refuse_positional("LPLayer", "layer(c", misplaced)
        return self._run(self._read({"c": c}, A, b, G, h, lb, ub, l), solver_args, warm_start)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        c: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Bound = None,
        G: Tensor | None = None,
        h: Bound = None,
        lb: Bound = None,
        ub: Bound = None,
        l: Bound = None,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable, as :meth:`QPLayer.solve`."""
        refuse_positional("LPLayer", "layer.solve(c", misplaced)
        with torch.no_grad():
            call = self._read({"c": c}, A, b, G, h, lb, ub, l)
        return self._solution(call.data, call.structure, call.batch, solver_args, warm_start)


@eager
def solve_qp(
    P: Tensor,
    q: Tensor,
    *misplaced: Never,
    A: Tensor | None = None,
    b: Bound = None,
    G: Tensor | None = None,
    h: Bound = None,
    lb: Bound = None,
    ub: Bound = None,
    l: Bound = None,
    solver: ConicSolver | str | None = None,
    gradient: GradientMethod | None = None,
    solver_args: Mapping[str, object] | None = None,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    warm_start: Recorded | ConicSolution | None = None,
) -> ProgramOutput:
    """Solve a convex quadratic program, differentiably: :class:`QPLayer` as a function.

    What depends on the matrices is kept between calls here too; ``warm_start`` takes a previous result.
    """
    refuse_positional("solve_qp", "solve_qp(P, q", misplaced)
    layer = QPLayer(solver, gradient, solver_args, on_error, executor)
    return layer(P, q, A=A, b=b, G=G, h=h, lb=lb, ub=ub, l=l, warm_start=False if warm_start is None else warm_start)


@eager
def solve_lp(
    c: Tensor,
    *misplaced: Never,
    A: Tensor | None = None,
    b: Bound = None,
    G: Tensor | None = None,
    h: Bound = None,
    lb: Bound = None,
    ub: Bound = None,
    l: Bound = None,
    solver: ConicSolver | str | None = None,
    gradient: GradientMethod | None = None,
    solver_args: Mapping[str, object] | None = None,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    integer: Sequence[int] = (),
    warm_start: Recorded | ConicSolution | None = None,
) -> ProgramOutput:
    """Solve a linear program, differentiably: :class:`LPLayer` as a function; see :func:`solve_qp`."""
    refuse_positional("solve_lp", "solve_lp(c", misplaced)
    layer = LPLayer(solver, gradient, solver_args, on_error, executor, integer)
    return layer(c, A=A, b=b, G=G, h=h, lb=lb, ub=ub, l=l, warm_start=False if warm_start is None else warm_start)
