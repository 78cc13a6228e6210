"""What has been worked out from a tensor, for as long as the tensor lives and does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lpgd.arrays import is_differentiated

__all__ = ["TensorMemo"]

Value = TypeVar("Value")


class TensorMemo:
    """Values by tensor: a perturbed problem holds the very matrices of the original one, and asks for them again.

    Tensors that take part in differentiation, and inference tensors, which do not count their changes, are not kept.
    """

    def __init__(self) -> None:
        self.known: Any = WeakTensorKeyDictionary()
        self.lock = threading.Lock()

    def __call__(self, tensor: Tensor, key: Any, compute: Callable[[], Value]) -> Value:
        """``compute()``, unless it is known for this key from an earlier call with this tensor, unchanged since."""
        if tensor.is_inference() or is_differentiated(tensor):
            return compute()
        entry = (key, tensor._version)
        with self.lock:
            values = self.known.get(tensor)
            if values is not None and entry in values:
                return values[entry]
        value = compute()
        with self.lock:
            self.known.setdefault(tensor, {})[entry] = value
        return value
