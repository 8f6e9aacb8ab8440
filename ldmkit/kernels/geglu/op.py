"""The raw ops `ldmkit::geglu` and `ldmkit::geglu_backward`, and the differentiable function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.kernels.raw import applied, define, differentiate_once


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_fake(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


define("geglu", "(Tensor x, str backend) -> Tensor", _fake, rows=(0,), leading=True)
define("geglu_backward", "(Tensor grad, Tensor x, str backend) -> Tensor", _backward_fake, rows=(0, 1), leading=True)


class _Geglu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, backend: str) -> Tensor:
        result: Tensor = torch.ops.ldmkit.geglu(x, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.backend = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return differentiate_once("geglu_backward", grad, x, ctx.backend), None


_apply = applied(_Geglu)


def geglu(x: Tensor, backend: str) -> Tensor:
    """(..., 2N) => dense (..., N), differentiable once."""
    if torch.is_grad_enabled():
        result: Tensor = _apply(x, backend)
    else:
        result = torch.ops.ldmkit.geglu(x, backend)
    return result
