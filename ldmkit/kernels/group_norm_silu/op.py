"""The raw ops `ldmkit::group_norm_silu` and `ldmkit::group_norm_silu_backward`, and the differentiable function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.kernels.layout import memory_format_of
from ldmkit.kernels.raw import applied, define, differentiate_once

FORWARD = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? shift, Tensor? residual,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, bool silu, Tensor? shift, Tensor? residual,"
    " Tensor mean, Tensor rstd, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; mean and 1 / standard deviation of every group, (N, groups), in float32 (float64 for float64)."""
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean_NG, rstd_NG = (x.new_empty((x.shape[0], num_groups), dtype=statistics) for _ in range(2))
    return y, mean_NG, rstd_NG


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (the residual's too), weight, bias (C,) and shift (N, C), whether those are there or not."""
    grad_x = torch.empty_like(x, memory_format=memory_format_of(x))
    channels = x.shape[1]
    return grad_x, x.new_empty(channels), x.new_empty(channels), x.new_empty(x.shape[:2])


define("group_norm_silu", FORWARD, _fake, rows=(0, 6, 7))
define("group_norm_silu_backward", BACKWARD, _backward_fake)  # the gradients of weight and bias are sums over rows


class _GroupNormSilu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        shift: Tensor | None,
        residual: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.ldmkit.group_norm_silu(
            x, num_groups, weight, bias, eps, silu, shift, residual, backend
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.num_groups, weight, bias, _, ctx.silu, shift, residual, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, shift, residual, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        x, weight, bias, shift, residual, mean, rstd = ctx.saved_tensors
        arguments = (grad, x, ctx.num_groups, weight, bias, ctx.silu, shift, residual, mean, rstd, ctx.backend)
        grad_x, grad_weight, grad_bias, grad_shift = differentiate_once("group_norm_silu_backward", *arguments)
        return (
            grad_x,
            None,
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
            None,
            None,
            None if shift is None else grad_shift,
            None if residual is None else grad_x,
            None,
        )


_apply = applied(_GroupNormSilu)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """Differentiable once; arguments checked, all given."""
    arguments = (x, num_groups, weight, bias, eps, silu, shift, residual, backend)
    if torch.is_grad_enabled():
        y: Tensor = _apply(*arguments)[0]
    else:
        y = torch.ops.ldmkit.group_norm_silu(*arguments)[0]
    return y
