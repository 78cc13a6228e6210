"""Convex losses that are known as functions: what LPGD puts into the perturbed problem in place of a linear model.

A loss says what it is of the layer's outputs, for the user; posed for one call, it is a function of the variables x of
the conic programs that are solved, and can be added to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias, cast

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, elements_where, from_numpy
from lpgd.problems.base import Point, States, maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicStructure, per_element
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver, ConicSolver
from lpgd.solvers.choose import choose_solver

__all__ = [
    "BatchRows",
    "Loss",
    "PosedLoss",
    "PosedQuadratic",
    "QuadraticLoss",
    "Reading",
    "fitting",
    "identity",
    "plain_readings",
    "weighed",
]

Reading: TypeAlias = sp.csr_array | None
"""(r, n): an output of a layer, row by row, is this matrix times x; None for multipliers."""
BatchRows: TypeAlias = Callable[[Tensor, int], Tensor]
"""A tensor with leading batch dimensions, and how many dimensions one element's has, to float64 rows: none where the
batch shares it, else R of them, of which element i has row i mod R."""

PARALLEL = 1e-3
"""A loss gradient that is a multiple of the known loss's differs from it by no more than this share."""
ROUNDING = 1e-5
"""Loss gradients up to this share of what they are differences of are the rounding of outputs in float32."""


class Loss(ABC):
    """A convex loss of a layer's outputs."""

    @abstractmethod
    def __call__(self, output: Any) -> Tensor:
        """The losses (*batch,) of a layer's output, differentiable."""

    @abstractmethod
    def posed(self, readings: Sequence[Reading], as_rows: BatchRows) -> PosedLoss:
        """As a function of the variables of the programs that are solved.

        Args:
            readings: how the outputs of the layer are read off x.
            as_rows: of the batch of the call.

        Raises:
            ValueError: the loss is not one of such outputs, or of another batch.
        """


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PosedLoss(ABC):
    """A convex loss of the variables x of a batch of conic programs.

    Attributes:
        signs: (B,) 1, or -1 for elements whose loss is to be raised; None for 1 throughout.
    """

    signs: Tensor | None = None

    def __repr__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) the loss's gradient, or a subgradient, and (B,) the size of what it is a difference of."""

    @abstractmethod
    def select(self, elements: Tensor) -> Self:
        """That of these elements; it has a row for each."""

    @abstractmethod
    def solve(
        self, problem: AnyProblem, steps: Tensor, states: States, solver: AnySolver, executor: Executor | None
    ) -> AnySolution:
        """Solve the problem with the loss times the steps (B,) added: points of the problem itself.

        Elements for which that is not a convex problem have no solution; of a node it need not be convex, and it is
        solved from the states.

        Raises:
            TypeError: the loss cannot be added to such problems.
        """

    def signed(self, steps: Tensor) -> Tensor:
        """The steps for each element, towards smaller losses where its loss is to be lowered."""
        return steps if self.signs is None else steps * self.signs


def weighed(loss: PosedLoss, solution: AnySolution, cotangent: Point, name: object) -> tuple[PosedLoss, Tensor, Any]:
    """The weight with which each element's loss enters the whole, from the cotangent that arrives.

    With ``w`` the weight, the cotangent of x is ``w ∇ℓ(x*)``.

    Args:
        loss: of the batch.
        solution: where it is evaluated.
        cotangent: of the outputs, by whatever computed the loss.
        name: of the method, for messages.

    Returns:
        The loss with its signs, ``|w|`` (B,), and ``sign(w) ∇ℓ(x*)`` as a cotangent.

    Raises:
        ValueError: the cotangent of an element is not a multiple of the loss's gradient, or not of x alone.
    """
    g, x = cotangent.x, solution.point.x
    if any(bool(tensor.any()) for tensor in tuple(cotangent)[1:]):
        raise ValueError(
            f"{name}: the loss that was differentiated depends on multipliers; the given loss is one of x alone. "
            "separate=True gives multipliers an envelope of their own."
        )
    usable = solution.usable[:, None]
    # Outputs may have been rounded to float32, on the other side of a kink.
    points = (torch.where(usable, point, 0.0) for point in (x, x.float().to(x.dtype)))
    exact, rounded = (_Multiple.of(*loss.gradient(point), g) for point in points)
    slope, weight, off, size = exact.where(exact.off <= rounded.off, rounded)
    # At the loss's own minimum its gradient is rounding, and so is the envelope's.
    faint = maximum_norm(slope) <= ROUNDING * size
    weight = torch.where(faint, maximum_norm(g) / maximum_norm(slope).clamp(min=1e-300), weight)
    if wrong := elements_where((off > 0) & ~faint):
        raise ValueError(
            f"{name}: the gradient that arrives at elements {wrong[:10]} is no multiple of that of the given loss: "
            "differentiate that very loss, loss(layer(...)), with this call's targets."
        )
    signs = torch.where(weight < 0, -1.0, 1.0)
    slope = torch.where((g != 0).any(-1, keepdim=True), slope * signs[:, None], 0.0)
    tilt = cotangent._make((slope, *tuple(cotangent)[1:]))
    return replace(loss, signs=signs if bool((signs < 0).any()) else None), weight.abs(), tilt


class _Multiple(NamedTuple):
    """How far cotangents (B, n) are from multiples of slopes: by more than a share of theirs where ``off > 0``."""

    slope: Tensor
    weight: Tensor
    off: Tensor
    size: Tensor

    @classmethod
    def of(cls, slope: Tensor, size: Tensor, g: Tensor) -> _Multiple:
        weight = (g * slope).sum(-1) / slope.square().sum(-1).clamp(min=1e-300)
        return cls(slope, weight, maximum_norm(g - weight[:, None] * slope) - PARALLEL * maximum_norm(g), size)

    def where(self, chosen: Tensor, other: _Multiple) -> _Multiple:
        slope = torch.where(chosen[:, None], self.slope, other.slope)
        return _Multiple(slope, *(torch.where(chosen, *pair) for pair in zip(self[1:], other[1:], strict=True)))


@dataclass(frozen=True, eq=False, repr=False)
class QuadraticLoss(Loss):
    """``ℓ(x) = ½ |W (x - target)|² + <c, x>`` for each element of a batch.

    Args:
        target: (*batch, r), where r is the size of an element's output, row by row; batch dimensions are those of the
            outputs, or broadcast to them.
        weight: W as a matrix (*batch, k, r), or one number.
        linear: c, (*batch, r), or None.
        output: which of the layer's outputs is meant, by its position: of programs by their matrices x is the first.

    Raises:
        ValueError, TypeError: a tensor is not one of finite numbers, or has the wrong shape.

    Its own data are constants of the envelope: they get the gradient of the loss at the solution, by
    ``loss(output)``.
    """

    target: Tensor
    weight: Tensor | float = 1.0
    linear: Tensor | None = None
    output: int = 0

    def __post_init__(self) -> None:
        named = {"target": (self.target, 1), "linear": (self.linear, 1)}
        if isinstance(self.weight, Tensor):
            named["weight"] = (self.weight, 2)
        elif not abs(float(self.weight)) < float("inf"):
            raise ValueError(f"weight is {self.weight}; it must be finite.")
        r = self.target.shape[-1] if isinstance(self.target, Tensor) and self.target.ndim else None
        for name, (tensor, ndim) in named.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name} of a QuadraticLoss is {tensor!r}; give a tensor of floating-point numbers.")
            if tensor.ndim < ndim or tensor.shape[-1] != r:
                shape = "(*batch, r)" if ndim == 1 else "(*batch, k, r)"
                raise ValueError(
                    f"{name} of a QuadraticLoss has shape {tuple(tensor.shape)}; expected {shape}, r = {r}."
                )
            if not bool(torch.isfinite(tensor.detach()).all()):
                raise ValueError(f"{name} of a QuadraticLoss is not finite.")

    def __repr__(self) -> str:
        return f"QuadraticLoss(target {tuple(self.target.shape)})"

    def __call__(self, output: Any) -> Tensor:
        """The losses (*batch,) of an output; of a target, a weight or a cost that require a gradient, too."""
        whole: Tensor = output if isinstance(output, Tensor) else output[self.output]
        batch = getattr(output, "batch_shape", whole.shape[:-1])
        x = whole.reshape(*batch, -1)
        off = x - self.target.to(x)
        off = linalg.matvec(self.weight.to(x), off) if isinstance(self.weight, Tensor) else self.weight * off
        value = 0.5 * off.square().sum(-1)
        return value if self.linear is None else value + (self.linear.to(x) * x).sum(-1)

    def posed(self, readings: Sequence[Reading], as_rows: BatchRows) -> PosedQuadratic:
        reading = readings[self.output] if self.output < len(readings) else None
        if reading is None:
            raise ValueError(
                f"QuadraticLoss.output is {self.output}, but only {len(readings)} outputs, and no multipliers, count."
            )
        r = self.target.shape[-1]
        size = int(cast(Any, reading).shape[0])
        if size != r:
            raise ValueError(
                f"target of a QuadraticLoss has {r} entries; output {self.output} of the layer has {size}."
            )
        target = as_rows(self.target.detach(), 1)
        linear = torch.zeros_like(target) if self.linear is None else as_rows(self.linear.detach(), 1)
        if not isinstance(self.weight, Tensor):
            square = float(self.weight) ** 2
            return PosedQuadratic(reading, square, _plus(linear, -square * target))
        W = as_rows(self.weight.detach(), 2)
        H = W.mT @ W
        return PosedQuadratic(reading, H, _plus(linear, -_product(H, target)))


def _rows_of(datum: Tensor, elements: Tensor) -> Tensor:
    return datum[elements.to(datum.device) % datum.shape[0]]


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """The sum of rows of a batch, (r,) or (R, r) each."""
    if a.ndim == b.ndim == 2 and a.shape[0] != b.shape[0]:
        size = int(np.lcm(a.shape[0], b.shape[0]))
        a, b = per_element(a, size), per_element(b, size)
    return a + b


def _product(H: Tensor, vector: Tensor) -> Tensor:
    """``H v``, rows of a batch each."""
    if H.ndim == 2:
        return vector @ H.mT
    size = int(np.lcm(H.shape[0], 1 if vector.ndim == 1 else vector.shape[0]))
    return linalg.matvec(H.repeat(size // H.shape[0], 1, 1), per_element(vector, size))


@dataclass(frozen=True, eq=False, repr=False)
class PosedQuadratic(PosedLoss):
    """``½ uᵀH u + <h, u>`` with ``u = M x``, up to a constant.

    Attributes:
        reading: M, (r, n).
        square: H, a number for a multiple of the identity, or (r, r), or (R, r, r).
        linear: h, (r,) or (R, r).
    """

    reading: sp.csr_array
    square: Tensor | float
    linear: Tensor

    def select(self, elements: Tensor) -> PosedQuadratic:
        def chosen(datum: Tensor | float, ndim: int) -> Any:
            shared = not isinstance(datum, Tensor) or datum.ndim < ndim
            return datum if shared else _rows_of(cast(Tensor, datum), elements)

        signs = None if self.signs is None else self.signs[elements]
        return replace(self, square=chosen(self.square, 3), linear=chosen(self.linear, 2), signs=signs)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        M = _sparse(self.reading, x)
        u = (M @ x.mT).mT
        h = per_element(self.linear.to(x), len(x))
        Hu = self.square * u if not isinstance(self.square, Tensor) else _product(self.square.to(x), u)
        size = torch.maximum(maximum_norm(Hu), maximum_norm(h))
        return (M.mT @ (Hu + h).mT).mT, size

    def solve(
        self, problem: AnyProblem, steps: Tensor, states: States, solver: AnySolver, executor: Executor | None
    ) -> AnySolution:
        if isinstance(problem, NodeProblem):
            size, square = problem.batch_size, self.square  # of a node all of y is read
            H = square.expand(size, *square.shape[-2:]) if isinstance(square, Tensor) else square
            added = problem.with_quadratic(self.signed(steps), H, per_element(self.linear, size))
            return solver.solve(added, states, executor)
        problem = cast(ConicProblem, problem)
        augmented = self.added(problem, self.signed(steps))
        return replace(fitting(solver, augmented).solve(augmented, (), executor), problem=problem)

    def added(self, problem: ConicProblem, steps: Tensor) -> ConicProblem:
        """The problem with ``steps`` times the loss: ``P + s MᵀH M`` and ``q + s Mᵀh``.

        Where all steps are one number, matrices that the batch shares stay shared.
        """
        structure, size = self._structure(problem.structure), problem.batch_size
        old, pattern = problem.structure.quadratic, structure.quadratic
        place = from_numpy(pattern.positions(old.rows, old.columns)).to(problem.device)
        P = problem.data.P.new_zeros(*problem.data.P.shape[:-1], pattern.nnz)
        P[..., place] = problem.data.P
        entries, scale = self._entries.to(problem.device), steps[:, None]
        if entries.ndim == 1 and bool((steps == steps[:1]).all()):
            scale = steps[:1]
        else:
            P, entries = per_element(P, size), per_element(entries, size)
        change = scale * entries
        where = from_numpy(pattern.positions(*self._places)).to(problem.device)
        whole = change.new_zeros(*change.shape[:-1], pattern.nnz)
        whole[..., where] = change
        M = _sparse(self.reading, problem.data.q)
        h = per_element(self.linear.to(problem.data.q), size)
        q = per_element(problem.data.q, size) + steps[:, None] * (M.mT @ h.mT).mT
        return ConicProblem(structure, problem.data._replace(P=P + whole, q=q), size)

    @cached_property
    def _columns(self) -> Any:
        """The variables that are read."""
        return np.unique(cast(Any, self.reading).indices)

    @cached_property
    def _is_diagonal(self) -> bool:
        square: Any = (self.reading.T @ self.reading).tocoo()
        return not isinstance(self.square, Tensor) and bool((square.row == square.col).all())

    @cached_property
    def _places(self) -> tuple[Any, Any]:
        """Rows and columns of the entries of ``MᵀH M``."""
        used = self._columns
        return (used, used) if self._is_diagonal else (np.tile(used, used.size), np.repeat(used, used.size))

    @cached_property
    def _entries(self) -> Tensor:
        """Their values, (entries,) or (R, entries)."""
        M = from_numpy(cast(FloatArray, cast(Any, self.reading).tocsc()[:, self._columns].toarray()))
        if not isinstance(self.square, Tensor):
            return self.square * (M.square().sum(0) if self._is_diagonal else (M.mT @ M).flatten())
        M = M.to(self.square)
        values = M.mT @ self.square @ M
        return (0.5 * (values + values.mT)).flatten(-2)

    def _structure(self, structure: ConicStructure) -> ConicStructure:
        pattern, (rows, columns) = structure.quadratic, self._places
        if bool((pattern.positions(rows, columns) >= 0).all()):
            return structure
        keys = np.union1d(pattern.columns * structure.n + pattern.rows, columns * structure.n + rows)
        columns, rows = np.divmod(keys, structure.n)
        return replace(structure, quadratic=type(pattern)(pattern.shape, rows, columns))


def fitting(solver: AnySolver, problem: ConicProblem) -> ConicSolver:
    """The solver, or one that can take the problem with a loss, as accurate."""
    given = cast(ConicSolver, solver)
    if given.unsupported(problem.structure) is None:
        return given
    return choose_solver(problem.structure).with_tolerance(given.tolerance)


def _sparse(matrix: sp.csr_array, like: Tensor) -> Tensor:
    entries: Any = matrix.tocoo()
    index = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    values = torch.from_numpy(entries.data.astype(np.float64))
    return torch.sparse_coo_tensor(index, values, entries.shape, check_invariants=False).to(like)


def identity(count: int, width: int) -> sp.csr_array:
    """The first of the variables."""
    return sp.csr_array(sp.eye_array(count, width))


def plain_readings(point: Point) -> list[Reading]:
    """The readings of a problem without a layer: x, and multipliers."""
    n = point.x.shape[-1]
    return [identity(n, n), *(None,) * (len(point) - 1)]
