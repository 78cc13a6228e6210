"""Torch's state of a thread that must not reach into a solver's own computations, put aside for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from lpgd.torch_threads import torch_threads

__all__ = ["isolated_torch"]

_autograd = cast(Any, torch._C)._autograd

_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def isolated_torch() -> Iterator[None]:
    """Inside, saved tensors go through no hooks, and a forked process uses one thread.

    ``torch.func`` refuses to run where there are hooks on saved tensors, as those of checkpointing and ``save_on_cpu``
    (torch 2.13); what is differentiated inside is not part of the caller's graph, and is theirs to keep out of it.
    In a child made by fork the threads of GNU OpenMP are gone, and its first parallel region waits for them forever.
    """
    hooks = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        if _forked:
            with torch_threads(1):
                yield
        else:
            yield
    finally:
        for pack, unpack in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
