"""Every declarative node, with inputs in hostile clothes and of hostile values."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from tests.fuzz.cases import CHUNK, Chunk, source
from tests.fuzz.hostile import Subject, try_pattern
from tests.fuzz.node_references import distance
from tests.fuzz.presentation import LAYOUTS, Given, bits, laid_out, shape_of
from tests.judge.judge import warned_of
from tests.node_cases import NODES, NodeCase

__all__ = ["fuzz_node"]

STEPS = (1e-5, 3e-6)
PRECISE = 1e-6
GRADIENT = 1e-4

VALUES = ("regular", "regular", "regular", "large", "small", "rounded", "equal", "mixed")
"""What becomes of the first input."""
METHODS: dict[str, GradientMethod | None] = {
    "closed form": None,
    "implicit": lpgd.ImplicitKKT(),
    "lpgd": lpgd.LPGD(),
}


def draw_inputs(rng: np.random.Generator, case: NodeCase, values: str) -> tuple[Tensor, ...]:
    """A batch of :data:`CHUNK` elements."""
    parts: list[tuple[Tensor, ...]] = []
    while sum(len(part[0]) for part in parts) < CHUNK:
        parts.append(case.make(int(rng.integers(2**31))))
    inputs = [torch.cat(rows)[:CHUNK].clone() for rows in zip(*parts, strict=True)]
    first = inputs[0]
    # Pendulums begin at up to fifteen turns: from 1e5 on no controls are found, and that takes a minute.
    largest = 1e2 if isinstance(case.node, lpgd.nodes.OptimalControl) else 1e9
    scale = {"large": min(1e6, largest), "small": 1e-6}.get(values, 1.0)
    if values == "mixed":
        drawn = np.minimum(10.0 ** rng.integers(-8, 9, CHUNK), largest)
        scale = torch.from_numpy(drawn).reshape(-1, *(1,) * (first.ndim - 1))
    if values == "rounded":
        first = first.round(decimals=int(rng.integers(0, 2)))
    if values == "equal":
        first = first[..., :1].expand_as(first).clone()
    inputs[0] = first * scale
    return tuple(inputs)


def fuzz_node(seed: int, number: int) -> Chunk:
    """One batch of inputs of one node."""
    rng, chunk = source("node", seed, number), Chunk(number)
    name = str(rng.choice(list(NODES)))
    case, values = NODES[name], str(rng.choice(VALUES))
    if isinstance(case.node, lpgd.nodes.OptimalTransport) and values in ("large", "mixed"):
        values = "rounded"  # plans have zeros, at which their objective has no slope to judge by
    inputs = draw_inputs(rng, case, values)
    spoilt = {}
    if rng.random() < 0.4:
        for element in rng.choice(CHUNK, int(rng.integers(1, 4)), replace=False):
            place, bad = int(rng.integers(len(inputs))), float(rng.choice([np.nan, np.inf]))
            inputs[place][element].view(-1)[int(rng.integers(inputs[place][element].numel()))] = bad
            spoilt[int(element)] = f"{bad} in input {place}"
    method = str(rng.choice(["closed form", "closed form", *METHODS]))
    layer = lpgd.NodeLayer(case.node, METHODS[method], on_error="nan")
    batch = [(-1,), (5, -1), (1, -1), (-1, 1)][int(rng.integers(4))]
    layouts = [str(rng.choice(LAYOUTS)) for _ in inputs]
    given: list[Given] = []

    def run(leaves: dict[str, Tensor]) -> Tensor:
        given.clear()
        shown = [
            laid_out(leaf.reshape(*shape_of(batch, len(leaf)), *leaf.shape[1:]), layout)
            for leaf, layout in zip(leaves.values(), layouts, strict=True)
        ]
        given.extend(Given(tensor, bits(tensor)) for tensor in shown)
        y: Any = layer(*shown)
        records.append(y.info)
        return y.reshape(len(leaves["0"]), *y.shape[len(shape_of(batch, len(leaves["0"]))) :])

    records: list[Any] = []
    where = f"node, {name}, {method}, {values}, batch {batch}, {layouts}, {spoilt or 'nothing spoilt'}"
    leaves = {str(place): tensor for place, tensor in enumerate(inputs)}
    outcomes, details = judged(rng, case, layer, run, leaves, spoilt, records)
    chunk.add(outcomes, details, where)
    if any(one.is_changed for one in given):
        chunk.fault("input changed", where)
    good = np.array([outcome == "right" and place not in spoilt for place, outcome in enumerate(outcomes)])
    subject = Subject(leaves, run, lambda: [one.tensor for one in given], judged=good)
    if rng.random() < 0.3 and values == "regular":
        try_pattern(rng, subject, chunk, where)
    return chunk


def judged(
    rng: np.random.Generator,
    case: NodeCase,
    layer: lpgd.NodeLayer,
    run: Any,
    leaves: dict[str, Tensor],
    spoilt: dict[int, str],
    records: list[Any],
) -> tuple[list[str], list[str]]:
    """What became of each element, and a detail."""
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    said = np.zeros(CHUNK, dtype=bool)
    failure = ""
    gradients: dict[str, Tensor] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = run(own)
        info = records[-1]
        weights = torch.from_numpy(rng.normal(size=tuple(y.shape)))
        try:
            found = torch.autograd.grad(y, list(own.values()), weights, allow_unused=True)
            gradients = {
                name: torch.zeros_like(leaf) if part is None else part
                for (name, leaf), part in zip(own.items(), found, strict=True)
            }
        except lpgd.SolverError as error:  # it names the elements that have no derivative
            failure = str(error)
    statuses = info.statuses
    said |= warned_of(info, caught, CHUNK)
    y = y.detach()
    usable = np.array([status.usable for status in statuses])
    judged_rows = np.flatnonzero(usable & y.reshape(CHUNK, -1).isfinite().all(1).numpy())
    off = np.full(CHUNK, np.nan)
    if judged_rows.size:
        left_out = (None,) * (len(layer.node.inputs) - len(leaves))
        chosen = layer.node.arrange(*(leaf[judged_rows] for leaf in leaves.values()), *left_out)
        # An input that was left out is arranged to one row for all elements.
        chosen = tuple(
            tensor.expand(judged_rows.size, *tensor.shape[-dimensions:]) if tensor.ndim == dimensions else tensor
            for tensor, dimensions in zip(chosen, layer.node.inputs.values(), strict=True)
        )
        off[judged_rows] = distance(case.node, chosen, y[judged_rows])
    wrong = np.zeros(CHUNK)
    if gradients:
        wrong = gradient_errors(rng, run, leaves, y, weights, gradients, usable)
    outcomes, details = [], []
    for element, status in enumerate(statuses):
        details.append(f"{status.name}, y {off[element]:.1e}, gradient {wrong[element]:.1e} {failure[:200]}")
        if element in spoilt and np.isnan(y[element]).any():
            outcomes.append("right" if not status.usable else "wrong status")
        elif not status.usable:
            outcomes.append("failed" if np.isnan(y[element]).all() else "wrong status")
        elif status is lpgd.Status.INACCURATE:
            outcomes.append("inaccurate")
        elif not off[element] <= PRECISE:
            outcomes.append("wrong x")
        elif failure:
            outcomes.append("refused")
        elif not wrong[element] <= GRADIENT:
            outcomes.append("warned" if said[element] else "wrong gradient")
        else:
            outcomes.append("cautious" if said[element] else "right")
    return outcomes, details


def gradient_errors(
    rng: np.random.Generator,
    run: Any,
    leaves: dict[str, Tensor],
    y: Tensor,
    weights: Tensor,
    gradients: dict[str, Tensor],
    usable: Any,
) -> np.ndarray[Any, Any]:
    """(B,) of the slope along a random direction; zero where differences of two steps do not agree."""
    sizes = {
        name: leaf.abs().reshape(CHUNK, -1).nan_to_num(0.0, 0.0, 0.0).amax(1).reshape(-1, *(1,) * (leaf.ndim - 1))
        for name, leaf in leaves.items()
    }
    direction = {
        name: sizes[name] * torch.from_numpy(rng.normal(size=tuple(leaf.shape))) for name, leaf in leaves.items()
    }
    slopes = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for step in STEPS:
            ends = [
                run({name: leaf + by * step * direction[name] for name, leaf in leaves.items()}) for by in (1.0, -1.0)
            ]
            for first, second in ((ends[0], y), (y, ends[1])):
                slopes.append((((first - second) / step) * weights).reshape(CHUNK, -1).sum(1).numpy())
    along = sum(
        ((gradients[name] * part).reshape(CHUNK, -1).nan_to_num(0.0).sum(1) for name, part in direction.items()),
        torch.zeros(CHUNK, dtype=torch.float64),
    ).numpy()
    size = sum(
        ((gradients[name] * part).reshape(CHUNK, -1).abs().nan_to_num(0.0).sum(1) for name, part in direction.items()),
        torch.zeros(CHUNK, dtype=torch.float64),
    ).numpy()
    # Directions are of the inputs' size: slopes below a share of this are zero to rounding, as at a vertex.
    rounding = 1e-9 * (weights * y).reshape(CHUNK, -1).abs().nan_to_num(0.0).sum(1).numpy()
    size = np.maximum(np.maximum(size, np.abs(slopes[0])), np.maximum(rounding, 1e-300))
    middle = (slopes[0] + slopes[1]) / 2, (slopes[2] + slopes[3]) / 2
    agreed = np.abs(middle[0] - middle[1]) <= 1e-5 * size
    agreed &= np.abs(slopes[0] - slopes[1]) <= 1e-2 * size  # on both sides: it is no kink
    # At a kink whose sides are nearly alike, what lies between them is a right answer.  Of a smooth function the gap
    # between the sides shrinks with the step.
    first, second = np.abs(slopes[0] - slopes[1]), np.abs(slopes[2] - slopes[3])
    kinked = np.abs(first - second) <= 0.1 * np.maximum(first, second)
    between = np.clip(along, np.minimum(*slopes[:2]), np.maximum(*slopes[:2]))
    error = np.abs(along - np.where(kinked, between, middle[0])) / size
    return np.where(agreed & usable, error, 0.0)
