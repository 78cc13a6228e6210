"""Declarative nodes for :class:`lpgd.NodeLayer`: what each minimises, with its own solver and gradient."""

from lpgd.nodes.control.node import OptimalControl
from lpgd.nodes.eigen import EigenDecomposition, rayleigh_quotients
from lpgd.nodes.least_squares.node import LeastSquares
from lpgd.nodes.pooling.node import RobustPooling
from lpgd.nodes.pose.node import PerspectivePose
from lpgd.nodes.principal.node import PrincipalVector
from lpgd.nodes.projection import Projection
from lpgd.nodes.rotation import Rotation
from lpgd.nodes.spectral.node import SpectralFunction
from lpgd.nodes.sphere.less import LessDescent
from lpgd.nodes.sphere.node import SphereLeastSquares
from lpgd.nodes.total_variation import TotalVariationDenoising
from lpgd.nodes.transport.node import OptimalTransport
from lpgd.nodes.user import Node

__all__ = [
    "EigenDecomposition",
    "LeastSquares",
    "LessDescent",
    "Node",
    "OptimalControl",
    "OptimalTransport",
    "PerspectivePose",
    "PrincipalVector",
    "Projection",
    "RobustPooling",
    "Rotation",
    "SpectralFunction",
    "SphereLeastSquares",
    "TotalVariationDenoising",
    "rayleigh_quotients",
]
