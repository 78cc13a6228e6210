"""Prepared solvers, kept between tasks."""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from typing import Any

__all__ = ["WorkspaceCache", "workspaces"]


class WorkspaceCache:
    """Prepared solvers that no task is using, least recently used first out; one cache for each process.

    A task takes a workspace out, so that none is ever used by two threads, and puts it back when done.

    Workspaces of one family differ in their matrices.  Where these are new in every call, idle workspaces are never
    used again, so a family keeps only as many as it asks for; when one is missed that was dropped for this, the family
    gets twice the room.  In bytes no family takes more than its share, so that none drives out all others.

    Args:
        capacity: how much cost (bytes, roughly) of idle workspaces is kept.
    """

    SHARE = 0.75
    """Of the capacity, for one family."""

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

    def take(self, key: Hashable) -> Any | None:
        """A workspace put back under this key, or None."""
        with self._whole():
            tickets = self.by_key.get(key)
            if tickets:
                return self._remove(tickets[-1])
            family = self.dropped.pop(key, None)
            if family is not None:
                self.growth[family] = min(2 * self.growth.get(family, 1), _REMEMBERED)
                _shorten(self.growth)
            return None

    def take_oldest(self, family: Hashable, keep: int) -> Any | None:
        """The longest idle workspace of a family if more than ``keep`` of them are idle: one to give new data."""
        with self._whole():
            members = self.by_family.get(family, ())
            return self._remove(next(iter(members))) if len(members) > self._room(family, keep) else None

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
            while keep is not None and len(members) > self._room(family, keep):
                ticket = next(iter(members))
                self.dropped[self.idle[ticket][0]] = family
                self._remove(ticket)
            _shorten(self.dropped)
            while len(members) > 1 and self.cost_of[family] > self.SHARE * self.capacity:
                self._remove(next(iter(members)))
            while self.cost > self.capacity and len(self.idle) > 1:
                self._remove(next(iter(self.idle)))

    def clear(self) -> None:
        """Forget every idle workspace."""
        with self._whole():
            self._forget()

    def _room(self, family: Hashable, keep: int) -> int:
        return keep * self.growth.get(family, 1)

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
        for part in (self.idle, self.by_key, self.by_family, self.cost_of, self.dropped, self.growth):
            part.clear()
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
