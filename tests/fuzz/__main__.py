"""``python -m tests.fuzz --front-end qp --count 100000 --seed 0 --state FILE``: the fuzz target as a command.

A front-end's cases are numbered; a hundred are a batch, and ``--start CASE --count 1`` repeats the batch of one.  With
``--state`` a run that ended goes on where it was.  It prints counts and the findings, and exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from tests.fuzz.cases import CHUNK
from tests.fuzz.front_ends import FRONT_ENDS
from tests.fuzz.runner import State, run_watched


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--front-end", action="append", choices=list(FRONT_ENDS))
    parser.add_argument("--count", type=int, default=1000, help="cases of each front-end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first case, without a state")
    parser.add_argument("--state", type=Path, help="a file in which the run is kept, and from which it goes on")
    parser.add_argument("--findings", type=int, default=12, help="how many findings to print of each front-end")
    options = parser.parse_args(arguments)
    states = []
    for name in options.front_end or FRONT_ENDS:
        state = State.load(options.state, name, options.seed)
        start = state.done if options.state is not None else options.start
        last = -(-(options.start + options.count) // CHUNK)
        with tqdm(total=last * CHUNK, initial=start, desc=name, unit="case", mininterval=5.0) as bar:
            for report in run_watched(name, options.seed, start // CHUNK, last):
                state.add(report)
                if options.state is not None:
                    state.save(options.state)
                bar.update(CHUNK)
                bar.set_postfix(unexplained=state.unexplained, refresh=False)
        states.append(state)
        describe(state, options.findings)
    return int(any(state.unexplained or state.findings for state in states))


def describe(state: State, findings: int) -> None:
    """Print counts and the first findings."""
    outcomes = ", ".join(f"{name} {count}" for name, count in state.counts.most_common())
    cases = state.counts.total()
    print(f"\n{state.front_end}: {cases} cases in {-(-cases // CHUNK)} batches, {state.unexplained} unexplained")
    print(f"  {outcomes}")
    if state.patterns:
        print("  " + ", ".join(f"{name} {count}" for name, count in sorted(state.patterns.items())))
    for finding in state.findings[:findings]:
        print(f"  {finding['what']}: {finding['detail']}\n    {finding['command']}")


if __name__ == "__main__":
    sys.exit(main())
