"""The process that runs cases and prints a line of JSON for each chunk: FRONT_END SEED FIRST LAST."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback

import torch

from tests.fuzz.cases import CHUNK, Chunk, Finding
from tests.fuzz.front_ends import FRONT_ENDS
from tests.fuzz.runner import LIMIT


def main() -> None:
    name, (seed, first, last) = sys.argv[1], map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    parent = os.getppid()
    for number in range(first, last):
        if os.getppid() != parent:  # nobody reads this any more
            return
        faulthandler.dump_traceback_later(LIMIT - 5.0)
        try:
            chunk = FRONT_ENDS[name](seed, number)
        except Exception:  # whatever comes out of a layer is a finding
            chunk = Chunk(number)
            chunk.counts["crash"] = CHUNK
            chunk.findings.append(Finding(number * CHUNK, "crash", traceback.format_exc()[-1500:]))
        faulthandler.cancel_dump_traceback_later()
        report = {
            "number": number,
            "counts": chunk.counts,
            "patterns": chunk.patterns,
            "faults": chunk.faults,
            "findings": [list(finding) for finding in chunk.findings],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
