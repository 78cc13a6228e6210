"""Problems: their data, the gradient of their Lagrangian, and how they tilt and augment."""

from lpgd.problems.conic import ConicData, ConicPoint, ConicProblem, ConicStructure
from lpgd.problems.sparsity import SparsityPattern

__all__ = ["ConicData", "ConicPoint", "ConicProblem", "ConicStructure", "SparsityPattern"]
