"""Text tables and numbers for people."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

__all__ = [
    "format_change",
    "format_comparison",
    "format_count",
    "format_number",
    "format_paragraph",
    "format_seconds",
    "format_share",
    "format_table",
]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        (
            indent
            + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        ).rstrip()
        for row in (header, *rows)
    ]


def format_number(value: float | None, digits: int = 3) -> str:
    """``–`` where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def format_share(value: float | None) -> str:
    """A share as per cent."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.0f} %" if abs(value) >= 0.0995 or value == 0 else f"{100 * value:.1g} %"


def format_change(value: float) -> str:
    """A relative change as per cent with its sign."""
    return "0 %" if value == 0 else f"{100 * value:+.3g} %"


def format_paragraph(text: str, indent: str = "") -> list[str]:
    """Lines of at most 120 characters."""
    return textwrap.wrap(text, 120, initial_indent=indent, subsequent_indent=indent + "  ")


def format_comparison(norm: float, cosine: float, ratio: float) -> tuple[str, str]:
    """Cosine and ratio against a reference; ``zero`` where that is zero."""
    if norm == 0:
        return "zero", "–"
    return ("–" if math.isnan(cosine) else f"{cosine:.4f}"), format_number(ratio)


def format_seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def format_count(count: int, noun: str) -> str:
    """``1 element``, ``3 elements``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
