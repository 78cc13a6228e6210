"""Boards: what the rules are, a seeded generator of puzzles with one solution, files, and the one-hot encoding.

A board of order N has side N² and digits 1 to N²; 0 is an empty cell. Every array of boards has shape (B, side, side).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "DEFAULT_GIVENS",
    "Boards",
    "cached_boards",
    "count_solutions",
    "decode",
    "generate_boards",
    "load_boards",
    "obeys_rules",
    "one_hot",
    "split_boards",
]

BoardArray = NDArray[np.int8]

# The least and the largest number of given cells of a generated puzzle, by order.
DEFAULT_GIVENS = {2: (4, 7), 3: (30, 42)}
GENERATOR_VERSION = 1  # part of a cached file's name: raise it when the same seed would give other boards
MAX_REPEATS = 2000  # puzzles in a row that were all generated before: there are no more to be found


@dataclass(frozen=True)
class Boards:
    """Puzzles and their solutions.

    Args:
        puzzles: (B, side, side) int8, 0 for an empty cell.
        solutions: (B, side, side) int8, digits 1 to side.
    """

    puzzles: BoardArray
    solutions: BoardArray

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: slice | Sequence[int] | NDArray[np.int64]) -> Boards:
        return Boards(self.puzzles[index], self.solutions[index])

    @property
    def order(self) -> int:
        return isqrt(self.puzzles.shape[-1])


def obeys_rules(boards: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(B, side, side) boards to (B,): whether each row, column and box holds each digit from 1 to side once."""
    side = boards.shape[-1]
    order = isqrt(side)
    boxes = boards.reshape(-1, order, order, order, order).swapaxes(2, 3).reshape(-1, side, side)
    groups = np.concatenate([boards, boards.swapaxes(-1, -2), boxes], axis=1)
    return (np.sort(groups, axis=-1) == np.arange(1, side + 1)).all((-2, -1))


def one_hot(boards: NDArray[np.integer]) -> Tensor:
    """(B, side, side) boards to (B, side³) float64: entry (row, column, digit - 1) is 1; an empty cell is all zero."""
    digits = np.arange(1, boards.shape[-1] + 1)
    return torch.from_numpy((boards[..., None] == digits).reshape(len(boards), -1).astype(np.float64))


def decode(entries: Tensor) -> BoardArray:
    """(B, side³) entries to (B, side, side) boards: the digit whose entry is largest in each cell."""
    side = round(entries.shape[-1] ** (1 / 3))
    digits = entries.detach().reshape(-1, side, side, side).argmax(-1) + 1
    return digits.cpu().numpy().astype(np.int8)


# Below, a board is a flat list of digits and `used` holds a bit mask of the digits in each row, column and box.


@cache
def _groups_of_cells(order: int) -> list[tuple[int, int, int]]:
    """For each cell of the board the positions of its row, its column and its box in ``used``."""
    side = order * order
    cells = [divmod(cell, side) for cell in range(side * side)]
    return [(row, side + column, 2 * side + row // order * order + column // order) for row, column in cells]


def _complete(
    cells: list[int], used: list[int], empty: list[int], order: int, limit: int, generator: random.Random | None = None
) -> int:
    """Count completions up to ``limit``; once that many are found, ``cells`` holds the last of them.

    Depth first, on the empty cell with the fewest digits left; otherwise the lists come back as they were, but for
    the order of ``empty``. A generator tries the digits in random order.
    """
    if not empty:
        return 1
    groups, every = _groups_of_cells(order), (1 << order * order) - 1
    fewest, chosen, choices = order * order + 1, -1, 0
    for position, cell in enumerate(empty):
        row, column, box = groups[cell]
        candidates = every & ~(used[row] | used[column] | used[box])
        size = candidates.bit_count()
        if size < fewest:
            fewest, chosen, choices = size, position, candidates
            if size < 2:
                break
    if not choices:
        return 0
    cell = empty[chosen]
    row, column, box = groups[cell]
    empty[chosen] = empty[-1]
    empty.pop()
    digits = [digit for digit in range(order * order) if choices >> digit & 1]
    if generator is not None:
        generator.shuffle(digits)
    found = 0
    for digit in digits:
        bit = 1 << digit
        cells[cell] = digit + 1
        used[row] |= bit
        used[column] |= bit
        used[box] |= bit
        found += _complete(cells, used, empty, order, limit - found, generator)
        if found >= limit:
            return found
        used[row] ^= bit
        used[column] ^= bit
        used[box] ^= bit
    cells[cell] = 0
    empty.append(cell)
    return found


def count_solutions(puzzle: NDArray[np.integer], limit: int = 2) -> int:
    """How many boards complete one (side, side) puzzle, counted up to ``limit``; 0 if its givens break a rule."""
    order = isqrt(puzzle.shape[-1])
    cells = [int(digit) for digit in puzzle.ravel()]
    used = [0] * (3 * order * order)
    for cell, digit in enumerate(cells):
        for group in _groups_of_cells(order)[cell]:
            if digit and used[group] >> (digit - 1) & 1:
                return 0
            used[group] |= 1 << digit >> 1
    return _complete(cells, used, [cell for cell, digit in enumerate(cells) if not digit], order, limit)


def _random_solution(order: int, generator: random.Random) -> list[int]:
    side = order * order
    cells, empty = [0] * side**2, list(range(side**2))
    generator.shuffle(empty)
    _complete(cells, [0] * (3 * side), empty, order, 1, generator)
    return cells


def _remove_givens(solution: list[int], order: int, givens: int, generator: random.Random) -> list[int]:
    """Empty cells in random order while the solution stays the only one, until ``givens`` are left or none can go."""
    side = order * order
    cells, empty, order_of_removal = list(solution), [], list(range(side**2))
    generator.shuffle(order_of_removal)
    every = (1 << side) - 1
    used = [every] * (3 * side)
    for cell in order_of_removal:
        if len(cells) - len(empty) <= givens:
            break
        bit, groups = 1 << cells[cell] - 1, _groups_of_cells(order)[cell]
        for group in groups:
            used[group] ^= bit
        # The puzzle had one solution, so another one would have another digit in this cell.
        others = every & ~(used[groups[0]] | used[groups[1]] | used[groups[2]] | bit)
        if any(_completes_with(digit, groups, used, empty, order) for digit in range(side) if others >> digit & 1):
            for group in groups:
                used[group] ^= bit
        else:
            cells[cell] = 0
            empty.append(cell)
    return cells


def _completes_with(digit: int, groups: tuple[int, int, int], used: list[int], empty: list[int], order: int) -> bool:
    trial = list(used)
    for group in groups:
        trial[group] |= 1 << digit
    return _complete([0] * order**4, trial, list(empty), order, 1) > 0


def generate_boards(
    order: int, size: int, seed: int, givens: tuple[int, int] | None = None, progress: bool = False
) -> Boards:
    """Generate distinct puzzles, each with exactly one solution; the same arguments give the same boards.

    Each solution is drawn by a randomised search; its cells are then emptied in random order while the solution stays
    the only one, until as many are left as a number drawn uniformly from ``givens``, or until none can be spared.

    Args:
        order: N; the board has side N².
        size: number of puzzles.
        seed: any integer.
        givens: least and largest number of given cells, both inclusive; ``DEFAULT_GIVENS[order]`` if None.
        progress: show a progress bar.

    Raises:
        ValueError: ``givens`` is no range of cell counts, or there seem to be fewer than ``size`` such puzzles.
    """
    fewest, most = givens or DEFAULT_GIVENS[order]
    side = order * order
    if not 0 <= fewest <= most <= side**2:
        raise ValueError(
            f"givens is {fewest} to {most}; it must be a range within 0 to {side**2}, smaller number first."
        )
    generator = random.Random(seed)
    boards: dict[tuple[int, ...], list[int]] = {}
    repeats = 0
    with tqdm(total=size, desc=f"generating {side}x{side} boards", unit="board", disable=not progress) as bar:
        while len(boards) < size:
            solution = _random_solution(order, generator)
            puzzle = tuple(_remove_givens(solution, order, generator.randint(fewest, most), generator))
            if puzzle in boards:
                repeats += 1
                if repeats > MAX_REPEATS:
                    raise ValueError(
                        f"found {len(boards)} distinct {side}x{side} puzzles with {fewest} to {most} givens and then "
                        f"{MAX_REPEATS} repeats in a row; ask for fewer boards or for a wider range of givens."
                    )
                continue
            repeats = 0
            boards[puzzle] = solution
            bar.update()
    shape = (size, side, side)
    puzzles = np.array(list(boards), dtype=np.int8).reshape(shape)
    return Boards(puzzles, np.array(list(boards.values()), dtype=np.int8).reshape(shape))


def cached_boards(directory: Path, order: int, size: int, seed: int, givens: tuple[int, int] | None = None) -> Boards:
    """:func:`generate_boards`, kept in ``directory`` in a file named by the arguments and read again from there."""
    fewest, most = givens or DEFAULT_GIVENS[order]
    path = directory / f"boards-v{GENERATOR_VERSION}-order{order}-size{size}-seed{seed}-givens{fewest}to{most}.npz"
    if not path.exists():
        boards = generate_boards(order, size, seed, (fewest, most), progress=True)
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(partial, puzzles=boards.puzzles, solutions=boards.solutions)
        partial.replace(path)
    return load_boards(path, order)


def load_boards(path: Path | str, order: int) -> Boards:
    """Read ``puzzles`` and ``solutions`` from an .npz file and check every board.

    Raises:
        ValueError: an array is missing or has a wrong shape or type, a digit is out of range, a solution breaks a rule
            or contradicts its puzzle; the message names the first such board.
    """
    side = order * order
    arrays: dict[str, BoardArray] = {}
    with np.load(path, allow_pickle=False) as file:
        for name in ("puzzles", "solutions"):
            if name not in file:
                raise ValueError(f"{path} holds {sorted(file)}; it must hold an array `{name}`.")
            array = file[name]
            if array.ndim != 3 or array.shape[1:] != (side, side):
                raise ValueError(f"`{name}` in {path} has shape {array.shape}; expected (boards, {side}, {side}).")
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"`{name}` in {path} has type {array.dtype}; expected integers, such as int8.")
            least = 0 if name == "puzzles" else 1
            _refuse(
                ((array < least) | (array > side)).any((1, 2)), path, f"`{name}` has a digit outside {least} to {side}"
            )
            arrays[name] = array.astype(np.int8)
    puzzles, solutions = arrays["puzzles"], arrays["solutions"]
    if len(puzzles) != len(solutions):
        raise ValueError(f"{path} holds {len(puzzles)} puzzles and {len(solutions)} solutions; they must be as many.")
    _refuse(~obeys_rules(solutions), path, "the solution breaks a rule")
    _refuse(((puzzles != 0) & (puzzles != solutions)).any((1, 2)), path, "the solution contradicts a given cell")
    return Boards(puzzles, solutions)


def _refuse(wrong: NDArray[np.bool_], path: Path | str, what: str) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"board {first} in {path} (counted from 0): {what}; {int(wrong.sum())} of {len(wrong)} are like that."
        )


def split_boards(boards: Boards, train_size: int, test_size: int, seed: int) -> tuple[Boards, Boards]:
    """Draw disjoint training and test boards; boards with the same puzzle never fall on both sides.

    Raises:
        ValueError: there are too few boards.
    """
    if train_size + test_size > len(boards):
        raise ValueError(
            f"{train_size} training and {test_size} test boards were asked for, but there are {len(boards)}."
        )
    generator = np.random.default_rng(seed)
    _, group = np.unique(boards.puzzles.reshape(len(boards), -1), axis=0, return_inverse=True)
    copies = np.bincount(group.ravel())
    tested = np.zeros(len(copies), dtype=bool)
    room = test_size
    for candidate in generator.permutation(len(copies)):
        if copies[candidate] <= room:
            tested[candidate] = True
            room -= copies[candidate]
    test = generator.permutation(np.flatnonzero(tested[group.ravel()]))
    train = generator.permutation(np.flatnonzero(~tested[group.ravel()]))[:train_size]
    if len(test) < test_size or len(train) < train_size:
        raise ValueError(
            f"after keeping equal puzzles together there are {len(train)} training and {len(test)} test boards, "
            f"not {train_size} and {test_size}; ask for fewer boards."
        )
    return boards[train], boards[test]
