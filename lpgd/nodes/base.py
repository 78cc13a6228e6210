"""Declarative nodes: layers that are defined by what they minimise.

The problem of each element, and its Lagrangian, in the sign convention of the conic programs ([DDN] writes
``L = f - νᵀh - λᵀg`` with λ ≤ 0):

    minimise  f(y, w)  subject to  h(y, w) = 0,  g(y, w) ≤ 0
    L(y, ν, λ; w) = f(y, w) + νᵀh(y, w) + λᵀg(y, w),   λ ≥ 0

with inputs w, which are tensors of any number and shape.  A node says what f, h and g are, and may bring a solver and
a closed-form gradient of its own; :class:`~lpgd.problems.node.problem.NodeProblem` is a batch of its problems with
data.

[DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, NamedTuple, SupportsFloat

from torch import Tensor

from lpgd.nodes.captured import is_followed
from lpgd.status import Status

__all__ = ["BaseNode", "NodeAnswer", "Tilt", "fixed_number", "is_shared", "refuse_learned_options"]


class NodeAnswer(NamedTuple):
    """What a node's own solver answers for a batch.

    Attributes:
        y: (B, *shape) minimisers.
        statuses: B statuses.
        iterations: (B,) iterations, a tensor, an array or a list of whole numbers.
        aux: what the closed-form gradient re-uses: None, or a tuple of tensors that have B rows each, or one row for
            the whole batch.
        nu: (B, p) multipliers of the equalities, where the solver has them.
        lam: (B, r) multipliers of the inequalities, at least 0, where the solver has them.
    """

    y: Tensor
    statuses: Sequence[Status]
    iterations: Any
    aux: Any = None
    nu: Tensor | None = None
    lam: Tensor | None = None


class Tilt(NamedTuple):
    """The terms ``<linear, y> + (ρ/2) |y - center|²`` that LPGD adds to a node's objective.

    Attributes:
        linear: (B, *shape).
        rho: ρ ≥ 0.
        center: (B, *shape), zero where ρ = 0.
    """

    linear: Tensor
    rho: float
    center: Tensor


class BaseNode(ABC):
    """What a declarative node says of itself; nodes are frozen dataclasses whose fields are their options.

    All functions are batched: ``y`` is (B, *shape), each input (B, *its shape), each element on its own, in the dtype
    and on the device of the inputs.  An input that the whole batch shares arrives expanded (:func:`is_shared` tells),
    so that one factorisation can serve all.

    Attributes:
        name: for messages.
        optional: so many of the last inputs may be left out of a call, or be None; :meth:`arrange` puts tensors there.
        has_kkt: f, h and g are twice differentiable at solutions, so that optimality conditions can be differentiated.
        domain: what inputs must be beside their shapes, in words; it is part of the message where an element fails.
        is_partial: its closed form answers NaN for elements for which it does not hold; those have other methods.
        is_exact: its solver's answers are solutions; where that is not known, implicit differentiation has a look.
    """

    name: str

    domain: str = ""
    is_exact: bool = True
    has_kkt: ClassVar[bool] = True
    optional: ClassVar[int] = 0
    is_partial: ClassVar[bool] = False

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, int]:
        """The names of the inputs, in the order of the call, each with its number of dimensions for one element.

        All dimensions before those are the batch.
        """

    @abstractmethod
    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one element's y from the shapes of one element's inputs.

        Raises:
            ValueError: the shapes do not fit together; the message names the input and what is expected.
        """

    @abstractmethod
    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        """f: (B,), by differentiable torch operations that ``torch.func.vmap`` can batch."""

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        """h: (B, p), or None.  Rows whose derivative in y vanishes count as absent."""
        return None

    def inequality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        """g, at most 0 where feasible: (B, r), or None."""
        return None

    def tied(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """(B,) whether there are several solutions that are equally good to rounding; None where that is not known."""
        return None

    def without_digits(self, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor | None, Mapping[str, str]]:
        """(B,) elements whose gradients for some inputs have no digits, and for each of these inputs the reason.

        A layer warns of those inputs whose gradient is asked for.
        """
        return None, {}

    def tilt_size(self, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """(B,) how large a tilt is that moves y by about its length; None: as large as ``∇f`` or ``∇²L y``.

        For objectives with terms that are constant on the constraints, which say nothing of it.
        """
        return None

    def about_shape(self, shape: tuple[int, ...]) -> str:
        """What to say of the shape of y where solutions are not unique; nothing where it was given on purpose."""
        return ""

    def about_ndims(self, name: str) -> str:
        """What to say of an input with too few dimensions; nothing where the node itself fixes how many it has."""
        return ""

    def arrange(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Look at the tensors of a call as they arrive, and move dimensions so that each element's are the last ones.

        Optional ones may be None.

        What it does is part of the autograd graph.
        """
        return inputs

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        """(B, *shape) where the generic solver starts: zero unless the node knows better."""
        first = inputs[0]
        return first.new_zeros(first.shape[0], *shape)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer | None:
        """Minimise; ``start`` is the y of an earlier solution or None.  None leaves it to the generic solver."""
        return None

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer | None:
        """Minimise with the terms of LPGD added; None leaves it to the generic solver, started from ``start``."""
        return None

    def multipliers(self, inputs: tuple[Tensor, ...], y: Tensor, aux: Any) -> tuple[Tensor, Tensor] | None:
        """The multipliers ν (B, p) and λ (B, r) at solutions y, from what :meth:`solve` left (of it: aux).

        For a node whose solver does not answer them, as only implicit differentiation asks for them; None leaves it to
        a least-squares estimate.
        """
        return None

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any
    ) -> tuple[Tensor | None, ...] | None:
        """The closed-form gradient of ``<cotangent, y>`` for each input.

        Args:
            inputs, y, cotangent: (B, ...) each; y is a solution.
            aux: what :meth:`solve` left, of these elements; None where the solution comes from elsewhere.

        Returns:
            One gradient of the shape of each input (None for one that is constant), or None where there is no closed
            form.
        """
        return None

    def differentiable_vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        """:meth:`vjp` by operations that autograd differentiates, for second derivatives.

        It is a function of inputs, solution and cotangent, which all have a graph.  None leaves it to the optimality
        conditions.
        """
        return self.vjp(inputs, y, cotangent, None)

    def vjp_ignoring_constraints(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any
    ) -> tuple[Tensor | None, ...] | None:
        """The closed form of :class:`~lpgd.IgnoreConstraints`, arguments and answer as for :meth:`vjp`."""
        return None


def is_shared(tensor: Tensor) -> bool:
    """Whether all rows of a batched input are one and the same."""
    return tensor.shape[0] > 1 and tensor.stride(0) == 0


def fixed_number(option: str, value: object, instead: str) -> float:
    """The value of an option as a number.

    Raises:
        ValueError: it is none, or a tensor that wants a gradient; ``instead`` is what to do then, a clause.
    """
    if isinstance(value, Tensor):
        if is_followed(value):
            raise ValueError(f"{option} requires a gradient, which no option gets: {instead}.")
        if value.numel() != 1:
            raise ValueError(f"{option} has shape {tuple(value.shape)}; an option is one number: {instead}.")
        return float(value)
    if isinstance(value, SupportsFloat) and not isinstance(value, str):
        return float(value)
    raise ValueError(f"{option} is {value!r}; it must be a number ({instead}).")


def refuse_learned_options(node: BaseNode) -> None:
    """Options are constants: a tensor among them that requires a gradient would get none.

    Raises:
        ValueError: there is one; the message names it.
    """
    for field in fields(node) if is_dataclass(node) else ():
        value = getattr(node, field.name)
        if is_followed(value):
            raise ValueError(
                f"{field.name} of {node.name} requires a gradient, which no option gets: pass {field.name}.item(), or "
                f"make it an input, which the node's description names where there is such a form."
            )
