"""A batch of the problems of a declarative node: data, Lagrangian and its derivatives, tilt and augmentation.

The mathematics is that of :mod:`lpgd.nodes.base`.  Points are flattened, (B, n); inputs keep their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd.arrays import elements_where
from lpgd.nodes.base import BaseNode, Tilt, is_shared
from lpgd.problems.base import Centered, Data, Point, Traits, is_surely_finite, maximum_norm
from lpgd.problems.node.structure import NodePoint, NodeStructure
from lpgd.status import SolverError

__all__ = ["NodeProblem"]


@dataclass(frozen=True, eq=False, repr=False)
class NodeProblem(Centered):
    """A batch of a node's problems.

    Args:
        structure: the node and the shapes.
        data: its inputs, a named tuple of tensors (B, *shape) of one dtype.
        batch_size: number of elements B.
        linear: (B, n) cost of the term ``<linear, y>``, or None.
        equality_shift, inequality_shift: (B, p) and (B, r), added to h and g, or None.
        rho, center: the term ``(ρ/2) |y - center|²``; center is (B, n), or None for ρ = 0.
        unit: (B, 1), what the objective and its added terms are divided by, or None (:meth:`in_units`).
        square: (B, n, n) symmetric S of the term ``½ yᵀ S y``, or None.

    Raises:
        ValueError: inputs of another number of rows, or of several dtypes.
    """

    structure: NodeStructure
    data: Data
    batch_size: int
    linear: Tensor | None = None
    equality_shift: Tensor | None = None
    inequality_shift: Tensor | None = None
    rho: float = 0.0
    center: Tensor | None = None
    unit: Tensor | None = None
    square: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} elements of {self.structure})"

    def __post_init__(self) -> None:
        for name, datum, shape in zip(self.data._fields, self.data, self.structure.shapes, strict=True):
            if tuple(datum.shape) != (self.batch_size, *shape) or datum.dtype != self.dtype:
                raise ValueError(
                    f"{name} is {datum.dtype} of shape {tuple(datum.shape)}; it must be {self.dtype} of shape "
                    f"{(self.batch_size, *shape)}."
                )

    @property
    def node(self) -> BaseNode:
        return self.structure.node

    @property
    def traits(self) -> Traits:
        return self.structure.traits

    def with_data(self, data: Data) -> NodeProblem:
        """The same problems with other inputs of the same shapes."""
        terms = self.linear, self.equality_shift, self.inequality_shift, self.rho, self.center, self.unit, self.square
        return NodeProblem(self.structure, data, self.batch_size, *terms)  # dataclasses.replace takes thrice as long

    @property
    def datum_ndims(self) -> tuple[int, ...]:
        """Inputs keep their shapes."""
        return tuple(len(shape) for shape in self.structure.shapes)

    def lanes(self, count: int, data: Data) -> NodeProblem:
        """``count`` copies of this batch, one after the other; a shared input stays shared."""
        tiled = (datum if datum.shape[0] == count * self.batch_size else _tiled(datum, count) for datum in data)
        changes = {name: term if term is None else _tiled(term, count) for name, term in self._added().items()}
        return replace(self, data=data._make(tiled), batch_size=count * self.batch_size, **changes)

    @property
    def dtype(self) -> torch.dtype:
        return self.data[0].dtype

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    @property
    def is_plain(self) -> bool:
        """Whether this is the node's own problem, nothing added."""
        return self.linear is None and self.center is None and not self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """Whether something is added that a node's own solver does not know: to h or g, or a term of second order."""
        added = (self.equality_shift, self.inequality_shift, self.square)
        return any(term is not None for term in added)

    def shaped(self, x: Tensor) -> Tensor:
        """(B, n) to (B, *shape)."""
        shape = self.structure.shape
        return x if x.shape[1:] == shape else x.reshape(x.shape[0], *shape)

    @property
    def added(self) -> Tilt:
        """What is added to the objective, in the shape of y."""
        zero = self.data[0].new_zeros(self.batch_size, self.structure.n)
        linear, center = (zero if term is None else term for term in (self.linear, self.center))
        return Tilt(self.shaped(linear), self.rho, self.shaped(center))

    # -- functions, of flattened minimisers (B, n); ``data`` are other inputs than the problem's own -----------

    def objective(self, x: Tensor, data: Sequence[Tensor] | None = None) -> Tensor:
        """``f(x) + <linear, x> + (ρ/2) |x - center|²``: (B,)."""
        value = self.node.objective(self.shaped(x), *(self.data if data is None else data))
        if tuple(value.shape) != (x.shape[0],):
            raise ValueError(
                f"the objective of {self.node.name} has shape {tuple(value.shape)} for {x.shape[0]} elements; "
                "it must be one number for each."
            )
        if self.linear is not None:
            value = value + (self.linear * x).sum(-1)
        if self.center is not None:
            value = value + 0.5 * self.rho * (x - self.center).square().sum(-1)
        if self.square is not None:
            value = value + 0.5 * (x * (self.square @ x[..., None])[..., 0]).sum(-1)
        return value if self.unit is None else value / self.unit[:, 0]

    def constraints(self, x: Tensor, data: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The values of h (B, p) and g (B, r); no columns where there are none."""
        inputs, y = self.data if data is None else data, self.shaped(x)
        h, g = self.node.equality(y, *inputs), self.node.inequality(y, *inputs)
        h, g = (x.new_zeros(x.shape[0], 0) if values is None else _flat(values) for values in (h, g))
        h = h if self.equality_shift is None else h + self.equality_shift
        return h, g if self.inequality_shift is None else g + self.inequality_shift

    def lagrangian(self, point: NodePoint, data: Sequence[Tensor] | None = None) -> Tensor:
        """``f + νᵀh + λᵀg``, with the added terms: (B,)."""
        value = self.objective(point.x, data)
        if point.nu.shape[-1] or point.lam.shape[-1]:
            h, g = self.constraints(point.x, data)
            value = value + (point.nu * h).sum(-1) + (point.lam * g).sum(-1)
        return value

    # -- derivatives in x -------------------------------------------------------------------------------------

    def gradient(self, point: NodePoint) -> Tensor:
        """``∇_x L``: (B, n)."""
        return torch.func.grad(lambda x: self.lagrangian(point._replace(x=x)).sum())(point.x)

    def hessian_product(self, point: NodePoint) -> Callable[[Tensor], Tensor]:
        """``v ↦ ∇²_xx L v``, (B, n) to (B, n)."""
        pull = torch.func.vjp(lambda x: self.gradient(point._replace(x=x)), point.x)[1]
        return lambda vector: pull(vector)[0]

    def hessian(self, point: NodePoint) -> Tensor:
        """``∇²_xx L``: (B, n, n)."""
        return _applied_to_units(self.hessian_product(point), point.x)

    def jacobian_product(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """``μ ↦ [Dh; Dg]ᵀ μ``, (B, p + r) to (B, n)."""
        pull = torch.func.vjp(lambda x: torch.cat(self.constraints(x), -1), x)[1]
        return lambda multipliers: pull(multipliers)[0]

    def jacobian(self, x: Tensor) -> Tensor:
        """``[Dh; Dg]``: (B, p + r, n)."""
        like = torch.cat(self.constraints(x), -1)
        if not like.shape[-1]:
            return x.new_zeros(x.shape[0], 0, x.shape[-1])
        return _applied_to_units(self.jacobian_product(x), like)

    def in_units(self, x: Tensor) -> tuple[NodeProblem, Tensor]:
        """The same minimisers with an objective whose curvature near x is of the order of one, and the unit.

        What counts as zero must not depend on the units of the objective.  Multipliers of the answer are those of this
        problem divided by the unit, a power of two (B, 1), so that nothing is rounded.  The curvature is that of a
        finite step: the second derivative at x may be infinite (a logarithm at zero), or zero.
        """
        pattern = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64, device=x.device)
        direction = ((pattern.square() * math.sqrt(2)).frac() + 0.5).to(x.dtype)
        slope = torch.func.grad(lambda x: self.objective(x).sum())
        reach = 1 + maximum_norm(x)
        at_x, at_step = slope(x), slope(x + 0.01 * reach[:, None] * direction)
        sizes = torch.stack([maximum_norm(at_x), 100 * maximum_norm(at_step - at_x)]) / reach
        if not is_surely_finite(sizes[1]):
            # The step left the domain: near its end curvatures say nothing of the objective's size, but values do.
            values = (self.objective(x) / reach).abs()
            sizes[1] = torch.where(torch.isfinite(sizes[1]), sizes[1], values)
        size = torch.where(torch.isfinite(sizes), sizes, 0).amax(0)
        unit = torch.where(size > 0, size, 1).log2().round().exp2()[:, None].detach()
        return replace(self, unit=unit if self.unit is None else self.unit * unit), unit

    # -- the two changes it can be solved again after ----------------------------------------------------------

    def tilt(self, step: Tensor, cotangent: Point) -> NodeProblem:
        """``L + step <g, point>``: a linear cost, and shifts of h and g where g has multipliers.

        Args:
            step: (k B,) signed step of each element; with k > 1 the new batch is k copies of this one, one after the
                other.
            cotangent: a NodeOutput, or a NodePoint.
        """
        copies = step.shape[0] // self.batch_size if self.batch_size else 1
        step = step.to(self.dtype)[:, None]
        whole = self._copied(copies)

        def moved(term: Tensor | None, direction: Tensor) -> Tensor:
            change = step * direction.to(self.dtype).repeat(copies, 1)
            return change if term is None else term + change

        nu, lam = (getattr(cotangent, name, None) for name in ("nu", "lam"))
        return replace(
            whole,
            linear=moved(whole.linear, cotangent.x),
            equality_shift=whole.equality_shift if nu is None or not nu.any() else moved(whole.equality_shift, nu),
            inequality_shift=(
                whole.inequality_shift if lam is None or not lam.any() else moved(whole.inequality_shift, lam)
            ),
        )

    def _copied(self, copies: int) -> NodeProblem:
        if copies == 1:
            return self
        data = self.data._make(
            datum[:1].expand(copies * self.batch_size, *datum.shape[1:])
            if is_shared(datum)
            else datum.repeat(copies, *(1,) * (datum.ndim - 1))
            for datum in self.data
        )
        terms = {name: getattr(self, name) for name in _ADDED}
        changes = {
            name: term if term is None else term.repeat(copies, *(1,) * (term.ndim - 1)) for name, term in terms.items()
        }
        return replace(self, data=data, batch_size=copies * self.batch_size, **changes)

    def with_quadratic(self, steps: Tensor, square: Tensor | float, linear: Tensor) -> NodeProblem:
        """``L + s (½ yᵀHy + <h, y>)``, an augmentation where that is what it is.

        Args:
            steps: (B,) s, of any sign.
            square: H, a number for a multiple of the identity, or (B, n, n).
            linear: h, (B, n).
        """
        steps = steps.to(self.dtype)
        linear = steps[:, None] * linear.to(self.dtype)
        whole = replace(self, linear=linear if self.linear is None else self.linear + linear)
        if not isinstance(square, Tensor):
            if bool((steps == steps[:1]).all() & (steps >= 0).all()):
                rho = square * float(steps[0]) if len(steps) else 0.0
                return whole.augment(rho, torch.zeros_like(linear))
            square = square * torch.eye(self.structure.n, dtype=self.dtype, device=self.device)
        added = steps[:, None, None] * square.to(self.dtype)
        return replace(whole, square=added if self.square is None else self.square + added)

    def tilt_unit(self, point: NodePoint, cotangent: Point) -> Tensor:
        """(B,) ``max(|∇f|, |∇²L x|) / |g|`` in the maximum norm, or what the node says in the place of the numerator.

        A numerator of 0 counts as 1; g = 0 gives infinity.
        """
        size = self.node.tilt_size(tuple(self.data), self.shaped(point.x)) if self.is_plain else None
        if size is None:
            slope = torch.func.grad(lambda x: self.objective(x).sum())(point.x)
            curved = self.hessian_product(point)(point.x) if self.traits.has_kkt else slope
            size = torch.maximum(maximum_norm(slope), maximum_norm(curved))
        return torch.where((size > 0) & torch.isfinite(size), size, 1.0) / maximum_norm(cotangent.x)

    # -- derivatives in the data ------------------------------------------------------------------------------

    def _in_data(self, function: Callable[[tuple[Tensor, ...]], Tensor]) -> Data:
        """The gradient of a number in the data."""
        return self.data._make(torch.func.grad(function)(tuple(self.data)))

    def gradient_difference(self, plus: NodePoint, minus: NodePoint, weight: Tensor) -> Data:
        """``weight (∇_w L(plus) - ∇_w L(minus))``: a difference of vjps of the Lagrangian; weight is (B,)."""
        weight = weight.to(self.dtype)
        return self._in_data(lambda data: (weight * (self.lagrangian(plus, data) - self.lagrangian(minus, data))).sum())

    def directional_gradient(self, point: NodePoint, change: NodePoint) -> Data:
        """``∇_w <∇_z L(point), change>``: what a change of the solution is worth in the data.

        Raises:
            SolverError: the change of some elements is not finite, as a second derivative of f, h or g is not.
        """
        return self.data._make(self._along(point, change, tuple(range(len(self.data)))))

    def directional_gradients(self, point: NodePoint, change: NodePoint) -> tuple[Data, Tensor]:
        """The same, and ``∇_x <∇_z L(point), change>``, (B, n): the linearised optimality conditions."""
        *in_data, in_x = self._along(point, change, tuple(range(len(self.data) + 1)))
        return self.data._make(in_data), in_x

    def _along(self, point: NodePoint, change: NodePoint, wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The gradients of ``<∇_z L(point), change>`` in data and x, which is the last one, those that are wanted."""
        if not point.x.shape[0]:  # of none a node may not know how many constraints it has
            return tuple(torch.zeros_like((*self.data, point.x)[place]) for place in wanted)
        good = torch.stack([torch.isfinite(tensor).all(-1) for tensor in change]).all(0)
        if not good.all():
            failed = elements_where(~good)
            raise SolverError(
                f"the second derivatives of {self.node.name} are not finite at the solutions of elements "
                f"{failed[:10]}: there is no derivative there.",
                indices=failed,
            )

        def along(*inputs: Tensor) -> Tensor:
            *data, x = inputs
            slope = torch.func.grad(lambda x: self.lagrangian(point._replace(x=x), data).sum())(x)
            value = (slope * change.x).sum()
            if change.nu.shape[-1] or change.lam.shape[-1]:
                h, g = self.constraints(x, data)
                value = value + (h * change.nu).sum() + (g * change.lam).sum()
            return value

        return torch.func.grad(along, argnums=wanted)(*self.data, point.x)

    def mixed_product(self, point: NodePoint, tangent: Data) -> NodePoint:
        """``∇_z <∇_w L(point), tangent>``: the tilt of forward mode."""

        def along(x: Tensor, nu: Tensor, lam: Tensor) -> Tensor:
            slopes = self._in_data(lambda data: self.lagrangian(NodePoint(x, nu, lam), data).sum())
            products = [(slope * change).sum() for slope, change in zip(slopes, tangent, strict=True)]
            return torch.stack(products).sum()

        return NodePoint(*torch.func.grad(along, argnums=(0, 1, 2))(*point))

    # -- batches ----------------------------------------------------------------------------------------------

    def select(self, elements: Tensor) -> NodeProblem:
        """The batch of these elements."""
        index = elements
        data = self.data._make(
            datum[:1].expand(len(index), *datum.shape[1:]) if is_shared(datum) and len(index) else datum[index]
            for datum in self.data
        )
        changes = {name: term if term is None else term[index] for name, term in self._added().items()}
        return replace(self, data=data, batch_size=len(index), **changes)

    def _added(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in _ADDED}

    def scatter(self, elements: Tensor, data: Data) -> Data:
        """A gradient of the data of ``select(elements)`` as one of this batch's: zero for the other elements."""
        zero = self.zero_gradient()
        return self.data._make(
            total.index_add(0, elements, gradient) for total, gradient in zip(zero, data, strict=True)
        )

    def zero_gradient(self) -> Data:
        """A gradient of the data that is zero."""
        return self.data._make(datum.new_zeros(datum.shape) for datum in self.data)

    def is_surely_finite(self) -> bool:
        """Whether all inputs are finite; False proves nothing, as of :func:`~lpgd.problems.base.is_surely_finite`."""
        return all(is_surely_finite(datum[:1] if is_shared(datum) else datum) for datum in self.data)

    def finite(self) -> Tensor:
        """(B,) whether an element's inputs are finite."""
        fine = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        for datum in self.data:
            values = datum[:1] if is_shared(datum) else datum
            if not is_surely_finite(values):
                fine = fine & torch.isfinite(values).reshape(values.shape[0], math.prod(values.shape[1:])).all(-1)
        return fine


_ADDED = ("linear", "equality_shift", "inequality_shift", "center", "unit", "square")


def _applied_to_units(pull: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """(B, k, n): a linear map (B, k) to (B, n) of each element, applied to the k unit vectors."""
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return torch.func.vmap(lambda unit: pull(unit.expand(like.shape)))(units).transpose(0, 1)


def _tiled(tensor: Tensor, count: int) -> Tensor:
    """``count`` copies of the rows, one after the other; rows that are one and the same stay so."""
    size, *shape = tensor.shape
    return tensor.expand(count, size, *shape).reshape(count * size, *shape)


def _flat(values: Tensor) -> Tensor:
    return values.flatten(1) if values.ndim > 1 else values[:, None]
