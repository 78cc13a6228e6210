"""In which smooth piece of the projection onto K* a point lies, and how far it is from another one.

At ``v = y - s`` of a solution, whose parts are ``y = P_K*(v)`` and ``s = P_K(-v)``, the pieces are its active set:

==================================  ===================================================================================
zero cone                           always the same piece
nonnegative rows                    the sign of v: the multiplier or the slack is positive
second-order cones                  v in K* (the slack is 0), v in the polar cone (the multiplier is 0), or in neither
semidefinite cones                  the number of positive eigenvalues: the rank of y
exponential and power cones         as second-order ones, and for exponential ones the flat face and its edge apart
==================================  ===================================================================================
"""

from __future__ import annotations

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray
from lpgd.cones.blocks import ConeBlock, cone_blocks
from lpgd.cones.nonsymmetric import exponential_regions, normalised, power_regions, project_exponential, project_power
from lpgd.cones.product import Cones, smat

__all__ = ["interior_direction", "kinks", "regions"]

JUMP = 0.05
"""Eigenvalues of a projection's derivative that differ by more between two points nearby have a jump between them."""

_BOUNDARY, _INSIDE, _POLAR, _FACE, _EDGE = range(5)


def regions(cones: Cones, points: FloatArray) -> tuple[IntArray, FloatArray]:
    """The pieces that points lie in, and how deep.

    Args:
        cones: K.
        points: (..., m) finite.

    Returns:
        pieces: (..., m) a number for each row, the same for all rows of a cone.
        depths: (..., m) the distance to the nearest other piece, in the Euclidean norm of the cone's rows; to first
            order in exponential and power cones and their polar cones.  Infinite for the zero cone.

    Raises:
        ValueError: the last dimension of ``points`` is not the number of rows of ``cones``.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-1:] != (cones.rows,):
        raise ValueError(f"points of shape {points.shape} were given; the last dimension is {cones.rows}.")
    pieces = np.zeros(points.shape, dtype=np.int64)
    depths = np.full(points.shape, np.inf)
    nonnegative = cones.sections["nonnegative"]
    pieces[..., nonnegative] = points[..., nonnegative] > 0
    depths[..., nonnegative] = np.abs(points[..., nonnegative])
    for block in cone_blocks(cones):
        vectors = points[..., block.rows]
        found, depth = _of_block(block, vectors.reshape(-1, block.rows.shape[1]))
        pieces[..., block.rows] = found.reshape(vectors.shape[:-1])[..., None]
        depths[..., block.rows] = depth.reshape(vectors.shape[:-1])[..., None]
    return pieces, depths


def kinks(cones: Cones, points: FloatArray, tolerance: FloatArray) -> tuple[BoolArray, FloatArray]:
    """Where the derivative of the projection onto K* jumps nearby, and how fast it changes elsewhere.

    Args:
        cones: K.
        points: (k, m).
        tolerance: (k,) how near, in the maximum norm.

    Returns:
        (k, m) rows whose cone has its point within the tolerance of the boundary of K* or of -K, or of a face at which
        the derivative jumps; and (k,) a bound, up to a small factor, of the derivative's Lipschitz constant at points
        without such rows: 0 where all cones are orthants.
    """
    points = -np.asarray(points, dtype=np.float64)
    near, lipschitz = np.zeros(points.shape, dtype=bool), np.zeros(len(points))
    nonnegative = cones.sections["nonnegative"]
    near[:, nonnegative] = np.abs(points[:, nonnegative]) <= tolerance[:, None]
    for block in cone_blocks(cones) if len(points) else ():
        close, rate = _kinks_of(block, points[:, block.rows], tolerance[:, None])
        near[:, block.rows] = close[:, :, None]
        np.maximum(lipschitz, np.where(close, 0.0, rate).max(axis=1, initial=0.0), out=lipschitz)
    return near, lipschitz


def interior_direction(cones: Cones) -> FloatArray:
    """(m,) a point that is inside both K and K*, apart from the zero cone, where it is 0: ``v + t e`` enters K*."""
    direction = np.zeros(cones.rows)
    direction[cones.sections["nonnegative"]] = 1.0
    for block in cone_blocks(cones):
        direction[block.rows] = block.interior
    return direction


def _of_block(block: ConeBlock, points: FloatArray) -> tuple[IntArray, FloatArray]:
    """Pieces and depths (j k,) at points (j k, t), j for each cone, all cones in turn."""
    if block.kind == "second_order":
        bound, length = points[:, 0], np.linalg.norm(points[:, 1:], axis=-1)
        pieces = np.where(bound > length, _INSIDE, np.where(bound <= -length, _POLAR, _BOUNDARY))
        return pieces, np.abs(np.abs(bound) - length) * (1.0 if block.side == 1 else np.sqrt(0.5))
    if block.kind == "semidefinite":
        values = np.linalg.eigvalsh(smat(points, block.side))
        return (values > 0).sum(axis=-1), np.abs(values).min(axis=-1)
    # Their duals are not the cones themselves: the pieces of P_K*(v) = v + P_K(-v) are those of P_K at -v.
    points = points if block.polar else -points
    unit, size = normalised(points)
    if block.exponents is None:
        pieces, depths = _exponential(unit)
    else:
        pieces, depths = _power(unit, np.tile(block.exponents, len(points) // len(block.exponents)))
    return pieces, depths * size


def _exponential(unit: FloatArray) -> tuple[IntArray, FloatArray]:
    inside, polar, face = exponential_regions(unit)
    u, v, w = unit.T
    pieces = np.select([inside, polar, face & (w > 0), face], [_INSIDE, _POLAR, _FACE, _EDGE], _BOUNDARY)
    to_face = np.hypot(np.maximum(u, 0.0), np.maximum(v, 0.0))
    within_face = np.minimum(np.minimum(np.abs(u), np.abs(v)), np.abs(w))
    depths = np.minimum(_to_cones(unit, project_exponential(unit)), to_face)
    depths = np.where(inside, _below_exponential(v, u, w, 1.0), depths)
    depths = np.where(polar, _below_exponential(u, v, -w, np.e), depths)
    return pieces, np.where(face, within_face, depths)


def _below_exponential(base: FloatArray, other: FloatArray, lead: FloatArray, factor: float) -> FloatArray:
    """How far it is to the boundary of ``base exp(other / base) <= factor lead``, base > 0."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = other / base
        grow = np.exp(ratio)
        depth = (factor * lead - base * grow) / np.sqrt(grow**2 + (grow * (1.0 - ratio)) ** 2 + factor**2)
    depth = np.minimum(np.minimum(depth, base), lead)
    return np.where((base > 0) & np.isfinite(depth), np.maximum(depth, 0.0), 0.0)


def _power(unit: FloatArray, exponents: FloatArray) -> tuple[IntArray, FloatArray]:
    inside, polar, _ = power_regions(unit, exponents)
    u, v, w = unit.T
    one, complements = np.ones_like(exponents), 1.0 - exponents
    depths = _to_cones(unit, project_power(unit, exponents))
    depths = np.where(inside, _below_mean(u, v, w, exponents, one, one), depths)
    depths = np.where(polar, _below_mean(-u, -v, w, exponents, exponents, complements), depths)
    return np.select([inside, polar], [_INSIDE, _POLAR], _BOUNDARY), depths


def _below_mean(
    u: FloatArray, v: FloatArray, w: FloatArray, exponents: FloatArray, first: FloatArray, second: FloatArray
) -> FloatArray:
    """How far it is to the boundary of ``|w| <= (u / first)^a (v / second)^(1 - a)``, u and v nonnegative."""
    u, v = np.maximum(u, 0.0), np.maximum(v, 0.0)
    mean = (u / first) ** exponents * (v / second) ** (1.0 - exponents)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = exponents * mean / u, (1.0 - exponents) * mean / v
        depth = (mean - np.abs(w)) / np.sqrt(slopes[0] ** 2 + slopes[1] ** 2 + 1.0)
    return np.where(np.isfinite(depth), np.maximum(np.minimum(np.minimum(depth, u), v), 0.0), 0.0)


def _to_cones(points: FloatArray, projected: FloatArray) -> FloatArray:
    """From points in neither cone to K or to the polar cone, whichever is nearer."""
    return np.minimum(np.linalg.norm(points - projected, axis=-1), np.linalg.norm(projected, axis=-1))


def _kinks_of(block: ConeBlock, points: FloatArray, tolerance: FloatArray) -> tuple[BoolArray, FloatArray]:
    """Points (j, k, t), tolerance (j, 1): see :func:`kinks`; (j, k) each."""
    with np.errstate(divide="ignore"):
        if block.kind == "second_order":
            bound, length = points[..., 0], np.linalg.norm(points[..., 1:], axis=-1)
            close = np.minimum(np.abs(bound - length), np.abs(bound + length)) <= tolerance
            return close, np.where(np.abs(bound) < length, 1.0 / length, 0.0)
        if block.kind == "semidefinite":
            values = np.linalg.eigvalsh(smat(points, block.side))
            positive = np.where(values > 0, values, np.inf).min(axis=-1)
            negative = np.where(values <= 0, values, -np.inf).max(axis=-1)
            return np.abs(values).min(axis=-1) <= tolerance, 1.0 / (positive - negative)
        nearest = block.project(points)
        sizes = [np.abs(vectors).max(axis=-1) for vectors in (nearest, points - nearest)]
        close = np.minimum(np.minimum(*sizes), np.abs(points).min(axis=-1)) <= tolerance
        if close.any():
            steps = 2.0 * tolerance[..., None] * block.interior
            ends = (points + sign * steps for sign in (1.0, -1.0))
            flat = (np.sort(block.spectrum(end.reshape(-1, 3))[0], axis=-1) for end in ends)
            jump = np.abs(np.subtract(*flat)).max(axis=-1).reshape(close.shape)
            close &= jump > JUMP
        return close, np.where(np.minimum(*sizes) > 0, 3.0 / np.abs(points).max(axis=-1), 0.0)
