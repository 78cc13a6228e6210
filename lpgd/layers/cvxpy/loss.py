"""CvxpyLoss: a convex loss of a layer's outputs, written in CVXPY, for envelopes of the loss itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, floats, from_numpy
from lpgd.gradients.losses import BatchRows, Loss, PosedLoss, PosedQuadratic, Reading, fitting
from lpgd.layers.cvxpy.layout import CanonicalProgram
from lpgd.layers.cvxpy.maps import Columns, DataMap
from lpgd.layers.inputs import batch_inputs
from lpgd.problems.base import States, maximum_norm
from lpgd.problems.conic.joined import Joined
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicStructure
from lpgd.problems.solution import AnyProblem
from lpgd.solvers.base import AnySolver
from lpgd.status import Status

if TYPE_CHECKING:
    import cvxpy as cp

__all__ = ["CvxpyLoss"]

_VALUES = threading.RLock()
"""CVXPY's expressions have their values in their variables and parameters: one thread at a time."""


class CvxpyLoss(Loss):
    """A convex loss of a layer's outputs, as an expression of CVXPY.

        x, target = cp.Variable(n), cp.Parameter(n)
        loss = lpgd.CvxpyLoss(cp.norm1(x - target), [x], [target])
        layer.gradient = lpgd.LPGD(tau=0.5, loss=loss.at(targets))
        loss.at(targets)(layer(...)).mean().backward()

    Args:
        expression: a scalar, convex by CVXPY's rules, and DPP in its parameters.
        variables: those that stand for the layer's outputs, in their order: of a :class:`~lpgd.CvxpyLayer` its own
            ``variables``, else x alone, a vector.
        parameters: all parameters of the expression, in the order of :meth:`at`.

    Raises:
        ValueError, TypeError: the expression is not of this kind.

    The upper envelope exists for losses that are quadratic (or affine), up to a τ at which the problem stays convex;
    other losses leave the lower one, with a warning.
    """

    def __init__(
        self, expression: cp.Expression, variables: Sequence[cp.Variable], parameters: Sequence[cp.Parameter] = ()
    ) -> None:
        import cvxpy as cp

        from lpgd.layers.cvxpy.canonical import canonicalise

        if not isinstance(expression, cp.Expression) or not expression.is_scalar() or not expression.is_convex():
            raise ValueError(f"{expression!r} is not a scalar CVXPY expression that is convex in its variables.")
        ids = {variable.id for variable in expression.variables()}
        if unknown := [found.name() for found in expression.variables() if all(found is not one for one in variables)]:
            raise ValueError(f"the loss depends on {', '.join(unknown)}: list every one in variables, as outputs.")
        self.expression, self.variables, self.parameters = expression, tuple(variables), tuple(parameters)
        self._used = [place for place, variable in enumerate(variables) if variable.id in ids]
        problem = cp.Problem(cp.Minimize(expression))
        program = canonicalise(problem, list(parameters), [variables[place] for place in self._used], gp=False)
        self._program = program
        self._maps = [DataMap(getattr(program, name)) for name in ConicData._fields]
        self._values: tuple[Tensor, ...] = ()
        self._data: ConicData | None = None
        self._batch: tuple[int, ...] = ()
        if not self.parameters:
            self._set(())

    def __repr__(self) -> str:
        return f"CvxpyLoss({self.expression})"

    def at(self, *values: Tensor) -> CvxpyLoss:
        """The loss with these values of its parameters, (*batch, *parameter.shape) each."""
        loss = copy.copy(self)
        loss._set(values)
        return loss

    def _set(self, values: tuple[Tensor, ...]) -> None:
        inputs = batch_inputs(self._program.parameters, values)
        with torch.no_grad():
            columns = Columns(self._program.parameters, inputs.tensors, inputs.batch_size)
            self._data = ConicData(*(data_map(columns) for data_map in self._maps))
        size = inputs.batch_size
        self._values = tuple(
            tensor.detach().double().expand(size, *layout.shape)
            if tensor.ndim == len(layout.shape)
            else tensor.detach().double()
            for tensor, layout in zip(inputs.tensors, self._program.parameters, strict=True)
        )
        self._batch = inputs.batch_shape

    def __call__(self, output: Any) -> Tensor:
        """The losses (*batch,) of a layer's output; where it has no gradient, CVXPY's subgradient."""
        whole: Sequence[Tensor] = (output,) if isinstance(output, Tensor) else output
        tensors = [whole[place] for place in self._used]
        shapes = [self.variables[place].shape for place in self._used]
        batch = tuple(tensors[0].shape[: tensors[0].ndim - len(shapes[0])])
        flat = torch.cat([tensor.reshape(*batch, -1) for tensor in tensors], -1)
        values = [
            value.reshape(*self._batch, *value.shape[1:]).expand(*batch, *value.shape[1:]).reshape(-1, *value.shape[1:])
            for value in self._checked()._values
        ]
        return cast(Tensor, _Evaluated.apply(self, values, flat.reshape(-1, flat.shape[-1]))).reshape(batch)

    def posed(self, readings: Sequence[Reading], as_rows: BatchRows) -> PosedLoss:
        data = cast(ConicData, self._checked()._data)
        program, used = self._program, [readings[place] if place < len(readings) else None for place in self._used]
        found: list[sp.csr_array] = []
        for reading, layout in zip(used, program.variables, strict=True):
            size = int(np.prod(layout.shape))
            entries = None if reading is None else int(cast(Any, reading).shape[0])
            if reading is None or entries != size:
                fault = "is none of the layer's primal outputs" if reading is None else f"has {entries} entries"
                raise ValueError(
                    f"the loss takes {layout.name} {layout.shape} in the place of an output that {fault}: variables "
                    "must be those of the layer, in its order."
                )
            found.append(reading)
        M = sp.csr_array(sp.vstack(found))
        N = sp.csr_array(sp.vstack([cast(Any, layout.primal) for layout in program.variables]))
        bound = ConicData(
            *(as_rows(datum.reshape(*self._batch, datum.shape[-1]), 1) if datum.ndim == 2 else datum for datum in data)
        )
        values = tuple(as_rows(value.reshape(*self._batch, *value.shape[1:]), value.ndim - 1) for value in self._values)
        square = _quadratic(program, bound, N)
        if square is not None:
            return PosedQuadratic(M, *square)
        return _PosedProgram(self, _structure(program), M, N, bound, values)

    def evaluated(self, u: FloatArray, values: Sequence[FloatArray]) -> tuple[float, FloatArray]:
        """The loss of one element, and its gradient or a subgradient, row by row.

        Args:
            u: the values of the variables in the loss, row by row, one after the other.
            values: those of the parameters.

        Raises:
            ValueError: there is none at this point.
        """
        chosen = [self.variables[place] for place in self._used]
        leaves: list[Any] = [*chosen, *self.parameters]
        with _VALUES:
            before = [leaf.value for leaf in leaves]
            start = 0
            try:
                for variable in chosen:
                    size = int(np.prod(variable.shape))
                    variable.save_value(u[start : start + size].reshape(variable.shape))
                    start += size
                for parameter, value in zip(self.parameters, values, strict=True):
                    cast(Any, parameter).save_value(value)
                slopes: Any = self.expression.grad
                value: Any = self.expression.value
            finally:
                for leaf, old in zip(leaves, before, strict=True):
                    leaf.save_value(old)
        gradient: list[FloatArray] = []
        for variable in chosen:
            slope = slopes.get(variable)
            if slope is None:
                raise ValueError(f"{self} has no gradient at {u}: it is outside of its domain, or at its edge.")
            dense = slope.toarray() if sp.issparse(slope) else np.asarray(slope)
            gradient.append(np.reshape(dense.ravel(order="F"), variable.shape, order="F").ravel())
        return float(np.asarray(value).item()), np.concatenate(gradient)

    def _checked(self) -> CvxpyLoss:
        if self._data is None:
            names = ", ".join(parameter.name() for parameter in self.parameters)
            raise ValueError(f"{self} has no values for {names}: give loss.at(values).")
        return self


class _Evaluated(torch.autograd.Function):
    """The losses of rows of outputs (B, r), by CVXPY."""

    @staticmethod
    def forward(ctx: Any, loss: CvxpyLoss, values: list[Tensor], flat: Tensor) -> Tensor:
        results = _evaluated(loss, values, flat)
        ctx.save_for_backward(results[1])
        return results[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, cotangents[0][:, None] * ctx.saved_tensors[0]


def _evaluated(loss: CvxpyLoss, values: Sequence[Tensor], flat: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the losses, and (B, r) their slopes, in the type of the outputs."""
    u = flat.detach().double().cpu().numpy()
    arrays = [value.double().cpu().numpy() for value in values]
    count = len(u)
    found = [loss.evaluated(u[k], [array[k % len(array)] for array in arrays]) for k in range(count)]
    results = torch.tensor([value for value, _ in found], dtype=torch.float64)
    slopes = from_numpy(np.stack([slope for _, slope in found])) if found else torch.zeros(u.shape)
    return results.to(flat), slopes.to(flat)


def _structure(program: CanonicalProgram) -> ConicStructure:
    return ConicStructure(
        program.quadratic, program.constraint, program.cones, program.lower_index, program.upper_index
    )


def _quadratic(program: CanonicalProgram, data: ConicData, N: sp.csr_array) -> tuple[Tensor, Tensor] | None:
    """H (r, r) and h of the loss as ``½ uᵀH u + <h, u>``, where its program has no inequalities and constant rows.

    Its rows and ``N w = u`` then determine ``w = G (b, u)``.
    """
    if program.cones.kinds - {"zero"} or program.lower_index.size or program.upper_index.size or data.A.ndim == 2:
        return None
    data = ConicData(*(datum.cpu() for datum in data))
    equalities = program.constraint.csc(data.A.numpy()).toarray()
    whole = np.vstack([equalities, cast(Any, N).toarray()])
    if np.linalg.matrix_rank(whole) < program.n:
        return None
    G = from_numpy(np.linalg.pinv(whole))
    of_b, of_u = G[:, : len(equalities)], G[:, len(equalities) :]
    P, shift = program.quadratic.to_dense(data.P), data.b @ of_b.mT
    H = of_u.mT @ P @ of_u
    Pd = shift @ P.mT if P.ndim == 2 else linalg.matvec(P, shift)
    return H, (data.q + Pd) @ of_u


@dataclass(frozen=True, eq=False, repr=False)
class _PosedProgram(PosedLoss):
    """A loss that is the minimum of a conic program over what is not ``u = M x``, ``N w = u``.

    Attributes:
        data: of the loss's program, and ``values`` of its parameters: shared, or with R rows.
    """

    loss: CvxpyLoss
    program: ConicStructure
    M: sp.csr_array
    N: sp.csr_array
    data: ConicData
    values: tuple[Tensor, ...]

    @cached_property
    def _joins(self) -> dict[bytes, Joined]:
        return {}

    def select(self, elements: Tensor) -> _PosedProgram:
        index = elements.cpu()
        on_cpu = (datum.cpu() for datum in self.data)
        data = ConicData(*(datum[index % len(datum)] if datum.ndim == 2 else datum for datum in on_cpu))
        values = tuple(
            value.cpu()[index % len(value)]
            if value.ndim > len(parameter.shape)
            else value.expand(len(index), *value.shape)
            for value, parameter in zip(self.values, self.loss.parameters, strict=True)
        )
        return replace(self, data=data, values=values, signs=None if self.signs is None else self.signs[elements])

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        M = cast(Any, self.M)
        u = from_numpy(x.detach().cpu().numpy() @ M.T)
        _, slopes = _evaluated(self.loss, self.values, u)
        return from_numpy(slopes.numpy() @ M).to(x), maximum_norm(slopes).to(x)

    def solve(
        self, problem: AnyProblem, steps: Tensor, states: States, solver: AnySolver, executor: Executor | None
    ) -> ConicSolution:
        if not isinstance(problem, ConicProblem):
            raise TypeError(
                "a CvxpyLoss is a conic program, which joins conic programs only: give nodes a lpgd.QuadraticLoss."
            )
        steps = self.signed(steps)
        key = problem.structure.digest
        if key not in self._joins:
            self._joins[key] = Joined(problem.structure, self.program, self.M, self.N)
        join = self._joins[key]
        data = ConicData(*(datum.to(problem.device) for datum in self.data))
        joined = join.problem(problem, data, steps.abs())
        found = fitting(solver, joined).solve(joined, (), executor)
        n, rows = problem.structure.n, from_numpy(join.rows).to(problem.device)
        # With the loss taken away, an objective that is not quadratic is not convex.
        statuses = tuple(
            status if step > 0 else Status.NOT_CONVEX
            for status, step in zip(found.statuses, floats(steps), strict=True)
        )
        lost = torch.full_like(steps, torch.nan)[:, None]
        keep = (steps > 0)[:, None]
        x, y, z, slack = (
            torch.where(keep, values, lost)
            for values in (found.x[:, :n], found.y[:, rows], found.z[:, :n], found.slack[:, rows])
        )
        return ConicSolution(
            problem, x, y, z, slack, statuses, found.iterations, found.setup_seconds, found.solve_seconds,
            (None,) * len(statuses), asked=found.asked, solvers=found.solvers, known_to=found.known_to,
        )  # fmt: skip
