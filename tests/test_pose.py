"""PerspectivePose: poses that are known, those of OpenCV and of SciPy, and what has no pose."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.spatial.transform import Rotation as SciPyRotation

import lpgd
from lpgd.nodes.pose.rotations import axis_angle, cross_matrix, nearest_turn, rotation_matrix, spread_rotations, turning
from lpgd.problems.node.structure import NodePoint
from tests.node_cases import NODES, random

NODE = lpgd.nodes.PerspectivePose()
POSES = [name for name in NODES if name.startswith("pose")]


def scene(size: int, count: int, seed: int = 0, planar: bool = False):
    """Points, and poses that have them at least 0.3 in front: world, ω, t, and the points before the camera."""
    world = random(seed, size, count, 3)
    if planar:
        world[..., 2] = 0.0
    turns = SciPyRotation.random(size, random_state=seed)
    omega = torch.as_tensor(turns.as_rotvec())
    rotation = torch.as_tensor(turns.as_matrix())
    shift = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64).repeat(size, 1)
    p = world @ rotation.mT
    shift[:, 2] = 1.0 - p[..., 2].amin(-1)
    return world, omega, shift, p + shift[:, None]


def image(p: torch.Tensor) -> torch.Tensor:
    return p[..., :2] / p[..., 2:]


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-3, 0.9999, 1.0, 1.0001, 2.0, 3.1, math.pi])
def test_rotations_are_the_exponential_of_their_axis(length: float):
    axes = random(0, 5, 3)
    omega = length * axes / axes.norm(dim=-1, keepdim=True)
    rotation = rotation_matrix(omega)
    torch.testing.assert_close(rotation, torch.linalg.matrix_exp(cross_matrix(omega)), atol=1e-14, rtol=0)
    torch.testing.assert_close(rotation_matrix(axis_angle(rotation)), rotation, atol=2e-15, rtol=0)
    if length < 3.14:
        torch.testing.assert_close(axis_angle(rotation), omega, atol=1e-14, rtol=0)
        # J is the derivative: exp(J dω) exp(ω) = exp(ω + dω) to first order
        step = 1e-6 * random(1, 5, 3)
        turned = rotation_matrix((turning(omega) @ step[..., None])[..., 0]) @ rotation
        back = rotation_matrix((turning(omega) @ -step[..., None])[..., 0]) @ rotation
        exact = rotation_matrix(omega + step) - rotation_matrix(omega - step)
        torch.testing.assert_close(turned - back, exact, atol=1e-16 + 1e-15, rtol=0)


def test_derivatives_of_rotations_are_exact_at_zero_and_where_the_series_ends():
    for length in (0.0, 0.999999, 1.000001):
        omega = length * torch.nn.functional.normalize(random(3, 3), dim=0)
        assert torch.autograd.gradcheck(rotation_matrix, (omega.requires_grad_(),))
        assert torch.autograd.gradgradcheck(rotation_matrix, (omega,))


def test_the_grid_covers_all_rotations():
    grid = spread_rotations(384)
    others = torch.as_tensor(SciPyRotation.random(2000, random_state=0).as_matrix())
    nearest = torch.einsum("gij,nij->ng", grid, others).amax(-1)  # the trace, 1 + 2 cos(angle)
    assert float(torch.rad2deg(((nearest - 1) / 2).clamp(max=1).acos()).max()) < 35.0


def test_the_other_turn_is_the_same_rotation():
    omega = torch.tensor([[3.0, 0.5, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-3.2, -0.5, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    turned = nearest_turn(omega, reference)
    assert turned[0, 0] < 0
    assert torch.equal(turned[1:], omega[1:])
    torch.testing.assert_close(rotation_matrix(turned), rotation_matrix(omega), atol=1e-14, rtol=0)


@pytest.mark.parametrize("count", [4, 5, 12])
@pytest.mark.parametrize("seen", ["image", "bearings"])
def test_exact_views_give_the_pose_back_to_rounding(count: int, seen):
    world, omega, shift, p = scene(40, count, seed=count)
    points = image(p) if seen == "image" else p / p.norm(dim=-1, keepdim=True)
    solution = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(seen)).solve(points, world)
    assert set(solution.statuses) == {lpgd.Status.SOLVED}
    R, t = NODE.split(solution.x)
    exact = NODE.split(torch.cat([omega, shift], -1))
    torch.testing.assert_close(R, exact[0], atol=1e-11, rtol=0)
    torch.testing.assert_close(t, exact[1], atol=1e-11, rtol=0)


def test_planar_points_are_seen_from_the_right_side():
    """Their object-space error is that of their mirror image behind the camera."""
    world, omega, shift, p = scene(40, 6, seed=3, planar=True)
    R, t = NODE.split(lpgd.NodeLayer(NODE)(image(p), world))
    torch.testing.assert_close(R, rotation_matrix(omega), atol=1e-9, rtol=0)
    torch.testing.assert_close(t, shift, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seen", ["image", "bearings"])
def test_noisy_views_end_at_the_minimum_that_scipy_finds_from_the_truth(seen):
    world, omega, shift, p = scene(6, 10, seed=5)
    weights = random(1, 6, 10).abs()
    points = image(p) + 0.02 * random(2, 6, 10, 2)
    if seen == "bearings":
        points = torch.nn.functional.normalize(p / p.norm(dim=-1, keepdim=True) + 0.02 * random(2, 6, 10, 3), dim=-1)
    y = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(seen))(points, world, weights)
    for element in range(6):

        def residuals(pose: np.ndarray, element: int = element) -> np.ndarray:
            moved = world[element].numpy() @ SciPyRotation.from_rotvec(pose[:3]).as_matrix().T + pose[3:]
            length = np.linalg.norm(moved, axis=-1, keepdims=True)
            there = moved[:, :2] / moved[:, 2:] if seen == "image" else moved / length
            return (np.sqrt(weights[element].numpy())[:, None] * (there - points[element].numpy())).ravel()

        start = torch.cat([omega[element], shift[element]]).numpy()
        best = scipy.optimize.least_squares(residuals, start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
        own = 0.5 * np.square(residuals(y[element].numpy())).sum()
        assert own <= best.cost * (1 + 1e-12)
        if own > best.cost * (1 - 1e-9):  # the same minimum
            np.testing.assert_allclose(y[element, 3:].numpy(), best.x[3:], atol=1e-6)


def test_pixels_of_a_camera_are_image_points_through_its_matrix():
    world, _, _, p = scene(5, 8, seed=6)
    camera = torch.tensor([[800.0, 2.0, 320.0], [0.0, 790.0, 240.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    points = image(p) + 0.01 * random(7, 5, 8, 2)
    pixels = image(torch.cat([points, torch.ones(5, 8, 1).double()], -1) @ camera.mT)
    y = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(camera=True))(pixels, world, camera)
    # Pixels weigh the two directions by the squares of 800 and 790; and skew is nearly none.
    near = lpgd.NodeLayer(NODE)(points, world)
    torch.testing.assert_close(y, near, atol=5e-3, rtol=0)
    exact = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(camera=True))(image(p @ camera.mT), world, camera)
    torch.testing.assert_close(exact, lpgd.NodeLayer(NODE)(image(p), world), atol=1e-9, rtol=0)


@pytest.mark.parametrize("seen", ["image", "bearings"])
def test_a_permutation_of_all_pairs_is_its_pairs(seen):
    world, _, _, p = scene(4, 7, seed=8)
    points = image(p) if seen == "image" else p / p.norm(dim=-1, keepdim=True)
    points = points + 0.01 * random(9, *points.shape)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    plan = torch.zeros(7, 7, dtype=torch.float64)
    plan[torch.arange(7), order] = 1.0
    pairs = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(seen, all_pairs=True))(points[:, order], world, plan)
    torch.testing.assert_close(
        pairs, lpgd.NodeLayer(lpgd.nodes.PerspectivePose(seen))(points, world), atol=1e-10, rtol=0
    )


def test_weights_and_means_of_all_pairs_are_the_sum_over_pairs():
    world, omega, shift, p = scene(3, 6, seed=10)
    node = lpgd.nodes.PerspectivePose(all_pairs=True)
    points, plan = image(p), random(11, 3, 6, 6).softmax(-1)
    y = torch.cat([omega, shift], -1) + 0.01 * random(12, 3, 6)
    R, t = node.split(y)
    there = image(world @ R.mT + t[:, None])
    by_hand = 0.5 * (plan * (points[:, :, None] - there[:, None]).square().sum(-1)).sum((1, 2))
    torch.testing.assert_close(node.objective(y, points, world, plan), by_hand, atol=1e-12, rtol=0)


def test_points_without_a_weight_count_nothing_wherever_they_are():
    world, _, _, p = scene(2, 8, seed=13)
    points, weights = image(p) + 0.01 * random(14, 2, 8, 2), torch.ones(2, 8, dtype=torch.float64)
    weights[:, 6:] = 0.0
    other = world.clone()
    other[:, 6:] = -100.0 * world[:, 6:]
    layer = lpgd.NodeLayer(NODE)
    expected = layer(points[:, :6], world[:, :6])
    torch.testing.assert_close(layer(points, other, weights), expected, atol=1e-12, rtol=0)


def test_ransac_starts_near_the_truth_where_half_of_the_pairs_are_wrong():
    pytest.importorskip("cv2")
    world, omega, shift, p = scene(4, 40, seed=15)
    points = image(p) + 1e-3 * random(16, 4, 40, 2)
    points[:, 20:] = random(17, 4, 20, 2)
    weights = torch.ones(4, 40, dtype=torch.float64)
    weights[:, 20:] = 0.2  # they take part, as outliers do that a network has not found
    layer = lpgd.NodeLayer(lpgd.nodes.PerspectivePose(start="ransac"))
    solution = layer.solve(points, world, weights)
    assert float(solution.residual.max()) < 1e-9
    found = NODE.split(solution.x)[0]
    angle = ((found * rotation_matrix(omega)).sum((-2, -1)) - 1) / 2
    assert float(torch.rad2deg(angle.clamp(max=1).acos()).median()) < 20.0
    weights[:, 20:] = 0.0
    exact = layer(points, world, weights)
    torch.testing.assert_close(NODE.split(exact)[0], rotation_matrix(omega), atol=5e-3, rtol=0)
    torch.testing.assert_close(exact, lpgd.NodeLayer(NODE)(points, world, weights), atol=1e-9, rtol=0)
    assert torch.isfinite(shift).all()


def test_without_opencv_ransac_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    world, _, _, p = scene(1, 6)
    with pytest.raises(lpgd.MissingPackageError, match="pip install opencv-python-headless"):
        lpgd.NodeLayer(lpgd.nodes.PerspectivePose(start="ransac"))(image(p), world)
    assert torch.isfinite(lpgd.NodeLayer(NODE)(image(p), world)).all()


def test_what_has_no_pose_fails_alone():
    world, _, _, p = scene(6, 8, seed=18)
    points, weights = image(p), torch.ones(6, 8, dtype=torch.float64)
    weights[0, 3:] = 0.0  # three points
    weights[1, 0] = -1.0
    world[2] = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] * random(19, 3)  # a line
    points[3] = image(p[3] - p[3, :, 2].median() * torch.tensor([0.0, 0.0, 0.9], dtype=torch.float64))  # half behind
    layer = lpgd.NodeLayer(NODE, on_error="nan")
    points.requires_grad_()
    y = layer(points, world, weights)
    names = [status.name for status in y.info.solution.statuses]
    assert names == ["INVALID_DATA"] * 3 + ["INFEASIBLE"] + ["SOLVED"] * 2
    (gradient,) = torch.autograd.grad(y[:, 3:].nan_to_num().sum(), points)
    assert not gradient[:4].any()
    assert gradient[4:].abs().amin() > 0
    with pytest.raises(lpgd.SolverError, match=r"element.* 0, 1, 2 of 6: INVALID_DATA .* at least four points"):
        lpgd.NodeLayer(NODE)(points, world, weights)


def test_a_warm_start_stays_with_its_branch():
    """Also across a rotation by π, where the axis would turn over."""
    world = random(20, 6, 3)
    layer = lpgd.NodeLayer(NODE)
    last, path = False, []
    angles = torch.linspace(3.0, 3.4, 9, dtype=torch.float64)
    for angle in angles:
        omega = angle * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        p = world @ rotation_matrix(omega).mT + torch.tensor([0.0, 0.0, 6.0], dtype=torch.float64)
        last = layer(image(p), world, warm_start=last)
        path.append(last[:3].detach())
    torch.testing.assert_close(torch.stack(path).norm(dim=-1), angles, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", POSES)
def test_second_derivatives_are_those_of_finite_differences(name: str):
    case = NODES[name]
    assert torch.autograd.gradgradcheck(lpgd.NodeLayer(case.node), case.inputs(), atol=1e-6, fast_mode=True)


def test_options_and_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="seen is 'pixels'; it must be one of image, bearings"):
        lpgd.nodes.PerspectivePose("pixels")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="bearings have no camera matrix"):
        lpgd.nodes.PerspectivePose("bearings", camera=True)
    with pytest.raises(ValueError, match="threshold is 0"):
        lpgd.nodes.PerspectivePose(threshold=0.0)
    layer, pairs = lpgd.NodeLayer(NODE), lpgd.NodeLayer(lpgd.nodes.PerspectivePose(all_pairs=True))
    with pytest.raises(ValueError, match=r"points has shape \(5, 3\); it must be \(N, 2\)"):
        layer(torch.zeros(5, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"world has shape \(6, 3\); it must be \(5, 3\)"):
        layer(torch.zeros(5, 2), torch.zeros(6, 3))
    with pytest.raises(ValueError, match="weights is missing"):
        pairs(torch.zeros(5, 2), torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"weights has shape \(3,\); it must be \(5,\).*camera=True"):
        lpgd.NodeLayer(lpgd.nodes.PerspectivePose())(torch.rand(5, 2), torch.rand(5, 3), torch.eye(3))
    with pytest.raises(ValueError, match=r"weights has shape \(6, 5\); it must be \(5, 6\)"):
        pairs(torch.zeros(5, 2), torch.zeros(6, 3), torch.zeros(6, 5))


def test_one_singular_element_leaves_the_formula_to_the_others() -> None:
    case = NODES["pose"]
    inputs = case.inputs()
    layer = lpgd.NodeLayer(case.node)
    solution = layer.solve(*inputs)
    x = solution.x.clone()
    x[1, 3:] *= -1.0  # behind the camera: no minimum, whose second derivatives are not definite
    moved = replace(solution, x=x)
    g = NodePoint(torch.ones_like(x), *(torch.zeros_like(tensor) for tensor in tuple(solution.point)[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradient, info = lpgd.ClosedForm().vjp(moved, g, layer.solver)
    expected, _ = lpgd.ClosedForm().vjp(solution, g, layer.solver)
    assert info.used[0] == "closed form"
    assert info.used[1] != "closed form"
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
