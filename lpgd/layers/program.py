"""What layers of quadratic and linear programs share: reading their arguments, and their outputs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lpgd.cones.product import Cones
from lpgd.execution.threads import one_torch_thread
from lpgd.gradients import GradientMethod
from lpgd.layers.base import OptimizationLayer, Recorded, WarmStart
from lpgd.layers.explanations import Argument, explanation
from lpgd.layers.inputs import MATRIX_LAYOUTS, Batch, Expected, check_inputs, is_number
from lpgd.layers.matrices import Pattern, Plan, join, plan, read_matrix
from lpgd.problems.conic.solution import Violation
from lpgd.problems.conic.structure import ConicData, ConicStructure
from lpgd.solvers import ConicSolver
from lpgd.solvers.failures import Explain, OnError

__all__ = ["Bound", "ProgramLayer", "ProgramOutput"]


class _ProgramFields(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    z_box: Tensor


class ProgramOutput(_ProgramFields, Recorded):
    """A solution of a quadratic or linear program, and the record of the call in ``info``.

    Attributes:
        x: (*batch, n) the minimiser.
        y: (*batch, m) multipliers of ``A x = b``.
        z: (*batch, k) multipliers of ``G x ≤ h``, nonnegative; of ``l ≤ G x ≤ h`` positive at an upper and negative at
            a lower end.
        z_box: (*batch, n) multipliers of the bounds: positive at an upper, negative at a lower bound.
    """


class _Call(NamedTuple):
    """The arguments of a call as a batch of conic programs."""

    batch: Batch
    structure: ConicStructure
    data: ConicData
    sizes: tuple[int, int]  # m, k
    explain: Explain


class _Frame(NamedTuple):
    """What tensors of the same kinds and shapes have in common."""

    batch: Batch
    plan: Plan | None


KEPT_FRAMES = 64
"""So many of them are known."""
_frames: dict[Any, _Frame] = {}


Bound = Tensor | float | None
"""A vector, one number for all of its entries, or nothing."""


class ProgramLayer(OptimizationLayer):
    """What the two layers share: A and G are stacked, zero rows first, and bounds stay bounds."""

    _has_quadratic: bool

    def __init__(
        self,
        solver: ConicSolver | str | None = None,
        gradient: GradientMethod | None = None,
        solver_args: Mapping[str, object] | None = None,
        on_error: OnError = "raise",
        executor: Executor | None = None,
        integer: Sequence[int] = (),
        progress: bool = False,
    ) -> None:
        self._integer = _index_set(integer)
        one, integer = Pattern((1, 1)), (0,) if self._integer else ()
        quadratic = one if self._has_quadratic else None
        small = plan(1, Cones(1, 1), quadratic, (one, one), has_lower=True, has_upper=True, integer=integer)
        super().__init__(small.structure, solver, gradient, solver_args, on_error, executor, progress=progress)

    def _read(
        self,
        objective: dict[str, Tensor],
        A: Tensor | None,
        b: Bound,
        G: Tensor | None,
        h: Bound,
        lb: Bound,
        ub: Bound,
        l: Bound,
    ) -> _Call:
        """Check the arguments and put them together.

        Args:
            objective: the cost vector, and P after it where there is one, by name.
        """
        cost = next(iter(objective))
        n = _size(objective[cost], -1, "n")
        if n == 0:
            raise ValueError(f"{cost} has shape {tuple(objective[cost].shape)}: there is nothing to solve for.")
        if self._integer and isinstance(n, int) and self._integer[-1] >= n:
            raise ValueError(f"integer holds {self._integer[-1]}, but {cost} has {n} entries.")
        tensors: dict[str, Any] = dict(objective)
        for (name, matrix), vectors in ((("A", A), {"b": b}), (("G", G), {"h": h} if l is None else {"h": h, "l": l})):
            given = {vector_name: vector for vector_name, vector in vectors.items() if vector is not None}
            if matrix is None and not given:
                continue
            if matrix is None or not given:
                one, other = (" or ".join(vectors), name) if matrix is None else (name, " or ".join(vectors))
                one = " and ".join(given) if matrix is None else one
                raise ValueError(f"{one} is given but {other} is not: constraints need both, or neither.")
            tensors[name], row_count = matrix, _size(matrix, -2, name)
            for vector_name, vector in given.items():
                tensors[vector_name] = _filled(vector, row_count, objective[cost])
        for name, bound in (("lb", lb), ("ub", ub)):
            if isinstance(bound, Tensor) or not (bound is None or is_number(bound)):
                tensors[name] = bound
        frame = self._frame(n, tensors, lb is not None, ub is not None)
        with one_torch_thread():  # several wait for more work for a while, on the cores that solvers are to have next
            return self._assemble(int(n), frame, cost, tensors, {"lb": lb, "ub": ub})

    def _frame(self, n: int | str, tensors: dict[str, Any], has_lower: bool, has_upper: bool) -> _Frame:
        """What these tensors have in common, once they are checked, and their plan where no matrix is sparse."""
        try:
            key = (
                self._integer,
                has_lower,
                has_upper,
                *[(name, t.shape, t.dtype, t.layout, t.device) for name, t in tensors.items()],
            )
        except AttributeError:  # something is no tensor
            key = None
        frame = None if key is None else _frames.get(key)
        if frame is None:
            expected = _expected(_variables(n, tensors), tensors)
            batch = check_inputs(expected, list(tensors.values()))
            matrices = {name: tensors[name] for name in ("P", "A", "G") if name in tensors}
            chosen = None
            if all(matrix.layout is torch.strided for matrix in matrices.values()):
                patterns = {name: Pattern((m.shape[-2], m.shape[-1])) for name, m in matrices.items()}
                chosen = self._plan(int(n), tensors, patterns, has_lower, has_upper)
            frame = _Frame(batch, chosen)
            if key is not None:
                if len(_frames) >= KEPT_FRAMES:
                    _frames.clear()
                _frames[key] = frame
        return frame

    def _plan(
        self, n: int, tensors: dict[str, Tensor], patterns: Mapping[str, Pattern], has_lower: bool, has_upper: bool
    ) -> Plan:
        m, k = (tensors[name].shape[-2] if name in tensors else 0 for name in ("A", "G"))
        with_ends = k if "l" in tensors else 0
        blocks = tuple(patterns[name] for name in ("A", "G") if name in patterns) or (Pattern((0, n)),)
        cones = Cones(m + with_ends, k - with_ends)
        return plan(
            *(n, cones, patterns.get("P"), blocks),
            has_lower=has_lower,
            has_upper=has_upper,
            integer=self._integer,
            two_sided=with_ends,
        )

    def _assemble(
        self, n: int, frame: _Frame, cost: str, tensors: dict[str, Tensor], bounds: dict[str, Bound]
    ) -> _Call:
        batch, chosen = frame
        matrices = {name: read_matrix(name, tensors[name], batch) for name in ("P", "A", "G") if name in tensors}
        blocks = [matrices[name] for name in ("A", "G") if name in matrices]
        m, k = (tensors[name].shape[-2] if name in tensors else 0 for name in ("A", "G"))
        P, with_ends = matrices.get("P"), "l" in tensors
        if chosen is None:
            patterns = {name: matrix.pattern for name, matrix in matrices.items()}
            has_lower, has_upper = (bound is not None for bound in bounds.values())
            chosen = self._plan(n, tensors, patterns, has_lower, has_upper)
        nothing = torch.empty(0, dtype=torch.float64, device=batch.device)
        lower, upper = (_bound(tensors.get(name, bound), n, batch, nothing) for name, bound in bounds.items())
        q, right = (
            batch.rows(tensors[cost], 1),
            [batch.rows(tensors[name], 1) for name in ("b", "h") if name in tensors],
        )
        if with_ends:
            zeros, free = nothing.new_zeros(k), nothing.new_full((k,), torch.inf)
            right = [*right[: "b" in tensors], zeros]
            q = join([q, zeros])
            lower = join([lower, batch.rows(tensors["l"], 1)])
            upper = join([upper, batch.rows(tensors["h"], 1) if "h" in tensors else free])
        data = ConicData(
            P=nothing if P is None else chosen.quadratic_values(P),
            q=q,
            A=chosen.constraint_values(blocks) if blocks else nothing,
            b=join(right) if right else nothing,
            lower=lower,
            upper=upper,
        )
        return _Call(batch, chosen.structure, data, (m, k), _explanation(tensors, bounds, batch))

    def _run(self, call: _Call, solver_args: Mapping[str, object] | None, warm_start: WarmStart) -> ProgramOutput:
        point, info = self._solve(call.data, call.structure, call.batch, solver_args, warm_start, call.explain)
        n, (m, k), restore = call.structure.own, call.sizes, call.batch.restore
        x, z_box = (values[:, :n] if call.structure.two_sided else values for values in (point.x, point.z))
        if call.structure.two_sided:
            y, z = restore(point.y[:, :m], (m,)), restore(point.z[:, n:], (k,))
        else:
            y, z = restore(point.y, (m + k,)).split((m, k), -1)
        output = ProgramOutput(restore(x, (n,)), y, z, restore(z_box, (n,)))
        if info.violation is not None:
            info.violation = _own_violation(info.violation, call).restored(restore)
        output.info, output.batch_shape = info, call.batch.batch_shape
        return output


def _variables(n: int | str, tensors: dict[str, Any]) -> int | str:
    """How many variables there are: n, the last size of the cost; or that of all matrices where the cost is a column.

    So it is the cost that is refused then, and not the matrices.
    """
    cost = next(iter(tensors.values()))
    columns = {_size(tensors[name], -1, "n") for name in ("P", "A", "G") if name in tensors}
    return columns.pop() if n == 1 and columns == {_size(cost, -2, "n")} else n


def _expected(n: int | str, tensors: dict[str, Any]) -> list[Expected]:
    """What each argument is to be, in order."""
    shapes: dict[str, tuple[int | str, ...]] = dict.fromkeys(("q", "c", "lb", "ub"), (n,))
    shapes |= {"P": (n, n)}
    for name, count, vectors in (("A", "m", ("b",)), ("G", "k", ("h", "l"))):
        row_count = _size(tensors.get(name), -2, count)
        shapes |= {name: (row_count, n), **dict.fromkeys(vectors, (row_count,))}
    for name in ("lb", "ub"):
        bound = tensors.get(name)
        if isinstance(bound, Tensor) and bound.ndim == 0:
            shapes[name] = ()
    return [
        Expected(name, shapes[name], MATRIX_LAYOUTS) if name in ("P", "A", "G") else Expected(name, shapes[name])
        for name in tensors
    ]


def _own_violation(violation: Violation, call: _Call) -> Violation:
    """That of the rows of A and G and of the bounds: those of rows with two ends were held as bounds."""
    if not call.structure.two_sided:
        return violation
    (m, _), n = call.sizes, call.structure.own
    lower, upper = violation.lower, violation.upper
    rows = torch.cat([violation.rows[:, :m], upper[:, n:] - lower[:, n:]], -1)
    return Violation(violation.size, rows, lower[:, :n], upper[:, :n])


_ABSENT = {"h": torch.inf, "ub": torch.inf, "l": -torch.inf, "lb": -torch.inf}


def _explanation(tensors: dict[str, Tensor], bounds: dict[str, Bound], batch: Batch) -> Explain:
    def listed() -> list[Argument]:
        numbers = {name: bound for name, bound in bounds.items() if bound is not None and name not in tensors}
        known = {**tensors, **{name: torch.tensor(float(cast(float, bound))) for name, bound in numbers.items()}}
        shapes = {name: 2 if name in ("P", "A", "G") else 1 for name in tensors}
        return [
            Argument(name, tensor, min(shapes.get(name, 0), tensor.ndim), _ABSENT.get(name, 0.0))
            for name, tensor in known.items()
        ]

    return explanation(listed, batch, (("l", "h"), ("lb", "ub")))


def _index_set(integer: Sequence[int]) -> tuple[int, ...]:
    index = tuple(sorted(operator.index(entry) for entry in integer))
    if len(set(index)) < len(index) or (index and index[0] < 0):
        raise ValueError(f"integer is {integer!r}; it must hold different indices of variables, from 0.")
    return index


def _size(tensor: Any, dim: int, symbol: str) -> int | str:
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.ndim >= -dim else symbol


def _filled(value: Any, size: int | str, like: Any) -> Any:
    """One number for all rows as a vector of them; what is a vector, or is refused later, stays as it is."""
    if not isinstance(size, int):
        return value
    if isinstance(value, Tensor):
        return value if value.ndim else value.expand(size)
    if not (is_number(value) and isinstance(like, Tensor) and like.is_floating_point()):
        return value
    return torch.full((size,), float(value), dtype=like.dtype, device=like.device)


def _bound(bound: Bound, n: int, batch: Batch, nothing: Tensor) -> Tensor:
    if bound is None:
        return nothing
    if not isinstance(bound, Tensor):
        return nothing.new_full((n,), float(bound))
    if bound.ndim == 0:
        return bound.to(torch.float64).expand(n)
    return batch.rows(bound, 1)
