"""Every front-end of the fuzz target by name."""

from __future__ import annotations

from functools import partial

from tests.fuzz.cases import FrontEnd
from tests.fuzz.nodes import fuzz_node
from tests.fuzz.oracles import fuzz_direct_loss, fuzz_integer, fuzz_oracle
from tests.fuzz.programs import PROGRAMS, fuzz

__all__ = ["FRONT_ENDS"]

FRONT_ENDS: dict[str, FrontEnd] = {name: partial(fuzz, name, front_end) for name, front_end in PROGRAMS.items()}
FRONT_ENDS |= {"node": fuzz_node, "blackbox": fuzz_oracle, "direct loss": fuzz_direct_loss, "integer": fuzz_integer}
