"""Attention as torch's scaled_dot_product_attention, with one meaning of masks on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 4096
"""Scores per head up to which training in half precision on a CPU writes them out: torch's fused backward is many times slower
there (16 to 64 queries, measured with AVX-512)."""


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v; mask is None or broadcasts to (B, H, L, S), bool (True = attend) or additive."""
    if mask is not None:
        k, v = without_hidden(k, mask), without_hidden(v, mask)
    if q.is_cpu:
        dtype = q.dtype
        if dtype.itemsize == 2 and q.shape[2] * k.shape[2] <= SMALL and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                return attend_in_products(q.float(), k.float(), v.float(), mask, scale).to(dtype)
    if mask is None or q.is_cpu:  # on the CPU a fully masked row gives 0 already, as the tests show
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return attend_without_dead_rows(q, k, v, mask, scale)


def attend_without_dead_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same where torch's kernel may give NaN for a row without keys: such rows get keys, and what they give is set to 0."""
    boolean = mask.dtype == torch.bool
    dead_1 = ~(mask if boolean else mask > float("-inf")).any(dim=-1, keepdim=True)
    mask = mask | dead_1 if boolean else mask.masked_fill(dead_1, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(dead_1, 0.0)


def attend_in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by two products and a softmax, all scores in memory; in fp32, since half-precision scores are too coarse."""
    scores_BHLS = (q * scale) @ k.transpose(-1, -2)
    if mask is None:
        return scores_BHLS.softmax(dim=-1) @ v
    additive = mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    dead_1 = (additive == float("-inf")).all(dim=-1, keepdim=True)
    weights_BHLS = (scores_BHLS + additive.masked_fill(dead_1, 0.0)).softmax(dim=-1).masked_fill(dead_1, 0.0)
    return weights_BHLS @ v


def without_hidden(keys: Tensor, mask: Tensor) -> Tensor:
    """Keys (or values) with those set to 0 that no query of a head may see: 0 times a NaN in them would be NaN."""
    seen_BHLS = mask if mask.dtype == torch.bool else mask != float("-inf")
    return keys.masked_fill(~seen_BHLS.any(dim=2)[..., None], 0.0)


def log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """log sum exp(scale q k^T + mask) over keys, (B, H, L), in at least float32; -inf, with gradient 0, where there is none."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        k = k if mask is None else without_hidden(k, mask)
        scores_BHLS = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
        if mask is None:
            return scores_BHLS.logsumexp(dim=-1)
        seen_BHLS = mask if mask.dtype == torch.bool else mask != float("-inf")
        dead_BHL = ~seen_BHLS.any(dim=-1)
        added = scores_BHLS if mask.dtype == torch.bool else scores_BHLS + mask.masked_fill(~seen_BHLS, 0.0)
        # A dead row keeps its scores, and loses their sum: the gradient of a row of -inf would be NaN.
        live_BHLS = added.masked_fill(~(seen_BHLS | dead_BHL[..., None]), float("-inf"))
        return live_BHLS.logsumexp(dim=-1).masked_fill(dead_BHL, float("-inf"))
