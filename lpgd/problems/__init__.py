"""Problems: their data, the gradient of their Lagrangian, and how they tilt and augment."""

from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure
from lpgd.problems.linear import LinearData, LinearPoint, LinearProblem, LinearStructure

__all__ = [
    "ConicData",
    "ConicPoint",
    "ConicProblem",
    "ConicStructure",
    "LinearData",
    "LinearPoint",
    "LinearProblem",
    "LinearStructure",
    "SparsityPattern",
]
