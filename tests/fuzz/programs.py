"""Programs of the judge in hostile clothes, for every front-end that takes programs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lpgd
from lpgd.status import Status
from tests.fuzz.cases import CHUNK, Chunk, source
from tests.fuzz.hostile import Subject, try_pattern
from tests.fuzz.presentation import Given, Presentation, bits, draw_presentation
from tests.fuzz.users import CONIC, QUADRATIC
from tests.judge import judge as judging
from tests.judge.families import Trial, draw_trial
from tests.judge.front_ends import FRONT_ENDS as LAYERED
from tests.judge.front_ends import Answer, FrontEnd, Stated, Ways, conic, cvxpy, leaves_of, names_of_solvers, program

__all__ = ["PROGRAMS"]

LEAF_OF = (
    {name: name for name in "PqAb"} | {"G": "A", "h": "b"} | dict.fromkeys(("lb", "ub", "lower", "upper"), "bounds")
)
"""The datum of the judge that each argument is made of."""

INVALID, OUTSIDE = frozenset({Status.INVALID_DATA}), frozenset({Status.INFEASIBLE, Status.INVALID_DATA})
SPOILS = {
    "nan P": INVALID,
    "nan q": INVALID,
    "nan A": INVALID,
    "nan b": INVALID,
    "inf q": INVALID,
    "-inf A": INVALID,
    "-inf b": OUTSIDE,
    "crossed bounds": OUTSIDE,
    "nan bound": INVALID,
    "indefinite P": frozenset({Status.NOT_CONVEX}),
}
"""What is done to an element, and how it may end."""

UNREAD = (0.0, 1e6, np.nan, -np.inf)
"""What stands in rows that are absent."""
PATTERNS_TRIED = 0.5
"""In which share of the batches a call pattern is tried."""
OF_TORCH = ("torch.jit.script", "beta state")
"""Warnings of PyTorch about itself."""
GOOD = ("right", "cautious")
FAMILIES = ("redundant", "redundant", "strict", "compact", "scales", "certificates")


class Hostile(Stated):
    """A statement whose data are spoilt in places and handed over in a presentation.

    Attributes:
        unread: what stands in rows that are absent.
        spoils: what is done to which element.
        given: the tensors of the last call.
    """

    def __init__(
        self, trial: Trial, with_bounds: bool, presentation: Presentation, spoils: dict[int, str], absent: bool
    ) -> None:
        super().__init__(trial, with_bounds)
        self.presentation, self.spoils, self.given = presentation, spoils, list[Given]()
        self.to_float: torch.dtype = torch.float64
        kinds = [block.kind == "nonnegative" and block.state == "inside" for block in self.statement.blocks]
        plain = absent and not self.statement.notes and len(kinds) == self.statement.rows.shape[1]
        self.unread = UNREAD[trial.chunk % len(UNREAD)]
        self.absent_rows = np.flatnonzero(kinds) if plain else np.zeros(0, dtype=np.int64)

    def data(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        self.given.clear()
        stated = super().data(data)
        if self.absent_rows.size:  # half of the inactive rows are not there; nothing in such a row is looked at
            mask = torch.zeros_like(stated["b"], dtype=torch.bool)
            mask[::2, self.absent_rows] = True
            mask[list(self.spoils)] = False
            stated["b"] = torch.where(mask, torch.inf, stated["b"])
            stated["A"] = torch.where(mask[:, :, None], self.unread, stated["A"])
        for element, spoil in self.spoils.items():
            for name, value in self.spoilt(spoil, stated, element).items():
                mask = torch.zeros_like(stated[name], dtype=torch.bool)
                mask[element] = True
                stated[name] = torch.where(mask, value.expand_as(stated[name]), stated[name])
        return stated

    def spoilt(self, spoil: str, data: dict[str, Tensor], element: int) -> dict[str, Tensor]:
        """New values of some of an element's data."""
        if spoil == "crossed bounds":
            middle = torch.where(data["lower"][element].isfinite(), data["lower"][element], 0.0).detach()
            size = 1.0 + middle.abs()
            return {"lower": middle + size, "upper": middle - size}
        if spoil == "indefinite P":
            P = data["P"][element].detach()
            return {"P": P - (1.0 + 2.0 * torch.linalg.matrix_norm(P, 2)) * torch.eye(len(P), dtype=P.dtype)}
        if spoil == "nan bound":
            return {"lower": torch.full_like(data["lower"][element], torch.nan)}
        value, name = spoil.split()
        datum = data[name][element].detach().clone()
        if value == "-inf" and name == "b":  # an inequality that nothing satisfies
            datum[self.cones.zero] = -torch.inf
        else:
            datum.view(-1)[element % datum.numel()] = float(value)
            datum = datum + datum.mT - datum if name == "P" else datum
        return {name: datum}

    def present(self, name: str, tensor: Tensor) -> Tensor:
        shown = self.presentation.apply(name, tensor.to(self.to_float))
        self.given.append(Given(shown, bits(shown)))
        return shown

    def answer(self, x: Tensor, y: Tensor | None, info: Any) -> Answer:
        flat = x.reshape(-1, x.shape[-1]).double()
        return super().answer(flat, None if y is None else y.reshape(len(flat), y.shape[-1]).double(), info)


def share(trial: Trial, names: frozenset[str]) -> Trial:
    """The trial with the first element's P or A in all elements, and the planted solutions as they were."""
    programs = trial.programs
    shared: dict[str, Any] = {}
    for name in ("P", "factor", "A"):
        if ("P" if name == "factor" else name) in names:
            shared[name] = np.repeat(getattr(programs, name)[:1], len(programs), axis=0)
    P, A = shared.get("P", programs.P), shared.get("A", programs.A)
    b = (A @ programs.x[:, :, None])[:, :, 0] + programs.s
    q = -(P @ programs.x[:, :, None])[:, :, 0] - (np.swapaxes(A, 1, 2) @ programs.y[:, :, None])[:, :, 0] - programs.z
    return replace(trial, programs=replace(programs, **shared, b=b, q=q), shared=names)


def on_patterns(presentation: Presentation, trial: Trial) -> tuple[Presentation, Trial]:
    """Sparse matrices have a gradient where they have entries: known where rows are those of the programs."""
    as_they_are = not trial.statement.notes
    names = [name for name in presentation.sparse if as_they_are or bool(getattr(trial.programs, LEAF_OF[name]).all())]
    kept = {name: layout for name, layout in presentation.sparse.items() if name in names}
    leaves = {LEAF_OF[name] for name in kept} if as_they_are else set[str]()
    return replace(presentation, sparse=kept), replace(trial, on_pattern=frozenset(leaves))


def draw_spoils(rng: np.random.Generator, trial: Trial, stated: Stated) -> dict[int, str]:
    """What is done to up to four elements."""
    rows, zero, inequalities = stated.cones.rows, stated.cones.zero, stated.cones.nonnegative
    programs = trial.programs
    possible = {
        "nan P": programs.P.any(),
        "indefinite P": programs.P.any(),
        "nan A": rows,
        "-inf A": rows,
        "nan b": rows,
        "-inf b": inequalities and rows > zero,
        "nan bound": stated.statement.with_bounds and np.isfinite(programs.lower).any() and not programs.fixed.any(),
    }
    possible["crossed bounds"] = possible["nan bound"] and np.isfinite(programs.upper).all()
    chosen = [spoil for spoil in SPOILS if possible.get(spoil, True)]
    places = rng.choice(len(programs), min(int(rng.integers(1, 5)), len(programs)), replace=False)
    return {int(place): str(rng.choice(chosen)) for place in places}


def fuzz(name: str, front_end: FrontEnd, seed: int, number: int) -> Chunk:
    """One batch of programs: judged, and called in a hostile way.

    Args:
        name: of the front-end.
        front_end: how the judge calls it.
        seed, number: of the chunk.
    """
    rng, chunk = source(name, seed, number), Chunk(number)
    draw = 0
    while True:
        trial = draw_trial(str(rng.choice(FAMILIES)), seed + 1000 + draw, number, CHUNK)
        if front_end.takes(trial):
            break
        draw += 1
    is_solved = trial.verdict is Status.SOLVED
    if is_solved and not trial.statement.notes and trial.programs.plan.points == "normal" and rng.random() < 0.5:
        trial = share(trial, frozenset(key for key in "PA" if rng.random() < 0.6))
    probe = Stated(trial, front_end.with_bounds)
    spoils = draw_spoils(rng, trial, probe) if is_solved and rng.random() < 0.5 else {}
    if name == "cvxpy":  # CVXPY's parameters refuse values that break their promises
        spoils = {place: spoil for place, spoil in spoils.items() if spoil != "indefinite P"}
    trial = replace(trial, spoilt={place: SPOILS[spoil] for place, spoil in spoils.items()})
    matrices = [] if name == "cvxpy" else ["P", "AG"]
    equal = [key for key, leaf in leaves_of(trial).items() if bool((leaf == leaf[:1]).all())]
    trial = replace(trial, shared=frozenset(equal))
    presentation = draw_presentation(
        rng, list(LEAF_OF), matrices, [name for name, leaf in LEAF_OF.items() if leaf in equal]
    )
    if presentation.sparse:
        presentation, trial = on_patterns(presentation, trial)
    stated = Hostile(trial, front_end.with_bounds, presentation, spoils, bool(rng.random() < 0.3))
    fitting = ["default"] if name == "custom" else ["default", "default", *names_of_solvers(stated.cones)]
    solver = str(rng.choice(fitting))
    method = str(rng.choice(judging.methods_of(trial, tuple(judging.METHODS), front_end.with_duals)))
    if judging.METHODS[method].forward and presentation.sparse:  # PyTorch has no forward mode to sparse tensors
        method = "implicit"
    call, named = front_end.prepare(stated), None if solver == "default" else solver
    where = f"{name}, {solver}, {method}, {presentation}, {spoils or 'nothing spoilt'}: {trial}"
    try:
        tally = judging.Tally()
        outcomes, details = judging.outcomes_of(trial, call, named, method, tally)
    except ValueError as error:
        if "installed solvers that can solve this problem" not in str(error):
            raise
        chunk.counts["refused"] = len(trial.programs)
        return chunk
    chunk.add(outcomes, details, where)
    for note in (note for note in tally.notes if not any(words in note for words in OF_TORCH)):
        chunk.fault("another warning", f"{where}: {note}")
    if any(given.is_changed for given in stated.given):
        chunk.fault("input changed", where)
    leaves = {key: leaf for key, leaf in leaves_of(trial).items() if leaf.numel()}
    if not trial.programs.P.any():
        del leaves["P"]
    subject = Subject(
        leaves,
        lambda leaves: call({**leaves_of(trial), **leaves}, named, METHOD).x,
        lambda: [given.tensor for given in stated.given],
        exact=solver not in ("PROXQP",),
        judged=np.array(
            [is_solved and outcome in GOOD and place not in spoils for place, outcome in enumerate(outcomes)]
        ),
    )
    if rng.random() < PATTERNS_TRIED:
        try_pattern(rng, subject, chunk, where)
    return chunk


METHOD = lpgd.ImplicitKKT()


def custom(ways: Ways) -> Any:
    """Functions of a user's own in place of solvers."""

    def prepare(stated: Stated) -> Any:
        return conic(stated, ways) if not stated.cones.is_polyhedral else program(stated, ways)

    return prepare


FUNCTIONS = Ways(
    lambda **options: partial(lpgd.solve_qp, **options),
    lambda **options: partial(lpgd.solve_lp, **options),
    lambda **options: partial(lpgd.solve_conic, **options),
)
USERS = Ways(
    lambda **options: lpgd.QPLayer(**options | {"solver": QUADRATIC}),
    lambda **options: lpgd.LPLayer(**options | {"solver": QUADRATIC}),
    lambda **options: lpgd.ConicLayer(**options | {"solver": CONIC}),
)


def _is_linear(trial: Trial) -> bool:
    return trial.statement.cones.is_polyhedral and not trial.programs.P.any()


def _is_quadratic(trial: Trial) -> bool:
    return trial.statement.cones.is_polyhedral and bool(trial.programs.P.any())


def _function(stated: Stated) -> Any:
    return program(stated, FUNCTIONS)


PROGRAMS: dict[str, FrontEnd] = {
    "qp": FrontEnd(True, True, _is_quadratic, program),
    "lp": FrontEnd(True, True, _is_linear, program),
    "conic": FrontEnd(False, True, lambda trial: True, conic),
    "cvxpy": FrontEnd(True, False, LAYERED["cvxpy"].takes, cvxpy),
    "solve_qp, solve_lp": FrontEnd(True, True, LAYERED["program"].takes, _function),
    "solve_conic": FrontEnd(False, True, lambda trial: True, lambda stated: conic(stated, FUNCTIONS)),
    "custom": FrontEnd(True, True, LAYERED["program"].takes, lambda stated: program(stated, USERS)),
    "custom conic": FrontEnd(False, True, LAYERED["program"].takes, lambda stated: conic(stated, USERS)),
}
