"""What a comparison found: timings, accuracy and targets, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Accuracy", "Curve", "Entry", "Result", "Target", "Timing", "fastest", "ratio_target"]


@dataclass
class Timing:
    """Seconds of repeated forward and backward passes."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        self.forward.append(forward)
        self.backward.append(backward)

    @property
    def count(self) -> int:
        return len(self.forward)

    @property
    def totals(self) -> list[float]:
        return [forward + backward for forward, backward in zip(self.forward, self.backward, strict=True)]

    @property
    def total(self) -> float:
        """Median of forward plus backward."""
        return statistics.median(self.totals)

    @property
    def spread(self) -> float | None:
        """Largest less smallest total, relative to the median; None for fewer than two."""
        if self.count < 2:
            return None
        return (max(self.totals) - min(self.totals)) / self.total

    def __str__(self) -> str:
        if not self.count:
            return "–"
        once = " (once)" if self.count == 1 else ""
        return f"{statistics.median(self.forward):.4f} + {statistics.median(self.backward):.4f}{once}"


@dataclass
class Accuracy:
    """Relative errors against exact solutions; None where it was not measured.

    Attributes:
        solution: largest error of an entry.
        objective: largest error of an objective.
        violation: largest violation of a constraint, absolute.
        gradient: largest error of a directional derivative, against central differences of exact solutions.
        gradient_floor: how far those differences are from themselves with half the step: a smaller error says nothing.
        cosine: with the gradient of another side of the same kind, ``cosine_with``.
    """

    solution: float | None = None
    objective: float | None = None
    violation: float | None = None
    gradient: float | None = None
    gradient_floor: float | None = None
    cosine: float | None = None
    cosine_with: str | None = None

    @property
    def of_solution(self) -> float | None:
        """The number by which sides are ranked: the solution's error where it is unique, else the objective's."""
        if self.solution is not None:
            return self.solution
        found = [value for value in (self.objective, self.violation) if value is not None]
        return max(found, default=None)


@dataclass
class Entry:
    """One side of one case.

    Attributes:
        library, mode, kind: which.
        timing: seconds.
        accuracy: of the last run.
        memory: growth of resident memory at its peak, MiB.
        details: where the time went, as far as a side says.
        error: why there is no timing.
        disagrees: what is wrong with the solution.
    """

    library: str
    mode: str
    kind: str
    timing: Timing = field(default_factory=Timing)
    accuracy: Accuracy = field(default_factory=Accuracy)
    memory: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    disagrees: str | None = None

    @property
    def label(self) -> str:
        return f"{self.library}, {self.mode}"

    @property
    def usable(self) -> bool:
        """Whether its time counts."""
        return bool(self.timing.count) and self.disagrees is None

    @property
    def backward(self) -> float | None:
        """Median seconds of the backward pass, where its time counts."""
        return statistics.median(self.timing.backward) if self.usable else None

    @property
    def overhead(self) -> float | None:
        """Seconds of the forward pass outside the solver, where a side says how long that took on the wall."""
        inside = self.details.get("solver_wall_seconds")
        return None if inside is None or not self.timing.count else max(self.timing.forward[-1] - inside, 0.0)


@dataclass
class Result:
    """One case: every side's entry."""

    comparison: str
    case: str
    title: str
    batch: int
    entries: list[Entry]
    unknowns: int = 0

    def backward(self, library: str, mode: str) -> float | None:
        """Median seconds of the backward pass of a library's first usable side with this in its mode."""
        found = (entry.backward for entry in self.entries if entry.library == library and mode in entry.mode)
        return next((seconds for seconds in found if seconds is not None), None)

    def record(self) -> dict[str, Any]:
        """For JSON, with the ratios."""
        return asdict(self) | {
            "ratios": {entry.label: ratio(self, entry) for entry in self.entries if entry.library != "lpgd"}
        }


@dataclass
class Target:
    """What should be reached, and what was.

    Attributes:
        title: of the row.
        target, stretch: numbers to reach; None where none was set.
        reached: None where it could not be measured.
        smaller: smaller is better.
        note: who was compared, accuracies, and why it is missed if it is.
    """

    title: str
    target: float | None
    stretch: float | None
    reached: float | None
    smaller: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"

        def met(bound: float | None) -> bool:
            if bound is None or self.reached is None:
                return False
            return self.reached <= bound if self.smaller else self.reached >= bound

        if met(self.stretch):
            return "stretch"
        return "no target" if self.target is None else "met" if met(self.target) else "missed"


@dataclass
class Curve:
    """Seconds or MiB against a size, one line for each side.

    Attributes:
        name: of the file of the plot.
        title, size, unit: of the plot and its axes.
        lines: for each side the points (size, value).
        figure: the file of a plot with a panel for each curve; empty where a curve has a plot of its own.
    """

    name: str
    title: str
    size: str
    unit: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    figure: str = ""

    def add(self, line: str, size: float, value: float | None) -> None:
        if value is not None:
            self.lines.setdefault(line, []).append((size, value))


def fastest(
    entries: Iterable[Entry], library: str | Sequence[str] | None = None, kind: str | None = None
) -> Entry | None:
    """The fastest usable entry of a library (or of some), of a kind; None if there is none."""
    libraries = (library,) if isinstance(library, str) else library
    chosen = [
        entry
        for entry in entries
        if entry.usable and (libraries is None or entry.library in libraries) and kind in (None, entry.kind)
    ]
    return min(chosen, key=lambda entry: entry.timing.total, default=None)


def ratio(result: Result, peer: Entry, kind: str | None = None) -> float | None:
    """Seconds of a peer over those of our fastest side."""
    ours = fastest(result.entries, "lpgd", kind)
    return peer.timing.total / ours.timing.total if ours is not None and peer.usable else None


def ratio_target(
    result: Result,
    title: str,
    target: float,
    stretch: float | None,
    peers: str | Sequence[str],
    kind: str | None = None,
    ours_kind: str | None = None,
    label: str = "",
) -> Target:
    """The fastest of some peers, with ``label`` in its name, over our fastest side; the note names both and errors."""
    chosen = [entry for entry in result.entries if label in entry.label]
    peer, ours = fastest(chosen, peers, kind), fastest(result.entries, "lpgd", ours_kind)
    if peer is None or ours is None:
        missing = [entry for entry in result.entries if entry.error and entry.library != "lpgd"]
        return Target(
            title, target, stretch, None, note="; ".join(f"{entry.label}: {entry.error}" for entry in missing)
        )
    note = f"{ours.label} against {peer.label}"
    mine, theirs = ours.accuracy.of_solution, peer.accuracy.of_solution
    if mine is not None and theirs is not None:
        note += f"; errors {mine:.0e} and {theirs:.0e}"
        if mine > max(theirs, 1e-9):
            note += " (ours is larger)"
    default = next((entry for entry in result.entries if entry.library == "lpgd" and "default" in entry.mode), None)
    if default is not None and default is not ours and default.usable:
        note += f"; {default.mode} reaches {peer.timing.total / default.timing.total:.2f}"
    return Target(title, target, stretch, peer.timing.total / ours.timing.total, note=note)
