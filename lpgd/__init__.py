"""Any optimization solver as a differentiable PyTorch layer, by Lagrangian Proximal Gradient Descent."""

from importlib.metadata import version

from lpgd import nodes, plotting
from lpgd.cones.product import Cones
from lpgd.diagnostics import (
    Envelopes,
    GradientCheck,
    GradientCheckError,
    Report,
    Sweep,
    diagnose,
    envelopes,
    gradcheck,
    sweep,
)
from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients import (
    LPGD,
    BlackboxBackprop,
    ClosedForm,
    DirectLoss,
    Domke,
    IgnoreConstraints,
    ImplicitKKT,
    LagrangianMirrorDescent,
    QuadraticLoss,
)
from lpgd.layers import (
    BlackboxLayer,
    ConicLayer,
    CvxpyLayer,
    CvxpyLoss,
    DirectLossLayer,
    LPLayer,
    NodeLayer,
    QPLayer,
    solve_conic,
    solve_lp,
    solve_qp,
)
from lpgd.nodes import Node
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.problems.conic.solution import ConicSolution
from lpgd.solvers import (
    DAQP,
    ECOS,
    OSQP,
    PIQP,
    SCS,
    Clarabel,
    CustomSolver,
    HiGHS,
    InteriorPoint,
    Moreau,
    NodeSolver,
    ProxQP,
    available,
)
from lpgd.status import LpgdWarning, MissingPackageError, SolverError, Status

__version__ = version("lpgd")

__all__ = [
    "DAQP",
    "ECOS",
    "LPGD",
    "OSQP",
    "PIQP",
    "SCS",
    "BlackboxBackprop",
    "BlackboxLayer",
    "Clarabel",
    "ClosedForm",
    "Cones",
    "ConicData",
    "ConicLayer",
    "ConicPoint",
    "ConicProblem",
    "ConicSolution",
    "ConicStructure",
    "CustomSolver",
    "CvxpyLayer",
    "CvxpyLoss",
    "DirectLoss",
    "DirectLossLayer",
    "Domke",
    "Envelopes",
    "GradientCheck",
    "GradientCheckError",
    "HiGHS",
    "IgnoreConstraints",
    "ImplicitKKT",
    "InteriorPoint",
    "LPLayer",
    "LagrangianMirrorDescent",
    "LpgdWarning",
    "MissingPackageError",
    "Moreau",
    "Node",
    "NodeLayer",
    "NodeSolver",
    "ProxQP",
    "QPLayer",
    "QuadraticLoss",
    "Report",
    "SerialExecutor",
    "SolverError",
    "SparsityPattern",
    "Status",
    "Sweep",
    "available",
    "diagnose",
    "envelopes",
    "gradcheck",
    "nodes",
    "plotting",
    "solve_conic",
    "solve_lp",
    "solve_qp",
    "sweep",
]
