"""What calls leave behind: files that load and run nothing, and the process's settings as they were."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import lpgd
from lpgd.execution.threads import torch_threads
from tests.executor_cases import processes
from tests.state_cases import FRONT_ENDS, called, costs, qp_layer

# -- files


def saved(thing: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_states_and_solutions_are_tensors_only(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.float64), FRONT_ENDS[name]())
    values = model[0](costs())
    y = called(model[1], values)
    y.sum().backward()
    found = torch.load(saved({"model": model.state_dict(), "y": y}), weights_only=True)
    assert type(found["y"]) is torch.Tensor
    assert torch.equal(found["y"], y)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.float64), FRONT_ENDS[name]())
    other.load_state_dict(found["model"])
    assert torch.equal(called(other[1], other[0](costs())), y)


OUR_MODULES = ("lpgd.", "tests.state_cases.")  # the latter has the user's functions
DATA = {
    "builtins.bytes",
    "builtins.frozenset",
    "builtins.slice",
    "collections.OrderedDict",
    "scipy.sparse._csc.csc_array",
    "scipy.sparse._csr.csr_array",
}
ARRAYS = {"numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct"}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_saved_layer_names_our_classes_and_arrays_and_calls_nothing_else(name: str) -> None:
    layer = FRONT_ENDS[name]()
    y = called(layer, costs())
    names = set(get_unsafe_globals_in_checkpoint(saved(layer)))  # pyright: ignore[reportArgumentType]
    assert {one for one in names if not one.startswith(OUR_MODULES)} <= DATA | ARRAYS
    with pytest.raises(Exception, match="weights_only"):
        torch.load(saved(layer), weights_only=True)
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.int32, np.int64, np.bool_)]
    with safe_globals([*map(found, names), *dtypes]):  # whose reading calls those alone
        again = torch.load(saved(layer), weights_only=True)
    assert torch.equal(called(again, costs()), y)


def found(name: str) -> Any:
    """A class or function by its full name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:count]))
        if module is not None:
            for part in parts[count:]:
                module = getattr(module, part)
            return module
    raise AssertionError(name)


# -- settings

SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def settings() -> dict[str, Any]:
    """What a call may not change."""
    blas = [(pool["prefix"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] != "openmp"]
    openmp = [(pool["prefix"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "openmp"]
    return {
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "BLAS's threads": blas,
        "OpenMP's threads": openmp,
        "signal handlers": [signal.getsignal(number) for number in SIGNALS],
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "warnings filters": list(warnings.filters),
        "errors of NumPy": (np.geterr(), np.geterrcall()),
        "modes of torch": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
        "random numbers": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),  # noqa: NPY002
        "streams": (sys.stdout, sys.stderr),
        "environment": dict(os.environ),
    }


@contextmanager
def unchanged() -> Generator[None]:
    """Settings other than the usual ones are what they were afterwards."""
    before = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with torch_threads(2), threadpool_limits(2, "blas"), np.errstate(over="raise", under="warn"):
            settings()  # threadpoolctl looks at libraries, once
            wanted = settings()
            yield
            found = settings()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == value, name
    finally:
        signal.signal(signal.SIGUSR1, before)


EXECUTORS: dict[str, Callable[[], Executor | None]] = {
    "default": lambda: None,
    "serial": lpgd.SerialExecutor,
    "threads": lambda: ThreadPoolExecutor(2),
}


def step(layer: torch.nn.Module, values: torch.Tensor) -> None:
    leaf = values.clone().requires_grad_()
    called(layer, leaf).sum().backward()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_call_changes_no_setting(name: str, executor: str) -> None:
    layer = FRONT_ENDS[name](EXECUTORS[executor]())
    with unchanged():
        step(layer, costs())
        for broken in (costs()[:, :0], costs() * torch.nan):
            with suppress(Exception):
                step(layer, broken)


@pytest.mark.parametrize("solver", lpgd.available())
def test_no_solver_changes_a_setting(solver: str) -> None:
    eye = torch.eye(3, dtype=torch.float64)
    with unchanged(), warnings.catch_warnings():
        warnings.simplefilter("ignore", lpgd.LpgdWarning)
        for executor in EXECUTORS.values():
            layer = qp_layer(executor(), solver)
            step(layer, costs())
            with pytest.raises(lpgd.SolverError):
                layer(eye, costs(), G=-eye[:1], h=-eye[0, :1] * 9, lb=-0.5, ub=0.5)  # x₀ ≥ 9


def test_processes_change_no_setting() -> None:
    with processes("spawn") as pool:
        qp = qp_layer(pool)
        step(qp, costs())
        with unchanged():
            step(qp, costs())


def interrupt_node(x: torch.Tensor, y: torch.Tensor) -> Any:
    return interrupt()


def interrupt(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    raise KeyboardInterrupt  # where another thread than the main one is here


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["CvxpyLayer", "QPLayer", "LPLayer", "ConicLayer", "NodeLayer, own", "BlackboxLayer"])
def test_an_interrupted_call_changes_no_setting(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = EXECUTORS[executor]()
    if name == "BlackboxLayer":
        layer: torch.nn.Module = lpgd.BlackboxLayer(interrupt, lpgd.LPGD(tau=1.0), executor=pool)
    elif name == "NodeLayer, own":
        layer = lpgd.NodeLayer(lpgd.Node(interrupt_node))
    else:
        layer = FRONT_ENDS[name](pool)
        monkeypatch.setattr(lpgd.Clarabel, "prepare", interrupt)
        monkeypatch.setattr(lpgd.Clarabel, "prepare_once", interrupt)
    with unchanged(), pytest.raises(KeyboardInterrupt):
        step(layer, costs())
    monkeypatch.undo()
    if name not in ("BlackboxLayer", "NodeLayer, own"):
        step(layer, costs())  # it can be used
