"""Gradients and tangents of a layer on a trial, compared with those of the planted programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from lpgd.gradients import GradientMethod
from tests.judge.families import Trial
from tests.judge.front_ends import Answer, as_gradients, leaves_of
from tests.judge.references import Gradients

__all__ = ["Differentiated", "Method", "differentiated"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Method(NamedTuple):
    """A gradient method and how it is used: in forward mode, or with a loss of x and y instead of one of x."""

    gradient: GradientMethod
    forward: bool = False
    duals: bool = False


class Differentiated(NamedTuple):
    """A call and its gradients, or its tangent.

    Attributes:
        answer: of the call.
        errors: relative ones (B,) by datum; of data that elements share, of the sum of their gradients.
        without: the errors with a loss that leaves out the elements of a mask (B,).
    """

    answer: Answer
    errors: dict[str, FloatArray]
    without: Callable[[BoolArray], dict[str, FloatArray]] = lambda mask: {}


def differentiated(trial: Trial, call: Callable[[dict[str, Tensor]], Answer], method: Method) -> Differentiated:
    """A call, and how far its gradients, or its tangent, are from those of the planted programs."""
    leaves = leaves_of(trial)
    if not trial.is_differentiated:
        return Differentiated(call(leaves), {})
    rng = np.random.default_rng([trial.seed, trial.chunk, 1])
    used = {name: leaf for name, leaf in leaves.items() if leaf.numel() and (name != "P" or trial.programs.P.any())}
    if method.forward:
        tangent = {
            name: torch.from_numpy(rng.normal(size=(trial.size, *leaf.shape[1:]))) for name, leaf in leaves.items()
        }
        tangent = {name: part[trial.places] for name, part in tangent.items()}
        tangent |= {name: tangent[name][:1].expand_as(tangent[name]) for name in trial.shared}
        tangent |= {name: torch.where(leaves[name] != 0, tangent[name], 0.0) for name in trial.on_pattern}
        tangent["P"] = (tangent["P"] + tangent["P"].mT) / 2 if "P" in used else 0.0 * tangent["P"]
        expected = trial.reference.change(as_gradients(tangent))
        expected[list(trial.spoilt)] = 0.0
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, tangent[name]) for name, leaf in leaves.items()}
            answer = call(duals)
            found = forward_ad.unpack_dual(answer.x).tangent
        assert found is not None
        largest = np.abs(expected).max(axis=1)
        error = np.abs(found.numpy() - expected).max(axis=1)
        return Differentiated(answer._replace(x=answer.x.detach()), {"x": error / np.maximum(largest, 1e-3)})
    for leaf in used.values():
        leaf.requires_grad_()
    weights = rng.normal(size=(trial.size, trial.programs.plan.n))[trial.places]
    dual_weights = rng.normal(size=(trial.size, trial.programs.cones.rows))[trial.places] if method.duals else None
    answer = call(leaves)
    outputs = [answer.x] if dual_weights is None or answer.y is None else [answer.x, answer.y]

    def errors(kept: FloatArray) -> dict[str, FloatArray]:
        """With the loss of each element times 1 or 0, (B, 1)."""
        own, own_dual = kept * weights, None if dual_weights is None else kept * dual_weights
        cotangents = [torch.from_numpy(part) for part in (own, own_dual) if part is not None][: len(outputs)]
        found = torch.autograd.grad(outputs, list(used.values()), cotangents, retain_graph=True)
        expected = trial.reference.gradients(own, own_dual)
        for element in trial.spoilt:  # they have no gradient
            for part in expected.parts().values():
                part[element] = 0.0
        for name in trial.on_pattern:
            getattr(expected, name)[getattr(trial.programs, name) == 0] = 0.0
        gradients = dict(zip(used, found, strict=True))
        force = {}
        if own_dual is None and trial.reference.frees_multipliers.any() and not trial.shared & {"b", "bounds"}:
            force = {"force": _of_the_objective(trial, own, gradients, expected)}
        return _errors(_summed(trial, gradients, expected, bool(force)), expected) | force

    every = np.ones((len(weights), 1))
    return Differentiated(answer, errors(every), lambda mask: errors(every * ~mask[:, None]))


def _of_the_objective(
    trial: Trial, weights: FloatArray, gradients: dict[str, Tensor], expected: Gradients
) -> FloatArray:
    """(B,) errors of the force of all rows and bounds together, where multipliers alone are not unique.

    Rows that depend on each other share it out as the solver's multipliers do, which is documented; what they have
    together, and the gradients with respect to P and q, which ``expected`` gets here, do not depend on that.
    """
    P, q, force = trial.reference.objective_gradients(weights)
    free = trial.reference.frees_multipliers & ~np.isin(np.arange(len(q)), list(trial.spoilt))
    expected.P[free], expected.q[free] = P[free], q[free]
    expected.P[free] *= trial.programs.P[free] != 0 if "P" in trial.on_pattern else 1.0
    nothing = torch.zeros(len(q), 0)
    rows, bounds = (gradients.get(name, nothing).detach().numpy() for name in ("b", "bounds"))
    found = np.zeros_like(force) if not rows.shape[1] else np.einsum("bmn,bm->bn", trial.programs.A, rows)
    found = found + bounds if bounds.shape[1] else found
    size = np.maximum(np.abs(force).max(axis=1), 0.1 * np.maximum(np.abs(weights).max(axis=1), 1e-3))
    return np.where(free, np.abs(found - force).max(axis=1) / size, 0.0)


def _summed(trial: Trial, gradients: dict[str, Tensor], expected: Gradients, with_free: bool) -> dict[str, Tensor]:
    """The gradients, of shared data their sums, in which ``expected`` is changed as well.

    ``with_free`` says that elements whose multipliers alone are not unique have gradients of P and q.
    """
    size = len(expected.q)
    for name in trial.shared & set(gradients):
        whole = trial.differentiable | np.isin(np.arange(size), list(trial.spoilt))
        if with_free and name in ("P", "q"):
            whole |= trial.reference.frees_multipliers
        if not whole.all():  # it has parts that are not known
            del gradients[name]
            continue
        gradients[name] = gradients[name].sum(0, keepdim=True).expand_as(gradients[name])
        part = getattr(expected, name)
        part[:] = part.sum(0, keepdims=True)
    return gradients


def _errors(found: dict[str, Tensor], expected: Gradients) -> dict[str, FloatArray]:
    """Errors of each datum's gradient in the maximum norm, relative to it, or to a tenth of the largest of all."""
    size = len(expected.q)
    known = {name: part.reshape(size, -1) for name, part in expected.parts().items() if name in found}
    largest = {name: np.abs(part).max(axis=1, initial=0.0) for name, part in known.items()}
    overall = np.maximum(np.fmax.reduce(list(largest.values())), 1e-3)  # NaN where a gradient is not known
    errors = {}
    for name, part in known.items():
        own = found[name].detach().numpy().reshape(size, -1)
        errors[name] = np.abs(own - part).max(axis=1, initial=0.0) / np.maximum(largest[name], 0.1 * overall)
    return errors
