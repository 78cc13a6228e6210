"""How tensors become the data of a conic program, and its solution the user's variables: plain arrays only.

What :func:`lpgd.layers.cvxpy.canonical.canonicalise` finds out about a CVXPY problem, once, is written down here
without a CVXPY object in it, so that it pickles, crosses processes and cannot change under a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import FloatArray, IntArray
from lpgd.cones.product import Cones
from lpgd.problems.conic.sparsity import SparsityPattern

__all__ = ["AffineMap", "CanonicalProgram", "ParameterLayout", "VariableLayout"]


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """Where one parameter's entries stand in the parameter vector θ.

    ``θ[columns] = t.reshape(-1)[take]`` for a tensor ``t`` of this ``shape``, of which the logarithm is
    taken first where ``log`` is true.

    Args:
        name: the parameter's name, for messages.
        shape: shape of the user's tensor.
        columns: its entries of θ; empty for a parameter that does not reach the problem's data.
        take: index of each of those entries in the tensor flattened row by row.  A symmetric, positive or
            negative semidefinite parameter is read in the upper triangle of ``½ (t + tᵀ)``, so that its gradient is
            symmetric; a diagonal one on its diagonal, a sparse one on its pattern: other entries are not looked at.
        log: geometric programs are affine in the logarithm of a parameter.
        attributes: names of the attributes CVXPY has for it (``"symmetric"``, ``"PSD"``, ``"diag"``, ``"pos"``, ...).
    """

    name: str
    shape: tuple[int, ...]
    columns: slice
    take: IntArray
    log: bool = False
    attributes: frozenset[str] = frozenset()

    @property
    def symmetric(self) -> bool:
        """Whether only symmetric matrices are meant."""
        return not self.attributes.isdisjoint(("symmetric", "PSD", "NSD", "hermitian"))


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A vector of problem data as a function of the parameter vector: ``matrix @ (θ, 1)``.

    Args:
        matrix: (rows, p + 1); its last column is the constant.
        parameters: the k parameters, whose columns follow one another.
    """

    matrix: sp.csr_array
    parameters: tuple[ParameterLayout, ...]

    def __call__(self, theta: FloatArray) -> FloatArray:
        """The data at one parameter vector: (p,) to (rows,)."""
        return self.matrix @ np.append(theta, 1.0)

    @cached_property
    def reaching(self) -> frozenset[int]:
        """The parameters, by position, that these data depend on."""
        ends = [layout.columns.stop for layout in self.parameters]
        owners = np.searchsorted(ends, np.unique(self.matrix.indices), side="right")  # of the constant there is none
        return frozenset(owners[owners < len(ends)].tolist())


@dataclass(frozen=True, eq=False)
class VariableLayout:
    """How one of the user's variables is read off a solution ``(x, y, z)`` of the conic program.

    In row-by-row order its entries are ``primal @ x`` or, for the dual variable of a constraint,
    ``dual @ y + lower @ max(-z, 0) + upper @ max(z, 0)``: y are the multipliers of the rows, z the signed
    ones of the bounds (``P x + q + Aᵀ y + z = 0``), positive at an upper and negative at a lower bound.
    With ``exp`` the exponential of the result is meant (geometric programs).

    Args:
        name: the variable's name, for messages.
        shape: shape of its value.
        primal: (size, n), or None for a dual variable.
        dual: (size, m), or None for a primal variable.
        lower, upper: (size, n), or None where no bound stands for a row of its constraint.
        exp: whether the exponential is taken.
    """

    name: str
    shape: tuple[int, ...]
    primal: sp.csr_array | None = None
    dual: sp.csr_array | None = None
    lower: sp.csr_array | None = None
    upper: sp.csr_array | None = None
    exp: bool = False

    def read(self, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        """The variable's value at one solution: x (n,), y (m,), z (n,)."""
        value = np.zeros(int(np.prod(self.shape)))
        terms = ((self.primal, x), (self.dual, y), (self.lower, np.maximum(-z, 0.0)), (self.upper, np.maximum(z, 0.0)))
        for matrix, vector in terms:
            if matrix is not None:
                value = value + matrix @ vector
        return (np.exp(value) if self.exp else value).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class CanonicalProgram:
    """A parametrised convex problem in conic form.

    minimise ½ xᵀ P x + qᵀ x  subject to  A x + s = b, s ∈ K, lower ≤ x ≤ upper, where P, q, A, b, lower and
    upper are affine in the parameter vector θ, p entries long.  The user's objective is
    ``sign * (½ xᵀ P x + qᵀ x + offset)``, of a geometric program the exponential of that.

    Args:
        n: number of variables.
        cones: K, whose m rows are those of A.
        quadratic: (n, n) pattern of P, both triangles.
        constraint: (m, n) pattern of A.
        lower_index, upper_index: the variables that have such a bound, increasing.
        integer_index: the variables that take whole numbers only, increasing; of a boolean one the bounds are 0 and 1.
        P, A: to the values on their patterns; P's are those of a symmetric matrix.
        q: to (n,).
        b: to (m,).
        lower, upper: to one value for each of ``lower_index`` and ``upper_index``; it may be infinite.
        offset: to (1,), the constant of the objective.
        sign: 1.0, or -1.0 where the user maximises.
        parameters: in the order they were given.
        variables: in the order they were asked for.
    """

    n: int
    cones: Cones
    quadratic: SparsityPattern
    constraint: SparsityPattern
    lower_index: IntArray
    upper_index: IntArray
    integer_index: IntArray
    P: AffineMap
    q: AffineMap
    A: AffineMap
    b: AffineMap
    lower: AffineMap
    upper: AffineMap
    offset: AffineMap
    sign: float
    parameters: tuple[ParameterLayout, ...]
    variables: tuple[VariableLayout, ...]

    @property
    def p(self) -> int:
        """The length of the parameter vector."""
        return max((layout.columns.stop for layout in self.parameters), default=0)

    @property
    def idle(self) -> frozenset[int]:
        """The parameters, by position, that no data depend on."""
        data = self.P, self.q, self.A, self.b, self.lower, self.upper
        return frozenset(range(len(self.parameters))).difference(*(datum.reaching for datum in data))
