"""The raw ops `ldmkit::cross_attention` and `ldmkit::cross_attention_backward`, and the differentiable function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.kernels.raw import applied, define, differentiate_once

FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str backend) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)


def empty_heads_inside(like: Tensor) -> Tensor:
    """An empty (B, H, L, D) whose memory is a dense (B, L, H, D), so that merging its heads copies nothing."""
    batch, heads, length, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """The output; and log sum exp of every row of scores, (B, H, L), -inf where a query has no key."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads_inside(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads_inside(q), empty_heads_inside(k), empty_heads_inside(v)


define("cross_attention", FORWARD, _fake, rows=(0, 1, 2, 3))
define("cross_attention_backward", BACKWARD, _backward_fake, rows=(0, 1, 2, 3, 4, 5, 6, 7))


class _CrossAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.ldmkit.cross_attention(q, k, v, mask, scale, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, ctx.scale, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 6
        grad = torch.zeros_like(out) if grad is None else grad
        arguments = (grad, grad_lse, q, k, v, mask, out, lse, ctx.scale, ctx.backend)
        return *differentiate_once("cross_attention_backward", *arguments), None, None, None


_apply = applied(_CrossAttention)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp), both differentiable once, though not by the mask; arguments checked, all given."""
    mask = mask if mask is None else mask.expand(q.shape[0], -1, -1, -1)  # a row for every item, so that items are alike
    if torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _apply(q, k, v, mask, scale, backend)
    else:
        result = torch.ops.ldmkit.cross_attention(q, k, v, mask, scale, backend)
    return result
