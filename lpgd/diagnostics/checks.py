"""Is this derivative right?  Reverse mode against central differences that know when they are no judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpgd.diagnostics.passes import Leaf, as_leaves, collected_warnings
from lpgd.diagnostics.tables import format_number, format_table

__all__ = ["GradientCheck", "GradientCheckError", "InputCheck", "gradcheck"]


class GradientCheckError(AssertionError):
    """A derivative is wrong, or could not be judged.

    Attributes:
        check: the :class:`GradientCheck`.
    """

    def __init__(self, check: GradientCheck) -> None:
        super().__init__(str(check))
        self.check = check


@dataclass(frozen=True)
class InputCheck:
    """One input.

    Attributes:
        name: its position or name.
        checked: entries that were compared.
        wrong: those whose derivative is not what differences give.
        kinks: those at a kink, where any slope between the one-sided ones is accepted.
        unclear: those where differences at two step sizes disagree (a jump or noise), so that they are no judge.
        worst: the entry with the largest error.
        derivative, difference: autograd's and the central difference's slope there.
    """

    name: str
    checked: int
    wrong: int
    kinks: int
    unclear: int
    worst: tuple[int, ...]
    derivative: float
    difference: float


@dataclass(frozen=True)
class GradientCheck:
    """What :func:`gradcheck` found; printed it is a table.

    Attributes:
        inputs: one for each differentiated input.
        step: of the differences, relative to an input's largest entry.
        conclusion: one sentence.
    """

    inputs: tuple[InputCheck, ...]
    step: float

    @property
    def ok(self) -> bool:
        """Whether no entry is wrong, and no input has more unclear entries than judged ones."""
        return all(one.wrong == 0 and 2 * one.unclear <= one.checked for one in self.inputs)

    @property
    def conclusion(self) -> str:
        wrong = [one for one in self.inputs if one.wrong]
        if wrong:
            one = wrong[0]
            return (
                f"the derivative with respect to {one.name} is wrong for {one.wrong} of {one.checked} entries: at "
                f"entry {list(one.worst)} it is {one.derivative:.6g}, and differences give {one.difference:.6g}. For a "
                "solver of your own, look at the signs and the order of its multipliers first; LPGD with a finite tau "
                "is not meant to pass."
            )
        unclear = [one for one in self.inputs if 2 * one.unclear > one.checked]
        if unclear:
            return (
                f"differences with respect to {unclear[0].name} do not settle at a step of {self.step:g}: tighten the "
                "solver's tolerance or take a larger step (noise), or move the inputs away from a jump."
            )
        return "the derivatives are those that differences give."

    def __str__(self) -> str:
        header = ("input", "entries", "wrong", "at kinks", "unclear", "worst entry", "derivative", "difference")
        rows = [
            (
                one.name,
                *map(str, (one.checked, one.wrong, one.kinks, one.unclear, list(one.worst))),
                format_number(one.derivative, 6),
                format_number(one.difference, 6),
            )
            for one in self.inputs
        ]
        return "\n".join([f"{'right' if self.ok else 'WRONG'}: {self.conclusion}", *format_table(header, rows)])


def gradcheck(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    step: float = 1e-4,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    entries: int = 50,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> GradientCheck:
    """Compare the derivative of a layer, a solver or any differentiable function with central differences.

    The outputs are contracted with a fixed random cotangent; autograd's gradient of that number is compared, entry by
    entry, with ``(f(p + h) - f(p - h)) / 2h``.  One-sided slopes and a second step 2h tell smooth points from kinks,
    where any slope between the one-sided ones is right, and from jumps and noise, where differences judge nothing.
    (The solution of a linear program is a step function of its cost: away from jumps the right derivative is zero.)

    Args:
        function: a layer with any gradient method and solver (one that approximates on purpose, such as LPGD with a
            large τ, will and should fail), or a function of tensors; its output is a tensor or a nest of tuples, lists
            and dictionaries of tensors.
        inputs: its arguments: a list, or a dictionary by name.  Tensors that require a gradient are checked, or all
            floating-point ones where none does; these are taken in float64.
        step: h, relative to each input's largest entry.  Noise ε of a solver makes errors of ε/h, curvature h².
        rtol, atol: an error of ``atol + rtol |slope|`` passes, with the largest slope of the input.
        entries: of each input, that many are drawn and checked.
        seed: of the cotangent and the entries.
        raise_on_failure: raise unless the check is :attr:`GradientCheck.ok`.

    Raises:
        GradientCheckError: a derivative is wrong, or differences settle for less than half of an input's entries.
        ValueError: no output depends on the inputs.
    """
    leaves, positional, named = as_leaves(inputs)
    contracted = _Contracted(function, leaves, positional, named, seed)
    with collected_warnings():
        value = contracted([leaf.values for leaf in leaves])
        if not value.requires_grad:
            raise ValueError("no output depends differentiably on the inputs: is something detached?")
        gradients = torch.autograd.grad(value, [leaf.values for leaf in leaves], materialize_grads=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            checks = tuple(
                _check_input(contracted, leaves, position, gradient, step, rtol, atol, entries, generator)
                for position, gradient in enumerate(gradients)
            )
    check = GradientCheck(checks, step)
    if raise_on_failure and not check.ok:
        raise GradientCheckError(check)
    return check


class _Contracted:
    """The function as one number: its floating-point outputs times a fixed random cotangent, summed."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Leaf],
        positional: Sequence[Any],
        named: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.function, self.leaves, self.positional, self.named = function, leaves, positional, named
        self.seed = seed

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        positional, named = list(self.positional), dict(self.named)
        for leaf, value in zip(self.leaves, values, strict=True):
            if isinstance(leaf.key, str):
                named[leaf.key] = leaf.build(value)
            else:
                positional[leaf.key] = leaf.build(value)
        outputs = [output for output in _tensors(self.function(*positional, **named)) if output.is_floating_point()]
        if not outputs:
            raise ValueError("the function returned no floating-point tensor.")
        generator = torch.Generator().manual_seed(self.seed)
        terms = [
            (output * torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)).sum()
            for output in outputs
        ]
        return torch.stack(terms).sum()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.to_dense() if output.layout is not torch.strided else output]
    members: Sequence[Any] = ()
    if isinstance(output, Mapping):
        members = list(output.values())
    elif isinstance(output, (tuple, list)):
        members = output
    elif dataclasses.is_dataclass(output):
        members = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for member in members for tensor in _tensors(member)]


def _check_input(
    contracted: _Contracted,
    leaves: Sequence[Leaf],
    position: int,
    gradient: Tensor,
    step: float,
    rtol: float,
    atol: float,
    entries: int,
    generator: torch.Generator,
) -> InputCheck:
    values = [leaf.values.detach() for leaf in leaves]
    original = values[position]
    h = step * (float(original.abs().max()) if original.numel() else 0.0) or step
    center = float(contracted(values))
    chosen = torch.randperm(original.numel(), generator=generator)[:entries].sort().values.tolist()
    slopes = []
    for entry in chosen:
        ends = []
        for shift in (2 * h, h, -h, -2 * h):
            moved = original.clone()
            moved.view(-1)[entry] += shift
            values[position] = moved
            ends.append(float(contracted(values)))
        slopes.append(_Slopes(*ends, center=center, h=h))
    values[position] = original
    size = max((abs(slope.central) for slope in slopes if slope.settles(atol, rtol, 0.0)), default=0.0)
    tolerance = atol + rtol * size
    flat = gradient.flatten()
    wrong = kinks = unclear = 0
    worst, worst_error = 0, -1.0
    for place, (entry, slope) in enumerate(zip(chosen, slopes, strict=True)):
        derivative = float(flat[entry])
        low, high = slope.central, slope.central
        if slope.is_kink(tolerance):
            kinks += 1
            low, high = sorted((slope.right, slope.left))
        elif not slope.settles(atol, rtol, size):
            unclear += 1
            continue
        error = max(low - derivative, derivative - high, 0.0)
        wrong += error > tolerance or derivative != derivative
        if error > worst_error:
            worst, worst_error = place, error
    at = torch.unravel_index(torch.tensor(chosen[worst]), original.shape) if chosen and original.ndim else ()
    return InputCheck(
        leaves[position].name,
        len(chosen),
        int(wrong),
        kinks,
        unclear,
        tuple(int(index) for index in at),
        float(flat[chosen[worst]]) if chosen else 0.0,
        slopes[worst].central if chosen else 0.0,
    )


class _Slopes:
    """Difference quotients at h and 2h."""

    def __init__(self, far: float, near: float, near_back: float, far_back: float, *, center: float, h: float) -> None:
        self.central, self.wide = (near - near_back) / (2 * h), (far - far_back) / (4 * h)
        self.right, self.left = (near - center) / h, (center - near_back) / h
        self.wide_right, self.wide_left = (far - center) / (2 * h), (center - far_back) / (2 * h)

    def settles(self, atol: float, rtol: float, size: float) -> bool:
        """Whether halving the step changes little: not so at jumps, and where noise is as large as slopes."""
        return abs(self.central - self.wide) <= atol + 3 * rtol * max(size, abs(self.central))

    def is_kink(self, tolerance: float) -> bool:
        """Whether each one-sided slope settles, and on different values; at a smooth point they close in as h."""
        gap, wide_gap = abs(self.right - self.left), abs(self.wide_right - self.wide_left)
        settled = max(abs(self.right - self.wide_right), abs(self.left - self.wide_left)) <= 0.1 * gap
        return gap > tolerance and gap > 0.9 * wide_gap and settled
