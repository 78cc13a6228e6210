"""Settings of every test run."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from lpgd.execution import workspaces

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: no test opens a window

# Solvers' times vary too much for a deadline.  CI draws the same examples each time: only a change can turn it red.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _no_workspace_is_left_over() -> None:
    """A used SCS workspace keeps its scaling: results depend, within the tolerance, on what it solved before."""
    workspaces.clear()
