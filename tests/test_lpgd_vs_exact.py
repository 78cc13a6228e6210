"""The example that compares gradient methods: its task, its measurements and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lpgd
from examples.lpgd_vs_exact import run
from examples.lpgd_vs_exact.model import CURVATURE, DecisionModel, decision_loss, make_task


@pytest.mark.parametrize("kind", CURVATURE)
def test_observed_solutions_are_optimal(kind: str) -> None:
    """No feasible point, drawn at random towards or away from it, has a smaller objective of the decision maker's."""
    task = make_task(kind, seed=3, n=6, k=2, d=3, train=4, test=2)
    again = make_task(kind, seed=3, n=6, k=2, d=3, train=4, test=2)
    torch.testing.assert_close(task.solutions, again.solutions, rtol=0.0, atol=0.0)
    generator = torch.Generator().manual_seed(3)
    G = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    weights = torch.randn(6, 3, dtype=torch.float64, generator=generator) / 3**0.5
    limits = 0.25 * G.sum(-1)
    torch.testing.assert_close(G, task.G, rtol=0.0, atol=0.0)
    torch.testing.assert_close(2 * limits, task.model().limits)
    points = torch.rand(2000, 6, dtype=torch.float64, generator=generator)
    points = points * (limits / (points @ G.T)).amin(-1, keepdim=True).clamp(max=1.0)  # scaled into the limits
    for features, x in zip(task.features, task.solutions, strict=True):
        assert (G @ x <= limits + 1e-6).all()
        assert ((x >= -1e-7) & (x <= 1 + 1e-7)).all()
        costs = weights @ features
        values = points @ costs + 0.5 * CURVATURE[kind] * points.square().sum(-1)
        assert (values >= costs @ x + 0.5 * CURVATURE[kind] * x.square().sum() - 1e-6).all()


def test_methods_by_name() -> None:
    assert run.gradient_method("exact", 1.0, 0.5) == lpgd.ImplicitKKT()
    assert run.gradient_method("small", 1.0, 0.5) == lpgd.LPGD()
    assert run.gradient_method("upper", 2.0, 0.5) == lpgd.LPGD(2.0, 0.5, "upper")
    assert run.cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])) == -1.0
    assert run.cosine(torch.zeros(2), torch.ones(2)) is None


FLAGS = [
    "--steps",
    "12",
    "--every",
    "6",
    "--train-size",
    "20",
    "--test-size",
    "20",
    "--batch-size",
    "10",
    "--lr",
    "0.05",
]


def test_small_steps_are_exact_on_the_quadratic_program() -> None:
    options = run.parse_arguments(FLAGS)
    task = make_task("qp", 0, train=20, test=20)
    rows: list[dict[str, Any]] = []
    for name in ("exact", "small"):
        run.train(task, name, run.gradient_method(name, 1.0, 0.0), options, lambda **row: rows.append(row))
    assert [row["step"] for row in rows] == [0, 6, 12] * 2
    for exact, small in zip(rows[:3], rows[3:], strict=True):
        assert small["cosine_weights"] > 1 - 1e-4
        assert small["test_loss"] == pytest.approx(exact["test_loss"], rel=1e-3)
    assert rows[2]["test_loss"] < rows[0]["test_loss"]


def test_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--problems", "lp", "--methods", "exact", "average", "--out", str(tmp_path)]
    assert run.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    exact, average = ([row for row in rows if row["method"] == method] for method in ("exact", "average"))
    assert [row["step"] for row in exact] == [row["step"] for row in average] == [0, 6, 12]
    assert exact[0]["test_loss"] == average[0]["test_loss"]
    assert all(row["cosine_weights"] is None for row in average)
    assert all(row["norm_weights"] == 0.0 for row in exact)
    assert average[-1]["test_loss"] < exact[-1]["test_loss"]
    printed = capsys.readouterr().out
    assert "lp at the start, which tau?" in printed
    assert "in two stages" in printed
    for name in ("curves", "sweep-lp", "envelopes-lp", "path-lp"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="--overwrite replaces it"):
        run.main(flags)


def test_loss_and_model_shapes() -> None:
    task = make_task("qp", seed=0, n=4, k=1, d=2, train=3, test=1)
    model = DecisionModel("qp", task.G, task.weights, task.limits)
    x = model(task.features).x
    assert x.shape == (3, 4)
    assert decision_loss(x, x + 1.0).item() == pytest.approx(4.0)
