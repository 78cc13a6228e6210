"""The quick form of what ``make soak`` runs for hours; interrupts and killed workers have test files of their own."""

from __future__ import annotations

import sys

import pytest

from lpgd import available
from tests import soak

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, and memory from /proc")


@linux
def test_a_training_run_survives_everything_to_the_same_bits() -> None:
    good, words = soak.training(12)
    assert good, words


@linux
def test_memory_of_a_backend_stays() -> None:
    good, words = soak.memory("DAQP", 200)
    assert good, words


def test_a_round_has_every_backend() -> None:
    stages = soak.stages_of(100, 100)
    assert {f"memory, {name}" for name in available()} < set(stages)
    assert {"fuzz", "training"} < set(stages)
