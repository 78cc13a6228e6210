"""Nodes where torch's machinery is around them: checkpoints, hooks on saved tensors, processes made by fork."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lpgd
from lpgd.gradients import ClosedForm, GradientMethod
from tests.node_cases import random


def squares(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - x).square().sum() + 0.1 * (y**4).sum()


NODES = {
    "constrained": lpgd.Node(squares, equality=lambda x, y: (y.sum() - 1.0)[None]),
    "free": lpgd.Node(squares),
    "pooling": lpgd.nodes.RobustPooling("welsch", dim=1, vector_dim=2),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [ClosedForm(), lpgd.ImplicitKKT(), lpgd.LPGD()], ids=str)
@pytest.mark.parametrize("kind", NODES)
def test_checkpoints_give_the_same_gradient(kind: str, method: GradientMethod, reentrant: bool):
    layer = lpgd.NodeLayer(NODES[kind], method)
    x = random(0, 3, 4, 2)[..., 0] if kind != "pooling" else random(0, 3, 4, 2)
    x.requires_grad_()
    layer(2 * x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(lambda x: layer(2 * x).square(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("kind", NODES)
def test_saved_tensors_may_be_kept_elsewhere(kind: str, backward_inside: bool):
    layer = lpgd.NodeLayer(NODES[kind])
    x = random(0, 3, 4, 2)[..., 0] if kind != "pooling" else random(0, 3, 4, 2)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(2 * x).square().sum(), x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.cpu()

    def hooks() -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    with torch.autograd.graph.save_on_cpu():
        y = layer(2 * x).square()
    with hooks() if backward_inside else nullcontext():
        (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, expected)
    with hooks():
        layer(2 * x)
        count = len(packed)
        _ = x * x  # the caller's hooks are on again
    assert len(packed) > count


def test_second_derivatives_under_hooks():
    layer = lpgd.NodeLayer(NODES["constrained"])
    x = random(0, 3, 4).requires_grad_()

    def twice() -> Tensor:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = twice()
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(twice(), expected)


FORK = """
import multiprocessing
import torch
import lpgd

node = lpgd.Node(lambda x, y: (0.5 * (y - x) ** 2 + 0.1 * y**4).sum(), equality=lambda x, y: (y.sum() - 1.0)[None])

def work():
    x = torch.linspace(-1, 1, 240, dtype=torch.float64).reshape(12, 20).requires_grad_()
    lpgd.NodeLayer(node)(x).square().sum().backward()
    return x.grad

def child(queue):
    queue.put(work().tolist())

if __name__ == "__main__":
    assert torch.get_num_threads() == 2
    torch.randn(200000).exp().sum()  # the threads are there
    expected = work()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    try:
        assert torch.allclose(torch.tensor(queue.get(timeout=60), dtype=torch.float64), expected)
    finally:
        process.kill()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_does_not_wait_for_threads_that_are_gone():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=120, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_without_gradients_there_is_no_graph_and_tangents_still_flow():
    x, tangent = random(0, 3, 4), random(1, 3, 4)
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l2_sphere"))
    size = x.norm(dim=-1, keepdim=True)
    y = x / size
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert not layer(x.requires_grad_()).requires_grad
        dual = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x.detach(), tangent)))
    torch.testing.assert_close(dual.primal, y.detach())
    expected = (tangent - y * (y * tangent).sum(-1, keepdim=True)) / size
    torch.testing.assert_close(dual.tangent, expected.detach())


CALLS = (((4,), torch.float64), ((1, 4), torch.float32), ((4, 1), torch.float64), ((2, 3, 4), torch.float64))


def test_calls_of_many_shapes_and_types_are_told_apart():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l2_ball"))
    for _ in range(2):  # the second time a form of the call is known
        for shape, dtype in CALLS:
            x = torch.full(shape, 2.0, dtype=dtype)
            y = layer(x)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            torch.testing.assert_close(y, x / x.norm(dim=-1, keepdim=True))
        with pytest.raises(TypeError, match="int64"):
            layer(torch.ones(4, dtype=torch.int64))
        with pytest.raises(ValueError, match="no coordinates"):
            layer(torch.ones(2, 0))
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
