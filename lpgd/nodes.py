"""Declarative nodes for :class:`lpgd.NodeLayer`: what each minimises, with its own solver and gradient."""

from lpgd.solvers.nodes.eigen import EigenDecomposition, rayleigh_quotients
from lpgd.solvers.nodes.least_squares import LeastSquares
from lpgd.solvers.nodes.matrix_function import matrix_function
from lpgd.solvers.nodes.principal_vector import PrincipalVector
from lpgd.solvers.nodes.projection import Projection
from lpgd.solvers.nodes.robust_pooling import RobustPooling
from lpgd.solvers.nodes.sphere import SphereLeastSquares
from lpgd.solvers.nodes.total_variation import TotalVariationDenoising
from lpgd.solvers.nodes.transport import OptimalTransport
from lpgd.solvers.nodes.user import Node

__all__ = [
    "EigenDecomposition",
    "LeastSquares",
    "Node",
    "OptimalTransport",
    "PrincipalVector",
    "Projection",
    "RobustPooling",
    "SphereLeastSquares",
    "TotalVariationDenoising",
    "matrix_function",
    "rayleigh_quotients",
]
