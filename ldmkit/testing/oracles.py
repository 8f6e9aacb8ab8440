"""The kernel ops twice: by their formulas in float64, and as plain torch spells them. Arguments as in `ldmkit.kernels`.

The formulas are written without torch's fused functions and apart from `ldmkit.kernels.<op>.reference`, so that they share no
mistake with what they judge. All are differentiable. The plain ones are what a kernel's error is measured by: one torch
function after another, each result rounded to the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

INF = math.inf


def _phi(x: Tensor) -> Tensor:
    """The normal distribution function; erfc keeps its relative accuracy in the left tail, where 1 + erf cancels."""
    twice: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return twice / 2


def geglu(x: Tensor) -> Tensor:
    """Shazeer 2020, arXiv:2002.05202, eq. 6, with GELU(g) = g Phi(g) (Hendrycks and Gimpel 2016, arXiv:1606.08415, sec. 2)."""
    width = x.shape[-1] // 2
    value, gate = x[..., :width], x[..., width:]
    return value * (gate * _phi(gate))


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Shazeer 2020, arXiv:2002.05202, eq. 6: the projection, then the gate."""
    hidden = torch.einsum("...k,nk->...n", x, weight)
    return geglu(hidden if bias is None else hidden + bias)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Wu and He 2018, arXiv:1803.08494, eq. 1 and 2, in two passes; then y sigmoid(y)."""
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    h = x
    if shift is not None:
        h = h + shift.reshape(*shift.shape, *(1,) * (x.dim() - 2))
    if residual is not None:
        h = h + residual
    if h.numel():
        grouped = h.reshape(h.shape[0], num_groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        h = (centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        h = h * weight.reshape(per_channel)
    if bias is not None:
        h = h + bias.reshape(per_channel)
    return h * torch.sigmoid(h) if silu else h


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Vaswani et al. 2017, arXiv:1706.03762, eq. 1. Keys that nobody may see are taken out, and a row without keys is 0."""
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = _additive(mask, q)
    if bias is not None:
        seen = (bias > -INF) | bias.isnan()
        hidden = ~seen.expand(*q.shape[:3], k.shape[2]).any(dim=2)[..., None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    scores = torch.einsum("bhld,bhsd->bhls", q, k) * factor
    scores = scores if bias is None else scores + bias
    top = scores.detach().amax(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_full((*q.shape[:3], 1), -INF)
    weights = torch.exp(scores - top.masked_fill(top == -INF, 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    dead = total == 0
    out = torch.einsum("bhls,bhsd->bhld", weights / total.masked_fill(dead, 1.0), v)
    lse = (top.masked_fill(dead, 0.0) + total.masked_fill(dead, 1.0).log()).masked_fill(dead, -INF)[..., 0]
    return (out, lse) if return_lse else out


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -INF) if mask.dtype == torch.bool else mask.to(q.dtype)


EXACT: Mapping[str, Callable[..., Any]] = {
    "geglu": geglu,
    "geglu_linear": geglu_linear,
    "group_norm_silu": group_norm_silu,
    "cross_attention": cross_attention,
}
"""The formulas, for float64 tensors."""


def _plain_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _plain_geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _plain_geglu(F.linear(x, weight, bias))


def _plain_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    h = x if shift is None else x + shift.reshape(*shift.shape, *(1,) * (x.dim() - 2))
    h = h if residual is None else h + residual
    y = torch.group_norm(h, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _plain_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's unfused attention: its fused ones differ by device, and some have given NaN for some masks."""
    bias = _additive(mask, q)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if not return_lse:
        return out
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.to(wide)
    return out, torch.logsumexp(scores, dim=-1)


PLAIN: Mapping[str, Callable[..., Any]] = {
    "geglu": _plain_geglu,
    "geglu_linear": _plain_geglu_linear,
    "group_norm_silu": _plain_group_norm_silu,
    "cross_attention": _plain_cross_attention,
}
"""Plain torch, in any dtype."""
