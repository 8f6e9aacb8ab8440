"""GEGLU in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor) -> Tensor:
    """(..., 2N) => (..., N): first half times erf-GELU of the second half."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="none")
