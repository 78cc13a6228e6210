"""Prepared solvers, kept between tasks."""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lpgd.arrays import FloatArray

__all__ = ["Fingerprint", "Habits", "WorkspaceCache", "fingerprints", "workspaces"]

Fingerprint = tuple[int, ...]
"""What equal numbers have in common, and others hardly ever: who is found by it has still to be compared."""


def fingerprints(values: FloatArray) -> list[Fingerprint]:
    """Of each row of (nnz,) or (R, nnz) values: the sums of all of their bits and of those of the first half.

    To add integers takes a tenth of the time of a hash of the content.
    """
    bits = np.ascontiguousarray(np.atleast_2d(values)).view(np.int64)
    half = bits[:, : bits.shape[1] // 2]
    return list(zip(bits.sum(1).tolist(), half.sum(1).tolist(), strict=True))


class Habits:
    """Whether matrices come back, by solver and structure: where they are new in every call, no workspace is kept.

    Workspaces are kept until a few calls in a row have found none of theirs.  Then only fingerprints are, of the last
    batches, and once one of them comes back so are workspaces.  Where a workspace takes new matrices in place, only
    fingerprints are kept from the beginning: to set one up for matrices that come back once costs less than to set up
    one for each matrix of a few calls.
    """

    PATIENCE = 3

    def __init__(self, forget: Callable[[Hashable], None]) -> None:
        self.lock = threading.Lock()
        self.forget = forget
        self.missed: OrderedDict[Hashable, int] = OrderedDict()
        self.seen: OrderedDict[Hashable, Hashable] = OrderedDict()

    def keeps(self, kind: Hashable, prints: Sequence[Fingerprint], in_place: bool = False) -> bool:
        """Whether to keep the workspaces of a call with these matrices; ``in_place`` if they take new ones."""
        with self.lock:
            if self.missed.get(kind, self.PATIENCE if in_place else 0) < self.PATIENCE:
                return True
            keys = [(kind, one) for one in prints]
            if any(one in self.seen for one in keys):
                self.missed[kind] = 0
                return True
            self.seen.update(dict.fromkeys(keys))
            _shorten(self.seen)
            return False

    def record(self, kind: Hashable, found: int) -> None:
        """How many workspaces a call that keeps them has found."""
        with self.lock:
            self.missed[kind] = missed = 0 if found else self.missed.get(kind, 0) + 1
            _shorten(self.missed)
        if missed == self.PATIENCE:
            self.forget(kind)

    def clear(self) -> None:
        """Expect all matrices back."""
        with self.lock:
            self.missed.clear()
            self.seen.clear()


class WorkspaceCache:
    """Prepared solvers that no task is using, least recently used first out; one cache for each process.

    A task takes a workspace out, so that none is ever used by two threads, and puts it back when done.

    Workspaces of one family differ in their matrices.  Where these are new in every call, idle workspaces are never
    used again, so a family keeps only as many as it asks for; when one is missed that was dropped for this, the family
    gets twice the room, up to a number of bytes.  No family takes more than its share, so that none drives out all
    others.

    Args:
        capacity: how much cost (bytes, roughly) of idle workspaces is kept.

    Attributes:
        habits: whether workspaces of a kind are worth keeping; a kind is the first part of its families.
    """

    SHARE = 0.75
    """Of the capacity, for one family."""
    GROWN = 2**24
    """Bytes for more workspaces of a family than it asked for."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.cost = 0
        self.lock = threading.Lock()
        self.idle: OrderedDict[int, tuple[Hashable, Hashable, Any, int]] = OrderedDict()
        self.by_key: dict[Hashable, list[int]] = {}
        self.by_family: dict[Hashable, OrderedDict[int, None]] = {}
        self.cost_of: dict[Hashable, int] = {}
        self.dropped: OrderedDict[Hashable, Hashable] = OrderedDict()
        self.growth: OrderedDict[Hashable, int] = OrderedDict()
        self.tickets = 0
        self.changing = False
        self.habits = Habits(self.forget)

    def take(self, key: Hashable, fits: Callable[[Any], bool] | None = None) -> Any | None:
        """The last workspace put back under this key, of those that fit, or None."""
        with self._whole():
            for ticket in reversed(self.by_key.get(key, ())):
                if fits is None or fits(self.idle[ticket][2]):
                    return self._remove(ticket)
            family = self.dropped.pop(key, None)
            if family is not None:
                self.growth[family] = min(2 * self.growth.get(family, 1), _REMEMBERED)
                _shorten(self.growth)
            return None

    def take_oldest(self, family: Hashable, keep: int) -> Any | None:
        """The longest idle workspace of a family if more than ``keep`` of them are idle: one to give new data."""
        with self._whole():
            members = self.by_family.get(family, ())
            full = len(members) > keep and self._is_full(family, keep)
            return self._remove(next(iter(members))) if full else None

    def put(self, key: Hashable, family: Hashable, workspace: Any, cost: int, keep: int | None = None) -> None:
        """Hand a workspace back for later tasks with the same key.

        Args:
            key, family: what it is found by.
            workspace: the workspace.
            cost: bytes that it holds, roughly.
            keep: how many workspaces of this family are to be idle at most; None is any number.
        """
        with self._whole():
            self.tickets += 1
            self.idle[self.tickets] = (key, family, workspace, cost)
            self.by_key.setdefault(key, []).append(self.tickets)
            members = self.by_family.setdefault(family, OrderedDict())
            members[self.tickets] = None
            self.cost += cost
            self.cost_of[family] = self.cost_of.get(family, 0) + cost
            while keep is not None and len(members) > keep and self._is_full(family, keep):
                ticket = next(iter(members))
                self.dropped[self.idle[ticket][0]] = family
                self._remove(ticket)
            _shorten(self.dropped)
            while len(members) > 1 and self.cost_of[family] > self.SHARE * self.capacity:
                self._remove(next(iter(members)))
            while self.cost > self.capacity and len(self.idle) > 1:
                self._remove(next(iter(self.idle)))

    def clear(self) -> None:
        """Forget every idle workspace, and what they were used for."""
        with self._whole():
            self._forget()
        self.habits.clear()

    def forget(self, kind: Hashable) -> None:
        """Forget the idle workspaces of a kind: of the families, which are tuples, that begin with it."""
        with self._whole():
            for family in [
                candidate
                for candidate in self.by_family
                if isinstance(candidate, tuple) and candidate and candidate[0] == kind
            ]:
                for ticket in list(self.by_family[family]):
                    self._remove(ticket)

    def _is_full(self, family: Hashable, keep: int) -> bool:
        """Whether a family with more than ``keep`` workspaces has too many."""
        count = len(self.by_family[family])
        more = self.cost_of[family] * (1 - keep / count)
        return count > keep * self.growth.get(family, 1) or more > self.GROWN

    def _remove(self, ticket: int) -> Any:
        key, family, workspace, cost = self.idle.pop(ticket)
        self.by_key[key].remove(ticket)
        if not self.by_key[key]:
            del self.by_key[key]
        del self.by_family[family][ticket]
        self.cost_of[family] -= cost
        if not self.by_family[family]:
            del self.by_family[family], self.cost_of[family]
        self.cost -= cost
        return workspace

    @contextmanager
    def _whole(self) -> Generator[None]:
        """Held by one thread at a time; what an interrupt has left half done is forgotten."""
        with self.lock:
            if self.changing:
                self._forget()
            self.changing = True
            yield
            self.changing = False

    def _forget(self) -> None:
        for record in (self.idle, self.by_key, self.by_family, self.cost_of, self.dropped, self.growth):
            record.clear()
        self.cost = 0


_REMEMBERED = 4096


def _shorten(memory: OrderedDict[Any, Any]) -> None:
    """Forget the oldest of what is remembered about workspaces that are gone."""
    while len(memory) > _REMEMBERED:
        memory.popitem(last=False)


workspaces = WorkspaceCache(capacity=2**29)
atexit.register(workspaces.clear)  # else ProxQP's binding reports them as leaked on stderr (proxsuite 0.8.0)


def _reset_after_fork() -> None:
    workspaces.lock = threading.Lock()
    workspaces.habits.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
