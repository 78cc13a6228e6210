"""Programs put to the layers, and what became of each element.

==================  =================================================================================================
``right``           status, x and every gradient are what they must be
``cautious``        as ``right``, but a word was given of an element's gradient
``warned``          a gradient is wrong, and the record, or a warning that names the element, says so
``inaccurate``      the status is INACCURATE, which is warned about
``failed``          a status that says that there is no answer (a limit, a numerical error)
``wrong status``    a verdict that is false
``wrong x``         SOLVED, with another x than the planted one
``wrong gradient``  no word about a gradient that is wrong
``unsaid``          no word about the gradient of a program whose solution is not unique, by construction
``crash``           an exception
==================  =================================================================================================
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpgd import LPGD, ImplicitKKT, LpgdWarning
from lpgd.status import Status
from tests.judge.derivatives import Method, differentiated
from tests.judge.families import CHUNK, FAMILIES, Trial, draw_trial
from tests.judge.front_ends import FRONT_ENDS, Call, Stated, names_of_solvers

__all__ = [
    "METHODS",
    "SILENT",
    "Finding",
    "Method",
    "Tally",
    "judge",
    "judge_trial",
    "methods_of",
    "outcomes_of",
    "warned_of",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


METHODS: dict[str, Method] = {
    "implicit": Method(ImplicitKKT()),
    "forward": Method(ImplicitKKT(), forward=True),
    "lpgd": Method(LPGD()),
    "small-tau": Method(LPGD(tau=1e-4)),
    "duals": Method(ImplicitKKT(), duals=True),
    "lpgd-duals": Method(LPGD(), duals=True),
}

SILENT = ("wrong status", "wrong x", "wrong gradient", "unsaid", "crash")
"""What must never happen."""

GRADIENT_TOLERANCE = 1e-4
X_TOLERANCE = {"scales": 1e-6}
"""Of x, relative to its largest entry, and 1e-4 for the other families."""
X_ERROR = {"scales": 1e-9}
"""What is allowed for each unit of the condition number, where it asks for more, and 1e-8 for the other families."""

FALSE = (Status.INFEASIBLE, Status.UNBOUNDED, Status.NOT_CONVEX, Status.INVALID_DATA)
"""Verdicts on the program itself."""

DOUBTFUL = 1e-4
"""A share of doubt on record above this counts as said; a warning names the first ten such elements."""
PLAIN = frozenset({"implicit", "average", "zero cotangent", "closed form"})
"""What ``GradientInfo.used`` says of gradients that are what their methods ask for."""


@dataclass(frozen=True)
class Finding:
    """One element that was not right.

    Attributes:
        what: the kind of outcome.
        where: front-end, solver, method, and the trial in words.
        index: the number of the program in its family.
        detail: sizes of errors, or the message of an exception.
        command: repeats it.
    """

    what: str
    where: str
    index: int
    detail: str
    command: str


@dataclass
class Tally:
    """Counts by family, front-end, solver and method, and the first findings of each."""

    counts: dict[tuple[str, ...], Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    keep: int = 4
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, key: tuple[str, ...], outcomes: Counter[str], findings: list[Finding]) -> None:
        """Count the outcomes of one run."""
        before = self.counts.setdefault(key, Counter())
        for finding in findings:
            if sum(other.what == finding.what and other.where == finding.where for other in self.findings) < self.keep:
                self.findings.append(finding)
        before.update(outcomes)

    def total(self, *names: str) -> int:
        return sum(counts[name] for counts in self.counts.values() for name in names)


def judge_trial(
    trial: Trial,
    tally: Tally,
    front_ends: tuple[str, ...] = tuple(FRONT_ENDS),
    solvers: tuple[str, ...] | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
) -> None:
    """Put one trial to layers, solvers and methods.

    Args:
        trial: its programs and what must come out.
        tally: gets the outcomes.
        front_ends, methods: names.
        solvers: names; ``default`` is the layer's own choice; None is all that can take the cones, and the default.
    """
    for front_name in front_ends:
        front_end = FRONT_ENDS[front_name]
        if not front_end.takes(trial):
            continue
        stated = Stated(trial, front_end.with_bounds)
        fitting = ["default", *names_of_solvers(stated.cones)]
        call: Call | None = None
        for solver in fitting if solvers is None else [name for name in fitting if name in solvers]:
            call = call or front_end.prepare(stated)
            for method in methods_of(trial, methods, front_end.with_duals):
                _run(trial, tally, (trial.family, front_name, solver, method), call)


def methods_of(trial: Trial, methods: tuple[str, ...], with_duals: bool) -> tuple[str, ...]:
    """Those of the methods that say something of a trial: a fixed τ has the units of the data."""
    if not trial.is_differentiated:
        return ("implicit",)
    left_out = {"small-tau"} if trial.family == "scales" else set()
    if not with_duals or not trial.programs.cones.rows:
        left_out |= {name for name, method in METHODS.items() if method.duals}
    return tuple(name for name in methods if name not in left_out)


def _run(trial: Trial, tally: Tally, key: tuple[str, ...], call: Call) -> None:
    family, front_name, solver, method = key
    command = f"python -m tests.judge --family {family} --seed {trial.seed} --front-end {front_name} --solver {solver}"
    command += f" --method {method} --count 1 --start "
    where, size = f"{front_name}, {solver}, {method}: {trial}", len(trial.programs)
    indices = trial.chunk * CHUNK + trial.places
    try:
        outcomes, details = outcomes_of(trial, call, None if solver == "default" else solver, method, tally)
    except Exception as error:  # a crash is a finding like any other
        if isinstance(error, ValueError) and "installed solvers that can solve this problem" in str(error):
            return  # the layer refuses the solver
        message = f"{type(error).__name__}: {error}"
        finding = Finding("crash", where, int(indices[0]), message, command + str(indices[0]))
        tally.add(key, Counter({"crash": size}), [finding])
        return
    findings = [
        Finding(outcome, where, int(index), detail, command + str(index))
        for outcome, detail, index in zip(outcomes, details, indices, strict=True)
        if outcome not in ("right", "warned", "cautious")
    ]
    tally.add(key, Counter(outcomes), findings)


def outcomes_of(trial: Trial, call: Call, solver: str | None, method: str, tally: Tally) -> tuple[list[str], list[str]]:
    """What became of each element, and a detail."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer, errors, without = differentiated(
            trial, lambda leaves: call(leaves, solver, METHODS[method].gradient), METHODS[method]
        )
    for warning in caught:
        if not issubclass(warning.category, LpgdWarning):
            tally.notes[f"{warning.category.__name__}: {str(warning.message)[:100]}"] += 1
    statuses = answer.info.statuses
    warned = warned_of(answer.info, caught, len(statuses))
    spoilt = np.isin(np.arange(len(statuses)), list(trial.spoilt))
    excused = warned | (np.array([status is not Status.SOLVED for status in statuses]) & ~spoilt)
    summed = [name for name in trial.shared if name in errors and (errors[name] > GRADIENT_TOLERANCE).any()]
    if summed and excused.any():  # what is wrong with a sum may be theirs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors |= {name: error for name, error in without(excused).items() if name in summed}
    x = answer.x.detach().numpy()
    off = _x_error(trial, x)
    condition = np.minimum(trial.reference.condition, 1e5)
    tolerance = np.maximum(X_TOLERANCE.get(trial.family, 1e-4), X_ERROR.get(trial.family, 1e-8) * condition)
    force = errors.pop("force", None)
    worst = np.max(np.stack(list(errors.values())), axis=0) if errors else np.zeros(len(statuses))
    free = np.zeros(len(statuses), dtype=bool)
    if force is not None:  # of what moves the objective, and of the force of all rows together
        free = trial.reference.frees_multipliers & trial.with_gradients
        worst[free] = np.max(np.stack([force, *(errors[name] for name in "Pq" if name in errors)]), axis=0)[free]
    outcomes, details = [], []
    for element, status in enumerate(statuses):
        parts = ", ".join(f"{name} {error[element]:.1e}" for name, error in errors.items())
        said = " with a word" if warned[element] else ""
        details.append(f"{status.name}{said}, x {off[element]:.1e}" + (f"; gradients: {parts}" if parts else ""))
        judged = (trial.differentiable[element] or free[element]) and bool(errors)
        gradient_wrong = judged and not worst[element] <= GRADIENT_TOLERANCE
        if element in trial.spoilt:
            right = status in trial.spoilt[element] and bool(np.isnan(x[element]).all()) and not gradient_wrong
            outcomes.append("right" if right else "wrong status")
        elif trial.verdict is not Status.SOLVED:
            ended = status is trial.verdict
            false = status.usable or status in FALSE
            outcomes.append("right" if ended else "wrong status" if false else "failed")
        elif status in FALSE:
            outcomes.append("wrong status")
        elif not status.usable:
            outcomes.append("failed")
        elif status is Status.INACCURATE:
            outcomes.append("inaccurate")
        elif not off[element] <= tolerance[element]:
            outcomes.append("wrong x")
        elif gradient_wrong:
            outcomes.append("warned" if warned[element] else "wrong gradient")
        elif trial.singular[element] and bool(errors) and not free[element]:
            outcomes.append("warned" if warned[element] else "unsaid")
        else:
            outcomes.append("cautious" if warned[element] else "right")
    return outcomes, details


def _x_error(trial: Trial, x: FloatArray) -> FloatArray:
    """(B,) the error of x; where x is not unique, the violation of constraints and the excess of the objective."""
    programs = trial.programs
    error = np.abs(x - programs.x).max(axis=1) / np.maximum(1.0, np.abs(programs.x).max(axis=1))
    unique = trial.reference.condition < 1e7
    if unique.all() or trial.verdict is not Status.SOLVED:
        return error

    def value(points: FloatArray) -> FloatArray:
        return 0.5 * np.einsum("bi,bij,bj->b", points, programs.P, points) + (programs.q * points).sum(axis=1)

    planted = value(programs.x)
    excess = np.abs(value(x) - planted) / np.maximum(1.0, np.abs(planted))
    outside = np.maximum(programs.lower - x, x - programs.upper).max(axis=1, initial=0.0)
    slack = programs.b - np.einsum("bmn,bn->bm", programs.A, x)
    cones = programs.cones
    outside = np.maximum(outside, np.abs(slack[:, : cones.zero]).max(axis=1, initial=0.0))
    start = cones.sections["second_order"].start
    outside = np.maximum(outside, np.maximum(-slack[:, cones.zero : start], 0.0).max(axis=1, initial=0.0))
    for size in cones.second_order:
        part = slack[:, start : start + size]
        outside = np.maximum(outside, np.linalg.norm(part[:, 1:], axis=1) - part[:, 0])
        start += size
    return np.where(unique, error, np.maximum(excess, outside))


def warned_of(info: Any, caught: list[warnings.WarningMessage], size: int) -> BoolArray:
    """(B,) elements whose gradient is not what it should be, by the record, or by a warning that names them."""
    named = np.zeros(size, dtype=bool)
    for record in info.gradients[-1:]:
        named |= np.array([used not in PLAIN for used in record.used])
        named[list(record.fallbacks)] = True
        if record.doubt is not None:
            named |= (record.doubt > DOUBTFUL).numpy()
        for marked in (record.jumped, record.kinked, record.unclear):  # warnings name the first ten of each
            if marked is not None:
                named |= marked.numpy()
        if record.crossed is not None and getattr(record.method, "tau", None) is not None:
            # A given step is meant: the gradient is that of an envelope, and the record has the kinks that it crosses.
            named |= record.crossed.numpy()
    for warning in caught:
        if issubclass(warning.category, LpgdWarning):
            for listed in re.findall(r"elements? \[?((?:\d+(?:, )?)+)", str(warning.message)):
                named[[int(place) for place in re.findall(r"\d+", listed) if int(place) < size]] = True
    return named


def judge(
    family: str,
    count: int,
    seed: int = 0,
    start: int = 0,
    front_ends: tuple[str, ...] = tuple(FRONT_ENDS),
    solvers: tuple[str, ...] | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
    tally: Tally | None = None,
) -> Iterator[tuple[int, Tally]]:
    """Judge the programs ``start``, …, ``start + count - 1`` of a family; after each chunk, how many and the tally.

    Raises:
        ValueError: there is no such family, front-end or method.
    """
    for name, names in ((family, FAMILIES), *((f, FRONT_ENDS) for f in front_ends), *((m, METHODS) for m in methods)):
        if name not in names:
            raise ValueError(f"{name!r} is not one of {', '.join(names)}.")
    tally = tally or Tally()
    for chunk in range(start // CHUNK, (start + count - 1) // CHUNK + 1):
        trial = draw_trial(family, seed, chunk)
        first, last = max(start - chunk * CHUNK, 0), min(start + count - chunk * CHUNK, CHUNK)
        if (first, last) != (0, CHUNK):
            trial = trial.select(np.arange(first, last))
        judge_trial(trial, tally, front_ends, solvers, methods)
        yield last - first, tally
