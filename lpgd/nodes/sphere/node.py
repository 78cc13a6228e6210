"""Least squares on the unit sphere: the global solution by the secular equation, descent methods, the derivative.

[PMaF] Xu, Wang, Liu, Gould: PMaF, Deep Declarative Layers for Principal Matrix Features (2023), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import elements_where, flags, rows_where
from lpgd.execution.threads import torch_threads
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, is_shared
from lpgd.nodes.sphere.descent import descend, least_squares, starting_points
from lpgd.nodes.sphere.less import LessDescent, descend_as_published
from lpgd.nodes.sphere.secular import SphereSolution, normalised, product, solve_secular
from lpgd.status import Status, warn

__all__ = ["SphereLeastSquares", "differentiate_sphere", "multiplier", "normal_equations"]


def normal_equations(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``AᵀA`` (B, n, n), one row where A is shared, and ``Aᵀb`` (B, n)."""
    transposed = (A[:1] if is_shared(A) else A).mT
    return transposed @ transposed.mT, product(transposed, b)


def multiplier(gram: Tensor, vector: Tensor, u: Tensor) -> Tensor:
    """(B,) the μ for which ``(AᵀA - μI)u = Aᵀb`` holds best: the component of the gradient along u."""
    return (u * (product(gram, u) - vector)).sum(-1)


def differentiate_sphere(
    A: Tensor,
    b: Tensor,
    y: Tensor,
    cotangent: Tensor,
    gram: Tensor,
    mu: Tensor,
    free: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The vector-Jacobian product of a solution: one bordered system for each element, no Jacobian.

        [[AᵀA - μI, y], [yᵀ, 0]] [s; ·] = [v; 0],   db = As,   dA = (b - Ay)sᵀ - (As)yᵀ

    Args:
        A: (B, m, n).
        b: (B, m).
        y: (B, n), a local minimum.
        cotangent: v, (B, n).
        gram: AᵀA, (B, n, n) or (1, n, n).
        mu: μ, (B,).
        free: (B,) elements whose solution is one of a continuum, where the system is singular: they get the
            minimum-norm answer.  Others get it if the elimination breaks down.

    Returns:
        Gradients for A (B, m, n) and b (B, m).
    """
    return _outer_products(A, b, y, _solve_each(gram, mu, y, cotangent, free))


def _outer_products(A: Tensor, b: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for A and b from the response s (B, n)."""
    pair = torch.stack([s, y], -1)  # two passes over matrices of the size of A are all that is left
    moved, fitted = (A @ pair).unbind(-1)
    return torch.stack([b - fitted, -moved], -1) @ pair.mT, moved


def _solve_each(gram: Tensor, mu: Tensor, y: Tensor, v: Tensor, free: Tensor | None) -> Tensor:
    """By :func:`_solve_bordered`, and by :func:`_solve_any_bordered` for elements that need it."""
    s, regular = _solve_bordered(gram, mu, y, v)
    # A response of a reciprocal rounding error is that of a singular system.
    limit = 1.0 / (y.shape[-1] * torch.finfo(y.dtype).eps * _size(gram, mu))
    singular = ~regular | ~(s.norm(dim=-1) <= limit * v.norm(dim=-1))
    hard = singular if free is None else singular | free
    if hard.any():
        grams = gram.expand(len(y), -1, -1)[hard]
        s[hard], many = _solve_any_bordered(grams, mu[hard], y[hard], v[hard], None if free is None else free[hard])
        if bool((many & (v[hard] != 0).any(-1)).any()):
            warn(
                f"The solutions on the sphere of {int(many.sum())} of {len(y)} elements are each one of a continuum, "
                "to rounding, as where A has fewer rows than columns and solutions of A y = b are short: the gradient "
                "is that of one of them and leaves its free directions out."
            )
    return s


def _size(gram: Tensor, mu: Tensor) -> Tensor:
    """(B,) how large the entries of AᵀA - μI are."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1) + mu.abs()


def _solve_differentiably(gram: Tensor, mu: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The same by operations that autograd differentiates, for second derivatives.

    Raises:
        RuntimeError: elements whose solution is one of a continuum, to rounding.
    """
    n = y.shape[-1]
    hessian = gram - mu[:, None, None] * torch.eye(n, dtype=y.dtype, device=y.device)
    system = torch.cat([torch.cat([hessian, y[:, :, None]], -1), torch.nn.functional.pad(y, (0, 1))[:, None]], 1)
    answer, information = linalg.solve_ex(system, torch.nn.functional.pad(v, (0, 1))[..., None])
    s = answer[:, :n, 0]
    rounding = 10 * torch.finfo(y.dtype).eps * linalg.matrix_norm(hessian)
    singular = (information != 0) | ~(s.norm(dim=-1) * rounding <= v.norm(dim=-1))
    if singular.any():
        raise RuntimeError(
            f"the solutions on the sphere of elements {elements_where(singular)[:10]} are not unique, to "
            "rounding: they have no second derivative."
        )
    return s


@torch.no_grad()
def _solve_bordered(gram: Tensor, mu: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``[[H, y], [yᵀ, 0]] [s; t] = [v; 0]``, H = G - μI, for s by Cholesky's factorisation where it exists.

    As yᵀs = 0, σyyᵀ can be added to H, and then it is positive definite at strict global minima.  The factor takes the
    place of the matrix: memory that is new costs more than the arithmetic here.
    """
    sigma = _size(gram, mu)
    shifted = torch.baddbmm(gram, (sigma[:, None] * y)[..., None], y[:, None])
    shifted.diagonal(dim1=-2, dim2=-1).sub_(mu[:, None])
    factor = shifted.mT  # symmetric, and in the order that LAPACK works in
    information = torch.empty(len(y), dtype=torch.int32, device=y.device)
    linalg.cholesky_ex(factor, out=(factor, information))
    both = linalg.solve_triangular(factor, torch.stack([v, y], -1), upper=False)
    first, second = linalg.solve_triangular(factor.mT, both, upper=True).unbind(-1)
    ratio = (y * first).sum(-1, keepdim=True) / (y * second).sum(-1, keepdim=True)
    return first - ratio * second, information == 0


def _solve_any_bordered(gram: Tensor, mu: Tensor, y: Tensor, v: Tensor, free: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by elimination, and for ``free`` elements, and where it breaks down, with minimum norm.

    Returns:
        s (B, n), and (B,) which of them have minimum norm.
    """
    batch, n = y.shape
    system, size = gram.new_zeros(batch, n + 1, n + 1), _size(gram, mu)
    system[:, :n, :n] = gram
    system.diagonal(dim1=1, dim2=2)[:, :n].sub_(mu[:, None])
    # In the unit of the matrix, which changes t alone: what counts as singular must not depend on the unit of A.
    system[:, :n, n] = system[:, n, :n] = torch.where(size > 0, size, 1.0)[:, None] * y
    right = torch.nn.functional.pad(v, (0, 1))[..., None]
    rounding = n * torch.finfo(y.dtype).eps
    with torch_threads(1):  # see there what LU needs
        answer, information = linalg.solve_ex(system, right)
    lost = answer[:, :n, 0].norm(dim=-1) * rounding * size > v.norm(dim=-1)
    singular = (information != 0) | lost if free is None else (information != 0) | lost | free
    if singular.any():
        answer[singular] = linalg.pinv(system[singular], hermitian=True, rtol=10 * rounding) @ right[singular]
    return answer[:, :n, 0], singular


@dataclass(frozen=True)
class SphereLeastSquares(BaseNode):
    """Least squares on the unit sphere ([PMaF], 2.1), called LESS there.

        minimise ½|Ay - b|²   subject to  |y| = 1

    with inputs A (m, n) and b (m,) for each element, and y (n,).  It is not convex.  ``solver="secular"`` finds the
    global minimum by one eigendecomposition of AᵀA (:func:`solve_secular`); ``solver="descent"`` a local one, from the
    normalised least-squares solution or from the start (:func:`descend`, which describes the other options), and a
    :class:`LessDescent` one by a method of the paper.  Where minima are tied (the hard case), the one on the start's
    side is chosen.

    The gradient is one bordered solve for each element; LPGD's tilted and augmented problems have the same form with
    ``Aᵀb - τg + ρy*`` in the place of Aᵀb, and are solved by the secular equation, or after descent, from y*, by
    Newton's method.

    Args:
        solver: ``"secular"``, ``"descent"``, or a :class:`LessDescent`, which has options of its own.
        step, relaxation, backtracking: of ``"descent"``.
        max_iterations: limit of ``"descent"``.
        tolerance: of ``"descent"``.
    """

    solver: Literal["secular", "descent"] | LessDescent = "secular"
    step: float | None = None
    relaxation: float = 0.9
    backtracking: bool = True
    max_iterations: int = 100
    tolerance: float = 1e-7

    name = "SphereLeastSquares"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LessDescent) and self.solver not in ("secular", "descent"):
            raise ValueError(f"solver is {self.solver!r}; it must be one of secular, descent, or a LessDescent.")
        for option in ("relaxation", "tolerance", "max_iterations") + ("step",) * (self.step is not None):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be positive.")
        # Published descents end where f changes little, which need not be near a solution.
        object.__setattr__(self, "is_exact", not isinstance(self.solver, LessDescent) or self.solver.refine)

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"A": 2, "b": 1}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        (m, n), (length,) = shapes
        if length != m:
            raise ValueError(f"b has {length} entries; A has {m} rows.")
        return (n,)

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        A, b = inputs
        return 0.5 * (linalg.matvec(A, y) - b).square().sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (y.square().sum(-1, keepdim=True) - 1.0)

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return starting_points(*inputs)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        gram, vector = normal_equations(*inputs)
        if self.solver == "secular":
            return _answer(gram, vector, solve_secular(gram, vector, start))
        if isinstance(self.solver, LessDescent):
            free = least_squares(*inputs)
            start = normalised(free if start is None else start)
            found = descend_as_published(gram, vector, start, free, self.solver)
            return _answer(gram, vector, _refined(gram, vector, found) if self.solver.refine else found)
        start = starting_points(*inputs) if start is None else normalised(start)
        options = {
            name: getattr(self, name) for name in ("step", "relaxation", "backtracking", "max_iterations", "tolerance")
        }
        found = descend(gram, vector, start, **options)
        away = leave_saddles(gram, vector, found)
        if away is not None:
            elements, start = away
            grams = gram[elements] if gram.shape[0] > 1 else gram
            again = descend(grams, vector[elements], start, **options)
            for whole, values in zip(found[:3], again[:3], strict=True):
                whole[elements] = values
        return _answer(gram, vector, found)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer | None:
        if self.solver != "secular":
            return None
        gram, vector = normal_equations(*inputs)
        vector = vector - tilt.linear + tilt.rho * tilt.center
        found = solve_secular(gram, vector, start)
        return _answer(gram, vector, found if start is None else stay_on_branch(gram, vector, found, start))

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        A, b = inputs
        if aux is not None:
            return differentiate_sphere(A, b, y, cotangent, *aux)
        gram, vector = normal_equations(A, b)
        return differentiate_sphere(A, b, y, cotangent, gram, multiplier(gram, vector, y))

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        A, b = inputs
        gram, vector = normal_equations(A, b)
        return _outer_products(A, b, y, _solve_differentiably(gram, multiplier(gram, vector, y), y, cotangent))


def leave_saddles(gram: Tensor, vector: Tensor, found: SphereSolution) -> tuple[Tensor, Tensor] | None:
    """Elements whose descent ended on a saddle, and points (·, n) at its side that lie lower; None: there are none.

    Descent converges to a saddle where it starts on its ridge, as in the hard case, where c has no part in the
    eigenspace of the smallest eigenvalue.  At a minimum ``G - μI + σuuᵀ`` is positive semidefinite.
    """
    u, n = found.u, found.u.shape[-1]
    mu = multiplier(gram, vector, u)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1) + mu.abs()
    identity = torch.eye(n, dtype=u.dtype, device=u.device)
    rounding = 100 * torch.finfo(u.dtype).eps * n * scale
    shifted = (
        torch.baddbmm(gram, (scale[:, None] * u)[..., None], u[:, None]) + (rounding - mu)[:, None, None] * identity
    )
    elements = rows_where((linalg.cholesky_ex(shifted).info != 0) & found.converged)
    if not len(elements):
        return None
    lowest = linalg.eigh(shifted[elements]).eigenvectors[:, :, 0]
    return elements, normalised(u[elements] + 0.1 * lowest)


def stay_on_branch(gram: Tensor, vector: Tensor, found: SphereSolution, start: Tensor) -> SphereSolution:
    """The local minimum that descent from a start leads to, where the way from there to the global one goes uphill.

    There is at most one local minimum beside the global one (Martínez 1994).  In and near the hard case the two have
    nearly the same value, and a small tilt makes the other one the global minimum: a solution that jumps there would
    say nothing of the derivative.

    Args:
        gram: G, (B, n, n).
        vector: c, (B, n).
        found: the global minima.
        start: (B, n).
    """
    start = normalised(start)
    apart = rows_where(_is_uphill(gram, vector, start, found.u))
    if not len(apart):
        return found
    G = gram[apart] if gram.shape[0] > 1 else gram.expand(len(apart), -1, -1)
    c, start = vector[apart], start[apart]
    u, fine = _newton(G, c, start)
    # Newton's method alone is enough from near, and might go anywhere else: up, or far.
    lost = rows_where(~fine | _is_uphill(G, c, start, u))
    if len(lost):
        local = descend(G[lost], c[lost], start[lost], max_iterations=1000)
        u[lost], fine[lost] = _newton(G[lost], c[lost], local.u)
    return found._replace(
        u=found.u.index_copy(0, apart, torch.where(fine[:, None], u, found.u[apart])),
        free=None if found.free is None else found.free.index_copy(0, apart, found.free[apart] & ~fine),
    )


def _newton(gram: Tensor, vector: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method on ``(G - μI)u = c, |u| = 1``: points, and (B,) whether it converged."""
    for _ in range(6):
        mu = multiplier(gram, vector, u)
        left = vector - product(gram, u) + mu[:, None] * u
        u = normalised(u + _solve_any_bordered(gram, mu, u, left, None)[0])
    left = vector - product(gram, u) + multiplier(gram, vector, u)[:, None] * u
    size = product(gram, u).norm(dim=-1) + vector.norm(dim=-1)
    return u, left.norm(dim=-1) <= torch.finfo(u.dtype).eps ** 0.7 * size


def _refined(gram: Tensor, vector: Tensor, found: SphereSolution) -> SphereSolution:
    """Stationary points next to the ends of a descent; an end that has none stays, and is not converged."""
    u, fine = _newton(gram.expand(len(vector), -1, -1), vector, found.u)
    fine = fine & ~_is_uphill(gram, vector, found.u, u)
    return found._replace(u=torch.where(fine[:, None], u, found.u), converged=found.converged & fine)


def _is_uphill(gram: Tensor, vector: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """(B,) whether ½uᵀGu - cᵀu rises on the shorter arc between two points, or they are opposite to each other."""
    cosine = (start * end).sum(-1, keepdim=True)
    t = torch.linspace(0.0, 1.0, 33, dtype=start.dtype, device=start.device)[:-1]
    length = ((1 - t).square() + t.square() + 2 * t * (1 - t) * cosine).clamp_min(1e-12).sqrt()  # (B, T)
    a, b = (1 - t) / length, t / length
    from_start, from_end = product(gram, start), product(gram, end)

    def along(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum(-1, keepdim=True)

    curved = a * a * along(start, from_start) + 2 * a * b * along(start, from_end) + b * b * along(end, from_end)
    values = 0.5 * curved - a * along(vector, start) - b * along(vector, end)
    noise = 100 * torch.finfo(start.dtype).eps * (curved.abs().amax(-1) + vector.norm(dim=-1))
    return (values.amax(-1) > values[:, 0] + noise) | (cosine[:, 0] < -0.999)


def _answer(gram: Tensor, vector: Tensor, found: SphereSolution) -> NodeAnswer:
    mu = multiplier(gram, vector, found.u)
    statuses = [Status.SOLVED if fine else Status.ITERATION_LIMIT for fine in flags(found.converged)]
    if not mu.isfinite().all():  # AᵀA overflowed
        fine = flags(mu.isfinite())
        statuses = [status if good else Status.NUMERICAL_ERROR for status, good in zip(statuses, fine, strict=True)]
    aux = (gram, mu) if found.free is None else (gram, mu, found.free)
    return NodeAnswer(found.u, statuses, found.iterations, aux, nu=-mu[:, None])
