"""Quadratic and linear programs as differentiable layers and functions of their data."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple, Never

import torch
from torch import Tensor

from lpgd.autograd import OnError
from lpgd.cones.product import Cones
from lpgd.gradients import GradientMethod
from lpgd.layers.base import OptimizationLayer, Recorded, WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.inputs import MATRIX_LAYOUTS, Batch, Expected, check_inputs, refuse_positional
from lpgd.layers.matrices import Pattern, join, plan, read_matrix
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicStructure
from lpgd.solvers import ConicSolver

__all__ = ["LPLayer", "ProgramOutput", "QPLayer", "solve_lp", "solve_qp"]


class _ProgramFields(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    z_box: Tensor


class ProgramOutput(_ProgramFields, Recorded):
    """A solution of a quadratic or linear program, and the record of the call in ``info``.

    Attributes:
        x: (*batch, n) the minimiser.
        y: (*batch, m) multipliers of ``A x = b``.
        z: (*batch, k) multipliers of ``G x ≤ h``, nonnegative.
        z_box: (*batch, n) multipliers of the bounds: positive at an upper, negative at a lower bound.
    """


class _Call(NamedTuple):
    """The arguments of a call as a batch of conic programs."""

    batch: Batch
    structure: ConicStructure
    data: ConicData
    sizes: tuple[int, int]  # m, k


Bound = Tensor | float | None


class _ProgramLayer(OptimizationLayer):
    """What the two layers share: A and G are stacked, zero rows first, and bounds stay bounds."""

    _has_quadratic: bool

    def __init__(
        self,
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        solver_args: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        integer: Sequence[int] = (),
    ) -> None:
        self._integer = _index_set(integer)
        one, some = Pattern((1, 1)), (0,) if self._integer else ()
        example = plan(1, Cones(1, 1), one if self._has_quadratic else None, (one, one), True, True, some).structure
        super().__init__(example, False, solver, gradient, solver_args, on_error, executor, False)

    def _read(
        self,
        objective: dict[str, Tensor],
        A: Tensor | None,
        b: Tensor | None,
        G: Tensor | None,
        h: Tensor | None,
        lb: Bound,
        ub: Bound,
    ) -> _Call:
        """Check the arguments and put them together.

        Args:
            objective: the cost vector, and P after it where there is one, by name.
        """
        cost = next(iter(objective))
        n = _size(objective[cost], -1, "n")
        if n == 0:
            raise ValueError(f"{cost} has shape {tuple(objective[cost].shape)}: there is nothing to solve for.")
        if self._integer and isinstance(n, int) and self._integer[-1] >= n:
            raise ValueError(f"integer holds {self._integer[-1]}, but {cost} has {n} entries.")
        tensors: dict[str, Any] = dict(objective)
        expected = [Expected(cost, (n,)), *(Expected(name, (n, n), MATRIX_LAYOUTS) for name in list(objective)[1:])]
        for names, symbol, pair in ((("A", "b"), "m", (A, b)), (("G", "h"), "k", (G, h))):
            matrix, vector = pair
            if matrix is None and vector is None:
                continue
            if matrix is None or vector is None:
                given, missing = names if vector is None else reversed(names)
                raise ValueError(f"{given} is given but {missing} is not: constraints need both, or neither.")
            rows = _size(matrix, -2, symbol)
            expected += [Expected(names[0], (rows, n), MATRIX_LAYOUTS), Expected(names[1], (rows,))]
            tensors |= {names[0]: matrix, names[1]: vector}
        for name, bound in (("lb", lb), ("ub", ub)):
            if isinstance(bound, Tensor) or not (bound is None or _is_number(bound)):
                scalar = isinstance(bound, Tensor) and bound.ndim == 0
                expected.append(Expected(name, () if scalar else (n,)))
                tensors[name] = bound
        batch = check_inputs(expected, list(tensors.values()))
        return self._assemble(int(n), batch, cost, tensors, {"lb": lb, "ub": ub})

    def _assemble(self, n: int, batch: Batch, cost: str, tensors: dict[str, Tensor], bounds: dict[str, Bound]) -> _Call:
        matrices = {name: read_matrix(name, tensors[name], batch) for name in ("P", "A", "G") if name in tensors}
        blocks = [matrices[name] for name in ("A", "G") if name in matrices]
        m, k = (tensors[name].shape[-2] if name in tensors else 0 for name in ("A", "G"))
        P = matrices.get("P")
        patterns = tuple(block.pattern for block in blocks) or (Pattern((0, n)),)
        has_lower, has_upper = (bound is not None for bound in bounds.values())
        chosen = plan(n, Cones(m, k), P and P.pattern, patterns, has_lower, has_upper, self._integer)
        nothing = torch.empty(0, dtype=torch.float64, device=batch.device)
        lower, upper = (_bound(tensors.get(name, bound), n, batch, nothing) for name, bound in bounds.items())
        data = ConicData(
            P=nothing if P is None else chosen.quadratic_values(P),
            q=batch.rows(tensors[cost], 1),
            A=chosen.constraint_values(blocks) if blocks else nothing,
            b=join([batch.rows(tensors[name], 1) for name in ("b", "h") if name in tensors]) if blocks else nothing,
            lower=lower,
            upper=upper,
        )
        return _Call(batch, chosen.structure, data, (m, k))

    def _run(self, call: _Call, solver_args: Mapping[str, Any] | None, warm_start: WarmStart) -> ProgramOutput:
        point, info = self._solve(call.data, call.structure, call.batch, solver_args, warm_start)
        n, (m, k), restore = call.structure.n, call.sizes, call.batch.restore
        y, z = restore(point.y, (m + k,)).split((m, k), -1)
        output = ProgramOutput(restore(point.x, (n,)), y, z, restore(point.z, (n,)))
        output.info, output.batch_shape = info, call.batch.batch_shape
        return output


def _index_set(integer: Sequence[int]) -> tuple[int, ...]:
    index = tuple(sorted(operator.index(entry) for entry in integer))
    if len(set(index)) < len(index) or (index and index[0] < 0):
        raise ValueError(f"integer is {integer!r}; it must hold different indices of variables, from 0.")
    return index


def _size(tensor: Any, dim: int, symbol: str) -> int | str:
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.ndim >= -dim else symbol


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(bound: Bound, n: int, batch: Batch, nothing: Tensor) -> Tensor:
    if bound is None:
        return nothing
    if not isinstance(bound, Tensor):
        return nothing.new_full((n,), float(bound))
    if bound.ndim == 0:
        return bound.to(torch.float64).expand(n)
    return batch.rows(bound, 1)


class QPLayer(_ProgramLayer):
    """The solution of a convex quadratic program, as a differentiable function of all of its data.

        minimise    ½ xᵀP x + qᵀx
        subject to  A x = b,  G x ≤ h,  lb ≤ x ≤ ub

    Multipliers y of the equalities, z ≥ 0 of the inequalities and z_box of the bounds, positive at an upper and
    negative at a lower bound, have ``P x + q + Aᵀy + Gᵀz + z_box = 0``.

    Args:
        solver: a solver, the name of one, or None to choose for each problem.
        gradient: a gradient method; None is ``ImplicitKKT()``, the exact gradient.
        solver_args: options of the solver, as for :class:`~lpgd.layers.cvxpy.layer.CvxpyLayer`.
        on_error: ``"raise"``, ``"nan"`` or ``"warn"``: what becomes of elements without a solution.
        executor: a ``concurrent.futures.Executor`` for the elements of a batch; None is one thread for each core.

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
        solver_args: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
    ) -> None:
        super().__init__(solver, gradient, solver_args, on_error, executor)

    @eager
    def forward(
        self,
        P: Tensor,
        q: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Bound = None,
        ub: Bound = None,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: WarmStart = False,
    ) -> ProgramOutput:
        """Solve the program for these data; constraints and bounds are given by name.

        Args:
            P: (*batch, n, n), dense or sparse.
            q: (*batch, n).
            A, b: (*batch, m, n) and (*batch, m), or None for both.
            G, h: (*batch, k, n) and (*batch, k), or None for both.
            lb, ub: (*batch, n), one number for all variables, or None; entries may be infinite.
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
        return self._run(self._read({"q": q, "P": P}, A, b, G, h, lb, ub), solver_args, warm_start)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        P: Tensor,
        q: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Bound = None,
        ub: Bound = None,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable: statuses, residuals, iterations, times.

        Arguments are those of a call; leading batch dimensions are flattened to one.  The rows of its ``y`` are the
        equalities and then the inequalities, its ``z`` is z_box.  Elements without a solution do not raise.
        """
        refuse_positional("QPLayer", "layer.solve(P, q", misplaced)
        with torch.no_grad():
            call = self._read({"q": q, "P": P}, A, b, G, h, lb, ub)
        return self._solution(call.data, call.structure, call.batch, solver_args, warm_start)


class LPLayer(_ProgramLayer):
    """The solution of a linear program, as a differentiable function of all of its data.

        minimise cᵀx   subject to  A x = b,  G x ≤ h,  lb ≤ x ≤ ub

    Arguments, attributes, errors and conventions are those of :class:`QPLayer`; ``c + Aᵀy + Gᵀz + z_box = 0``.  Where
    the solution is a vertex the exact gradient with respect to c is zero, which is warned about: with
    ``gradient=lpgd.LPGD(tau)`` it teaches.

    Args:
        solver, gradient, solver_args, on_error, executor: as for :class:`QPLayer`.
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
        solver_args: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        integer: Sequence[int] = (),
    ) -> None:
        super().__init__(solver, gradient, solver_args, on_error, executor, integer)

    @eager
    def forward(
        self,
        c: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Bound = None,
        ub: Bound = None,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: WarmStart = False,
    ) -> ProgramOutput:
        """Solve the program for these data: c is (*batch, n), the others, by name, as in :meth:`QPLayer.forward`."""
        refuse_positional("LPLayer", "layer(c", misplaced)
        return self._run(self._read({"c": c}, A, b, G, h, lb, ub), solver_args, warm_start)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        c: Tensor,
        *misplaced: Never,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Bound = None,
        ub: Bound = None,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable, as :meth:`QPLayer.solve`."""
        refuse_positional("LPLayer", "layer.solve(c", misplaced)
        with torch.no_grad():
            call = self._read({"c": c}, A, b, G, h, lb, ub)
        return self._solution(call.data, call.structure, call.batch, solver_args, warm_start)


@eager
def solve_qp(
    P: Tensor,
    q: Tensor,
    *misplaced: Never,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    lb: Bound = None,
    ub: Bound = None,
    solver: ConicSolver | str | None = None,
    gradient: GradientMethod | None = None,
    solver_args: Mapping[str, Any] | None = None,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    warm_start: Recorded | ConicSolution | None = None,
) -> ProgramOutput:
    """Solve a convex quadratic program, differentiably: :class:`QPLayer` as a function.

    What depends on the matrices is kept between calls here too; ``warm_start`` takes a previous result.
    """
    refuse_positional("solve_qp", "solve_qp(P, q", misplaced)
    layer = QPLayer(solver, gradient, solver_args, on_error, executor)
    return layer(P, q, A=A, b=b, G=G, h=h, lb=lb, ub=ub, warm_start=False if warm_start is None else warm_start)


@eager
def solve_lp(
    c: Tensor,
    *misplaced: Never,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    lb: Bound = None,
    ub: Bound = None,
    solver: ConicSolver | str | None = None,
    gradient: GradientMethod | None = None,
    solver_args: Mapping[str, Any] | None = None,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    integer: Sequence[int] = (),
    warm_start: Recorded | ConicSolution | None = None,
) -> ProgramOutput:
    """Solve a linear program, differentiably: :class:`LPLayer` as a function; see :func:`solve_qp`."""
    refuse_positional("solve_lp", "solve_lp(c", misplaced)
    layer = LPLayer(solver, gradient, solver_args, on_error, executor, integer)
    return layer(c, A=A, b=b, G=G, h=h, lb=lb, ub=ub, warm_start=False if warm_start is None else warm_start)
