"""NodeLayer: a declarative node as a differentiable PyTorch layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients import ClosedForm, GradientMethod
from lpgd.gradients.losses import identity
from lpgd.layers.base import BaseLayer, CallOptions, WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.inputs import HALF, Batch, Expected, check_inputs, no_tensor, with_numbers
from lpgd.layers.oracle import TensorOutput, record
from lpgd.nodes.base import BaseNode, refuse_learned_options
from lpgd.nodes.user import Node
from lpgd.problems.base import Traits
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodeStructure, input_class
from lpgd.solvers.failures import OnError
from lpgd.solvers.node.solver import NEWTON_LIMIT, NodeSolver

__all__ = ["NodeLayer"]

FORMS = 256
"""Of so many shapes of calls a layer remembers what it made of them."""


class _Form(NamedTuple):
    """What the shapes and types of a call's inputs decide."""

    batch: Batch
    structure: NodeStructure
    working: torch.dtype
    choice: str


class NodeLayer(BaseLayer):
    """The solution ``y*(w) = argmin f(y, w)  s.t.  h(y, w) = 0, g(y, w) ≤ 0`` of a node as a function of its inputs w.

    Args:
        node: what is minimised: one of ``lpgd.nodes``, or an ``lpgd.Node`` of functions of your own.
        gradient: a gradient method; None is the node's closed form where it has one, else ``ImplicitKKT()``.  ``LPGD``
            solves the node again with ``τ <g, y> + (ρ/2) |y - y*|²`` added to its objective.  ``IgnoreConstraints()``
            is an approximation.
        solver: how problems are solved; None is ``NodeSolver()``: the node's own solver where it has one.
        on_error: ``"raise"``: an element without a solution raises; ``"nan"``: its rows are NaN and its gradient
            zero; ``"warn"``: a warning, the last iterate, and a zero gradient.
        progress: show a progress bar (tqdm) over the elements, where a call takes longer than a second.

    Attributes:
        gradient: the gradient method; it may be replaced between calls.

    Raises:
        TypeError: something else than a node, or a gradient method that it does not have what it takes for.

    Results are in the dtype of the inputs and on their device, and computed in it: inputs in half precision in float64.
    Where a solution is not unique, or a local one, it is
    the one that the node's solver finds; a warm start (and the perturbed solves of LPGD) stay with its
    branch.  Gradients of closed forms and of ``ImplicitKKT`` can be differentiated again (``create_graph=True``, and
    ``torch.func`` in both modes); second derivatives by other methods, and third ones, are refused.

    [DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
    """

    def __init__(
        self,
        node: BaseNode,
        gradient: GradientMethod | None = None,
        solver: NodeSolver | None = None,
        on_error: OnError = "raise",
        *,
        progress: bool = False,
    ) -> None:
        if not isinstance(node, BaseNode):
            made = f"{node.__name__}(...)" if isinstance(node, type) else "lpgd.Node(objective)"
            raise TypeError(f"node is {node!r}; it must be a declarative node, such as {made}.")
        refuse_learned_options(node)
        if solver is not None and not isinstance(solver, NodeSolver):
            raise TypeError(f"solver is {solver!r}; it must be an lpgd.NodeSolver, or None.")
        self._node, self._solver = node, solver or NodeSolver()
        self._names, self._ndims = tuple(node.inputs), tuple(node.inputs.values())
        self._forms: dict[Any, _Form] = {}
        super().__init__(gradient or ClosedForm(), on_error, SerialExecutor(), progress)

    @property
    def node(self) -> BaseNode:
        """What is minimised."""
        return self._node

    @property
    def solver(self) -> NodeSolver:
        """How problems are solved."""
        return self._solver

    def _traits(self) -> Traits:
        return NodeStructure(self._node, ()).traits

    def extra_repr(self) -> str:
        return f"node={self._node}, gradient={self.gradient}"

    @eager
    def forward(self, *inputs: Tensor | float | None, warm_start: WarmStart = False) -> TensorOutput:
        """Solve for these inputs.

        Args:
            *inputs: the node's inputs, (*batch, *shape) each; batch dimensions broadcast.  A number is a constant
                where one element has one number.  None, or left out at the end, where the node says what it takes
                instead.
            warm_start: a previous result for inputs of these shapes, or True for this thread's last one if it fits.

        Returns:
            Minimisers (*batch, *shape of y).  The tensor's ``info`` is the record of this call.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``).
            ValueError, TypeError: an input has the wrong shape or type.
        """
        problem, batch, call = self._problem(inputs)
        outputs, info = self._differentiable(problem, batch, call, warm_start)
        return record(batch.restore(outputs.x, problem.structure.shape), info, batch)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(self, *inputs: Tensor | float | None, warm_start: WarmStart = False) -> NodeSolution:
        """The solver's whole answer, not differentiable: minimisers x (B, n), multipliers (``point``), statuses, times.

        Arguments are those of a call.  Elements without a solution do not raise.
        """
        with torch.no_grad():
            return cast(NodeSolution, self._plain(*self._problem(inputs), warm_start))

    def _problem(self, inputs: tuple[Any, ...]) -> tuple[NodeProblem, Batch, CallOptions]:
        node = self._node
        names = self._names
        missing = len(names) - len(inputs)
        if not 0 <= missing <= node.optional:
            count = f"{len(names)}" if not node.optional else f"{len(names) - node.optional} to {len(names)}"
            raise ValueError(f"{node.name} takes {count} inputs ({', '.join(names)}); it got {len(inputs)}.")
        inputs = tuple(with_numbers(inputs, self._ndims))
        for place, (name, tensor) in enumerate(zip(names, inputs, strict=False)):
            if not isinstance(tensor, Tensor) and not (tensor is None and place >= len(names) - node.optional):
                raise TypeError(no_tensor(name, tensor, None))
        given = reduce(torch.promote_types, {tensor.dtype for tensor in inputs if tensor is not None})
        inputs = (*inputs, *(None,) * missing)
        arranged = node.arrange(*(_whole(tensor) if given in HALF else tensor for tensor in inputs))
        kind = (given, *((tensor.shape, tensor.dtype, tensor.device, tensor.layout) for tensor in arranged))
        form = self._forms.get(kind)
        if form is None:
            form = self._form(given, arranged)
            if len(self._forms) >= FORMS:
                self._forms.clear()
            self._forms[kind] = form
        batch, structure, working, choice = form
        data = input_class(names)(
            *(_rows(batch, tensor, working, ndim) for tensor, ndim in zip(arranged, self._ndims, strict=True))
        )
        problem = NodeProblem(structure, data, batch.batch_size)
        n = structure.n
        gradient = self.gradient.bound(lambda: [identity(n, n)], batch.rows_of_loss)
        return problem, batch, CallOptions(self._solver, None, gradient, choice)

    def _form(self, given: torch.dtype, arranged: Sequence[Tensor]) -> _Form:
        """What inputs of these shapes and types make of a call; results are to be of the type ``given``.

        Raises:
            ValueError, TypeError: they have the wrong shape or type, or do not fit together.
        """
        expected = []
        for name, tensor, ndim in zip(self._names, arranged, self._ndims, strict=True):
            if tensor.ndim < ndim:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; one element of it has {ndim} dimensions, and those of "
                    f"the batch come before.{self._node.about_ndims(name)}"
                )
            expected.append(Expected(name, tuple(tensor.shape[tensor.ndim - ndim :])))
        batch = check_inputs(expected, arranged)
        structure = NodeStructure(self._node, tuple(cast("tuple[int, ...]", item.shape) for item in expected))
        _ = structure.shape  # where the node refuses shapes that do not fit together
        return _Form(replace(batch, dtype=given), structure, batch.dtype, self._choice(structure))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_forms": {}}

    def _choice(self, structure: NodeStructure) -> str:
        """Which solver solves problems of this structure, and why."""
        node, algorithm = self._node, self._solver.algorithm
        if algorithm != "own":
            return f"{algorithm}, as asked for."
        if type(node).solve is not BaseNode.solve and not (isinstance(node, Node) and not node.has_solver):
            return f"{node.name}'s own, as it has one."
        few = structure.n <= NEWTON_LIMIT
        return f"{'newton' if few else 'lbfgs'}, as {node.name} has {structure.n} variables and no solver of its own."


def _whole(tensor: Tensor | None) -> Tensor | None:
    """In float64, as nothing is computed in half precision."""
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def _rows(batch: Batch, tensor: Tensor, dtype: torch.dtype, ndim: int) -> Tensor:
    """One row for each element, of this type; a tensor that the batch shares is expanded, not copied."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    if tensor.ndim == ndim + 1 and tensor.shape[:1] == batch.batch_shape:
        return tensor  # each view is a node of the graph
    flat = batch.flatten(tensor, ndim)
    return flat if flat.ndim > ndim else flat.expand(batch.batch_size, *flat.shape)
