"""The types of a solver's options."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["check_type"]

_KINDS = {
    "bool": (bool, "True or False"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
}


def check_type(solver: Any, name: str, annotation: str) -> None:
    """Refuse an option of another type than its field's; 1e3 passes for a whole number."""
    value, optional = getattr(solver, name), annotation.endswith(" | None")
    annotation = annotation.removesuffix(" | None")
    if annotation not in _KINDS or (value is None and optional):
        return
    kind, text = _KINDS[annotation]
    if annotation == "int" and isinstance(value, float) and value.is_integer():
        object.__setattr__(solver, name, int(value))
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} of {solver.name} is {value!r}; it must be {text}{' or None' if optional else ''}.")
