"""What a computation allocates, by torch's own account."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Watches every operation of the block, backward passes too.

    largest: elements of the largest tensor that one returned, of a dtype or of any.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.largest = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.dtype in (None, tensor.dtype):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out
