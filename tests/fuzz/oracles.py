"""Layers over combinatorial solvers, judged by enumeration of all their points."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lpgd
from tests.fuzz.cases import CHUNK, Chunk, source
from tests.fuzz.hostile import Subject, try_pattern
from tests.fuzz.presentation import LAYOUTS, Given, bits, laid_out, shape_of
from tests.judge.judge import warned_of
from tests.oracles import ORACLES, OracleCase
from tests.test_direct_loss import POINTS, augmented, features, loss, solver, table

__all__ = ["fuzz_direct_loss", "fuzz_integer", "fuzz_oracle"]

MANNERS = ("plain", "plain", "refuses", "changes its input", "answers in float32", "answers a list")
SAYS = (
    lpgd.Status.SOLVED,
    lpgd.Status.WITHIN_GAP,
    lpgd.Status.INFEASIBLE,
    lpgd.Status.UNBOUNDED,
    lpgd.Status.INVALID_DATA,
)
"""Statuses that say something of the program itself."""
ENVELOPES = ("lower", "upper", "average")
VALUES = ("normal", "normal", "normal", "whole numbers", "large", "small", "zero")


def draw_costs(rng: np.random.Generator, shape: tuple[int, ...], values: str) -> Tensor:
    """A batch of costs."""
    costs = torch.from_numpy(rng.normal(size=(CHUNK, *shape)))
    if values == "whole numbers":
        return (3 * costs).round()
    return costs * {"large": 1e8, "small": 1e-8, "zero": 0.0}.get(values, 1.0)


def moody(function: Callable[[Any], Any], manners: str) -> Callable[[Any], Any]:
    """A solver as users write them: it may change what it was given, refuse some costs, or answer in other types."""

    def call(costs: Any) -> Any:
        if manners == "refuses" and costs.ravel()[0] > 1.5 * np.abs(costs).mean():
            return None if costs.ravel()[1] > 0 else lpgd.Status.INFEASIBLE
        answer = np.asarray(function(costs))
        if manners == "changes its input":
            costs[:] = np.nan
        if manners == "answers in float32":
            return answer.astype(np.float32)
        return answer.tolist() if manners == "answers a list" else answer

    return call


def refused(costs: Tensor) -> np.ndarray[Any, Any]:
    """(B,) whether a solver that refuses does so."""
    flat = costs.reshape(len(costs), -1)
    return (flat[:, 0] > 1.5 * flat.abs().mean(1)).numpy()


def unique(case: OracleCase, costs: Tensor) -> np.ndarray[Any, Any]:
    """(B,) whether the best point is alone."""
    values = case.sign * costs.flatten(1) @ case.points.flatten(1).mT
    best = values.topk(2, largest=False).values
    return (best[:, 1] - best[:, 0] > 1e-9 * values.abs().amax(1).clamp(min=1e-300)).numpy()


def fuzz_oracle(seed: int, number: int) -> Chunk:
    """One batch of costs of a :class:`lpgd.BlackboxLayer`."""
    rng, chunk = source("blackbox", seed, number), Chunk(number)
    case, values = ORACLES[int(rng.integers(len(ORACLES)))], str(rng.choice(VALUES))
    manners = str(
        rng.choice(["plain", "plain", "refuses", "changes its input", "answers in float32", "answers a list"])
    )
    envelope, tau = str(rng.choice(ENVELOPES)), float(10.0 ** rng.uniform(-2, 2))
    costs = draw_costs(rng, case.shape, values)
    size = float(costs.abs().max()) or 1.0
    spoilt = [int(place) for place in rng.choice(CHUNK, 3, replace=False)] if rng.random() < 0.4 else []
    for element in spoilt:
        costs[element].view(-1)[int(rng.integers(costs[element].numel()))] = float(
            rng.choice([np.nan, np.inf, -np.inf])
        )
    method: Any = lpgd.LPGD(tau=tau * size, envelope=envelope)  # type: ignore[arg-type]
    layer = lpgd.BlackboxLayer(moody(case.solver, manners), method, case.sense, on_error="nan", ndim=len(case.shape))
    batch, layout = [(-1,), (5, -1), (1, -1), (-1, 1)][int(rng.integers(4))], str(rng.choice(LAYOUTS))
    where = f"blackbox, {case.name}, {manners}, {envelope}, {values}, batch {batch}, {layout}, spoilt {spoilt}"
    given: list[Given] = []
    records: list[Any] = []

    def run(leaves: dict[str, Tensor]) -> Tensor:
        own = leaves["costs"]
        shown = laid_out(own.reshape(*shape_of(batch, len(own)), *case.shape), layout)
        given[:] = [Given(shown, bits(shown))]
        answer = layer(shown)
        records.append(answer.info)
        return answer.reshape(len(own), *case.shape)

    leaf = costs.clone().requires_grad_()
    g = torch.from_numpy(rng.normal(size=tuple(costs.shape)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = run({"costs": leaf})
        (gradient,) = torch.autograd.grad(x, leaf, g)
    said = warned_of(records[-1], caught, CHUNK)
    if given[0].is_changed:
        chunk.fault("input changed", where)
    x = x.detach()
    finite = costs.nan_to_num(0.0, 0.0, 0.0)
    step = tau * size
    ends = {"lower": (1.0, 0.0), "upper": (0.0, -1.0), "average": (1.0, -1.0)}[envelope]
    points = [finite + case.sign * step * by * g for by in (0.0, *ends)]
    alone = np.all([unique(case, point) for point in points], axis=0)
    expected = case.difference(finite, g, step, envelope)
    best = (case.sign * finite.flatten(1) @ case.points.flatten(1).mT).amin(1)
    found = case.sign * (finite * x).flatten(1).sum(1)
    scale = finite.flatten(1).abs().sum(1).clamp(min=1e-300)
    failing = [refused(point) if manners == "refuses" else np.zeros(CHUNK, bool) for point in points]
    outcomes, details = [], []
    for element in range(CHUNK):
        off = float(abs(found[element] - best[element]) / scale[element])
        wrong = float((gradient[element] - expected[element]).abs().max()) * step
        details.append(f"x {off:.1e}, gradient {wrong:.1e}")
        if element in spoilt or failing[0][element]:
            gone = bool(x[element].isnan().all()) and not bool(gradient[element].any())
            outcomes.append("right" if gone else "wrong status")
        elif not off <= 1e-9:
            outcomes.append("wrong x")
        elif failing[1][element] or failing[2][element]:
            outcomes.append("warned" if said[element] else "wrong gradient")
        else:
            outcomes.append("wrong gradient" if alone[element] and not wrong <= 1e-9 else "right")
    chunk.add(outcomes, details, where)
    good = np.array([outcome == "right" and place not in spoilt for place, outcome in enumerate(outcomes)])
    good &= ~np.any(failing, axis=0) & alone
    subject = Subject({"costs": costs}, run, lambda: [one.tensor for one in given], judged=good)
    if rng.random() < 0.3 and manners in ("plain", "changes its input") and not spoilt:
        try_pattern(rng, subject, chunk, where, str(rng.choice(PATTERNS)))
    return chunk


PATTERNS = (
    "two forwards", "backward twice", "inputs mutated", "output mutated", "threads", "without gradient",
    "hooks on saved tensors", "anomalies", "default type", "forked",
)  # fmt: skip
"""Those that keep the cotangent, in which these gradients are not linear."""


def fuzz_direct_loss(seed: int, number: int) -> Chunk:
    """One batch of weights of a :class:`lpgd.DirectLossLayer`."""
    rng, chunk = source("direct loss", seed, number), Chunk(number)
    values, envelope = str(rng.choice(VALUES)), str(rng.choice(ENVELOPES))
    tau = float(10.0 ** rng.uniform(-2, 1))
    w = draw_costs(rng, (4,), values)
    inputs = torch.from_numpy(rng.normal(size=(CHUNK, 4, 3)))
    targets = torch.from_numpy(POINTS[rng.integers(len(POINTS), size=CHUNK)])
    psi, losses = table(inputs, targets)
    step = tau * (float(w.abs().max()) or 1.0)
    spoilt = [int(place) for place in rng.choice(CHUNK, 3, replace=False)] if rng.random() < 0.4 else []
    for element in spoilt:
        w[element, int(rng.integers(4))] = float(rng.choice([np.nan, np.inf]))
    method = lpgd.DirectLoss(step, envelope=envelope)  # type: ignore[arg-type]
    layer = lpgd.DirectLossLayer(solver, features, loss, augmented, method, on_error="nan")
    layout = str(rng.choice(LAYOUTS))
    where = f"direct loss, {envelope}, {values}, {layout}, spoilt {spoilt}"
    leaf = w.clone().requires_grad_()
    shown = laid_out(leaf, layout)
    given = [Given(tensor, bits(tensor)) for tensor in (shown, inputs, targets)]
    weight = torch.from_numpy(rng.normal(size=CHUNK))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = layer(shown, inputs, target=targets)
        (gradient,) = torch.autograd.grad(found, leaf, weight)
    found = found.detach()
    found = found.detach()
    if any(one.is_changed for one in given):
        chunk.fault("input changed", where)
    finite = w.nan_to_num(0.0, 0.0, 0.0)
    rows, scores = torch.arange(CHUNK), torch.einsum("bpk,bk->bp", psi, finite)

    def chosen(by: float) -> tuple[Tensor, Tensor]:
        """Ψ and ℓ of the best x, and whether it is alone."""
        values = scores - by * torch.sign(weight)[:, None] * losses
        top = values.topk(2).values
        alone.append((top[:, 0] - top[:, 1] > 1e-9 * values.abs().amax(1).clamp(min=1e-300)).numpy())
        index = values.argmax(1)
        return psi[rows, index], losses[rows, index]

    alone: list[Any] = []
    (here, value), (better, _), (worse, _) = (chosen(by) for by in (0.0, step, -step))
    first, second, width = {
        "lower": (here, better, step),
        "upper": (worse, here, step),
        "average": (worse, better, 2 * step),
    }[envelope]
    expected = weight.abs()[:, None] * (first - second) / width
    outcomes, details = [], []
    for element in range(CHUNK):
        wrong = float((gradient[element] - expected[element]).abs().max()) * step
        details.append(f"loss {float(found[element]):.3g} for {float(value[element]):.3g}, gradient {wrong:.1e}")
        if element in spoilt:
            gone = bool(found[element].isnan()) and not bool(gradient[element].any())
            outcomes.append("right" if gone else "wrong status")
        elif alone[0][element] and float(found[element]) != float(value[element]):
            outcomes.append("wrong x")
        else:
            sure = all(part[element] for part in alone)
            outcomes.append("wrong gradient" if sure and not wrong <= 1e-9 else "right")
    chunk.add(outcomes, details, where)
    return chunk


def fuzz_integer(seed: int, number: int) -> Chunk:
    """One batch of integer programs of a :class:`lpgd.LPLayer`, judged by all points of a box."""
    rng, chunk = source("integer", seed, number), Chunk(number)
    n, top, rows = int(rng.integers(2, 6)), int(rng.integers(1, 3)), int(rng.integers(0, 3))
    values, envelope = str(rng.choice(VALUES[:-1])), str(rng.choice(ENVELOPES))
    c = draw_costs(rng, (n,), values)
    size = float(c.abs().max()) or 1.0
    G = torch.from_numpy(rng.integers(-3, 6, size=(CHUNK, rows, n)).astype(float))
    points = torch.from_numpy(np.array(list(itertools.product(range(top + 1), repeat=n)), dtype=float))
    # Halves, so that no point is at the border: rounding could not say what is feasible.
    h = (G @ points[torch.from_numpy(rng.integers(len(points), size=CHUNK))][:, :, None])[:, :, 0] + 0.5
    empty = rng.random(CHUNK) < (0.05 if rows else 0.0)
    h[empty] = -0.5 + (G[empty].clamp(max=0.0).sum(-1) * top) - 1.0
    step = float(10.0 ** rng.uniform(-1, 1)) * size
    layer = lpgd.LPLayer(gradient=lpgd.LPGD(tau=step, envelope=envelope), on_error="nan", integer=range(n))  # type: ignore[arg-type]
    leaf = c.clone().requires_grad_()
    layout = str(rng.choice(LAYOUTS))
    shown = [laid_out(part, layout) for part in (leaf, G, h)]
    given = [Given(tensor, bits(tensor)) for tensor in shown]
    arguments = {"G": shown[1], "h": shown[2]} if rows else {}
    g = torch.from_numpy(rng.normal(size=(CHUNK, n)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output: Any = layer(shown[0], lb=0.0, ub=float(top), **arguments)
        (gradient,) = torch.autograd.grad(output.x, leaf, g)
    said = warned_of(output.info, caught, CHUNK)
    where = f"integer, n {n}, 0 to {top}, {rows} rows, {envelope}, {values}, {layout}"
    if any(one.is_changed for one in given):
        chunk.fault("input changed", where)
    feasible = ((G @ points.mT) <= h[:, :, None]).all(1) if rows else torch.ones(CHUNK, len(points), dtype=torch.bool)

    def best(costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points, their values, and how far the next value is."""
        scores = torch.where(feasible, costs @ points.mT, torch.inf)
        two = scores.topk(2, largest=False).values
        return points[scores.argmin(1)], two[:, 0], two[:, 1] - two[:, 0]

    (here, value, gap), (plus, _, gap_plus), (minus, _, gap_minus) = (
        best(c + by * step * g) for by in (0.0, 1.0, -1.0)
    )
    ends = {"lower": (plus, here, step), "upper": (here, minus, step), "average": (plus, minus, 2 * step)}
    first, second, width = ends[envelope]
    sure = torch.stack([gap, gap_plus, gap_minus]).amin(0) > 1e-4 * (size + step)
    x, statuses = output.x.detach(), output.info.statuses
    outcomes, details = [], []
    for element in range(CHUNK):
        off = float(((c[element] * x[element]).sum() - value[element]).abs()) / size
        wrong = float((gradient[element] - (first - second)[element] / width).abs().max()) * step
        details.append(f"{statuses[element].name}, x {off:.1e}, gradient {wrong:.1e}")
        if not bool(feasible[element].any()):
            ended = statuses[element] is lpgd.Status.INFEASIBLE
            outcomes.append("right" if ended else "wrong status" if statuses[element] in SAYS else "failed")
        elif not statuses[element].usable:
            outcomes.append("wrong status" if statuses[element] in SAYS else "failed")
        elif not off <= 1e-5:
            outcomes.append("wrong x")
        elif sure[element] and not wrong <= 1e-5:  # a perturbed program may fail where the program did not
            outcomes.append("warned" if said[element] else "wrong gradient")
        else:
            outcomes.append("right")
    chunk.add(outcomes, details, where)
    return chunk
