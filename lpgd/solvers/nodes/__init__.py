"""Declarative nodes with their own solvers, one file a node."""

from lpgd.solvers.nodes.projection import Projection
from lpgd.solvers.nodes.robust_pooling import RobustPooling
from lpgd.solvers.nodes.user import Node

__all__ = ["Node", "Projection", "RobustPooling"]
