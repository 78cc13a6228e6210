"""The harness of the benchmarks: statistics, targets, judgement and the report; no peer is needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

import lpgd
from benchmarks import (
    blackbox,
    memory,
    node_table,
    nodes_backward,
    nodes_pooling,
    nodes_regression,
    nodes_sphere,
    nodes_transport,
    run,
)
from benchmarks.dense_qp import dense_qp_case, draw_qps, our_qp_sides
from benchmarks.exact import solve_qp_exactly
from benchmarks.harness import Case, Settings, Side, compare, time_limit
from benchmarks.report import markdown, write_report
from benchmarks.results import Curve, Entry, Result, Target, Timing, fastest, ratio_target
from tests.oracles import assignments, monotone_paths, packings

FAST = Settings(quick=True, repeats=1)


def entry(library: str, mode: str, *totals: float, kind: str = "exact") -> Entry:
    timing = Timing()
    for total in totals:
        timing.add(0.75 * total, 0.25 * total)
    return Entry(library, mode, kind, timing=timing)


def sided(name: str, factor: float = 1.0) -> Side:
    """A library of its own whose solution is ours times a factor."""
    ours = next(side for side in our_qp_sides(("CLARABEL",), ()) if side.mode.startswith("CLARABEL"))

    def call(data):
        value, _ = ours.call(data)
        return factor * value, None

    return Side(name, "copy", "exact", call)


class TestStatistics:
    def test_median_and_spread_of_the_totals(self):
        timing = Timing([1.0, 3.0, 2.0], [0.5, 0.5, 1.5])
        assert timing.total == 3.5
        assert timing.spread == pytest.approx((3.5 - 1.5) / 3.5)
        assert Timing([1.0], [1.0]).spread is None

    def test_the_fastest_leaves_out_what_is_wrong_and_what_failed(self):
        wrong, slow, failed = entry("a", "x", 1.0), entry("a", "y", 2.0, 4.0, 3.0), Entry("a", "z", "exact", error="no")
        wrong.disagrees = "off"
        assert fastest([wrong, slow, failed], "a") is slow
        assert fastest([wrong, failed], "a") is None

    def test_a_target_is_the_fastest_peer_over_our_fastest(self):
        entries = [
            entry("lpgd", "default", 2.0),
            entry("lpgd", "DAQP", 0.5),
            entry("p", "x", 3.0),
            entry("r", "x", 2.0),
        ]
        result = Result("c", "case", "a case", 4, entries)
        target = ratio_target(result, "t", 3.0, 6.0, ("p", "r"))
        assert target.reached == pytest.approx(4.0)
        assert target.verdict == "met"
        assert "default reaches 1.00" in target.note
        assert ratio_target(result, "t", 3.0, 6.0, "absent").verdict == "not measured"

    @pytest.mark.parametrize(
        ("reached", "smaller", "verdict"),
        [
            (7.0, False, "stretch"),
            (2.9, False, "missed"),
            (1.0, True, "stretch"),
            (4.0, True, "missed"),
            (3.0, True, "met"),
        ],
    )
    def test_verdicts(self, reached, smaller, verdict):
        bounds = (3.0, 1.5) if smaller else (3.0, 6.0)
        assert Target("t", *bounds, reached, smaller=smaller).verdict == verdict

    def test_no_target_is_neither_met_nor_missed(self):
        assert Target("t", None, None, 2.0).verdict == "no target"
        assert Target("t", None, None, None).verdict == "not measured"


class TestJudgement:
    def test_exact_solutions_meet_those_of_another_method(self):
        P, q, A, b, G, h = (value[0].numpy() for value in draw_qps(8, 1, seed=3))
        x = solve_qp_exactly(P, q, A, b, G, h)
        other = scipy.optimize.minimize(
            lambda x: 0.5 * x @ P @ x + q @ x,
            x,
            jac=lambda x: P @ x + q,
            method="SLSQP",
            constraints=[
                {"type": "eq", "fun": lambda x: A @ x - b, "jac": lambda x: A},
                {"type": "ineq", "fun": lambda x: h - G @ x, "jac": lambda x: -G},
            ],
            options={"ftol": 1e-15},
        )
        np.testing.assert_allclose(x, other.x, atol=1e-6)
        assert np.abs(A @ x - b).max() < 1e-12
        assert (G @ x - h).max() < 1e-10

    def test_sides_that_agree_and_one_that_does_not(self):
        sides = [*our_qp_sides(("CLARABEL",), ()), sided("right"), sided("wrong", 1.01)]
        result = compare(dense_qp_case(6, 3), sides, FAST)
        found = {entry.library: entry for entry in result.entries}
        assert found["lpgd"].accuracy.solution < 1e-4
        assert found["lpgd"].accuracy.gradient < 1e-2
        assert found["right"].disagrees is None
        assert found["right"].accuracy.cosine == pytest.approx(1.0, abs=1e-6)
        assert "its solution" in found["wrong"].disagrees
        assert fastest(result.entries, "wrong") is None

    def test_a_wrong_gradient_does_not_count(self):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        inner = sided("double")
        side = inner._replace(call=lambda data: (Doubled.apply(inner.call(data)[0]), None))
        (result,) = compare(dense_qp_case(6, 2), [side], FAST).entries
        assert result.accuracy.gradient == pytest.approx(1.0, abs=1e-2)
        assert "gradient" in result.disagrees

    def test_failures_and_missing_peers_are_on_record(self):
        def fail(data):
            raise ArithmeticError("no luck")

        sides = [Side("a", "x", "exact", fail), Side("b", "x", "exact", None, missing="not installed (pip install b)")]
        result = compare(dense_qp_case(4, 2), [*sides, sided("c")._replace(slow=True)], FAST)
        assert [entry.error for entry in result.entries] == [
            "ArithmeticError: no luck",
            "not installed (pip install b)",
            "slow: not run with --quick",
        ]

    def test_a_run_that_does_not_end_is_given_up(self):
        def endless():
            with time_limit(0.05):
                while True:
                    pass

        with pytest.raises(TimeoutError, match=r"after 0\.05 s"):
            endless()

    def test_a_kink_within_the_step_is_no_wrong_gradient(self):
        def exactly(data, elements):
            return data[0][list(elements)].abs()

        def judge(data, points, elements):
            return np.zeros(len(elements)), 0.0

        def draw(seed):
            return (torch.tensor([[1e-3], [2.0]], dtype=torch.float64),)

        side = Side("a", "x", "exact", lambda data: (data[0].abs(), None))
        case = Case("c", "kink", "a kink", 2, draw, torch.sum, judge, exactly, step=1e-3)
        (found,) = compare(case, [side], FAST).entries
        assert found.accuracy.gradient_floor > 1e-2
        assert found.disagrees is None
        (found,) = compare(dataclasses.replace(case, step=1e-5), [side], FAST).entries
        assert found.accuracy.gradient < 1e-9


class TestBlackbox:
    @pytest.mark.parametrize("problem", blackbox.PROBLEMS, ids=lambda problem: problem.name)
    def test_solvers_find_the_best_of_all_solutions(self, problem):
        points = {
            "assignment": lambda: assignments(4),
            "path": lambda: monotone_paths(4, 4),
            "knapsack": lambda: packings(problem.solver.weights, problem.solver.capacity),
        }[problem.name]()
        sign = 1.0 if problem.sense == "min" else -1.0
        for seed in range(20):
            costs = np.random.default_rng(seed).standard_normal(tuple(points.shape[1:]))
            found, values = problem.solver(costs), sign * (points.numpy() * costs).reshape(len(points), -1).sum(-1)
            assert sign * (found * costs).sum() == pytest.approx(values.min(), abs=1e-12)
            assert (points.numpy() == found).reshape(len(points), -1).all(-1).any()

    def test_targets(self):
        targets = list(blackbox.run(FAST))
        assert [target.reached is None for target in targets[:2]] == [False, False]
        assert "ratio" in targets[0].title
        for target in targets[2:]:
            if target.reached is None:
                assert "pip install pyepo" in target.note
            else:
                assert target.reached < 1e-12


class TestReport:
    def test_files(self, tmp_path: Path):
        entries = [
            entry("lpgd", "default", 0.5),
            entry("peer", "x|y", 1.0, 1.0),
            Entry("gone", "x", "exact", error="why"),
        ]
        curve = Curve("growth", "growth", "n", "seconds", {"lpgd": [(1, 0.1), (2, 0.2)]})
        panels = [Curve(f"panel {n}", f"panel {n}", "n", "MiB", {"lpgd": [(1, n)]}, "panels") for n in (1, 2)]
        found = [Result("c", "case", "a case", 4, entries), Target("speed", 1.5, None, 2.0), curve, *panels]
        write_report(tmp_path, found, {"cores": 2})
        record = json.loads((tmp_path / "report.json").read_text())
        assert record["results"][0]["ratios"]["peer, x|y"] == 2.0
        assert record["targets"][0]["verdict"] == "met"
        text = (tmp_path / "report.md").read_text()
        assert "| speed | ≥ 1.5 | – | 2 | met |" in text
        assert "why" in text
        assert all(line.replace("\\|", "").count("|") == 14 for line in text.splitlines() if line.startswith("| peer"))
        assert (tmp_path / "ratios.png").stat().st_size > 0
        assert (tmp_path / "growth.png").stat().st_size > 0
        assert text.count("](panels.png)") == 1
        assert (tmp_path / "panels.png").stat().st_size > 0

    def test_nothing_measured(self):
        assert "# Benchmarks" in markdown([], [Target("t", 1.0, None, None, note="no file")], [], {})

    def test_command(self, tmp_path: Path):
        arguments = ["--out", str(tmp_path), "--only", "maros_meszaros", "--maros-meszaros", str(tmp_path / "none.npz")]
        assert run.main([*arguments, "--quick"]) == 0
        assert "not measured" in (tmp_path / "report.md").read_text()
        assert torch.get_default_dtype() is torch.float32


class TestNodes:
    def test_both_gradients_of_the_sphere_are_the_same(self):
        A, b = nodes_sphere.draw(3, 6, 4)
        node = lpgd.nodes.SphereLeastSquares()
        answer = node.solve((A, b), None)
        cotangent = torch.ones_like(answer.y)
        structured = node.vjp((A, b), answer.y, cotangent, answer.aux)
        for one, other in zip(structured, nodes_sphere.through_jacobian(A, b, answer.y, cotangent), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)

    def test_shares_of_global_minima(self):
        found, inside = nodes_sphere.shares(2, 2, 20)
        assert 0 < inside < 20
        assert found["secular"].best == found["secular"].not_worse == 1.0
        for share in found.values():
            assert 0.0 <= share.best <= share.not_worse <= 1.0
            assert share.inside + share.outside == round(20 * (1.0 - share.best))
            assert share.error >= 0.0

    @pytest.mark.parametrize("row", node_table.TABLE, ids=lambda row: row.name)
    def test_three_ways_to_a_gradient_are_one(self, row):
        found = nodes_backward.measure(row, row.sizes[0], 1)
        assert found[nodes_backward.GENERIC].gradient_error < 1e-12
        assert found[nodes_backward.GENERIC].solution_error == 0.0
        unrolled = found[nodes_backward.UNROLLED]
        assert all(one.error is None and one.seconds > 0 for one in found.values())
        if "truncated" in row.name:  # the weighted means end in other local minima, which the node's exact solver beats
            assert unrolled.gradient_error > 0.01
        elif "total variation" in row.name:  # its dual converges slowly
            assert unrolled.solution_error < 0.01
            assert unrolled.gradient_error < 0.1
        else:
            assert unrolled.solution_error < 1e-7
            assert unrolled.gradient_error < 1e-5

    def test_what_a_side_raises_is_on_record(self):
        def fail(data):
            raise ArithmeticError("no luck")

        found = nodes_backward.measure(dataclasses.replace(node_table.TABLE[0], unrolled=fail), 10, 1)
        assert found[nodes_backward.UNROLLED].error == "ArithmeticError: no luck"
        assert found[nodes_backward.STRUCTURED].error is None
        assert found[nodes_backward.GENERIC].gradient_error < 1e-12

    def test_memory_of_a_backward_pass_does_not_grow_with_iterations(self):
        with memory.measuring_process() as ask:
            ours, theirs = (
                [
                    ask(nodes_transport.peak, 200, iterations, structured) for iterations in (60, 360)
                ]  # both with Newton steps
                for structured in (True, False)
            )
        if not Path("/proc/self/clear_refs").exists():
            assert ours == theirs == [None, None]
            return
        assert ours[1] == pytest.approx(ours[0], rel=0.2)
        assert theirs[1] == pytest.approx(6 * theirs[0], rel=0.3)

    def test_our_sides_of_least_squares_are_right(self):
        sides = [Side("torch", "lstsq", "exact", nodes_regression.by_lstsq)]
        layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares())
        sides.append(Side("lpgd", "QR", "exact", lambda data: (layer(*data), None)))
        for shared in (False, True):
            result = compare(nodes_regression.least_squares_case(3, 8, 3, shared), sides, FAST)
            for entry in result.entries:
                assert entry.error is None
                assert entry.disagrees is None
                assert entry.accuracy.cosine == pytest.approx(1.0)


def test_the_shared_lbfgs_minimises_what_the_node_does() -> None:
    x = nodes_pooling.images((2, 3, 6, 6)).double()
    node = lpgd.nodes.RobustPooling("huber", dim=(-2, -1))
    expected = lpgd.NodeLayer(node)(x).reshape(-1)
    torch.testing.assert_close(nodes_pooling.shared_lbfgs(node, x), expected, atol=1e-4, rtol=1e-4)
