"""Models with layers in them under ``torch.compile``: one break of the graph at the layer, and the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import lpgd
from tests.gradient_cases import CASES, COSTS, WEIGHTS


# The compiler asks non-leaf tensors for their .grad, and hides the warning from all but those who make it an error.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("layer", "expected"), CASES.values(), ids=CASES)
def test_a_compiled_model_breaks_once_and_has_the_same_gradient(
    layer: Any, expected: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def model(c: Tensor) -> Tensor:
        y = layer(2 * c)
        return (y * WEIGHTS[: max(y.numel(), 1)]).sum()

    for _ in range(3):
        c = COSTS.clone().requires_grad_()
        model(c).backward()
        torch.testing.assert_close(c.grad, 2 * expected(2 * COSTS), atol=1e-6, rtol=1e-6)
    # What is before the layer and what is behind it, and at most the work on constant arguments.
    assert len(graphs) <= 3
    assert capfd.readouterr() == ("", "")


class _Own(lpgd.QPLayer):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


EYE = torch.eye(3, dtype=torch.float64)
MAKERS: dict[str, Any] = {
    "QPLayer": lambda c: lpgd.QPLayer()(EYE, c).x,
    "of a user": lambda c: _Own()(EYE, c).x,
    "ConicLayer": lambda c: lpgd.ConicLayer(lpgd.Cones(nonnegative=1))(EYE, c, EYE[:1], EYE[0, :1] + 9).x,
    "NodeLayer": lambda c: lpgd.NodeLayer(lpgd.Node(lambda c, y: (y + c).square().sum()))(c),
}


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_layer_may_be_built_in_a_compiled_function(make: Any) -> None:
    torch.compiler.reset()
    model = torch.compile(lambda c: make(2 * c), backend="eager")
    c = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = model(c)
    torch.testing.assert_close(y, -2 * c)
    (gradient,) = torch.autograd.grad(y.sum(), c)
    torch.testing.assert_close(gradient, torch.full_like(c, -2.0))


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize(("layer", "_"), CASES.values(), ids=CASES)
def test_a_full_graph_is_refused_in_one_sentence(layer: Any, _: Any) -> None:
    torch.compiler.reset()
    model = torch.compile(lambda c: layer(2 * c), backend="eager", fullgraph=True)
    with pytest.raises(
        RuntimeError, match=r"calls solvers.*: compile with fullgraph=False, which breaks the graph once"
    ):
        model(COSTS)


class _Model(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, c: Tensor) -> Tensor:
        return self.layer(2 * c)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("layer", "_"), CASES.values(), ids=CASES)
def test_traces_and_exports_are_refused_in_one_sentence(layer: Any, _: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be traced or exported; save the module"):
        torch.jit.trace(_Model(layer), COSTS)
    with pytest.raises(RuntimeError, match="cannot be traced or exported; save the module"):
        torch.export.export(_Model(layer), (COSTS,), strict=False)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_under_autocast() -> None:
    torch.compiler.reset()
    linear, (layer, expected) = torch.nn.Linear(4, 4), CASES["QPLayer"]
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        linear.bias.zero_()
    model = torch.compile(lambda c: (layer(linear(c)) * WEIGHTS).sum(), backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        model(COSTS.float()).backward()
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad.double(), expected(COSTS), atol=0.05, rtol=0.01)


def test_the_compiler_is_imported_by_compilers_only() -> None:
    code = (
        "import sys, torch, lpgd\n"
        "q = torch.ones(2, requires_grad=True)\n"
        "lpgd.solve_qp(torch.eye(2), q, lb=0.0).x.sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
