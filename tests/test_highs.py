"""HiGHS beyond the contract of every solver."""

from __future__ import annotations

import warnings

import pytest
import torch

from lpgd import HiGHS, LpgdWarning, LPLayer, QPLayer


def test_large_quadratic_programs_are_warned_about() -> None:
    n = 301
    layer = QPLayer(HiGHS(time_limit=1.0), on_error="nan")
    with pytest.warns(LpgdWarning, match=r"HiGHS solves quadratic programs cold.*301 variables"):
        layer(torch.eye(n).double(), torch.ones(n).double(), lb=0.0, ub=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPLayer(HiGHS())(torch.ones(n).double(), lb=0.0, ub=1.0)
        QPLayer(HiGHS())(torch.eye(9).double(), torch.ones(9).double(), lb=0.0, ub=1.0)
