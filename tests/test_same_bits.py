"""Same input, same bits: who solves an element, and beside which others, changes nothing."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lpgd import DAQP, LPGD, QPLayer, SerialExecutor
from lpgd.execution.workspaces import Habits, workspaces
from lpgd.solvers import ElementwiseSolver
from lpgd.solvers.backends import elementwise
from tests.test_solvers import BY_NAME

BATCH, N = 24, 6
# ProxQP's last bits depend on where its arrays lie (proxsuite 0.8.0).
ELEMENTWISE = {
    name: solver for name, solver in BY_NAME.items() if isinstance(solver, ElementwiseSolver) and name != "PROXQP"
}


def programs(seed: int, shared: bool, least: float = 0.1) -> dict[str, Tensor]:
    """Quadratic programs with equalities, inequalities and bounds; with ``shared``, of one P and A.

    With 0 for ``least``, P is singular: DAQP keeps workspaces of such programs alone.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    own, rank = () if shared else (BATCH,), N if least else N // 2
    root, A, G = draw(*own, N, N), draw(*own, 2, N), draw(*own, 4, N)
    inside = 0.3 * draw(BATCH, N, 1)
    return {
        "P": root[..., :rank] @ root[..., :rank].mT + least * torch.eye(N, dtype=torch.float64),
        "q": draw(BATCH, N),
        "A": A,
        "b": (A @ inside)[..., 0],
        "G": G,
        "h": (G @ inside)[..., 0] + 0.2,
    }


def answers(solver: Any, data: dict[str, Tensor], executor: Executor | None, gradient: Any = None) -> list[Tensor]:
    """Everything that a step of training hands back."""
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    layer = QPLayer(solver, gradient=gradient, executor=executor)
    rows = {name: leaves[name] for name in ("A", "b", "G", "h")}
    output: Any = layer.forward(leaves["P"], leaves["q"], lb=-2.0, ub=2.0, **cast(Any, rows))
    output.x.square().sum().backward()
    return [*(part.detach() for part in output), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared matrices"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_threads_and_times_change_no_bit(name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, solver = programs(0, shared), ELEMENTWISE[name]
    found = []
    # As if elements took a second, so that threads solve them, or no time; several times, as threads vary.
    for handover in (0.0, 0.0, 0.0, 1e9):
        monkeypatch.setattr(type(solver), "handover", handover)
        workspaces.clear()
        with ThreadPoolExecutor(3) as threads:
            found.append(answers(solver, data, threads, LPGD(tau=0.1)))
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert torch.equal(first, second)


# ECOS's answers differ in the last bit, for the same numbers (ecos 2.0.14).
@pytest.mark.parametrize("name", [name for name, solver in ELEMENTWISE.items() if solver.forgets and name != "ECOS"])
def test_an_element_alone_has_the_bits_that_it_has_in_a_batch(name: str) -> None:
    solver = ELEMENTWISE[name].with_options({"refine": False})
    data = programs(1, shared=False)

    def solve(part: dict[str, Tensor], executor: Executor) -> Tensor:
        rows: Any = {name: part[name] for name in "AbGh"}
        return QPLayer(solver, executor=executor).solve(part["P"], part["q"], **rows).x

    with ThreadPoolExecutor(3) as threads:
        together = solve(data, threads)
    for element in range(BATCH):
        workspaces.clear()
        alone = solve({name: value[element] for name, value in data.items()}, SerialExecutor())
        assert torch.equal(alone[0], together[element])


@pytest.mark.parametrize("name", [name for name, solver in ELEMENTWISE.items() if solver.forgets])
def test_what_was_solved_before_changes_no_bit(name: str) -> None:
    solver, serial, data = ELEMENTWISE[name], SerialExecutor(), programs(2, shared=False)
    first = answers(solver, data, serial)
    for seed in range(3, 3 + 2 * Habits.PATIENCE):  # from now on no workspace is kept
        answers(solver, programs(seed, shared=False), serial)
    for _ in range(3):  # new to it, then known, then found
        for ours, theirs in zip(answers(solver, data, serial), first, strict=True):
            assert torch.equal(ours, theirs)


def test_workspaces_are_kept_for_matrices_that_come_back_alone() -> None:
    solver, serial = DAQP(), SerialExecutor()
    for seed in range(10):
        answers(solver, programs(seed, shared=False, least=0.0), serial)
    assert not workspaces.idle
    for _ in range(2):
        answers(solver, programs(9, shared=False, least=0.0), serial)
    assert len(workspaces.idle) == BATCH
    workspaces.clear()
    solver = DAQP(refine=False)  # its perturbed problems are solved again
    for seed in range(10):  # perturbed problems have the matrices of the forward pass
        answers(solver, programs(seed, shared=False, least=0.0), serial, LPGD(tau=0.1))
        assert len(workspaces.idle) >= BATCH


def test_matrices_of_equal_fingerprints_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "fingerprints", lambda values: [(0, 0)] * max(1, values.size // values.shape[-1]))
    solver, serial = DAQP(), SerialExecutor()
    for seed in (0, 1, 0):
        found = answers(solver, programs(seed, shared=False, least=0.0), serial)
        workspaces.clear()
        for ours, theirs in zip(found, answers(solver, programs(seed, shared=False, least=0.0), serial), strict=True):
            assert torch.equal(ours, theirs)
