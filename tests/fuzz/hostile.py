"""Ways to call a layer that training code comes up with: each must give what a plain call gives, or say no."""

from __future__ import annotations

import os
import select
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.utils.checkpoint
from numpy.typing import NDArray
from torch import Tensor

from lpgd.status import SolverError
from tests.fuzz.cases import Chunk

__all__ = ["PATTERNS", "Subject", "try_pattern"]

ROUNDING = 1e-7
"""Two calls with the same numbers differ by less, relative to the largest entry: sums depend on memory's alignment."""


@dataclass
class Subject:
    """A layer as a function of tensors with a batch dimension.

    Args:
        leaves: (B, ...) tensors without a gradient.
        run: from leaves to an output (B, ...).
        handed: the tensors that the last run handed to the layer.
        exact: whether two calls give the same up to rounding, whoever solves.
        judged: (B,) elements that were found right.
    """

    leaves: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Tensor]
    handed: Callable[[], list[Tensor]]
    exact: bool = True
    judged: NDArray[np.bool_] = field(default_factory=lambda: np.ones(0, dtype=bool))

    def fresh(self, requires_grad: bool = True) -> dict[str, Tensor]:
        """Copies of the leaves."""
        return {name: leaf.detach().clone().requires_grad_(requires_grad) for name, leaf in self.leaves.items()}


@dataclass
class Plain:
    """What a plain call gave: the output, a cotangent, and its gradients."""

    x: Tensor
    weights: Tensor
    gradients: dict[str, Tensor]


def plain_call(subject: Subject, rng: np.random.Generator) -> Plain:
    """The reference of a pattern."""
    leaves = subject.fresh()
    x = subject.run(leaves)
    weights = torch.from_numpy(rng.normal(size=tuple(x.shape)))
    weights[~torch.from_numpy(subject.judged)] = 0.0
    return Plain(x.detach(), weights, gradients_of(leaves, x, weights))


def gradients_of(leaves: dict[str, Tensor], x: Tensor, weights: Tensor, retain: bool = False) -> dict[str, Tensor]:
    """The gradients of a plain loss."""
    found = torch.autograd.grad(x, list(leaves.values()), weights.to(x.dtype), retain_graph=retain, allow_unused=True)
    zero = torch.zeros(())
    known = zip(leaves.items(), found, strict=True)
    return {name: zero.expand_as(leaf) if part is None else part for (name, leaf), part in known}


def difference(subject: Subject, found: Tensor, expected: Tensor) -> float:
    """The largest one between elements that were judged, relative to the largest entry of each."""
    if not len(found):
        return 0.0
    rows = torch.from_numpy(subject.judged)
    found, expected = (part.detach()[rows].reshape(int(rows.sum()), -1) for part in (found, expected))
    if not found.numel():
        return 0.0
    size = expected.abs().amax(1, keepdim=True).clamp(min=1e-6)
    off = ((found - expected).abs() / size).max()
    return float(off) if bool(off == off) else float("inf")


def compared(
    subject: Subject, plain: Plain, x: Tensor, gradients: dict[str, Tensor], factor: float = 1.0
) -> str | None:
    """What differs from the plain call, if anything does."""
    limit = ROUNDING if subject.exact else 1e-3
    if (off := difference(subject, x, plain.x)) > limit:
        return f"x differs by {off:.1e}"
    largest = max((float(part.abs().max()) for part in plain.gradients.values() if part.numel()), default=0.0)
    for name, part in gradients.items():
        expected = factor * plain.gradients[name]
        off = float((part - expected).abs().max()) if part.numel() else 0.0
        if not off <= 10 * limit * max(abs(factor) * largest, 1e-6):
            return f"the gradient of {name} differs by {off:.1e} of {largest:.1e}"
    return None


Pattern = Callable[[Subject, Plain, np.random.Generator], str | None]


def two_forwards(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """Another forward pass before the backward pass of the first."""
    leaves, others = subject.fresh(), subject.fresh()
    for leaf in others.values():
        leaf.data.copy_(leaf.data.flip(0))
    x, other = subject.run(leaves), subject.run(others)
    gradients_of(others, other, plain.weights.flip(0))
    return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))


def backward_twice(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """``retain_graph``."""
    leaves = subject.fresh()
    x = subject.run(leaves)
    gradients_of(leaves, x, plain.weights, retain=True)
    return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))


def accumulated(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """``.grad`` of two backward passes adds up."""
    leaves = subject.fresh()
    for _ in range(2):
        x = subject.run(leaves)
        (x * plain.weights.to(x.dtype)).nansum().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return compared(subject, plain, x.detach(), grads, factor=2.0)


def inputs_mutated(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """An optimizer's step between forward and backward pass: PyTorch's error, or the gradient at the old data."""
    leaves = subject.fresh()
    x = subject.run(leaves)
    kept = x.detach().clone()
    with torch.no_grad():
        for tensor in subject.handed():
            if tensor.layout == torch.strided and tensor.is_floating_point():
                try:
                    tensor.add_(1.0)
                except RuntimeError:  # an expanded tensor: several elements are one place of memory
                    continue
    try:
        gradients = gradients_of(leaves, x, plain.weights)
    except RuntimeError as error:
        return None if "modified by an inplace operation" in str(error) else f"{type(error).__name__}: {error}"
    return compared(subject, plain, kept, gradients)


def output_mutated(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """The solution is doubled in place before the backward pass."""
    leaves = subject.fresh()
    x = subject.run(leaves)
    kept = x.detach().clone()
    try:
        x.mul_(2.0)
        gradients = gradients_of(leaves, x, plain.weights)
    except RuntimeError as error:
        return None if "inplace" in str(error) or "in-place" in str(error) else f"{type(error).__name__}: {error}"
    return compared(subject, plain, kept, gradients, factor=2.0)


def threads(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """Three threads call the same layer at the same time."""
    wrong: list[str] = []

    def call() -> None:
        try:
            leaves = subject.fresh()
            x = subject.run(leaves)
            found = compared(subject, plain, x, gradients_of(leaves, x, plain.weights))
        except Exception as error:  # it would be lost with the thread
            found = f"{type(error).__name__}: {error}"
        if found is not None:
            wrong.append(found)

    running = [threading.Thread(target=call) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return wrong[0] if wrong else None


def without_gradient(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """``no_grad`` and ``inference_mode``."""
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            message = compared(subject, plain, subject.run(subject.fresh(False)), {})
        if message is not None:
            return message
    return None


def some_gradients(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """Only one of the data requires a gradient."""
    leaves = subject.fresh(False)
    name = str(rng.choice(list(leaves)))
    leaves[name].requires_grad_()
    x = subject.run(leaves)
    if not x.requires_grad:
        return f"the output has no graph, though {name} requires a gradient"
    return compared(subject, plain, x, gradients_of({name: leaves[name]}, x, plain.weights))


def hooks_on_saved_tensors(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """What is saved for the backward pass is packed away in the meantime."""
    leaves = subject.fresh()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        x = subject.run(leaves)
    return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))


def checkpointed(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """The forward pass is run again in the backward pass."""
    leaves = subject.fresh()
    names = list(leaves)
    x = torch.utils.checkpoint.checkpoint(
        lambda *tensors: subject.run(dict(zip(names, tensors, strict=True))), *leaves.values(), use_reentrant=False
    )
    return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))


def anomalies(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """``detect_anomaly``, and deterministic algorithms."""
    leaves, before = subject.fresh(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=False):
            x = subject.run(leaves)
            return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))
    finally:
        torch.use_deterministic_algorithms(before)


def default_type(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """Another default type."""
    torch.set_default_dtype(torch.float64)
    try:
        leaves = subject.fresh()
        x = subject.run(leaves)
        return compared(subject, plain, x, gradients_of(leaves, x, plain.weights))
    finally:
        torch.set_default_dtype(torch.float32)


def scaled_cotangent(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """A loss that is multiplied by 2^±60 has gradients that are multiplied by it."""
    leaves, factor = subject.fresh(), float(rng.choice([2.0**60, 2.0**-60]))
    x = subject.run(leaves)
    gradients = gradients_of(leaves, x, factor * plain.weights)
    return compared(subject, plain, x, {name: part / factor for name, part in gradients.items()})


def poisoned_cotangent(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """The loss of one element is NaN: the gradients of the others are what they were."""
    leaves = subject.fresh()
    x = subject.run(leaves)
    element = int(rng.integers(len(x)))
    weights = plain.weights.clone()
    weights[element] = torch.nan
    try:
        gradients = gradients_of(leaves, x, weights)
    except ValueError as error:  # it says which element
        return None if f"elements [{element}]" in str(error) else str(error)
    shared = {name for name, leaf in subject.leaves.items() if len(leaf) and bool((leaf == leaf[:1]).all())}
    others = [place for place in range(len(x)) if place != element]
    for name, part in gradients.items():
        if name in shared:
            continue
        off = float((part[others] - plain.gradients[name][others]).abs().max()) if part[others].numel() else 0.0
        largest = max(float(part.abs().max()) for part in plain.gradients.values() if part.numel())
        if not off <= 10 * (ROUNDING if subject.exact else 1e-3) * max(largest, 1e-6):
            return f"the gradient of {name} in other elements differs by {off:.1e}"
    return None


def forked(subject: Subject, plain: Plain, rng: np.random.Generator) -> str | None:
    """A child of this process, which has solved before, solves too."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            leaves = subject.fresh()
            x = subject.run(leaves)
            message = compared(subject, plain, x, {}) or "same"
        except BaseException as error:  # it must not go on as a second worker
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode()[:4000])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 70.0)
    message = os.read(reading, 4096).decode() if ready else ""
    os.close(reading)
    os.waitpid(child, 0)
    return None if message == "same" else message or "the child did not answer"


PATTERNS: dict[str, Pattern] = {
    "two forwards": two_forwards,
    "backward twice": backward_twice,
    "accumulated": accumulated,
    "inputs mutated": inputs_mutated,
    "output mutated": output_mutated,
    "threads": threads,
    "without gradient": without_gradient,
    "some gradients": some_gradients,
    "hooks on saved tensors": hooks_on_saved_tensors,
    "checkpointed": checkpointed,
    "anomalies": anomalies,
    "default type": default_type,
    "scaled cotangent": scaled_cotangent,
    "poisoned cotangent": poisoned_cotangent,
    "forked": forked,
}


def try_pattern(rng: np.random.Generator, subject: Subject, chunk: Chunk, where: str, name: str | None = None) -> None:
    """Try one pattern, and note what is wrong with it."""
    if not subject.judged.any():
        return
    name = name or str(rng.choice(list(PATTERNS)))
    if name == "forked" and rng.random() < 0.7:
        name = "two forwards"
    chunk.patterns[name] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            message = PATTERNS[name](subject, plain_call(subject, rng), rng)
        except SolverError as error:
            message = f"SolverError: {error}"
    if message is not None:
        chunk.fault(f"pattern: {name}", f"{message}; {where}")
