"""Attention as torch's scaled_dot_product_attention, with one meaning of masks on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v; mask is None or broadcasts to (B, H, L, S), bool (True = attend) or additive."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    k, v = without_hidden(k, mask), without_hidden(v, mask)
    if q.is_cpu:  # a fully masked row gives 0 already, as the tests show
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return attend_without_dead_rows(q, k, v, mask, scale)


def without_hidden(keys_BHSD: Tensor, mask: Tensor) -> Tensor:
    """Keys or values that no query may attend to, set to 0: whatever they hold would meet a weight of 0, and 0 x NaN is NaN."""
    hidden_BHS = (~mask if mask.dtype == torch.bool else mask == float("-inf")).all(dim=2)
    return keys_BHSD.masked_fill(hidden_BHS.unsqueeze(-1), 0.0)


def attend_without_dead_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same where torch's kernel may give NaN for a row without keys: such rows get keys, and what they give is set to 0."""
    boolean = mask.dtype == torch.bool
    dead_1 = ~(mask if boolean else mask > float("-inf")).any(dim=-1, keepdim=True)
    mask = mask | dead_1 if boolean else mask.masked_fill(dead_1, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(dead_1, 0.0)


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
