"""When ignoring constraints descends: the conditions at a point against closed forms; and norms without a mask."""

from __future__ import annotations

import pytest
import torch

import lpgd
from lpgd.diagnostics import ignored_constraints
from tests.node_cases import random


def quadratic_under(A: torch.Tensor, H: torch.Tensor) -> lpgd.NodeLayer:
    """``min ½ yᵀHy - xᵀy`` subject to ``Ay = 0``: Z by hand, B = -I."""
    return lpgd.NodeLayer(
        lpgd.Node(lambda x, y: 0.5 * y @ H @ y - x @ y, equality=lambda x, y: A @ y), lpgd.IgnoreConstraints()
    )


def spread(*values: float, seed: int = 0) -> torch.Tensor:
    basis = torch.linalg.qr(random(seed, len(values), len(values))).Q
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT


def test_linear_constraints_have_the_bound_of_the_condition_number():
    A, H, v, x = random(1, 2, 5), spread(1.0, 1.5, 2.0, 3.0, 4.0), random(2, 6, 5), random(3, 6, 5)
    found = ignored_constraints(quadratic_under(A, H), [x], lambda y: (y * v).sum(-1))
    inverse = torch.linalg.inv(H)
    Z = inverse - inverse @ A.mT @ torch.linalg.inv(A @ inverse @ A.mT) @ A @ inverse
    torch.testing.assert_close(found.product, torch.einsum("bi,ij,jk,bk->b", v, Z, inverse, v), atol=1e-12, rtol=0)
    assert found.linear.all()
    assert found.convex.all()
    # M = H^(-1) here, with eigenvalues from 1/4 to 1, and |a|² = vᵀ Z v, |b|² = vᵀ H⁻¹ v - |a|².
    along = torch.einsum("bi,ij,bj->b", v, Z, v)
    across = torch.einsum("bi,ij,bj->b", v, inverse, v) - along
    bound = 0.25 * along - 0.5 * 0.75 * (along * across).sqrt()
    torch.testing.assert_close(found.bound, bound, atol=1e-12, rtol=0)
    assert (found.product >= found.bound).all()
    assert torch.equal(found.is_proven, found.ratio > found.needed)
    assert found.descends[found.is_proven].all()
    torch.testing.assert_close(found.ratio, (along / across).sqrt(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.needed, torch.full((6,), 1.5, dtype=torch.float64), atol=1e-10, rtol=0)
    # The mean over u: tr(P H⁻¹)/n = tr(H^½ Z H^½ H⁻¹)/n = tr(Z)/n
    torch.testing.assert_close(found.mean, Z.trace().expand(6) / 5, atol=1e-12, rtol=0)
    N = Z @ inverse
    worst = torch.linalg.eigvalsh(0.5 * (N + N.mT))[0]
    torch.testing.assert_close(found.worst, worst.expand(6), atol=1e-12, rtol=0)
    assert torch.equal(found.descends, found.product > 0)


def test_the_product_is_that_of_both_methods_gradients():
    A, H, v, x = random(1, 2, 5), spread(1.0, 1.5, 2.0, 3.0, 4.0), random(2, 6, 5), random(3, 6, 5)
    layer = quadratic_under(A, H)
    gradients = []
    for method in (lpgd.ImplicitKKT(), lpgd.IgnoreConstraints()):
        layer.gradient = method
        leaf = x.clone().requires_grad_()
        (layer(leaf) * v).sum().backward()
        gradients.append(leaf.grad)
    found = ignored_constraints(layer, [x], lambda y: (y * v).sum(-1))
    torch.testing.assert_close(found.product, (gradients[0] * gradients[1]).sum(-1), atol=1e-12, rtol=0)
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=-1)
    torch.testing.assert_close(found.cosine, cosine, atol=1e-12, rtol=0)


def test_projections_onto_linear_constraints_always_descend():
    A, v, x = random(1, 2, 5), random(2, 6, 5), random(3, 6, 5)
    found = ignored_constraints(quadratic_under(A, torch.eye(5).double()), [x], lambda y: (y * v).sum(-1))
    assert found.always_descends.all()
    torch.testing.assert_close(found.bound, found.product, atol=1e-12, rtol=0)  # M is the identity
    torch.testing.assert_close(found.needed, torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.mean, torch.full((6,), 0.6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_loss_across_the_constraints_can_ascend():
    """κ = 100: H⁻¹v has a component along the constraint that is opposite to the exact gradient's."""
    H = torch.tensor([[1.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    A = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    v = torch.tensor([[0.4, 1.0]], dtype=torch.float64)
    found = ignored_constraints(quadratic_under(A, H), [torch.ones(1, 2).double()], lambda y: (y * v).sum(-1))
    # Z = (1, -1)(1, -1)ᵀ / 101, and H⁻¹v = (0.4, 0.01): -0.6 · 0.39 / 101
    assert float(found.product) == pytest.approx(-0.6 * 0.39 / 101, abs=1e-15)
    assert not found.descends.any()
    assert float(found.bound) <= float(found.product)
    assert float(found.ratio) < float(found.needed)
    assert float(found.worst) < 0
    assert float(found.mean) > 0  # on average it descends


@pytest.mark.parametrize("length", [0.5, 2.0])
def test_normalisation_of_a_projection_descends_and_is_not_linear(length: float):
    """H = Ĥ + 2ν I = |x| I on the unit sphere: g · ĝ = |v across y|² / |x|."""
    x, v = torch.nn.functional.normalize(random(0, 4, 3), dim=-1) * length, random(1, 4, 3)
    layer = lpgd.NodeLayer(
        lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum(), lambda x, y: y @ y - 1.0, initial=lambda x: x)
    )
    found = ignored_constraints(layer, [x], lambda y: (y * v).sum(-1))
    y = x / length
    across = v - (v * y).sum(-1, keepdim=True) * y
    torch.testing.assert_close(found.product, across.square().sum(-1) / length, atol=1e-9, rtol=0)
    assert not found.linear.any()
    assert found.bound.isnan().all()
    assert found.always_descends.all()


def test_normalisation_of_an_eigenvector_can_ascend():
    """``min -½ yᵀAy`` on the sphere: Ĥ = -A is negative definite where H is not."""
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    v = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    found = ignored_constraints(lpgd.NodeLayer(lpgd.nodes.PrincipalVector()), [A], lambda y: (y * v).sum(-1))
    # g = (λI - A)†v yᵀ = e₂ e₁ᵀ and ĝ = -A⁻¹v yᵀ = -½ e₂ e₁ᵀ, both as symmetric matrices
    assert float(found.cosine) == pytest.approx(-1.0, abs=1e-9)
    assert not found.convex.any()
    assert not found.descends.any()


def test_other_layers_and_large_nodes_are_refused():
    with pytest.raises(TypeError, match="no NodeLayer"):
        ignored_constraints(lpgd.QPLayer(), [torch.eye(2), torch.ones(2)], lambda y: y.x.sum())  # pyright: ignore
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))
    with pytest.raises(ValueError, match="301 variables"):
        ignored_constraints(layer, [random(0, 1, 301)], lambda y: y.sum(-1))


@pytest.mark.parametrize("onto", ["l1_sphere", "l1_ball", "linf_sphere", "linf_ball"])
def test_norms_without_a_mask_have_the_derivative_of_the_norm_alone(onto):
    x = torch.tensor([[3.0, -2.0, 0.1, 0.0, 1.5], [0.1, 0.1, 0.0, -0.1, 0.05]], dtype=torch.float64)
    layer = lpgd.NodeLayer(lpgd.nodes.Projection(onto, None, masked=False))
    r = torch.ones(2, dtype=torch.float64)
    y = layer(x, r)
    torch.testing.assert_close(y, lpgd.NodeLayer(lpgd.nodes.Projection(onto))(x), atol=0, rtol=0)
    in_x, in_r = torch.autograd.functional.jacobian(layer, (x, r))
    for element in range(2):
        a = y[element].sign() if onto.startswith("l1") else y[element].sign() * (y[element].abs() >= 1.0)
        expected, along = torch.eye(5, dtype=torch.float64) - torch.outer(a, a) / (a @ a), a / (a @ a)
        if element == 1 and onto.endswith("ball"):
            expected, along = torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(in_x[element, :, element], expected, atol=1e-14, rtol=0)
        torch.testing.assert_close(in_r[element, :, element], along, atol=1e-14, rtol=0)


def test_the_mask_is_of_norms_that_have_one():
    with pytest.raises(ValueError, match="masked=False is for the L1 and L∞ norms"):
        lpgd.nodes.Projection("l2_sphere", masked=False)
