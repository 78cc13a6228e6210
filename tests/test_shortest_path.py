"""The shortest-path example: maps, Dijkstra, gradients through it, training and plots."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lpgd
from examples.shortest_path import plot, train
from examples.shortest_path.data import PIXELS, TERRAINS, Maps, generate_maps
from examples.shortest_path.grid import GridPaths, path_costs
from examples.shortest_path.model import METHODS, PathModel, gradient_method, hamming_distance

# -- Dijkstra


@cache
def every_path(height: int, width: int) -> NDArray[np.float64]:
    """The indicators of all simple paths between the corners, by depth-first search: (paths, height, width)."""
    found: list[NDArray[np.float64]] = []
    visited = np.zeros((height, width))

    def extend(row: int, column: int) -> None:
        visited[row, column] = 1
        if (row, column) == (height - 1, width - 1):
            found.append(visited.copy())
        else:
            for i in range(max(row - 1, 0), min(row + 2, height)):
                for j in range(max(column - 1, 0), min(column + 2, width)):
                    if not visited[i, j]:
                        extend(i, j)
        visited[row, column] = 0

    extend(0, 0)
    return np.stack(found)


def least_cost(costs: NDArray[np.float64]) -> float:
    """The cost of a cheapest path by Bellman's equation, repeated until nothing changes."""
    distances = np.full(costs.shape, np.inf)
    distances[0, 0] = costs[0, 0]
    while True:
        padded = np.pad(distances, 1, constant_values=np.inf)
        around = [padded[i : i + costs.shape[0], j : j + costs.shape[1]] for i in range(3) for j in range(3)]
        better = np.minimum(distances, costs + np.min(around, axis=0))
        if (better == distances).all():
            return float(distances[-1, -1])
        distances = better


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 4)])
def test_the_cheapest_path_is_the_one_that_enumeration_finds(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    find_path, paths = GridPaths(*shape), every_path(*shape)
    for _ in range(20):
        costs = generator.random(shape)
        np.testing.assert_array_equal(find_path(costs), paths[np.argmin((paths * costs).sum((1, 2)))])


@pytest.mark.parametrize("shape", [(12, 12), (7, 19)])
def test_a_path_costs_what_bellmans_equation_says_and_is_connected(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    find_path = GridPaths(*shape)
    for _ in range(10):
        costs = generator.exponential(size=shape)
        path = find_path(costs)
        assert (path * costs).sum() == pytest.approx(least_cost(costs), rel=1e-12)
        # With positive costs a cheapest path meets no cell twice: each inner cell has two neighbours on it.
        padded = np.pad(path, 1)
        around = sum(padded[i : i + shape[0], j : j + shape[1]] for i in range(3) for j in range(3)) - path
        assert path[0, 0] == path[-1, -1] == 1
        assert around[0, 0] == around[-1, -1] == 1
        inner = path.copy()
        inner[0, 0] = inner[-1, -1] = 0
        assert (around[inner > 0] == 2).all()


def test_costs_of_zero_are_free_and_other_costs_are_refused() -> None:
    costs = np.ones((3, 3))
    costs[2, 0] = costs[1, 0] = 0
    costs[1, 1] = 3
    find_path = GridPaths(3, 3)
    assert (costs * find_path(costs)).sum() == 3  # down, over free cells, and along the bottom
    for bad, shown in ((-0.5, "-0.5"), (np.nan, "nan"), (np.inf, "inf")):
        costs[1, 2] = bad
        with pytest.raises(ValueError, match=rf"cell \(1, 2\) is {shown}; Dijkstra's algorithm needs finite costs"):
            find_path(costs)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(3, 3\)"):
        find_path(np.ones((2, 3)))
    with pytest.raises(ValueError, match="0 × 3 cells has no paths"):
        GridPaths(0, 3)


# -- maps


@pytest.fixture(scope="module")
def maps() -> Maps:
    return generate_maps(12, 12, 14, (3, 0))


def test_a_seed_fixes_the_maps_and_fewer_are_the_first_of_more(maps: Maps) -> None:
    again, other = generate_maps(4, 12, 14, (3, 0)), generate_maps(4, 12, 14, (3, 1))
    for name in ("images", "terrain", "costs", "paths"):
        np.testing.assert_array_equal(getattr(again, name), getattr(maps, name)[:4])
        assert not np.array_equal(getattr(other, name), getattr(again, name))
    assert len(np.unique(maps.terrain.reshape(len(maps), -1), axis=0)) == len(maps)


def test_maps_hold_images_true_costs_and_paths_that_cost_the_least(maps: Maps) -> None:
    assert maps.images.shape == (12, 3, 12 * PIXELS, 14 * PIXELS)
    assert maps.images.dtype == np.float32
    assert maps.images.min() >= 0
    assert maps.images.max() <= 1
    np.testing.assert_array_equal(maps.costs, np.array([1, 2, 4, 7, 10])[maps.terrain])
    assert set(np.unique(maps.terrain)) == set(range(len(TERRAINS)))
    for costs, path in zip(maps.costs, maps.paths, strict=True):
        assert (costs * path).sum() == least_cost(costs)
    with pytest.raises(ValueError, match="1 × 5 cells are too small"):
        generate_maps(1, 1, 5, (0,))


def test_meadow_and_forest_look_alike_but_for_their_texture() -> None:
    maps = generate_maps(40, 12, 12, (0, 0))
    cells = maps.images.reshape(40, 3, 12, PIXELS, 12, PIXELS).transpose(0, 2, 4, 1, 3, 5)
    inside = cells[..., 2:-2, 2:-2].reshape(40, 12, 12, 3, -1)
    colour, contrast = inside.mean(-1), inside.std(-1).mean(-1)
    means = [colour[maps.terrain == terrain].mean(0) for terrain in range(len(TERRAINS))]
    meadow, forest = TERRAINS.index("meadow"), TERRAINS.index("forest")
    others = [
        np.abs(means[meadow] - means[other]).max() for other in range(len(TERRAINS)) if other not in (meadow, forest)
    ]
    assert np.abs(means[meadow] - means[forest]).max() < 0.02
    assert min(others) > 0.1
    assert contrast[maps.terrain == forest].mean() > 1.5 * contrast[maps.terrain == meadow].mean()


# -- gradients


def enumerated(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    paths = every_path(*costs.shape)
    return paths[np.argmin((paths * costs).sum((1, 2)))]


@pytest.mark.parametrize("method", ["lower", "average", "upper"])
def test_a_methods_gradient_is_a_difference_of_enumerated_paths(method: str) -> None:
    generator = np.random.default_rng(2)
    tau = 0.7
    costs = 1 + generator.random((8, 3, 3))
    paths = np.stack([enumerated(generator.random((3, 3))) for _ in range(8)])
    leaf = torch.from_numpy(costs).requires_grad_()
    answers = PathModel(method, 3, 3, tau, 4, 0).layer(leaf)
    hamming_distance(answers, torch.from_numpy(paths)).sum().backward()
    slope = 1 - 2 * paths  # of the Hamming distance: 1 off the path, -1 on it
    below, above = {"lower": (0, 1), "upper": (-1, 0), "average": (-1, 1)}[method]
    ends = [np.stack([enumerated(c) for c in costs + sign * tau * slope]) for sign in (below, above)]
    np.testing.assert_array_equal(answers.detach(), np.stack([enumerated(c) for c in costs]))
    np.testing.assert_allclose(leaf.grad, (ends[1] - ends[0]) / ((above - below) * tau), atol=1e-12)
    assert leaf.grad.abs().sum() > 0


def flow_program(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Paths as unit flows: (A, b, heads) of A f = b, f ≥ 0, where an edge costs what the cell that it enters costs."""
    cells = [(row, column) for row in range(height) for column in range(width)]
    pairs = [(tail, head) for tail in range(len(cells)) for head in range(len(cells)) if tail != head]
    edges = [(tail, head) for tail, head in pairs if np.abs(np.subtract(cells[tail], cells[head])).max() == 1]
    A = np.zeros((len(cells), len(edges)))
    for place, (tail, head) in enumerate(edges):
        A[tail, place], A[head, place] = 1, -1
    b = np.zeros(len(cells))
    b[0], b[-1] = 1, -1
    return A[:-1], b[:-1], np.array([head for _, head in edges])  # the last row is minus the sum of the others


def test_the_exact_method_has_the_gradient_of_the_linear_program_which_is_zero() -> None:
    costs = 1 + np.random.default_rng(4).random((3, 3))
    costs[1, 1] = 5.0  # the cheapest path goes around the middle, the path to be learned through it
    path = torch.from_numpy(np.eye(3))
    A, b, heads = (torch.from_numpy(part) for part in flow_program(3, 3))
    exact = torch.from_numpy(costs).requires_grad_()
    program = lpgd.LPLayer(gradient=lpgd.ImplicitKKT())(exact.reshape(-1)[heads], A=A, b=b, lb=0.0)
    flows = torch.zeros(9, dtype=torch.float64).index_add(0, heads, program.x)
    flows = flows + torch.eye(9, dtype=torch.float64)[0]  # no edge of the path enters its first cell
    with warnings.catch_warnings():
        # Of a gradient that is zero, and of multipliers that are not unique: cells off the path conserve no flow.
        warnings.simplefilter("ignore", lpgd.LpgdWarning)
        hamming_distance(flows.reshape(3, 3), path).backward()
    leaf = torch.from_numpy(costs).requires_grad_()
    answer = PathModel("exact", 3, 3, 1.0, 4, 0).layer(leaf)
    hamming_distance(answer, path).backward()
    np.testing.assert_allclose(flows.detach().reshape(3, 3), answer.detach(), atol=1e-6)
    assert not torch.equal(answer.detach(), path)  # there is something to learn
    assert leaf.grad.abs().max() == 0
    assert exact.grad.abs().max() < 1e-6


def test_an_unknown_method_and_a_tau_that_makes_costs_negative_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of lower, average, upper, exact, costs, cells"):
        gradient_method("middle", 1.0)
    with pytest.raises(ValueError, match=r"tau is 1\.5; it must be positive and at most 1, the least cost"):
        gradient_method("average", 1.5)


# -- training


def test_measures_of_paths_by_hand() -> None:
    costs = np.ones((2, 3, 3))
    costs[:, 1, 1] = 4.0
    best, other = np.array([[1.0, 1, 0], [0, 0, 1], [0, 0, 1]]), np.eye(3)
    alike = best.T
    maps = Maps(np.zeros((2, 3, 24, 24), np.float32), np.zeros((2, 3, 3), np.int8), costs, np.stack([best, best]))
    found = train.measures(np.stack([alike, other]), maps)
    assert path_costs(costs, np.stack([alike, other])).tolist() == [4, 6]
    assert found == {"optimal": 0.5, "excess": 0.25, "hamming": 3.5}  # 4 and 3 cells differ


def command(out: Path, *more: str) -> list[str]:
    sizes = ["--size", "6", "--train-size", "128", "--test-size", "40", "--epochs", "4", "--batch-size", "16"]
    return [*sizes, "--lr", "5e-3", "--out", str(out), *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paths") / "runs"
    assert train.main(command(out)) == 0
    return out


def rows(out: Path, method: str, split: str) -> list[dict[str, Any]]:
    lines = (out / method / "seed-0" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.mark.parametrize("method", ["lower", "average", "costs"])
def test_a_short_run_finds_much_cheaper_paths_than_its_start(method: str, runs: Path) -> None:
    held_out = rows(runs, method, "test")
    assert [row["epoch"] for row in held_out] == [0, 1, 2, 3, 4]
    assert held_out[-1]["excess"] < 0.5 * held_out[0]["excess"]
    assert held_out[-1]["optimal"] > held_out[0]["optimal"] + 0.15


def test_the_exact_gradient_stays_at_its_start(runs: Path) -> None:
    held_out, training = rows(runs, "exact", "test"), rows(runs, "exact", "train")
    assert len({(row["optimal"], row["excess"], row["hamming"]) for row in held_out}) == 1
    assert held_out[0]["excess"] > 0.05
    assert all(row["moved"] == 0 for row in training)
    before = PathModel("exact", 6, 6, 1.0, 16, 0).state_dict()
    after = torch.load(runs / "exact" / "seed-0" / "model.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_one_network_and_writes_its_metrics(method: str, runs: Path) -> None:
    start = rows(runs, method, "test")[0]
    assert start["seconds"] == 0
    if method not in ("costs", "cells"):
        assert start["optimal"] == rows(runs, "lower", "test")[0]["optimal"]
    training = rows(runs, method, "train")
    assert [row["step"] for row in training] == list(range(1, 33))
    assert 0 < training[-1]["backward_seconds"] < training[-1]["seconds"]
    assert all(np.isfinite(row["loss"]) for row in training)


def test_a_run_again_takes_the_same_steps_and_replaces_nothing_unasked(runs: Path, tmp_path: Path) -> None:
    assert train.main(command(tmp_path, "--methods", "average")) == 0
    names = ("loss", "moved")
    first, second = (
        [[row[name] for name in names] for row in rows(out, "average", "train")] for out in (runs, tmp_path)
    )
    assert first == second
    with pytest.raises(SystemExit, match="holds a run: --resume continues it, --overwrite starts again"):
        train.main(command(runs, "--methods", "average"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be positive"),
        (["--size", "1"], "--size is 1; a path needs maps of at least 2 × 2 cells"),
        (["--tau", "2"], "--tau is 2.0; above 1, the least cost of a cell, costs become negative"),
        (["--channels", "6"], "--channels is 6; it must be a multiple of 4"),
        (["--methods", "best"], "invalid choice"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(arguments)
    assert message in capsys.readouterr().err


# -- tables and plots


def test_the_table_and_the_plots_show_every_method(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot.main([str(runs)])
    shown = capsys.readouterr().out
    for method, title in METHODS.items():
        (line,) = [line for line in shown.splitlines() if title in line]
        assert f"| {rows(runs, method, 'test')[-1]['optimal']:.3f} |" in line
    for name in ("curves", "maps", "terrain"):
        assert (runs / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        plot.main([str(tmp_path)])


def test_predicted_costs_are_those_of_the_saved_network(runs: Path) -> None:
    model = PathModel("average", 6, 6, 1.0, 16, 0)
    model.load_state_dict(torch.load(runs / "average" / "seed-0" / "model.pt"))
    maps = generate_maps(40, 6, 6, (0, train.HELD_OUT))
    with torch.no_grad():
        answers = model(torch.from_numpy(maps.images)).numpy()
    assert train.measures(answers, maps)["optimal"] == rows(runs, "average", "test")[-1]["optimal"]
