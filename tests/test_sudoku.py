"""The Sudoku example: boards, files, encoding, model, training, resuming and plots."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, linprog, milp

from examples.sudoku import plot, train
from examples.sudoku.data import (
    DEFAULT_GIVENS,
    Boards,
    cached_boards,
    count_solutions,
    decode,
    generate_boards,
    load_boards,
    obeys_rules,
    one_hot,
    split_boards,
)
from examples.sudoku.model import (
    CONSTRAINTS,
    SudokuModel,
    board_error,
    board_loss,
    gradient_method,
    sudoku_layer,
)
from lpgd.execution import workspaces


@cache
def every_board() -> NDArray[np.int8]:
    """All boards of side 4, by trying all rows: no code shared with the generator."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    boards = []
    for first, second in itertools.product(rows, repeat=2):
        if len(set(first[:2] + second[:2])) < 4 or len(set(first[2:] + second[2:])) < 4:
            continue
        for third, fourth in itertools.product(rows, repeat=2):
            columns = zip(first, second, third, fourth, strict=True)
            if len(set(third[:2] + fourth[:2])) == 4 and all(len(set(column)) == 4 for column in columns):
                boards.append((first, second, third, fourth))
    return np.array(boards, dtype=np.int8)


def completions(puzzle: NDArray[np.int8]) -> NDArray[np.int8]:
    """The boards of side 4 that agree with a puzzle, by comparing it with all of them."""
    boards = every_board()
    return boards[((puzzle == 0) | (puzzle == boards)).all((1, 2))]


@cache
def rules(order: int) -> NDArray[np.float64]:
    """The true rules as a 0-1 matrix: each cell, row, column and box sums to one, digit by digit."""
    side = order * order
    cells = np.arange(side**3).reshape(side, side, side)
    groups = []
    for first, second in itertools.product(range(side), repeat=2):
        top, left = divmod(first, order)
        box = cells[top * order : (top + 1) * order, left * order : (left + 1) * order, second]
        groups += [cells[first, second], cells[first, :, second], cells[:, first, second], box.ravel()]
    matrix = np.zeros((len(groups), side**3))
    for row, group in enumerate(groups):
        matrix[row, group] = 1.0
    return matrix


# -- boards


def test_there_are_288_boards_of_side_four_and_all_obey_the_rules() -> None:
    assert len(every_board()) == 288
    assert obeys_rules(every_board()).all()


def test_rules_refuse_a_repeat_in_a_row_a_column_and_a_box() -> None:
    right = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]], dtype=np.int8)
    shifted = np.array([[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]], dtype=np.int8)  # only boxes repeat
    equal_rows = np.array([[1, 2, 3, 4], [3, 4, 1, 2]] * 2, dtype=np.int8)  # only columns repeat
    empty = right.copy()
    empty[0, 0] = 0
    boards = np.stack([right, shifted, equal_rows, equal_rows.T, empty])
    assert obeys_rules(boards).tolist() == [True, False, False, False, False]


def test_rules_agree_with_enumeration_on_random_boards() -> None:
    valid = {board.tobytes() for board in every_board()}
    boards = every_board().repeat(4, axis=0)
    generator = np.random.default_rng(0)
    for board in boards:
        first, second = generator.integers(0, 4, (2, 2))
        board[tuple(first)], board[tuple(second)] = board[tuple(second)], board[tuple(first)]
    expected = [board.tobytes() in valid for board in boards]
    assert obeys_rules(boards).tolist() == expected
    assert 0 < sum(expected) < len(boards)


def test_count_solutions_equals_enumeration() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        puzzle = every_board()[generator.integers(288)] * (generator.random((4, 4)) < generator.random())
        if generator.random() < 0.5:
            puzzle[tuple(generator.integers(0, 4, 2))] = generator.integers(1, 5)
        assert count_solutions(puzzle, limit=1000) == len(completions(puzzle))
    assert count_solutions(np.zeros((4, 4), dtype=np.int8), limit=1000) == 288
    assert count_solutions(np.zeros((4, 4), dtype=np.int8), limit=7) == 7


def test_generated_puzzles_of_side_four_have_one_solution_by_enumeration() -> None:
    boards = generate_boards(2, 500, seed=3)
    for puzzle, solution in zip(boards.puzzles, boards.solutions, strict=True):
        found = completions(puzzle)
        assert len(found) == 1
        assert (found[0] == solution).all()
    givens = (boards.puzzles != 0).sum((1, 2))
    assert givens.min() >= DEFAULT_GIVENS[2][0]
    assert givens.max() <= 7
    assert boards.puzzles.dtype == boards.solutions.dtype == np.int8


def test_generated_puzzles_of_side_nine_have_one_solution_by_an_integer_program() -> None:
    boards = generate_boards(3, 4, seed=0)
    assert obeys_rules(boards.solutions).all()
    for puzzle, solution in zip(boards.puzzles, boards.solutions, strict=True):
        assert ((puzzle == 0) | (puzzle == solution)).all()
        answer = one_hot(solution[None])[0].numpy()
        constraints = [
            LinearConstraint(rules(3), 1, 1),
            LinearConstraint(one_hot(puzzle[None]).numpy(), (puzzle != 0).sum()),
        ]
        # The largest distance of a board with these givens from the solution: none differs from it.
        result = milp(answer, integrality=np.ones(729), bounds=(0, 1), constraints=constraints)
        assert result.status == 0
        assert round(result.fun) == 81


def test_generated_puzzles_are_distinct_and_a_seed_fixes_them() -> None:
    boards = generate_boards(2, 300, seed=5)
    assert len(np.unique(boards.puzzles.reshape(300, -1), axis=0)) == 300
    again, other = generate_boards(2, 300, seed=5), generate_boards(2, 300, seed=6)
    assert (boards.puzzles == again.puzzles).all()
    assert (boards.solutions == again.solutions).all()
    assert (boards.puzzles != other.puzzles).any()


def test_generating_more_puzzles_than_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="found 288 distinct 4x4 puzzles with 16 to 16 givens"):
        generate_boards(2, 289, seed=0, givens=(16, 16))
    with pytest.raises(ValueError, match="givens is 7 to 4"):
        generate_boards(2, 1, seed=0, givens=(7, 4))


def test_the_cache_returns_what_was_generated(tmp_path: Path) -> None:
    first = cached_boards(tmp_path, 2, 20, seed=1)
    assert (first.puzzles == generate_boards(2, 20, seed=1).puzzles).all()
    files = list(tmp_path.iterdir())
    stamp = files[0].stat().st_mtime_ns
    assert (cached_boards(tmp_path, 2, 20, seed=1).solutions == first.solutions).all()
    assert [file.stat().st_mtime_ns for file in tmp_path.iterdir()] == [stamp]
    cached_boards(tmp_path, 2, 20, seed=1, givens=(6, 6))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_split_is_disjoint_in_puzzles_and_of_the_sizes_asked_for() -> None:
    boards = generate_boards(2, 100, seed=0)
    twice = Boards(np.tile(boards.puzzles, (2, 1, 1))[:150], np.tile(boards.solutions, (2, 1, 1))[:150])
    training, test = split_boards(twice, 110, 40, seed=0)
    assert (len(training), len(test)) == (110, 40)
    assert not {p.tobytes() for p in training.puzzles} & {p.tobytes() for p in test.puzzles}
    for part in (training, test):
        assert ((part.puzzles == 0) | (part.puzzles == part.solutions)).all()
    assert (split_boards(twice, 110, 40, seed=0)[1].puzzles == test.puzzles).all()
    with pytest.raises(ValueError, match="150 training and 40 test boards were asked for, but there are 150"):
        split_boards(twice, 150, 40, seed=0)


# -- files


def test_boards_written_to_a_file_come_back(tmp_path: Path) -> None:
    boards = generate_boards(2, 10, seed=0)
    np.savez(tmp_path / "boards.npz", puzzles=boards.puzzles.astype(np.int64), solutions=boards.solutions)
    loaded = load_boards(tmp_path / "boards.npz", 2)
    assert (loaded.puzzles == boards.puzzles).all()
    assert (loaded.solutions == boards.solutions).all()
    assert loaded.puzzles.dtype == np.int8


def _swap(arrays: dict[str, Any]) -> None:
    arrays["solutions"][3, 0, [0, 1]] = arrays["solutions"][3, 0, [1, 0]]


def _contradict(arrays: dict[str, Any]) -> None:
    row, column = np.argwhere(arrays["puzzles"][4] != 0)[0]
    arrays["puzzles"][4, row, column] = arrays["puzzles"][4, row, column] % 4 + 1


def _put(name: str, position: tuple[int, ...], value: int) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][position] = value

    return change


BROKEN_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no solutions": (lambda arrays: arrays.pop("solutions"), "must hold an array `solutions`"),
    "wrong side": (lambda arrays: arrays.update(puzzles=np.zeros((10, 9, 9), np.int8)), r"shape \(10, 9, 9\)"),
    "flat": (lambda arrays: arrays.update(puzzles=np.zeros((10, 16), np.int8)), r"expected \(boards, 4, 4\)"),
    "not integers": (lambda arrays: arrays.update(puzzles=arrays["puzzles"] * 1.0), "type float64"),
    "other number": (lambda arrays: arrays.update(puzzles=arrays["puzzles"][:9]), "9 puzzles and 10 solutions"),
    "digit too large": (_put("puzzles", (7, 0, 0), 5), "board 7 .*`puzzles` has a digit outside 0 to 4"),
    "negative digit": (_put("puzzles", (6, 0, 0), -1), "board 6 .*`puzzles` has a digit outside 0 to 4"),
    "empty cell in a solution": (_put("solutions", (2, 3, 3), 0), "board 2 .*`solutions` has a digit outside 1 to 4"),
    "broken rule": (_swap, "board 3 .*the solution breaks a rule"),
    "contradiction": (_contradict, "board 4 .*contradicts a given cell"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    boards = generate_boards(2, 10, seed=0)
    arrays: dict[str, Any] = {"puzzles": boards.puzzles.copy(), "solutions": boards.solutions.copy()}
    change, message = BROKEN_FILES[name]
    change(arrays)
    np.savez(tmp_path / "boards.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_boards(tmp_path / "boards.npz", 2)


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

    def interrupted_step(self: train.Trainer, bar: Any) -> None:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        step(self, bar)

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
