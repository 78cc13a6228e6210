"""Plots: envelopes along a cut through parameter space, sweeps of τ and ρ, and paths of solutions.

Matplotlib is imported when a plot is made (``pip install "lpgd[plots]"``); every function returns its axes, on a
figure of their own unless some were given, and shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.diagnostics.measurement import Measurement
from lpgd.diagnostics.moreau import envelope_values
from lpgd.diagnostics.passes import Loss, Parameters, Pass
from lpgd.diagnostics.sweeps import Sweep, SweepRow
from lpgd.layers.base import BaseLayer
from lpgd.status import MissingPackageError

__all__ = ["plot_envelopes", "plot_perturbed_path", "plot_solution_path", "plot_sweep"]

MAX_LINES = 12


def plot_envelopes(
    layer: BaseLayer,
    parameters: Parameters,
    direction: Parameters,
    loss: Loss,
    taus: Sequence[float],
    rhos: Sequence[float] = (0.0,),
    at: Sequence[float] | None = None,
    axes: Any = None,
) -> Any:
    """The loss and its envelopes along a cut ``parameters + t direction``, as Figure 1 of the LPGD paper.

    A panel for each envelope (lower, average, upper) and ρ; the loss in black, one colour for each τ.  Slopes of the
    coloured curves are what LPGD's gradients see; at each t the loss is linearised anew.

    Args:
        layer: any layer of this library.
        parameters: the arguments of its call for one element, without batch dimensions: a list, or a dictionary.
        direction: for each of them what t multiplies: a tensor of its shape, or None where it stays.
        loss: from the layer's output for a batch to one number for each element (sum over the last dimensions only).
        taus, rhos: τ and ρ.
        at: values of t; None is 201 from -1 to 1.
        axes: (len(rhos), 3) axes to draw on; None makes a figure.

    Returns:
        The (len(rhos), 3) array of axes.

    Raises:
        ValueError: the loss is not one number for each element, or the shapes do not fit.
    """
    steps = np.linspace(-1.0, 1.0, 201) if at is None else np.asarray(at, dtype=float)
    run = Pass(layer, _along(parameters, direction, steps), loss)
    if run.losses.shape != (len(steps),):
        raise ValueError(
            f"the loss has shape {tuple(run.losses.shape)} for a batch of {len(steps)}; it must return one number for "
            "each element: sum over the last dimension, not over the batch."
        )
    panels = _axes(axes, (len(rhos), 3), (12.0, 3.2 * len(rhos)), sharex=True, sharey=True)
    names = ("lower", "average", "upper")
    colors = _colors(len(taus))
    for row, rho in zip(panels, rhos, strict=True):
        found = [envelope_values(run, float(tau), float(rho)) for tau in taus]
        for name, panel in zip(names, row, strict=True):
            for tau, color, values in zip(taus, colors, found, strict=True):
                panel.plot(steps, _numbers(getattr(values, name)), color=color, label=f"τ = {tau:g}")
            panel.plot(steps, _numbers(run.losses), color="black", linewidth=1.2, label="loss")
            panel.set_title(f"{name}, ρ = {rho:g}")
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("t, along the cut")
    for panel in panels[:, 0]:
        panel.set_ylabel("loss")
    panels[0, 0].legend(fontsize="small")
    return panels


def plot_sweep(sweep: Sweep, axes: Any = None) -> Any:
    """What :func:`lpgd.sweep` found over τ: direction, movement, and what gradient steps do to the loss.

    Args:
        sweep: its result.
        axes: 3 axes to draw on; None makes a figure.

    Returns:
        The array of 3 axes: cosine with the exact gradient and, on a scale of its own, noise of the solver; share of
        elements that did not move; the loss taken away by a step of each parameter.  One line style for each ρ.
    """
    panels = _axes(axes, (1, 3), (14.0, 4.0)).ravel()
    beside = panels[0].twinx()
    rhos = sorted({row.rho for row in sweep.rows})
    for rho, style in zip(rhos, _cycle(["-", "--", ":", "-."], len(rhos)), strict=True):
        rows = [row for row in sweep.rows if row.rho == rho]
        taus = [row.tau for row in rows]
        options: dict[str, Any] = {"linestyle": style, "marker": "."}
        suffix = f", ρ = {rho:g}" if len(rhos) > 1 else ""
        cosines = [np.nan if row.exact is None else row.exact.cosine for row in rows]
        panels[0].plot(taus, cosines, color="C0", label=f"cosine with exact{suffix}", **options)
        beside.plot(taus, [row.measurement.noise or np.nan for row in rows], color="C3", alpha=0.6, **options)
        panels[1].plot(taus, [_percent(row, "still") for row in rows], color="C1", label=f"ρ = {rho:g}", **options)
        for position, name in enumerate(sweep.names):
            taken = [100 * row.measurement.decreases[position] for row in rows]
            panels[2].plot(taus, taken, color=f"C{position}", label=f"{name}{suffix}", **options)
    titles = ("direction", "perturbed solutions that did not move", "loss taken away by a step")
    for panel, title, unit in zip(panels, titles, ("", "% of elements", "% of the loss"), strict=True):
        panel.axvline(sweep.unit, color="gray", linewidth=1.0, linestyle=":")
        panel.set_xscale("log")
        panel.set_xlabel("τ (dotted: its unit)")
        panel.set_ylabel(unit)
        panel.set_title(title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0].set_ylim(-1.05, 1.05)
    panels[1].set_ylim(-5, 105)
    beside.set_yscale("log")
    beside.set_ylabel("noise of the solver, relative", color="C3")
    beside.tick_params(axis="y", colors="C3")
    return panels


def plot_solution_path(
    layer: BaseLayer,
    parameters: Parameters,
    direction: Parameters,
    at: Sequence[float] | None = None,
    output: int = 0,
    entries: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    """How the entries of a solution move along a cut ``parameters + t direction``: steps where it is a vertex.

    Args:
        layer, parameters, direction, at: as for :func:`plot_envelopes`.
        output: which of the layer's outputs.
        entries: which entries, flattened; None is the 12 that move most.
        axes: one axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    steps = np.linspace(-1.0, 1.0, 201) if at is None else np.asarray(at, dtype=float)
    moved = _along(parameters, direction, steps)
    with torch.no_grad():
        result = layer(**moved) if isinstance(moved, Mapping) else layer(*moved)
    chosen = result if isinstance(result, Tensor) else result[output]
    panel = _axes(axes, (1, 1), (7.0, 4.0))[0, 0]
    _draw_paths(panel, steps, _numbers(chosen).reshape(len(steps), -1), entries)
    panel.set_xlabel("t, along the cut")
    panel.set_title("solution")
    return panel


def plot_perturbed_path(
    layer: BaseLayer,
    parameters: Parameters,
    loss: Loss,
    rho: float = 0.0,
    taus: Sequence[float] | None = None,
    element: int = 0,
    entries: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    """How the perturbed solution of one element moves with τ: where LPGD's two ends are for each step.

    To the right the solution tilted by +τ (lower envelope: towards smaller loss), to the left by -τ (upper envelope).
    The slope between the two ends is the gradient with respect to a linear cost.

    Args:
        layer, parameters, loss: as for :func:`lpgd.diagnose`; the batch may have several elements.
        rho: ρ.
        taus: positive steps; None is 60 up to ten units (``GradientInfo.unit``).
        element: which element of the flattened batch.
        entries: which entries of the primal solution of the problem that is solved; None is the 12 that move most.
        axes: one axes to draw on; None makes a figure.

    Returns:
        The axes; τ is on a symmetric logarithmic scale.
    """
    run = Pass(layer, parameters, loss)
    unit = float(run.unit[element])
    if not np.isfinite(unit):
        raise ValueError(f"the gradient of the loss at the solution of element {element} is zero: it does not move.")
    steps = unit * np.geomspace(1e-3, 10.0, 60) if taus is None else np.sort(np.asarray(taus, dtype=float))
    found = run.perturbed_path(element, from_numpy(np.concatenate([-steps[::-1], steps])), rho)
    values = _numbers(torch.where(found.usable[:, None], found.x, torch.nan))
    values = np.insert(values, len(steps), _numbers(run.solution.x[element]), axis=0)
    panel = _axes(axes, (1, 1), (7.0, 4.0))[0, 0]
    _draw_paths(panel, np.concatenate([-steps[::-1], [0.0], steps]), values, entries)
    panel.set_xscale("symlog", linthresh=float(steps[0]))
    powers = 10.0 ** np.arange(np.floor(np.log10(steps[0])) + 2, np.log10(steps[-1]) + 1e-9)
    panel.set_xticks([*-powers[::-1], 0.0, *powers])
    for place in (-unit, unit):
        panel.axvline(place, color="gray", linewidth=1.0, linestyle=":")
    panel.set_xlabel("τ, positive: towards smaller loss (dotted: its unit)")
    panel.set_title(f"perturbed solution, ρ = {rho:g}")
    return panel


def _along(parameters: Parameters, direction: Parameters, steps: Any) -> Any:
    """The arguments of a batch along the cut: those that move have a leading dimension.

    Raises:
        ValueError: the direction has other entries than the parameters, or no parameter moves.
    """
    by_name = isinstance(parameters, Mapping)
    values: dict[Any, Any] = dict(parameters) if isinstance(parameters, Mapping) else dict(enumerate(parameters))
    keys = list(values)
    given: dict[Any, Any] = dict(direction) if isinstance(direction, Mapping) else dict(enumerate(direction))
    unknown = sorted(map(str, set(given) - set(keys)))
    if unknown or (not by_name and len(given) != len(keys)):
        raise ValueError(
            f"direction has entries for {sorted(map(str, given))} and the parameters are {list(map(str, keys))}; give "
            "one for each parameter, None where it stays."
        )
    moved: dict[Any, Any] = {}
    for key in keys:
        value = values[key]
        change = given.get(key)
        if change is not None:
            if not isinstance(value, Tensor) or tuple(change.shape) != tuple(value.shape):
                raise ValueError(f"the direction of {key} must be a tensor of its shape, or None.")
            t = torch.as_tensor(steps, dtype=torch.float64, device=value.device)
            change = change.detach().double()
            value = value.detach().double() + t.reshape(-1, *(1,) * value.ndim) * change
            value.requires_grad_()
        elif isinstance(value, Tensor):
            value = value.detach().double() if value.is_floating_point() else value
        moved[key] = value
    if all(change is None for change in given.values()):
        raise ValueError("every entry of the direction is None: nothing moves.")
    return moved if by_name else list(moved.values())


def _draw_paths(panel: Any, steps: Any, values: Any, entries: Sequence[int] | None) -> None:
    """One line for each entry: values is (steps, entries)."""
    if entries is None:
        spread = np.nanmax(values, axis=0) - np.nanmin(values, axis=0)
        entries = sorted(np.argsort(-spread, kind="stable")[:MAX_LINES].tolist())
    for color, entry in zip(_colors(len(entries)), entries, strict=True):
        panel.plot(steps, values[:, entry], color=color, label=str(entry))
    panel.set_ylabel("entries of the solution")
    panel.legend(fontsize="x-small", ncols=2, title="entry", loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.grid(alpha=0.3)


def _percent(row: SweepRow, name: str) -> float:
    found: Measurement = row.measurement
    value = getattr(found, name)
    return np.nan if value is None else 100 * value


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _cycle(styles: list[str], count: int) -> list[str]:
    return [styles[index % len(styles)] for index in range(count)]


def _colors(count: int) -> list[Any]:
    matplotlib = _matplotlib()
    return [matplotlib.colormaps["viridis"](0.9 * index / max(count - 1, 1)) for index in range(count)]


def _axes(axes: Any, shape: tuple[int, int], size: tuple[float, float], **options: Any) -> Any:
    """An array of axes: those that were given, or those of a new figure."""
    _matplotlib()
    if axes is None:
        from matplotlib import pyplot

        return pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False, **options)[1]
    given = np.asarray(axes, dtype=object)
    if given.size != shape[0] * shape[1]:
        raise ValueError(f"{given.size} axes were given; this plot needs {shape[0] * shape[1]}.")
    return given.reshape(shape)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            'plots need a package: pip install matplotlib, or lpgd with its extra: pip install "lpgd[plots]"'
        ) from error
    return matplotlib
