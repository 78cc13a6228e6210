"""The knapsack example: data, loss, baseline, and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.knapsack import train
from examples.knapsack.baseline import infeasible_packings, two_stage
from examples.knapsack.data import make_truth, observe
from examples.knapsack.model import KnapsackModel, layer_of, packing_loss, reproduced

TRUTH = make_truth(6, 2, seed=0)
ORDERS = observe(TRUTH, 40, 0.0, seed=1)
POINTS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)


def test_observed_packings_are_the_best_that_fit() -> None:
    for values, van, packing in zip(ORDERS.values, ORDERS.vans, ORDERS.packings, strict=True):
        fitting = POINTS[TRUTH.capacities[van] - POINTS @ TRUTH.weights >= -1e-9]
        assert torch.equal(packing, fitting[(fitting @ values).argmax()])
    noisy = observe(TRUTH, 40, 0.3, seed=1)
    assert torch.equal(noisy.packings, ORDERS.packings)
    assert not torch.equal(noisy.values, ORDERS.values)


def test_the_loss_is_the_hamming_distance_and_leaves_right_packings_alone() -> None:
    observed = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    packings = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]], requires_grad=True)
    loss = packing_loss(packings, observed)
    assert float(loss.detach()) == 2.0
    (gradient,) = torch.autograd.grad(loss, packings)
    assert gradient.tolist() == [[-1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]
    assert reproduced(packings, observed).tolist() == [False, True]


@pytest.mark.parametrize("exchanges", [False, True])
def test_what_a_better_packer_left_out_did_not_fit_and_the_baseline_separates_it(exchanges: bool) -> None:
    bad, vans = infeasible_packings(ORDERS, exchanges)
    assert (bad @ TRUTH.weights > TRUTH.capacities[vans]).all()
    rules = two_stage(ORDERS, 2, exchanges, cost=1e4)
    assert (ORDERS.packings @ rules.weights <= rules.capacities[ORDERS.vans] + 1e-3).all()
    assert (bad @ rules.weights > rules.capacities[vans] - 1e-3).all()


def test_only_the_relaxations_multipliers_give_constraints_a_gradient() -> None:
    model = KnapsackModel(6, 2, seed=0)
    assert float(model.weights.detach().min()) >= 0.2
    for method in ("lower", "fixed"):
        model.zero_grad()
        packings = model(layer_of(method, 6, tau=1.0), ORDERS.values, ORDERS.vans)
        packing_loss(packings, ORDERS.packings).backward()
        assert all(bool(part.grad.any()) == (method == "lower") for part in model.parameters())
    with pytest.raises(ValueError, match="'exact'; expected one of lower, average"):
        layer_of("exact", 6, tau=1.0)


def test_the_command_learns_and_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--items 6 --vans 2 --train-size 40 --validation-size 20 --test-size 20 --restarts 1 --tests 2 --noise 0"
    methods = ["lower", "fixed", "relaxed"]
    flags = [*small.split(), "--steps", "40", "--batch-size", "8", "--out", str(tmp_path), "--methods", *methods]
    assert train.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["truth"]["shares"] == [1.0]
    start = results["start, and exact gradient"]
    assert start["largest difference quotient"] == 0.0
    assert results[train.TITLES["fixed"]]["shares"] == start["shares"]
    assert results[train.TITLES["lower"]]["shares"][0] > start["shares"][0] + 0.2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 20, 40, 0, 20, 0, 20, 40]  # without a gradient the second run ends
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert np.isfinite([row["seconds"] for row in rows]).all()
    assert "held-out packings reproduced" in capsys.readouterr().out


def test_flags_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(["--tau", "0"])
    assert "--tau is 0.0; it must be positive." in capsys.readouterr().err
