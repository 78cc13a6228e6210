"""How far a call walks: frames of ours on the deepest stack, and files of ours on the way.

``python -m benchmarks.walk`` prints a table; no time is measured.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import cvxpy as cp
import torch

import lpgd

__all__ = ["main", "walk"]

ROOT = str(Path(lpgd.__file__).parent)


def walk(call: Callable[[], Any]) -> tuple[list[str], set[str]]:
    """The deepest stack of a call, functions of this library only, and the files that it enters."""
    deepest: list[str] = []
    files: set[str] = set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        nonlocal deepest
        if event != "call" or not frame.f_code.co_filename.startswith(ROOT):
            return
        files.add(frame.f_code.co_filename)
        stack, here = [], frame
        while here is not None:
            code = here.f_code
            if code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
                stack.append(f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_name}")
            here = here.f_back
        if len(stack) > len(deepest):
            deepest = stack[::-1]

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return deepest, files


def calls() -> dict[str, Callable[[], Any]]:
    """The calls that are looked at, each after a first one that imports and prepares."""
    P, q = torch.eye(5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    qp = lpgd.QPLayer(gradient=lpgd.LPGD(tau=0.1), executor=lpgd.SerialExecutor())
    output = qp(P, q, lb=0.0)
    again = qp(P, q, lb=0.0)
    output.x.sum().backward()
    x, a = cp.Variable(3), cp.Parameter(3)
    cvxpy_layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x], executor=lpgd.SerialExecutor()
    )
    value = torch.randn(4, 3, dtype=torch.float64)
    cvxpy_layer(value)
    node_layer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))
    node_layer(value)
    return {
        "QPLayer, forward": lambda: qp(P, q, lb=0.0),
        "QPLayer, backward by LPGD": lambda: again.x.sum().backward(),
        "CvxpyLayer, forward": lambda: cvxpy_layer(value),
        "NodeLayer, forward": lambda: node_layer(value),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.autograd.set_multithreading_enabled(False)  # the backward pass runs where it is watched
    for name, call in calls().items():
        deepest, files = walk(call)
        print(f"{name}: {len(deepest)} frames in {len(files)} files")
        for frame in deepest:
            print(f"    {frame}")


if __name__ == "__main__":
    main()
