"""How far a node's answer is from a solution: by closed forms in NumPy, and by optimality conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd
from lpgd.nodes.base import BaseNode

__all__ = ["distance"]

FloatArray = NDArray[np.float64]


def distance(node: BaseNode, inputs: tuple[Tensor, ...], y: Tensor) -> FloatArray:
    """(B,) an upper bound of the error of y, relative to its size, by what is known of the node's solutions.

    Args:
        node: the node.
        inputs: (B, ...), arranged.
        y: (B, ...) without a gradient.
    """
    for kind, reference in REFERENCES.items():
        if isinstance(node, kind):
            expected = reference(node, *(tensor.numpy() for tensor in inputs))
            size = np.maximum(np.abs(expected).reshape(len(y), -1).max(1, initial=0.0), 1e-300)
            return np.abs(y.numpy() - expected).reshape(len(y), -1).max(1, initial=0.0) / size
    if isinstance(node, lpgd.nodes.LeastSquares):
        expected = least_squares(node, dict(zip(node.inputs, (tensor.numpy() for tensor in inputs), strict=True)))
        size = np.maximum(np.abs(expected).max(1), 1e-300)
        return np.abs(y.numpy().reshape(len(y), -1) - expected).max(1) / size
    if isinstance(node, lpgd.nodes.RobustPooling) and node.penalty == "truncated_quadratic" and inputs[0].ndim == 2:
        alpha = inputs[1].numpy() if node.alpha == "input" else np.full(len(y), float(node.alpha))
        return truncated_gap(inputs[0].numpy(), y.numpy(), alpha)
    if isinstance(node, lpgd.nodes.Rotation):
        return rotation_gap(y.numpy(), *(tensor.numpy() for tensor in inputs))
    return stationarity(node, inputs, y)


# -- closed forms ------------------------------------------------------------------------------------------------------


def to_simplex(x: FloatArray, radius: FloatArray) -> FloatArray:
    """The nearest points of the simplex, (B, n) and (B, 1), by sorting."""
    falling = -np.sort(-x, axis=1)
    places = np.arange(1, x.shape[1] + 1)
    level = (np.cumsum(falling, axis=1) - radius) / places
    count = (falling > level).sum(1)
    return np.maximum(x - level[np.arange(len(x)), count - 1][:, None], 0.0)


def projection(node: Any, x: FloatArray, radius: FloatArray | None = None) -> FloatArray:
    r = np.full((len(x), 1), node.radius) if radius is None else np.broadcast_to(radius, (len(x),))[:, None]
    onto, size = node.onto, np.abs(x)
    sign = np.where(x < 0, -1.0, 1.0)
    if onto == "simplex":
        return to_simplex(x, r)
    if onto.startswith("l2"):
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        scaled = r * x / np.maximum(norm, 1e-300)
        return np.where(norm <= r, x, scaled) if onto.endswith("ball") else scaled
    if onto.startswith("l1"):
        inside = size.sum(1, keepdims=True) <= r
        if onto.endswith("ball"):
            return np.where(inside, x, sign * to_simplex(size, r))
        return sign * to_simplex(size, r)
    clipped = np.clip(x, -r, r)
    if onto.endswith("ball"):
        return clipped
    inside = size.max(1) < r[:, 0]
    moved = clipped.copy()
    first = size.argmax(1)
    rows = np.flatnonzero(inside)
    moved[rows, first[rows]] = (sign * r)[rows, first[rows]]
    return moved


def spectral(node: Any, matrix: FloatArray) -> FloatArray:
    known: dict[str, Callable[[FloatArray], FloatArray]] = {
        "log": np.log,
        "sqrt": np.sqrt,
        "rsqrt": lambda values: 1.0 / np.sqrt(values),
        "exp": np.exp,
    }
    function = known.get(node.function, np.tanh) if isinstance(node.function, str) else np.tanh
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, 1, 2)) / 2)
    return (vectors * function(values)[:, None, :]) @ np.swapaxes(vectors, 1, 2)


def rotation_gap(y: FloatArray, first: FloatArray, second: FloatArray | None = None, weights: Any = None) -> FloatArray:
    """Of ``<R, M>`` from its largest value, the sum of singular values (the last one negative where det M is)."""
    matrix = first
    if second is not None:
        scale = np.ones(first.shape[:2]) if weights is None else weights
        matrix = np.einsum("bk,bki,bkj->bij", scale, second, first)
    values = np.linalg.svd(matrix)[1]
    best = values.sum(1) - np.where(np.linalg.det(matrix) < 0, 2 * values[:, -1], 0.0)
    outside = np.abs(np.swapaxes(y, 1, 2) @ y - np.eye(y.shape[1])).max((1, 2)) + np.abs(np.linalg.det(y) - 1.0)
    return (best - (y * matrix).sum((1, 2))) / np.maximum(values[:, 0], 1e-300) + outside


def least_squares(node: Any, data: dict[str, FloatArray]) -> FloatArray:
    """By a singular value decomposition of the stacked matrix.

    Optimality conditions are no judge here: they form squares, of which a matrix of 1e6 with a ridge of one has lost
    the ridge.
    """
    A, b = data["A"], data["b"]
    design = np.concatenate([A, np.ones((*A.shape[:2], 1))], 2) if node.bias else A
    root = np.sqrt(data["weights"]) if node.weighted else np.ones(A.shape[:2])
    unknowns, found = design.shape[2], []
    for element in range(len(A)):
        left, right = (
            root[element][:, None] * design[element],
            root[element][:, None] * b[element].reshape(len(b[0]), -1),
        )
        if node.ridge:
            penalty = np.eye(unknowns)[: A.shape[2]] * np.sqrt(data["ridge"][element])
            left, right = np.concatenate([left, penalty]), np.pad(right, ((0, len(penalty)), (0, 0)))
        found.append(np.linalg.lstsq(left, right, rcond=1e-13)[0])
    return np.array(found).reshape(len(A), unknowns, *b.shape[2:]).reshape(len(A), -1)


def truncated_gap(x: FloatArray, y: FloatArray, alpha: FloatArray) -> FloatArray:
    """(B,) how far a pooled number is from the nearest of the best means of windows of sorted numbers.

    All windows are tried.  A step from y says nothing of the objective's slope there: points leave the window.
    """
    x = np.sort(x, axis=1)
    count, nearest = x.shape[1], np.full(len(x), np.inf)
    pairs = [(low, high) for low in range(count) for high in range(low + 1, count + 1)]
    means = np.stack([x[:, low:high].mean(1) for low, high in pairs], 1)
    away = np.abs(x[:, :, None] - means[:, None, :])
    costs = np.minimum(away, alpha[:, None, None]) ** 2
    costs = costs.sum(1)
    best = costs.min(1, keepdims=True)
    good = costs <= best + 1e-9 * alpha[:, None] ** 2
    nearest = np.where(good, np.abs(means - y.reshape(-1, 1)), np.inf).min(1)
    return nearest / np.maximum(np.abs(x).max(1), 1e-300)


REFERENCES: dict[type[BaseNode], Callable[..., FloatArray]] = {
    lpgd.nodes.Projection: projection,
    lpgd.nodes.SpectralFunction: spectral,
}


# -- optimality conditions ---------------------------------------------------------------------------------------------


def stationarity(node: BaseNode, inputs: tuple[Tensor, ...], y: Tensor) -> FloatArray:
    """(B,) the smallest ``|∇f + Jᵀν + Jᵀλ|`` over λ ≥ 0 of active inequalities, in units of a change of y."""
    count = len(y)
    point = y.detach().clone().requires_grad_()
    slope, rows = derivative(node.objective(point, *inputs), point), []
    length = y.abs().reshape(count, -1).amax(1)
    # Pooled numbers have the rounding errors of all, also where their mean is zero.
    least = 1e-6 * inputs[0].abs().reshape(count, -1).amax(1) * isinstance(node, lpgd.nodes.RobustPooling)
    further = torch.where(length < least, least, 0.0).reshape(-1, *(1,) * (y.ndim - 1))
    length = torch.maximum(length, least).numpy()
    nearby, moved = (y + 1e-3 * (y + further)).requires_grad_(), 1e-3 * length
    change = np.abs(derivative(node.objective(nearby, *inputs), nearby) - slope).max(1, initial=0.0)
    outside, basis = np.zeros(count), np.zeros((0, 0))
    for function, is_equality in ((node.equality, True), (node.inequality, False)):
        values = function(point, *inputs)
        if values is None or not values.numel():
            continue
        values = values.reshape(count, -1)
        jacobian = np.stack([derivative(values[:, row], point) for row in range(values.shape[1])], axis=1)
        size = np.maximum(np.abs(jacobian).max(2, initial=0.0), 1e-12)
        found = values.detach().numpy() / size
        outside = np.maximum(outside, (np.abs(found) if is_equality else found).max(1))
        rows.append((jacobian, np.full(found.shape, True) if is_equality else found > -1e-6, is_equality))
    left = np.zeros(count)
    for element in range(count):
        # What equalities hold is taken out of slope and inequalities; nnls does not like opposite columns.
        right, columns = -slope[element], [np.zeros((slope.shape[1], 0))]
        for jacobian, active, is_equality in rows:
            chosen = jacobian[element, active[element]].T
            chosen = chosen / np.maximum(np.linalg.norm(chosen, axis=0), 1e-300)
            if is_equality:
                basis, sizes, _ = np.linalg.svd(chosen, full_matrices=False)
                basis = basis[:, sizes > 1e-10]
                right = right - basis @ (basis.T @ right)
            else:
                columns.append(chosen - basis @ (basis.T @ chosen) if basis.size else chosen)
        matrix = np.concatenate(columns, axis=1)
        left[element] = scipy.optimize.nnls(matrix, right)[1] if matrix.size else np.linalg.norm(right)
    length = np.maximum(length, 1e-300)
    rate = np.where(moved > 0, change / np.maximum(moved, 1e-300), 1.0)
    return np.maximum(left / np.maximum(rate * length, 1e-300), outside / np.maximum(length, 1e-300))


def derivative(values: Tensor, point: Tensor) -> FloatArray:
    """(B, n) of values (B,) that belong to an element each."""
    (found,) = torch.autograd.grad(values.sum(), point, retain_graph=True, allow_unused=True)
    return np.zeros((len(point), point[0].numel())) if found is None else found.reshape(len(point), -1).numpy()
