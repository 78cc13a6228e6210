"""``python -m tests.judge --family redundant --count 10000 --seed 0``: the judge as a command.

It prints the counts of every front-end, solver and method, the first findings of each kind with a command that repeats
one, and exits 1 if anything is silently wrong (for programs that must be answered, also if an answer is missing).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch
from tqdm import tqdm

from tests.judge.families import FAMILIES
from tests.judge.front_ends import FRONT_ENDS
from tests.judge.judge import METHODS, SILENT, Finding, Tally, judge

MUST_ANSWER = ("compact", "strict")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.judge", description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--count", type=int, default=1000, help="programs of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first program: resumes a run, or repeats one")
    parser.add_argument(
        "--solver", action="append", help="a name, or 'default' for the layer's choice (may be repeated)"
    )
    parser.add_argument("--front-end", action="append", choices=list(FRONT_ENDS))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--findings", type=int, default=12, help="how many findings to print for each family")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    solvers = None if options.solver is None else tuple(name.upper() for name in options.solver)
    solvers = solvers and tuple("default" if name == "DEFAULT" else name for name in solvers)
    bad = 0
    for family in FAMILIES if options.family == "all" else [options.family]:
        tally = Tally()
        with tqdm(total=options.count, desc=family, unit="program", mininterval=2.0) as bar:
            for done, _ in judge(
                family,
                options.count,
                options.seed,
                options.start,
                tuple(options.front_end or FRONT_ENDS),
                solvers,
                tuple(options.method or METHODS),
                tally,
            ):
                bar.update(done)
                bar.set_postfix(silent=tally.total(*SILENT), failed=tally.total("failed"), refresh=False)
        report(family, tally, options.findings)
        bad += tally.total(*SILENT) + (tally.total("failed") if family in MUST_ANSWER else 0)
    return int(bad > 0)


def report(family: str, tally: Tally, findings: int) -> None:
    """Print the counts and the first findings, the silent ones first."""
    print(f"\n{family}")
    for key, counts in sorted(tally.counts.items()):
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        print(f"  {key[1]:8} {key[2]:9} {key[3]:10} {outcomes}")
    order = {name: place for place, name in enumerate(SILENT)}
    seen: Counter[tuple[str, str]] = Counter()
    shown: list[Finding] = []
    for finding in sorted(tally.findings, key=lambda finding: order.get(finding.what, len(order))):
        kind = (finding.what, finding.where.partition(":")[0])
        seen[kind] += 1
        if seen[kind] <= 2:
            shown.append(finding)
    for finding in shown[:findings]:
        print(f"  {finding.what}: {finding.where}\n    {finding.detail}\n    {finding.command}")
    for note, count in tally.notes.most_common(5):
        print(f"  {count} × {note}")


if __name__ == "__main__":
    sys.exit(main())
