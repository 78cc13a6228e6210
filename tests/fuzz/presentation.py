"""The same numbers in other clothes: memory layouts, shared data, batch shapes, sparse matrices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["LAYOUTS", "SPARSE", "Given", "Presentation", "bits", "draw_presentation", "laid_out", "shape_of"]

LAYOUTS = ("plain", "transposed", "strided", "offset", "negative", "batch last", "expanded")
SPARSE = ("coo", "csr", "csc")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory, differentiably."""
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([torch.full_like(tensor, torch.nan), tensor], dim=-1)[..., 1]
    if layout == "offset":
        return torch.cat([tensor.new_full((3,), torch.nan), tensor.reshape(-1)])[3:].view(tensor.shape)
    if layout == "negative" and tensor.dtype in (torch.float64, torch.float32):
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag  # a view with the negative bit
    if layout == "batch last" and tensor.ndim >= 2:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    return tensor


def sparse(tensor: Tensor, layout: str) -> Tensor:
    """A matrix, or a batch of them, as a sparse tensor; batches of compressed ones need equal counts of entries."""
    if layout == "coo":
        return tensor.to_sparse()
    try:
        return tensor.to_sparse_csr() if layout == "csr" else tensor.to_sparse_csc()
    except RuntimeError:
        return tensor.to_sparse()


def bits(tensor: Tensor) -> bytes:
    """The values as bytes, so that NaN equals itself."""
    dense = tensor.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    dense = dense.float() if dense.dtype is torch.bfloat16 else dense
    return dense.resolve_neg().numpy().tobytes() if dense.numel() else b""


@dataclass(frozen=True)
class Given:
    """A tensor as it was handed to a layer, and its bits then."""

    tensor: Tensor
    before: bytes

    @property
    def is_changed(self) -> bool:
        return bits(self.tensor) != self.before


@dataclass(frozen=True)
class Presentation:
    """How the data of a batch are handed to a layer.

    Attributes:
        batch: the leading dimensions, in place of (B,); a -1 among them.
        layouts: of the tensors by name; ``plain`` where there is none.
        sparse: of the matrices by name.
        share: what comes without a batch dimension if all elements have it in common.
    """

    batch: tuple[int, ...] = (-1,)
    layouts: dict[str, str] = field(default_factory=dict)
    sparse: dict[str, str] = field(default_factory=dict)
    share: frozenset[str] = frozenset()

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """(B, ...) as it is handed over."""
        layout = self.layouts.get(name, "plain")
        first = tensor.detach()[:1]
        if name in self.share and len(tensor) and bool((tensor.detach() == first).all()):
            own = tensor[0]
            if layout == "expanded":
                return own.expand(*shape_of(self.batch, len(tensor)), *own.shape)
            own = laid_out(own, layout) if layout != "batch last" else own
            return sparse(own, self.sparse[name]) if name in self.sparse and own.ndim == 2 else own
        tensor = tensor.reshape(*shape_of(self.batch, len(tensor)), *tensor.shape[1:])
        if name in self.sparse and tensor.ndim >= 3:
            return sparse(tensor, self.sparse[name])
        return laid_out(tensor, layout)

    def __str__(self) -> str:
        unusual = [f"{name} {layout}" for name, layout in {**self.layouts, **self.sparse}.items() if layout != "plain"]
        return f"batch {self.batch}" + (f", {', '.join(unusual)}" if unusual else "")


def shape_of(batch: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The leading dimensions of so many elements."""
    known = int(np.prod([part for part in batch if part >= 0]))
    if known == 0 or size % known or (-1 not in batch and known != size):
        return (size,)
    return tuple(size // known if part < 0 else part for part in batch)


def draw_presentation(
    rng: np.random.Generator, names: Sequence[str], matrices: Sequence[str], share: Collection[str]
) -> Presentation:
    """A random one.

    Args:
        rng: the source.
        names: of all tensors.
        matrices: those which may be sparse, together with those in the same string.
        share: those which may come without a batch dimension.
    """
    batch = [(-1,), (-1,), (5, -1), (1, -1), (-1, 1)][int(rng.integers(5))]
    layouts = {name: str(rng.choice(LAYOUTS)) for name in names if rng.random() < 0.6}
    kind = str(rng.choice(SPARSE))
    chosen = {name: kind for group in matrices if rng.random() < 0.2 for name in group}
    return Presentation(batch, layouts, chosen, frozenset(share if rng.random() < 0.8 else ()))
