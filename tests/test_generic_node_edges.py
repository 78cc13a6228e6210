"""Generic nodes at hard starts, in odd units, without a minimum, and under the modes of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lpgd
from tests.node_cases import random


def squared_distance(x, y):
    return 0.5 * (y - x).square().sum()


def double_well(x, y):
    return (y.square() - 1).square().sum() + 0.1 * (x * y).sum()


# -- starts that are stationary, and no minimum ---------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["newton", "lbfgs"])
def test_a_start_at_a_maximum_or_saddle_is_left(algorithm):
    layer = lpgd.NodeLayer(lpgd.Node(double_well), solver=lpgd.NodeSolver(algorithm=algorithm))
    x = torch.zeros(2, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.solve(x).x.abs(), torch.ones_like(x))
    # (y₁ - 1)² + (y₂² - 1)²: Newton's method never sees the second variable's slope
    saddle = lpgd.Node(lambda x, y: (y[0] - 1) ** 2 + (y[1] ** 2 - 1) ** 2, shape=(2,))
    if algorithm == "newton":
        found = lpgd.NodeLayer(saddle).solve(torch.zeros(1, 1, dtype=torch.float64)).x
        torch.testing.assert_close(found.abs(), torch.ones_like(found))


def test_scipy_does_not_call_a_maximum_solved():
    layer = lpgd.NodeLayer(lpgd.Node(double_well), solver=lpgd.NodeSolver(algorithm="scipy"))
    assert layer.solve(torch.zeros(1, 3, dtype=torch.float64)).failed == [0]


@pytest.mark.parametrize("algorithm", ["newton", "lbfgs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_eigenvector_is_found_from_zero_where_neither_objective_nor_constraint_has_a_slope(algorithm, dtype):
    node = lpgd.Node(
        lambda A, y: -0.5 * y @ A @ y, equality=lambda A, y: y @ y - 1, shape=lambda shape: shape[:1], ndims=2
    )
    A = random(1, 3, 4, 4).to(dtype)
    A = A + A.mT
    y = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm=algorithm))(A)
    largest = torch.linalg.eigvalsh(A)[:, -1]
    torch.testing.assert_close((y[:, None] @ A @ y[..., None]).squeeze(), largest, atol=1e-5, rtol=1e-5)


def test_a_ball_and_a_sphere_are_reached_from_their_centre():
    x = random(0, 4, 3)
    for constraint in ("equality", "inequality"):
        node = lpgd.Node(lambda x, y: (x * y).sum(), **{constraint: lambda x, y: y @ y - 1})
        torch.testing.assert_close(lpgd.NodeLayer(node)(x), -x / x.norm(dim=-1, keepdim=True))


def test_a_minimum_at_the_start_and_flat_functions_stay_there():
    x = random(0, 2, 3)
    for objective in (lambda x, y: y.square().sum() + 0 * x.sum(), lambda x, y: x.sum()):
        solution = lpgd.NodeLayer(lpgd.Node(objective)).solve(x)
        assert not solution.failed
        assert not solution.x.any()


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_newtons_method_minimises_functions_of_directions(n, scale):
    def cosine(x, start, y):
        return -(x @ y) / y.norm()

    x, start = random(n, 200, n), scale * random(n + 1, 200, n)
    node = lpgd.Node(cosine, initial=lambda x, start: start)
    solution = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm="newton")).solve(x, start)
    assert not solution.failed
    assert solution.iterations.max() <= 40
    direction, expected = (own / own.norm(dim=-1, keepdim=True) for own in (solution.x, x))
    torch.testing.assert_close(direction, expected, atol=1e-7, rtol=0)


def test_newtons_method_minimises_sums_of_functions_of_directions():
    def cosines(x, start, y):
        return -(x.view(2, 3) * torch.nn.functional.normalize(y.view(2, 3), dim=-1)).sum()

    x, start = random(0, 50, 6), random(1, 50, 6)
    solution = lpgd.NodeLayer(lpgd.Node(cosines, initial=lambda x, start: start)).solve(x, start)
    assert not solution.failed
    expected = -x.view(50, 2, 3).norm(dim=-1).sum(-1)
    torch.testing.assert_close(solution.objective, expected, atol=1e-12, rtol=1e-12)


# -- options that would lose their gradient -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda w: lpgd.nodes.RobustPooling("huber", alpha=w), "alpha"),
        (lambda w: lpgd.nodes.Projection("l2_ball", radius=w), "radius"),
    ],
)
def test_an_option_that_requires_a_gradient_is_refused(make, name):
    learned = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"(?s){name}.*requires a gradient"):
        lpgd.NodeLayer(make(learned))
    lpgd.NodeLayer(make(learned.item()))


# -- no minimum --------------------------------------------------------------------------------------------------------


def test_what_falls_without_limit_is_unbounded():
    x = random(0, 2, 3)
    nodes = {
        "linear": lpgd.Node(lambda x, y: (x * y).sum()),
        "on a hyperplane": lpgd.Node(lambda x, y: (x * y).sum(), equality=lambda x, y: y[0] - 1),
        "along a ray": lpgd.Node(lambda x, y: y[0] - 0 * x.sum(), inequality=lambda x, y: y[0] - 1),
    }
    for name, node in nodes.items():
        statuses = lpgd.NodeLayer(node).solve(x).statuses
        assert statuses == (lpgd.Status.UNBOUNDED,) * 2, name


def test_a_linear_objective_with_a_far_minimum_has_one():
    node = lpgd.Node(lambda x, y: (x * y).sum(), inequality=lambda x, y: y.abs() - 1e6)
    x = random(0, 2, 3)
    torch.testing.assert_close(lpgd.NodeLayer(node)(x), -1e6 * x.sign())


# -- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
def test_the_units_of_the_objective_change_neither_solution_nor_gradient(unit, dtype):
    nodes = [
        lpgd.Node(
            lambda x, y: unit * squared_distance(x, y), equality=lambda x, y: y.sum() - 1, inequality=lambda x, y: -y
        ),
        lpgd.Node(lambda x, y: unit * squared_distance(x, y), equality=lambda x, y: y @ y - 1),
    ]
    x, weights = random(0, 20, 6).to(dtype), random(1, 20, 6).to(dtype)
    for node, onto in zip(nodes, ("simplex", "l2_sphere"), strict=True):
        answers = []
        for layer in (lpgd.NodeLayer(node), lpgd.NodeLayer(lpgd.nodes.Projection(onto))):
            own = x.clone().requires_grad_()
            y = layer(own)
            answers.append((y.detach(), *torch.autograd.grad((y * weights).sum(), own)))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        for ours, expected in zip(*answers, strict=True):
            torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_multipliers_are_those_of_the_objective_as_it_is():
    node = lpgd.Node(lambda x, y: 1e-8 * squared_distance(x, y), equality=lambda x, y: y.sum() - 1)
    x = random(0, 3, 4)
    expected = 1e-8 * (x.sum(-1, keepdim=True) - 1) / 4  # y = x - ν/u, u the unit
    for algorithm in ("newton", "lbfgs", "scipy"):
        solution = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm=algorithm)).solve(x)
        torch.testing.assert_close(solution.point.nu, expected, atol=1e-13, rtol=0)
        assert float(solution.residual.max()) < 1e-12


# -- modes of PyTorch, and values that are not finite ---------------------------------------------------------------


def regression(A, b, y):
    return 0.5 * (A @ y - b).square().sum() + 0.1 * (y**4).sum()


@pytest.mark.parametrize(
    "node",
    [lpgd.nodes.LeastSquares(), lpgd.nodes.SphereLeastSquares(), lpgd.Node(regression, ndims=(2, 1), shape=(3,))],
    ids=lambda node: node.name,
)
def test_autocast_does_not_reach_the_solver(node):
    A, b = random(0, 4, 6, 3).float().requires_grad_(), random(1, 4, 6).float()
    expected = lpgd.NodeLayer(node)(A, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lpgd.NodeLayer(node)(A, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(own.sum(), A)[0] for own in (y, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_infinite_second_derivatives_are_an_error_that_names_the_elements():
    # √y at y = 0, where the constraint holds it
    node = lpgd.Node(
        lambda x, y: (x * y.clamp(min=0).sqrt()).sum() + y.square().sum(), solve=lambda x: torch.zeros_like(x)
    )
    x = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(node, lpgd.ImplicitKKT())(x)
    with (
        pytest.warns(lpgd.LpgdWarning, match="singular"),
        pytest.raises(lpgd.SolverError, match=r"not finite at the solutions of elements \[0, 1\]"),
    ):
        y.sum().backward()


def test_functions_without_a_derivative_at_the_start_fail_and_say_why():
    x = torch.ones(2, 3, dtype=torch.float64)
    distance = lpgd.Node(lambda x, y: (y.square().sum().sqrt() - x.sum()) ** 2)
    sphere = lpgd.Node(lambda x, y: (y - x).square().sum(), equality=lambda x, y: y.square().sum().sqrt() - 1)
    logarithm = lpgd.Node(lambda x, y: (x - y).sum() - y.log().sum())
    for node, role in ((distance, "objective"), (sphere, "constraints"), (logarithm, "objective")):
        with pytest.warns(lpgd.LpgdWarning, match=f"the {role} of <lambda>.* not finite where the solver starts"):
            assert lpgd.NodeLayer(node).solve(x).failed == [0, 1]
    inside = lpgd.Node(lambda x, y: (x * y).sum() - y.log().sum(), initial=lambda x: torch.ones(3))
    torch.testing.assert_close(lpgd.NodeLayer(inside)(x), 1 / x)


# -- what first users write -----------------------------------------------------------------------------------------


def test_a_variable_without_entries_and_a_name_with_an_underscore():
    x = random(0, 2, 3)
    assert lpgd.NodeLayer(lpgd.Node(lambda x, y: y.square().sum() + 0 * x.sum(), shape=(0,)))(x).shape == (2, 0)
    torch.testing.assert_close(lpgd.NodeLayer(lpgd.Node(lambda _, y: squared_distance(_, y)))(x), x)


class Energy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def forward(self, x, y):
        return squared_distance(self.weight * x, y)


def test_a_frozen_module_is_an_objective_and_one_that_learns_is_refused():
    energy, x = Energy(), random(0, 2, 3)
    with pytest.raises(ValueError, match=r"uses Energy\.weight, which requires a gradient"):
        lpgd.NodeLayer(lpgd.Node(energy))(x)
    energy.requires_grad_(False)
    torch.testing.assert_close(lpgd.NodeLayer(lpgd.Node(energy))(x), energy.weight * x)


def square(x, y):
    return (y - x).square().sum()


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (lpgd.Node(lambda x, y: 1.0), TypeError, "objective of <lambda> returned a float"),
        (lpgd.Node(lambda x, y: None), TypeError, "objective of <lambda> returned a NoneType"),
        (lpgd.Node(square, equality=lambda x, y: [y[0], y[1]]), TypeError, "equality of square returned a list"),
        (lpgd.Node(square, inequality=lambda x, y: y <= 1), TypeError, r"torch.bool values.*no comparison"),
        (lpgd.Node(lambda x, y: y.sum() if y.sum() > 0 else -y.sum()), RuntimeError, "torch.where in the place of"),
        (lpgd.Node(lambda x, y: y.square().sum() * x.sum().item()), RuntimeError, "no .item()"),
        (lpgd.Node(square, batched=True), ValueError, r"shape \(\) for a batch of 2"),
        (
            lpgd.Node(lambda x, y: (y - x).square().sum(-1), equality=lambda x, y: y.sum() - 1, batched=True),
            ValueError,
            r"equality of <lambda> has shape \(\) for a batch of 2",
        ),
        (lpgd.Node(square, initial=lambda x: torch.zeros(2)), ValueError, r"initial of square has shape \(2,\)"),
        (lpgd.Node(square, shape=3), TypeError, r"shape of y of square is 3; it must be a tuple"),
        (lpgd.Node(square, solve=lambda x: "done"), TypeError, "solver of square answered str"),
        (lpgd.Node(square, solve=lambda x: (x, 1)), TypeError, "solver of square answered tuple"),
        (lpgd.Node(square, solve=lambda x: x[0], batched=True), ValueError, r"answered shape \(3,\); with batched"),
    ],
)
def test_what_functions_return_is_looked_at(node, error, message):
    with pytest.raises(error, match=message):
        lpgd.NodeLayer(node).solve(random(0, 2, 3))


def test_a_batched_solver_of_the_users_own_may_leave_elements_unsolved():
    node = lpgd.Node(
        lambda x, y: (y - x).square().sum(-1), solve=lambda x: torch.where(x[:, :1] > 0, x, torch.nan), batched=True
    )
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]], dtype=torch.float64)
    assert lpgd.NodeLayer(node).solve(x).statuses == (lpgd.Status.SOLVED, lpgd.Status.NO_SOLUTION)


def test_the_fallback_of_lpgd_names_elements_by_their_places_in_the_batch():
    # Element 2 is flat along a direction: tilted, it is unbounded on both sides.
    A = random(0, 4, 3, 3)
    A[2] = 1.0
    x, v = random(1, 4, 3).requires_grad_(), random(2, 4, 3)
    node = lpgd.Node(lambda x, A, y: 0.5 * (A @ y - x).square().sum(), ndims=(1, 2))
    y = lpgd.NodeLayer(node, lpgd.LPGD(tau=1e-3))(x, A)
    with pytest.warns(lpgd.LpgdWarning) as warned:
        (gradient,) = torch.autograd.grad((y * v).sum(), x)
    assert all("elements [2]" in str(own.message) for own in warned)
    assert y.info.gradients[0].used == ["average", "average", "implicit, regularised", "average"]
    expected = torch.linalg.pinv(A).mT @ v[..., None]
    torch.testing.assert_close(gradient, expected[..., 0], atol=1e-6, rtol=1e-6)


def test_points_of_a_solver_that_are_no_solutions_are_named():
    def solve(x):
        return x + 0.3 if x.sum() > 0 else x

    node = lpgd.Node(lambda x, y: 1e-9 * (y - x).square().sum(), solve=solve)
    x = torch.stack([-torch.ones(3), torch.ones(3)]).double().requires_grad_()
    with pytest.warns(lpgd.LpgdWarning, match=r"elements \[1\] do not satisfy.*LPGD needs no smoothness"):
        lpgd.NodeLayer(node)(x).sum().backward()


@pytest.mark.parametrize("method", [None, lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-3)], ids=str)
def test_autocast_does_not_reach_the_backward_pass(method):
    layer = lpgd.NodeLayer(lpgd.nodes.SphereLeastSquares(), method)
    A, b = random(0, 4, 6, 3).float().requires_grad_(), random(1, 4, 6).float()
    (expected,) = torch.autograd.grad(layer(A, b)[:, 0].sum(), A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(layer(A, b)[:, 0].sum(), A)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_multiplier_of_zero_is_one_in_the_units_of_the_objective(scale):
    node = lpgd.Node(lambda x, y: scale * (y - x).square().sum(), inequality=lambda x, y: -y)
    x = torch.tensor([[1.0, -1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(node, lpgd.ImplicitKKT(weakly_active=False))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    assert y.info.gradients[0].used == ["implicit", "implicit, one-sided"]


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(("batched", "rows"), [(False, ""), (True, "7, ")])
def test_an_error_in_a_function_says_what_it_was_called_with(batched, rows, recording):
    def residual(A, b, y):  # y is a matrix, as A is: nothing else is said
        return ((A @ y[..., None])[..., 0] - b if batched else A @ y - b).square().sum(-1)

    layer = lpgd.NodeLayer(lpgd.Node(residual, ndims=(2, 1), batched=batched))
    with torch.set_grad_enabled(recording), pytest.raises(RuntimeError) as error:
        layer(random(0, 7, 4, 3), random(1, 7, 4))
    (note,) = error.value.__notes__
    assert f"In the objective of residual, called for {'a batch' if batched else 'one element'}" in note
    assert f"A ({rows}4, 3), b ({rows}4{'' if batched else ','}), y ({rows}4, 3)" in note
    assert "shape=" in note


def test_an_error_in_the_shape_says_what_it_was_called_with():
    node = lpgd.Node(lambda A, b, y: (A @ y - b).square().sum(), shape=lambda A, b: (A[1],))
    with pytest.raises(IndexError) as error:  # ndims=(2, 1) was forgotten
        lpgd.NodeLayer(node)(random(0, 7, 4, 3), random(1, 7, 4))
    (note,) = error.value.__notes__
    assert "called for one element with A (3,), b (4,). If an input should have other dimensions, type Node(" in note
    assert "one number for each of A, b: 0 for a number, 1 for a vector, 2 for a matrix; here they are (1, 1)" in note


def test_an_input_with_too_few_dimensions_says_what_to_type():
    node = lpgd.Node(lambda A, b, y: (A @ y - b).square().sum(), shape=(3,), ndims=(2, 1))
    with pytest.raises(ValueError, match=r"A has shape \(3,\).*2 dimensions.*type so: Node\(\.\.\., ndims=\(1, 1\)\)"):
        lpgd.NodeLayer(node)(random(0, 3), random(1, 4))
    with pytest.raises(
        ValueError, match=r"ndims is \(2,\); type one number for each of the inputs A, b, such as ndims"
    ):
        lpgd.Node(lambda A, b, y: (A @ y - b).square().sum(), ndims=(2,))


def test_a_number_is_a_constant_where_one_element_has_one_number():
    layer = lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising())
    x = random(0, 2, 5).float()
    found = layer(x, 0.25)
    assert found.dtype == torch.float32
    assert torch.equal(found, layer(x, torch.tensor(0.25)))
    with pytest.raises(TypeError, match="b is a float; pass a torch tensor"):
        lpgd.NodeLayer(lpgd.nodes.LeastSquares())(torch.eye(3), 1.0)
    with pytest.raises(TypeError, match=r"A is a NumPy array; pass a torch tensor: torch\.as_tensor\(A\)"):
        lpgd.NodeLayer(lpgd.nodes.LeastSquares())(np.eye(3), torch.ones(3))  # pyright: ignore[reportArgumentType]


ONES = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("node", "inputs", "hint"),
    [
        (
            lpgd.nodes.OptimalTransport(),
            (torch.rand(2, 3, 3, dtype=torch.float64), torch.tensor([[0.5, 0.5, 0.0], [1, 1, 1]]).double(), ONES),
            "element 0 of 2.*rows and columns must be at least zero, with the same positive sum",
        ),
        (lpgd.nodes.LeastSquares(), (torch.zeros(5, 3), torch.ones(5)), "A must have independent columns"),
        (lpgd.nodes.TotalVariationDenoising(), (ONES, torch.tensor([1.0, -1.0])), "element 1 of 2.*weight must not be"),
        (lpgd.nodes.Projection("l2_ball", None), (ONES, torch.tensor([0.0, 1.0])), "element 0 of 2.*radius must be"),
    ],
    ids=lambda part: getattr(part, "name", None),
)
def test_the_message_of_a_failure_says_what_the_node_needs(node, inputs, hint):
    inputs = tuple(part.double() for part in inputs)
    with pytest.raises(lpgd.SolverError, match=hint):
        lpgd.NodeLayer(node)(*inputs)
