"""Train the Sudoku model: ``python -m examples.sudoku.train --help``; what is written and why is in README.md."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import lpgd
from examples.runs import Ranks, Run, interruption, leave

from .data import DEFAULT_GIVENS, Boards, cached_boards, decode, load_boards, one_hot, split_boards
from .model import CONSTRAINTS, METHODS, SudokuModel, board_error, board_loss, gradient_method, sudoku_layer

__all__ = ["Trainer", "main", "parse_arguments", "render_boards"]

# Defaults that depend on the order of the board.
DEFAULTS: dict[int, dict[str, Any]] = {
    order: {**values, "constraints": CONSTRAINTS[order], "givens": DEFAULT_GIVENS[order]}
    for order, values in {
        2: {"epochs": 3, "tests_per_epoch": 4, "batch_size": 150, "tau": 1e4, "rho": 0.1},
        3: {"epochs": 10, "tests_per_epoch": 1, "batch_size": 50, "tau": 1e4, "rho": 0.1},
    }.items()
}
# A run can be resumed only with the same values of these.
IDENTITY = (
    "board",
    "method",
    "solver",
    "tau",
    "rho",
    "lr",
    "batch_size",
    "tests_per_epoch",
    "constraints",
    "train_size",
    "test_size",
    "data",
    "data_seed",
    "givens",
    "processes",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of the chosen board filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sudoku.train",
        description="Learn the rules of Sudoku as the constraints of a linear program.",
    )

    def add(flag: str, text: str, **how: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if name in DEFAULTS[2]:
            shown = [" ".join(f"{value:g}" for value in np.ravel(DEFAULTS[order][name])) for order in (2, 3)]
            text += f" (default: {shown[0]} for 4×4, {shown[1]} for 9×9)"
        elif how.get("default") is not None:
            text += " (default: %(default)s)"
        parser.add_argument(flag, help=text, **how)

    add("--board", "order of the board: 2 is 4×4, 3 is 9×9", type=int, choices=(2, 3), default=2)
    add(
        "--method",
        "gradients: the average, lower or upper envelope of LPGD, or exact implicit differentiation",
        choices=METHODS,
        default="lpgd",
    )
    add("--solver", "solver, as lpgd.CvxpyLayer takes it", default="INTERIOR")
    add("--tau", "perturbation strength of LPGD", type=float)
    add("--rho", "strength of the proximal term", type=float)
    add("--lr", "step size of Adam", type=float, default=0.1)
    add("--epochs", "passes over the training boards", type=int)
    add("--tests-per-epoch", "evaluations on the test boards in an epoch", type=int)
    add("--batch-size", "boards in a step", type=int)
    add("--constraints", "rows of A", type=int)
    add("--train-size", "training boards", type=int, default=9000)
    add("--test-size", "test boards", type=int, default=1000)
    add("--data", ".npz file with puzzles and solutions; without it, boards are generated", type=Path)
    add("--data-seed", "seed of the generated boards and of the split", type=int, default=0)
    add("--givens", "given cells of a generated puzzle", type=int, nargs=2, metavar=("FEWEST", "MOST"))
    add("--cache", "folder for generated boards", type=Path, default=Path("runs/sudoku/boards"))
    add("--seed", "seed of the model and of the order of the boards", type=int, default=0)
    add("--restarts", "number of runs, with seeds SEED, SEED + 1, ...", type=int, default=1)
    add("--checkpoint-seconds", "seconds between checkpoints within an epoch", type=float, default=30.0)
    add("--out", "folder of the runs (default: runs/sudoku/<side>x<side>-<method>)", type=Path)
    add("--resume", "continue the run in --out, if there is one", action="store_true")
    add("--overwrite", "start again where --out already holds a run", action="store_true")
    options = parser.parse_args(arguments)

    for name, value in DEFAULTS[options.board].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.givens = list(options.givens)
    side = options.board**2
    options.out = options.out or Path("runs/sudoku") / f"{side}x{side}-{options.method}"
    for name in (
        "tau",
        "lr",
        "epochs",
        "tests_per_epoch",
        "batch_size",
        "constraints",
        "train_size",
        "test_size",
        "restarts",
    ):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive.")
    if options.rho < 0:
        parser.error(f"--rho is {options.rho}; it must not be negative.")
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite contradict each other.")
    return options


class Trainer:
    """Minimise the mean squared error to the solved boards by Adam, and measure.

    The order of the boards in an epoch depends on (seed, epoch) only; together with the checkpoint (model, optimiser,
    random state, clocks, position) a resumed run takes the very steps that an uninterrupted one takes.  Of several
    processes each takes its share of a batch, and all make the step of the sum of their gradients.
    """

    def __init__(
        self,
        model: SudokuModel,
        train: Boards,
        test: Boards,
        run: Run,
        *,
        lr: float,
        batch_size: int,
        tests_per_epoch: int,
        checkpoint_seconds: float,
        seed: int,
    ) -> None:
        self.model, self.run, self.ranks, self.checkpoint_seconds = model, run, run.ranks, checkpoint_seconds
        self.batch_size, self.tests_per_epoch, self.seed = batch_size, tests_per_epoch, seed
        self.puzzles, self.solutions = one_hot(train.puzzles), one_hot(train.solutions)
        self.test, self.test_puzzles, self.test_solutions = test, one_hot(test.puzzles), one_hot(test.solutions)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.steps_per_epoch = -(-len(train) // batch_size)
        self.step = 0
        self.clocks = {"seconds": 0.0, "forward_seconds": 0.0, "backward_seconds": 0.0}
        if run.checkpoint is None:
            torch.manual_seed(seed)
        else:
            self.load_state(run.checkpoint)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "clocks": dict(self.clocks),
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.clocks = dict(state["clocks"])
        self.step = state["step"]

    def fit(self, epochs: int) -> bool:
        """Train up to ``epochs`` epochs; False if Ctrl-C ended it early, after the step under way and a checkpoint."""
        if self.run.checkpoint is None and self.ranks.is_first:
            self._evaluate()
            self.run.save(self.state())
        saved, total, first = time.perf_counter(), epochs * self.steps_per_epoch, self.ranks.is_first
        bar = tqdm(total=total, initial=self.step, unit="batch", disable=not first)
        with interruption(self.ranks) as received, bar:
            while self.step < total:
                # All processes end with the same step, whichever of them heard of it.
                interrupted = self._train_step(bar, received)
                if self._reached(self.tests_per_epoch) and first:
                    bar.write(self._evaluate())
                if self._reached(1) or interrupted or time.perf_counter() - saved > self.checkpoint_seconds:
                    self.run.save(self.state())
                    saved = time.perf_counter()
                if interrupted:
                    return False
        return True

    def _reached(self, parts: int) -> bool:
        """Whether the last step ended one of the equal ``parts`` of an epoch."""
        return self.step * parts // self.steps_per_epoch > (self.step - 1) * parts // self.steps_per_epoch

    def answers(self, puzzles: Tensor) -> Tensor:
        """(B, n) one-hot puzzles to the (B, n) filled boards of the model, without gradients."""
        batches = tqdm(puzzles.split(self.batch_size), desc="answering", unit="batch", leave=False, delay=2.0)
        with torch.no_grad():
            return torch.cat([self.model(batch)[0] for batch in batches])

    def _train_step(self, bar: tqdm[Any], received: list[int]) -> bool:
        """One step; whether a process had ``received`` an interrupt by then."""
        started = time.perf_counter()
        epoch, position = divmod(self.step, self.steps_per_epoch)
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self.puzzles))
        chosen = torch.from_numpy(shuffled[position * self.batch_size : (position + 1) * self.batch_size])
        own = self.ranks.share(chosen)
        self.optimizer.zero_grad()
        answers, counts, clocks = self._gradients(own, len(own) / len(chosen))
        self.ranks.add_gradients(self.model.parameters())
        self.optimizer.step()
        self.step += 1
        found = self.ranks.gathered((answers, counts, bool(received)))
        for name, seconds in clocks.items():
            self.clocks[name] += seconds
        answers = self.ranks.together([part for part, _, _ in found], len(chosen))
        loss, broken = board_loss(answers, self.solutions[chosen]).item(), board_error(answers)
        self.clocks["seconds"] += time.perf_counter() - started
        record = {name: sum(part[name] for _, part, _ in found) for name in counts}
        self._record("train", loss, answers, self.solutions[chosen], broken, **record)
        bar.set_description(f"epoch {epoch + 1}", refresh=False)
        bar.set_postfix(loss=f"{loss:.4f}", error=f"{broken.mean():.3f}", refresh=False)
        bar.update()
        return any(heard for _, _, heard in found)

    def _gradients(self, chosen: Tensor, weight: float) -> tuple[Tensor, dict[str, int], dict[str, float]]:
        """The gradients of some boards' part of the loss: their answers, what went wrong, and times."""
        if not len(chosen):
            return self.puzzles[chosen], {"inaccurate": 0, "fallbacks": 0}, {}
        before_forward = time.perf_counter()
        output = self.model(self.puzzles[chosen])
        after_forward = time.perf_counter()
        answers = output[0]
        loss = weight * board_loss(answers, self.solutions[chosen])
        before_backward = time.perf_counter()
        loss.backward()
        clocks = {
            "forward_seconds": after_forward - before_forward,
            "backward_seconds": time.perf_counter() - before_backward,
        }
        counts = {
            "inaccurate": sum(status is not lpgd.Status.SOLVED for status in output.info.statuses),
            "fallbacks": sum(len(gradient.fallbacks) for gradient in output.info.gradients),
        }
        return answers.detach(), counts, clocks

    def _evaluate(self) -> str:
        started = time.perf_counter()
        answers = self.answers(self.test_puzzles)
        loss, broken = board_loss(answers, self.test_solutions).item(), board_error(answers)
        self.clocks["seconds"] += time.perf_counter() - started
        unsolved = self._record("test", loss, answers, self.test_solutions, broken)
        return (
            f"epoch {self.step / self.steps_per_epoch:g}: test loss {loss:.4g}, error {broken.mean():.4g} "
            f"({broken.sum()} of {len(broken)} boards break a rule, {unsolved.sum()} differ from the solution)"
        )

    def _record(
        self, split: str, loss: float, answers: Tensor, solutions: Tensor, broken: NDArray[np.bool_], **record: int
    ) -> NDArray[np.bool_]:
        unsolved = (decode(answers) != decode(solutions)).any((1, 2))
        self.run.write_metrics(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            split=split,
            loss=loss,
            error=float(broken.mean()),
            unsolved=float(unsolved.mean()),
            **{name: round(seconds, 4) for name, seconds in self.clocks.items()},
            **record,
        )
        return unsolved


def render_boards(puzzle: NDArray[np.int8], answer: NDArray[np.int8], solution: NDArray[np.int8]) -> str:
    """One (side, side) puzzle, the model's answer and the solution side by side; wrong cells are marked by ``*``."""
    side = len(puzzle)
    order = round(side**0.5)

    def line(digits: NDArray[np.int8], wrong: NDArray[np.bool_] | None = None) -> str:
        marks = [" "] * side if wrong is None else ["*" if cell else " " for cell in wrong]
        cells = [(str(digit) if digit else ".") + mark for digit, mark in zip(digits, marks, strict=True)]
        return "| ".join("".join(cells[start : start + order]) for start in range(0, side, order))

    rows = [[line(puzzle[i]), line(answer[i], answer[i] != solution[i]), line(solution[i])] for i in range(side)]
    width = len(rows[0][0])
    rule = "+-".join(["--" * order] * order)
    rows = [row for i, row in enumerate(rows) for row in ([[rule] * 3] if i and i % order == 0 else []) + [row]]
    lines = ["   ".join(title.ljust(width) for title in ("puzzle", "answer", "solution"))]
    return "\n".join(line.rstrip() for line in lines + ["   ".join(row) for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    with Ranks.joined() as ranks:
        try:
            own = _boards(options) if ranks.is_first else None  # it writes the file that the others read
            ranks.of_first(None)
            train, test = own or _boards(options)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{error}") from error
        seeds = range(options.seed, options.seed + options.restarts)
        try:
            finished = all(_train(options, seed, train, test, ranks) for seed in seeds)
        except KeyboardInterrupt:
            finished = False
    if (status := ranks.exit_status(finished)) is not None:
        return status
    from .plot import plot_runs

    plot_runs([options.out], options.out / "curves.png")
    print(f"Curves: {options.out / 'curves.png'}")
    return 0


def _boards(options: argparse.Namespace) -> tuple[Boards, Boards]:
    sizes = options.train_size, options.test_size
    if options.data is None:
        boards = cached_boards(options.cache, options.board, sum(sizes), options.data_seed, tuple(options.givens))
    else:
        boards = load_boards(options.data, options.board)
    return split_boards(boards, *sizes, options.data_seed)


def _train(options: argparse.Namespace, seed: int, train: Boards, test: Boards, ranks: Ranks) -> bool:
    """One restart; False if Ctrl-C ended it."""
    folder = options.out / f"seed-{seed}"
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    config |= {"seed": seed, "processes": ranks.count}
    run = Run(folder, config, IDENTITY, resume=options.resume, overwrite=options.overwrite, ranks=ranks)
    gradient = gradient_method(options.method, options.tau, options.rho)
    layer = sudoku_layer(options.board, options.constraints, gradient, options.solver)
    model = SudokuModel(options.board**6, options.constraints, layer, seed)
    settings = {name: getattr(options, name) for name in ("lr", "batch_size", "tests_per_epoch", "checkpoint_seconds")}
    trainer = Trainer(model, train, test, run, **settings, seed=seed)

    def show_board() -> None:
        if ranks.is_first:
            answer = decode(trainer.answers(trainer.test_puzzles[:1]))
            print(f"{folder}: a test board after {trainer.step} batches")
            print(render_boards(test.puzzles[0], answer[0], test.solutions[0]), flush=True)

    show_board()
    finished = trainer.fit(options.epochs)
    show_board()
    return finished


if __name__ == "__main__":
    leave(main())
