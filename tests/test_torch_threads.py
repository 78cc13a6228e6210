"""Torch's threads: what the library changes for a while is as it was afterwards, and linear algebra stays right."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import torch

import lpgd
from lpgd.execution.tasks import run_tasks
from lpgd.execution.threads import all_torch_threads, one_torch_thread, torch_threads


def test_a_number_of_threads_holds_inside_only() -> None:
    before = torch.get_num_threads()
    with torch_threads(3):
        assert torch.get_num_threads() == 3
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            with all_torch_threads():
                assert torch.get_num_threads() == 3
            with one_torch_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_other_threads_do_not_see_it() -> None:
    seen: list[int] = []
    with torch_threads(torch.get_num_threads() + 1):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [torch.get_num_threads() - 1]


def test_tasks_have_one_thread() -> None:
    with torch_threads(2):
        assert run_tasks(lambda _: torch.get_num_threads(), [0, 1, 2], None) == [1, 1, 1]
        assert torch.get_num_threads() == 2


LU = """
import sys, torch, lpgd

def errors(count):
    matrices = torch.randn(count, 5, 200, 200, dtype=torch.float64)
    for matrix in matrices:
        right = matrix @ torch.ones(200, 1, dtype=torch.float64)
        yield float((torch.linalg.solve(matrix, right) - 1).abs().max())

torch.manual_seed(0)
one = torch.ones(1, 1, dtype=torch.float64)
layer = lpgd.QPLayer()
layer(one, one[0], G=-one, h=one[0]).x
assert torch.get_num_threads() == 2
assert max(errors(10)) < 1e-6, "after a call of a layer"

torch.set_num_threads(2)  # torch's own LU is wrong from here on
node = lpgd.Node(lambda A, b, y: 0.5 * y @ (A @ y) - b @ y + 0.25 * (y**4).sum(), ndims=(2, 1), shape=lambda A, b: b)
root = torch.randn(5, 200, 200, dtype=torch.float64)
A = root @ root.mT / 200 + torch.eye(200, dtype=torch.float64)
b = torch.randn(5, 200, dtype=torch.float64).requires_grad_()
y = lpgd.NodeLayer(node)(A, b)
(gradient,) = torch.autograd.grad(y.sum(), b)
hessian = A + torch.diag_embed(3 * y.detach() ** 2)
assert float(((hessian @ gradient[..., None])[..., 0] - 1).abs().max()) < 1e-9, "in a node"
"""


def test_lu_factors_of_batches_are_right_after_a_call_and_in_nodes() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LU],
        env={**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_layers_leave_the_number_of_threads_alone() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with torch_threads(2):
        lpgd.NodeLayer(lpgd.nodes.Projection())(x).sum().backward()
        eye = torch.eye(3, dtype=torch.float64)
        lpgd.QPLayer()(eye, x, G=eye, h=torch.ones(3, dtype=torch.float64)).x.sum().backward()
        assert torch.get_num_threads() == 2
