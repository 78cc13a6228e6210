"""A progress bar over the elements of a call, for layers that were told ``progress=True``.

Whoever works on a call knows its bar by a key, which threads can use as it stands.  In another process it means
nothing, and tasks that come back from there are counted by whoever waits for them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from lpgd.status import MissingPackageError

__all__ = ["Key", "advance", "current", "progress"]

DELAY = 1.0
"""Seconds before a bar is shown: calls that take no longer show none."""


class Key(NamedTuple):
    """What a bar is known by."""

    process: int
    number: int


class _Current(threading.local):
    """The bar of the call that this thread is in."""

    key: Key | None = None


_current, _numbers, _lock = _Current(), itertools.count(), threading.Lock()
_bars: dict[Key, Any] = {}


def current() -> Key | None:
    """The bar of the call that this thread is in; None where none was asked for."""
    return _current.key


def advance(key: Key | None, count: int = 1) -> None:
    """Say that so many elements are done."""
    if key is None or key.process != os.getpid():
        return
    with _lock:
        bar = _bars.get(key)
        if bar is not None:
            bar.update(count)


def progress(wanted: bool, task: str, total: int | None = None) -> AbstractContextManager[None]:
    """Show a bar for what is solved inside, on stderr, once it takes longer than a second.

    Args:
        wanted: whether to.
        task: what is done, as the bar says.
        total: how many elements there are; None where that is not known.

    Raises:
        MissingPackageError: tqdm is not installed.
    """
    return _bar(task, total) if wanted else nullcontext()


@contextmanager
def _bar(task: str, total: int | None) -> Generator[None]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingPackageError("progress=True needs a package: pip install tqdm") from error
    key, before = Key(os.getpid(), next(_numbers)), _current.key
    with tqdm(total=total, desc=task, unit="element", leave=False, delay=DELAY) as bar:
        _bars[key], _current.key = bar, key
        try:
            yield
        finally:
            _current.key = before
            with _lock:
                del _bars[key]
