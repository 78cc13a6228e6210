"""The Sudoku example: encoding, model, training, resuming and plots."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from examples.sudoku import plot, train
from examples.sudoku.data import decode, generate_boards, one_hot
from examples.sudoku.model import (
    CONSTRAINTS,
    SudokuModel,
    board_error,
    board_loss,
    gradient_method,
    sudoku_layer,
)
from lpgd.execution.workspaces import workspaces
from tests.sudoku_rules import rules

# -- encoding, error, model


def test_one_hot_places_each_digit_and_decode_inverts_it() -> None:
    encoded = one_hot(np.array([[[1, 0], [0, 2]]], dtype=np.int8))
    assert encoded.tolist() == [[1, 0, 0, 0, 0, 0, 0, 1]]
    boards = generate_boards(3, 3, seed=0)
    assert one_hot(boards.solutions).shape == (3, 729)
    assert (decode(one_hot(boards.solutions)) == boards.solutions).all()
    assert (one_hot(boards.puzzles).sum(1).numpy() == (boards.puzzles != 0).sum((1, 2))).all()


def test_error_and_loss_on_right_and_wrong_boards() -> None:
    boards = generate_boards(2, 3, seed=0)
    solutions = one_hot(boards.solutions)
    answers = solutions.clone()
    answers[1, :4] = answers[1, :4].roll(1)  # another digit in the first cell
    answers[2] = 0.4 * answers[2] + 0.1  # less sure, still right
    assert board_error(answers).tolist() == [False, True, False]
    # Two entries wrong by 1 on one board; on another, 16 wrong by 0.5 and 48 by 0.1.
    assert float(board_loss(answers, solutions)) == pytest.approx((2 + 16 * 0.25 + 48 * 0.01) / (3 * 64))


@pytest.mark.parametrize("order", CONSTRAINTS)
def test_the_number_of_constraints_is_the_rank_of_the_rules(order: int) -> None:
    assert np.linalg.matrix_rank(rules(order)) == CONSTRAINTS[order]


def test_with_the_true_rules_the_model_solves_the_linear_program_and_the_boards() -> None:
    boards = generate_boards(2, 20, seed=0, givens=(7, 9))
    matrix = rules(2)
    layer = sudoku_layer(2, len(matrix), gradient_method("lpgd", 1e4, 0.1), "CLARABEL")
    model = SudokuModel(64, len(matrix), layer, seed=0)
    with torch.no_grad():
        model.A.copy_(torch.from_numpy(matrix))
        model.logits.fill_(-np.log(3.0))  # z0 = 1/4: every sum is one
        puzzles = one_hot(boards.puzzles)
        (answers,) = model(puzzles)
    for puzzle, answer in zip(puzzles.numpy(), answers.numpy(), strict=True):
        reference = linprog(-puzzle, A_eq=matrix, b_eq=np.ones(len(matrix)), bounds=(0, 1))
        assert -puzzle @ answer == pytest.approx(reference.fun, abs=1e-6)
        assert np.abs(matrix @ answer - 1).max() < 1e-6
    assert (decode(answers) == boards.solutions).all()


def test_a_model_starts_feasible_and_its_seed_fixes_it() -> None:
    models = [SudokuModel(64, 40, lambda A, b, c: (c,), seed) for seed in (0, 0, 1)]
    assert torch.equal(models[0].A, models[1].A)
    assert not torch.equal(models[0].A, models[2].A)
    assert float(models[0].A.detach().min()) >= 0
    assert float(models[0].A.detach().max()) < 1


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of lpgd, lower, upper, exact"):
        gradient_method("middle", 1.0, 0.0)


# -- training


def command(folder: Path, *more: str) -> list[str]:
    sizes = ["--train-size", "50", "--test-size", "10", "--batch-size", "20", "--epochs", "2"]
    return [*sizes, "--tests-per-epoch", "2", "--cache", str(folder / "cache"), "--out", str(folder / "run"), *more]


def start(arguments: list[str]) -> int:
    """The command as a new process would run it: no prepared solver is left over from an earlier one."""
    workspaces.clear()
    return train.main(arguments)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt")["model"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start(command(folder)) == 0
    return folder


def test_a_short_run_lowers_the_loss_and_writes_metrics_and_plots(whole_run: Path) -> None:
    metrics = rows(whole_run / "run" / "seed-0")
    test = [row for row in metrics if row["split"] == "test"]
    steps = [row["step"] for row in metrics if row["split"] == "train"]
    assert steps == list(range(1, 7))  # 50 boards in batches of 20: three steps an epoch
    assert [row["step"] for row in test] == [0, 2, 3, 5, 6]
    assert test[-1]["loss"] < 0.9 * test[0]["loss"]
    for name in ("seconds", "forward_seconds", "backward_seconds"):
        assert all(after[name] >= before[name] for before, after in itertools.pairwise(metrics))
    last = metrics[-1]
    assert 0 < last["backward_seconds"] < last["seconds"]
    assert last["forward_seconds"] + last["backward_seconds"] <= last["seconds"]
    assert (whole_run / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run: Path, tmp_path: Path) -> None:
    assert start(command(tmp_path, "--epochs", "1")) == 0
    metrics = tmp_path / "run" / "seed-0" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "epoch": 1.3, "split": "train"}\n')  # written after the last checkpoint by a killed run
    assert start(command(tmp_path, "--resume")) == 0
    assert untimed(tmp_path / "run" / "seed-0") == untimed(whole_run / "run" / "seed-0")
    resumed, whole = weights(tmp_path / "run" / "seed-0"), weights(whole_run / "run" / "seed-0")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train.Trainer._train_step

    def interrupted_step(self: train.Trainer, *arguments: Any) -> bool:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(train.Trainer, "_train_step", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    assert start(command(tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert rows(tmp_path / "run" / "seed-0")[-1]["step"] == 2
    monkeypatch.undo()
    assert start(command(tmp_path, "--resume")) == 0
    assert untimed(tmp_path / "run" / "seed-0") == untimed(whole_run / "run" / "seed-0")
    resumed, whole = weights(tmp_path / "run" / "seed-0"), weights(whole_run / "run" / "seed-0")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(whole_run: Path) -> None:
    before = (whole_run / "run" / "seed-0" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="holds a run: --resume continues it, --overwrite starts again"):
        start(command(whole_run))
    with pytest.raises(SystemExit, match=r"--tau was 10000\.0 and is 5\.0"):
        start(command(whole_run, "--resume", "--tau", "5"))
    assert (whole_run / "run" / "seed-0" / "metrics.jsonl").read_bytes() == before


# Some optimality conditions of a linear program are singular: exact gradients warn then.
@pytest.mark.filterwarnings("default::lpgd.LpgdWarning")
@pytest.mark.parametrize("method", ["lower", "upper", "exact"])
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    arguments = command(tmp_path, "--method", method, "--epochs", "1", "--restarts", "2", "--train-size", "20")
    assert start(arguments) == 0
    for seed in (0, 1):
        model = weights(tmp_path / "run" / f"seed-{seed}")
        fresh = SudokuModel(64, 40, lambda A, b, c: (c,), seed)
        assert not torch.equal(model["A"], fresh.A)
        assert torch.isfinite(model["A"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be positive"),
        (["--rho", "-1"], "--rho is -1.0; it must not be negative"),
        (["--resume", "--overwrite"], "contradict"),
        (["--method", "best"], "invalid choice"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_board_is_printed_with_its_wrong_cells_marked() -> None:
    solution = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]], dtype=np.int8)
    puzzle, answer = solution.copy(), solution.copy()
    puzzle[0] = 0
    answer[0, 1] = 4
    lines = train.render_boards(puzzle, answer, solution).splitlines()
    assert lines[0].split() == ["puzzle", "answer", "solution"]
    assert " ".join(lines[1].split()) == ". . | . . 1 4*| 3 4 1 2 | 3 4"
    assert len(lines) == 6
    assert sum(line.count("*") for line in lines) == 1


# -- plots


def test_curves_average_training_rows_over_tenths_of_an_epoch(tmp_path: Path) -> None:
    lines = [
        {
            "split": "train",
            "epoch": (step + 1) / 20,
            "loss": float(step),
            "error": 1.0,
            "seconds": step,
            "backward_seconds": 0,
        }
        for step in range(20)
    ]
    lines.append({"split": "test", "epoch": 1.0, "loss": 7.0, "error": 0.5, "seconds": 20, "backward_seconds": 1})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = plot.read_metrics(tmp_path / "metrics.jsonl", "train")
    assert training["loss"].tolist() == [2 * bin_ + 0.5 for bin_ in range(10)]
    np.testing.assert_allclose(training["epoch"], [(2 * bin_ + 1.5) / 20 for bin_ in range(10)])
    assert plot.read_metrics(tmp_path / "metrics.jsonl", "test")["loss"].tolist() == [7.0]


def test_plots_overlay_runs_and_name_a_folder_without_any(whole_run: Path, tmp_path: Path) -> None:
    run = str(whole_run / "run")
    plot.main([run, run, "--out", str(tmp_path / "deep" / "both.png")])
    assert (tmp_path / "deep" / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        plot.main([str(tmp_path), "--out", str(tmp_path / "none.png")])
