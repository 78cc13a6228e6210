"""Problems: their data, the gradient of their Lagrangian, and how they tilt and augment."""

from lpgd.problems.conic import ConicProblem
from lpgd.problems.linear import LinearData, LinearPoint, LinearProblem, LinearStructure
from lpgd.problems.sparsity import SparsityPattern
from lpgd.problems.structure import ConicData, ConicPoint, ConicStructure

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
