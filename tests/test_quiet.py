"""Nothing is printed unless it is asked for: looked at from outside of the process, where C prints too."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from contextlib import redirect_stdout

import pytest

from lpgd.execution.quiet import quiet

EVERY_SOLVER = """
import math, warnings
import torch
import lpgd

warnings.simplefilter("ignore")
P, q, indefinite = torch.eye(2).double(), torch.tensor([[0.1, 0.2], [3.0, -4.0]]).double(), -torch.eye(2).double()
for name in lpgd.available():
    limit = {} if name in ("PIQP", "PROXQP", "ECOS") else {"time_limit": math.inf}
    layer = lpgd.QPLayer(name, lpgd.LPGD(tau=0.1, rho=0.1), solver_args=limit, on_error="nan")
    costs = q.clone().requires_grad_()
    output = layer(P, costs, lb=-1.0, ub=1.0)  # one element without active bounds
    assert set(output.info.statuses) == {lpgd.Status.SOLVED}, name
    output.x.sum().backward()
    layer(indefinite, q, lb=-1.0, ub=1.0)
    infeasible = {"G": torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double(), "h": -torch.ones(2).double()}
    layer(P, q, **infeasible)
    if name != "PROXQP":
        lpgd.LPLayer(name, lpgd.LPGD(tau=0.1), on_error="nan")(q, lb=-1.0, ub=1.0)
lpgd.LPLayer(gradient=lpgd.LPGD(tau=0.1), integer=[0])(q, lb=-1.5, ub=1.5)
"""

VERBOSE = """
import torch
import lpgd

P, q = torch.eye(2).double(), torch.ones(2).double()
for solver in (lpgd.OSQP(verbose=True), lpgd.SCS(verbose=True), lpgd.HiGHS(verbose=True)):
    print(solver.name, flush=True)
    lpgd.QPLayer(solver)(P, q, lb=-3.0, ub=3.0)
"""


def outputs(code: str) -> tuple[str, str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_no_solver_prints() -> None:
    assert outputs(EVERY_SOLVER) == ("", "")


def test_solvers_print_where_they_are_asked_to() -> None:
    text, _ = outputs(VERBOSE)
    assert "Polishing not needed" in text
    assert "SCS v3" in text
    assert "HiGHS" in text.split("HIGHS")[1]


def test_other_threads_print_on() -> None:
    stream, inside, done = io.StringIO(), threading.Event(), threading.Event()

    def silent() -> None:
        with quiet(), quiet():
            print("not this")
            inside.set()
            done.wait(10)
            print("nor this")

    with redirect_stdout(stream):
        thread = threading.Thread(target=silent)
        thread.start()
        inside.wait(10)
        print("this", flush=True)
        done.set()
        thread.join(10)
        assert sys.stdout is stream
        print("and this")
        with quiet(False):
            print("and that")
        with pytest.raises(ValueError, match="x"), quiet():
            raise ValueError("x")
        assert sys.stdout is stream
    assert stream.getvalue() == "this\nand this\nand that\n"
