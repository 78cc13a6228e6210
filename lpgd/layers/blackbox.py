"""BlackboxLayer: any solver of a linear objective, given as a plain callable, as a differentiable PyTorch layer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpgd.gradients import GradientMethod
from lpgd.layers.base import WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.oracle import Arguments, OracleLayer, TensorOutput, record
from lpgd.problems.linear import LinearSolution
from lpgd.solvers.failures import OnError
from lpgd.solvers.oracle import Oracle, Sense

__all__ = ["BlackboxLayer"]


class BlackboxLayer(OracleLayer):
    """The solution ``x*(c) = argmin <c, x>`` over a set that only a solver knows, as a differentiable function of c.

    The set is any: paths, assignments, integer points; it may depend on extra inputs of an element, but not on c.
    The exact gradient is zero almost everywhere where the set is finite.  LPGD's is a difference of solutions
    ([LPGD] section 4.3; Vlastelica et al. 2020), with g the loss gradient at ``x*``:

        lower    (x*(c + τ g) - x*(c)) / τ
        upper    (x*(c) - x*(c - τ g)) / τ
        average  (x*(c + τ g) - x*(c - τ g)) / 2τ

    of ``argmax`` (``sense="max"``), the same with c and the gradient negated: ``-(x*(c - τ g) - x*(c)) / τ`` and so on.

    Args:
        solver: any callable ``solver(costs, *extra)``, from the costs of one element, a float64 NumPy array of any
            shape, to a solution of the same shape (numbers or booleans).  None, NaN, infinity or a
            :class:`~lpgd.Status` mean that there is none.  It gets copies of costs and arrays.
        gradient: a gradient method with a τ: ``BlackboxBackprop(tau)`` (the lower envelope), or ``LPGD(tau)``.
        sense: whether the solver minimises or maximises ``<c, x>``.
        batched: the solver takes all elements at once, costs (k, *shape) and extra inputs with k rows, and returns k
            solutions.
        as_torch: the solver takes and returns float64 tensors, on the device of the costs.
        quadratic: the solver takes keywords ``rho`` and ``center`` too, and minimises ``<c, x> + (ρ/2) |x - center|²``
            (``sense="max"``: maximises ``<c, x> - (ρ/2) |x - center|²``; without such a term they are 0.0 and None).
            Only then a gradient method with ρ > 0 can be used.
        warm_start: the solver takes a keyword ``start`` too: a copy of its answer to similar costs of this element
            (batched: a list of those), or None.  Perturbed solves start from the answer to the costs themselves.
        valid_costs: a function from costs (as the solver gets them) to such as it takes, for perturbed costs in the
            backward pass: a solver of shortest paths that refuses negative lengths takes
            ``valid_costs=lambda c: c.clip(min=0.0)``.
        features: a feature map Ψ: then the solver finds an x of any kind for weights c, best for ``<c, Ψ(x, ξ)>``, and
            the layer returns ``features(x, *extra)``, of the costs' shape, to which all of the above applies.  The x
            are in ``info.solution.answers``.
        ndim: how many dimensions the costs of one element have; None: a vector is one element, and of any other tensor
            the first dimension is the batch.
        on_error: ``"raise"``: an element without a solution raises; ``"nan"``: its rows are NaN and its gradient
            zero; ``"warn"``: the same with a warning.
        executor: a ``concurrent.futures.Executor`` for the elements of a batch; None is one after the other in the
            calling thread, since not every solver may be called from several threads at once.
        progress: show a progress bar (tqdm) over the elements, where a call takes longer than a second.
        batch_time_limit: seconds for all elements of a solve together; those that have not begun by then end with
            ``Status.TIME_LIMIT``.  A call that has begun is not interrupted: give the solver itself a limit for one
            element, and return ``Status.TIME_LIMIT``.

    Attributes:
        gradient: the gradient method; it may be replaced between calls (schedules of τ).

    Raises:
        TypeError: there is no gradient method, or it needs what such a problem does not have: optimality conditions
            (``ImplicitKKT``), a step that approaches the exact gradient (``tau=None``), or a quadratic term.
        ValueError: an option is out of its range.

    [LPGD] Paulus, Musil, Martius (arXiv 2407.05920).  Vlastelica et al.: Differentiation of Blackbox Combinatorial
    Solvers (ICLR 2020).
    """

    def __init__(
        self,
        solver: Callable[..., Any],
        gradient: GradientMethod | None = None,
        sense: Sense = "min",
        batched: bool = False,
        executor: Executor | None = None,
        on_error: OnError = "raise",
        *,
        as_torch: bool = False,
        quadratic: bool = False,
        warm_start: bool = False,
        features: Callable[..., Any] | None = None,
        valid_costs: Callable[[Any], Any] | None = None,
        ndim: int | None = None,
        progress: bool = False,
        batch_time_limit: float | None = None,
    ) -> None:
        oracle = Oracle(
            function=solver,
            sense=sense,
            batched=batched,
            as_torch=as_torch,
            quadratic=quadratic,
            warm_start=warm_start,
            features=features,
            valid_costs=valid_costs,
            batch_time_limit=batch_time_limit,
        )
        super().__init__(oracle, ndim, gradient, on_error, executor, progress)

    @eager
    def forward(self, costs: Tensor, *extra: Any, warm_start: WarmStart = False) -> TensorOutput:
        """Solve for these costs.

        Args:
            costs: (*batch, *shape).
            *extra: further inputs of the solver, which get no gradient: tensors or arrays (*batch, ...), or sequences
                of one object for each element; without a batch anything.  Each element gets its own row.
            warm_start: for a solver that takes starts: a previous result of a batch of this size (an output, or a
                solution), or True for this thread's last one if it fits.

        Returns:
            Solutions (*batch, *shape) in the costs' type and on their device.  The tensor's ``info`` is the record of
            this call.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``), or the solver raised for one.
            ValueError, TypeError: an input has the wrong shape or type, or the solver answered something else than a
                solution.
        """
        arguments = self._read(costs, extra)
        x, info = self._call(arguments, warm_start)
        batch = arguments.batch
        return record(batch.restore(x, arguments.structure.shape), info, batch)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(self, costs: Tensor, *extra: Any, warm_start: WarmStart = False) -> LinearSolution:
        """The solver's whole answer, not differentiable: statuses, times, and solutions x, flattened to (B, n).

        Arguments are those of a call.  Elements without a solution do not raise.
        """
        with torch.no_grad():
            return self._answer(self._read(costs, extra), warm_start)

    def _read(self, costs: Tensor, extra: tuple[Any, ...]) -> Arguments:
        structure, batch = self._batch("costs", costs)
        c = costs.reshape(batch.batch_size, structure.n).to(torch.float64)
        inputs = tuple(self._by_element(f"extra input {place}", values, batch) for place, values in enumerate(extra))
        return Arguments(-c if self.solver.sense == "max" else c, structure, batch, inputs, self.solver)
