"""The page of public names, ``docs/api.md``: each with the first sentence of its docstring.

``python -m tests.api_page`` writes it.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import lpgd

__all__ = ["GROUPS", "PAGE", "page"]

PAGE = Path(__file__).parent.parent / "docs" / "api.md"

GROUPS: dict[str, tuple[str, ...]] = {
    "Layers": (
        "QPLayer", "LPLayer", "ConicLayer", "CvxpyLayer", "NodeLayer", "BlackboxLayer", "DirectLossLayer",
    ),
    "Layers as functions": ("solve_qp", "solve_lp", "solve_conic"),
    "Gradient methods": (
        "ImplicitKKT", "LPGD", "ClosedForm", "IgnoreConstraints", "LagrangianMirrorDescent", "BlackboxBackprop",
        "Domke", "DirectLoss",
    ),
    "Losses as functions, for LPGD": ("QuadraticLoss", "CvxpyLoss"),
    "Solvers": (
        "available", "Clarabel", "SCS", "InteriorPoint", "DAQP", "HiGHS", "PIQP", "OSQP", "ProxQP", "Moreau", "ECOS",
        "CustomSolver", "NodeSolver",
    ),
    "Is the gradient good": (
        "diagnose", "Report", "sweep", "Sweep", "gradcheck", "GradientCheck", "GradientCheckError", "envelopes",
        "Envelopes", "plotting",
    ),
    "Conic programs as data": (
        "Cones", "SparsityPattern", "ConicStructure", "ConicData", "ConicProblem", "ConicPoint", "ConicSolution",
    ),
    "Outcomes, errors, execution": (
        "Status", "SolverError", "LpgdWarning", "MissingPackageError", "SerialExecutor",
    ),
    "Declarative nodes": ("Node", "nodes"),
}  # fmt: skip
"""The names of ``lpgd.__all__``; those of ``lpgd.nodes`` follow, in the order of the alphabet."""


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring, in Markdown."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^\s.])\.\s+(?=[A-Z])", paragraph)[0].rstrip(".")
    sentence = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", sentence)
    return sentence.replace("``", "`") + "."


def line(module: ModuleType, name: str) -> str:
    """One line of the page."""
    return f"- `{module.__name__}.{name}`: {first_sentence(getattr(module, name))}"


def page() -> str:
    """The whole page."""
    lines = [
        "# Public names",
        "",
        "One line each; `help(lpgd.QPLayer)` has arguments, shapes, results and errors. `python -m tests.api_page`",
        "writes this page from the docstrings.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}", "", *(line(lpgd, name) for name in names)]
    nodes = sorted(set(lpgd.nodes.__all__) - set(lpgd.__all__))
    return "\n".join([*lines, *(line(lpgd.nodes, name) for name in nodes)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
