"""What becomes of elements without a solution: an error, a warning, or nothing but their status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from lpgd.problems.solution import AnySolution
from lpgd.status import SolverError, Status, describe_failures, warn

__all__ = ["ON_ERROR", "Explain", "OnError", "check_solution"]

OnError = Literal["raise", "nan", "warn", "relax"]
ON_ERROR: tuple[str, ...] = get_args(OnError)
Explain = Callable[[AnySolution, int], str]
"""Says what is wrong with the data of an element without a solution, as far as is known."""

_EXPLAINED = 3
"""Of how many elements a message tells what is wrong with their data."""


def check_solution(solution: AnySolution, on_error: OnError, explain: Explain | None = None) -> None:
    """Raise or warn about elements without a solution, and warn about inaccurate ones.

    Raises:
        SolverError: with ``on_error="raise"``, or ``"relax"``, and an element without a solution.
    """
    statuses, failed = solution.statuses, solution.failed
    if solution.is_flawless:
        return
    domain = f" {solution.domain}" if solution.domain else ""
    if failed and on_error != "nan" and explain is not None:
        reasons = [text for element in failed[:_EXPLAINED] if (text := explain(solution, element))]
        domain += "".join(f" {text}." for text in reasons)
    if failed and on_error in ("raise", "relax"):
        raise SolverError(
            f"no solution for {describe_failures(statuses, failed)}.{domain} "
            "on_error='nan' keeps the other elements and gives these a zero gradient.",
            statuses,
            failed,
        )
    if failed and on_error == "warn":
        warn(
            f"no solution for {describe_failures(statuses, failed)}.{domain} Their rows are the solver's last iterate "
            "or NaN, with a zero gradient."
        )
    rescued = sum(solution.rescued.values())
    if 2 * rescued > solution.batch_size:
        others = " and ".join(f"{count} by {name}" for name, count in solution.rescued.items())
        warn(
            f"{solution.asked} left {rescued} of {solution.batch_size} elements without a solution; they were solved, "
            f"{others}. Name that solver to be faster, or rescue=False for what the first one makes of them."
        )
    if Status.INACCURATE in statuses:
        inaccurate = [index for index, status in enumerate(statuses) if status is Status.INACCURATE]
        warn(describe_failures(statuses, inaccurate))
