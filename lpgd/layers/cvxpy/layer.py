"""CvxpyLayer: a parametrised CVXPY problem as a differentiable PyTorch layer."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.autograd import CallInfo
from lpgd.execution.threads import one_torch_thread
from lpgd.gradients import GradientMethod
from lpgd.gradients.losses import Reading
from lpgd.layers.absent import without_absent_rows
from lpgd.layers.base import LayerOutput, OptimizationLayer, WarmStart
from lpgd.layers.concrete_values import inspect_values
from lpgd.layers.cvxpy.attributes import check_attributes
from lpgd.layers.cvxpy.elimination import NO_PIVOTS, find_pivots
from lpgd.layers.cvxpy.layout import CanonicalProgram, VariableLayout
from lpgd.layers.cvxpy.maps import Columns, DataMap, SparseMap
from lpgd.layers.cvxpy.observed import observed_by
from lpgd.layers.cvxpy.substitution import ExpandedSolution, Substitution, Terms
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.explanations import Argument, explanation
from lpgd.layers.inputs import Batch, Inputs, batch_inputs
from lpgd.layers.standard_options import StandardOptions
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure
from lpgd.solvers import ConicSolver, choose_solver
from lpgd.solvers.choose import named_solver
from lpgd.solvers.failures import OnError

if TYPE_CHECKING:
    import cvxpy as cp

__all__ = ["CvxpyLayer"]


class CvxpyLayer(OptimizationLayer):
    """The solution of a parametrised convex problem, as a differentiable function of its parameters.

    Forward, the problem is solved for each element of the batch.  Backward, ``gradient`` says how: LPGD solves it
    again, warm-started, on parameters perturbed by the incoming loss gradient; ImplicitKKT differentiates the
    optimality conditions.

    Boolean and integer variables make an integer program, with a linear objective and linear constraints, which HiGHS
    solves to optimality.  Its solutions jump where a small change moves them at all: ``gradient`` must be LPGD or
    BlackboxBackprop with a given τ and ρ = 0.  Gradients of parameters of the objective are then differences of integer
    solutions; those of constraints take their multipliers from the linear relaxation (a heuristic, see
    :class:`~lpgd.solvers.HiGHS`).

    Args:
        problem: a DPP problem: its data are affine in its parameters.  Every cone that CVXPY reduces to is taken;
            quadratic objectives stay quadratic (``quad_form(x, P)`` with a parameter P too).
        parameters: all of its parameters, in the order of the layer's inputs.
        variables: what to return: variables of the problem, and ``constraint.dual_variables[i]``, in any mix.
        solver: a solver, the name of one (``"CLARABEL"``, ``"SCS"``, ``"ECOS"``), or None to choose by capability.
        gradient: a gradient method; None is ``ImplicitKKT()``, the exact gradient, which integer programs have none of.
        gp: the problem is a geometric program (DGP).
        solver_args: options of the solver, by its own names or those of the field's standard layer (``eps``,
            ``max_iters``, ``solve_method``, ``mode``, ...).
        on_error: ``"raise"``: an element without a solution raises; ``"nan"``: its rows are NaN and its gradient
            zero; ``"warn"``: its rows are the solver's last iterate, or NaN, with a warning and a zero gradient;
            ``"relax"``: an element without a feasible point has the solution of the closest feasible problem, as
            :class:`~lpgd.QPLayer` says, in terms of the rows of the program that is solved.
        executor: a ``concurrent.futures.Executor`` for the elements of a batch; None is one thread for each core.
        eliminate: substitute variables that one row defines, such as those of CVXPY's ``sum_squares``, where that
            makes the program cheaper (:mod:`lpgd.layers.cvxpy.elimination` has the rule).  Outputs and gradients stay
            the same; what ``variables`` names is never substituted.  With ``rho > 0`` the augmentation is of the
            variables of the program that is solved.  Squares of a matrix F are formed by ``FᵀF``, which has F's
            condition squared: where that is beyond about 300 for an element, in units of order 1 and along the
            equalities, the whole batch is solved as with False, in this call.
        verbose: let the solver print.
        progress: show a progress bar (tqdm) over the elements, where a call takes longer than a second.

    Attributes:
        gradient: the gradient method; it may be replaced between calls (schedules of τ and ρ).
        solver: the solver; it may be replaced too.
        structure: patterns and cones of the conic program that is solved where no squares lose digits; a call's
            ``info.solution`` has those of its own.

    Raises:
        ValueError: parameters or variables do not belong to the problem, it is not DPP, or the solver cannot take it.
        TypeError: an option is unknown, or the gradient method needs what the problem does not have.

    A call's tensors broadcast over their leading batch dimensions.  Duals have CVXPY's signs and shapes.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        gp: bool = False,
        solver_args: Mapping[str, object] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        *,
        eliminate: bool = True,
        verbose: bool = False,
        progress: bool = False,
    ) -> None:
        from lpgd.layers.cvxpy.canonical import canonicalise

        named = named_solver(solver if solver is not None else StandardOptions.parse(solver_args).solver)
        powers = named is None or "power" in named.capabilities.cones
        whole = canonicalise(problem, parameters, variables, gp=gp, powers=powers)
        pivots = find_pivots(whole) if eliminate else NO_PIVOTS
        substitution = Substitution(whole, pivots) if pivots.rows.size else None
        self._substitution = None if substitution is None or substitution.loses_digits() else substitution
        program = self._substitution.program if self._substitution is not None else whole
        structure = _structure(program, self._substitution)
        super().__init__(
            *(structure, solver, gradient, solver_args, on_error, executor),
            fixed=True,
            verbose=verbose,
            progress=progress,
        )
        self.structure = structure
        self.parameter_layouts = program.parameters
        self.variable_layouts = program.variables
        self._whole = structure if program is whole else _structure(whole)
        self._readers, self._whole_readers = _readers(program), _readers(whole)
        self._data_maps = [DataMap(getattr(whole, name)) for name in ConicData._fields]
        self._idle = whole.idle

    @eager
    def forward(
        self,
        *params: Tensor | float,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> LayerOutput:
        """Solve the problem for these parameter values.

        Args:
            *params: one tensor for each parameter, (*batch, *parameter.shape); batch dimensions broadcast.
            solver_args: options for this call, over those of the layer.
            warm_start: start from a previous result of a batch of this size: an output or a Solution of this layer;
                True takes this thread's last one if the batch shape is the same.  Solvers without warm start
                ignore it.

        Returns:
            One tensor (*batch, *variable.shape) for each variable, in the inputs' type and on their device; a tuple,
            whose ``info`` is the record of this call.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``); it carries statuses and indices.
            ValueError, TypeError: wrong number, shape, type or device of the tensors, or a value without the sign or
                definiteness that its parameter was declared with.
        """
        inputs = batch_inputs(self.parameter_layouts, params)
        with one_torch_thread():  # several wait for more work for a while, on the cores that solvers are to have next
            posed = self._posed(self._columns(inputs))

        def listed() -> list[Argument]:
            known = zip(self.parameter_layouts, params, strict=True)
            return [
                Argument(f"parameter {one.name}", torch.as_tensor(value), len(one.shape), positive=one.log)
                for one, value in known
            ]

        start, why = self._as_solved(warm_start, posed.structure, inputs), explanation(listed, inputs)
        point, info = self._solve(posed.data, posed.structure, inputs, solver_args, start, why)
        readers = self._readers if posed.structure is self.structure else self._whole_readers
        output = LayerOutput(inputs.restore(reader(point), reader.layout.shape) for reader in readers)
        if info.violation is not None:
            info.violation = info.violation.restored(inputs.restore)
        output.info, output.batch_shape = info, inputs.batch_shape
        return output

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(
        self,
        *params: Tensor | float,
        solver_args: Mapping[str, object] | None = None,
        warm_start: WarmStart = False,
    ) -> ConicSolution:
        """The solver's whole answer, not differentiable: statuses, residuals, iterations, times, x, y, z and s.

        It has all variables and rows that CVXPY's reductions lead to, those that were substituted, too, but for rows
        that others imply (:mod:`lpgd.layers.cvxpy.implied`), and variables that are put at their limit, as that of
        ``abs(u) <= c`` is, with its row (:mod:`lpgd.layers.cvxpy.limits`).  Arguments are those of a call, whose
        leading batch dimensions are flattened to one.  Elements without a solution do not raise: see
        ``ConicSolution.statuses``.
        """
        inputs = batch_inputs(self.parameter_layouts, params)
        with torch.no_grad():
            columns = self._columns(inputs)
            posed = self._posed(columns)
        start = self._as_solved(warm_start, posed.structure, inputs)
        solution = self._solution(posed.data, posed.structure, inputs, solver_args, start)
        if self._substitution is None or posed.terms is None:
            return solution
        with torch.no_grad():
            whole, _ = without_absent_rows(self._whole, self._whole_data(columns), inputs.batch_size)
            problem = ConicProblem(self._whole, whole, inputs.batch_size)
            return self._substitution.expand(solution, problem, posed.terms)

    def extra_repr(self) -> str:
        structure = self.structure
        return f"{structure.n} variables, {structure.m} rows, {structure.cones}, {super().extra_repr()}"

    def _columns(self, inputs: Inputs) -> Columns:
        layouts = self.parameter_layouts
        ndims = [len(layout.shape) for layout in layouts]
        inspect_values(lambda shown: check_attributes(layouts, shown), inputs.tensors, ndims)
        return Columns(layouts, inputs.tensors, inputs.batch_size, self._idle)

    def _posed(self, columns: Columns) -> _Posed:
        """Parameters to the data that are solved; a datum that only shared parameters reach stays shared.

        It is the whole program where an element's squares would lose digits.
        """
        if self._substitution is not None:
            terms = self._substitution.terms(columns)
            data = self._substitution.data(columns, terms)
            if not self._substitution.loses_digits(data):
                return _Posed(self.structure, data, terms)
        return _Posed(self._whole, self._whole_data(columns), None)

    def _whole_data(self, columns: Columns) -> ConicData:
        return ConicData(*(data_map(columns) for data_map in self._data_maps))

    def _set_solver(self, solver: ConicSolver | str | None, options: Mapping[str, object]) -> None:
        super()._set_solver(solver, options)
        self._whole_solver: ConicSolver | None = None
        self._chosen_by = dict(options)

    def _solver_for(self, structure: ConicStructure) -> ConicSolver | None:
        """The whole program has a solver of its own, unless one is named; it is chosen where it is first needed."""
        if structure is self.structure or self._named:
            return self._solver
        if self._whole_solver is None:
            self._whole_solver = choose_solver(structure, None, self._chosen_by, self._situation())
        return self._whole_solver

    def _readings(self, structure: ConicStructure) -> Sequence[Reading]:
        readers = self._readers if structure is self.structure else self._whole_readers
        if any(reader.layout.exp for reader in readers):
            raise ValueError("the outputs of a geometric program are not affine in the variables that it is solved in.")
        return [reader.layout.primal for reader in readers]

    def _as_solved(self, warm_start: WarmStart, structure: ConicStructure, batch: Batch) -> WarmStart:
        """A previous result as one of the program that is solved; states of the other one are of no use to it."""
        info = getattr(warm_start, "info", None)
        previous = info.solution if isinstance(info, CallInfo) else warm_start
        if isinstance(previous, ExpandedSolution) and previous.solved is not None:
            previous = previous.solved
        if self._substitution is None or not isinstance(previous, ConicSolution):
            return warm_start
        other = self._whole if structure is self.structure else self.structure
        is_other = previous.problem.structure.digest == other.digest and previous.batch_size == batch.batch_size
        return False if is_other else previous


class _Posed(NamedTuple):
    """What a call solves; ``terms`` where variables were substituted."""

    structure: ConicStructure
    data: ConicData
    terms: Terms | None


def _structure(program: CanonicalProgram, substitution: Substitution | None = None) -> ConicStructure:
    squared = np.zeros(0, dtype=np.int64) if substitution is None else substitution.squared
    return ConicStructure(
        program.quadratic,
        program.constraint,
        program.cones,
        program.lower_index,
        program.upper_index,
        program.integer_index,
        observed=observed_by(program, squared),
    )


def _readers(program: CanonicalProgram) -> list[_Reader]:
    both = np.isin(np.arange(program.n), program.lower_index) & np.isin(np.arange(program.n), program.upper_index)
    return [_Reader(layout, from_numpy(both)) for layout in program.variables]


class _Reader:
    """One of the user's variables as a function of the solution.

    ``max(z, 0)`` and ``max(-z, 0)``, the multipliers of a variable's bounds, are both at a kink where neither bound is
    active: each has half of the derivative there, so that their difference z has all of it.  Where there is one bound
    only, z has one sign, and there is no kink.

    Args:
        layout: how to read it.
        both: (n,) the variables that have two bounds.
    """

    def __init__(self, layout: VariableLayout, both: Tensor) -> None:
        self.layout, self.both = layout, both
        self.terms = {
            name: SparseMap(getattr(layout, name))
            for name in ("primal", "dual", "lower", "upper")
            if getattr(layout, name) is not None
        }

    def __call__(self, point: ConicPoint) -> Tensor:
        sources = types.SimpleNamespace(
            primal=lambda: point.x,
            dual=lambda: point.y,
            lower=lambda: self._one_end(-point.z),
            upper=lambda: self._one_end(point.z),
        )
        values = [term(getattr(sources, name)()) for name, term in self.terms.items() if not term.is_empty]
        if not values:
            values = [point.x.new_zeros(point.x.shape[0], next(iter(self.terms.values())).size)]
        total = sum(values[1:], values[0])
        return torch.exp(total) if self.layout.exp else total

    def _one_end(self, z: Tensor) -> Tensor:
        return torch.where(self.both.to(z.device), 0.5 * (z + z.abs()), z)
