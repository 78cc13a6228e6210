"""The Sudoku example's boards: generator, files and splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp

from examples.sudoku.data import (
    DEFAULT_GIVENS,
    Boards,
    cached_boards,
    count_solutions,
    generate_boards,
    load_boards,
    obeys_rules,
    one_hot,
    split_boards,
)
from tests.sudoku_rules import rules


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
