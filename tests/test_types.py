"""What a type checker knows of a user's script: calls of layers have the types of their outputs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import cvxpy as cp
import torch
from torch import Tensor
from typing_extensions import assert_type

import lpgd
from lpgd.layers import ConicOutput, LayerOutput, ProgramOutput

P, q = torch.eye(2), torch.zeros(2)
x, c = cp.Variable(2), cp.Parameter(2)
assert_type(lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c))), [c], [x])(q), LayerOutput)
assert_type(lpgd.QPLayer()(P, q, lb=0.0), ProgramOutput)
assert_type(lpgd.QPLayer()(P, q).x, Tensor)
assert_type(lpgd.LPLayer()(q, lb=0.0, ub=1.0).z_box, Tensor)
assert_type(lpgd.ConicLayer(lpgd.Cones(nonnegative=2))(P, q, P, q), ConicOutput)
assert_type(lpgd.QPLayer().solve(P, q), lpgd.ConicSolution)
assert_type(lpgd.solve_qp(P, q).batch_shape, tuple[int, ...])

node = lpgd.NodeLayer(lpgd.nodes.Projection())(q)
path = lpgd.BlackboxLayer(lambda costs: costs < 0, lpgd.LPGD(tau=1.0))(q)
loss = lpgd.DirectLossLayer(min, min, min, min, lpgd.DirectLoss(1.0))(q, target=q)
tensors: list[Tensor] = [node, path, loss, node.square()]
names: list[str] = [output.info.solver for output in (node, path, loss)]
assert_type(node.info.statuses, tuple[lpgd.Status, ...])
"""

BAD = {
    "lpgd.QPLayer()(P, q, P, q)": "reportArgumentType",  # constraints have names
    "lpgd.QPLayer()(P, q, M=P)": "reportCallIssue",
    "lpgd.LPLayer()(3.0)": "reportArgumentType",
    "lpgd.NodeLayer(lpgd.nodes.Projection())([1.0])": "reportArgumentType",
    "lpgd.QPLayer()(P, q).w": "reportAttributeAccessIssue",
    "lpgd.QPLayer(on_error='skip')": "reportArgumentType",
}


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is in the extra dev only")
def test_the_types_of_calls_are_known(tmp_path: Path) -> None:
    head = "import torch\nimport lpgd\nP, q = torch.eye(2), torch.zeros(2)\n"
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(head + "\n".join(BAD))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(Path(__file__).parent.parent)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = [entry for entry in found if entry["severity"] == "error"]
    good = [entry for entry in errors if Path(entry["file"]).name == "good.py"]
    assert not good, good
    bad = {entry["range"]["start"]["line"] - 3: entry["rule"] for entry in errors}
    assert bad == dict(enumerate(BAD.values()))
