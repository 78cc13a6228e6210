"""The pose of a camera from points: weighted perspective-n-point as a declarative node.

[LEC] Gould, Lecture Notes on Differentiable Optimisation in Deep Learning, section 4.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, integers, rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.base import BaseNode, NodeAnswer, fixed_number
from lpgd.nodes.pose.errors import Sight, pose_system
from lpgd.nodes.pose.refine import Refined, positive_definite, refine, values_at
from lpgd.nodes.pose.rotations import axis_angle, nearest_turn, rotation_matrix, turning
from lpgd.nodes.pose.start import Poses, by_ransac, search
from lpgd.status import Status

__all__ = ["PerspectivePose"]

Seen = Literal["image", "bearings"]
Start = Literal["search", "ransac"]

CANDIDATES = 8
"""Local minima of the object-space error whose reprojection errors are looked at."""
DESCENTS = 4
"""So many of them are where these are minimised from."""
FIRST = 15
"""Iterations after which descents that have not ended are compared with those that have."""


@dataclass(frozen=True)
class PerspectivePose(BaseNode):
    """The pose (R, t) of a camera that sees points X_j of the world, ``p_j = R X_j + t``, where they are seen.

        minimise  ½ Σ_j w_j |q_j - u_j|²,   q = ((K p)_1, (K p)_2) / (K p)_3       seen="image"
        minimise  ½ Σ_j w_j |p_j/|p_j| - b_j|²                                     seen="bearings"

    over R in SO(3) and t in R³, with points in front of the camera, ``(K p_j)_3 > 0``, where images have a weight.  The
    inputs are ``points`` u (N, 2), or unit vectors b (N, 3) towards what is seen, ``world`` X (N, 3), with ``camera``
    the matrix K (3, 3) (else the identity: points of focal length one), and last ``weights`` w (N,), at least zero,
    one if left out.  All have gradients.

    The answer y is (6,): ω and t.  R is the rotation about the axis ω by the angle ``|ω| ≤ π`` (``exp([ω])``; of the
    two at π, or further on after a warm start, the one nearer to the start); :meth:`split` takes y apart.

    Solved by Newton's method with Levenberg-Marquardt damping, batched, in float64 whatever the dtype, to rounding.  It
    starts where a search over all rotations finds the object-space error lowest, and keeps the lowest end (planar
    points have two minima), or from OpenCV's RANSAC, and its answer is then the minimum of all the weighted errors
    nearest to that.  A warm start stays with its branch.  The gradient is implicit differentiation of the
    stationarity in closed form, second derivatives included.

    What has no pose fails alone: fewer than four points with a weight, points on one line, negative weights
    (INVALID_DATA); no start with all weighted points in front (INFEASIBLE); an error that falls on without end
    (ITERATION_LIMIT); a minimum that is none to rounding, as along a line of equal ones (NUMERICAL_ERROR).

    Args:
        seen: what ``points`` are.
        camera: K is an input, before the weights.
        all_pairs: points (M, ·) need not belong to world points of their order: ``weights`` (M, N) are those of all
            pairs, as a transport plan's, and the errors of all pairs are summed.
        start: the search, or "ransac", which needs the extra ``pose``; it takes points with at least a tenth of the
            largest weight, of all pairs those that are the heaviest of their row and column.  Where it finds nothing,
            the search does.
        threshold: RANSAC's largest distance of an inlier, in image points of focal length one.
        iterations: of an element, at most.

    [LEC] Gould, Lecture Notes on Differentiable Optimisation in Deep Learning, section 4.5.
    """

    seen: Seen = "image"
    camera: bool = False
    all_pairs: bool = False
    start: Start = "search"
    threshold: float = 0.01
    iterations: int = 100

    name = "perspective pose"
    domain = (
        "Here at least four points must have a positive weight, and lie on no line; no weight may be negative; and, of "
        "image points, all with a weight must be in front of the camera."
    )
    optional = 1
    is_partial = True

    def __post_init__(self) -> None:
        for role, known in (("seen", get_args(Seen)), ("start", get_args(Start))):
            if getattr(self, role) not in known:
                raise ValueError(f"{role} is {getattr(self, role)!r}; it must be one of {', '.join(known)}.")
        if self.camera and self.seen == "bearings":
            raise ValueError("camera is for image points: bearings have no camera matrix.")
        if not fixed_number("threshold", self.threshold, "a distance") > 0:
            raise ValueError(f"threshold is {self.threshold}; it must be positive.")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; it must be at least 1.")

    @property
    def inputs(self) -> Mapping[str, int]:
        return {
            "points": 2,
            "world": 2,
            **({"camera": 2} if self.camera else {}),
            "weights": 2 if self.all_pairs else 1,
        }

    def arrange(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Weights of one where there are none.

        Raises:
            ValueError: of all pairs they are missing.
        """
        *given, weights = inputs
        if weights is None:
            if self.all_pairs:
                raise ValueError("weights is missing; with all_pairs it says which points belong together.")
            world = cast(Tensor, inputs[1])
            weights = world.new_ones(world.shape[-2] if world.ndim > 1 else 1)
        return (*cast("list[Tensor]", given), weights)

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        points, world, weights = shapes[0], shapes[1], shapes[-1]
        size = 2 if self.seen == "image" else 3
        if points[1] != size:
            raise ValueError(f"points has shape {points}; it must be (N, {size}), as seen={self.seen!r}.")
        if world[1] != 3 or (points[0] != world[0] and not self.all_pairs):
            count = "N" if self.all_pairs else points[0]
            raise ValueError(f"world has shape {world}; it must be ({count}, 3).")
        if self.camera and shapes[2] != (3, 3):
            raise ValueError(f"camera has shape {shapes[2]}; it must be (3, 3).")
        expected = (points[0], world[0]) if self.all_pairs else (world[0],)
        if weights != expected:
            is_camera = weights[-1] == 3 and self.seen == "image" and not self.camera
            hint = " A camera matrix is an input, before them, with PerspectivePose(camera=True)." if is_camera else ""
            raise ValueError(f"weights has shape {weights}; it must be {expected}.{hint}")
        return (6,)

    @staticmethod
    def split(y: Tensor) -> tuple[Tensor, Tensor]:
        """R (*, 3, 3) and t (*, 3) of answers (*, 6), differentiable."""
        return rotation_matrix(y[..., :3]), y[..., 3:]

    # -- what is minimised ---------------------------------------------------------------------------------------------

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        points, weights = inputs[0], inputs[-1]
        sight = self._sight(inputs)
        value = sight.value(sight.seen(*self.split(y))[1])
        if not self.all_pairs:
            return value
        # What means of pairs leave out does not depend on the pose.
        scatter = (points[:, :, None] - sight.target[:, None]).square().sum(-1)
        return value + 0.5 * (weights * scatter).sum((-2, -1))

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return self.solve(tuple(inputs), None).y.nan_to_num()

    def _sight(self, inputs: tuple[Tensor, ...]) -> Sight:
        """Pairs of points; of all pairs, each point of the world with the mean of what it is seen as."""
        points, world, weights = inputs[0], inputs[1], inputs[-1]
        camera = inputs[2] if self.camera else None
        if not self.all_pairs:
            return Sight(points, world, weights, camera)
        total = weights.sum(-2)
        mean = weights.mT @ points / torch.where(total == 0, 1.0, total)[..., None]
        return Sight(mean, world, total, camera)

    # -- solving -------------------------------------------------------------------------------------------------------

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        dtype = inputs[0].dtype
        inputs = tuple(tensor.double() for tensor in inputs)
        sight = self._sight(inputs)
        size, device = len(sight.world), sight.world.device
        status = torch.full((size,), int(Status.INVALID_DATA), device=device)
        y = torch.full((size, 6), torch.nan, dtype=torch.float64, device=device)
        iterations = torch.zeros(size, dtype=torch.int64, device=device)
        left = rows_where(self._determined(inputs, sight, torch.finfo(dtype).eps))
        if start is not None and len(left):
            known = start[left].double()
            found = refine(sight.select(left), *self.split(known), self.iterations)
            fine = found.converged & found.regular
            settled = left[fine]
            end = found.select(rows_where(fine))
            status[settled], iterations[settled] = int(Status.SOLVED), end.iterations
            y[settled] = torch.cat([nearest_turn(axis_angle(end.rotation), known[fine, :3]), end.shift], -1)
            left = left[~fine]
        if len(left):
            found = self._from_afar(tuple(tensor[left] for tensor in inputs), sight.select(left))
            y[left] = torch.cat([axis_angle(found.rotation), found.shift], -1)
            iterations[left] = found.iterations
            status[left] = _outcomes(found)
        statuses = [Status(code) for code in integers(status)]
        return NodeAnswer(y.to(dtype), statuses, iterations)

    def _determined(self, inputs: tuple[Tensor, ...], sight: Sight, eps: float) -> Tensor:
        """(B,) whether weights are at least zero, four of them positive, of points that lie on no line."""
        weights, world = sight.weights, sight.world
        fine = (inputs[-1] >= 0).flatten(1).all(-1) & ((weights > 0).sum(-1) >= 4)
        if self.camera:
            fine = fine & (linalg.det(inputs[2]) != 0)
        share = (weights > 0).to(world)
        mean = (share[..., None] * world).sum(1) / share.sum(-1).clamp(min=1.0)[:, None]
        scatter = (world - mean[:, None]) * share[..., None]
        sizes = linalg.eigvalsh(scatter.mT @ scatter)
        return fine & (sizes[:, 1] > max(1e-14, (20 * eps) ** 2) * sizes[:, 2])

    def _from_afar(self, inputs: tuple[Tensor, ...], sight: Sight) -> Refined:
        """The lowest minimum that is found from nothing."""
        rays = self._rays(inputs)
        if self.start == "search":
            return self._searched(inputs, sight, rays)
        weights = inputs[-1]
        R, t, missing = torch.zeros_like(rays[:, :3]), torch.zeros_like(sight.world[:, 0]), list[int]()
        for element in range(len(weights)):
            if is_over():
                missing.append(element)
                continue
            element_data = (rays[element], sight.world[element], weights[element])
            seen, world, known = _heaviest(*element_data) if self.all_pairs else _arrays(*element_data)
            pose = by_ransac(seen, world, known, self.threshold)
            if pose is None:
                missing.append(element)
            else:
                R[element], t[element] = (values.to(R) for values in pose)
        R[missing], t[missing] = torch.eye(3).to(R), torch.nan  # an error of infinity: no descent starts there
        found = refine(sight, R, t, self.iterations)
        left = rows_where(~(found.converged & found.regular))
        if not len(left) or is_over():
            return found
        again = self._searched(tuple(tensor[left] for tensor in inputs), sight.select(left), rays[left])
        return Refined(*(old.index_copy(0, left, new) for old, new in zip(found, again, strict=True)))

    def _searched(self, inputs: tuple[Tensor, ...], sight: Sight, rays: Tensor) -> Refined:
        weights = inputs[-1]
        unit = torch.eye(3, dtype=rays.dtype, device=rays.device)
        across = unit - rays[..., :, None] * rays[..., None, :]
        blur = torch.einsum("bmn,bmij->bnij", weights, across) if self.all_pairs else weights[..., None, None] * across
        poses = search(sight.world, blur, CANDIDATES)
        size, element = len(weights), torch.arange(len(weights), device=rays.device)
        copies = element.repeat_interleave(CANDIDATES)
        poses = Poses(*(values.flatten(0, 1) for values in poses))
        lowest = values_at(sight.select(copies), *poses).reshape(size, CANDIDATES).topk(DESCENTS, largest=False).indices
        chosen = (lowest + CANDIDATES * element[:, None]).flatten()
        copies = element.repeat_interleave(DESCENTS)
        ends = refine(sight.select(copies), poses.rotation[chosen], poses.shift[chosen], min(FIRST, self.iterations))
        # Where one has ended, others go on if they are lower already.
        value = torch.where(ends.converged & ends.regular, ends.value, torch.inf).reshape(size, DESCENTS)
        best = value.amin(-1).repeat_interleave(DESCENTS)
        left = rows_where(~ends.converged & ends.value.isfinite() & (ends.value < best))
        if len(left) and self.iterations > FIRST:
            unfinished = ends.select(left)
            more = refine(sight.select(copies[left]), unfinished.rotation, unfinished.shift, self.iterations - FIRST)
            more = more._replace(iterations=more.iterations + unfinished.iterations)
            ends = Refined(*(old.index_copy(0, left, new) for old, new in zip(ends, more, strict=True)))
            value = torch.where(ends.converged & ends.regular, ends.value, torch.inf).reshape(size, DESCENTS)
        # An element without a minimum shows what became of its lowest end.
        value = torch.where(value.isinf().all(-1, True), ends.value.reshape(size, DESCENTS), value)
        return ends.select(value.argmin(-1) + DESCENTS * element)

    def _rays(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Unit vectors towards what is seen, in the camera's frame."""
        rays = inputs[0]
        if self.seen == "image":
            rays = torch.cat([rays, torch.ones_like(rays[..., :1])], -1)
            if self.camera:
                rays = linalg.solve(inputs[2], rays.mT).mT
        length = rays.square().sum(-1, keepdim=True).sqrt()
        return rays / torch.where(length > 0, length, 1.0)

    # -- the derivative ------------------------------------------------------------------------------------------------

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor, ...] | None:
        """One system of order six, and the derivative of ``-<∇f(y; inputs), s>`` in the inputs, ``H s = v``.

        Where the slope is zero, the Hessian in ``(ω, t)`` is that in ``(δ, t)``, R moving to ``exp([δ]) R``, between
        the matrices J(ω) of ``δ = J dω``.  NaN for elements of which it is singular.
        """
        dtype = y.dtype
        inputs = tuple(tensor.double() for tensor in inputs)
        gradients, _ = self._vjp(inputs, y.double(), cotangent.double())
        return tuple(gradient.to(dtype) for gradient in gradients)

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...] | None:
        dtype = y.dtype
        gradients, definite = self._vjp(tuple(tensor.double() for tensor in inputs), y.double(), cotangent.double())
        return tuple(gradient.to(dtype) for gradient in gradients) if bool(definite.all()) else None

    def _vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradients, NaN for elements with a singular system, and (B,) which have a regular one."""
        R, t = self.split(y)
        sight = self._sight(inputs)
        turned, p = sight.seen(R, t)
        _, hessian, gauss = pose_system(sight, turned, p)
        definite = positive_definite(hessian.detach(), gauss.detach())
        unit = torch.eye(6, dtype=hessian.dtype, device=hessian.device)
        hessian = torch.where(definite[:, None, None], hessian, unit)
        along = linalg.solve(turning(y[:, :3]).mT, cotangent[:, :3])
        s = linalg.solve(hessian, torch.cat([along, cotangent[:, 3:]], -1))

        def sloped(inputs: tuple[Tensor, ...]) -> Tensor:
            traced = self._sight(inputs)
            turned, p = traced.seen(R, t)
            moved = torch.cross(s[:, None, :3].expand_as(turned), turned, dim=-1) + s[:, None, 3:]
            return -(traced.slope(p) * moved).sum()

        gradients = torch.func.grad(sloped)(inputs)
        lost = [definite.reshape(-1, *(1,) * (gradient.ndim - 1)) for gradient in gradients]
        return tuple(
            torch.where(fine, gradient, torch.nan) for fine, gradient in zip(lost, gradients, strict=True)
        ), definite


def _outcomes(found: Refined) -> Tensor:
    """Statuses as numbers."""
    left = torch.where(found.converged, int(Status.NUMERICAL_ERROR), int(Status.ITERATION_LIMIT))
    left = torch.where(found.value.isfinite(), left, int(Status.ITERATION_LIMIT if is_over() else Status.INFEASIBLE))
    return torch.where(found.converged & found.regular, int(Status.SOLVED), left)


def _arrays(*tensors: Tensor) -> tuple[FloatArray, ...]:
    return tuple(cast(FloatArray, tensor.cpu().numpy()) for tensor in tensors)


def _heaviest(rays: Tensor, world: Tensor, weights: Tensor) -> tuple[FloatArray, ...]:
    """The pairs that are the heaviest ones of their row and of their column, of weights (M, N)."""
    row = weights.argmax(-1)
    mutual = rows_where(weights.argmax(-2)[row] == torch.arange(len(row), device=row.device))
    column = row[mutual]
    return _arrays(rays[mutual], world[column], weights[mutual, column])
