"""Torch's state of a thread that must not reach into a solver's own computations, put aside for a while."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

__all__ = ["isolated_torch"]

_autograd = cast(Any, torch._C)._autograd

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def isolated_torch() -> AbstractContextManager[None]:
    """Inside, saved tensors go through no hooks; a process made by fork goes on with one thread of torch.

    ``torch.func`` refuses to run where there are hooks on saved tensors, as those of checkpointing and ``save_on_cpu``
    (torch 2.13); what is differentiated inside is not part of the caller's graph, and is not theirs to keep.
    After a fork the threads of GNU OpenMP, and of torch's MKL, which only ``set_num_threads`` reaches, are gone, and
    the first parallel region waits for them forever; torch's own data loader does the same to its workers.
    """
    if _forked:
        torch.set_num_threads(1)
    if _autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return _without_hooks()


@contextmanager
def _without_hooks() -> Generator[None]:
    hooks = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
