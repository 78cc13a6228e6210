"""QPLayer on sparse matrices, batches and types: against dense matrices, loops and each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lpgd
from tests.layer_cases import close, leaf, normal, weighted
from tests.program_cases import DIMENSIONS, FINE, NAMES, NO_CUDA, SPARSE, gradients, program, solved

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")

# Sparse matrices


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("chosen", ["P", "A", "G", "AG", "PAG"])
def test_sparse_matrices_are_the_dense_ones_on_their_pattern(layout: str, chosen: str) -> None:
    data = program(3, n=5, m=2, k=3)
    for name, seed in (("P", 1), ("A", 2), ("G", 3)):
        data[name] = data[name][0] * (normal(*data[name].shape[1:], seed=20 + seed) > -0.5)
    data["P"] = data["P"] @ data["P"].mT + torch.eye(5)
    data["b"] = (data["A"] @ (data["lb"] + 0.1)[..., None])[..., 0]
    data["h"] = (data["G"] @ (data["lb"] + 0.1)[..., None])[..., 0] + 0.1
    dense = {name: leaf(part) for name, part in data.items()}
    mixed = {name: SPARSE[layout](part) if name in chosen else part for name, part in data.items()}
    mixed = {name: part.detach().requires_grad_() for name, part in mixed.items()}
    outputs, expected = solved(mixed), solved(dense)
    close(outputs, expected, 1e-8)
    own = torch.autograd.grad(weighted(outputs), list(mixed.values()))
    for name, one, other in zip(data, own, gradients(expected, list(dense.values())), strict=True):
        assert one.layout == mixed[name].layout
        pattern = data[name] != 0 if name in chosen else torch.ones_like(other)
        close([one.to_dense()], [other * pattern], 1e-7)


def test_the_quadratic_may_have_a_pattern_without_its_transpose() -> None:
    upper = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]).double()
    q = normal(3)
    for convert in SPARSE.values():
        P = convert(upper).requires_grad_()
        output = lpgd.solve_qp(P, q, solver_args=FINE)
        close([output.x], [torch.linalg.solve(0.5 * (upper + upper.mT), -q)], 1e-8)
        (gradient,) = torch.autograd.grad(output.x.sum(), P)
        x, adjoint = output.x.detach(), torch.linalg.solve(0.5 * (upper + upper.mT), torch.ones(3).double())
        full = -0.5 * (torch.outer(adjoint, x) + torch.outer(x, adjoint))
        close([gradient.to_dense()], [full * (upper != 0)], 1e-7)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "coo, patterns of their own"])
@pytest.mark.parametrize("batch", [(4,), (2, 2), (1,)])
def test_batches_of_sparse_matrices(layout: str, batch: tuple[int, ...]) -> None:
    data = program(*batch, n=5)
    mask = normal(*batch, 2, 5, seed=8) > -1 if "own" in layout else normal(2, 5, seed=8) > -1
    data["G"], data["h"] = data["G"] * mask, data["h"] + 1.0
    dense = {name: leaf(part) for name, part in data.items()}
    sparse = {**dense, "G": SPARSE[layout[:3]](data["G"]).requires_grad_()}
    outputs, expected = solved(sparse), solved(dense)
    close(outputs, expected, 1e-8)
    own = torch.autograd.grad(weighted(outputs), list(sparse.values()))
    wanted = gradients(expected, list(dense.values()))
    wanted[4] = wanted[4] * mask
    close([part.to_dense() for part in own], wanted, 1e-7)


def test_entries_that_are_stored_twice_are_added() -> None:
    indices, values = torch.tensor([[0, 0, 0], [2, 0, 2]]), torch.tensor([1.0, 2.0, 3.0]).double()
    A = torch.sparse_coo_tensor(indices, values, (1, 3), check_invariants=True).requires_grad_()
    dense = leaf(torch.tensor([[2.0, 0.0, 4.0]]).double())
    q, b = normal(3), torch.ones(1).double()
    outputs = [lpgd.solve_qp(torch.eye(3).double(), q, A=matrix, b=b, solver_args=FINE) for matrix in (A, dense)]
    close(outputs[0], outputs[1], 1e-9)
    own, expected = (torch.autograd.grad(weighted(out), m)[0] for out, m in zip(outputs, (A, dense), strict=True))
    close([own.to_dense()], [expected * torch.tensor([[1.0, 0.0, 1.0]])], 1e-8)


def test_gradients_of_sparse_leaves_accumulate() -> None:
    data = program(3)
    for convert in (SPARSE["coo"], SPARSE["csr"]):
        A = convert(data["A"][0]).requires_grad_()
        b = torch.zeros(1).double()
        for _ in range(2):
            weighted(solved({**data, "A": A, "b": b})).backward()
        dense = leaf(data["A"][0])
        (expected,) = gradients(solved({**data, "A": dense, "b": b}), [dense])
        assert A.grad is not None
        assert A.grad.layout == A.layout
        close([A.grad.to_dense()], [2 * expected], 1e-7)


# Batches

SHAPES = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3), (1, 1), (1, 3)])


@settings(max_examples=20)
@given(st.fixed_dictionaries({name: SHAPES for name in NAMES}), st.integers(0, 99), st.booleans())
def test_batches_are_loops(shapes: dict[str, tuple[int, ...]], seed: int, linear: bool) -> None:
    data = {name: leaf(part) for name, part in program(seed=seed).items()}
    data["q"] = leaf(3 * normal(*shapes["q"], 4, seed=seed))  # the rest vary little: still feasible
    for name, part in data.items():
        if name != "q":
            factor = 1 + 0.01 * normal(*shapes[name], *(1,) * DIMENSIONS[name], seed=seed + 1).abs()
            data[name] = leaf(part.detach() * factor)
    if linear:
        data["P"] = leaf(torch.zeros(*shapes["P"], 4, 4).double() + 1e-2 * torch.eye(4))
    batch = torch.broadcast_shapes(*shapes.values())
    layer = lpgd.QPLayer(solver_args=FINE)
    output = layer(**data)
    whole = {name: part.expand(*batch, *part.shape[part.ndim - DIMENSIONS[name] :]) for name, part in data.items()}
    elements = [layer(**{name: part[index] for name, part in whole.items()}) for index in np.ndindex(*batch)]
    expected = [torch.stack(parts).reshape(*batch, -1) for parts in zip(*elements, strict=True)]
    assert output.batch_shape == tuple(batch)
    close(output, expected, 1e-6)
    leaves = list(data.values())
    close(gradients(output, leaves), gradients(expected, leaves), 1e-4)


@dataclass(frozen=True)
class Counting(lpgd.Clarabel):
    """Clarabel, with a note of each set-up."""

    seen: list[int] = field(default_factory=list, compare=False)

    def prepare(self, form: Any) -> Any:
        self.seen.append(form.n)
        return super().prepare(form)


def test_shared_matrices_are_set_up_once() -> None:
    data, seen = program(), Counting().seen
    layer = lpgd.QPLayer(solver=Counting(seen=seen), executor=lpgd.SerialExecutor())
    for q in (normal(8, 4), normal(8, 4, seed=1), normal(2, 5, 4)):
        layer(**{**data, "q": q})
    assert len(seen) == 1
    data["A"] = data["A"] * torch.tensor([2.0, 3.0, 4.0]).double()[:, None, None]
    data["b"] = 0 * data["b"]
    output = layer(**{**data, "q": normal(4, 3, 4)})  # three matrices, each for four costs
    assert output.x.shape == (4, 3, 4)
    assert len(seen) == 4


@pytest.mark.parametrize("batch", [(0,), (1,), (2, 0), (1, 1)])
def test_batches_of_none_and_of_one(batch: tuple[int, ...]) -> None:
    data = {name: leaf(part.expand(*batch, *part.shape)) for name, part in program().items()}
    output = solved(data)
    assert [tuple(part.shape) for part in output] == [(*batch, 4), (*batch, 1), (*batch, 2), (*batch, 4)]
    weighted(output).backward()
    if 0 in batch:
        shared = leaf(program()["A"])
        weighted(solved({**data, "A": shared})).backward()
        assert shared.grad is not None
        assert not shared.grad.any()
    else:
        alone = {name: leaf(part) for name, part in program().items()}
        expected = gradients(solved(alone), list(alone.values()))
        close([part.grad.reshape(e.shape) for part, e in zip(data.values(), expected, strict=True)], expected, 1e-7)


def test_types_come_out_as_they_went_in() -> None:
    single = {name: leaf(part.float()) for name, part in program(2).items()}
    output = lpgd.solve_qp(**single)
    assert {part.dtype for part in output} == {torch.float32}
    assert {part.dtype for part in torch.autograd.grad(weighted(output), list(single.values()))} == {torch.float32}
    close([part.double() for part in output], lpgd.solve_qp(**{k: v.double() for k, v in single.items()}), 1e-5)
    mixed = lpgd.solve_qp(**{**single, "q": leaf(single["q"].double())})
    assert mixed.x.dtype == torch.float64
    sparse = SPARSE["csr"](single["A"].detach()[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(weighted(lpgd.solve_qp(**{**single, "A": sparse, "b": single["b"] * 0})), sparse)
    assert gradient.dtype == torch.float32
    with torch.no_grad():
        assert not any(part.requires_grad for part in lpgd.solve_qp(**single))


def test_nothing_that_was_passed_in_changes() -> None:
    data = program(3)
    before = copy.deepcopy(data)
    weighted(solved({name: part.requires_grad_() for name, part in data.items()})).backward()
    close(list(data.values()), list(before.values()), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_tensors_on_a_device_stay_there() -> None:
    data = {name: leaf(part.cuda()) for name, part in program(3).items()}
    data["A"], data["b"] = SPARSE["csr"](data["A"].detach()[0]).requires_grad_(), leaf(0 * data["b"])
    output = solved(data)
    parts = [*output, *torch.autograd.grad(weighted([part.cpu() for part in output]), list(data.values()))]
    assert {part.device.type for part in parts} == {"cuda"}
    cpu = {name: leaf(part.cpu()) for name, part in data.items()}
    expected = solved(cpu)
    close([part.cpu() for part in output], expected, 1e-7)
