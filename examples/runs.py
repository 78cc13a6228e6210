"""What training runs share: a folder with metrics and a checkpoint, Ctrl-C, and several processes under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

__all__ = ["Ranks", "Run", "interruption", "leave"]


def leave(status: int | None) -> NoReturn:
    """End the process with this status; under torchrun at once, for threads that gloo has left may abort its end."""
    if not dist.is_torchelastic_launched():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class Ranks:
    """The processes that train together, each on its share of every batch; one process without torchrun.

    Gradients are added in the order of the ranks, so that all processes have the same bits, in every run.

    Attributes:
        rank: of this process.
        count: of all of them.
    """

    def __init__(self) -> None:
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @classmethod
    @contextmanager
    def joined(cls) -> Generator[Ranks]:
        """The processes that torchrun has started, joined by gloo."""
        if not dist.is_torchelastic_launched():
            yield cls()
            return
        store, rank, count = next(rendezvous("env://"))
        # Started again after a death, processes would find the addresses of the dead ones in the store (torch 2.13).
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        try:
            yield cls()
            dist.barrier()  # one that leaves while another still talks to it may abort when its interpreter ends
        finally:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes: metrics, checkpoints, the terminal."""
        return self.rank == 0

    def exit_status(self, finished: bool) -> int | None:
        """The command's status where this process has nothing left to do, 130 after Ctrl-C; else None."""
        if not self.is_first:
            return 0 if finished else 130
        if finished:
            return None
        print("Stopped; the same command with --resume continues from the last checkpoint.")
        return 130

    def share(self, chosen: Tensor) -> Tensor:
        """The part of a batch that is this process's own."""
        return chosen[self.rank :: self.count]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of the ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def together(self, shares: Sequence[Tensor], size: int) -> Tensor:
        """The (size, ...) rows of a batch from the processes' shares of them."""
        if self.count == 1:
            return shares[0]
        whole = shares[0].new_empty(size, *shares[0].shape[1:])
        for rank, rows in enumerate(shares):
            whole[rank :: self.count] = rows
        return whole

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all processes' gradients; one without a share of the batch has zeros."""
        if self.count == 1:
            return
        own = list(parameters)
        flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).ravel() for each in own])
        found = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(found, flat)
        total = found[0]
        for more in found[1:]:
            total = total + more
        for each, gradient in zip(own, total.split([each.numel() for each in own]), strict=True):
            each.grad = gradient.view_as(each)


class Run:
    """One run's folder: ``config.json``, ``metrics.jsonl`` (a line for each step and evaluation), ``checkpoint.pt``.

    Args:
        folder: made where there is none.
        config: the settings.
        identity: the settings with which alone a run can be resumed.
        resume: go on with the run in the folder, if there is one.
        overwrite: start again where there is one.
        ranks: the processes of the run; the first one writes.

    Attributes:
        checkpoint: what the run goes on from, or None.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        identity: Sequence[str],
        *,
        resume: bool,
        overwrite: bool,
        ranks: Ranks,
    ) -> None:
        self.folder, self.ranks, self.lines = folder, ranks, 0
        self.checkpoint_path = folder / "checkpoint.pt"
        self.metrics_path = folder / "metrics.jsonl"
        found = self._open(config, identity, resume, overwrite) if ranks.is_first else None
        self.checkpoint: dict[str, Any] | None = ranks.of_first(found)

    def _open(
        self, config: dict[str, Any], identity: Sequence[str], resume: bool, overwrite: bool
    ) -> dict[str, Any] | None:
        folder, config_path = self.folder, self.folder / "config.json"
        checkpoint: dict[str, Any] | None = None
        if config_path.exists() and not overwrite:
            if not resume:
                raise SystemExit(f"{folder} holds a run: --resume continues it, --overwrite starts again.")
            before = json.loads(config_path.read_text())
            changed = [
                f"--{name.replace('_', '-')} was {before[name]} and is {config[name]}"
                for name in identity
                if name in before and before[name] != config[name]
            ]
            if changed:
                raise SystemExit(f"{folder} cannot be resumed with other settings ({'; '.join(changed)}).")
            if self.checkpoint_path.exists():
                checkpoint = torch.load(self.checkpoint_path, weights_only=True)
        folder.mkdir(parents=True, exist_ok=True)
        partial = config_path.with_suffix(".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(partial, config_path)
        kept: list[str] = []
        if checkpoint is None:
            self.checkpoint_path.unlink(missing_ok=True)
        else:
            # What was written after the checkpoint belongs to steps that are done again.
            kept = self.metrics_path.read_text().splitlines(keepends=True)[: checkpoint["metrics"]]
        self.metrics_path.write_text("".join(kept))
        self.lines = len(kept)
        return checkpoint

    def write_metrics(self, **values: Any) -> None:
        if not self.ranks.is_first:
            return
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.lines += 1

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint in one step, so that a crash leaves the old one or the new one."""
        if not self.ranks.is_first:
            return
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save({**state, "metrics": self.lines}, partial)
        os.replace(partial, self.checkpoint_path)


@contextmanager
def interruption(ranks: Ranks) -> Generator[list[int]]:
    """A list that the first Ctrl-C makes true; a second one interrupts at once, where there is one process.

    Several processes get one from the terminal and one from torchrun.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if ranks.count == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if ranks.is_first and len(received) == 1:
            tqdm.write("Ctrl-C: finishing this batch and saving; once more stops at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
