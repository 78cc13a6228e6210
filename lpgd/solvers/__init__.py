"""Solvers: one interface, one file a backend."""

from lpgd.solvers.backends.clarabel import Clarabel
from lpgd.solvers.backends.custom import CustomSolver
from lpgd.solvers.backends.daqp import DAQP
from lpgd.solvers.backends.ecos import ECOS
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.highs import HiGHS
from lpgd.solvers.backends.moreau import Moreau
from lpgd.solvers.backends.osqp import OSQP
from lpgd.solvers.backends.piqp import PIQP
from lpgd.solvers.backends.proxqp import ProxQP
from lpgd.solvers.backends.scs import SCS
from lpgd.solvers.base import Capabilities, ConicSolver, Solver
from lpgd.solvers.choose import Choice, available, choose_solver
from lpgd.solvers.interior_point.solver import InteriorPoint
from lpgd.solvers.node.solver import NodeSolver
from lpgd.solvers.ranking import SOLVERS, Situation, preference

__all__ = [
    "DAQP",
    "ECOS",
    "OSQP",
    "PIQP",
    "SCS",
    "SOLVERS",
    "Capabilities",
    "Choice",
    "Clarabel",
    "ConicSolver",
    "CustomSolver",
    "ElementwiseSolver",
    "HiGHS",
    "InteriorPoint",
    "Moreau",
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
