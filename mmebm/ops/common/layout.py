"""How all ops see a tensor of the state: as rows of chains, and in the dtype of the arithmetic."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# The dtype of the arithmetic of 16-bit storage
WIDE: Final = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def widen(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic: float32 for 16-bit storage, else its own."""
    return x.to(WIDE.get(x.dtype, x.dtype))


def per_chain(x: Tensor) -> Tensor:
    """``x`` as (chains, elements)."""
    # not reshape(chains, -1), which is ambiguous without chains
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
