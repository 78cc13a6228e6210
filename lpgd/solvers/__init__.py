"""Solvers: one interface, one file a backend."""

from lpgd.solvers.base import BaseSolver, Capabilities, Solver
from lpgd.solvers.choose import SOLVERS, Choice, Situation, available, choose_solver, preference
from lpgd.solvers.clarabel import Clarabel
from lpgd.solvers.custom import CustomSolver
from lpgd.solvers.daqp import DAQP
from lpgd.solvers.ecos import ECOS
from lpgd.solvers.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.highs import HiGHS
from lpgd.solvers.interior_point import InteriorPoint
from lpgd.solvers.node_solver import NodeSolver
from lpgd.solvers.osqp import OSQP
from lpgd.solvers.piqp import PIQP
from lpgd.solvers.proxqp import ProxQP
from lpgd.solvers.scs import SCS

__all__ = [
    "DAQP",
    "ECOS",
    "OSQP",
    "PIQP",
    "SCS",
    "SOLVERS",
    "BaseSolver",
    "Capabilities",
    "Choice",
    "Clarabel",
    "CustomSolver",
    "ElementwiseSolver",
    "HiGHS",
    "InteriorPoint",
    "NodeSolver",
    "Outcome",
    "Prepared",
    "ProxQP",
    "Situation",
    "Solver",
    "available",
    "choose_solver",
    "preference",
]
