"""The compiled objects of Moreau: each serves batches of one size, in one thread at a time, and cannot be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, from_numpy
from lpgd.execution.threads import bounded_blas
from lpgd.solvers.backends.moreau_rows import Layout

__all__ = ["ACTIVE_SET", "IPM", "Answer", "Compiled", "Inputs", "Limits", "OnDevice", "joined", "memory", "on_device"]

ACTIVE_SET, IPM = "active_set", "ipm"
IPM_ITERATIONS = 200
"""The interior-point method ends in 10 to 30 iterations, or never."""


# The compiled part of Moreau, the package moreau_cpu, is enough on the CPU.  Its front door, moreau, imports torch's
# compiler, which takes seconds (moreau 0.4.1).


@cache
def _package(name: str) -> ModuleType:
    return import_module(name)


class Limits(NamedTuple):
    """Which of the options objects are made with."""

    tolerance: float
    iterations: int
    time_limit: float | None
    verbose: bool


class Inputs(NamedTuple):
    """The data of k elements, in Moreau's form; P and A are vectors where all of them share them."""

    P: Tensor
    A: Tensor
    q: Tensor
    b: Tensor
    start: tuple[Tensor, Tensor, Tensor] | None = None  # x, z, s


class Answer(NamedTuple):
    """Answers to k elements, in Moreau's form."""

    x: Tensor
    z: Tensor
    s: Tensor
    statuses: list[int]
    iterations: Tensor
    methods: list[str]

    def replaced(self, places: list[int], other: Answer) -> Answer:
        """The same with the answers of ``other`` at these places, whose iterations are added."""
        x, z, s, iterations = (tensor.clone() for tensor in (self.x, self.z, self.s, self.iterations))
        x[places], z[places], s[places] = other.x, other.z, other.s
        iterations[places] += other.iterations
        statuses, methods = list(self.statuses), list(self.methods)
        for place, status, method in zip(places, other.statuses, other.methods, strict=True):
            statuses[place], methods[place] = status, method
        return Answer(x, z, s, statuses, iterations, methods)

    def reordered(self, order: Sequence[int]) -> Answer:
        index = torch.tensor(order)
        x, z, s = (tensor[index.to(tensor.device)] for tensor in (self.x, self.z, self.s))
        statuses, methods = [self.statuses[place] for place in order], [self.methods[place] for place in order]
        return Answer(x, z, s, statuses, self.iterations[index], methods)


def joined(answers: Sequence[Answer]) -> Answer:
    """The answers of several sub-batches, one after the other."""
    if len(answers) == 1:
        return answers[0]
    x, z, s, iterations = (
        torch.cat([getattr(answer, name) for answer in answers]) for name in ("x", "z", "s", "iterations")
    )
    statuses = [status for answer in answers for status in answer.statuses]
    return Answer(x, z, s, statuses, iterations, [method for answer in answers for method in answer.methods])


def memory(layout: Layout, method: str, size: int) -> int:
    """About how many bytes an object holds (measured for programs of 8 to 80 variables, moreau 0.4.1)."""
    order = layout.n + layout.m
    if method == ACTIVE_SET:
        return 3_000 + size * (2_000 + 28 * layout.n * order)
    width = min(order, 4 * layout.size // order + 1)
    return 20_000 + size * (20_000 + 120 * layout.size + 16 * order * width)


def on_device(device: torch.device) -> bool:
    """Whether Moreau solves where these data are, other than on the CPU: its package for CUDA is installed."""
    if device.type == "cpu" or find_spec("moreau") is None:
        return False
    return bool(_package("moreau").device_available(device.type))


class Compiled:
    """An object on the CPU, and the matrices that it was set up with."""

    def __init__(self, layout: Layout, method: str, size: int, limits: Limits, threads: int) -> None:
        self.method, self.size = method, size
        self.has_semidefinite = bool(layout.cones.semidefinite)
        self.matrices: tuple[FloatArray, FloatArray] | None = None
        patterns = (layout.P_offsets, layout.P_columns, layout.A_offsets, layout.A_columns)
        moreau_cpu = _package("moreau_cpu")
        if method == ACTIVE_SET:
            cones = moreau_cpu.Cones(num_zero_cones=layout.zero, num_nonneg_cones=layout.nonnegative)
            self.solver: Any = moreau_cpu.ActiveSetSolver(
                layout.n, layout.m, *patterns, cones, _active_settings(limits), batch_size=size
            )
        else:
            lists = [pattern.tolist() for pattern in patterns]
            cones, settings = moreau_cpu.cones_to_cpu(_cones(layout, moreau_cpu)), _interior_settings(limits)
            self.solver = moreau_cpu.CompiledSolver(layout.n, layout.m, *lists, cones, settings, num_threads=threads)

    def solve(self, inputs: Inputs) -> Answer:
        """The answers to a batch, which depend on these inputs only."""
        P, A, q, b = (_array(datum) for datum in inputs[:4])
        self._set_up(P, A)
        warm = [_array(array) for array in inputs.start or ()]
        if self.method == ACTIVE_SET:
            result = self.solver.solve(q, b, *warm)
            solved = [result[name] for name in ("x", "z", "s")]
            statuses, iterations = result["status"], result["iterations"]
        else:
            flat = [array.ravel() for array in warm]
            if self.has_semidefinite:  # which calls BLAS, in each of its threads
                with bounded_blas():
                    result = self.solver.solve_flat(q.ravel(), b.ravel(), self.size, *flat)
            else:
                result = self.solver.solve_flat(q.ravel(), b.ravel(), self.size, *flat)
            solved = [np.array(array).reshape(self.size, -1) for array in (result.x, result.z, result.s)]
            statuses, iterations = result.status, result.iterations
        x, z, s = (from_numpy(array).to(inputs.q.device) for array in solved)
        return Answer(
            x, z, s, [int(status) for status in statuses], torch.tensor(iterations), [self.method] * self.size
        )

    def _set_up(self, P: FloatArray, A: FloatArray) -> None:
        """Hand matrices over, unless they are those that the object has."""
        if self.matrices is not None and np.array_equal(self.matrices[0], P) and np.array_equal(self.matrices[1], A):
            return
        self.matrices = P.copy(), A.copy()
        shared = P.ndim == A.ndim == 1
        if not shared:
            P, A = (np.ascontiguousarray(np.broadcast_to(values, (self.size, values.shape[-1]))) for values in (P, A))
        if self.method == ACTIVE_SET:
            self.solver.setup(P, A)
        elif shared:
            self.solver.setup_shared(P.tolist(), A.tolist(), self.size)
        else:
            self.solver.setup_flat(P.ravel(), A.ravel(), self.size)


class OnDevice:
    """An object on the device of the data, which do not leave it: the interior-point method, cold."""

    def __init__(self, layout: Layout, size: int, limits: Limits, device: str) -> None:
        patterns = (layout.P_offsets, layout.P_columns, layout.A_offsets, layout.A_columns)
        moreau, indices = _package("moreau"), [from_numpy(pattern) for pattern in patterns]
        settings = moreau.Settings(
            solver=IPM,
            device=device,
            batch_size=size,
            max_iter=min(limits.iterations, IPM_ITERATIONS),
            time_limit=limits.time_limit or np.inf,
            verbose=limits.verbose,
            ipm_settings=moreau.IPMSettings(**_interior(limits)),
        )
        self.size = size
        self.solver: Any = _package("moreau.torch").Solver(
            layout.n, layout.m, *indices, cones=_cones(layout, moreau), settings=settings
        )

    def solve(self, inputs: Inputs) -> Answer:
        """The answers to a batch; where it is to start from is not looked at."""
        P, A, q, b = (datum.contiguous() for datum in inputs[:4])
        if P.ndim != A.ndim:
            P, A = (datum.expand(self.size, -1).contiguous() for datum in (P, A))
        found, info = self.solver.solve(P, A, q, b), self.solver.info
        x, z, s = (tensor.detach().reshape(self.size, -1) for tensor in (found.x, found.z, found.s))
        statuses, iterations = np.ravel(info.status), torch.as_tensor(info.iterations).reshape(-1).cpu()
        return Answer(x, z, s, [int(status) for status in statuses], iterations.expand(self.size), [IPM] * self.size)


def _array(tensor: Tensor) -> FloatArray:
    return np.ascontiguousarray(tensor.cpu().numpy(), dtype=np.float64)


def _cones(layout: Layout, package: ModuleType) -> Any:
    cones = layout.cones
    return package.Cones(
        num_zero_cones=layout.zero,
        num_nonneg_cones=layout.nonnegative,
        so_cone_dims=[size for size in cones.second_order if size > 1],
        psd_dims=list(cones.semidefinite),
        num_exp_cones=cones.exponential,
        power_alphas=list(cones.power),
    )


def _interior(limits: Limits) -> dict[str, Any]:
    """Options of the interior-point method; chordal decomposition would depend on which entries of b are zero."""
    criteria = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), limits.tolerance)
    return criteria | {"chordal_decomposition_enable": False}


def _interior_settings(limits: Limits) -> Any:
    settings = _package("moreau_cpu").DefaultSettings()
    settings.verbose, settings.max_iter = limits.verbose, min(limits.iterations, IPM_ITERATIONS)
    if limits.time_limit is not None:
        settings.time_limit = limits.time_limit
    interior = settings.ipm  # a copy
    for name, value in _interior(limits).items():
        setattr(interior, name, value)
    settings.ipm = interior
    return settings


def _active_settings(limits: Limits) -> SimpleNamespace:
    specific = SimpleNamespace(primal_tol=limits.tolerance, iter_limit=limits.iterations)
    return SimpleNamespace(active_set_settings=specific, time_limit=limits.time_limit, verbose=limits.verbose)
