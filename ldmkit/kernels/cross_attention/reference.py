"""Attention as torch's scaled_dot_product_attention, with one meaning of masks on every device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(scale q k^T + mask) v; mask is None or broadcasts to (B, H, L, S), bool (True = attend) or additive."""
    if mask is None or q.is_cpu:  # on the CPU a fully masked row gives 0 already, as the tests show
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # Elsewhere a row without keys is NaN or not, as the kernel that torch picks has it: give it keys, then zero what it gives.
    attend = mask if not mask.is_floating_point() else mask > float("-inf")
    empty_1 = ~attend.any(dim=-1, keepdim=True)
    mask = mask | empty_1 if not mask.is_floating_point() else mask.masked_fill(empty_1, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(empty_1, 0.0)
