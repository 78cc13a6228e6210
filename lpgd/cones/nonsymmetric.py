"""Projections onto the exponential and the power cone, and the spectra of their derivatives.

Both cones live in R^3 and their boundary is, but for a few faces, a smooth surface ruled by rays.  For v
outside K and outside the polar cone, write ``v = p + n`` with p the projection and n normal to K at p
(Moreau: ``<p, n> = 0``).  Because the projection is positively homogeneous, and constant along n, its
symmetric derivative D satisfies ``D p = p`` and ``D n = 0``: the unit vectors along p, n and ``e = p x n``
are its eigenvectors with eigenvalues 1, 0 and some ``l``.  Differentiating ``p + mu grad h(p) = v``,
``h(p) = 0`` along e gives ``l = 1 / (1 + mu <e, hess h(p) e>)``, which both cones have in closed form.  So
only p is found by iteration, as the root of one increasing scalar function.

Root functions: for the exponential cone the parametrisation of H. A. Friberg, *Projection onto the
exponential cone: a univariate root-finding problem* (2021); for the power cone that of L. T. K. Hien,
*Differential properties of Euclidean projection onto power cone* (2015).  Both are solved in logarithms
here, which keeps Newton's method short and free of overflow when entries differ by many orders.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lpgd.arrays import BoolArray, FloatArray

__all__ = [
    "exponential_regions",
    "exponential_spectrum",
    "normalised",
    "power_regions",
    "power_spectrum",
    "project_exponential",
    "project_power",
]

Masks = tuple[BoolArray, BoolArray, BoolArray]

NEGLIGIBLE = 1e-100
"""An entry below this share of its point's largest one is taken as 0: far below rounding."""
LOGIT_RANGE = 700.0
"""Beyond it ``exp`` leaves the normal numbers; the root is then at an end for every purpose."""
NOISE = 1e-13
"""What rounding leaves of an equation between logarithms of double precision numbers."""
ROUGH = 1e-6
"""Such values are near enough for Newton's next step to be exact."""
MAXIMUM_ITERATIONS = 300
MODERATE, CLOSE, FEW, MANY, FINE = 20.0, 0.5, 6, 10, 1e-8
"""Ratios up to the first, from which Newton's first step is shorter than the second, are sought by few steps on the
equation itself, others by more; a step that is shorter than the last is the last but for rounding."""


def project_exponential(points: FloatArray) -> FloatArray:
    """Projection of (n, 3) points onto the closure of ``{(u, v, w): v exp(u / v) <= w, v > 0}``."""
    unit, _ = normalised(points)
    inside, polar, face = exponential_regions(unit)
    projected = np.where(inside[:, None], points, 0.0)
    projected[face, 0] = points[face, 0]
    projected[face, 2] = np.maximum(points[face, 2], 0.0)
    outside = ~(inside | polar | face)
    if outside.any():
        ratio, height, _, top = _exponential_ray(unit[outside])
        ray = np.stack([height * ratio, height, top], axis=-1)
        projected[outside] = ray * np.max(np.abs(points[outside]), axis=-1, keepdims=True)
    return projected


def exponential_spectrum(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues (n, 3) and orthonormal eigenvectors (n, 3, 3), as columns, of the derivative at (n, 3) points.

    On the face ``{(u, 0, w): u <= 0 <= w}``, reached from ``u, v <= 0``, the derivative is
    ``diag([u < 0], 0, [w > 0])``; it is 0 on the polar cone and the identity in the interior only.
    """
    unit, _ = normalised(points)
    inside, polar, face = exponential_regions(unit)
    u, v, w = unit.T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        interior = inside & (v > 0) & (v * np.exp(u / v) < w)
    eigenvalues = np.where(interior[:, None], 1.0, np.zeros((1, 3)))
    basis = np.tile(np.eye(3), (len(points), 1, 1))
    flat = ~interior & ~polar & (u <= 0) & (v <= 0)
    eigenvalues[flat] = np.stack([u < 0, np.zeros_like(face), w > 0], axis=-1)[flat]
    curved = ~(interior | polar | flat)
    if curved.any():
        ratio, height, normal, _ = _exponential_ray(unit[curved])
        # The ray (ratio, 1, exp(ratio)) and its normal (1, 1 - ratio, -exp(-ratio)), without the factor that overflows.
        shrink = np.exp(-np.abs(ratio))
        positive = ratio > 0
        along, across = np.where(positive, shrink, 1.0), np.where(positive, 1.0, shrink)
        ray = np.stack([along * ratio, along, across], axis=-1)
        outward = np.stack([across, across * (1.0 - ratio), -along], axis=-1)
        # l = height N^2 / (height N^2 + normal P^2 exp(-2 ratio)): P, N the lengths of ray and normal. Both are
        # shortened above by `along` and `across`, whose ratio is exp(-ratio): the exponential drops out.
        primal = height * np.sum(outward**2, axis=-1)
        polar_part = normal * np.sum(ray**2, axis=-1)
        eigenvalues[curved, 0] = 1.0
        eigenvalues[curved, 2] = primal / (primal + polar_part)
        basis[curved] = _frame(ray, outward)
    return eigenvalues, basis


def project_power(points: FloatArray, exponents: FloatArray) -> FloatArray:
    """Projection of (n, 3) points onto ``{(u, v, w): u^a v^(1 - a) >= |w|, u, v >= 0}``, a of shape (n,)."""
    unit, _ = normalised(points)
    inside, polar, face = power_regions(unit, exponents)
    projected = np.where(inside[:, None], points, 0.0)
    projected[face, :2] = np.maximum(points[face, :2], 0.0)
    outside = ~(inside | polar | face)
    if outside.any():
        nearest, _ = _power_ray(unit[outside], exponents[outside])
        projected[outside] = nearest * np.max(np.abs(points[outside]), axis=-1, keepdims=True)
    return projected


def power_spectrum(points: FloatArray, exponents: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues (n, 3) and orthonormal eigenvectors (n, 3, 3), as columns, of the derivative at (n, 3) points.

    With ``w = 0`` and ``u > 0 >= v`` the projection is ``(u, 0, 0)``, and near it ``w`` keeps the share 0 if
    ``a < 1/2``, 1 if ``a > 1/2``, ``u / (u + 2 |v|)`` if ``a = 1/2``; likewise with u and v, a and 1 - a exchanged.
    """
    unit, _ = normalised(points)
    inside, polar, _ = power_regions(unit, exponents)
    u, v, w = unit.T
    geometric_mean = np.maximum(u, 0.0) ** exponents * np.maximum(v, 0.0) ** (1.0 - exponents)
    interior = inside & (geometric_mean > np.abs(w))
    eigenvalues = np.where(interior[:, None], 1.0, np.zeros((1, 3)))
    basis = np.tile(np.eye(3), (len(points), 1, 1))
    flat = ~interior & ~polar & (w == 0)
    share = _power_face_share(u, v, exponents)
    eigenvalues[flat] = np.stack([u > 0, v > 0, share], axis=-1)[flat]
    curved = ~(interior | polar | flat)
    if curved.any():
        nearest, residual = _power_ray(unit[curved], exponents[curved])
        # Within underflow of the polar cone, or of K, the point counts as one of it.
        eigenvalues[curved] = np.where(np.any(residual, axis=-1, keepdims=True), 0.0, 1.0)
        proper = np.any(nearest, axis=-1) & np.any(residual, axis=-1)
        curved[curved] = proper
        nearest, residual = nearest[proper], residual[proper]
        ray, ray_length = normalised(nearest)
        outward, outward_length = normalised(residual)
        basis[curved] = _frame(ray, outward)
        ray, outward = basis[curved][:, :, 0], basis[curved][:, :, 1]
        # l = P |p1 p2 p3| / (P |p1 p2 p3| + N |n1 n2 n3|) with unit vectors p, n along the projection and the
        # residual. P and N need their Euclidean lengths: the largest entry over its share of the unit vector.
        primal = ray_length * np.prod(np.abs(ray), axis=-1) / np.max(np.abs(ray), axis=-1)
        polar_part = outward_length * np.prod(np.abs(outward), axis=-1) / np.max(np.abs(outward), axis=-1)
        total = primal + polar_part
        vanishing = total == 0.0  # only where w is negligible
        eigenvalues[curved, 0] = 1.0
        eigenvalues[curved, 2] = np.where(vanishing, share[curved], primal / np.where(vanishing, 1.0, total))
    return eigenvalues, basis


def normalised(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Points over their largest absolute entry, negligible entries as 0, and that entry (1 for the origin)."""
    largest = np.max(np.abs(points), axis=-1, initial=0.0)
    largest = np.where(largest > 0, largest, 1.0)
    unit = points / largest[:, None]
    return np.where(np.abs(unit) < NEGLIGIBLE, 0.0, unit), largest


def _frame(ray: FloatArray, outward: FloatArray) -> FloatArray:
    """Orthonormal columns along orthogonal vectors ``ray`` and ``outward`` and their cross product."""
    first = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    second = outward / np.linalg.norm(outward, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def exponential_regions(unit: FloatArray) -> Masks:
    """Masks: in K; in the polar cone; neither, but nearest to the face ``{(u, 0, w): u <= 0 <= w}``."""
    u, v, w = unit.T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inside = np.where(v > 0, v * np.exp(u / v) <= w, (v == 0) & (u <= 0) & (w >= 0))
        polar = np.where(u > 0, u * np.exp(v / u) <= -np.e * w, (u == 0) & (v <= 0) & (w <= 0))
    face = ~inside & ~polar & (u <= 0) & (v <= 0)
    return inside, polar, face


def _exponential_ray(unit: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """``(ratio, height, normal, top)`` of the decomposition outside K, its polar cone and the flat face.

    ``unit = height (ratio, 1, exp(ratio)) + normal (1, 1 - ratio, -exp(-ratio))``, both factors nonnegative,
    and ``top = height exp(ratio)``.  The first two equations give height and normal for every ratio, and
    the third is increasing in it wherever both are positive.
    """
    u, v, w = unit.T
    above, below = np.maximum(w, 0.0), np.maximum(-w, 0.0)
    u_positive, v_positive = u > 0, v > 0
    safe_u, safe_v = np.where(u == 0, 1.0, u), np.where(v == 0, 1.0, v)
    with np.errstate(divide="ignore", invalid="ignore"):
        # height > 0 and normal > 0 bound the ratio; a span sure to hold the root replaces an infinite or wide bound.
        height_bound = np.where(u_positive, 1.0 - v / safe_u, -np.inf)
        normal_bound = np.where(v_positive, u / safe_v, np.inf)
        span_up = 2.0 + 2.0 * (np.log(u + above) - np.log(u))
        span_down = 2.0 + 2.0 * (np.log(v + below) - np.log(v))
    lower = np.where(v_positive, np.maximum(height_bound, np.minimum(normal_bound, 0.0) - span_down), height_bound)
    upper = np.where(u_positive, np.minimum(normal_bound, np.maximum(height_bound, 1.0) + span_up), normal_bound)
    ratio, found = _by_few_steps(unit, height_bound, normal_bound, 0.5 * (lower + upper))
    far = np.flatnonzero(~found)
    if far.size:
        with np.errstate(divide="ignore"):
            parameters = np.stack([u[far], v[far], np.log(above[far]), np.log(below[far])])
        root = _increasing_root(_exponential_equation, lower[far], upper[far], parameters)
        # The last step has no rounding of logarithms.
        step = _exponential_step(root, unit[far])
        polished = root + step
        better = (polished > lower[far]) & (polished < upper[far]) & (np.abs(step) < 1e-10)
        ratio[far] = np.where(better, polished, root)

    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        square = ratio * (ratio - 1.0) + 1.0
        shrink = np.exp(-np.abs(ratio))
        normal = np.maximum((u - ratio * v) / square, 0.0)
        height = np.maximum(((ratio - 1.0) * u + v) / square, 0.0)
        top = np.where(ratio > 0, np.maximum(w + normal * shrink, 0.0), height * shrink)
        height = np.where(ratio > 0, top * shrink, height)
    return ratio, height, normal, top


def _exponential_step(ratio: FloatArray, unit: FloatArray) -> FloatArray:
    """Newton's step on the third equation itself, whose terms are at most about 1."""
    u, v, w = unit.T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        grow = np.exp(ratio)
        shrink = 1.0 / grow
        square, twice = ratio * (ratio - 1.0) + 1.0, 2.0 * ratio - 1.0
        height, normal = ((ratio - 1.0) * u + v) / square, (u - ratio * v) / square
        slope = (height + (u - twice * height) / square) * grow + (normal + (v + twice * normal) / square) * shrink
        return (w - height * grow + normal * shrink) / slope


def _by_few_steps(
    unit: FloatArray, height_bound: FloatArray, normal_bound: FloatArray, middle: FloatArray
) -> tuple[FloatArray, BoolArray]:
    """Ratios by Newton's method on the third equation itself, and which ones it has found.

    Points on the boundary of K or of its polar cone have height or normal zero: their ratio is the bound that says so.
    Those of iterates and of solutions are often next to it.  The steps of others start in the middle.
    """
    steps = []
    for bound in (height_bound, normal_bound):
        step = _exponential_step(bound, unit)
        steps.append(np.where(np.isfinite(step) & (np.abs(bound) < MODERATE), step, np.inf))
    first = np.abs(steps[0]) < np.abs(steps[1])
    ratio, step = np.where(first, height_bound, normal_bound), np.where(first, *steps)
    apart = ~(np.abs(step) < CLOSE)
    if apart.any():
        ratio[apart], step[apart] = middle[apart], _exponential_step(middle[apart], unit[apart])
    found = np.zeros(len(unit), dtype=bool)
    for number in range(MANY if apart.any() else FEW):
        going = ~found & (apart if number >= FEW else True)
        if not going.any():
            break
        # Of points on the boundary, but for rounding, the step may lead out.
        moved = np.minimum(np.maximum(ratio + step, height_bound), normal_bound)
        ratio = np.where(going, moved, ratio)
        step = np.where(going, _exponential_step(ratio, unit), step)
        found |= going & (np.abs(step) <= FINE)
    last = np.minimum(np.maximum(ratio + step, height_bound), normal_bound)
    return np.where(found, last, 0.0), found


def _exponential_equation(ratio: FloatArray, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``log(height exp(ratio) + w_-) - log(normal exp(-ratio) + w_+)`` and its slope."""
    u, v, log_above, log_below = parameters
    square = ratio * (ratio - 1.0) + 1.0
    height, normal = np.maximum((ratio - 1.0) * u + v, 0.0), np.maximum(u - ratio * v, 0.0)
    log_square, square_slope = np.log(square), (2.0 * ratio - 1.0) / square
    log_up, log_down = np.log(height) - log_square + ratio, np.log(normal) - log_square - ratio
    left, right = np.logaddexp(log_up, log_below), np.logaddexp(log_down, log_above)
    left_slope = np.exp(log_up - left) * (1.0 + u / height - square_slope)
    right_slope = np.exp(log_down - right) * (-1.0 - v / normal - square_slope)
    return left - right, left_slope - right_slope


def power_regions(unit: FloatArray, exponents: FloatArray) -> Masks:
    """Masks: in K; in the polar cone; neither, but in the plane ``w = 0``."""
    u, v, w = unit.T
    size = np.abs(w)
    inside = (u >= 0) & (v >= 0) & (np.maximum(u, 0.0) ** exponents * np.maximum(v, 0.0) ** (1.0 - exponents) >= size)
    complements = 1.0 - exponents
    dual_mean = (np.maximum(-u, 0.0) / exponents) ** exponents * (np.maximum(-v, 0.0) / complements) ** complements
    polar = (u <= 0) & (v <= 0) & (dual_mean >= size)
    return inside, polar, ~inside & ~polar & (w == 0)


def _power_face_share(u: FloatArray, v: FloatArray, exponents: FloatArray) -> FloatArray:
    """The derivative of the third entry along itself at ``(u, v, 0)``, one of u and v positive."""
    larger, smaller = np.maximum(u, v), np.minimum(u, v)
    exponent = np.where(u > v, exponents, 1.0 - exponents)
    equal = np.maximum(larger, 0.0) / np.where(larger > 0, larger - 2.0 * np.minimum(smaller, 0.0), 1.0)
    return np.where(exponent == 0.5, equal, exponent > 0.5)


def _power_ray(unit: FloatArray, exponents: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Projection and residual ``unit - projection`` outside K, its polar cone and the plane ``w = 0``.

    With ``|w| = r + d``, r the third entry of the projection, its first two are the positive roots of
    ``p (p - u) = a r d`` and ``p (p - v) = (1 - a) r d``.  The unknown is ``log(r / d)``: it resolves both
    ends, so every entry of both results is accurate relative to itself.
    """
    u, v, w = unit.T
    size = np.abs(w)
    parameters = np.stack([u, v, size, exponents])
    limit = np.full(len(unit), LOGIT_RANGE)
    logit = _increasing_root(_power_equation, -limit, limit, parameters)
    kept, lost = size * _logistic(logit), size * _logistic(-logit)
    first, first_residual = _positive_root(u, exponents, kept, lost)
    second, second_residual = _positive_root(v, 1.0 - exponents, kept, lost)
    nearest = np.stack([first, second, np.copysign(kept, w)], axis=-1)
    residual = np.stack([-first_residual, -second_residual, np.copysign(lost, w)], axis=-1)
    return nearest, residual


def _power_equation(logit: FloatArray, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``log r - a log p_1 - (1 - a) log p_2`` and its slope, which lies between 0 and 1."""
    u, v, size, exponents = parameters
    share, other_share = _logistic(logit), _logistic(-logit)
    first, first_residual = _positive_root(u, exponents, size * share, size * other_share)
    second, second_residual = _positive_root(v, 1.0 - exponents, size * share, size * other_share)
    value = np.log(size) - np.logaddexp(0.0, -logit) - exponents * np.log(first) - (1.0 - exponents) * np.log(second)
    moved = exponents * first_residual / (first + first_residual)
    moved = moved + (1.0 - exponents) * second_residual / (second + second_residual)
    return value, other_share * (1.0 - moved) + share * moved


def _positive_root(
    entry: FloatArray, weight: FloatArray, kept: FloatArray, lost: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The positive root p of ``p (p - entry) = weight kept lost``, and ``p - entry``, without cancellation."""
    larger = 0.5 * (np.hypot(entry, 2.0 * np.sqrt(weight * kept) * np.sqrt(lost)) + np.abs(entry))
    smaller = weight * kept * (lost / np.where(larger > 0, larger, 1.0))
    return np.where(entry > 0, larger, smaller), np.where(entry > 0, smaller, larger)


def _logistic(logit: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -logit))


def _increasing_root(
    function: Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]],
    lower: FloatArray,
    upper: FloatArray,
    parameters: FloatArray,
) -> FloatArray:
    """The roots (n,) of n increasing functions between ``lower`` and ``upper``, to rounding.

    ``function(points, parameters)`` returns values and slopes; parameters are (k, n).  A function without a change
    of sign has its root, to rounding, at an end, and that end is returned.

    Newton's method.  A step past an end is replaced by Newton's step in the logarithm of the distance to that end: it
    stays inside, and is the exact one beside a logarithmic pole.  Bisection steps in where three steps have not halved
    the bracket and the last has not halved the step.
    """
    epsilon = np.finfo(np.float64).eps
    roots = 0.5 * (lower + upper)
    active = np.arange(len(roots))
    points, step, width = roots.copy(), upper - lower, upper - lower
    for iteration in range(MAXIMUM_ITERATIONS):
        with np.errstate(all="ignore"):
            values, slopes = function(points, parameters)
            newton = points - values / slopes
            above, size = values >= 0, np.abs(values)
            lower, upper = np.where(above, lower, points), np.where(above, points, upper)
            tolerance = epsilon * (1.0 + np.abs(points))
            reach = np.where(above, points - lower, upper - points)
            inward = points + np.copysign(-reach * np.expm1(-np.abs(newton - points) / reach), newton - points)
            inward = np.clip(inward, lower + 2.0 * tolerance, upper - 2.0 * tolerance)
            # Near a pole slopes are so large that a short step proves nothing: look a little beyond it.
            short = (np.abs(newton - points) <= tolerance) & (size > ROUGH)
            newton = np.where(short, np.clip(points - np.copysign(2.0 * tolerance, values), lower, upper), newton)
        following = np.where((newton >= lower) & (newton <= upper), newton, inward)
        shrinking = np.abs(following - points) <= 0.5 * step
        settled = (size <= tolerance) | ((size <= NOISE) & ~shrinking)
        slow = ~shrinking & (upper - lower > 0.5 * width) if iteration % 3 == 2 else np.zeros_like(shrinking)
        inside = (following >= lower) & (following <= upper)  # false for nan as well
        following = np.where(inside & ~slow, following, 0.5 * (lower + upper))
        following = np.where(settled, points, following)
        step = np.abs(following - points)
        if iteration % 3 == 2:
            width = upper - lower
        roots[active] = following
        open_ = ~(settled | (upper - lower <= 4.0 * tolerance) | ((step <= tolerance) & (size <= ROUGH)))
        if not open_.any():
            return roots
        active, points, step, width = active[open_], following[open_], step[open_], width[open_]
        lower, upper, parameters = lower[open_], upper[open_], parameters[:, open_]
    raise ArithmeticError(
        f"the projection onto a nonsymmetric cone did not converge for {active.size} points in "
        f"{MAXIMUM_ITERATIONS} steps; please report the points."
    )
