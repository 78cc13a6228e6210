"""Declarative nodes with their own solvers, one file a node."""

from lpgd.solvers.nodes.least_squares import LeastSquares
from lpgd.solvers.nodes.projection import Projection
from lpgd.solvers.nodes.robust_pooling import RobustPooling
from lpgd.solvers.nodes.sphere import SphereLeastSquares
from lpgd.solvers.nodes.total_variation import TotalVariationDenoising
from lpgd.solvers.nodes.user import Node

__all__ = ["LeastSquares", "Node", "Projection", "RobustPooling", "SphereLeastSquares", "TotalVariationDenoising"]
